"""File names of images as tools write them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from detrelay.core.data.coco import CocoDataset
from detrelay.core.data.image_paths import image_folders
from detrelay.core.data.images import ImageFiles
from detrelay.core.errors import DataError
from factories_data import coco_content, noise_image, write_coco


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An annotation file, next to `images/a.png` and `images/sub/b.png`; `../secret.png`."""
    images = tmp_path / "data" / "set" / "images"
    (images / "sub").mkdir(parents=True)
    for path in (images / "a.png", images / "sub" / "b.png", tmp_path / "data" / "secret.png"):
        noise_image(8, 8).save(path)
    return images.parent / "instances.json"


def files(place: Path, *names: str, images: Path | None = None, **options: bool) -> ImageFiles:
    return ImageFiles(image_folders(place, images), names, str(place), **options)


@pytest.mark.parametrize("images", [None, "images"])
@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a.png", "a.png"),
        ("./a.png", "a.png"),
        ("./images/a.png", "a.png"),
        ("images/a.png", "a.png"),
        ("images\\a.png", "a.png"),
        (".\\images\\sub\\b.png", "sub/b.png"),
        ("sub\\b.png", "sub/b.png"),
        ("sub/../a.png", "a.png"),
        ("set/images/a.png", "a.png"),
        ("data\\set\\images\\sub\\b.png", "sub/b.png"),
        ("../images/a.png", "a.png"),
        ("ABSOLUTE/a.png", "a.png"),
    ],
)
def test_names_are_found_as_tools_write_them(
    place: Path, images: str | None, name: str, found: str
) -> None:
    folder = place.parent / "images"
    name = name.replace("ABSOLUTE", str(folder))
    found_files = files(place, name, images=None if images is None else place.parent / images)
    assert found_files.missing() == []
    assert found_files.open(0).resolve() == folder / found


def test_a_backslash_may_be_part_of_a_name(place: Path) -> None:
    odd = place.parent / "images" / "sub\\b.png"
    noise_image(8, 8).save(odd)
    assert files(place, "sub\\b.png").open(0) == odd


@pytest.mark.parametrize(
    "name",
    [
        "../../secret.png",
        "..\\..\\secret.png",
        "../secret.png",
        "ROOT/data/secret.png",
        "C:\\a.png",
    ],
)
def test_names_that_lead_out_of_the_folder_are_refused(place: Path, name: str) -> None:
    root = place.parents[2]
    name = name.replace("ROOT", str(root))
    with pytest.raises(DataError, match=r"1 of 2 file names of .* lead out of the image folder"):
        files(place, "a.png", name, images=place.parent / "images")


def test_names_that_lead_out_may_be_allowed(place: Path) -> None:
    secret = place.parents[1] / "secret.png"
    names = ("../../secret.png", "..\\..\\secret.png", str(secret), "a.png", "C:\\a.png")
    found = files(place, *names, images=place.parent / "images", allow_outside=True)
    assert found.missing() == ["C:\\a.png"]
    paths = [found.open(index).resolve() for index in range(4)]
    assert paths == [secret, secret, secret, place.parent / "images" / "a.png"]


def test_advice_names_what_is_there(place: Path) -> None:
    image = place.parent / "images" / "a.png"
    found = files(place, "other/a.png", "none.png")
    assert found.missing() == ["other/a.png", "none.png"]
    assert found.advice("other/a.png") == f"{image} is there: write file_name as 'a.png'"
    assert "name the folder that holds the images" in found.advice("none.png")
    with pytest.raises(DataError, match=r"/elsewhere/a.png; .*is there: write file_name as 'a"):
        files(place, "/elsewhere/a.png")


def test_a_data_set_reads_what_was_found(tmp_path: Path) -> None:
    plain = CocoDataset(write_coco(tmp_path))[0].image
    content = coco_content()
    content["images"][0]["file_name"] = "images\\a.png"
    content["images"][1]["file_name"] = "./images/b.png"
    path = write_coco(tmp_path, content, images=False)
    data = CocoDataset(path)
    assert torch.equal(data[0].image, plain)
    assert data.file_name(0) == "images\\a.png"
    noise_image(20, 20).save(tmp_path.parent / "c.png")
    content["images"][2]["file_name"] = "../c.png"
    path = write_coco(tmp_path, content, images=False)
    with pytest.raises(DataError, match=r"\.\./c\.png.*allow_outside"):
        CocoDataset(path)
    assert CocoDataset(path, allow_outside=True)[2].image.shape == (3, 20, 20)
