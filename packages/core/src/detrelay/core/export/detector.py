"""Detect with an exported file, using only numpy and Pillow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from detrelay.core.export.detections import Detection, detections_of
from detrelay.core.export.pixels import AnyImage, PixelSettings, prepare, read_any
from detrelay.core.export.runtimes import Arrays, find_format, open_file

FACTS = "detector.json"


@dataclass(frozen=True)
class Facts:
    """The facts that an exported folder records about its file.

    Attributes:
        format: a key of `FORMATS`.
        class_names: name of each class index.
        category_ids: the dataset's own id of each class index; None if unknown.
        pixels: preprocessing of images.
    """

    format: str
    class_names: list[str]
    category_ids: list[int] | None
    pixels: PixelSettings

    def write(self, folder: Path) -> None:
        """Write them into a folder."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False)
        (folder / FACTS).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Facts:
        """The facts of a folder.

        Raises:
            ValueError: they are missing or damaged.
        """
        file = folder / FACTS
        if not file.is_file():
            raise ValueError(
                f"{folder}: no exported detector (it has no {FACTS}); `detrelay export` writes one"
            )
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            pixels = PixelSettings.from_dict(content.pop("pixels"))
            facts = cls(**content, pixels=pixels)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{file}: not what `detrelay export` writes ({type(error).__name__}); export the "
                f"model again"
            ) from error
        find_format(facts.format)
        return facts


class ExportedDetector:
    """A detector in a folder written by `detrelay export`.

    Needs numpy, Pillow and the runtime of the folder's format; neither torch (except for the format
    torch-export) nor transformers.

    Args:
        folder: where it is.
        threads: CPU threads to run on; None for the runtime's default.

    Attributes:
        format: of its file.
        class_names: name of each class index.
        category_ids: the dataset's own id of each class index; None if unknown.
        pixels: preprocessing of images.

    Raises:
        ValueError: the folder contains no detector, its file is damaged or its runtime is not
            installed.
    """

    def __init__(self, folder: str | Path, *, threads: int | None = None) -> None:
        folder = Path(folder)
        facts = Facts.read(folder)
        self.format = facts.format
        self.class_names = facts.class_names
        self.category_ids = facts.category_ids
        self.pixels = facts.pixels
        self._run = open_file(facts.format, folder / find_format(facts.format).file, threads)

    def __call__(
        self,
        images: AnyImage | Sequence[AnyImage],
        threshold: float = 0.5,
        top_k: int = 100,
        *,
        clip: bool = True,
    ) -> list[Detection]:
        """Detect objects.

        Args:
            images: one or several: paths, Pillow images, or arrays uint8 [H, W, 3] (other kinds as
                in `detrelay.core.data.decode`). They form one batch.
            threshold: detections score above this.
            top_k: maximum detections per image.
            clip: clip boxes to the image.

        Returns:
            One mapping per image, best detections first: `scores` float32 [n], `labels` int64 [n]
            (class indices), `boxes` float32 [n, 4], xyxy in pixels of the image as given.

        Raises:
            ImageError: an image cannot be read.
            NonFiniteOutput: a score or a box is NaN or infinite.
            ValueError: there is no image.
        """
        if not isinstance(images, list | tuple):
            images = [images]  # type: ignore[list-item]  # an array is a sequence to mypy
        if not images:
            raise ValueError("there is no image to detect in")
        pixels = [read_any(image, self.pixels.max_pixels) for image in images]
        logits, boxes = self.run(*prepare(pixels, self.pixels))
        return detections_of(
            logits,
            boxes,
            [image.shape[:2] for image in pixels],
            threshold=threshold,
            top_k=top_k,
            clip=clip,
            nms_iou_threshold=self.pixels.nms_iou_threshold,
        )

    def run(self, pixel_values: NDArray[np.float32], pixel_mask: NDArray[np.int64]) -> Arrays:
        """Class scores before the sigmoid [B, Q, K] and boxes [B, Q, 4], cxcywh in [0, 1].

        Args:
            pixel_values: [B, 3, H, W], normalised, zero where padded.
            pixel_mask: [B, H, W], 1 on real pixels, which fill the top left corner.
        """
        return self._run(pixel_values, pixel_mask)
