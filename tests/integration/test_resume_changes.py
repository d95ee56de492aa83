"""What may differ when a run is resumed: what cannot change its result, or what is accepted."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from detrelay.apps.train import Arguments, train
from detrelay.core.engine import run_folder
from detrelay.core.engine.logging import read_metrics
from detrelay.core.errors import DataError, RecipeError
from factories_data import write_shapes
from tiny_run import final_weights, shrink_backbone, skip_pictures, tiny_run


@pytest.fixture(scope="module", autouse=True)
def small_and_silent() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        shrink_backbone(patch)
        skip_pictures(patch)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def begun(small_and_silent: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data` and a `run` of one epoch on them; not to be changed."""
    folder = tmp_path_factory.mktemp("begun")
    write_shapes(folder / "data")
    assert tiny_run(folder / "run", "train.epochs=1", data=(folder / "data",)) == 0
    return folder


@pytest.fixture
def copied(begun: Path, tmp_path: Path) -> Path:
    """The same under another name: data at the same place as the record says, times kept."""
    shutil.copytree(begun / "run", tmp_path / "run")
    shutil.copytree(begun / "data", tmp_path / "data")
    for file in [tmp_path / "run" / "training.json", *tmp_path.glob("run/checkpoints/*/*.json")]:
        file.write_text(file.read_text().replace(str(begun / "data"), str(tmp_path / "data")))
    return tmp_path


def resume(folder: Path, *settings: str, **options: Any) -> int:
    chosen = (("train.epochs=2", *settings),)
    return train(Arguments(output=folder / "run", resume=True, set=chosen, **options))


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def move_a_box(data: Path) -> None:
    edit(data / "train.json", lambda content: content["annotations"][0]["bbox"].reverse())


def reverse_images(data: Path) -> None:
    edit(data / "train.json", lambda content: content["images"].reverse())


def rename_a_class(data: Path) -> None:
    for split in ("train", "val"):
        edit(data / f"{split}.json", lambda content: content["categories"][0].update(name="disc"))


def rewrite_an_image(data: Path) -> None:
    os.utime(next(iter(sorted((data / "images").iterdir()))), (1, 1))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (move_a_box, r"run: train: boxes \(same number\); restore"),
        (reverse_images, "run: train: order of the images; restore"),
        (rename_a_class, r"train: categories \(circle.*-> disc.*; val: categories"),
        (rewrite_an_image, r"image files \(written since\)"),
    ],
)
def test_other_data_are_refused_in_one_line_that_names_the_flag(
    harm: Callable[[Path], None], message: str, copied: Path
) -> None:
    harm(copied / "data")
    log = (copied / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(DataError, match=message) as caught:
        resume(copied)
    assert "--accept-changes" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (copied / "run" / "metrics.jsonl").read_bytes() == log


def test_other_data_may_be_accepted_and_are_recorded(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    move_a_box(copied / "data")
    assert resume(copied, accept_changes=True) == 0
    assert "train: boxes (same number)" in capsys.readouterr().out
    (change,) = run_folder.read_record(copied / "run")["changes"]
    assert change["data"] == {"train": ["boxes (same number)"]}
    assert resume(copied) == 0  # from now on they are the data of the run


def test_one_class_more_is_refused_whatever_is_accepted(copied: Path) -> None:
    def add_a_class(content: dict[str, Any]) -> None:
        content["categories"].append({"id": 77, "name": "star"})
        content["annotations"][0]["category_id"] = 77

    for split in ("train", "val"):
        edit(copied / "data" / f"{split}.json", add_a_class)
    with pytest.raises(DataError, match=r"circle, .* -> circle, .*star\).*--init"):
        resume(copied, accept_changes=True)


def test_a_moved_folder_and_what_changes_no_result_are_free_and_recorded(
    begun: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the same weights in the end as without any change."""
    shutil.copytree(copied / "data", copied / "elsewhere", copy_function=shutil.copy)
    shutil.rmtree(copied / "data")
    free = (
        "data.on_bad_image=skip",
        "train.activation_checkpointing=true",
        "train.checkpoint_every=1",
        "train.early_stopping_patience=5",
        "train.keep_checkpoints=3",
        "train.log_every=2",
        'train.trackers=["tensorboard"]',
    )
    assert resume(copied, *free, data=(copied / "elsewhere",)) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "changed since" in line]
    assert "train.log_every (1 -> 2)" in line
    (change,) = run_folder.read_record(copied / "run")["changes"]
    assert change["recipe"]["data.train_annotations"] == [
        str(copied / "data" / "train.json"),
        str(copied / "elsewhere" / "train.json"),
    ]
    whole = copied / "whole"
    assert tiny_run(whole, data=(begun / "data",)) == 0
    weights, expected = final_weights(copied / "run"), final_weights(whole)
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


def test_less_patience_than_was_already_taken_ends_the_run_with_an_evaluation(
    copied: Path,
) -> None:
    assert resume(copied, "train.epochs=3") == 0  # evaluations without a better AP than 0
    assert resume(copied, "train.epochs=9", "train.early_stopping_patience=1") == 0
    lines = read_metrics(copied / "run" / "metrics.jsonl")
    assert lines[-1]["kind"] == "evaluation"
    assert lines[-1]["step"] == 6  # no step more
    assert json.loads((copied / "run" / "results.json").read_text())["step"] == 6


def test_fewer_epochs_than_are_done_may_be_accepted(copied: Path) -> None:
    assert resume(copied) == 0
    assert resume(copied, "train.epochs=1", accept_changes=True) == 0
    assert read_metrics(copied / "run" / "metrics.jsonl")[-1]["step"] == 4


def test_workers_are_free(copied: Path) -> None:
    assert resume(copied, "data.num_workers=1") == 0


def test_a_recipe_edited_by_hand_is_compared_with_the_newest_checkpoint(copied: Path) -> None:
    def double(record: dict[str, Any]) -> None:
        record["recipe"]["train"]["learning_rate"] *= 2

    edit(copied / "run" / "training.json", double)
    with pytest.raises(RecipeError, match=r"train\.learning_rate \(0\.001 -> 0\.002\)") as caught:
        resume(copied)
    assert "--accept-changes" in str(caught.value)
    assert resume(copied, accept_changes=True) == 0
    assert read_metrics(copied / "run" / "metrics.jsonl")[-2]["learning_rate"] == pytest.approx(
        0.002
    )
    assert resume(copied) == 0


def test_another_model_is_refused_whatever_is_accepted(copied: Path) -> None:
    with pytest.raises(RecipeError, match=r"model\.num_queries \(8 -> 9\).*would not fit"):
        resume(copied, "model.num_queries=9", accept_changes=True)
