"""One small dataset written in many formats: 4 images, 5 boxes, 3 categories."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from detrelay.core.data.annotations import Annotations
from detrelay.core.data.places import open_place

Box = tuple[str, float, float, float, float]

# By the stem of the file: (width, height) and boxes (name, x1, y1, x2, y2) in pixels.
TRUTH: dict[str, tuple[tuple[int, int], list[Box]]] = {
    "a": ((64, 48), [("cat", 8, 6, 28, 22), ("dog", 30, 20, 54, 42)]),
    "b c": ((50, 40), [("traffic light", 0, 0, 50, 12)]),
    "empty": ((32, 32), []),
    "d": ((40, 60), [("cat", 5, 10, 35, 55), ("cat", 7, 12, 17, 22)]),
}
FILES = {"a": "a.jpg", "b c": "b c.png", "empty": "empty.png", "d": "d.jpg"}
SPLITS = {"train": ["a", "b c", "empty"], "val": ["d"]}
NAMES = ["cat", "dog", "traffic light"]


def _pictures(folder: Path, stems: list[str] | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for stem in TRUTH if stems is None else stems:
        Image.new("RGB", TRUTH[stem][0], (80, 120, 160)).save(folder / FILES[stem])


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _coco(stems: list[str], *, first: int, group: bool) -> str:
    categories: list[dict[str, Any]] = [
        {"id": number, "name": name, "supercategory": "things"}
        for number, name in enumerate(NAMES, start=1)
    ]
    if group:
        categories.insert(0, {"id": 0, "name": "things", "supercategory": "none"})
    images, annotations = [], []
    for stem in stems:
        (width, height), boxes = TRUTH[stem]
        number = list(TRUTH).index(stem) + first
        images.append({"id": number, "file_name": FILES[stem], "width": width, "height": height})
        for name, x1, y1, x2, y2 in boxes:
            annotations.append(
                {
                    "id": 10 * number + len(annotations) + first,
                    "image_id": number,
                    "category_id": NAMES.index(name) + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                }
            )
    return json.dumps({"images": images, "annotations": annotations, "categories": categories})


def coco(folder: Path) -> None:
    _pictures(folder / "images")
    for split, stems in SPLITS.items():
        text = _coco(stems, first=1, group=False)
        _write(folder / "annotations" / f"instances_{split}.json", text)


def roboflow_coco(folder: Path) -> None:
    for split, stems in SPLITS.items():
        part = folder / ("valid" if split == "val" else split)
        _pictures(part, stems)
        _write(part / "_annotations.coco.json", _coco(stems, first=0, group=True))


def _yolo_rows(stem: str, kind: str = "box") -> str:
    (width, height), boxes = TRUTH[stem]
    rows = []
    for name, x1, y1, x2, y2 in boxes:
        if kind == "box":
            numbers = [(x1 + x2) / 2 / width, (y1 + y2) / 2 / height]
            numbers += [(x2 - x1) / width, (y2 - y1) / height]
        else:
            corners = [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
            corners += [(x1, (y1 + y2) / 2)] if kind == "polygon" else []
            numbers = [value for x, y in corners for value in (x / width, y / height)]
        rows.append(" ".join([str(NAMES.index(name)), *(f"{number:.6f}" for number in numbers)]))
    return "\n".join(rows)


def _yolo(folder: Path, yaml: str, kind: str = "box") -> None:
    for split, stems in SPLITS.items():
        _pictures(folder / "images" / split, stems)
        for stem in stems:
            if stem != "empty":
                _write(folder / "labels" / split / f"{stem}.txt", _yolo_rows(stem, kind))
        lines = [f"./images/{split}/{FILES[stem]}" for stem in stems]
        _write(folder / f"{split}.txt", "\n".join(lines))
    _write(folder / "data.yaml", yaml)


def yolo_v5(folder: Path) -> None:
    _yolo(folder, f"path: .\ntrain: images/train\nval: images/val\nnc: 3\nnames: {NAMES}\n")


def yolo_v8(folder: Path) -> None:
    names = "".join(f"\n  {number}: {name}" for number, name in enumerate(NAMES))
    _yolo(folder, f"path: .\ntrain: train.txt\nval: val.txt\ntest:\nnames:{names}\n")


def yolo_polygons(folder: Path) -> None:
    _yolo(folder, f"train: images/train\nval: images/val\nnames: {NAMES}\n", "polygon")


def yolo_corners(folder: Path) -> None:
    _yolo(folder, f"train: images/train\nval: images/val\nnames: {NAMES}\n", "corners")


def roboflow_yolo(folder: Path) -> None:
    for split, stems in SPLITS.items():
        part = folder / ("valid" if split == "val" else split)
        _pictures(part / "images", stems)
        for stem in stems:
            _write(part / "labels" / f"{stem}.txt", _yolo_rows(stem))
    _write(
        folder / "data.yaml",
        f"train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnames: {NAMES}",
    )


def yolo_darknet(folder: Path) -> None:
    _pictures(folder / "obj_train_data")
    for stem in TRUTH:
        _write(folder / "obj_train_data" / f"{stem}.txt", _yolo_rows(stem))
    lines = [f"data/obj_train_data/{name}" for name in FILES.values()]
    _write(folder / "train.txt", "\n".join(lines))
    _write(folder / "obj.names", "\n".join(NAMES))
    _write(folder / "obj.data", "classes = 3\ntrain = data/train.txt\nnames = data/obj.names\n")


def yolo_side_by_side(folder: Path) -> None:
    _pictures(folder)
    for stem in TRUTH:
        _write(folder / f"{stem}.txt", _yolo_rows(stem))
    _write(folder / "classes.txt", "\n".join(NAMES))


def _voc_xml(stem: str, shift: int) -> str:
    (width, height), boxes = TRUTH[stem]
    objects = "".join(
        f"<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{x1 + shift}</xmin>"
        f"<ymin>{y1 + shift}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for name, x1, y1, x2, y2 in boxes
    )
    return (
        f"<annotation><filename>{FILES[stem]}</filename><size><width>{width}</width>"
        f"<height>{height}</height><depth>3</depth></size>{objects}</annotation>"
    )


def voc(folder: Path, shift: int = 0) -> None:
    _pictures(folder / "JPEGImages")
    for stem in TRUTH:
        _write(folder / "Annotations" / f"{stem}.xml", _voc_xml(stem, shift))
    for split, stems in SPLITS.items():
        _write(folder / "ImageSets" / "Main" / f"{split}.txt", "\n".join(stems))


def voc_devkit(folder: Path) -> None:
    voc(folder, shift=1)


def voc_folders(folder: Path) -> None:
    for split, stems in SPLITS.items():
        part = folder / ("valid" if split == "val" else split)
        _pictures(part, stems)
        for stem in stems:
            _write(part / f"{stem}.xml", _voc_xml(stem, 0))


def csv_tensorflow(folder: Path) -> None:
    for split, stems in SPLITS.items():
        _pictures(folder, stems)
        rows = ["filename,width,height,class,xmin,ymin,xmax,ymax"]
        for stem in stems:
            (width, height), boxes = TRUTH[stem]
            for name, *corners in boxes:
                numbers = ",".join(map(str, corners))
                rows.append(f"{FILES[stem]},{width},{height},{name},{numbers}")
        _write(folder / f"{split}_labels.csv", "\n".join(rows))


def csv_retinanet(folder: Path) -> None:
    _pictures(folder / "images")
    rows = []
    for stem, (_, boxes) in TRUTH.items():
        for name, *corners in boxes:
            rows.append(f"images/{FILES[stem]},{','.join(map(str, corners))},{name}")
        if not boxes:
            rows.append(f"images/{FILES[stem]},,,,,")
    _write(folder / "annotations.csv", "\n".join(rows))
    _write(folder / "classes.csv", "\n".join(f"{name},{n}" for n, name in enumerate(NAMES)))


def csv_openimages(folder: Path) -> None:
    _pictures(folder / "images")
    rows = ["ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsGroupOf"]
    for stem, ((width, height), boxes) in TRUTH.items():
        for name, x1, y1, x2, y2 in boxes:
            numbers = [x1 / width, x2 / width, y1 / height, y2 / height]
            cells = ",".join(f"{number:.6f}" for number in numbers)
            rows.append(f"{stem},x,/m/0{NAMES.index(name)},1,{cells},0")
    _write(folder / "annotations-bbox.csv", "\n".join(rows))
    codes = [f"/m/0{number},{name}" for number, name in enumerate(NAMES)]
    _write(folder / "class-descriptions-boxable.csv", "\n".join(codes))


def labelme(folder: Path) -> None:
    _pictures(folder)
    for stem, ((width, height), boxes) in TRUTH.items():
        shapes = [
            {"label": name, "points": [[x2, y2], [x1, y1]], "shape_type": "rectangle"}
            for name, x1, y1, x2, y2 in boxes
        ]
        content = {"shapes": shapes, "imagePath": FILES[stem], "imageData": None}
        content |= {"imageWidth": width, "imageHeight": height}
        _write(folder / f"{stem}.json", json.dumps(content))


def cvat(folder: Path) -> None:
    images = ""
    for split, stems in SPLITS.items():
        _pictures(folder / "images" / split, stems)
        for stem in stems:
            (width, height), boxes = TRUTH[stem]
            drawn = "".join(
                f'<box label="{name}" xtl="{x1}" ytl="{y1}" xbr="{x2}" ybr="{y2}"/>'
                for name, x1, y1, x2, y2 in boxes
            )
            images += (
                f'<image name="{split}/{FILES[stem]}" subset="{split}" width="{width}" '
                f'height="{height}">{drawn}</image>'
            )
    labels = "".join(f"<label><name>{name}</name></label>" for name in NAMES)
    meta = f"<meta><task><labels>{labels}</labels></task></meta>"
    _write(folder / "annotations.xml", f"<annotations>{meta}{images}</annotations>")


def label_studio(folder: Path) -> None:
    _pictures(folder / "images")
    tasks = []
    for number, (stem, ((width, height), boxes)) in enumerate(TRUTH.items()):
        results = [
            {
                "original_width": width,
                "original_height": height,
                "type": "rectanglelabels",
                "value": {
                    "x": 100 * x1 / width,
                    "y": 100 * y1 / height,
                    "width": 100 * (x2 - x1) / width,
                    "height": 100 * (y2 - y1) / height,
                    "rectanglelabels": [name],
                },
            }
            for name, x1, y1, x2, y2 in boxes
        ]
        link = f"/data/upload/1/0a1b2c3d-{FILES[stem].replace(' ', '%20')}"
        tasks.append({"id": number, "data": {"image": link}, "annotations": [{"result": results}]})
    _write(folder / "export.json", json.dumps(tasks))


def imagefolder(folder: Path) -> None:
    for split, stems in SPLITS.items():
        part = folder / ("validation" if split == "val" else split)
        _pictures(part, stems)
        rows = []
        for stem in stems:
            boxes = TRUTH[stem][1]
            table = {
                "bbox": [[x1, y1, x2 - x1, y2 - y1] for _, x1, y1, x2, y2 in boxes],
                "category": [name for name, *_ in boxes],
            }
            rows.append(json.dumps({"file_name": FILES[stem], "objects": table}))
        _write(part / "metadata.jsonl", "\n".join(rows))


# By name: what writes the format, and the format it is recognised as.
WRITERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "coco": (coco, "coco"),
    "roboflow_coco": (roboflow_coco, "coco"),
    "yolo_v5": (yolo_v5, "yolo"),
    "yolo_v8": (yolo_v8, "yolo"),
    "yolo_polygons": (yolo_polygons, "yolo"),
    "yolo_corners": (yolo_corners, "yolo"),
    "roboflow_yolo": (roboflow_yolo, "yolo"),
    "yolo_darknet": (yolo_darknet, "yolo"),
    "yolo_side_by_side": (yolo_side_by_side, "yolo"),
    "voc": (voc, "voc"),
    "voc_devkit": (voc_devkit, "voc_devkit"),
    "voc_folders": (voc_folders, "voc"),
    "csv_tensorflow": (csv_tensorflow, "csv"),
    "csv_retinanet": (csv_retinanet, "csv"),
    "csv_openimages": (csv_openimages, "csv"),
    "labelme": (labelme, "labelme"),
    "cvat": (cvat, "cvat"),
    "label_studio": (label_studio, "label_studio"),
    "imagefolder": (imagefolder, "hub"),
}


def write_format(name: str, folder: Path) -> tuple[str, str]:
    """Write the dataset; returns how to name it for reading, and the format recognised then."""
    write, format_name = WRITERS[name]
    write(folder)
    named = format_name in ("voc_devkit",)
    return (f"{format_name}:{folder}" if named else str(folder)), format_name


def only(place: Path | str, **options: Any) -> Annotations:
    """The one split of a place."""
    (part,) = open_place(str(place), **options).splits.values()
    return part


def picture(path: Path, size: tuple[int, int] = (64, 48)) -> Path:
    """A file with an image of this size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, 60)).save(path)
    return path
