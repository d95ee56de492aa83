"""Reading COCO files: the content of a sample, and what is rejected and how."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detrelay.core.data.coco import Category, CocoDataset, read_annotations
from detrelay.core.errors import DataError
from factories_data import coco_content, noise_image, one_line, write_coco


def test_samples_hold_pixels_boxes_and_contiguous_classes(tmp_path: Path) -> None:
    data = CocoDataset(write_coco(tmp_path))
    assert data.categories == (Category(3, "wheel"), Category(90, "door"))
    assert data.image_ids == [11, 5, 8]
    assert len(data) == 3

    first, second, third = data[0], data[1], data[2]
    assert first.image.dtype == torch.uint8
    expected = np.array(noise_image(40, 30, seed=11))
    assert torch.equal(first.image, torch.from_numpy(expected).permute(2, 0, 1))
    assert first.boxes_xyxy.tolist() == [[0.5, 1.25, 8.5, 7.25], [30, 20, 40, 30]]
    assert first.class_labels.tolist() == [0, 1]
    assert (first.image_id, first.original_size) == (11, (30, 40))
    assert second.boxes_xyxy.tolist() == [[2, 3, 12, 23]]
    assert second.class_labels.tolist() == [1]
    assert third.boxes_xyxy.shape == (0, 4)
    assert third.boxes_xyxy.dtype == torch.float32
    assert third.class_labels.dtype == torch.int64


def test_ground_truth_is_the_file_with_defaults(tmp_path: Path) -> None:
    data = CocoDataset(write_coco(tmp_path))
    expected = coco_content()
    expected["categories"].sort(key=lambda category: category["id"])
    del expected["annotations"][2]["segmentation"]  # boxes are evaluated without it
    expected["annotations"][0]["iscrowd"] = 0
    expected["annotations"][1]["area"] = 48
    expected["annotations"][3]["area"] = 100
    assert data.ground_truth == expected


def test_report_counts(tmp_path: Path) -> None:
    data = CocoDataset(write_coco(tmp_path))
    summary = data.report.summary()
    assert summary == (
        "3 images (1 without boxes), 3 boxes, 1 crowd boxes kept for evaluation only"
    )


def test_changing_a_sample_does_not_change_the_data(tmp_path: Path) -> None:
    data = CocoDataset(write_coco(tmp_path))
    data[0].boxes_xyxy.zero_()
    data[0].class_labels.fill_(9)
    assert data[0].boxes_xyxy[1].tolist() == [30, 20, 40, 30]
    assert data[0].class_labels.tolist() == [0, 1]


def test_data_set_can_be_sent_to_a_worker(tmp_path: Path) -> None:
    data = CocoDataset(write_coco(tmp_path))
    copied = pickle.loads(pickle.dumps(data))
    assert torch.equal(copied[0].image, data[0].image)


def test_images_without_annotations_can_be_left_out(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"] = [entry for entry in content["annotations"] if entry["id"] in (1, 4)]
    data = CocoDataset(write_coco(tmp_path, content), keep_empty=False)
    assert data.image_ids == [11, 5]  # of image 11 only a crowd is left, which counts
    assert [len(data[index].boxes_xyxy) for index in range(2)] == [0, 1]
    assert [image["id"] for image in data.ground_truth["images"]] == [11, 5]
    assert data.report.summary().endswith("1 images without annotations left out")
    content["annotations"] = []
    path = write_coco(tmp_path, content)
    assert CocoDataset(path).report.left_out_images == 0
    with pytest.raises(DataError, match=r"instances.json: no image has an annotation"):
        CocoDataset(path, keep_empty=False)


def test_annotations_can_be_read_without_images(tmp_path: Path) -> None:
    content = coco_content()
    content["images"] = [{"id": image["id"]} for image in content["images"]]
    path = write_coco(tmp_path, content, images=False)
    read = read_annotations(path, with_files=False)
    assert [image["id"] for image in read["images"]] == [11, 5, 8]
    assert read["annotations"] == CocoDataset(write_coco(tmp_path)).ground_truth["annotations"]
    path = write_coco(tmp_path, content, images=False)
    with pytest.raises(DataError, match=r"images\[0\] has no 'file_name'"):
        read_annotations(path)
    content["annotations"][0]["image_id"] = 77
    with pytest.raises(DataError, match="names image_id 77"):
        read_annotations(write_coco(tmp_path, content, images=False), with_files=False)


def test_image_folder_is_found_or_named(tmp_path: Path) -> None:
    content = coco_content()
    path = write_coco(tmp_path, content)
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    assert len(CocoDataset(path, tmp_path / "elsewhere")) == 3
    with pytest.raises(DataError, match="nowhere"):
        CocoDataset(path, tmp_path / "nowhere")
    for image in (tmp_path / "elsewhere").iterdir():
        image.rename(tmp_path / image.name)
    assert len(CocoDataset(path)) == 3


def test_missing_images_are_named_and_counted(tmp_path: Path) -> None:
    path = write_coco(tmp_path)
    (tmp_path / "images" / "a.png").unlink()
    (tmp_path / "images" / "c.png").unlink()
    with pytest.raises(DataError) as error:
        CocoDataset(path)
    message = one_line(error)
    assert "2 of 3 images" in message
    assert "a.png, c.png" in message


FAULTS = [
    ([5, 5, 0, 4], "zero area"),
    ([5, 5, 4, -1], "zero area"),
    ([50, 5, 4, 4], "outside the image"),
    ([-5, 5, 5, 4], "outside the image"),
    ([39.9999999, 5, 4, 4], "outside the image"),  # nothing is left of it in float32
]


@pytest.mark.parametrize(("box", "reason"), FAULTS)
def test_boxes_without_a_visible_part_are_dropped_or_refused(
    tmp_path: Path, box: list[float], reason: str
) -> None:
    content = coco_content()
    content["annotations"][1]["bbox"] = box
    path = write_coco(tmp_path, content)
    data = CocoDataset(path)
    assert data[0].boxes_xyxy.tolist() == [[30, 20, 40, 30]]
    assert data[0].class_labels.tolist() == [1]
    assert data.report.dropped_boxes == {reason: 1}
    assert f"1 boxes dropped: {reason}" in data.report.summary()
    assert data.ground_truth["annotations"][1]["bbox"] == box
    with pytest.raises(DataError, match=f"annotation 2 .*{reason}"):
        CocoDataset(path, strict=True)


def test_boxes_partly_outside_are_clipped_or_refused(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"][1]["bbox"] = [-3, 25, 10, 20]
    path = write_coco(tmp_path, content)
    data = CocoDataset(path)
    assert data[0].boxes_xyxy[0].tolist() == [0, 25, 7, 30]
    assert data.report.clipped_boxes == 1
    assert data.report.boxes == 3
    assert data.ground_truth["annotations"][1]["bbox"] == [-3, 25, 10, 20]
    with pytest.raises(DataError, match=r"annotation 2 .*partly outside"):
        CocoDataset(path, strict=True)


def test_strict_takes_boxes_that_touch_the_border(tmp_path: Path) -> None:
    assert CocoDataset(write_coco(tmp_path), strict=True).report.clipped_boxes == 0


@pytest.mark.parametrize(
    ("suffix", "keep"), [("jpg", 0.3), ("jpg", 0.9), ("jpg", 0.999), ("png", 0.3), ("png", 0.9)]
)
def test_truncated_images_are_refused_by_name(tmp_path: Path, suffix: str, keep: float) -> None:
    content = coco_content()
    content["images"][1]["file_name"] = f"b.{suffix}"
    path = write_coco(tmp_path, content)
    image = tmp_path / "images" / f"b.{suffix}"
    whole = image.read_bytes()
    image.write_bytes(whole[: int(len(whole) * keep)])
    data = CocoDataset(path)
    with pytest.raises(DataError) as error:
        data[1]
    assert str(image) in one_line(error)
    assert len(data[0].boxes_xyxy) == 2


def test_files_that_are_no_image_are_refused_by_name(tmp_path: Path) -> None:
    path = write_coco(tmp_path)
    (tmp_path / "images" / "a.png").write_text("not an image")
    with pytest.raises(DataError, match=r"a\.png is not an image"):
        CocoDataset(path)[0]


def test_image_of_another_size_is_refused(tmp_path: Path) -> None:
    path = write_coco(tmp_path)
    noise_image(41, 30).save(tmp_path / "images" / "a.png")
    with pytest.raises(DataError, match=r"a\.png is 41 x 30 pixels.* 40 x 30"):
        CocoDataset(path)[0]


@pytest.mark.parametrize("size", [(40, 30), (30, 40)])
def test_json_decides_whether_exif_turns_the_image(tmp_path: Path, size: tuple[int, int]) -> None:
    content = coco_content()
    content["images"][0].update(file_name="a.jpg", width=size[0], height=size[1])
    path = write_coco(tmp_path, content)
    stored = noise_image(40, 30)
    exif = Image.Exif()
    exif[274] = 6  # to be shown a quarter turn clockwise
    stored.save(tmp_path / "images" / "a.jpg", exif=exif)
    with Image.open(tmp_path / "images" / "a.jpg") as image:
        pixels = np.array(image)
    expected = pixels if size == (40, 30) else np.rot90(pixels, -1)
    assert np.array_equal(CocoDataset(path)[0].image.permute(1, 2, 0).numpy(), expected)


def saved(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def test_every_kind_of_pixel_becomes_rgb(tmp_path: Path) -> None:
    path = write_coco(tmp_path)
    file = tmp_path / "images" / "a.png"

    def decoded(image: Image.Image, kind: str = "PNG") -> np.ndarray:
        file.write_bytes(saved(image, kind))
        sample = CocoDataset(path)[0]
        assert sample.image.shape == (3, 30, 40)
        assert sample.image.dtype == torch.uint8
        return sample.image.permute(1, 2, 0).numpy()

    grey = Image.fromarray(np.arange(1200, dtype=np.uint32).astype(np.uint8).reshape(30, 40))
    assert np.array_equal(decoded(grey), np.repeat(np.array(grey)[..., None], 3, 2))
    deep = Image.fromarray((np.arange(1200, dtype=np.uint16) * 50).reshape(30, 40))
    assert np.array_equal(decoded(deep)[..., 0], np.array(deep) >> 8)
    clear = Image.new("RGBA", (40, 30), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 20, 30))
    assert decoded(clear)[5, [5, 30]].tolist() == [[0, 0, 255], [255, 255, 255]]
    colors = noise_image(40, 30).convert("P")
    assert np.array_equal(decoded(colors), np.array(colors.convert("RGB")))
    print_colors = Image.new("CMYK", (40, 30), (0, 255, 255, 0))
    red = decoded(print_colors, "JPEG")[10, 10]
    assert red[0] > 250
    assert red[1] < 10


def test_real_photos_load(real_data: Path) -> None:
    data = CocoDataset(real_data / "coco_mini" / "instances.json", strict=True)
    assert (data.report.images, data.report.boxes, data.report.crowd_boxes) == (64, 617, 7)
    assert data.report.images_without_boxes == 1
    assert len(data.categories) == 80
    assert data.categories[79] == Category(90, "toothbrush")
    content = json.loads((real_data / "coco_mini" / "instances.json").read_text())
    for entry in content["annotations"]:
        del entry["segmentation"]
    assert data.ground_truth["annotations"] == content["annotations"]
    sample = data[3]
    assert sample.image.shape == (3, *sample.original_size)
