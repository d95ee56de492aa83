"""Loaders: the order of the data, the random state, and workers that end in time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import Dataset

from detrelay.core.data.transforms import VisitSampler
from detrelay.core.engine.loaders import make_loader


class Visits(Dataset[dict[str, object]]):
    """Each item tells the visit it was asked for."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, visit: int) -> dict[str, object]:
        return {
            "pixel_values": torch.zeros(3, 32, 32),
            "labels": {"image_id": torch.tensor([visit])},
        }


def visits(loader: object) -> list[int]:
    return [int(label["image_id"]) for batch in loader for label in batch["labels"]]


def expected_visits(epoch: int) -> list[int]:
    sampler = VisitSampler(7, seed=3)
    sampler.set_epoch(epoch)
    return list(sampler)[:6]  # three batches of two; the seventh image does not fill one


@pytest.mark.parametrize("num_workers", [0, 1])
def test_accelerate_leaves_the_order_of_visits_alone(num_workers: int) -> None:
    accelerator = Accelerator()
    sampler = VisitSampler(7, seed=3)
    loader = accelerator.prepare(
        make_loader(Visits(), sampler, 2, num_workers=num_workers, drop_last=True)
    )
    # out of order and twice, as a resumed run may ask
    for epoch in (4, 0, 1, 1):
        sampler.set_epoch(epoch)
        loader.set_epoch(epoch)
        assert visits(loader) == expected_visits(epoch)
    sampler.set_epoch(5)
    loader.set_epoch(5)
    assert visits(accelerator.skip_first_batches(loader, 2)) == expected_visits(5)[4:]


def test_loading_takes_nothing_from_the_global_random_state() -> None:
    loader = Accelerator().prepare(make_loader(Visits(), VisitSampler(7, seed=3), 2))
    before = torch.get_rng_state()
    visits(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_outlive_signals_to_the_group() -> None:
    loader = make_loader(Visits(), VisitSampler(7, seed=3, shuffle=False), 1, num_workers=1)
    seen = []
    for batch in loader:
        seen += [int(label["image_id"]) for label in batch["labels"]]
        for worker in loader._iterator._workers:
            os.kill(worker.pid, signal.SIGINT)
            os.kill(worker.pid, signal.SIGTERM)
    assert seen == list(range(7))


@pytest.mark.slow
def test_workers_do_not_outlive_what_fails(tmp_path: Path) -> None:
    # neither a process of multiprocessing nor the program itself, which ends in other ways; a
    # worker that would live on kills whom it would keep waiting for ever, so that no clock is asked
    script = tmp_path / "fails.py"
    script.write_text(
        "import multiprocessing, os, signal\n"
        "import detrelay.core.engine.loaders as loaders\n"
        "from detrelay.core.data.transforms import VisitSampler\n"
        "loaders.collate = lambda items, divisor: items\n"
        "original = loaders._outlive_signals\n"
        "def watched(*arguments):\n"
        "    original(*arguments)\n"
        "    handler = signal.getsignal(signal.SIGTERM)\n"
        "    def end(*received):\n"
        "        handler(*received)\n"
        "        os.kill(os.getppid(), signal.SIGKILL)\n"
        "        os._exit(1)\n"
        "    signal.signal(signal.SIGTERM, end)\n"
        "loaders._outlive_signals = watched\n"
        "def fail(code):\n"
        "    global batches\n"
        "    sampler = VisitSampler(3, seed=0, shuffle=False)\n"
        "    batches = iter(loaders.make_loader([7, 8, 9], sampler, 1, num_workers=1))\n"
        "    next(batches)\n"
        "    raise SystemExit(code)\n"
        "child = multiprocessing.get_context('fork').Process(target=fail, args=[5])\n"
        "child.start()\n"
        "child.join()\n"
        "fail(child.exitcode + 1)\n"
    )
    ended = subprocess.run([sys.executable, str(script)], check=False)
    assert ended.returncode == 6
