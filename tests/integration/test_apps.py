"""From images to a trained, evaluated and drawn result, through the commands."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
)

from commands import command
from detrelay.apps import console, evaluate, predict
from detrelay.apps.build import build_datasets, build_parts
from detrelay.apps.train import Arguments, resolve, train
from detrelay.core.data.augmentation import Mosaic, Resize
from detrelay.core.data.shapes import ShapesDataset
from detrelay.core.data.transforms import DetectionDataset
from detrelay.core.recipes.recipe import DataConfig, Recipe, override
from factories_data import write_shapes
from tiny_run import TINY, shrink_backbone, skip_pictures, tiny_arguments, tiny_run

# with a gap, out of order, and neither from 0 nor from 1
CATEGORY_IDS = [7, 3, 90, 11]


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        shrink_backbone(patch)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the shared `run`, trained before, draws."""
    skip_pictures(monkeypatch)


@pytest.fixture(scope="module")
def coco_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.json, val.json and images/ of drawn shapes under other category ids."""
    folder = tmp_path_factory.mktemp("coco")
    write_shapes(folder, CATEGORY_IDS)
    return folder


@pytest.fixture(scope="module")
def run(small: None, coco_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "cells"
    assert tiny_run(output, data=(coco_folder,)) == 0
    return output


def test_a_run_leaves_what_it_promises(run: Path) -> None:
    assert {path.name for path in run.iterdir()} == {
        "best", "checkpoints", "curves.png", "last", "metrics.jsonl", "pictures", "results.json",
        "training.json",
    }  # fmt: skip
    assert sorted(path.name for path in (run / "pictures").iterdir()) == [
        "epoch_1.png", "epoch_2.png",
    ]  # fmt: skip
    with Image.open(run / "curves.png") as curves:
        assert min(curves.size) > 200
    results = json.loads((run / "results.json").read_text())
    record = json.loads((run / "best" / "training.json").read_text())
    assert results["best"] == record["measured"]
    assert (results["epoch"], results["step"]) == (2, 4)
    assert record["recipe"]["train"]["epochs"] == 2
    assert record["versions"]["torch"] == torch.__version__
    assert set(results["AP_per_category"]) == set(record["measured"]["AP_per_category"])


def test_best_model_loads_by_the_auto_classes_with_original_categories(
    run: Path, coco_folder: Path
) -> None:
    model = AutoModelForObjectDetection.from_pretrained(run / "best")
    processor = AutoImageProcessor.from_pretrained(run / "best")
    assert model.config.category_ids == sorted(CATEGORY_IDS)
    pairs = zip(model.config.category_ids, model.config.id2label.values(), strict=True)
    truth = json.loads((coco_folder / "val.json").read_text())
    assert dict(pairs) == {entry["id"]: entry["name"] for entry in truth["categories"]}
    assert processor.size["shortest_edge"] == 64


def test_evaluate_repeats_what_training_measured(
    run: Path, coco_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, written = tmp_path / "new" / "figures.json", tmp_path / "rows" / "found.json"
    code, out, _ = command(
        evaluate.evaluate, evaluate.Arguments, capsys,
        *("--model", run / "last", "--data", coco_folder / "val.json", "--output", target),
        *("--detections", written),
    )  # fmt: skip
    assert code == 0
    check_written_detections(written, coco_folder / "val.json", target, capsys)
    measured = json.loads((run / "results.json").read_text())
    figures = json.loads(target.read_text())
    for part in ("stats", "AP_per_category"):
        assert figures[part] == pytest.approx(measured[part], abs=1e-6)
    lines = [line.split() for line in out.splitlines()]
    assert ["AP50", f"{100 * figures['stats']['AP50']:.1f}", "maxDets", "100"] in lines


def check_written_detections(
    written: Path, data: Path, figures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They have the dataset's ids, and scored as a file they give the same figures."""
    truth, rows = (json.loads(file.read_text()) for file in (data, written))
    assert {row["image_id"] for row in rows} == {image["id"] for image in truth["images"]}
    assert {row["category_id"] for row in rows} <= set(CATEGORY_IDS)
    again = written.with_name("again.json")
    code, _, _ = command(
        evaluate.evaluate, evaluate.Arguments, capsys,
        *("--predictions", written, "--data", data, "--output", again, "--backend", "hotcoco"),
    )  # fmt: skip
    assert code == 0
    assert json.loads(again.read_text()) == json.loads(figures.read_text())


def test_predict_draws_and_writes_original_ids(
    run: Path, coco_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "drawn"
    code, out, _ = command(
        predict.predict, predict.Arguments, capsys,
        *("--model", run / "best", "--input", coco_folder / "images" / "val_*.png"),
        *("--output", output, "--threshold", "0"),
    )  # fmt: skip
    assert code == 0
    assert "3 images, 0 images skipped" in out
    rows = json.loads((output / "predictions.json").read_text())
    assert {row["file_name"] for row in rows} == {"val_0.png", "val_1.png", "val_2.png"}
    assert {row["category_id"] for row in rows} <= set(CATEGORY_IDS)
    truth = json.loads((coco_folder / "val.json").read_text())
    names = {category["id"]: category["name"] for category in truth["categories"]}
    assert all(names[row["category_id"]] == row["category"] for row in rows)
    with Image.open(output / "val_0.png.png") as drawn:
        assert min(drawn.size) == 320  # enlarged, so that captions can be read


def test_predict_names_and_skips_broken_images(
    run: Path, coco_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    good = (coco_folder / "images" / "val_0.png").read_bytes()
    (folder / "good.png").write_bytes(good)
    (folder / "half.png").write_bytes(good[: len(good) // 2])
    (folder / "text.jpg").write_text("no image")
    code, out, err = command(
        predict.predict, predict.Arguments, capsys,
        *("--model", run / "best", "--input", folder, "--output", tmp_path / "out"),
    )  # fmt: skip
    assert code == 1
    assert "1 images, 2 images skipped" in out
    first, second = [line for line in err.splitlines() if line.startswith("skipped ")]
    assert str(folder / "half.png") in first
    assert str(folder / "text.jpg") in second
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "good.png.png", "predictions.json",
    ]  # fmt: skip


def test_init_starts_from_saved_weights(
    run: Path, coco_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frozen = ["train.learning_rate=0", "train.epochs=1", "model.backbone_norm=eval"]
    same = tmp_path / "same"
    assert tiny_run(same, *frozen, data=(coco_folder,), init=run / "last") == 0
    before = AutoModelForObjectDetection.from_pretrained(run / "last").state_dict()
    after = AutoModelForObjectDetection.from_pretrained(same / "last").state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert f"start from {run / 'last'}: all weights are kept" in capsys.readouterr().out


def test_init_for_other_categories_renews_the_class_scores_only(
    run: Path, coco_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "two"
    folder.mkdir()
    for split in ("train", "val"):
        truth = json.loads((coco_folder / f"{split}.json").read_text())
        truth["categories"] = truth["categories"][:2]
        kept = {category["id"] for category in truth["categories"]}
        truth["annotations"] = [a for a in truth["annotations"] if a["category_id"] in kept]
        (folder / f"{split}.json").write_text(json.dumps(truth))
    (folder / "images").symlink_to(coco_folder / "images")
    frozen = ["train.learning_rate=0", "train.epochs=1", "model.backbone_norm=eval"]
    output = tmp_path / "run"
    assert tiny_run(output, *frozen, data=(folder,), init=run / "last") == 0
    names = [category["name"] for category in truth["categories"]]
    (told,) = re.findall("class scores kept: (.*)", capsys.readouterr().out)
    assert set(told.split(", ")) == set(names)
    before = AutoModelForObjectDetection.from_pretrained(run / "last").state_dict()
    after = AutoModelForObjectDetection.from_pretrained(output / "last").state_dict()
    changed = {key for key in before if before[key].shape != after[key].shape}
    assert changed
    assert all(torch.equal(before[key], after[key]) for key in before if key not in changed)


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        (["model.num_querys=3"], {}, "model settings of head stageinteractor: .*num_queries"),
        (["model.num_queries=many"], {}, "model settings of head stageinteractor: "),
        (["loss.giou=1"], {}, "unknown key loss.giou; did you mean loss.giou_weight?"),
        (["loss.gamma=big"], {}, "loss.gamma must be a number, found 'big'"),
        (["loss.l1_format=xywh"], {}, 'loss.l1_format must be "xyxy" or "cxcywh"'),
        (["assigner.name=hungrian"], {}, "hungarian"),
        (["assigner.options.iou_treshold=0.3"], {}, "iou_threshold"),
        (["train.no_decay=['nrom']"], {}, "train.no_decay: 'nrom' is part of no parameter"),
        (["train.backbone_weights=none.pth"], {}, "none.pth: no such file"),
        ([], {"init": Path("nowhere")}, "nowhere: no saved model"),
        ([], {"data": (Path("nowhere"),)}, r"no annotation file or folder nowhere"),
    ],
)
def test_train_refuses_in_one_line_and_starts_nothing(
    settings: list[str],
    options: dict[str, object],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        console.run(lambda: train(tiny_arguments(output, *settings, **options)))
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert re.search(message.replace("?", r"\?"), lines[-1])
    assert not any("Traceback" in line for line in lines)
    assert not output.exists()


def test_settings_come_from_the_model_but_for_those_that_are_set(
    run: Path, coco_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = [entry for entry in TINY if not entry.startswith("model.")]
    arguments = Arguments(
        init=run / "last",
        data=(coco_folder,),
        output=tmp_path / "run",
        set=((*changes, "train.epochs=1", "model.num_stages=2", "model.num_queries=10"),),
    )
    assert train(arguments) == 0
    printed = capsys.readouterr().out
    assert "  model.num_queries: 8 -> 10\n  model.num_stages: 3 -> 2\n" in printed
    assert "  queries: 8 kept, 2 new\n" in printed
    assert "  left out: head.stages.2\n" in printed
    record = json.loads((tmp_path / "run" / "training.json").read_text())
    assert record["recipe"]["model"]["d_model"] == 32
    assert record["recipe"]["train"]["schedule"] == "cosine"
    assert record["init"] == str(run / "last")
    # a resumed run does not need the model that it started from
    assert resolve(Arguments(output=tmp_path / "run", resume=True)) == Recipe.from_mapping(
        record["recipe"], "the record"
    )


def test_two_files_with_different_categories_are_refused(coco_folder: Path, tmp_path: Path) -> None:
    truth = json.loads((coco_folder / "val.json").read_text())
    truth["categories"][0]["name"] = "hexagon"
    other = coco_folder / "other_val.json"
    other.write_text(json.dumps(truth))
    arguments = tiny_arguments(tmp_path / "run", data=(coco_folder / "train.json", other))
    with pytest.raises(ValueError, match=r"must be among those of .*train.json.*hexagon"):
        train(arguments)


def test_faulty_boxes_are_counted_or_refused(
    coco_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = json.loads((coco_folder / "train.json").read_text())
    truth["annotations"][0]["bbox"] = [3, 3, 0, 5]
    faulty = coco_folder / "faulty.json"
    faulty.write_text(json.dumps(truth))
    files = (faulty, coco_folder / "val.json")
    assert tiny_run(tmp_path / "lenient", "train.epochs=1", data=files) == 0
    assert "1 boxes dropped: zero area" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"faulty.json: box \[3, 3, 0, 5\] is zero area"):
        tiny_run(tmp_path / "strict", "data.strict=true", data=files)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_truncated_image_is_named_in_one_line(
    num_workers: int, coco_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cells"
    shutil.copytree(coco_folder, folder)
    whole = (folder / "images" / "train_3.png").read_bytes()
    (folder / "images" / "train_3.png").write_bytes(whole[: len(whole) // 2])
    settings = [f"data.num_workers={num_workers}"]
    with pytest.raises(SystemExit) as stop:
        console.run(lambda: tiny_run(tmp_path / "run", *settings, data=(folder,)))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: cannot decode image {folder / 'images' / 'train_3.png'}: ")
    assert "Traceback" not in line


def test_image_folders_of_the_recipe_are_used(coco_folder: Path) -> None:
    data = DataConfig(
        train_annotations=str(coco_folder / "train.json"),
        train_images="elsewhere",
        val_annotations=str(coco_folder / "val.json"),
        val_images=str(coco_folder / "images"),
    )
    with pytest.raises(ValueError, match="no image folder elsewhere"):
        build_datasets(data)
    moved = dataclasses.replace(data, train_images=data.val_images, val_images="elsewhere")
    with pytest.raises(ValueError, match="no image folder elsewhere"):
        build_datasets(moved)


def test_augmentation_of_the_recipe_reaches_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def note(config: DataConfig) -> None:
        seen.append(config)

    monkeypatch.setattr("detrelay.apps.build.build_train_transform", note)
    values = {
        "flip_probability": 0.25,
        "short_sides": (70, 80),
        "max_size": 90,
        "crop": True,
        "crop_short_sides": (50,),
        "crop_range": (20, 30),
        "jitter_size": 50,
        "jitter_range": (0.5, 0.75),
        "mosaic": 0.25,
        "color_jitter": 0.125,
    }
    settings = [entry for entry in TINY if not entry.startswith("train")]
    recipe = override(Recipe(), settings)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **values))
    samples = ShapesDataset(2, image_size=64, seed=0)
    build_parts(recipe, samples, samples, None, fresh=False)
    assert seen == [recipe.data]


def test_data_settings_of_the_recipe_reach_the_training_data(coco_folder: Path) -> None:
    settings = [*TINY, "data.mosaic=0.25", "data.aspect_group=2", "data.on_bad_image=skip"]
    recipe = override(Recipe(), [entry for entry in settings if not entry.startswith("train")])
    samples = ShapesDataset(6, image_size=64, seed=0)
    parts = build_parts(recipe, samples, samples, None, fresh=False)
    data, sampler = parts.train_data, parts.train_data.sampler()  # type: ignore[union-attr]
    assert isinstance(data, DetectionDataset)
    assert data.transform.steps[0].transform == Mosaic(0.25, 64)
    assert (data.skips_broken, parts.val_data.skips_broken) == (True, False)
    assert (sampler.seed, sampler.order.aspect_group) == (recipe.train.seed, 2)
    sizes = [samples[index].original_size for index in range(6)]
    assert list(sampler.order.ratios) == [width / height for height, width in sizes]
    assert [type(step.transform) for step in parts.val_data.transform.steps] == [Resize]


def test_images_without_annotations_are_left_out_of_training_only(
    coco_folder: Path, tmp_path: Path
) -> None:
    truth = json.loads((coco_folder / "train.json").read_text())
    kept = truth["images"][0]["id"]
    truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] == kept]
    annotations = tmp_path / "one.json"
    annotations.write_text(json.dumps(truth))
    data = DataConfig(
        train_annotations=str(annotations),
        train_images=str(coco_folder / "images"),
        val_annotations=str(annotations),
        val_images=str(coco_folder / "images"),
        keep_empty=False,
    )
    train_data, val_data = build_datasets(data)
    assert (len(train_data), len(val_data)) == (1, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name either --model or --predictions"),
        (["--model", "a", "--predictions", "b"], "name either --model or --predictions"),
        (["--predictions", "none.json"], "none.json: cannot be read (No such file"),
        (["--predictions", "bad.json"], "bad.json: not json"),
        (["--predictions", "truth.json"], "truth.json: not a COCO results list"),
        (["--predictions", "list.json", "--data", "list.json"], "not a COCO detection json"),
        (["--predictions", "list.json", "--data", "half.json"], "annotations[0] has no 'image_id'"),
        (["--predictions", "stranger.json"], "image_id 99"),
        (["--predictions", "list.json", "--max-detections", "0"], "at least 1, found 0"),
        (["--predictions", "list.json", "--detections", "x.json"], "it needs --model"),
        (["--model", "nowhere"], "nowhere: no saved model"),
    ],
)
def test_evaluate_refuses_in_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 4)).save("a.png")
    truth = {
        "images": [{"id": 1, "file_name": "a.png", "width": 4, "height": 4}],
        "annotations": [],
        "categories": [{"id": 1, "name": "cell"}],
    }
    stranger = [{"image_id": 99, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1.0}]
    Path("truth.json").write_text(json.dumps(truth))
    Path("half.json").write_text(json.dumps(truth | {"annotations": [{"id": 1}]}))
    Path("list.json").write_text("[]")
    Path("stranger.json").write_text(json.dumps(stranger))
    Path("bad.json").write_text('{"images": [')
    code, _, err = command(
        evaluate.evaluate, evaluate.Arguments, capsys, "--data", "truth.json", *arguments
    )
    assert code == 2
    (line,) = [line for line in err.splitlines() if "error: " in line]
    assert message in line


def test_evaluate_refuses_a_model_of_other_categories(
    run: Path, coco_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = json.loads((coco_folder / "val.json").read_text())
    truth["categories"][0]["name"] = "hexagon"
    other = tmp_path / "val.json"
    other.write_text(json.dumps(truth))
    code, _, err = command(
        evaluate.evaluate, evaluate.Arguments, capsys,
        *("--model", run / "last", "--data", other, "--images", coco_folder / "images"),
    )  # fmt: skip
    assert code == 2
    assert "are not among those that" in err
    assert "hexagon" in err


def test_evaluate_accepts_a_model_that_knows_more(
    run: Path, coco_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = json.loads((coco_folder / "val.json").read_text())
    gone = truth["categories"].pop(0)
    truth["annotations"] = [a for a in truth["annotations"] if a["category_id"] != gone["id"]]
    fewer = tmp_path / "val.json"
    fewer.write_text(json.dumps(truth))
    code, out, err = command(
        evaluate.evaluate, evaluate.Arguments, capsys,
        *("--model", run / "last", "--data", fewer, "--images", coco_folder / "images"),
    )  # fmt: skip
    assert code == 0, err
    listed = out.partition("AP by category (maxDets 100)\n")[2]
    assert all(category["name"] in listed for category in truth["categories"])
    assert gone["name"] not in listed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--input": "nothing"}, "--input nothing: no image there"),
        ({"--threshold": "2"}, "--threshold must be between 0 and 1, found 2.0"),
        ({"--model": "nowhere"}, "nowhere: no saved model"),
        ({"--input": "*/a.png"}, "two images have the same file name"),
    ],
)
def test_predict_refuses_in_one_line(
    change: dict[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("one", "two"):
        Path(folder).mkdir()
        Image.new("RGB", (4, 4)).save(f"{folder}/a.png")
    options = {"--model": "none", "--input": "one", "--output": "out"} | change
    flat = [item for pair in options.items() for item in pair]
    code, _, err = command(predict.predict, predict.Arguments, capsys, *flat)
    assert code == 2
    assert message in err.splitlines()[-1]
    assert not Path("out").exists()
