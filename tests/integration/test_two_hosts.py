"""Two machines without a shared disk, simulated by two network namespaces (Linux, root)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from detrelay.core.engine.logging import read_metrics
from tiny_run import TINY, final_weights

SCRIPT = str(Path(__file__).parents[2] / "apps" / "train.py")
SETTINGS = (*TINY, "model.backbone_norm=eval", "data.num_train=16", "train.batch_size=2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Names of two connected namespaces; 10.77.0.1 and 10.77.0.2 on `link0`, `link1`."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs root and iproute2 to make network namespaces")
    names = [f"detrelay-{os.getpid()}-{rank}" for rank in range(2)]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        cable = ["link", "add", "link0", "netns", names[0], "type", "veth", "peer", "name", "link1"]
        ip(*cable, "netns", names[1])
        for rank, name in enumerate(names):
            ip("-n", name, "address", "add", f"10.77.0.{rank + 1}/24", "dev", f"link{rank}")
            ip("-n", name, "link", "set", f"link{rank}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def launch(host: str | None, rank: int, output: Path, *settings: str) -> subprocess.Popen[bytes]:
    """One machine of two, or (`host` None) one machine with two processes."""
    prefix = [] if host is None else ["ip", "netns", "exec", host]
    network = (
        ["--standalone", "--nproc_per_node", "2"]
        if host is None
        else ["--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(rank),
              "--master_addr", "10.77.0.1", "--master_port", "29511"]
    )  # fmt: skip
    resume = ["--resume"] if (output / "training.json").exists() else []
    return subprocess.Popen(
        [
            *(*prefix, sys.executable, "-m", "torch.distributed.run", *network, SCRIPT),
            *("--output", str(output), *resume, "--set", *SETTINGS, *settings),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={
            **os.environ,
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo" if host is None else f"link{rank}",
        },
    )


def finish(*processes: subprocess.Popen[bytes]) -> None:
    try:
        for process in processes:
            out, _ = process.communicate(timeout=900)
            assert process.returncode == 0, out.decode()[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_two_hosts_are_one_host_with_two_processes(hosts: list[str], tmp_path: Path) -> None:
    """Trained in two runs, each machine with its own checkpoints, against one run on one host."""
    finish(launch(None, 0, tmp_path / "one"))
    outputs = [tmp_path / f"host{rank}" for rank in range(2)]
    for epochs in (1, 2):
        settings = ("train.save_on_each_node=true", f"train.epochs={epochs}")
        finish(*(launch(host, rank, outputs[rank], *settings) for rank, host in enumerate(hosts)))
    one, two = (read_metrics(path / "metrics.jsonl") for path in (tmp_path / "one", outputs[0]))
    assert len(one) == len(two) == 10
    for first, second in zip(one, two, strict=True):
        assert (first["kind"], first["step"]) == (second["kind"], second["step"])
        key = "losses" if first["kind"] == "train" else "AP"
        assert second[key] == pytest.approx(first[key], rel=1e-6)
    weights, expected = final_weights(outputs[0]), final_weights(tmp_path / "one")
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    # the second host has complete checkpoints and nothing that belongs to the first
    assert {path.name for path in outputs[1].iterdir()} == {"training.json", "checkpoints"}
