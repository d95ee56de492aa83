"""Deterministic weights and inputs of the reference runs: made by rule, so nothing is stored."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor


def unit(key: str, shape: tuple[int, ...] | list[int]) -> Tensor:
    """Uniform float32 numbers of zero mean and unit variance, seeded by the key."""
    seed = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16)
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel()
    uniform = torch.rand(count, generator=generator, dtype=torch.float32)
    return ((uniform - 0.5) * 3.4641016151377544).reshape(shape)


def stageinteractor_value(key: str, shape: tuple[int, ...], is_norm: bool) -> Tensor:
    """Value of an official StageInteractor checkpoint entry in the reference runs."""
    u = unit(key, shape)
    if (constant := _stageinteractor_constant(key, u)) is not None:
        return constant
    if key.endswith("running_var"):
        return 1 + 0.1 * u.abs()
    if key.endswith("running_mean"):
        return 0.1 * u
    if key.endswith("init_content_features.weight"):
        return u
    if key.endswith("iof_tau"):
        return 2 + 0.5 * u
    if len(shape) >= 2:
        gain = 0.4 if ".fc_reg." in key else 0.25 if ".feat_extractor." in key else 1
        return u * (gain / math.sqrt(math.prod(shape[1:])))
    if is_norm:
        return 1 + 0.05 * u
    if key.endswith("fc_cls.bias"):
        return -2 + 0.3 * u
    if key.endswith("fc_reg.bias"):
        return 0.1 * u + torch.tensor([0, 0, -0.5, 0])
    if ".feat_extractor." in key:
        return 0.3 * u
    return 0.1 * u


def _stageinteractor_constant(key: str, u: Tensor) -> Tensor | None:
    if key.endswith("num_batches_tracked"):
        return torch.zeros_like(u, dtype=torch.int64)
    if "iou_snyc_statistics." in key:
        return torch.full_like(u, 0.5 if key.endswith("mean") else 0)
    if key.endswith("init_proposal_bboxes"):
        return torch.tensor([0.5, 0.5, 1, 1]).repeat(len(u), 1)
    return None


def deformable_value(key: str, shape: tuple[int, ...] | list[int]) -> Tensor:
    """Value of an official Deformable DETR or DINO checkpoint entry in the reference runs."""
    u = unit(key, shape).double()
    if key.endswith("num_batches_tracked"):
        value = torch.zeros_like(u)
    elif key.endswith("running_var"):
        value = 1 + 0.2 * u.abs()
    elif key.endswith("running_mean"):
        value = 0.1 * u
    elif len(shape) == 4:
        value = u * math.sqrt(2 / math.prod(shape[1:]))
    elif key.endswith("level_embed"):
        value = 0.5 * u
    elif key.endswith(("query_embed.weight", "tgt_embed.weight", "label_enc.weight")):
        value = u
    elif len(shape) == 2:
        gain = 0.3 if key.endswith("sampling_offsets.weight") else 1
        value = u * (gain / math.sqrt(shape[1]))
    else:
        value = _deformable_vector(key, u)
    return value.float().double()  # the runs started from float32 numbers


def _deformable_vector(key: str, u: Tensor) -> Tensor:
    if key.endswith("enc_output.bias"):
        return torch.zeros_like(u)
    if key.endswith("enc_output_norm.weight"):
        return -(1 + 0.1 * u)
    if key.endswith("weight"):
        return (1 + 0.1 * u) * (0.3 if ".bn3." in key else 1)
    if key.endswith("sampling_offsets.bias"):
        return 1.5 * u
    if "class_embed" in key:
        return -2 + 0.1 * u
    if "bbox_embed" in key and key.endswith("layers.2.bias"):
        return 0.3 * u
    return 0.05 * u


DEFORMABLE_TARGETS = (
    {
        "class_labels": (17, 1, 44),
        "boxes": ((0.30, 0.40, 0.20, 0.30), (0.62, 0.55, 0.50, 0.62), (0.80, 0.20, 0.11, 0.09)),
    },
    {
        "class_labels": (1, 3, 62, 90, 1),
        "boxes": (
            (0.25, 0.30, 0.30, 0.42),
            (0.52, 0.48, 0.22, 0.18),
            (0.71, 0.77, 0.40, 0.33),
            (0.12, 0.86, 0.10, 0.16),
            (0.33, 0.36, 0.34, 0.46),
        ),
    },
)


def deformable_images(
    sizes: tuple[tuple[int, int], ...], canvas: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Padded images [B, 3, H, W] of the reference runs, and their pixel mask."""
    pixels = torch.zeros(len(sizes), 3, *canvas, dtype=torch.float64)
    mask = torch.zeros(len(sizes), *canvas, dtype=torch.bool)
    for index, (height, width) in enumerate(sizes):
        pixels[index, :, :height, :width] = unit(f"input.image.{index}", (3, height, width))
        mask[index, :height, :width] = True
    return pixels, mask
