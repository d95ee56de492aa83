"""AdaMixer as released: its entries, and its decoder reimplemented from the formulas.

Reference:
    Gao et al., CVPR 2022, section 3; MCG-NJU/AdaMixer, `adamixer_decoder_stage.py`,
    `adaptive_mixing_operator.py`, `sampling_3d_operator.py` and `query_generator.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reference import stageinteractor_value

STRIDES = (4, 8, 16, 32)
STAGE = "roi_head.bbox_head.{}."


def adamixer_shapes(
    channels: tuple[int, ...] = (256, 512, 1024, 2048),
    queries: int = 100,
    dim: int = 256,
    classes: int = 80,
    stages: int = 6,
    groups: int = 4,
    heads: int = 8,
    points: int = 32,
    patterns: int = 128,
    hidden: int = 2048,
) -> dict[str, list[int]]:
    """Shapes by name of everything but the backbone; the defaults are those of all configs."""
    width = dim // groups
    linears = {
        "attention.attn.out_proj": (dim, dim),
        "ffn.layers.0.0": (hidden, dim),
        "ffn.layers.1": (dim, hidden),
        "cls_fcs.0": (dim, dim),
        "reg_fcs.0": (dim, dim),
        "fc_cls": (classes, dim),
        "fc_reg": (4, dim),
        "sampling_n_mixing.sampling_offset_generator.0": (groups * points * 3, dim),
        "sampling_n_mixing.adaptive_mixing.parameter_generator.0": (
            groups * (width * width + points * patterns),
            dim,
        ),
        "sampling_n_mixing.adaptive_mixing.out_proj": (dim, groups * patterns * width),
    }
    shapes = {
        "rpn_head.init_proposal_bboxes.weight": [queries, 4],
        "rpn_head.init_content_features.weight": [queries, dim],
    }
    for level, count in enumerate(channels):
        shapes[f"neck.lateral_convs.{level}.conv.weight"] = [dim, count, 1, 1]
        shapes[f"neck.lateral_convs.{level}.conv.bias"] = [dim]
    norms = ["neck.gn_out"]
    for stage in map(STAGE.format, range(stages)):
        shapes[f"{stage}iof_tau"] = [heads]
        shapes[f"{stage}attention.attn.in_proj_weight"] = [3 * dim, dim]
        shapes[f"{stage}attention.attn.in_proj_bias"] = [3 * dim]
        for name, shape in linears.items():
            shapes[f"{stage}{name}.weight"] = list(shape)
            shapes[f"{stage}{name}.bias"] = [shape[0]]
        for name in ("attention_norm", "sampling_n_mixing.norm", "ffn_norm"):
            norms.append(stage + name)
        norms += [f"{stage}cls_fcs.1", f"{stage}reg_fcs.1"]
    for name in norms:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = [dim]
    return shapes


def adamixer_value(key: str, shape: list[int]) -> Tensor:
    """Value of an entry, by the rule for StageInteractor."""
    norm = "norm" in key or "_fcs.1." in key or ".gn_out." in key or ".bn" in key
    norm = norm or "downsample.1." in key
    twin = key.replace("bboxes.weight", "bboxes").replace(
        "sampling_offset_generator", "feat_extractor"
    )
    return stageinteractor_value(twin, tuple(shape), norm and key.endswith(".weight"))


def decode(
    weights: dict[str, Tensor], levels: list[Tensor], image_sizes: Tensor, groups: int
) -> list[tuple[Tensor, Tensor]]:
    """Logits [B, Q, K] and boxes [B, Q, 4] (x1, y1, x2, y2 in pixels) of every stage.

    Args:
        weights: under the released names, float64.
        levels: maps [B, C, H, W] behind the neck.
        image_sizes: height and width of the images, [B, 2].
        groups: G.
    """
    content = weights["rpn_head.init_content_features.weight"]
    count, dim = content.shape
    height, width = image_sizes.double()[:, None].expand(-1, count, -1).unbind(-1)
    box = torch.stack(
        [width / 2, height / 2, (width * height).sqrt().log2(), (height / width).log2()], dim=-1
    )
    content = F.layer_norm(content, (dim,)).expand(len(box), -1, -1)
    results = []
    while (prefix := STAGE.format(len(results))) + "iof_tau" in weights:
        stage = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        content = attend(stage, content + position(box, dim), box)
        content = mix(stage, sample(stage, content, box, levels, groups), content)
        hidden = linear(stage, "ffn.layers.0.0", content).relu()
        content = norm(stage, "ffn_norm", content + linear(stage, "ffn.layers.1", hidden))
        delta = branch(stage, "reg", content)
        center = box[..., :2] + delta[..., :2] * 2 ** box[..., 2:3]
        box = torch.cat([center, box[..., 2:] + delta[..., 2:]], dim=-1)
        results.append((branch(stage, "cls", content), corners(box)))
    return results


def linear(stage: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ stage[f"{name}.weight"].T + stage[f"{name}.bias"]


def norm(stage: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], stage[f"{name}.weight"], stage[f"{name}.bias"])


def branch(stage: dict[str, Tensor], kind: str, x: Tensor) -> Tensor:
    hidden = norm(stage, f"{kind}_fcs.1", linear(stage, f"{kind}_fcs.0", x)).relu()
    return linear(stage, f"fc_{kind}", hidden)


def extent(box: Tensor) -> Tensor:
    """Width and height."""
    z, r = box[..., 2], box[..., 3]
    return torch.stack([2**z * 2 ** (-r / 2), 2**z * 2 ** (r / 2)], dim=-1)


def corners(box: Tensor) -> Tensor:
    half = extent(box) / 2
    return torch.cat([box[..., :2] - half, box[..., :2] + half], dim=-1)


def position(box: Tensor, dim: int) -> Tensor:
    """Sine at even and cosine at odd positions, a quarter of them for each of x, y, z, r."""
    place = torch.arange(dim // 4, dtype=torch.float32)
    frequency = 10000 ** (2 * (place // 2) / (dim // 4))
    angle = (box / torch.tensor([1000, 1000, 1, 1]))[..., None] / frequency
    return torch.where(place % 2 == 0, angle.sin(), angle.cos()).flatten(2)


def attend(stage: dict[str, Tensor], x: Tensor, box: Tensor) -> Tensor:
    """Self-attention with the logarithm of intersection over own area on the logits."""
    edges = corners(box)
    low = torch.maximum(edges[:, :, None, :2], edges[:, None, :, :2])
    high = torch.minimum(edges[:, :, None, 2:], edges[:, None, :, 2:])
    own = (edges[..., 2] - edges[..., 0]) * (edges[..., 3] - edges[..., 1])
    overlap = (high - low).clamp(min=0).prod(-1) / own.clamp(min=1e-6)[:, :, None]
    packed = x @ stage["attention.attn.in_proj_weight"].T + stage["attention.attn.in_proj_bias"]
    heads = []
    tau = stage["iof_tau"]
    for scale, q, k, v in zip(
        tau, *(p.chunk(len(tau), -1) for p in packed.chunk(3, -1)), strict=True
    ):
        logits = q @ k.mT / q.shape[-1] ** 0.5 + scale * (overlap + 1e-7).log()
        heads.append(logits.softmax(-1) @ v)
    out = linear(stage, "attention.attn.out_proj", torch.cat(heads, dim=-1))
    return norm(stage, "attention_norm", x + out)


def sample(
    stage: dict[str, Tensor], x: Tensor, box: Tensor, levels: list[Tensor], groups: int
) -> Tensor:
    """Features [B, Q, G, P, C / G] at the points of every query."""
    offsets = linear(stage, "sampling_n_mixing.sampling_offset_generator.0", x)
    offsets = offsets.view(*x.shape[:2], groups, -1, 3)
    points = box[:, :, None, None, :2] + offsets[..., :2] * extent(box)[:, :, None, None]
    z = box[:, :, None, None, 2] + offsets[..., 2]
    octaves = torch.tensor(STRIDES).log2()
    weights = (-((z[..., None] - octaves) ** 2) / 2).softmax(-1)
    result = []
    for group in range(groups):
        features = 0
        for index, (level, stride) in enumerate(zip(levels, STRIDES, strict=True)):
            size = torch.tensor([level.shape[3], level.shape[2]]) * stride
            part = level.chunk(groups, dim=1)[group]
            grid = 2 * points[:, :, group] / size - 1
            found = F.grid_sample(part, grid, padding_mode="zeros", align_corners=False)
            features = features + found.permute(0, 2, 3, 1) * weights[:, :, group, :, index, None]
        result.append(features)
    return torch.stack(result, dim=2)


def mix(stage: dict[str, Tensor], features: Tensor, x: Tensor) -> Tensor:
    """Mix channels, then points, by filters generated from the query; no biases."""
    groups, points, width = features.shape[2:]
    name = "sampling_n_mixing.adaptive_mixing."
    filters = linear(stage, f"{name}parameter_generator.0", x).unflatten(-1, (groups, -1))
    channel = filters[..., : width * width].unflatten(-1, (width, width))
    spatial = filters[..., width * width :].unflatten(-1, (-1, points))
    mixed = features @ channel
    mixed = F.layer_norm(mixed, mixed.shape[-2:]).relu()
    mixed = spatial @ mixed
    mixed = F.layer_norm(mixed, mixed.shape[-2:]).relu()
    out = linear(stage, f"{name}out_proj", mixed.flatten(2))
    return norm(stage, "sampling_n_mixing.norm", x + out)
