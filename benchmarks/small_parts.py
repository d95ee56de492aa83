"""Parts of a step in two ways, alternating in one process: CPU time of one thread, medians.

    python benchmarks/small_parts.py
    python benchmarks/small_parts.py --parts layout --height 480 --width 640

layout: ResNet-50 and a channel mapper, pixels channels-first and channels-last, modules one by one.
folded: ResNet-50 and ResNet-18, module by module and with convolution, norm and ReLU in one call.
collate: a batch as it was made before (zeroed as a whole, int64 mask), and as it is made now;
    resizing and normalising one of its images beside it.
labels: cross-stage labels stage by stage on the device, and on the host after one transfer.
matching: 13 groups x 6 stages x 16 images, by the loop of released matchers (a stage's costs of
    every query with the targets of all images, then scipy image by image), by a loop that costs
    and matches each image alone, and in one call; scipy alone on costs that are there beside it.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import tyro
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from detrelay.assigners import CrossStageAssigner, HungarianAssigner
from detrelay.core.backbones import build_backbone
from detrelay.core.boxes import cxcywh_to_xyxy, giou, iou
from detrelay.core.data.collate import EncodedSample, collate
from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.detector.pyramid import ChannelMapper
from detrelay.core.structures import Assignment, Pairs, StagePrediction, Targets

Part = Literal["layout", "folded", "collate", "labels", "matching"]
_IMAGES = 4
_OBJECTS = 7  # the average of a COCO image
_GROUPS, _STAGES = 13, 6  # of RF-DETR in training; of most decoders


@dataclass(frozen=True)
class Arguments:
    """Time parts of a step in two ways."""

    parts: tuple[Part, ...] = ("layout", "folded", "collate", "labels", "matching")
    """What to time."""
    height: int = 800
    """Of the images, pixels."""
    width: int = 1344
    """Of the images, pixels."""
    stages: int = 12
    """Stages of the decoder whose labels are shared."""
    repeats: int = 7
    """How often to run each way."""


def in_turns(ways: Mapping[str, Callable[[], Any]], repeats: int) -> None:
    """Print the median CPU time of each way, and its ratio to the first."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            start = time.process_time()
            way()
            if turn:  # the first turn warms up
                seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    first = next(iter(medians.values()))
    for name, median in medians.items():
        print(f"  {name:36} {median * 1e3:9.2f} ms  {median / first:5.2f}", flush=True)


def time_layout(arguments: Arguments) -> None:
    """Backbone and neck, without gradients and with them."""
    backbone = build_backbone("resnet50", "eval", 1).train()  # its norms stay frozen
    for module in backbone.modules():  # a module with a hook is not left out
        module.register_forward_hook(lambda *_: None)
    neck = ChannelMapper(backbone.channels, 256)
    pixels = torch.randn(1, 3, arguments.height, arguments.width)

    def forward(layout: torch.memory_format) -> tuple[Tensor, ...]:
        levels: tuple[Tensor, ...] = neck(backbone(pixels.contiguous(memory_format=layout)))
        return levels

    def learn(layout: torch.memory_format) -> None:
        torch.stack([level.sum() for level in forward(layout)]).sum().backward()

    def infer(layout: torch.memory_format) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return forward(layout)

    layouts = {"first": torch.contiguous_format, "last": torch.channels_last}
    first, last = (infer(layout) for layout in layouts.values())
    apart = max(float((a - b).abs().max()) for a, b in zip(first, last, strict=True))
    print(f"layout: 1 x {arguments.height} x {arguments.width}, maps differ by {apart:.1e} at most")
    for what, run in {"inference": infer, "with gradients": learn}.items():
        ways = {
            f"{what}, channels-{name}": lambda run=run, layout=layout: run(layout)
            for name, layout in layouts.items()
        }
        in_turns(ways, arguments.repeats)


def time_folded(arguments: Arguments) -> None:
    """Backbones at the size asked for and at a small one."""
    for name, height, width in (
        ("resnet50", arguments.height, arguments.width),
        ("resnet50", 320, 320),
        ("resnet18", 128, 128),
    ):
        backbone, pixels = build_backbone(name, "eval", 1).eval(), torch.randn(1, 3, height, width)

        def modules(backbone: Any = backbone, pixels: Tensor = pixels) -> tuple[Tensor, ...]:
            # a module with a hook is not left out
            hooks = [each.register_forward_hook(lambda *_: None) for each in backbone.modules()]
            with torch.no_grad():
                maps: tuple[Tensor, ...] = backbone(pixels)
            for hook in hooks:
                hook.remove()
            return maps

        def folded(backbone: Any = backbone, pixels: Tensor = pixels) -> tuple[Tensor, ...]:
            with torch.no_grad():
                maps: tuple[Tensor, ...] = backbone(pixels)
            return maps

        pairs = zip(modules(), folded(), strict=True)
        apart = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
        print(f"folded: {name}, 1 x {height} x {width}, maps differ by {apart:.1e} of the largest")
        in_turns({"module by module": modules, "one call each": folded}, arguments.repeats)


def collate_before(items: Sequence[EncodedSample]) -> dict[str, Tensor]:
    """A batch whose memory is written twice, with a mask of 8 bytes per pixel."""
    images = [item["pixel_values"] for item in items]
    shape = [-(-max(image.shape[axis] for image in images) // 32) * 32 for axis in (1, 2)]
    pixel_values = images[0].new_zeros(len(images), 3, *shape)
    pixel_mask = torch.zeros(len(images), *shape, dtype=torch.int64)
    for row, image in enumerate(images):
        pixel_values[row, :, : image.shape[-2], : image.shape[-1]] = image
        pixel_mask[row, : image.shape[-2], : image.shape[-1]] = 1
    return {"pixel_values": pixel_values, "pixel_mask": pixel_mask}


def time_collate(arguments: Arguments) -> None:
    """Four images of 480 x 640 at the size asked for, one a little narrower than the batch."""
    processor = DetrelayImageProcessor()
    source = torch.randint(0, 256, (3, 480, 640), dtype=torch.uint8)
    size = [arguments.height, arguments.width - 22]
    resized = resize(source, size, antialias=True)

    def normalize() -> Tensor:
        values: Tensor = processor.rescale_and_normalize(
            resized, True, processor.rescale_factor, True, processor.image_mean, processor.image_std
        )
        return values

    item: EncodedSample = {"pixel_values": normalize(), "labels": {}}
    items = [item] * _IMAGES
    before, now = collate_before(items), collate(items)
    assert torch.equal(before["pixel_values"], now["pixel_values"])
    assert torch.equal(before["pixel_mask"].bool(), now["pixel_mask"])
    print(f"collate: {_IMAGES} images of {size[0]} x {size[1]}, equal bit for bit")
    ways = {"collate before": lambda: collate_before(items), "collate now": lambda: collate(items)}
    in_turns(ways, arguments.repeats)
    print("  beside it, one image:")
    alone = {"resize": lambda: resize(source, size, antialias=True), "normalise": normalize}
    in_turns(alone, arguments.repeats)


def share_labels_before(
    stages: Sequence[StagePrediction], targets: Targets, own: Sequence[Assignment]
) -> list[Pairs]:
    """The released rule with masks and `unique` for every pair of stages."""
    result = []
    for index, stage in enumerate(stages):
        kept = []
        for pairs in (assignment.classes for assignment in own[max(0, index - 1) :]):
            predicted = cxcywh_to_xyxy(stage.boxes[pairs.image, pairs.query])
            target = cxcywh_to_xyxy(targets.boxes[pairs.target])
            kept.append(pairs.select(iou(predicted, target) >= 0.5))
        found = Pairs.cat(kept)
        columns = torch.stack([found.target, found.query, found.image], dim=1).unique(dim=0)
        result.append(Pairs(image=columns[:, 2], query=columns[:, 1], target=columns[:, 0]))
    return result


def time_labels(arguments: Arguments) -> None:
    """16 images of 7 objects, 300 queries; one query near each object in every stage."""
    images, queries = 16, 300
    image = torch.arange(images).repeat_interleave(_OBJECTS)
    boxes = torch.rand(len(image), 4) * 0.3 + 0.3
    targets = Targets(torch.zeros(len(image), dtype=torch.int64), boxes, image, images)
    stages = []
    for _ in range(arguments.stages):
        predicted = torch.rand(images, queries, 4)
        predicted[image, torch.randint(queries, image.shape)] = boxes + 0.02 * torch.randn(
            boxes.shape
        )
        stages.append(StagePrediction(torch.zeros(images, queries, 1), predicted))
    own = HungarianAssigner()(stages, targets)
    assigner = CrossStageAssigner(lambda *_: own)
    before = share_labels_before(stages, targets, own)
    for pairs, assignment in zip(before, assigner(stages, targets), strict=True):
        assert torch.equal(pairs.query, assignment.classes.query)
        assert torch.equal(pairs.target, assignment.classes.target)
    print(f"labels: {arguments.stages} stages, equal pairs, matching not counted")
    ways = {
        "stage by stage": lambda: share_labels_before(stages, targets, own),
        "on the host": lambda: assigner(stages, targets),
    }
    in_turns(ways, arguments.repeats)


def released_costs(stage: StagePrediction, targets: Targets) -> Tensor:
    """Costs [B, Q, T] of every query with the targets of all images, as released matchers do."""
    p = stage.logits.flatten(0, 1).sigmoid()
    negative = 0.75 * p**2 * -(1 - p + 1e-12).log()
    positive = 0.25 * (1 - p) ** 2 * -(p + 1e-12).log()
    classes = positive[:, targets.labels] - negative[:, targets.labels]
    boxes = stage.boxes.flatten(0, 1)
    apart = torch.cdist(boxes, targets.boxes, p=1)
    overlap = giou(cxcywh_to_xyxy(boxes)[:, None], cxcywh_to_xyxy(targets.boxes)[None])
    return (5 * apart + 2 * classes - 2 * overlap).view(*stage.logits.shape[:2], -1)


def match_as_released(stages: Sequence[StagePrediction], targets: Targets) -> list[list[Any]]:
    """For each stage and image, rows and columns."""
    sizes = targets.image.bincount(minlength=targets.batch_size).tolist()
    result = []
    for stage in stages:
        tables = released_costs(stage, targets).cpu().split(sizes, -1)
        result.append([linear_sum_assignment(table[i]) for i, table in enumerate(tables)])
    return result


def match_image_by_image(stages: Sequence[StagePrediction], targets: Targets) -> list[list[Any]]:
    """The same with the costs of an image's own targets only."""
    result = []
    for stage in stages:
        found = []
        for i in range(targets.batch_size):
            own = targets.image == i
            alone = Targets(targets.labels[own], targets.boxes[own], targets.image[own] * 0, 1)
            only = StagePrediction(stage.logits[i : i + 1], stage.boxes[i : i + 1])
            found.append(linear_sum_assignment(released_costs(only, alone)[0]))
        result.append(found)
    return result


def time_matching(arguments: Arguments) -> None:
    """300 queries, 80 classes, 7 objects an image, untrained predictions."""
    images, queries, classes = 16, 300, 80
    image = torch.arange(images).repeat_interleave(_OBJECTS)
    boxes = torch.rand(len(image), 4) * 0.3 + 0.2
    targets = Targets(torch.randint(classes, image.shape), boxes, image, images)
    groups = [
        [
            StagePrediction(
                torch.randn(images, queries, classes) - 3, torch.rand(images, queries, 4) * 0.5
            )
            for _ in range(_STAGES)
        ]
        for _ in range(_GROUPS)
    ]
    assigner = HungarianAssigner()
    for stages, found in zip(groups, assigner.assign_groups(groups, targets), strict=True):
        for rows, assignment in zip(match_as_released(stages, targets), found, strict=True):
            query = torch.cat([torch.as_tensor(q[t.argsort()]) for q, t in rows])
            assert torch.equal(query, assignment.boxes.query)
    tables = [assigner.tables(stage, targets)[0].numpy() for own in groups for stage in own]
    by_image = [table.reshape(images, _OBJECTS, queries) for table in tables]
    print(f"matching: {_GROUPS} groups x {_STAGES} stages x {images} images, equal pairs")
    ways = {
        "loop as released": lambda: [match_as_released(stages, targets) for stages in groups],
        "loop, image by image": lambda: [
            match_image_by_image(stages, targets) for stages in groups
        ],
        "one call": lambda: assigner.assign_groups(groups, targets),
        "scipy alone, costs not counted": lambda: [
            linear_sum_assignment(one.astype(np.float64).T) for own in by_image for one in own
        ],
    }
    in_turns(ways, arguments.repeats)


def main(arguments: Arguments) -> None:
    """Time the requested parts."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    timers = {
        "layout": time_layout,
        "folded": time_folded,
        "collate": time_collate,
        "labels": time_labels,
        "matching": time_matching,
    }
    for part in arguments.parts:
        timers[part](arguments)
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
