"""COCO detection files as samples: RGB image, boxes in pixels, class indices 0..K-1.

What a file says is checked once, when the data set is made; every complaint is one `DataError`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from detrelay.core.errors import DataError, one_line

_IMAGE_KEYS = ("id", "file_name", "width", "height")
_ANNOTATION_KEYS = ("id", "image_id", "category_id", "bbox")
_CATEGORY_KEYS = ("id", "name")
# Beyond any image, and small enough that float64 sums of two such numbers stay exact to 1e-6.
_LARGEST_COORDINATE = 1e9
_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class Category:
    """A class of objects.

    Attributes:
        id: the data set's own category id; ids may have gaps and need not start at 0 or 1.
        name: what the category is called.
    """

    id: int
    name: str


@dataclass(frozen=True, slots=True)
class Sample:
    """An image with its objects.

    Attributes:
        image: uint8 [3, H, W], RGB.
        boxes_xyxy: float32 [n, 4], corners in pixels of `image`. n = 0 is legal.
        class_labels: int64 [n], class indices 0..K-1.
        image_id: the data set's own image id.
        original_size: (height, width) of the image as stored, pixels; transforms keep it.
    """

    image: Tensor
    boxes_xyxy: Tensor
    class_labels: Tensor
    image_id: int
    original_size: tuple[int, int]


@dataclass(frozen=True, slots=True)
class DataReport:
    """What a data set holds and what was left out of its samples.

    Attributes:
        images: number of images.
        boxes: boxes that samples hold.
        images_without_boxes: images whose sample holds no box.
        crowd_boxes: boxes around crowds, which only the evaluator sees.
        dropped_boxes: boxes left out of the samples, by reason.
        clipped_boxes: boxes cut to their image; they count among `boxes`.
        left_out_images: images without any annotation that were asked to be left out.
    """

    images: int
    boxes: int
    images_without_boxes: int
    crowd_boxes: int
    dropped_boxes: Mapping[str, int]
    clipped_boxes: int
    left_out_images: int = 0

    def summary(self) -> str:
        """The report as one line."""
        parts = [
            f"{self.images} images ({self.images_without_boxes} without boxes)",
            f"{self.boxes} boxes",
        ]
        if self.crowd_boxes:
            parts.append(f"{self.crowd_boxes} crowd boxes kept for evaluation only")
        parts += [f"{count} boxes dropped: {why}" for why, count in self.dropped_boxes.items()]
        if self.clipped_boxes:
            parts.append(f"{self.clipped_boxes} boxes clipped to their image")
        if self.left_out_images:
            parts.append(f"{self.left_out_images} images without annotations left out")
        return ", ".join(parts)


class CocoDataset(Dataset[Sample]):
    """Images and boxes of a COCO detection json.

    Class index c is the position of the category in `categories`, which is sorted by original id.
    The image is decoded to 8-bit RGB: grey is repeated, transparency is laid over white. Where the
    EXIF tag turns the image, the json decides: turned if that gives the json's width and height,
    as stored if only that does.

    Args:
        annotations: the json file.
        images: folder that `file_name` starts from; None means the folder `images` beside the
            json where there is one, else the json's own folder.
        strict: refuse boxes that reach out of their image or have no area, which otherwise are
            clipped or dropped and counted in `report`.
        keep_empty: hold images without any annotation too, crowds counting as one.

    Attributes:
        categories: categories by class index.
        ground_truth: images, annotations (crowds and dropped boxes too) and categories as in the
            file, with `area` = width x height and `iscrowd` = 0 where missing. For the evaluator.
        image_ids: original image ids by index.
        report: counts.

    Raises:
        DataError: the json cannot be read or used, an image file is missing, or, with `strict`,
            a box is not inside its image.
    """

    def __init__(
        self,
        annotations: Path,
        images: Path | None = None,
        *,
        strict: bool = False,
        keep_empty: bool = True,
    ) -> None:
        annotations = Path(annotations)
        content = read_annotations(annotations)
        self._file = annotations
        self._folder = _image_folder(annotations, images)
        self._images: list[dict[str, Any]] = content["images"]
        if not keep_empty:
            self._images = _annotated(annotations, content)
        self._left_out = len(content["images"]) - len(self._images)
        self.categories = tuple(
            Category(category["id"], category["name"])
            for category in sorted(content["categories"], key=lambda category: category["id"])
        )
        self.image_ids: list[int] = [image["id"] for image in self._images]
        self.ground_truth: dict[str, Any] = {
            "images": self._images,
            "annotations": [_with_defaults(entry) for entry in content["annotations"]],
            "categories": content["categories"],
        }
        self._check_files_exist()
        self._fill_boxes(strict)

    def __len__(self) -> int:
        return len(self._images)

    def file_name(self, index: int) -> str:
        """Name of an image file as the json gives it."""
        return str(self._images[index]["file_name"])

    def __getitem__(self, index: int) -> Sample:
        """Decode image `index` (0..len - 1).

        Raises:
            DataError: the image file is damaged or its size is not that of the json.
        """
        entry = self._images[index]
        height, width = entry["height"], entry["width"]
        image = _decode(self._folder / entry["file_name"], height, width, self._file)
        rows = slice(self._starts[index], self._starts[index + 1])
        return Sample(
            image=image,
            boxes_xyxy=self._boxes[rows].clone(),
            class_labels=self._labels[rows].clone(),
            image_id=entry["id"],
            original_size=(height, width),
        )

    def _check_files_exist(self) -> None:
        missing = [name for name in map(self.file_name, range(len(self))) if not self._has(name)]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(self)} images of {self._file} are missing in folder "
                f"{self._folder}: {_some(missing)}; name the folder that holds the images"
            )

    def _has(self, name: str) -> bool:
        return os.path.isfile(self._folder / name)  # unlike Path.is_file, takes any odd name

    def _fill_boxes(self, strict: bool) -> None:
        """Sort the boxes by image, clip them, and leave out what cannot be learned."""
        position = {image_id: index for index, image_id in enumerate(self.image_ids)}
        class_of = {category.id: index for index, category in enumerate(self.categories)}
        objects = [entry for entry in self.ground_truth["annotations"] if not entry["iscrowd"]]
        objects.sort(key=lambda entry: position[entry["image_id"]])
        image = torch.tensor([position[entry["image_id"]] for entry in objects], dtype=torch.int64)
        labels = torch.tensor([class_of[entry["category_id"]] for entry in objects])
        # float64 first: x + width would lose tenths of a pixel on huge images in float32
        corner, size = torch.tensor(
            [entry["bbox"] for entry in objects], dtype=torch.float64
        ).reshape(-1, 2, 2).unbind(1)  # fmt: skip
        limits = torch.tensor(
            [[entry["width"], entry["height"]] for entry in self._images], dtype=torch.float64
        ).reshape(-1, 2)[image]  # [n, 2]
        low, high = corner, corner + size
        clipped_low = torch.minimum(low.clamp(min=0), limits)
        clipped_high = torch.minimum(high.clamp(min=0), limits)
        boxes = torch.cat([clipped_low, clipped_high], dim=1).float()
        # Judged after rounding to float32, so that no sample ever holds a box without area
        flat = (size <= 0).any(1)
        outside = ~flat & (boxes[:, 2:] <= boxes[:, :2]).any(1)
        keep = ~(flat | outside)
        clipped = keep & ((clipped_low != low) | (clipped_high != high)).any(1)
        faults = {"zero area": flat, "outside the image": outside, "partly outside": clipped}
        if strict:
            self._refuse_faults(faults, objects)
        counts = torch.bincount(image[keep], minlength=len(self))
        self._starts: list[int] = [0, *counts.cumsum(0).tolist()]
        self._boxes, self._labels = boxes[keep], labels.to(torch.int64)[keep]
        dropped = {"zero area": int(flat.sum()), "outside the image": int(outside.sum())}
        self.report = DataReport(
            images=len(self),
            boxes=int(keep.sum()),
            images_without_boxes=int((counts == 0).sum()),
            crowd_boxes=len(self.ground_truth["annotations"]) - len(objects),
            dropped_boxes={why: count for why, count in dropped.items() if count},
            clipped_boxes=int(clipped.sum()),
            left_out_images=self._left_out,
        )

    def _refuse_faults(
        self, faults: Mapping[str, Tensor], objects: Sequence[Mapping[str, Any]]
    ) -> None:
        for why, found in faults.items():
            if not found.any():
                continue
            first = objects[int(found.nonzero()[0])]
            raise DataError(
                f"annotation {first['id']} (image {first['image_id']}) of {self._file}: box "
                f"{first['bbox']} is {why}; {int(found.sum())} such boxes; correct them, or do "
                f"without strict to drop or clip them"
            )


def read_annotations(path: Path, *, with_files: bool = True) -> dict[str, Any]:
    """The content of a COCO detection json: `images`, `annotations` and `categories`.

    Args:
        path: the json file.
        with_files: images must have `file_name`, `width` and `height` too, as loading them needs.

    Raises:
        DataError: the file cannot be read, or does not hold well-formed lists whose ids are unique
            and point to each other.
    """
    content = _read_json(path)
    _check_format(path, content, with_files)
    return content


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            content = json.load(file)
    except FileNotFoundError:
        raise DataError(f"no annotation file {path}; expected a COCO detection json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {path} as json: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise DataError(
            f"{path} is not a COCO detection json: expected an object with the keys images, "
            f"annotations and categories, found a {type(content).__name__}"
        )
    return content


def _check_format(path: Path, content: Mapping[str, Any], with_files: bool) -> None:
    """Refuse anything but well-formed lists whose ids are unique and point to each other."""
    image_keys = _IMAGE_KEYS if with_files else ("id",)
    keys = {"images": image_keys, "annotations": _ANNOTATION_KEYS, "categories": _CATEGORY_KEYS}
    for part, required in keys.items():
        if not isinstance(content.get(part), list):
            raise DataError(
                f"{path} is not a COCO detection json: key {part!r} must hold a list, "
                + (f"found {type(content[part]).__name__}" if part in content else "it is missing")
            )
        _check_entries(path, part, content[part], required)
        _check_unique(path, part, "id", [entry["id"] for entry in content[part]])
    if not content["images"] or not content["categories"]:
        empty = "categories" if content["images"] else "images"
        raise DataError(f"{path} lists no {empty}: there is nothing to use")
    names = [category["name"] for category in content["categories"]]
    _check_unique(path, "categories", "name", names)
    if with_files:
        _check_images(path, content["images"])
    _check_annotations(path, content)


def _check_entries(path: Path, part: str, entries: Iterable[Any], required: Sequence[str]) -> None:
    for row, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise DataError(
                f"{path}: {part}[{row}] must be an object, found {type(entry).__name__}"
            )
        for key in required:
            if key not in entry:
                raise DataError(
                    f"{path} is not a COCO detection json: {part}[{row}] has no {key!r}"
                )
            wants_text = key in ("file_name", "name")
            if key != "bbox" and not (
                isinstance(entry[key], str) if wants_text else _is_integer(entry[key])
            ):
                raise DataError(
                    f"{path}: {key!r} of {part}[{row}] must be "
                    f"{'text' if wants_text else 'a whole number'}, found {entry[key]!r}"
                )


def _check_unique(path: Path, part: str, key: str, values: Sequence[int | str]) -> None:
    counts = Counter(values)
    if len(counts) < len(values):
        repeated = [repr(value) for value, count in counts.items() if count > 1]
        raise DataError(
            f"{path}: {part} must have a {key!r} each; given more than once: {_some(repeated)}"
        )


def _check_images(path: Path, images: Sequence[Mapping[str, Any]]) -> None:
    for image in images:
        if not (image["width"] > 0 and image["height"] > 0):
            raise DataError(
                f"{path}: image {image['id']} must have a positive width and height, found "
                f"{image['width']} x {image['height']}"
            )


def _check_annotations(path: Path, content: Mapping[str, Any]) -> None:
    known = {
        "image_id": {image["id"] for image in content["images"]},
        "category_id": {category["id"] for category in content["categories"]},
    }
    for entry in content["annotations"]:
        for key, ids in known.items():
            if entry[key] not in ids:
                raise DataError(
                    f"{path}: annotation {entry['id']} names {key} {entry[key]}, which the file "
                    f"does not list"
                )
        box = entry["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and all(map(_is_coordinate, box))):
            raise DataError(
                f"{path}: bbox of annotation {entry['id']} must be four finite numbers "
                f"[x, y, width, height], found {box!r}"
            )
        if entry.get("iscrowd", 0) not in (0, 1):
            raise DataError(
                f"{path}: iscrowd of annotation {entry['id']} must be 0 or 1, found "
                f"{entry['iscrowd']!r}"
            )
        if not _is_coordinate(entry.get("area", 0), largest=_LARGEST_COORDINATE**2):
            raise DataError(
                f"{path}: area of annotation {entry['id']} must be a finite number, found "
                f"{entry['area']!r}"
            )


def _is_integer(value: object) -> bool:
    """Whether json gave a whole number that fits int64."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_coordinate(value: object, largest: float = _LARGEST_COORDINATE) -> bool:
    """Whether json gave a number that is finite and of a sane size (NaN compares false)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= largest


def _with_defaults(entry: dict[str, Any]) -> dict[str, Any]:
    """The annotation with the two keys that the evaluator needs."""
    defaults = {"area": entry["bbox"][2] * entry["bbox"][3], "iscrowd": 0}
    return entry | {key: value for key, value in defaults.items() if key not in entry}


def _annotated(path: Path, content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The images that have an annotation."""
    ids = {entry["image_id"] for entry in content["annotations"]}
    images = [image for image in content["images"] if image["id"] in ids]
    if not images:
        raise DataError(f"{path}: no image has an annotation, and empty ones are not to be kept")
    return images


def _image_folder(annotations: Path, images: Path | None) -> Path:
    if images is None:
        beside = annotations.parent / "images"
        return beside if beside.is_dir() else annotations.parent
    if not Path(images).is_dir():
        raise DataError(f"no image folder {images}; name the folder that holds the images")
    return Path(images)


def _decode(path: Path, height: int, width: int, annotations: Path) -> Tensor:
    """Read an image file as uint8 [3, height, width].

    Pillow rather than torchvision's own decoder: that one is deprecated, reads fewer formats, and
    the pipelines of transformers open files with Pillow too, so training sees the same pixels.
    """
    try:
        with Image.open(path) as image:
            stored = image.size
            upright = ImageOps.exif_transpose(image)
            chosen = upright if upright.size == (width, height) else image
            pixels = _to_rgb(chosen) if chosen.size == (width, height) else None
            found = upright.size
    except UnidentifiedImageError:
        raise DataError(f"{path} is no image in a known format, or it is damaged") from None
    except Exception as error:  # what Pillow's readers raise on damaged files has no common base
        raise DataError(f"cannot decode image {path}: {one_line(error)}") from error
    if pixels is None:
        turned = f" ({stored[0]} x {stored[1]} as stored)" if stored != found else ""
        raise DataError(
            f"image {path} is {found[0]} x {found[1]} pixels{turned}, but {annotations} says "
            f"{width} x {height} (width x height): its boxes would not fit"
        )
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _to_rgb(image: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Pixels as uint8 [H, W, 3]; transparency over white, as the image processor does it."""
    if image.mode.startswith("I;16"):
        # Pillow would cut 16-bit grey at 255 instead of scaling it
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are in mode {image.mode!r}; expected 8- or 16-bit colour")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))


def _some(values: Sequence[str]) -> str:
    """The first few of a list."""
    return ", ".join(values[:_EXAMPLES]) + (", ..." if len(values) > _EXAMPLES else "")
