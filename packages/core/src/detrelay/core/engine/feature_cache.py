"""Feature maps of a frozen backbone, computed once per image and kept in memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TypedDict

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset

from detrelay.core.data.augmentation import with_and_without_flip
from detrelay.core.data.collate import EncodedSample, padded_size
from detrelay.core.data.transforms import DetectionDataset, VisitSampler
from detrelay.core.detector.model import DetectorForObjectDetection

_GIBIBYTE = 2**30
# the attributes in which modules store the probability of dropping something
_CHANCES = ("p", "drop_prob", "drop_path_prob")
_log = logging.getLogger(__name__)

Variant = tuple[int, bool]


class FeatureBatch(TypedDict):
    """A batch of the backbone's feature maps instead of pixels.

    Attributes:
        feature_maps: the maps [B, C, h, w], finest first.
        pixel_mask: bool [B, H, W], True where a pixel is real.
        labels: one mapping per image, as in `EncodedSample`.
    """

    feature_maps: tuple[Tensor, ...]
    pixel_mask: Tensor
    labels: list[dict[str, Tensor]]


class FeatureMemory:
    """Memory for maps, shared by the datasets of a run.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.is_full = False

    def take(self, size: int, images: int) -> bool:
        """Reserve memory for the maps of one image, if there is any left.

        Args:
            size: bytes.
            images: the maximum number in total, for the message if there is none left.
        """
        if self.used + size <= self.limit:
            self.used += size
            return True
        if not self.is_full:
            self.is_full = True
            _log.warning(
                "the feature cache is full (%.2f GiB); the other images pass the "
                "backbone each time; train.feature_cache_gib=%.1f would be enough for all",
                self.limit / _GIBIBYTE,
                1.1 * size * images / _GIBIBYTE,
            )
        return False


class CachedFeatures(Dataset[Variant]):
    """A dataset that yields a frozen backbone's feature maps of its images.

    An image has two variants: as it is and mirrored. Every map is computed from one image alone,
    padded like its batch, so it depends neither on earlier images nor on what is cached.

    Args:
        data: images by visit, with no augmentation other than a flip.
        model: its backbone computes the maps, in its current state.
        accelerator: device and precision.
        memory: memory for the maps.

    Raises:
        ValueError: the backbone is trained or random, or the augmentation changes the images.
    """

    def __init__(
        self,
        data: DetectionDataset,
        model: DetectorForObjectDetection,
        accelerator: Accelerator,
        memory: FeatureMemory,
    ) -> None:
        refuse_learning(model.backbone)
        try:
            self._flip, self._transforms = with_and_without_flip(data.transform)
        except ValueError as error:
            raise ValueError(_why(str(error))) from error
        self.data = data
        self.shapes = data.shapes
        self._model = model
        self._accelerator = accelerator
        self._memory = memory
        self._labels: dict[Variant, dict[str, Tensor]] = {}
        self._maps: dict[tuple[Variant, tuple[int, int]], tuple[Tensor, ...]] = {}

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, visit: int) -> Variant:
        """The image of a visit, and whether it is mirrored."""
        if self._flip is None:
            return visit % len(self), False
        with self.data.random_numbers(visit):
            return visit % len(self), self._flip.is_due()

    def sampler(self) -> VisitSampler:
        """The visits to train on, as in `data`."""
        return self.data.sampler()

    @torch.no_grad()
    def collate(self, variants: Sequence[Variant], *, divisor: int) -> FeatureBatch:
        """The batch of these images.

        Args:
            variants: items of this dataset.
            divisor: padded sides are multiples of it, pixels.
        """
        encoded = {v: self._encode(v) for v in variants if v not in self._labels}
        self._labels |= {variant: sample["labels"] for variant, sample in encoded.items()}
        labels = [self._labels[variant] for variant in variants]
        sizes = [(int(label["size"][0]), int(label["size"][1])) for label in labels]
        height, width = padded_size(sizes, divisor)
        pixel_mask = torch.zeros(len(variants), height, width, dtype=torch.bool)
        maps = []
        for variant, size, mask in zip(variants, sizes, pixel_mask, strict=True):
            mask[: size[0], : size[1]] = True
            key = variant, (height, width)
            found = self._maps.get(key)
            if found is None:
                sample = encoded.get(variant) or self._encode(variant)
                found = self._compute(sample, (height, width))
                if self._memory.take(sum(level.nbytes for level in found), self._count()):
                    self._maps[key] = found
            maps.append(found)
        levels = tuple(torch.stack(level) for level in zip(*maps, strict=True))
        return {"feature_maps": levels, "pixel_mask": pixel_mask, "labels": labels}

    def _encode(self, variant: Variant) -> EncodedSample:
        index, is_flipped = variant
        sample = self._transforms[is_flipped](self.data.read(index))
        return self.data.processor.encode(sample)

    def _compute(self, sample: EncodedSample, size: tuple[int, int]) -> tuple[Tensor, ...]:
        pixels = sample["pixel_values"]
        padded = pixels.new_zeros(1, len(pixels), *size)
        padded[0, :, : pixels.shape[1], : pixels.shape[2]] = pixels
        with self._accelerator.autocast():
            maps = self._model.backbone_maps(padded.to(self._accelerator.device))
        return tuple(level[0].cpu() for level in maps)

    def _count(self) -> int:
        return len(self) * (1 if self._flip is None else 2)


def refuse_learning(backbone: nn.Module) -> None:
    """Reject a backbone whose maps change during training.

    Raises:
        ValueError: a parameter is trained, or something is random or updates its statistics.
    """
    learning = [name for name, value in backbone.named_parameters() if value.requires_grad]
    if learning:
        raise ValueError(
            _why(
                f"{len(learning)} parameters of the backbone learn, such as {learning[0]} (freeze "
                f"all of it: model.backbone_norm=frozen and all stages in "
                f"model.backbone_frozen_stages)"
            )
        )
    was_training = backbone.training
    backbone.train()
    moving = [
        name
        for name, module in backbone.named_modules()
        if module.training
        and (isinstance(module, _BatchNorm) or any(getattr(module, key, 0) for key in _CHANCES))
    ]
    backbone.train(was_training)
    if moving:
        raise ValueError(_why(f"{moving[0]} of the backbone gives other numbers in each step"))


def _why(reason: str) -> str:
    return (
        f"train.feature_cache_gib keeps what a backbone makes of an image and of its mirror image, "
        f"but {reason}; change that or set train.feature_cache_gib=0"
    )
