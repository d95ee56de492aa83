"""Detected objects, cropped."""

from __future__ import annotations

import math
from pathlib import Path

from detrelay.apps.sources.item import Input, flat_name
from detrelay.apps.writers.base import Classes, Seen

_CROPS = "crops"


class CropsWriter:
    """`crops/CLASS/IMAGE_N.png`: for each detection, the pixels that its box touches."""

    def __init__(self, output: Path, classes: Classes) -> None:
        self.folder = output / _CROPS
        self.classes = classes

    @staticmethod
    def target(output: Path, item: Input) -> Path:
        """The common prefix of an image's crops."""
        return output / _CROPS / item.flat_name

    def add(self, seen: Seen) -> None:
        """Write the crops of an image, numbered from the best."""
        from torchvision.transforms.v2 import functional as tv_functional

        height, width = seen.size
        for number, one in enumerate(seen.found):
            left, top, right, bottom = one.box_xyxy
            rows = slice(max(0, math.floor(top)), min(height, math.ceil(bottom)))
            columns = slice(max(0, math.floor(left)), min(width, math.ceil(right)))
            part = seen.pixels[:, rows, columns]
            if part.numel() == 0:  # a box without extent
                continue
            name = flat_name(self.classes.names[one.index]) or f"class {one.index}"
            place = self.folder / name
            place.mkdir(parents=True, exist_ok=True)
            image = tv_functional.to_pil_image(part)
            image.save(place / f"{seen.item.flat_name}_{number}.png")

    def close(self, *, complete: bool) -> None:
        """Nothing to finish."""
