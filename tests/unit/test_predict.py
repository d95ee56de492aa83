"""Images in and predictions out of `predict`, with a model that knows its answer beforehand."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from detrelay.apps import evaluate
from detrelay.core.data.decode import read_image
from factories_data import noise_image, write_coco
from factories_images import image_files, refused_files, saved
from fixed_model import Fixed, rows, run


def test_pixels_are_those_of_training(model: Fixed, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, file in image_files().items():
        (folder / name).write_bytes(file.content)
    assert run(input=folder, output=tmp_path / "out") == 0
    names = sorted(image_files())
    assert len(model.seen) == len(names)
    for name, seen in zip(names, model.seen, strict=True):
        assert torch.equal(seen, read_image(folder / name)), name
        assert (tmp_path / "out" / f"{name}.png").is_file()


def test_one_bad_image_does_not_end_the_others(
    model: Fixed, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = refused_files()
    for name in ("half.png", "text.png", "float.tif", "postscript.png"):
        (photos / name).write_bytes(bad[name][0])
    (photos / "bomb.png").write_bytes(saved(Image.new("1", (15_000, 15_000)), "PNG"))
    (photos / "folder.jpg").mkdir()
    os.mkfifo(photos / "pipe.jpg")
    (photos / "gone.png").symlink_to("nowhere")
    output = tmp_path / "out"
    assert run(input=photos, output=output) == 1
    captured = capsys.readouterr()
    left_out, *lines = captured.err.splitlines()
    assert left_out == "left out: 1 folders"
    assert len(lines) == 7
    assert all(line.startswith("skipped ") for line in lines)
    for name in ("half.png", "bomb.png", "pipe.jpg", "gone.png"):
        assert sum(f"skipped {name}: " in line for line in lines) == 1
    assert "6 objects in 3 images, 7 images skipped" in captured.out
    assert {row["file_name"] for row in rows(output)} == {"a.png", "b.png", "c.png"}
    assert {path.name for path in output.iterdir()} == {
        "a.png.png", "b.png.png", "c.png.png", "predictions.json",
    }  # fmt: skip


def test_nothing_readable_gives_an_empty_list(model: Fixed, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no image")
    assert run(input=tmp_path / "a.png", output=tmp_path / "out") == 1
    assert rows(tmp_path / "out") == []


def test_rows_claim_no_image_id_and_stay_inside_the_image(
    model: Fixed, photos: Path, tmp_path: Path
) -> None:
    assert run(input=photos / "a.png", output=tmp_path / "out") == 0
    first, second = rows(tmp_path / "out")
    assert first == {
        "file_name": "a.png", "category_id": 7, "bbox": [0, 0, 20, 30],
        "score": first["score"], "category": "cat",
    }  # fmt: skip
    assert second["category_id"] == 3
    assert second["bbox"] == pytest.approx([28, 7.5, 12, 15], abs=1e-4)


def test_what_was_found_is_kept_when_the_process_is_stopped(
    model: Fixed, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "predictions.json").write_text("[]")

    def stop(count: int) -> None:
        if count == 2:
            raise KeyboardInterrupt

    model.before = stop
    assert run(input=photos, output=output) == 130
    lines = (output / "predictions.partial.jsonl").read_text().splitlines()
    names = [{row["file_name"] for row in json.loads(line)} for line in lines]
    assert names == [{"a.png"}, {"b.png"}]
    assert rows(output) == []
    model.before = lambda count: None
    assert run(input=photos, output=output) == 0
    assert len(rows(output)) == 6
    assert not (output / "predictions.partial.jsonl").exists()


@pytest.mark.parametrize("name", ["photos", "photos/*.png", "photos/a.png"])
def test_drawings_do_not_go_among_the_inputs(
    model: Fixed,
    photos: Path,
    name: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(photos.parent)
    noise_image(8, 8).save(photos / "a.png.png")
    before = (photos / "a.png.png").read_bytes()
    assert run(input=Path(name), output=Path("photos")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --output photos: holds the images of --input")
    assert (photos / "a.png.png").read_bytes() == before
    assert len(list(photos.iterdir())) == 4


def test_drawings_are_not_fed_back(
    model: Fixed, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for expected in ("", "left out: 3 images in the output folder\n"):
        assert run(input=photos / "**" / "*.png", output=photos / "out") == 0
        assert capsys.readouterr().err == expected
    assert len(model.seen) == 6


def test_files_that_are_left_out_are_said(
    model: Fixed, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("._a.png", "notes.txt", "more.txt", "clip.mp4", "README"):
        (photos / name).write_text("no image")
    for name in ("d.GIF", "e.jfif", "f.jpe", "g.avif"):
        kind = {"d": "GIF", "g": "AVIF"}.get(name[0], "JPEG")
        (photos / name).write_bytes(saved(noise_image(40, 30), kind))
    (photos / "sub").mkdir()
    assert run(input=photos, output=tmp_path / "out") == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("left out: ")
    for part in (
        "1 files named ._* (AppleDouble)", "2 .txt files", "1 .mp4 files", "1 folders",
        "1 files without a suffix",
    ):  # fmt: skip
        assert part in line
    assert len(model.seen) == 7


def test_no_image_or_equal_names_are_refused(
    model: Fixed, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("")
    assert run(input=empty, output=tmp_path / "out") == 2
    assert "no image there (looked for .avif .bmp" in capsys.readouterr().err
    noise_image(8, 8).save(empty / "a.png")
    assert run(input=tmp_path / "*" / "*.png", output=tmp_path / "out") == 2
    assert "two images have the same file name (a.png, a.png)" in capsys.readouterr().err
    assert run(output=tmp_path / "out") == 2
    assert "name either --input or --data" in capsys.readouterr().err


def test_data_gives_its_own_ids_and_sizes(
    model: Fixed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_coco(tmp_path)
    (tmp_path / "images" / "c.png").unlink()
    output = tmp_path / "out"
    assert run(data=data, output=output) == 1
    assert {(row["image_id"], row["file_name"]) for row in rows(output)} == {
        (11, "a.png"), (5, "b.png"),
    }  # fmt: skip
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("skipped c.png: cannot read image ")
    noise_image(30, 40).save(tmp_path / "images" / "a.png")
    assert run(data=data, output=output) == 1
    assert "skipped a.png: image " in capsys.readouterr().err
    assert {row["image_id"] for row in rows(output)} == {5}


def test_data_may_be_in_another_format(model: Fixed, tmp_path: Path) -> None:
    place = tmp_path / "yolo"
    for split, name in (("train", "a"), ("val", "b")):
        for kind in ("images", "labels"):
            (place / kind / split).mkdir(parents=True)
        noise_image(40, 30).save(place / "images" / split / f"{name}.png")
        (place / "labels" / split / f"{name}.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (place / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cat]\n")
    assert run(data=place, output=tmp_path / "out") == 0
    (only,) = {(row["image_id"], row["file_name"]) for row in rows(tmp_path / "out")}
    assert only[1] == "images/val/b.png"


def test_data_may_not_lead_out_of_its_folder(
    model: Fixed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = tmp_path / "set"
    inside.mkdir()
    data = write_coco(inside)
    content = json.loads(data.read_text())
    content["images"][0]["file_name"] = "..\\..\\a.png"
    data.write_text(json.dumps(content))
    (inside / "images" / "a.png").rename(tmp_path / "a.png")
    images = inside / "images"
    assert run(data=data, images=images, output=tmp_path / "out") == 2
    assert "1 of 3 file names of" in capsys.readouterr().err
    assert run(data=data, images=images, output=tmp_path / "out", allow_outside=True) == 0
    assert (tmp_path / "out" / "a.png.png").is_file()


def test_evaluate_matches_predictions_by_file_name(
    model: Fixed, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["sub\\c.png", "./a.png", "b.png"]  # not in the order of their ids
    boxes = [(7, [0, 0, 20, 30]), (3, [28, 7.5, 12, 15])]
    truth = {
        "images": [{"id": 5 + i, "file_name": n, "width": 40, "height": 30}
                   for i, n in enumerate(names)],
        "annotations": [{"id": 2 * i + j, "image_id": 5 + i, "category_id": label, "bbox": box}
                        for i in range(3) for j, (label, box) in enumerate(boxes)],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
    }  # fmt: skip
    data, figures = tmp_path / "truth.json", tmp_path / "figures.json"
    data.write_text(json.dumps(truth))
    assert run(input=photos, output=tmp_path / "out") == 0
    written = tmp_path / "out" / "predictions.json"
    arguments = evaluate.Arguments(data=data, predictions=written, output=figures)
    assert evaluate.evaluate(arguments) == 0
    assert json.loads(figures.read_text())["stats"]["AP"] == pytest.approx(1)
    # ids that somebody numbered by the order of files
    old = [
        row | {"image_id": "abc".index(row["file_name"][0]) + 5} for row in rows(tmp_path / "out")
    ]
    written.write_text(json.dumps(old))
    with pytest.raises(
        ValueError, match=r"says image_id 5 and file_name 'a.png', which is image 6"
    ):
        evaluate.evaluate(arguments)
    unknown = [{**row, "file_name": "z.png"} for row in old]
    unknown[0].pop("image_id")
    written.write_text(json.dumps(unknown))
    with pytest.raises(ValueError, match=r"its file_name 'z.png' is that of no or of several"):
        evaluate.evaluate(arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_end_in_one_line(
    model: Fixed, photos: Path, tmp_path: Path, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    nn.init.constant_(model.weight, value)
    assert run(input=photos, output=tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: m: 1 of its weights have NaN or infinite values, such as weight")
    assert not (tmp_path / "out" / "predictions.json").exists()


def test_the_limit_of_pixels_is_a_setting(
    model: Fixed, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(input=photos, output=tmp_path / "out", max_pixels=1199) == 1
    assert capsys.readouterr().err.count("more than the limit of 1199 (max_pixels)") == 3
