"""N processes, accumulated batches or one large batch: the same numbers.

In float64, so that the order of a sum does not hide behind rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

import loading
from detrelay.core.data.collate import collate
from detrelay.core.data.transforms import VisitSampler
from detrelay.core.engine.checkpoint import CheckpointError
from detrelay.core.engine.logging import read_metrics
from processes import in_processes
from tiny_run import final_weights, shrink_backbone, skip_pictures, tiny_run

IMAGES = 14  # 3 steps of 4 images, 2 are left over
SETTINGS = (
    "model.backbone_norm=eval",
    f"data.num_train={IMAGES}",
    "data.num_val=5",  # the last batch is not full, and processes get unequal shares
    "train.ema_decay=0.9",
)
# the second half of the second step: all that one of two processes sees
WITHOUT_OBJECTS = {visit + 1 for visit in list(VisitSampler(IMAGES, seed=0))[6:8]}


def collate_double(items: list[Any]) -> Any:
    batch = collate(items)
    batch["pixel_values"] = batch["pixel_values"].double()
    for label in batch["labels"]:
        label["boxes"] = label["boxes"].double()
        if int(label["image_id"]) in WITHOUT_OBJECTS:
            label["boxes"], label["class_labels"] = label["boxes"][:0], label["class_labels"][:0]
    return batch


@pytest.fixture(scope="module", autouse=True)
def double_and_silent() -> Iterator[None]:
    build = loading.build_model
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        shrink_backbone(patch)
        skip_pictures(patch)
        patch.setattr("loading.build_model", lambda *a, **k: build(*a, **k).double())
        patch.setattr("detrelay.core.engine.loaders.collate", collate_double)
        AcceleratorState._reset_state(reset_partial_state=True)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one_process(double_and_silent: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "one"
    assert tiny_run(output, *SETTINGS, "train.batch_size=4") == 0
    return output


def run(output: Path, *settings: str, resume: bool = False) -> None:
    assert tiny_run(output, *SETTINGS, *settings, resume=resume) == 0


def assert_same_numbers(output: Path, reference: Path) -> None:
    lines, expected = (read_metrics(path / "metrics.jsonl") for path in (output, reference))
    assert len(lines) == len(expected) == 8
    for line, other in zip(lines, expected, strict=True):
        assert (line["kind"], line["step"]) == (other["kind"], other["step"])
        compared = (
            ("loss", "losses", "learning_rate", "gradient_norm")
            if line["kind"] == "train"
            else ("AP", "AP50", "AR_100")
        )
        for key in compared:
            assert line[key] == pytest.approx(other[key], rel=1e-6, abs=1e-12), key
    weights, others = final_weights(output), final_weights(reference)
    for key, other in others.items():
        torch.testing.assert_close(weights[key], other, rtol=1e-6, atol=1e-9)


def test_two_processes_learn_what_one_does(one_process: Path, tmp_path: Path) -> None:
    in_processes(run, tmp_path / "run", "train.batch_size=2")
    assert_same_numbers(tmp_path / "run", one_process)


def test_accumulated_batches_are_one_large_batch(one_process: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", "train.batch_size=2", "train.accumulation_steps=2")
    assert_same_numbers(tmp_path / "run", one_process)


def test_accumulated_batches_of_two_processes(one_process: Path, tmp_path: Path) -> None:
    in_processes(run, tmp_path / "run", "train.batch_size=1", "train.accumulation_steps=2")
    assert_same_numbers(tmp_path / "run", one_process)
