"""A synthetic detection dataset: shapes of four classes on cluttered backgrounds.

Image i of seed s depends on (s, i) alone. The objects of an image are sampled first, so boxes are
known without drawing pixels.
"""

from __future__ import annotations

from colorsys import hsv_to_rgb
from dataclasses import dataclass
from functools import cached_property
from math import cos, pi, sin
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch.utils.data import Dataset

from detrelay.core.data.coco import Category, DataReport, Sample

SHAPES = ("circle", "triangle", "ring", "cross")

_EMPTY_IMAGES = 0.08  # share of images without objects
_MAX_OBJECTS = 4
_SIDES = (0.75, 1.0)  # image height and width, in units of image_size
_DIAMETERS = (0.2, 0.6)  # of a shape's bounding circle, in units of the shorter image side
_MAX_COVERED = 0.5  # share of a box that later boxes may cover
_TRIES = 20
_HUE_SPREAD = 0.06  # of a class's colours, in turns of the colour circle
_SUPERSAMPLING = 2  # drawn larger and downsampled, for smooth edges

_Points = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ShapeObject:
    """One shape of an image.

    Attributes:
        label: class index, position in `SHAPES`.
        outline: float64 [p, 2], corners (x, y) in pixels; closed.
        hole: float64 [p, 2], the part cut out of a ring; None for all others.
    """

    label: int
    outline: _Points
    hole: _Points | None

    @property
    def box_xyxy(self) -> tuple[float, float, float, float]:
        """Tight corners in pixels."""
        (left, top), (right, bottom) = self.outline.min(0), self.outline.max(0)
        return float(left), float(top), float(right), float(bottom)


@dataclass(frozen=True, slots=True)
class _Scene:
    """What an image shows: its size in pixels and its objects, back to front."""

    height: int
    width: int
    objects: tuple[ShapeObject, ...]


class ShapesDataset(Dataset[Sample]):
    """Images of coloured shapes, drawn on demand.

    Each class has its own form and hue. Up to four shapes per image, 20 to 60 % of the shorter
    side, rotated, mildly overlapping; backgrounds have gradients, blobs, lines and noise. Two seeds
    share no image, so another seed makes a held-out split.

    Args:
        num_images: number of images.
        image_size: maximum side of an image, pixels; sides vary from 75 to 100 % of it.
        seed: selects the images, 0 to 2**32 - 1.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(self, num_images: int, *, image_size: int = 160, seed: int = 0) -> None:
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1, found {num_images}")
        if image_size < 32:
            raise ValueError(
                f"image_size must be at least 32 pixels for shapes to be told apart, found "
                f"{image_size}"
            )
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must lie in [0, 2**32), found {seed}")
        self.num_images = num_images
        self.image_size = image_size
        self.seed = seed
        self.categories = tuple(Category(id=row + 1, name=name) for row, name in enumerate(SHAPES))
        self.image_ids = list(range(1, num_images + 1))

    def __len__(self) -> int:
        return self.num_images

    def file_name(self, index: int) -> str:
        """A name for image `index`; there is no such file."""
        return f"shapes_{self.seed}_{index:06d}.png"

    def __getitem__(self, index: int) -> Sample:
        """Draw image `index` (0..len - 1)."""
        if not 0 <= index < self.num_images:
            raise IndexError(f"image {index} of {self.num_images}")
        generator, scene = self._scene(index)
        pixels = _draw(scene, generator)
        boxes = [shape.box_xyxy for shape in scene.objects]
        return Sample(
            image=torch.from_numpy(pixels).permute(2, 0, 1).contiguous(),
            boxes_xyxy=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            class_labels=torch.tensor([shape.label for shape in scene.objects], dtype=torch.int64),
            image_id=self.image_ids[index],
            original_size=(scene.height, scene.width),
        )

    @cached_property
    def ground_truth(self) -> dict[str, Any]:
        """The dataset as a COCO detection dictionary."""
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index, image_id in enumerate(self.image_ids):
            _, scene = self._scene(index)
            images.append(
                {
                    "id": image_id,
                    "file_name": self.file_name(index),
                    "height": scene.height,
                    "width": scene.width,
                }
            )
            for shape in scene.objects:
                left, top, right, bottom = shape.box_xyxy
                box = [left, top, right - left, bottom - top]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": self.categories[shape.label].id,
                        "bbox": box,
                        "area": box[2] * box[3],
                        "iscrowd": 0,
                    }
                )
        categories = [{"id": category.id, "name": category.name} for category in self.categories]
        return {"images": images, "annotations": annotations, "categories": categories}

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Size of each image, int64 [N, 2], (height, width), pixels."""
        scenes = [self._scene(index)[1] for index in range(len(self))]
        return np.array([(scene.height, scene.width) for scene in scenes], dtype=np.int64)

    @cached_property
    def report(self) -> DataReport:
        """Counts; nothing is ever dropped."""
        annotations = self.ground_truth["annotations"]
        occupied = {entry["image_id"] for entry in annotations}
        return DataReport(
            images=len(self),
            boxes=len(annotations),
            images_without_boxes=len(self) - len(occupied),
            crowd_boxes=0,
            dropped_boxes={},
            clipped_boxes=0,
        )

    def _scene(self, index: int) -> tuple[np.random.Generator, _Scene]:
        """The objects of image `index`, and the generator that its colours come from."""
        generator = np.random.default_rng([self.seed, index])
        return generator, _plan(generator, self.image_size)


def _plan(generator: np.random.Generator, image_size: int) -> _Scene:
    """Choose size and objects of one image."""
    height, width = (round(image_size * share) for share in generator.uniform(*_SIDES, 2))
    count = int(generator.integers(1, _MAX_OBJECTS + 1))
    if generator.random() < _EMPTY_IMAGES:
        count = 0
    objects: list[ShapeObject] = []
    hidden: list[float] = []  # upper bound of the share of each box that later boxes cover
    for _ in range(count):
        for _ in range(_TRIES):
            shape = _place(generator, height, width)
            covered = [
                before + _covered_share(earlier.box_xyxy, shape.box_xyxy)
                for before, earlier in zip(hidden, objects, strict=True)
            ]
            if all(share <= _MAX_COVERED for share in covered):
                objects.append(shape)
                hidden = [*covered, 0.0]
                break
    return _Scene(height, width, tuple(objects))


def _place(generator: np.random.Generator, height: int, width: int) -> ShapeObject:
    """Sample a shape: class, size, rotation, position. It lies inside the image."""
    label = int(generator.integers(len(SHAPES)))
    smallest, largest = _DIAMETERS
    # uniform in the logarithm: as many small shapes as large ones
    diameter = min(height, width) * smallest * (largest / smallest) ** generator.random()
    points = _unit_outline(SHAPES[label], generator)
    turn = generator.uniform(0, 2 * pi)
    rotation = np.array([[cos(turn), sin(turn)], [-sin(turn), cos(turn)]])
    points = points @ rotation * (0.5 * diameter)
    low, high = points.min(0), points.max(0)
    room = np.array([width, height]) - (high - low)
    shift = generator.random(2) * room - low
    hole = None
    if SHAPES[label] == "ring":
        hole = points * generator.uniform(0.45, 0.65) + shift
    return ShapeObject(label, points + shift, hole)


def _unit_outline(name: str, generator: np.random.Generator) -> _Points:
    """Corners of a shape inside the unit circle, unrotated, [p, 2]."""
    if name in ("circle", "ring"):
        return _on_circle(64)
    if name == "triangle":
        return _on_circle(3)
    arm = generator.uniform(0.22, 0.36)  # half the width of a bar of the cross
    quarter = np.array([[arm, arm], [1.0, arm], [1.0, -arm]]) / np.hypot(1, arm)
    turns = [np.array([[0, 1], [-1, 0]]), np.eye(2), np.array([[0, -1], [1, 0]]), -np.eye(2)]
    return np.concatenate([quarter @ turn for turn in turns])


def _on_circle(count: int) -> _Points:
    angles = np.arange(count) * (2 * pi / count)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _covered_share(box: tuple[float, ...], later: tuple[float, ...]) -> float:
    """Share of a corner box that a later one covers."""
    width = min(box[2], later[2]) - max(box[0], later[0])
    height = min(box[3], later[3]) - max(box[1], later[1])
    area = (box[2] - box[0]) * (box[3] - box[1])
    return max(width, 0.0) * max(height, 0.0) / area


def _draw(scene: _Scene, generator: np.random.Generator) -> NDArray[np.uint8]:
    """Paint a scene as uint8 [height, width, 3]."""
    # pale backgrounds: greys with a tint, from one shade to another
    ends = generator.uniform(50, 205, (2, 1)) + generator.uniform(-20, 20, (2, 3))
    canvas = _gradient(scene, ends, generator)
    painter = ImageDraw.Draw(canvas)
    _clutter(painter, canvas.size, ends, generator)
    for shape in scene.objects:
        _paint(canvas, painter, shape, _class_color(shape.label, generator))
    small = np.asarray(canvas.reduce(_SUPERSAMPLING), dtype=np.int16)
    amplitude = int(generator.integers(1, 12))
    noise = generator.integers(-amplitude, amplitude + 1, small.shape, dtype=np.int16)
    return (small + noise).clip(0, 255).astype(np.uint8)


def _gradient(
    scene: _Scene, ends: NDArray[np.float64], generator: np.random.Generator
) -> Image.Image:
    """A canvas that runs from one colour to another in some direction."""
    turn = generator.uniform(0, 2 * pi)
    across = np.linspace(-0.5, 0.5, scene.width) * cos(turn)
    down = np.linspace(-0.5, 0.5, scene.height) * sin(turn)
    mix = (across + down[:, None] + 0.5)[..., None]
    pixels = (ends[0] + mix * (ends[1] - ends[0])).clip(0, 255).astype(np.uint8)
    size = (scene.width * _SUPERSAMPLING, scene.height * _SUPERSAMPLING)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def _clutter(
    painter: ImageDraw.ImageDraw,
    size: tuple[int, int],
    ends: NDArray[np.float64],
    generator: np.random.Generator,
) -> None:
    """Distractors: pale shapeless blobs, and thin lines."""
    for _ in range(generator.integers(0, 5)):
        corners = int(generator.integers(7, 12))
        radii = generator.uniform(0.4, 1.0, (corners, 1)) * generator.uniform(0.05, 0.25)
        points = (_on_circle(corners) * radii + generator.random(2)) * size
        color = ends[generator.integers(2)] + generator.uniform(-20, 20, 3)
        painter.polygon(_flat(points), fill=_rgb(color))
    for _ in range(generator.integers(0, 4)):
        points = generator.random((2, 2)) * size
        shade = generator.uniform(0, 255) + generator.uniform(-25, 25, 3)
        painter.line(_flat(points), fill=_rgb(shade), width=2)


def _class_color(label: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """A strong colour near the hue of the class."""
    hue = label / len(SHAPES) + generator.uniform(-_HUE_SPREAD, _HUE_SPREAD)
    rgb = hsv_to_rgb(hue % 1, generator.uniform(0.6, 1), generator.uniform(0.6, 1))
    return 255 * np.array(rgb)


def _paint(
    canvas: Image.Image,
    painter: ImageDraw.ImageDraw,
    shape: ShapeObject,
    color: NDArray[np.float64],
) -> None:
    outline = _flat(shape.outline * _SUPERSAMPLING)
    if shape.hole is None:
        painter.polygon(outline, fill=_rgb(color))
        return
    # The hole shows what lies behind the ring
    mask = Image.new("1", canvas.size)
    stencil = ImageDraw.Draw(mask)
    stencil.polygon(outline, fill=1)
    stencil.polygon(_flat(shape.hole * _SUPERSAMPLING), fill=0)
    canvas.paste(_rgb(color), (0, 0), mask)


def _flat(points: _Points) -> list[float]:
    """Corners in Pillow's format."""
    return [float(value) for value in points.reshape(-1)]


def _rgb(color: NDArray[np.float64]) -> tuple[int, int, int]:
    red, green, blue = color.clip(0, 255).astype(int).tolist()
    return red, green, blue
