"""Writes docs/hostile_data.md: what a user sees of odd and hostile data, one line each.

python docs/hostile.py
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from detrelay.core.data.coco import AnnotatedImages
from detrelay.core.data.places import open_place
from detrelay.core.errors import DataError

TARGET = Path(__file__).parent / "hostile_data.md"

Make = Callable[[Path], str | None]


@dataclass(frozen=True)
class Case:
    """A hostile input.

    Attributes:
        format: of the annotations.
        what: what is odd about it.
        make: writes it into a folder; returns the place to read if that is not the folder.
    """

    format: str
    what: str
    make: Make


def picture(path: Path, size: tuple[int, int] = (64, 48)) -> None:
    """A small image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), 90, dtype=np.uint8)).save(path)


# --- COCO


def coco_content() -> dict[str, Any]:
    """A sound file, to be spoilt."""
    return {
        "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 48}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [8, 6, 20, 16]},
            {"id": 2, "image_id": 1, "category_id": 2, "bbox": [30, 20, 24, 22]},
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


def coco(what: str, spoil: Callable[[dict[str, Any]], object]) -> Case:
    """A COCO file after a change."""

    def make(folder: Path) -> str:
        picture(folder / "a.png")
        content = coco_content()
        spoil(content)
        (folder / "set.json").write_text(json.dumps(content))
        return "set.json"

    return Case("COCO", what, make)


def coco_text(what: str, text: str | bytes) -> Case:
    """A json file of this text."""

    def make(folder: Path) -> str:
        (folder / "set.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        return "set.json"

    return Case("COCO", what, make)


def box(**values: Any) -> Callable[[dict[str, Any]], object]:
    """Change the first annotation."""
    return lambda content: content["annotations"][0].update(values)


def image(**values: Any) -> Callable[[dict[str, Any]], object]:
    """Change the image."""
    return lambda content: content["images"][0].update(values)


def without(part: str, key: str) -> Callable[[dict[str, Any]], object]:
    """Remove a key of the first entry."""
    return lambda content: content[part][0].pop(key)


def corners(content: dict[str, Any]) -> None:
    """Boxes as corners, enough of them to tell."""
    content["annotations"] = [
        {"id": n, "image_id": 1, "category_id": 1, "bbox": [30 + n, 20 + n, 50 + n, 40]}
        for n in range(1, 9)
    ]


GROUP = [
    {"id": 0, "name": "pets", "supercategory": "none"},
    {"id": 1, "name": "cat", "supercategory": "pets"},
    {"id": 2, "name": "dog", "supercategory": "pets"},
]

COCO = [
    coco("annotation id 0", box(id=0)),
    coco("every annotation has the same id", box(id=2)),
    coco("image id is a list", image(id=[1])),
    coco("image id is text", image(id="1")),
    coco("image id of 400 digits", image(id=10**399)),
    coco("bbox with a number of 400 digits", box(bbox=[10**399, 0, 1, 1])),
    coco("bbox with NaN", box(bbox=[float("nan"), 0, 1, 1])),
    coco("bbox empty", box(bbox=[])),
    coco("bbox with text", box(bbox=["8", 6, 20, 16])),
    coco("bbox null", box(bbox=None)),
    coco("bbox without width", box(bbox=[8, 6, 0, 16])),
    coco("bbox of negative width", box(bbox=[8, 6, -20, 16])),
    coco("bbox leaves the image", box(bbox=[50, 6, 20, 16])),
    coco("bbox outside the image", box(bbox=[500, 6, 20, 16])),
    coco("boxes are corners", corners),
    coco(
        "boxes are fractions",
        lambda c: [a.update(bbox=[0.1, 0.1, 0.3, 0.3]) for a in c["annotations"]],
    ),
    coco("area -1", box(area=-1)),
    coco("iscrowd 2", box(iscrowd=2)),
    coco("unknown category", box(category_id=9)),
    coco("unknown image", box(image_id=9)),
    coco("no categories", lambda content: content.pop("categories")),
    coco("no images", lambda content: content.update(images=[], annotations=[])),
    coco("two categories of one name", lambda content: content["categories"][1].update(name="cat")),
    coco("a group as category 0", lambda content: content.update(categories=GROUP)),
    coco("image without width", without("images", "width")),
    coco("image of height 0", image(height=0)),
    coco("image of another size", image(width=48, height=64)),
    coco("image without file_name", without("images", "file_name")),
    coco("missing image", image(file_name="b.png")),
    coco("file_name leads out", image(file_name="../../etc/passwd")),
    coco("file_name absolute", image(file_name="/etc/passwd")),
    coco("file_name of Windows", image(file_name=".\\a.png")),
    coco("file_name with half a character", image(file_name="\ud800.png")),
    coco("no annotations at all", lambda content: content.update(annotations=[])),
    coco_text("cut off", '{"images": ['),
    coco_text("empty file", ""),
    coco_text("a picture under the name", b"\xff\xd8\xff\xe0\0"),
    coco_text("a list of detections", '[{"image_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]'),
    coco_text("nested 100,000 deep", '{"images": ' + "[" * 100_000),
    coco_text("only null", "null"),
]

# --- YOLO


def yolo(what: str, rows: str | bytes, yaml: str | None = None) -> Case:
    """A label file with these rows, and its `data.yaml`."""

    def make(folder: Path) -> str:
        picture(folder / "images" / "a.png")
        (folder / "labels").mkdir()
        (folder / "labels" / "a.txt").write_bytes(
            rows if isinstance(rows, bytes) else rows.encode()
        )
        text = "train: images\nval: images\nnames: [cat, dog]\n" if yaml is None else yaml
        (folder / "data.yaml").write_text(text)
        return "data.yaml"

    return Case("YOLO", what, make)


ROW = "0 0.5 0.5 0.2 0.2"
YOLO = [
    yolo("centre over 1 by rounding", "0 1.0004 0.5 0.2 0.2"),
    yolo("pixels", "0 32 24 12 9"),
    yolo("class beyond the names", "7 0.5 0.5 0.2 0.2"),
    yolo("class by name", "dog 0.5 0.5 0.2 0.2"),
    yolo("a confidence behind", ROW + " 0.9"),
    yolo("a number is missing", "0 0.5 0.5 0.2"),
    yolo("commas", ROW.replace(" ", ",")),
    yolo("every row twice", f"{ROW}\n{ROW}"),
    yolo("a row without size", "0 0.5 0.5 0 0"),
    yolo("a polygon among boxes", f"{ROW}\n1 0.1 0.1 0.3 0.1 0.2 0.4"),
    yolo("no text", b"\xff\xfe\x00\x81"),
    yolo("names missing", ROW, "train: images\nval: images\n"),
    yolo("nc differs", ROW, "train: images\nval: images\nnc: 3\nnames: [cat, dog]\n"),
    yolo("path of another machine", ROW, "path: /content/x\ntrain: pictures\nnames: [cat]\n"),
    yolo("a tab in the yaml", ROW, "train:\timages\n\tval: images\n"),
    yolo("yaml nested 3,000 deep", ROW, "[" * 3000),
    yolo(
        "yaml that grows by aliases", ROW, "a: &a [x]\nb: &b [*a, *a]\nnames: [*b]\ntrain: images\n"
    ),
    yolo(
        "a gap in the numbers of names", "1" + ROW[1:], "train: images\nnames: {0: cat, 2: dog}\n"
    ),
    yolo("folders beside the yaml, path elsewhere", ROW, "path: /x\ntrain: images\nnames: [cat]\n"),
    yolo("two names alike", ROW, "train: images\nval: images\nnames: [cat, cat]\n"),
    yolo("names differ in case", ROW, "train: images\nval: images\nnames: [cat, Cat]\n"),
    yolo("names that YAML calls booleans", ROW, "train: images\nval: images\nnames: [yes, no]\n"),
]

# --- VOC


def voc(what: str, objects: str, head: str = "", size: str = "") -> Case:
    """An XML file with these objects."""

    def make(folder: Path) -> None:
        picture(folder / "a.png")
        picture(folder / "b.png")
        sizes = size or "<size><width>64</width><height>48</height></size>"
        (folder / "a.xml").write_text(f"{head}<annotation>{sizes}{objects}</annotation>")
        (folder / "b.xml").write_text(f"<annotation>{sizes}{item(1, 1, 9, 9)}</annotation>")

    return Case("VOC", what, make)


def item(*values: object, name: str = "cat", more: str = "") -> str:
    """An object of VOC."""
    keys = ("xmin", "ymin", "xmax", "ymax")
    tags = "".join(f"<{key}>{value}</{key}>" for key, value in zip(keys, values, strict=True))
    return f"<object><name>{name}</name>{more}<bndbox>{tags}</bndbox></object>"


def single(folder: Path) -> str:
    """One XML file named by itself."""
    voc("", item(8, 6, 28, 22)).make(folder)
    return "a.xml"


BOMB = '<!DOCTYPE a [<!ENTITY b "bbbb">]>'
VOC = [
    voc("corners swapped", item(28, 22, 8, 6)),
    voc("a corner is text", item("left", 6, 28, 22)),
    voc("a corner is infinite", item("inf", 6, 28, 22)),
    voc("no name", item(8, 6, 28, 22, name="")),
    voc("no corners", "<object><name>cat</name></object>"),
    voc("difficult", item(8, 6, 28, 22, more="<difficult>1</difficult>")),
    voc("no size", item(8, 6, 28, 22), size=" "),
    voc("size 0", item(8, 6, 28, 22), size="<size><width>0</width><height>0</height></size>"),
    voc("cut off", "<object>"),
    voc("entities", item(8, 6, 28, 22), head=BOMB),
    voc("names differ in case", item(8, 6, 28, 22, name="Cat")),
    Case("VOC", "one file by itself", single),
]

# --- csv


def table(what: str, text: str) -> Case:
    """A csv file."""

    def make(folder: Path) -> str:
        picture(folder / "a.png")
        picture(folder / "b.png")
        (folder / "boxes.csv").write_text(text)
        return "boxes.csv"

    return Case("csv", what, make)


HEAD = "filename,width,height,class,xmin,ymin,xmax,ymax\n"
CSV = [
    table("no head", "a.png,64,48,cat,8,6,28,22\n"),
    table("a short row", HEAD + "a.png,64,48,cat,8\n"),
    table("text for a number", HEAD + "a.png,64,48,cat,8,six,28,22\n"),
    table("a missing image", HEAD + "z.png,64,48,cat,8,6,28,22\n"),
    table("scores", "filename,class,xmin,ymin,xmax,ymax,score\n"),
    table("a row of zeros", HEAD + "a.png,64,48,cat,8,6,28,22\nb.png,64,48,cat,0,0,0,0\n"),
    table(
        "decimal commas",
        "image;xmin;ymin;xmax;ymax;label\na.png;8,5;6;28;22;cat\nb.png;1;1;9;9;cat\n",
    ),
    table("empty", ""),
    table("a name of an address", HEAD + "%61.png,64,48,cat,8,6,28,22\nb.png,64,48,cat,1,1,9,9\n"),
]

# --- LabelMe, CVAT, Label Studio, Hub


def labelme(what: str, **shape: Any) -> Case:
    """A LabelMe file with one sound shape and this one."""

    def make(folder: Path) -> None:
        picture(folder / "a.png")
        picture(folder / "b.png")
        sound = {"label": "cat", "points": [[8, 6], [28, 22]], "shape_type": "rectangle"}
        for name, shapes in (("a", [sound, sound | shape]), ("b", [sound])):
            content = {"shapes": shapes, "imagePath": f"{name}.png"}
            (folder / f"{name}.json").write_text(json.dumps(content))

    return Case("LabelMe", what, make)


def cvat(what: str, shapes: str) -> Case:
    """A CVAT file with one sound box and these shapes."""

    def make(folder: Path) -> None:
        sound = '<box label="cat" xtl="1" ytl="1" xbr="9" ybr="9"/>'
        for name in ("a", "b"):
            picture(folder / f"{name}.png")
        images = "".join(
            f'<image name="{name}.png" width="64" height="48">{content}</image>'
            for name, content in (("a", sound + shapes), ("b", sound))
        )
        (folder / "annotations.xml").write_text(f"<annotations>{images}</annotations>")

    return Case("CVAT", what, make)


def label_studio(what: str, **task: Any) -> Case:
    """Two sound tasks and this one."""

    def make(folder: Path) -> str:
        value = {"x": 10, "y": 10, "width": 30, "height": 30, "rectanglelabels": ["cat"]}
        result = [{"type": "rectanglelabels", "value": value}]
        tasks = []
        for number, name in enumerate("abc"):
            picture(folder / f"{name}.png")
            sound = {
                "data": {"image": f"/data/upload/{name}.png"},
                "annotations": [{"result": result}],
            }
            tasks.append({"id": number} | sound | (task if name == "c" else {}))
        (folder / "export.json").write_text(json.dumps(tasks))
        return "export.json"

    return Case("Label Studio", what, make)


def hub(what: str, **row: Any) -> Case:
    """An image folder with two sound rows and this one."""

    def make(folder: Path) -> None:
        rows = []
        for name in "abc":
            picture(folder / f"{name}.png")
            sound = {"bbox": [[8, 6, 20, 16]], "category": ["cat"]}
            rows.append(
                {"file_name": f"{name}.png", "objects": sound} | (row if name == "c" else {})
            )
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))

    return Case("Hub", what, make)


TURNED = {
    "type": "rectanglelabels",
    "value": {
        **{"x": 50, "y": 10, "width": 30, "height": 30, "rotation": 45},
        "rectanglelabels": ["cat"],
    },
}
OTHERS = [
    labelme("a point", points=[[8, 6]], shape_type="point"),
    labelme("a circle", points=[[20, 20], [24, 20]], shape_type="circle"),
    labelme("a polygon", points=[[8, 6], [28, 6], [9, 22]], shape_type="polygon"),
    labelme("points that are no pairs", points=[[1, 2, 3]]),
    labelme("points null", points=None),
    labelme("label null", label=None),
    cvat("a rotated box", '<box label="cat" xtl="20" ytl="10" xbr="40" ybr="20" rotation="30"/>'),
    cvat("points", '<points label="cat" points="1,2"/>'),
    cvat("a corner is missing", '<box label="cat" xtl="20" ytl="10" xbr="40"/>'),
    cvat("tracks", "</image><track/><image name='c.png'>"),
    label_studio("a cancelled annotation", annotations=[{"was_cancelled": True, "result": []}]),
    label_studio("only a prediction", annotations=[], predictions=[{"result": []}]),
    label_studio("a rotated box", annotations=[{"result": [TURNED]}]),
    label_studio("result null", annotations=[{"result": None}]),
    label_studio("no image", data={}),
    hub("objects null", objects=None),
    hub("two boxes, one category", objects={"bbox": [[1, 1, 2, 2]] * 2, "category": ["cat"]}),
    hub("three numbers in a bbox", objects={"bbox": [[1, 1, 2]], "category": ["cat"]}),
]

# --- images and places


def pixels(what: str, spoil: Callable[[Path], object]) -> Case:
    """A sound COCO file with an odd image."""

    def make(folder: Path) -> str:
        picture(folder / "a.png")
        (folder / "set.json").write_text(json.dumps(coco_content()))
        spoil(folder / "a.png")
        return "set.json"

    return Case("image", what, make)


def write_bytes(data: bytes) -> Callable[[Path], object]:
    """Replace the image."""
    return lambda path: path.write_bytes(data)


def bomb(path: Path) -> None:
    """A file that claims to hold 10 gigapixels."""
    whole = bytearray(path.read_bytes())
    whole[16:24] = (100_000).to_bytes(4, "big") * 2
    whole[29:33] = zlib.crc32(whole[12:29]).to_bytes(4, "big")
    path.write_bytes(whole)


PLACES = [
    pixels("empty file", write_bytes(b"")),
    pixels("text", write_bytes(b"no image")),
    pixels("cut off", lambda path: path.write_bytes(path.read_bytes()[:60])),
    pixels("claims 10 gigapixels", bomb),
    pixels("PostScript", write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\n")),
    pixels("floats", lambda path: Image.new("F", (64, 48)).save(path, "TIFF")),
    Case("place", "nothing there", lambda folder: "nowhere"),
    Case("place", "an empty folder", lambda folder: None),
    Case("place", "a name of 300 letters", lambda folder: "x" * 300),
    Case("place", "an unknown format", lambda folder: "vok:set"),
    Case("place", "a picture", lambda folder: picture(folder / "a.png") or "a.png"),
    Case("place", "a folder of pictures", lambda folder: picture(folder / "a.png")),
]

CASES = [*COCO, *YOLO, *VOC, *CSV, *OTHERS, *PLACES]


def seen(case: Case, folder: Path) -> tuple[str, str]:
    """What a user sees: "refused" or "read", and the line."""
    place = case.make(folder)
    here = os.getcwd()
    os.chdir(folder)
    try:
        part = next(iter(open_place(place or ".").splits.values()))
        samples = AnnotatedImages(part)
        for row in range(len(samples)):
            samples[row]
    except DataError as error:
        return "refused", _plain(str(error), folder)
    finally:
        os.chdir(here)
    return "read", _plain(samples.report.summary(), folder)


def _plain(text: str, folder: Path) -> str:
    text = text.replace(f"{folder}/", "").replace(str(folder), ".")
    text = re.sub(r"datasets-[\w-]+|0x[0-9a-f]+", "...", text)
    return text if len(text) <= 230 else text[:230] + "..."


def row_of(case: Case, folder: Path) -> str:
    """The row of a case, made in an empty folder."""
    how, line = seen(case, folder)
    cell = line.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
    return f"| {case.format} | {case.what} | {how} | {cell} |"


def page() -> str:
    """The table."""
    lines = [
        "# Odd and hostile data",
        "",
        f"What a user sees of {len(CASES)} inputs, each in one line; `python docs/hostile.py`",
        "writes this page, and a test compares. What is refused ends a command with code 2;",
        "what is read says what was left out or changed.",
        "",
        "| format | what is odd | | line |",
        "|---|---|---|---|",
    ]
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(row_of(case, Path(os.path.realpath(folder))))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the page, or say that nothing changed."""
    text = page()
    changed = not TARGET.is_file() or TARGET.read_text(encoding="utf-8") != text
    TARGET.write_text(text, encoding="utf-8")
    print(f"{TARGET.name}: {'written' if changed else 'as it was'}", file=sys.stderr)


if __name__ == "__main__":
    main()
