"""What accelerate launch, the user and the recipe say together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from detrelay.apps import launch
from detrelay.apps.launch import cpu_quota, make_accelerator, set_threads, with_launch_settings
from detrelay.core.engine.logging import read_metrics
from detrelay.core.errors import RecipeError
from detrelay.core.recipes.recipe import Recipe, override
from tiny_run import shrink_backbone, skip_pictures, tiny_run

PRECISION = "ACCELERATE_MIXED_PRECISION"
ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
DYNAMO = "ACCELERATE_DYNAMO_BACKEND"


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    threads = torch.get_num_threads()
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("variables", "setting"),
    [
        ({PRECISION: "bf16"}, "train.mixed_precision=bf16"),
        ({PRECISION: "FP16"}, "train.mixed_precision=fp16"),
        ({ACCUMULATION: "4"}, "train.accumulation_steps=4"),
        ({DYNAMO: "INDUCTOR", "ACCELERATE_DYNAMO_MODE": "default"}, "train.compile=true"),
    ],
)
def test_what_the_recipe_leaves_open_is_taken_and_reported(
    variables: dict[str, str], setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    said: list[str] = []
    recipe = with_launch_settings(Recipe(), set(), said.append)
    assert recipe == override(Recipe(), [setting])
    (line,) = said
    assert line.startswith(setting)
    said.clear()
    assert with_launch_settings(recipe, set(), said.append) == recipe  # both say the same
    assert said == []


def test_what_launch_sets_when_nothing_is_asked_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    defaults = {
        PRECISION: "no", ACCUMULATION: "1", DYNAMO: "NO", "ACCELERATE_DYNAMO_MODE": "default",
        "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False", "ACCELERATE_USE_CPU": "False",
    }  # fmt: skip
    for name, value in defaults.items():
        monkeypatch.setenv(name, value)
    recipe = override(Recipe(), ["train.mixed_precision=bf16", "train.accumulation_steps=2"])
    assert with_launch_settings(recipe, set(), pytest.fail) == recipe


@pytest.mark.parametrize(
    ("variables", "settings", "message"),
    [
        ({PRECISION: "bf16"}, ["train.mixed_precision=fp16"], "=bf16 .* recipe says .*=fp16"),
        ({PRECISION: "bf16"}, ["train.mixed_precision=no"], "=bf16 .* recipe says .*=no"),
        ({PRECISION: "fp8"}, [], "asks for fp8"),
        ({ACCUMULATION: "4"}, ["train.accumulation_steps=2"], "steps=4 .* recipe says .*steps=2"),
        ({ACCUMULATION: "many"}, [], "must be a whole number, found 'many'"),
        ({DYNAMO: "EAGER"}, [], "ACCELERATE_DYNAMO_BACKEND=eager; .* set train.compile=true"),
        ({DYNAMO: "INDUCTOR", "ACCELERATE_DYNAMO_MODE": "max-autotune"}, [], "MODE=max-autotune"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, [], "clip gradients at 0.5"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, [], "Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, [], "parallelism"),
    ],
)
def test_what_contradicts_the_recipe_or_training_is_refused(
    variables: dict[str, str], settings: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    named = {setting.partition("=")[0] for setting in settings}
    with pytest.raises(RecipeError, match=message) as caught:
        with_launch_settings(override(Recipe(), settings), named, pytest.fail)
    assert "\n" not in str(caught.value)


def test_launched_accumulation_is_that_of_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate itself would divide every gradient by it and accumulate nothing."""
    shrink_backbone(monkeypatch)
    skip_pictures(monkeypatch)
    small = ("train.epochs=1", "train.batch_size=2")
    assert tiny_run(tmp_path / "recipe", *small, "train.accumulation_steps=2") == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv(ACCUMULATION, "2")
    assert tiny_run(tmp_path / "launched", *small) == 0
    norms = [
        [line.get("gradient_norm") for line in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("recipe", "launched")
    ]
    assert norms[0] == norms[1]


def test_the_accelerator_follows_only_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {PRECISION: "bf16", ACCUMULATION: "4", DYNAMO: "INDUCTOR"}.items():
        monkeypatch.setenv(name, value)
    accelerator = make_accelerator(Recipe())
    assert accelerator.mixed_precision == "no"
    assert accelerator.gradient_accumulation_steps == 1
    assert accelerator.state.dynamo_plugin.backend.value == "NO"


def test_fp16_is_refused_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    shrink_backbone(monkeypatch)
    with pytest.raises(ValueError, match=r"fp16 needs a GPU, found a CPU; set .*=no, or bf16"):
        tiny_run(tmp_path / "run", "train.mixed_precision=fp16")
    assert not (tmp_path / "run").exists()


CPU = SimpleNamespace(device=torch.device("cpu"), num_processes=1)


@pytest.mark.parametrize(
    ("accelerator", "threads", "variables", "expected"),
    [
        (CPU, None, {}, 5),
        (CPU, None, {"OMP_NUM_THREADS": "2"}, 3),  # torch already knows
        (CPU, 4, {"OMP_NUM_THREADS": "2"}, 4),
        (SimpleNamespace(device=torch.device("cpu"), num_processes=2), None, {}, 3),
        (SimpleNamespace(device=torch.device("cpu"), num_processes=2), 2, {}, 2),
        (SimpleNamespace(device=torch.device("cuda"), num_processes=1), None, {}, 3),
    ],
)
def test_threads(
    accelerator: Any,
    threads: int | None,
    variables: dict[str, str],
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "usable_cores", lambda: 5)
    torch.set_num_threads(3)
    set_threads(threads, accelerator)
    assert torch.get_num_threads() == expected


def test_threads_must_be_positive() -> None:
    with pytest.raises(ValueError, match="--threads must be at least 1, found 0"):
        set_threads(0, CPU)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("environment", "inherited", "options", "chosen"),
    [
        ({}, "", "", False),
        ({"OMP_NUM_THREADS": "1"}, "", "", True),
        ({"OMP_NUM_THREADS": "1", PRECISION: "no"}, "", "", False),
        ({"OMP_NUM_THREADS": "2", PRECISION: "no"}, "", "", True),
        ({"OMP_NUM_THREADS": "1", PRECISION: "no"}, "OMP_NUM_THREADS=1", "", True),
        ({"OMP_NUM_THREADS": "1", PRECISION: "no"}, "A=1", "--num-cpu-threads-per-process", True),
    ],
)
def test_what_the_launcher_sets_by_itself_is_not_chosen(
    environment: dict[str, str], inherited: str, options: str, chosen: bool, tmp_path: Path
) -> None:
    (tmp_path / "environ").write_text(f"HOME=/root\0{inherited}\0")
    (tmp_path / "cmdline").write_text(f"accelerate\0launch\0{options}\0001\0")
    assert launch.threads_are_chosen(environment, tmp_path) is chosen


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/pod/box\n", {"pod/cpu.max": "200000 100000", "pod/box/cpu.max": "max 100000"}, 2),
        ("0::/host/path\n", {"cpu.max": "300000 100000"}, 3),  # seen from inside a container
        (
            "4:cpu,cpuacct:/box\n1:memory:/box\n",
            {"cpu/box/cpu.cfs_quota_us": "50000\n", "cpu/box/cpu.cfs_period_us": "100000\n"},
            0.5,
        ),
        (
            "4:cpu:/\n",
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            math.inf,
        ),
        ("", {}, math.inf),
    ],
)
def test_the_quota_of_a_container(
    membership: str, files: dict[str, str], expected: float, tmp_path: Path
) -> None:
    (tmp_path / "cgroup").write_text(membership)
    for name, text in files.items():
        file = tmp_path / "mount" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert cpu_quota(tmp_path / "mount", tmp_path / "cgroup") == expected
    assert cpu_quota(tmp_path / "mount", tmp_path / "missing") == math.inf


def test_usable_cores_are_those_of_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    for quota, cores in ((1.5, 2), (0.2, 1), (math.inf, 8)):
        monkeypatch.setattr(launch, "cpu_quota", lambda quota=quota: quota)
        assert launch.usable_cores() == cores
