"""The flat vocabulary that heads, assigners and the criterion speak.

Letters in shapes: B images, Q queries, K classes, T targets of the whole batch, M pairs, S stages,
L pyramid levels, C channels, H and W height and width. Boxes are cxcywh in [0, 1] of the
*unpadded* image, so a target never depends on the images it shares a batch with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Targets:
    """All objects of a batch in one flat list. T = 0 is legal.

    Attributes:
        labels: int64 [T], class indices 0..K-1.
        boxes: float [T, 4], cxcywh in [0, 1] of the unpadded image.
        image: int64 [T], index of the object's image in the batch.
        batch_size: number of images in the batch, those without objects included.
    """

    labels: Tensor
    boxes: Tensor
    image: Tensor
    batch_size: int

    def __post_init__(self) -> None:
        count = self.labels.shape[0]
        if self.boxes.shape != (count, 4) or self.image.shape != (count,):
            raise ValueError(
                f"labels [T], boxes [T, 4] and image [T] must agree on T; found labels "
                f"{list(self.labels.shape)}, boxes {list(self.boxes.shape)}, "
                f"image {list(self.image.shape)}"
            )

    def __len__(self) -> int:
        return self.labels.shape[0]

    @classmethod
    def from_labels(cls, labels: Sequence[Mapping[str, Tensor]]) -> Targets:
        """Concatenate the Hugging Face style labels of a batch.

        Args:
            labels: one mapping an image with `class_labels` int64 [n] and `boxes` [n, 4].

        Raises:
            ValueError: no image at all, or an image whose labels and boxes differ in number.
        """
        if not labels:
            raise ValueError("labels is empty: a batch holds at least one image")
        for index, item in enumerate(labels):
            if len(item["class_labels"]) != len(item["boxes"]):
                raise ValueError(
                    f"image {index} of the batch has {len(item['class_labels'])} class_labels "
                    f"but {len(item['boxes'])} boxes"
                )
        class_labels = torch.cat([item["class_labels"].reshape(-1) for item in labels])
        counts = torch.tensor([len(item["class_labels"]) for item in labels])
        image = torch.repeat_interleave(torch.arange(len(labels)), counts)
        return cls(
            labels=class_labels.to(torch.int64),
            boxes=torch.cat([item["boxes"].reshape(-1, 4) for item in labels]),
            image=image.to(class_labels.device),
            batch_size=len(labels),
        )

    def class_agnostic(self) -> Targets:
        """A copy in which every object has class 0."""
        return replace(self, labels=torch.zeros_like(self.labels))

    def to(self, device: torch.device | str) -> Targets:
        """The same targets on another device."""
        return replace(
            self,
            labels=self.labels.to(device),
            boxes=self.boxes.to(device),
            image=self.image.to(device),
        )


@dataclass(frozen=True, slots=True)
class StagePrediction:
    """What one stage claims about every query.

    Attributes:
        logits: float [B, Q, K], before the sigmoid.
        boxes: float [B, Q, 4], cxcywh in [0, 1] of the unpadded image, not clipped.
    """

    logits: Tensor
    boxes: Tensor

    def float(self) -> StagePrediction:
        """The prediction in float32 at least, with gradient; float64 stays float64."""
        return replace(
            self,
            logits=self.logits.to(torch.promote_types(self.logits.dtype, torch.float32)),
            boxes=self.boxes.to(torch.promote_types(self.boxes.dtype, torch.float32)),
        )

    def detach(self) -> StagePrediction:
        """The prediction cut from the graph."""
        return replace(self, logits=self.logits.detach(), boxes=self.boxes.detach())


@dataclass(frozen=True, slots=True)
class Pairs:
    """Row m says: query `query[m]` of image `image[m]` answers target `target[m]`.

    Attributes:
        image: int64 [M], index in the batch.
        query: int64 [M], index in 0..Q-1.
        target: int64 [M], row of `Targets`.
    """

    image: Tensor
    query: Tensor
    target: Tensor

    def __len__(self) -> int:
        return self.target.shape[0]

    def select(self, keep: Tensor) -> Pairs:
        """The pairs that `keep` names (boolean mask or indices [M])."""
        return Pairs(self.image[keep], self.query[keep], self.target[keep])

    @staticmethod
    def cat(parts: Sequence[Pairs]) -> Pairs:
        """All pairs of `parts`, in order."""
        return Pairs(
            torch.cat([part.image for part in parts]),
            torch.cat([part.query for part in parts]),
            torch.cat([part.target for part in parts]),
        )


@dataclass(frozen=True, slots=True)
class Assignment:
    """Who supervises what in one stage.

    Attributes:
        classes: pairs whose query learns the target's class; a query may stand in several.
        boxes: pairs whose query regresses the target's box.
    """

    classes: Pairs
    boxes: Pairs


@dataclass(frozen=True, slots=True)
class StageGroup:
    """Stages in which query q is the same slot: the border an assigner cannot cross.

    Attributes:
        name: "decoder", "proposals" or "denoising"; first part of every loss key.
        stages: predictions, first stage first.
        known_pairs: pairs that hold by construction in every stage (denoising); None where an
            assigner decides.
        class_agnostic: True where the class score only says "object".
    """

    name: str
    stages: tuple[StagePrediction, ...]
    known_pairs: Pairs | None = None
    class_agnostic: bool = False


@dataclass(frozen=True, slots=True)
class FeaturePyramid:
    """Feature maps of a batch, finest level first.

    Attributes:
        levels: L tensors, float [B, C, H, W].
        strides: L ints, pixels.
        valid: L tensors, bool [B, H, W], True where the cell shows a real pixel.
        image_sizes: int64 [B, 2], (height, width) of the unpadded images, pixels.
    """

    levels: tuple[Tensor, ...]
    strides: tuple[int, ...]
    valid: tuple[Tensor, ...]
    image_sizes: Tensor

    def __post_init__(self) -> None:
        if not len(self.levels) == len(self.strides) == len(self.valid):
            raise ValueError(
                f"levels, strides and valid must have one entry a level; found "
                f"{len(self.levels)}, {len(self.strides)} and {len(self.valid)}"
            )
