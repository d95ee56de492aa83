"""Samples of an annotated data set: RGB image, boxes in pixels, class indices 0..K-1.

The annotations are checked once, when the data set is built; every problem is one `DataError`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from detrelay.core.data.annotations import Annotations
from detrelay.core.data.decode import MAX_PIXELS, read_image
from detrelay.core.data.readers import coco
from detrelay.core.data.sample import Category as Category
from detrelay.core.data.sample import DataReport as DataReport
from detrelay.core.data.sample import Sample as Sample
from detrelay.core.data.sample import some
from detrelay.core.errors import DataError as DataError


class AnnotatedImages(Dataset[Sample]):
    """The images of a split with the boxes to learn from.

    Class index c is the position of the category in `categories`. Images are read by the rules of
    `detrelay.core.data.decode`. Where the EXIF tag turns the image, the annotations decide: turned
    if that gives their width and height, as stored if only that does.

    Args:
        annotations: what a reader found.
        strict: reject boxes that leave their image or have no area, which otherwise are clipped or
            dropped and counted in `report`.
        keep_empty: also keep images without any annotation; a crowd counts as one.
        max_pixels: maximum number of pixels of an image; a larger one is rejected when it is read.

    Attributes:
        categories: categories by class index.
        image_ids: original image ids by index.
        sizes: int64 [N, 2], (height, width), pixels.
        report: counts.

    Raises:
        DataError: an image file is missing, or, with `strict`, a box is not inside its image.
    """

    def __init__(
        self,
        annotations: Annotations,
        *,
        strict: bool = False,
        keep_empty: bool = True,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.max_pixels = max_pixels
        left_out = 0
        if not keep_empty:
            annotated = np.zeros(len(annotations), dtype=np.bool_)
            annotated[annotations.box_image] = True
            if not annotated.any():
                raise DataError(
                    f"{annotations.source}: no image has an annotation, and empty ones are not to "
                    f"be kept"
                )
            left_out = int((~annotated).sum())
            annotations = annotations.select(annotated) if left_out else annotations
        self.annotations = annotations
        self.categories = annotations.categories
        self.image_ids: list[int] = annotations.image_ids.tolist()
        self.sizes = annotations.sizes
        self._check_files_exist()
        self._fill_boxes(strict, left_out)

    def __len__(self) -> int:
        return len(self.annotations)

    def file_name(self, index: int) -> str:
        """Name of an image file as in the annotations."""
        return self.annotations.images.name(index)

    def __getitem__(self, index: int) -> Sample:
        """Decode image `index` (0..len - 1).

        Raises:
            DataError: the image file is damaged or its size is not that of the annotations.
        """
        height, width = self.annotations.sizes[index].tolist()
        file = self.annotations.images.open(index)
        image = read_image(
            file, size=(height, width), max_pixels=self.max_pixels, name=self.file_name(index)
        )
        rows = slice(self._starts[index], self._starts[index + 1])
        return Sample(
            image=image,
            boxes_xyxy=self.boxes(index),
            class_labels=torch.from_numpy(self._labels[rows].copy()),
            image_id=int(self.annotations.image_ids[index]),
            original_size=(height, width),
        )

    def boxes(self, index: int) -> torch.Tensor:
        """Boxes of the sample of image `index`, without reading it: float32 [n, 4] xyxy, pixels."""
        rows = slice(self._starts[index], self._starts[index + 1])
        return torch.from_numpy(self._boxes[rows].copy())

    @cached_property
    def ground_truth(self) -> dict[str, Any]:
        """Images, annotations (crowds and dropped boxes too) and categories, for the evaluator."""
        return self.annotations.to_coco()

    def _check_files_exist(self) -> None:
        missing = self.annotations.images.missing()
        if missing:
            raise DataError(
                f"{len(missing)} of {len(self)} images of {self.annotations.source} are missing in "
                f"{self.annotations.images.place()}: {some(missing)}; "
                f"{self.annotations.images.advice(missing[0])}"
            )

    def _fill_boxes(self, strict: bool, left_out: int) -> None:
        """Sort the boxes by image, clip them, and drop those that cannot be learned."""
        told = self.annotations
        rows = np.flatnonzero(~told.crowd)
        rows = rows[np.argsort(told.box_image[rows], kind="stable")]
        image = told.box_image[rows]
        # float64 first: x + width would lose tenths of a pixel on huge images in float32
        low, size = told.boxes_xywh[rows, :2], told.boxes_xywh[rows, 2:]
        high = low + size
        limits = told.sizes[image][:, ::-1].astype(np.float64)  # [n, 2]
        clipped_low, clipped_high = (np.clip(corner, 0, limits) for corner in (low, high))
        boxes = np.concatenate([clipped_low, clipped_high], axis=1).astype(np.float32)
        # Judged after rounding to float32, so that no sample ever holds a box without area
        flat = (size <= 0).any(1)
        outside = ~flat & (boxes[:, 2:] <= boxes[:, :2]).any(1)
        keep = ~(flat | outside)
        clipped = keep & ((clipped_low != low) | (clipped_high != high)).any(1)
        faults = {"zero area": flat, "outside the image": outside, "partly outside": clipped}
        if strict:
            self._refuse_faults(faults, rows)
        counts = np.bincount(image[keep], minlength=len(self))
        self._starts = np.concatenate([[0], counts.cumsum()])
        self._boxes, self._labels = boxes[keep], told.box_class[rows][keep]
        dropped = {"zero area": int(flat.sum()), "outside the image": int(outside.sum())}
        self.report = DataReport(
            images=len(self),
            boxes=int(keep.sum()),
            images_without_boxes=int((counts == 0).sum()),
            crowd_boxes=int(told.crowd.sum()),
            dropped_boxes={why: count for why, count in dropped.items() if count},
            clipped_boxes=int(clipped.sum()),
            left_out_images=left_out,
            notes=told.notes,
        )

    def _refuse_faults(
        self, faults: Mapping[str, NDArray[np.bool_]], rows: NDArray[np.int64]
    ) -> None:
        told = self.annotations
        for why, found in faults.items():
            if not found.any():
                continue
            first = rows[np.flatnonzero(found)[0]]
            box = ", ".join(f"{number:.12g}" for number in told.boxes_xywh[first])
            raise DataError(
                f"annotation {told.box_ids[first]} (image "
                f"{told.image_ids[told.box_image[first]]}) of {told.source}: box "
                f"[{box}] is {why}; {int(found.sum())} such boxes; "
                f"correct them, or set data.strict=false to drop or clip them"
            )


class CocoDataset(AnnotatedImages):
    """The images of a COCO detection json.

    Args:
        annotations: the json file.
        images: folder that `file_name` is relative to; None looks near the json file. Both follow
            the rules of `detrelay.core.data.image_paths`.
        strict: see `AnnotatedImages`.
        keep_empty: see `AnnotatedImages`.
        max_pixels: see `AnnotatedImages`.
        allow_outside: also read images whose `file_name` points outside the image folder.
        annotated: False also accepts a json without `annotations`, such as a list of test images.

    Raises:
        DataError: the json cannot be read or used, an image file is missing or outside of the
            image folder, or, with `strict`, a box is not inside its image.
    """

    def __init__(
        self,
        annotations: Path,
        images: Path | None = None,
        *,
        strict: bool = False,
        keep_empty: bool = True,
        max_pixels: int = MAX_PIXELS,
        allow_outside: bool = False,
        annotated: bool = True,
    ) -> None:
        found = coco.read(
            Path(annotations), images, allow_outside=allow_outside, annotated=annotated
        )
        super().__init__(found, strict=strict, keep_empty=keep_empty, max_pixels=max_pixels)


def read_annotations(path: Path, *, with_files: bool = True) -> dict[str, Any]:
    """The content of a COCO detection json: `images`, `annotations` and `categories`.

    Args:
        path: the json file.
        with_files: images must have `file_name` and a size too, as loading them needs.

    Raises:
        DataError: see `detrelay.core.data.readers.coco.read`.
    """
    return coco.read(path, with_files=with_files).to_coco()
