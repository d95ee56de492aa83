"""Every format gives the same images and boxes; what is odd in them is said or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from detrelay.core.data.annotations import Annotations
from detrelay.core.data.places import Found, open_place
from detrelay.core.errors import DataError
from factories_formats import TRUTH, WRITERS, write_format

Rows = dict[str, list[tuple[str, float, float, float, float]]]


def rows_of(found: Found) -> Rows:
    """Name and corners of the boxes of each image, in the order of the places."""
    rows: Rows = {}
    for part in found.splits.values():
        assert part.images.missing() == []
        for image in range(len(part)):
            boxes = part.boxes_xywh[part.box_image == image]
            labels = part.box_class[part.box_image == image]
            rows[Path(part.images.name(image)).stem] = sorted(
                (part.categories[label].name, x, y, x + w, y + h)
                for label, (x, y, w, h) in zip(labels.tolist(), boxes.tolist(), strict=True)
            )
            height, width = part.sizes[image]
            assert (width, height) == TRUTH[Path(part.images.name(image)).stem][0]
    return rows


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_boxes(name: str, tmp_path: Path) -> None:
    place, format_name = write_format(name, tmp_path)
    found = open_place(place)
    assert found.format == format_name
    rows = rows_of(found)
    for stem, (_, boxes) in TRUTH.items():
        if not boxes and stem not in rows:  # formats that cannot name an image without objects
            assert name in ("csv_tensorflow", "csv_openimages")
            continue
        assert len(rows[stem]) == len(boxes)
        for ours, truth in zip(rows[stem], sorted(boxes), strict=True):
            assert ours[0] == truth[0]
            assert ours[1:] == pytest.approx(truth[1:], abs=0.01)
    ids = [number for part in found.splits.values() for number in part.image_ids.tolist()]
    boxes = [number for part in found.splits.values() for number in part.box_ids.tolist()]
    assert len(set(ids)) == len(ids)
    assert len(set(boxes)) == len(boxes)
    assert len({part.categories for part in found.splits.values()}) == 1
    summary = found.summary()
    assert place.partition(":")[2] in summary or place in summary
    assert "5 boxes, 3 categories" in summary


def only(place: Path | str, **options: Any) -> Annotations:
    (part,) = open_place(str(place), **options).splits.values()
    return part


def picture(path: Path, size: tuple[int, int] = (64, 48)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, 60)).save(path)
    return path


def yolo(folder: Path, labels: str, yaml: str | None = None) -> Path:
    picture(folder / "images" / "a.jpg")
    (folder / "labels").mkdir()
    (folder / "labels" / "a.txt").write_bytes(labels.encode())
    text = "train: images\nnames: ['cat', 'dog', 'cow']\n" if yaml is None else yaml
    (folder / "data.yaml").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("labels", "count", "note"),
    [
        ("0 0.5 0.5 0.2 0.2\r\n1\t0.5\t0.5\t0.1\t0.1\r\n\r\n", 2, None),
        ("0.0 0.5 0.5 0.2 0.2", 1, None),
        ("dog 0.5 0.5 0.2 0.2", 1, None),
        ("0 0.5 0.5 0.2 0.2\n0 0.5 0.5 0.2 0.2\n", 1, "1 rows given twice left out"),
        ("0 1.0004 0.5 0.2 0.2", 1, None),
        ("0 -0.01 0.5 0.2 0.2", 1, None),
        ("0 0.1 0.1 0.3 0.1 0.2 0.4", 1, "1 polygons or rotated boxes became"),
        ("\ufeff0 0.5 0.5 0.2 0.2", 1, None),
    ],
)
def test_yolo_rows(tmp_path: Path, labels: str, count: int, note: str | None) -> None:
    part = only(yolo(tmp_path, labels))
    assert len(part.box_ids) == count
    assert (not part.notes) if note is None else (note in part.notes[0])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("0 32 24 12.8 9.6", "line 1: expected fractions of the image .* found 32"),
        ("0 0.5 0.5 0.2 0.2\n7 0.5 0.5 0.2 0.2", r"line 2: class '7' is not among the 3 names"),
        ("0.5 0.5 0.5 0.2 0.2", "class '0.5' is not among"),
        ("horse 0.5 0.5 0.2 0.2", "class 'horse' is not among"),
        ("-1 0.5 0.5 0.2 0.2", "class '-1' is not among"),
        ("nan 0.5 0.5 0.2 0.2", "class 'nan' is not among"),
        ("0 0.5 0.5 0.2 0.2 0.9", "line 1: .* detection with its confidence"),
        ("0 0.5 0.5 0.2", "line 1: expected a class and 4 numbers .* found 3"),
        ("0,0.5,0.5,0.2,0.2", "line 1: class '0,0.5"),
        ("0 0.5 0.5 0.2 nan", "line 1: expected a number up to 1e.09, found 'nan'"),
        ("0 0.5 0.5 0.2 1e400", "expected a number"),
    ],
)
def test_yolo_rows_that_are_refused(tmp_path: Path, labels: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_place(str(yolo(tmp_path, labels)))


@pytest.mark.parametrize(
    ("yaml", "names"),
    [
        ("train: images\nnames: {0: cat, 2: dog}", [(0, "cat"), (2, "dog")]),
        ('train: images\nnames: {"0": cat, "1": dog}', [(0, "cat"), (1, "dog")]),
        ("train: images\nnames: [0, 1, yes]", [(0, "0"), (1, "1"), (2, "yes")]),
        ("train: [images, images]\nnames: [cat]\nval:\ntest: ../test/images", [(0, "cat")]),
        ("path: /content/x\ntrain: ../images\nnames: [cat]", [(0, "cat")]),
        ("train: images\nnc: 4\nnames: [cat]", [(0, "cat")]),
    ],
)
def test_yaml_of_yolo(tmp_path: Path, yaml: str, names: list[tuple[int, str]]) -> None:
    part = only(yolo(tmp_path, "0 0.5 0.5 0.2 0.2", yaml))
    assert [(category.id, category.name) for category in part.categories] == names
    assert len(part) == 1
    told = {"nc: 4": "1 names in data.yaml, where it says there are 4", "[images": "named twice"}
    for sign, words in told.items():
        if sign in yaml:
            assert words in part.notes[0]


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("train: images", "names must be a list .* it is missing"),
        ("train: images\nnames: 3", "names must be a list .* found '3'"),
        ("train: images\nnames: {a: cat}", "names must be numbered from 0"),
        ("train: images\nnames: [cat, cat]", "two categories have the same name"),
        ("names: [cat]", "names no images; expected the keys train and val"),
        ("train: {a: b}\nnames: [cat]", "train must be a path or a list of paths"),
        ("path: /content/x\ntrain: pictures\nnames: [cat]", "train is not there; tried .*content"),
        ("train:\timages\n\tval: images", "cannot read .*data.yaml as YAML"),
        ("[" * 3000, "cannot read .*data.yaml as YAML"),
        ("- a\n- b", "expected keys such as train"),
        ("train: labels\nnames: [cat]", "labels: no images in this folder"),
    ],
)
def test_yaml_of_yolo_that_is_refused(tmp_path: Path, yaml: str, message: str) -> None:
    yolo(tmp_path, "0 0.5 0.5 0.2 0.2", yaml)
    with pytest.raises(DataError, match=message):
        open_place(str(tmp_path / "data.yaml"))


def test_an_empty_list_of_names_is_refused(tmp_path: Path) -> None:
    place, _ = write_format("yolo_darknet", tmp_path)
    (tmp_path / "obj.names").write_text("\n")
    with pytest.raises(DataError, match=r"obj\.names: lists no category names"):
        open_place(place)


def test_a_list_may_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    picture(tmp_path / "secret.jpg")
    place = yolo(tmp_path / "set", "", "train: list.txt\nnames: [cat]")
    (place / "list.txt").write_text("../secret.jpg\n/home/me/images/a.jpg\n")
    with pytest.raises(DataError, match=r"1 of 2 images that it names are not there: \.\./secret"):
        open_place(str(place))


def voc(folder: Path, objects: str, size: str = "", name: str = "a.jpg", head: str = "") -> Path:
    picture(folder / "a.jpg")
    size = size or "<size><width>64</width><height>48</height><depth/></size>"
    text = f"{head}<annotation><filename>{name}</filename>{size}{objects}</annotation>"
    (folder / "a.xml").write_bytes(text.encode())
    return folder


def voc_object(*corners: object, name: str = "cat", more: str = "") -> str:
    keys = ("xmin", "ymin", "xmax", "ymax")
    box = "".join(f"<{key}>{v}</{key}>" for key, v in zip(keys, corners, strict=True))
    return f"<object><name>{name}</name>{more}<bndbox>{box}</bndbox></object>"


@pytest.mark.parametrize(
    ("options", "box", "note"),
    [
        ({"objects": voc_object(8, 6, 28, 22)}, [8, 6, 20, 16], None),
        ({"objects": voc_object("8.0", 0, "28.5", 22)}, [8, 0, 20.5, 22], None),
        ({"objects": voc_object(28, 6, 8, 22)}, [28, 6, -20, 16], None),  # dropped later, counted
        ({"objects": voc_object(8, 6, 28, 22), "size": " "}, [8, 6, 20, 16], "give no size"),
        (
            {
                "objects": voc_object(8, 6, 28, 22),
                "size": "<size><width>0</width><height>0</height></size>",
            },
            [8, 6, 20, 16],
            "give no size",
        ),
        ({"objects": voc_object(8, 6, 28, 22), "name": "b.jpg"}, [8, 6, 20, 16], "name another"),
        ({"objects": voc_object(8, 6, 28, 22), "name": "a"}, [8, 6, 20, 16], None),
        ({"objects": voc_object(8, 6, 28, 22, name=" cat\n")}, [8, 6, 20, 16], None),
        (
            {"objects": voc_object(8, 6, 28, 22, more="<difficult>1</difficult>")},
            [8, 6, 20, 16],
            "1 boxes are marked difficult",
        ),
        ({"objects": voc_object(8, 6, 28, 22), "head": "\ufeff"}, [8, 6, 20, 16], None),
    ],
)
def test_voc_files(
    tmp_path: Path, options: dict[str, str], box: list[float], note: str | None
) -> None:
    part = only(voc(tmp_path, **options))
    assert part.boxes_xywh.tolist() == [box]
    assert part.categories[0].name == "cat"
    assert part.sizes.tolist() == [[48, 64]]
    assert (not part.notes) if note is None else (note in part.notes[0])


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ("<object>", "a.xml is no XML, or it is damaged"),
        (voc_object(8, "six", 28, 22), "a.xml object 1 <ymin>: expected a number .* 'six'"),
        (voc_object(8, "inf", 28, 22), "object 1 <ymin>: expected a number"),
        (voc_object(8, "", 28, 22), "object 1 <ymin>: expected a number .* ''"),
        (voc_object(8, 6, 28, 22, name=""), "object 1: has no <name>"),
        ("", "no box and no list of categories"),
    ],
)
def test_voc_files_that_are_refused(tmp_path: Path, objects: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_place(str(voc(tmp_path, objects)))


def test_xml_with_entities_is_refused(tmp_path: Path) -> None:
    bomb = '<!DOCTYPE a [<!ENTITY b "bbbb"><!ENTITY c "&b;&b;">]>'
    for text in (f"{bomb}<annotation>&c;</annotation>", f"{bomb}<annotations>&c;</annotations>"):
        picture(tmp_path / "a.jpg")
        for encoding in ("utf-8", "utf-16"):
            (tmp_path / "a.xml").write_bytes(text.encode(encoding))
            format_name = "voc" if "<annotation>" in text else "cvat"
            place = tmp_path if format_name == "voc" else tmp_path / "a.xml"
            with pytest.raises(DataError, match="defines XML entities"):
                open_place(f"{format_name}:{place}")


def table(folder: Path, text: str) -> Path:
    picture(folder / "images" / "a.jpg")
    picture(folder / "images" / "b c.jpg")
    (folder / "boxes.csv").write_bytes(text.encode())
    return folder / "boxes.csv"


HEAD = "filename,width,height,class,xmin,ymin,xmax,ymax\n"


@pytest.mark.parametrize(
    "text",
    [
        HEAD + "a.jpg,64,48,cat,8,6,28,22\n",
        "\ufeff" + HEAD + "a.jpg,64,48,cat,8,6,28,22\r\n",
        (HEAD + "a.jpg,64,48,cat,8,6,28,22").replace(",", ";"),
        ",image_path,xmin,xmax,ymin,ymax,label\n0,a.jpg,8,28,6,22,cat\n",
        '"image","xmin","ymin","xmax","ymax","label"\n"a.jpg","8.0","6.0","28.0","22.0","cat"\n',
        'image;xmin;ymin;xmax;ymax;label\na.jpg;"8,0";6;28;22;cat\n',
        "images/a.jpg,8,6,28,22,cat\n",
        r"C:\data\images\a.jpg,8,6,28,22,cat",
    ],
)
def test_dialects_of_csv(tmp_path: Path, text: str) -> None:
    part = only(table(tmp_path, text))
    assert part.boxes_xywh.tolist() == [[8, 6, 20, 16]]
    assert part.categories[0].name == "cat"
    assert "1 images beside them have no row" not in part.notes or len(part) == 1


def test_images_without_objects_in_csv(tmp_path: Path) -> None:
    text = HEAD + "a.jpg,64,48,cat,8,6,28,22\nb%20c.jpg,64,48,cat,0,0,0,0\n"
    part = only(table(tmp_path, text))
    assert [part.images.name(row) for row in range(2)] == ["images/a.jpg", "images/b c.jpg"]
    assert part.box_image.tolist() == [0]
    assert "rows of zeros taken as images without objects" in part.notes[0]
    part = only(table(tmp_path, "images/a.jpg,8,6,28,22,cat\nimages/b c.jpg,,,,,\n"))
    assert (len(part), len(part.box_ids)) == (2, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg,64,48,cat,8,6,28,22\n", "its first line must name the columns"),
        (HEAD + "a.jpg,64,48,cat,8\n", "boxes.csv line 2: expected 8 columns, found 5"),
        (HEAD + "a.jpg,64,48,cat,8,six,28,22\n", "line 2: expected a number .*'six'"),
        (HEAD + "a.jpg,64,48,,8,6,28,22\n", "line 2: the box has no class"),
        (HEAD + "z.jpg,64,48,cat,8,6,28,22\n", r"1 of its images are not in .*: z\.jpg"),
        ("filename,class,xmin,ymin,xmax,ymax,score\n", "detections are no truth"),
        ("", "is empty"),
        (HEAD, "no images found"),
        (HEAD + 'a.jpg,64,48,"cat\0,8,6,28,22\n', "boxes.csv"),
    ],
)
def test_csv_that_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_place(str(table(tmp_path, text)))


def labelme(folder: Path, **shape: Any) -> Path:
    picture(folder / "a.jpg")
    shape = {"label": "cat", "points": [[8, 6], [28, 22]], "shape_type": "rectangle"} | shape
    content = {"shapes": [shape], "imagePath": r"..\pictures\a.jpg"}
    (folder / "a.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ({}, [8, 6, 20, 16]),
        ({"points": [[28, 22], [8, 6]]}, [8, 6, 20, 16]),
        ({"points": [[8, 6], [28, 6], [28, 22], [8, 22]]}, [8, 6, 20, 16]),
        ({"points": [[8, 6], [28, 14], [9, 22]], "shape_type": "polygon"}, [8, 6, 20, 16]),
        ({"points": [[8, 6], [28, 14], [9, 22]], "shape_type": None}, [8, 6, 20, 16]),
        ({"points": [[18, 14], [18, 22]], "shape_type": "circle"}, [10, 6, 16, 16]),
        ({"points": [[-4, 6], [28, 22]]}, [-4, 6, 32, 16]),  # clipped later, counted
    ],
)
def test_shapes_of_labelme(tmp_path: Path, shape: dict[str, Any], box: list[float]) -> None:
    assert only(labelme(tmp_path, **shape)).boxes_xywh.tolist() == [box]


def test_shapes_of_labelme_without_a_box(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no box and no list of categories"):
        open_place(str(labelme(tmp_path, points=[[8, 6]], shape_type="point")))
    for points in ("x", [[1]], [[1, "a"]], [[1, 2, 3]], None, [[1e400, 2], [3, 4]]):
        with pytest.raises(DataError, match=r"a\.json shapes\[0\]"):
            open_place(str(labelme(tmp_path, points=points)))


def cvat(folder: Path, shapes: str) -> Path:
    picture(folder / "a.jpg")
    (folder / "annotations.xml").write_text(
        f'<annotations><image name="a.jpg" width="64" height="48">{shapes}</image></annotations>'
    )
    return folder


def test_rotated_boxes_of_cvat_become_their_extent(tmp_path: Path) -> None:
    box = '<box label="cat" xtl="20" ytl="10" xbr="40" ybr="20" rotation="90"/>'
    part = only(cvat(tmp_path, box))
    assert part.boxes_xywh.tolist() == [pytest.approx([25, 5, 10, 20])]
    assert part.notes == ("1 rotated boxes became their enclosing boxes",)
    part = only(cvat(tmp_path, '<polygon label="cat" points="8,6;28,7;9,22"/><points label="a"/>'))
    assert part.boxes_xywh.tolist() == [[8, 6, 20, 16]]
    assert part.notes[1] == "1 shapes of kind points have no box and are left out"


def test_cvat_for_video_is_refused(tmp_path: Path) -> None:
    cvat(tmp_path, "")
    (tmp_path / "annotations.xml").write_text("<annotations><track/></annotations>")
    with pytest.raises(DataError, match="export for video"):
        open_place(str(tmp_path))


def label_studio(folder: Path, *annotations: Any, **task: Any) -> Path:
    picture(folder / "images" / "0a1b2c3d-a.jpg", (200, 100))
    link = "/data/upload/1/0a1b2c3d-a.jpg"
    content = [{"id": 1, "data": {"image": link}, "annotations": list(annotations)} | task]
    (folder / "export.json").write_text(json.dumps(content))
    return folder / "export.json"


def rectangle(**value: Any) -> dict[str, Any]:
    box = {"x": 10, "y": 20, "width": 30, "height": 40, "rectanglelabels": ["cat"]}
    return {"type": "rectanglelabels", "value": box | value}


def test_label_studio_counts_in_percent(tmp_path: Path) -> None:
    done = {"result": [rectangle()]}
    assert only(label_studio(tmp_path, done)).boxes_xywh.tolist() == [[20, 20, 60, 40]]
    # a quarter turn about the upper left corner, in pixels
    turned = {"result": [rectangle(rotation=90)]}
    part = only(label_studio(tmp_path, turned))
    assert part.boxes_xywh.tolist() == [pytest.approx([-20, 20, 40, 60])]
    part = only(label_studio(tmp_path, {"was_cancelled": True, "result": []}, done, done))
    assert len(part.box_ids) == 1
    assert part.notes == (
        "1 cancelled annotations left out",
        "1 tasks with several annotations; the first of each is taken",
    )


@pytest.mark.parametrize(
    ("annotations", "task", "message"),
    [
        ([], {"predictions": [{"result": [rectangle()]}]}, "no images found"),
        ([{"result": None}], {}, "task 1: result must be a list"),
        ([{"result": [rectangle(x=None)]}], {}, "task 1 x: expected a number"),
        ([{"result": [{"type": "rectanglelabels"}]}], {}, "task 1: a result has no value"),
        ([{"result": []}], {"data": {}}, "task 1: data names no image"),
        ([{"result": []}], {"data": {"image": "x/y.jpg"}}, r"1 images are not in .*: y\.jpg"),
        ([3], {}, "annotations must be a list of objects"),
    ],
)
def test_label_studio_that_is_refused(
    tmp_path: Path, annotations: list[Any], task: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        open_place(str(label_studio(tmp_path, *annotations, **task)))


def jsonl(folder: Path, *rows: dict[str, Any]) -> Path:
    picture(folder / "a.jpg")
    lines = [json.dumps({"file_name": "a.jpg"} | row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"objects": {"bbox": [[8, 6, 20, 16], [1, 2, 3, 4]], "category": [0]}}, "2 boxes, but 1"),
        ({"objects": {"bbox": [[8, 6, 20]], "category": [0]}}, "row 0: a bbox must be four"),
        ({"objects": {"box": [[8, 6, 20, 1]]}}, "row 0: objects have no 'category'"),
        ({"bbox": [[8, 6, 20, 16]]}, "no column 'objects'; its columns are image, bbox"),
        ({"objects": {"bbox": [[8, 6, 20, 16]], "category": [-1]}}, "category -1 is below 0"),
        ({"objects": [3]}, "objects must be a list of tables"),
    ],
)
def test_hub_rows_that_are_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_place(str(jsonl(tmp_path, row)))


def test_hub_boxes_may_be_corners_and_objects_null(tmp_path: Path) -> None:
    picture(tmp_path / "b.jpg")
    place = jsonl(
        tmp_path,
        {"objects": {"bbox": [[8, 6, 28, 22]], "category": [4]}},
        {"file_name": "b.jpg", "objects": None},
    )
    part = only(f"hub_xyxy:{place}")
    assert part.boxes_xywh.tolist() == [[8, 6, 20, 16]]
    assert [(category.id, category.name) for category in part.categories] == [(4, "4")]
    assert len(part) == 2
    assert "objects are null" in part.notes[0]
