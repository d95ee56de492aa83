"""Public data sets in their owners' layout give the canonical COCO files beside them."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detrelay.apps.check_data import Arguments, check_data
from detrelay.core.data.annotations import Annotations
from detrelay.core.data.coco import AnnotatedImages
from detrelay.core.data.places import open_place, open_stream
from detrelay.core.data.streaming import StreamedImages
from detrelay.core.data.writing import write_data
from detrelay.core.errors import DataError
from factories_data import write_imagefolder

Rows = Mapping[str, Counter[tuple[object, ...]]]


def rows_of(part: Annotations, digits: int = 2, *, only_whole: bool = False) -> Rows:
    """By file name: how often each category and corners occur."""
    result: dict[str, Counter[tuple[object, ...]]] = {
        Path(part.images.name(row)).name: Counter() for row in range(len(part))
    }
    for image, label, (x, y, w, h) in zip(
        part.box_image.tolist(), part.box_class.tolist(), part.boxes_xywh.tolist(), strict=True
    ):
        if (w > 0 and h > 0) or not only_whole:
            corners = (round(value, digits) + 0.0 for value in (x, y, x + w, y + h))
            name = Path(part.images.name(image)).name
            result[name][part.categories[label].name, *corners] += 1
    return result


def split(place: str, name: str, images: Path | None = None) -> Annotations:
    return open_place(place, images).splits[name]


@pytest.mark.parametrize("name", ["train", "val"])
def test_blood_cells_read_as_coco_voc_and_yolo_are_the_same(real_data: Path, name: str) -> None:
    folder = real_data / "bccd"
    images = folder / "images"
    truth = split(str(folder), name)
    voc = split(str(folder / "voc"), name, images)
    # its known defect: one box without area in each list
    assert rows_of(voc, only_whole=True) == rows_of(truth)
    assert len(voc.box_ids) == len(truth.box_ids) + 1
    parts = {"coco": truth, "voc": voc}
    if name == "val":
        parts["yolo"] = split(str(folder / "yolo"), "all", images)
        assert rows_of(parts["yolo"], 0) == rows_of(truth, 0)
    samples = {key: AnnotatedImages(part) for key, part in parts.items()}
    order = {
        key: {one.file_name(row): row for row in range(len(one))} for key, one in samples.items()
    }
    for file in list(order["coco"])[:20]:
        targets = []
        for key, one in samples.items():
            sample = (
                one[order[key][Path(file).name]] if file in order[key] else one[order[key][file]]
            )
            names = [one.categories[label].name for label in sample.class_labels.tolist()]
            boxes = sample.boxes_xyxy.round(decimals=2).tolist()
            targets.append(sorted(zip(names, boxes, strict=True)))
        for other in targets[1:]:
            assert [name for name, _ in other] == [name for name, _ in targets[0]]
            for ours, theirs in zip(other, targets[0], strict=True):
                assert ours[1] == pytest.approx(theirs[1], abs=0.011)


@pytest.mark.parametrize(
    ("folder", "place", "names"),
    [
        ("aquarium", "data.yaml", {"train": "train", "val": "val"}),
        ("cards", "voc:images/train", {"all": "train.json val.json"}),
        ("cards", "images/train_labels.csv", {"all": "train.json val.json"}),
        ("chess", "coco:.", {"train": "train", "val": "val"}),
    ],
)
def test_owners_layout_gives_the_canonical_file(
    real_data: Path,
    folder: str,
    place: str,
    names: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(real_data / folder)
    found = open_place(place)
    for ours, theirs in names.items():
        truth: dict[str, Counter[tuple[object, ...]]] = {}
        for file in theirs.split():
            path = file if file.endswith(".json") else f"{file}.json"
            (part,) = open_place(path).splits.values()
            truth |= rows_of(part, 1)
        assert rows_of(found.splits[ours], 1) == truth


def test_trees_in_each_dialect_give_the_canonical_file(real_data: Path) -> None:
    folder = real_data / "trees"
    (part,) = open_place(str(folder / "truth.json")).splits.values()
    truth, seen = rows_of(part), set()
    for file in (
        *("OSBS_029.xml", "SOAP_061.xml", "2019_YELL_2_541000_4977000_image_crop.xml"),
        *("OSBS_029.csv", "testfile_multi.csv"),
        "2018_SJER_3_252000_4107000_image_477_truth.csv",
    ):
        (found,) = open_place(str(folder / file)).splits.values()
        for name, boxes in rows_of(found).items():
            assert (
                Counter(
                    {("Tree" if key[0] == "0" else key[0], *key[1:]): n for key, n in boxes.items()}
                )
                == truth[name]
            ), (file, name)
            seen.add(name)
    assert seen == truth.keys()


def test_a_vott_export_gives_what_its_owner_trained_on(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "formats" / "vott_csv"
    sizes = json.loads((folder / "image_sizes.json").read_text())
    made_images(tmp_path, [(name, *size) for name, size in sizes.items()])
    (part,) = open_place(str(folder / "Annotations-export.csv"), tmp_path).splits.values()
    trained = {}
    for line in (folder / "data_train.txt").read_text().splitlines():
        path, *boxes = line.split()
        corners = [tuple(map(float, box.split(",")[:4])) for box in boxes]
        trained[Path(path).name] = Counter(corners)
    found = {
        name: Counter({key[1:]: count for key, count in boxes.items()})
        for name, boxes in rows_of(part, 0).items()
    }
    assert len(found) > 99
    assert found == trained


@pytest.mark.parametrize(
    ("place", "images", "boxes"),
    [
        ("coco_dataset/coco_instances", 2, 3),
        ("coco_dataset/coco_roboflow", 2, 3),
        ("cvat_dataset/for_images/export_project", 6, 6),
        ("roboflow_dataset/coco", 3, 4),
        ("roboflow_dataset/voc", 3, 4),
        ("vott_csv_dataset/dataset", 4, 5),
        ("vott_csv_dataset/dataset_with_meta_file", 2, 2),
        ("yolo_dataset/labels", 2, 4),
        ("yolo_dataset/strict", 1, 2),
    ],
)
def test_small_examples_of_another_project_are_read(
    real_data: Path, place: str, images: int, boxes: int
) -> None:
    splits = open_place(str(real_data / "formats" / "datumaro" / place)).splits.values()
    assert sum(map(len, splits)) == images
    assert sum(len(part.box_ids) for part in splits) == boxes


@pytest.mark.slow
@pytest.mark.parametrize(
    "place",
    [
        *("bccd/val.json", "aquarium/val.json", "cards/val.json", "chess/val.json"),
        *("coco_mini/instances.json", "trees/truth.json"),
    ],
)
def test_parquet_and_image_folders_of_a_set_give_its_samples_streamed_too(
    real_data: Path, place: str, tmp_path: Path
) -> None:
    (part,) = open_place(str(real_data / place)).splits.values()
    part = part.select(np.arange(min(len(part), 24)))
    coco = AnnotatedImages(part)
    write_data({"train": part}, "parquet", tmp_path / "parquet")
    write_imagefolder(tmp_path / "folder", coco)
    names = [category.name for category in part.categories]
    for layout in ("parquet", "folder"):
        (found,) = open_place(str(tmp_path / layout)).splits.values()
        at_random = AnnotatedImages(found)
        stream = open_stream(str(tmp_path / layout), names)
        streamed = StreamedImages(stream, rows=len(coco))
        rows = list(stream.data)
        assert len(rows) == len(at_random) == len(coco)
        for row, second, expected in zip(rows, at_random, coco, strict=True):
            labels = [names[label] for label in expected.class_labels]
            for one, categories in (
                (streamed.sample(row), streamed.categories),
                (second, at_random.categories),
            ):
                assert torch.equal(one.image, expected.image)
                assert torch.equal(one.boxes_xyxy, expected.boxes_xyxy)
                assert [categories[label].name for label in one.class_labels] == labels
                assert one.image_id == expected.image_id


def made_images(folder: Path, part: list[tuple[str, int, int]]) -> Path:
    for name, width, height in part:
        Image.new("RGB", (width, height)).save(folder / name)
    return folder


VOC100 = (
    *("coco_format_v1", "coco_format_v2", "cvat_format", "imagenet_format", "labelme_format"),
    *("openimages_format", "pascalvoc_format", "yolo_format"),
)


def whole_pixels(rows: Rows) -> Rows:
    """The same boxes with corners in whole pixels, which is what they are but for decimals."""
    result: dict[str, Counter[tuple[object, ...]]] = {file: Counter() for file in rows}
    for file, boxes in rows.items():
        for (label, *corners), count in boxes.items():
            result[file][label, *(round(float(str(value))) + 0.0 for value in corners)] += count
    return result


def test_one_set_exported_in_eight_formats_gives_the_same_boxes(
    real_data: Path, tmp_path: Path
) -> None:
    folder = real_data / "formats" / "voc100"
    yolo = tmp_path / "yolo"
    shutil.copytree(folder / "yolo_format", yolo)
    content = json.loads(next((folder / "coco_format_v1").glob("*.json")).read_text())
    sizes = [(entry["file_name"], entry["width"], entry["height"]) for entry in content["images"]]
    images = made_images(yolo / "obj_train_data", sizes)
    truth: Rows | None = None
    for name in VOC100:
        if name == "yolo_format":
            (part,) = open_place(str(yolo / "obj.data")).splits.values()
            assert truth is not None
            assert rows_of(part, 0) == whole_pixels(truth)
            continue
        place = folder / name
        files = [file for file in place.iterdir() if file.is_file()]
        place = files[0] if name.startswith(("cvat", "openimages")) else place
        (part,) = open_place(str(place), images).splits.values()
        rows = rows_of(part, 2)
        truth = rows if truth is None else truth
        assert rows.keys() == truth.keys(), name
        assert sum(map(Counter.total, rows.values())) == 273
        if name == "openimages_format":  # six decimals of fractions
            assert rows_of(part, 0) == whole_pixels(truth)
        else:
            assert rows == truth, name


def test_examples_of_each_layout_give_one_truth(real_data: Path) -> None:
    folder = real_data / "formats" / "synthetic"
    truth = json.loads((folder / "truth.json").read_text())["images"]
    places = [place for place in sorted(folder.iterdir()) if place.is_dir()]
    places = [place for place in places if place.name != "hub"]
    places += sorted((folder / "hub").glob("image*")) + sorted(
        (folder / "hub" / "parquet").iterdir()
    )
    assert len(places) >= 23
    for place in places:
        prefix = {"voc_devkit": "voc_devkit:", "strings_xyxy": "hub_xyxy:"}.get(place.stem, "")
        numbers = place.name == "imagefolder" or "no_metadata" in place.name
        for part in open_place(f"{prefix}{place}").splits.values():
            for file, boxes in rows_of(part, 1).items():
                name = file.removeprefix("0a1b2c3d-").replace("b_c", "b c")
                expected = Counter(
                    (label, *map(float, box)) for label, *box in truth[name]["objects"]
                )
                if numbers:  # no names anywhere: the ids become the names
                    classes = ["cat", "dog", "traffic light"]
                    boxes = Counter({(classes[int(k[0])], *k[1:]): v for k, v in boxes.items()})
                assert boxes == expected, (place, file)


DEFECTS = Path(__file__).parents[2] / "docs" / "known_defects.md"
PLACES = {
    "BCCD (as VOC)": ("bccd/voc", "bccd/images"),
    "BCCD": ("bccd", None),
    "Cards": ("cards", None),
    "Aquarium": ("aquarium", None),
    "Chess": ("chess", None),
    "Trees": ("trees", None),
    "COCO mini": ("coco_mini", None),
    "COCO fake100": ("coco_fake100/instances_gt.json", None),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLACES)
def test_documented_defects_are_found(
    real_data: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(real_data)
    place, images = PLACES[name]
    check_data(Arguments((place,), images=None if images is None else Path(images)))
    shown = capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in DEFECTS.read_text(encoding="utf-8").splitlines()]
    told = [row[2] for row in rows if len(row) == 3 and row[0].strip() == name]
    quoted = [quote for cell in told for quote in re.findall(r"`([^`]+)`", cell)]
    assert quoted
    for quote in quoted:
        for part in quote.split("..."):
            assert part.strip() in shown


# files of one defect each: the words of the refusal, or what is counted; "" where the reading is
# sound and there is nothing to say
OUTCOMES = json.loads((Path(__file__).parents[1] / "assets" / "outcomes.json").read_text())
YAML = "train: images\nval: images\nnames: [cat, dog, traffic light]\n"


def surroundings(source: Path, path: str, folder: Path) -> Path:
    """Put a file among the images it needs; the place to read."""
    kind = path.split("/")[0]
    beside = kind in ("voc", "labelme", "hub")
    shutil.copytree(source / "images", folder if beside else folder / "images", dirs_exist_ok=True)
    if kind in ("yolo", "yolo_yaml"):
        (folder / "labels").mkdir()
        (folder / "labels" / "a.txt").write_text("0 0.3 0.3 0.3 0.3\n1 0.6 0.6 0.3 0.4\n")
        (folder / "data.yaml").write_text(YAML)
        target = folder / "labels" / "a.txt" if kind == "yolo" else folder / "data.yaml"
        shutil.copy(source / path, target)
        return folder
    if kind == "label_studio":  # it wrote _ for the space when the image was uploaded
        shutil.copy(source / "images" / "b c.png", folder / "images" / "b_c.png")
    shutil.copy(source / path, folder)
    return folder if kind in ("labelme", "hub") else folder / Path(path).name


@pytest.mark.parametrize("kind", sorted({path.split("/")[0] for path in OUTCOMES}))
def test_each_defect_is_refused_or_counted(real_data: Path, kind: str, tmp_path: Path) -> None:
    source = real_data / "formats" / "defects"
    known = {entry["path"] for entry in json.loads((source / "index.json").read_text())}
    assert known == OUTCOMES.keys()
    for number, path in enumerate(OUTCOMES):
        if path.split("/")[0] != kind:
            continue
        place = surroundings(source, path, tmp_path / str(number))
        try:
            (part, *_) = open_place(str(place)).splits.values()
            samples = AnnotatedImages(part)
            for row in range(len(samples)):
                samples[row]
            line = f"read: {samples.report.summary()}"
        except DataError as error:
            line = f"refused: {error}"
        assert "\n" not in line
        how, words = OUTCOMES[path]
        assert line.startswith(f"{how}: "), (path, line)
        assert words in line, (path, line)
