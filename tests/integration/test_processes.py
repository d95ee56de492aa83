"""N processes, accumulated batches or one large batch: the same numbers.

In float64, so that the order of a sum does not hide behind rounding.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from detrelay.apps import build
from detrelay.assigners import build_assigners
from detrelay.core.criterion import Criterion
from detrelay.core.data.collate import collate
from detrelay.core.data.transforms import VisitSampler
from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.core.engine.checkpoint import CheckpointError
from detrelay.core.engine.inference import ImageResult, detect
from detrelay.core.engine.logging import read_metrics
from detrelay.core.engine.run_folder import locked
from detrelay.core.engine.update import Updater
from detrelay.core.errors import DataError
from detrelay.core.evaluation.backends import BACKENDS
from detrelay.core.evaluation.coco_ap import evaluate_coco
from detrelay.core.evaluation.tables import Detections, GroundTruth
from detrelay.heads import HEADS
from factories import SMALL_HEADS, make_boxes, small_head_config
from factories_scores import random_case
from processes import in_processes
from tiny_run import final_weights, shrink_backbone, skip_pictures, tiny_run

IMAGES = 14  # 3 steps of 4 images, 2 are left over
SETTINGS = (
    "model.backbone_norm=eval",
    f"data.num_train={IMAGES}",
    "data.num_val=5",  # the last batch is incomplete, and processes get unequal shares
    "train.ema_decay=0.9",
)
# the second half of the second step: all that one of two processes sees
WITHOUT_OBJECTS = {visit + 1 for visit in list(VisitSampler(IMAGES, seed=0))[6:8]}


def collate_double(items: list[Any], divisor: int) -> Any:
    batch = collate(items, divisor=divisor)
    batch["pixel_values"] = batch["pixel_values"].double()
    for label in batch["labels"]:
        label["boxes"] = label["boxes"].double()
        if int(label["image_id"]) in WITHOUT_OBJECTS:
            label["boxes"], label["class_labels"] = label["boxes"][:0], label["class_labels"][:0]
    return batch


def off_the_kinks(model: DetectorForObjectDetection) -> DetectorForObjectDetection:
    """Float64, and no box on the border of its image, where GIoU's gradient is not unique."""
    generator = torch.Generator().manual_seed(0)
    model = model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".refine.out." in name:
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module", autouse=True)
def double_and_silent() -> Iterator[None]:
    build_model = build.build_model
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        shrink_backbone(patch)
        skip_pictures(patch)
        patch.setattr(build, "build_model", lambda *a, **k: off_the_kinks(build_model(*a, **k)))
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


@pytest.mark.slow
def test_accumulated_batches_of_two_processes(one_process: Path, tmp_path: Path) -> None:
    in_processes(run, tmp_path / "run", "train.batch_size=1", "train.accumulation_steps=2")
    assert_same_numbers(tmp_path / "run", one_process)


def test_begun_by_two_processes_and_ended_by_one(one_process: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    in_processes(run, output, "train.batch_size=2", "train.epochs=1")
    with pytest.raises(CheckpointError, match=r"takes 4 images, but 1 process.* take 2; .*=2 does"):
        run(output, "train.batch_size=2", resume=True)
    run(output, "train.batch_size=2", "train.accumulation_steps=2", resume=True)
    assert_same_numbers(output, one_process)


def test_begun_by_one_process_and_ended_by_two(one_process: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run(output, "train.batch_size=4", "train.epochs=1")
    in_processes(run_resumed, output, "train.batch_size=2")
    assert_same_numbers(output, one_process)


def run_resumed(output: Path, *settings: str) -> None:
    run(output, *settings, resume=True)


def stop_at_a_value_that_is_not_finite(output: Path) -> None:
    """The second process loses its predictions in the second step; both must end."""
    with pytest.MonkeyPatch.context() as patch:
        learn = Updater._learn
        step = iter(range(10))

        def spoil(self: Updater, batch: Any, counts: Any) -> Any:
            if next(step) == 1 and self.accelerator.process_index == 1:
                batch["pixel_values"][:] = float("nan")
            return learn(self, batch, counts)

        patch.setattr(Updater, "_learn", spoil)
        assert tiny_run(output, *SETTINGS, "train.batch_size=2") == 1


def test_one_process_without_finite_values_ends_all(tmp_path: Path) -> None:
    in_processes(stop_at_a_value_that_is_not_finite, tmp_path / "run", seconds=60)
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1]


def fail_on_the_second(stage: str, output: Path, lines: Path) -> None:
    """The second process raises an error; each records how it ended."""
    with pytest.MonkeyPatch.context() as patch:
        if stage == "set-up":
            original = build.build_datasets

            def spoil_set_up(*arguments: Any) -> Any:
                if PartialState().process_index == 1:
                    raise DataError("a broken file")
                return original(*arguments)

            patch.setattr(build, "build_datasets", spoil_set_up)
        else:
            learn = Updater._learn
            step = iter(range(10))

            def spoil_step(self: Updater, batch: Any, counts: Any) -> Any:
                if next(step) == 1 and self.accelerator.process_index == 1:
                    raise DataError("a broken file")
                return learn(self, batch, counts)

            patch.setattr(Updater, "_learn", spoil_step)
        try:
            tiny_run(output, *SETTINGS, "train.batch_size=2")
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            (lines / str(PartialState().process_index)).write_text(told)
    os._exit(0)  # as a command does, so that the other process notices


@pytest.mark.parametrize("stage", ["set-up", "step"])
def test_one_process_that_fails_is_one_line_on_every_process(stage: str, tmp_path: Path) -> None:
    in_processes(fail_on_the_second, stage, tmp_path / "run", tmp_path, seconds=60)
    assert (tmp_path / "1").read_text() == "DataError: a broken file"
    other = (tmp_path / "0").read_text()
    assert other.startswith("RunFault: another process of this run has ended (its own message ")
    assert "resume with: detrelay train --resume --output" in other
    assert "\n" not in other


def refuse_a_folder_in_use(output: Path, lines: Path) -> None:
    try:
        tiny_run(output, *SETTINGS, "train.batch_size=2")
    except ValueError as error:
        (lines / str(PartialState().process_index)).write_text(str(error))


def test_a_folder_in_use_is_refused_by_every_process(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        in_processes(refuse_a_folder_in_use, tmp_path / "run", tmp_path, seconds=60)
    for process in range(2):
        line = (tmp_path / str(process)).read_text()
        assert "is in use by another training" in line
        assert "\n" not in line


def small_trainer(
    case: str, accelerator: Accelerator
) -> tuple[DetectorForObjectDetection, Updater]:
    torch.manual_seed(0)
    entry = HEADS[SMALL_HEADS[case][0]]
    model = entry.model(small_head_config(case, backbone_norm="eval"))
    losses = entry.model.loss_config
    criterion = Criterion(losses.terms(), build_assigners(entry.assigner, losses))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    return model, Updater(accelerator, prepared, criterion, optimizer, clip_norm=0.0)


@pytest.mark.parametrize("case", SMALL_HEADS)
def test_a_batch_without_objects_reaches_every_parameter(case: str) -> None:
    model, updater = small_trainer(case, Accelerator(cpu=True))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    reached: dict[str, Tensor] = {}
    for name, parameter in trained.items():
        parameter.register_post_accumulate_grad_hook(partial(reached.__setitem__, name))
    updater([small_batch((0, 0), seed=0)])
    assert [name for name in trained if name not in reached] == []


def step_of_every_head(folder: Path) -> None:
    """The second process has no objects."""
    accelerator = Accelerator()
    for case in SMALL_HEADS:
        model, updater = small_trainer(case, accelerator)
        count = 3 if accelerator.process_index == 0 else 0
        updater([small_batch((count, 0), seed=0)])
        save_file(model.state_dict(), folder / f"{case}_{accelerator.process_index}.safetensors")


def test_processes_with_and_without_objects_learn_the_same(tmp_path: Path) -> None:
    in_processes(step_of_every_head, tmp_path, seconds=60)
    for case in SMALL_HEADS:
        one, other = (load_file(tmp_path / f"{case}_{index}.safetensors") for index in (0, 1))
        before = small_trainer(case, Accelerator(cpu=True))[0].state_dict()
        assert [name for name in one if not one[name].equal(other[name])] == [], case
        assert any(not one[name].equal(value) for name, value in before.items()), case


def small_batch(counts: tuple[int, ...], seed: int) -> dict[str, Any]:
    """Random images of 64 x 96 pixels with the given numbers of objects."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(counts), 3, 64, 96)
    return {
        "pixel_values": torch.randn(shape, generator=generator),
        "pixel_mask": torch.ones(len(counts), 64, 96, dtype=torch.int64),
        "labels": [
            {
                "class_labels": torch.randint(4, (count,), generator=generator),
                "boxes": make_boxes(count, generator=generator),
                "image_id": torch.tensor([index]),
            }
            for index, count in enumerate(counts)
        ],
    }


class Recorded(nn.Module):
    """Returns the ids of the images it gets, for which its processor knows the results."""

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> Tensor:
        return pixel_values


class RecordedProcessor:
    def __init__(self, results: list[ImageResult]) -> None:
        self.results = results

    def normalize_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch

    def post_process_object_detection(
        self, output: Tensor, *_: object, **options: object
    ) -> list[ImageResult]:
        return [self.results[int(number)] for number in output.flatten()]


def recorded_case(
    ground_truth: dict[str, Any], rows: list[dict[str, Any]]
) -> tuple[GroundTruth, list[ImageResult]]:
    truth = GroundTruth.from_coco(ground_truth)
    found = truth.place(Detections.from_rows(rows))
    x, y, width, height = found.boxes_xywh.T
    boxes = np.column_stack([x, y, x + width, y + height])
    results = []
    for number in range(len(truth.image_ids)):
        own = found.image == number
        columns = {"scores": found.scores, "labels": found.category, "boxes": boxes}
        results.append({key: torch.from_numpy(value[own]) for key, value in columns.items()})
    return truth, results


def detect_recorded(cases: dict[str, tuple[GroundTruth, list[ImageResult]]], folder: Path) -> None:
    """Detect by a recorded model in the images of this process; all processes get all results."""
    accelerator = Accelerator(cpu=True)
    for name, (truth, results) in cases.items():
        images = [
            {
                "pixel_values": torch.tensor([float(number)]),
                "pixel_mask": torch.ones(1),
                "labels": {"image_id": torch.tensor([image]), "orig_size": torch.ones(2)},
            }
            for number, image in enumerate(truth.image_ids.tolist())
        ]

        def together(items: list[dict[str, Any]]) -> dict[str, Any]:
            batch = {key: [item[key] for item in items] for key in items[0]}
            return batch | {"pixel_values": torch.stack(batch["pixel_values"])}

        loader = accelerator.prepare(DataLoader(images, batch_size=3, collate_fn=together))
        ids, gathered = detect(accelerator, Recorded(), loader, RecordedProcessor(results), 300)
        assert sorted(ids) == truth.image_ids.tolist()  # none twice, none lost
        found = Detections.from_results(gathered, ids, truth.category_ids.tolist())
        np.savez(folder / f"{name}-{accelerator.process_index}.npz", **asdict(found))


def figures_in_two_processes(
    cases: dict[str, tuple[GroundTruth, list[ImageResult]]], folder: Path
) -> dict[str, list[dict[str, Any]]]:
    """The figures of all processes' detections, by back end and case.

    Scored here: a fast back end's threads, if another test has started them, do not survive a fork.
    """
    in_processes(detect_recorded, cases, folder)
    found = {
        name: [Detections(**np.load(folder / f"{name}-{process}.npz")) for process in range(2)]
        for name in cases
    }
    return {
        name: [
            evaluate_coco(truth, detections, backend=backend).to_dict()
            for detections in found[name]
            for backend in BACKENDS
        ]
        for name, (truth, _) in cases.items()
    }


def test_two_processes_and_every_back_end_score_what_one_does(tmp_path: Path) -> None:
    ground_truth, rows = random_case()
    expected = evaluate_coco(ground_truth, rows).to_dict()
    found = figures_in_two_processes({"case": recorded_case(ground_truth, rows)}, tmp_path)["case"]
    assert len(found) == 4
    for figures in found:
        assert figures["stats"] == pytest.approx(expected["stats"], abs=1e-9)
        assert figures["AP_per_category"] == pytest.approx(expected["AP_per_category"], abs=1e-9)


@pytest.mark.slow
def test_two_processes_reproduce_recorded_figures(real_data: Path, tmp_path: Path) -> None:
    expected, cases = {}, {}
    for file in sorted(real_data.glob("*/expected_eval.json")):
        record = json.loads(file.read_text())
        expected[file.parent.name] = record
        cases[file.parent.name] = recorded_case(
            *(
                json.loads((file.parent / record[key]).read_text())
                for key in ("ground_truth", "detections")
            )
        )
    assert len(cases) == 7
    for name, found in figures_in_two_processes(cases, tmp_path).items():
        for figures in found:
            for part in ("stats", "AP_per_category"):
                rounded = {key: round(value, 6) for key, value in figures[part].items()}
                assert rounded == expected[name][part]
