"""The flat vocabulary that heads, assigners and the criterion share.

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
    """All objects of a batch in one flat list. T = 0 is valid.

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
            labels: one mapping per image with `class_labels` int64 [n] and `boxes` [n, 4].

        Raises:
            ValueError: no image at all, or an image whose labels and boxes differ in number.
        """
        if not labels:
            raise ValueError("labels is empty: a batch needs at least one image")
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

    def check(self, num_classes: int) -> None:
        """Reject objects that cannot be learned. Reads values, so it waits for a GPU once.

        Args:
            num_classes: K of the model.

        Raises:
            ValueError: a label outside 0..K-1, or a box of negative size; names the object.
        """
        if not len(self):
            return
        wrong = (self.labels < 0) | (self.labels >= num_classes)
        negative = (self.boxes[:, 2:] < 0).any(1)
        if not (wrong | negative).any():
            return
        row = int((wrong | negative).nonzero()[0])
        image = int(self.image[row])
        if wrong[row]:
            raise ValueError(
                f"class label {int(self.labels[row])} found in image {image} of the batch, but the "
                f"model scores {num_classes} classes (labels run from 0 to {num_classes - 1})"
            )
        raise ValueError(
            f"target box {self.boxes[row].tolist()} found in image {image} of the batch; boxes are "
            f"center x, center y, width and height, which cannot be negative"
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


def at_least_float32(values: Tensor) -> Tensor:
    """The same numbers in float32; float64 stays float64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


@dataclass(frozen=True, slots=True)
class StagePrediction:
    """What one stage (a decoder layer with its heads) predicts for every query.

    Attributes:
        logits: float [B, Q, K], before the sigmoid.
        boxes: float [B, Q, 4], cxcywh in [0, 1] of the unpadded image, not clipped.
        references: float [B, Q, 4], boxes that an assigner may use instead of `boxes`: those the
            stage started from (anchors, proposals, the stage before), or another decoder's for the
            same queries; None where the head provides none.
        slot: int64 [B, Q], the slot that each row is, a permutation of 0..Q-1 in each image, where
            a head re-sorts its queries between stages; None where row q is slot q.
    """

    logits: Tensor
    boxes: Tensor
    references: Tensor | None = None
    slot: Tensor | None = None

    def float(self) -> StagePrediction:
        """The prediction in at least float32, with gradient; float64 stays float64."""
        return replace(
            self,
            logits=at_least_float32(self.logits),
            boxes=at_least_float32(self.boxes),
            references=None if self.references is None else at_least_float32(self.references),
        )

    def detach(self) -> StagePrediction:
        """The prediction detached from the graph."""
        return replace(
            self,
            logits=self.logits.detach(),
            boxes=self.boxes.detach(),
            references=None if self.references is None else self.references.detach(),
        )

    def by_slot(self) -> StagePrediction:
        """The prediction with row q for slot q."""
        if self.slot is None:
            return self
        row = self.slot.argsort(dim=1)[..., None]  # [B, Q, 1], the row of each slot

        def sort(values: Tensor) -> Tensor:
            return values.gather(1, row.expand(-1, -1, values.shape[-1]))

        return StagePrediction(
            logits=sort(self.logits),
            boxes=sort(self.boxes),
            references=None if self.references is None else sort(self.references),
        )


@dataclass(frozen=True, slots=True)
class Pairs:
    """Row m: query `query[m]` of image `image[m]` is matched to target `target[m]`.

    Attributes:
        image: int64 [M], index in the batch.
        query: int64 [M], index in 0..Q-1.
        target: int64 [M], row of `Targets`.
        weight: float [M], for box pairs a factor of their box losses, for class pairs a factor of
            the target score; None for 1.
    """

    image: Tensor
    query: Tensor
    target: Tensor
    weight: Tensor | None = None

    def __len__(self) -> int:
        return self.target.shape[0]

    def select(self, keep: Tensor) -> Pairs:
        """The pairs that `keep` selects (boolean mask or indices [M])."""
        weight = None if self.weight is None else self.weight[keep]
        return Pairs(self.image[keep], self.query[keep], self.target[keep], weight)

    @staticmethod
    def cat(parts: Sequence[Pairs]) -> Pairs:
        """All pairs of `parts`, in order; if some have weights, the others get weight 1."""
        weights = [part.weight for part in parts if part.weight is not None]
        return Pairs(
            torch.cat([part.image for part in parts]),
            torch.cat([part.query for part in parts]),
            torch.cat([part.target for part in parts]),
            torch.cat([part.weights(weights[0]) for part in parts]) if weights else None,
        )

    def weights(self, like: Tensor) -> Tensor:
        """The weights [M] in dtype and on the device of `like`, ones if none are given."""
        if self.weight is None:
            return like.new_ones(len(self))
        return self.weight.to(like)


@dataclass(frozen=True, slots=True)
class Assignment:
    """Who supervises what in one stage.

    Attributes:
        classes: pairs whose query learns the target's class; a query may be in several.
        boxes: pairs whose query regresses the target's box; a query may be in several here too.
    """

    classes: Pairs
    boxes: Pairs


@dataclass(frozen=True, slots=True)
class StageGroup:
    """Stages in which query q is the same slot: the boundary an assigner cannot cross.

    Attributes:
        name: such as "decoder", "proposals" or "denoising"; first part of every loss key.
        stages: predictions, first stage first.
        known_pairs: pairs that hold by construction in every stage (denoising); None if an assigner
            decides.
        class_agnostic: True if the class score only says "object".
        slots: name of the group whose slots these queries share, so that a query index means the
            same in both ("decoder" for DINO's proposals); None for separate slots.
    """

    name: str
    stages: tuple[StagePrediction, ...]
    known_pairs: Pairs | None = None
    class_agnostic: bool = False
    slots: str | None = None

    @property
    def slot_space(self) -> str:
        """Groups with the same slot space may be assigned together."""
        return self.slots or self.name


@dataclass(frozen=True, slots=True)
class GroupFacts:
    """What a head declares about one of its stage groups before it runs; see `StageGroup`.

    Attributes:
        name: of the group.
        known_pairs: its pairs hold by construction.
        class_agnostic: its class score only says "object".
        slots: name of the group whose slots it shares.
        references: its stages carry the boxes that they started from.
    """

    name: str
    known_pairs: bool = False
    class_agnostic: bool = False
    slots: str | None = None
    references: bool = False

    @property
    def slot_space(self) -> str:
        """Groups with the same slot space may be assigned together."""
        return self.slots or self.name


REGIONS = GroupFacts("regions", known_pairs=True)  # annotated boxes, see `RegionClassifier`


@dataclass(frozen=True, slots=True)
class FeaturePyramid:
    """Feature maps of a batch, finest level first.

    Attributes:
        levels: L tensors, float [B, C, H, W].
        strides: L numbers, pixels.
        valid: L tensors, bool [B, H, W], True where the cell shows a real pixel.
        image_sizes: int64 [B, 2], (height, width) of the unpadded images, pixels.
    """

    levels: tuple[Tensor, ...]
    strides: tuple[float, ...]
    valid: tuple[Tensor, ...]
    image_sizes: Tensor

    def __post_init__(self) -> None:
        if not len(self.levels) == len(self.strides) == len(self.valid):
            raise ValueError(
                f"levels, strides and valid must have one entry per level; found "
                f"{len(self.levels)}, {len(self.strides)} and {len(self.valid)}"
            )
