"""Numbers of released training targets: the scenes, and how results are compared with them."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

from detrelay.core.criterion import Criterion, CriterionOutput
from detrelay.core.structures import Pairs, StageGroup, StagePrediction, Targets

# another folder with files of the same names and keys may be named
FOLDER = Path(
    os.environ.get("DETRELAY_TARGET_VECTORS", Path(__file__).parent / "assets" / "targets")
)


@cache
def load(name: str) -> dict[str, Tensor]:
    file = FOLDER / f"{name}.safetensors"
    if file.is_file():
        return load_tensors(file.read_bytes())
    return load_tensors(gzip.decompress(file.with_suffix(".safetensors.gz").read_bytes()))


def scene_names(method: str) -> list[str]:
    """The scenes for which a method has numbers."""
    return sorted({key.partition(".")[0] for key in load(method)})


@dataclass
class Scene:
    """Inputs of one scene in float64, as leaves of the graph, and a method's numbers."""

    name: str
    inputs: dict[str, Tensor]
    expected: dict[str, Tensor]
    targets: Targets

    def stages(self, kind: str = "") -> list[StagePrediction]:
        """Predictions of "" (the decoder), "extra", "twin" or "group"."""
        prefix = f"{kind}_" if kind else ""
        logits, boxes = self.inputs[f"{prefix}logits"], self.inputs[f"{prefix}boxes"]
        return [StagePrediction(*pair) for pair in zip(logits, boxes, strict=True)]

    def proposals(self, count: int | None = None) -> StagePrediction:
        logits, boxes = self.inputs["prop_logits"], self.inputs["prop_boxes"]
        return StagePrediction(logits[:, :count], boxes[:, :count])

    def number(self, key: str) -> float:
        return self.expected[key].item()

    @property
    def counts(self) -> list[int]:
        """Targets of each image."""
        return self.targets.image.bincount(minlength=self.targets.batch_size).tolist()


def scene(method: str, name: str) -> Scene:
    def own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            key.removeprefix(f"{name}."): value
            for key, value in tensors.items()
            if key.startswith(f"{name}.")
        }

    raw, expected = own(load("inputs")), own(load(method))
    batch = raw["logits"].shape[1]
    targets = Targets.from_labels(
        [
            {
                "class_labels": raw[f"target_labels.{b}"],
                "boxes": raw[f"target_boxes.{b}"].double(),
            }
            for b in range(batch)
        ]
    )
    inputs = {
        key: value.double().requires_grad_()
        for key, value in raw.items()
        if not key.startswith("target_")
    }
    return Scene(name, inputs, expected, targets)


def check_pairs(
    pairs: Pairs, expected: Sequence[Tensor], targets: Targets, ordered: bool = False
) -> None:
    """Compare pairs with [2, M] query and target of each image."""
    counts = targets.image.bincount(minlength=targets.batch_size)
    first = counts.cumsum(0) - counts
    for image, wanted in enumerate(expected):
        own = pairs.select(pairs.image == image)
        found = list(zip(own.query.tolist(), (own.target - first[image]).tolist(), strict=True))
        rows = [tuple(row) for row in wanted.T.tolist()]
        assert (found if ordered else sorted(found)) == (rows if ordered else sorted(rows))


def stage_pairs(one: Scene, where: str, stage: int) -> list[Tensor]:
    """The expected pairs of every image at a stage."""
    return [one.expected[f"{where}.{stage}.{b}"] for b in range(one.targets.batch_size)]


def image_pairs(one: Scene, where: str) -> list[Tensor]:
    """The expected pairs of every image, where stages share them."""
    return [one.expected[f"{where}.{b}"] for b in range(one.targets.batch_size)]


def check_stages(output: CriterionOutput, one: Scene, group: str, where: str) -> None:
    """Compare class and box pairs of every stage of a group."""
    for stage, assignment in enumerate(output.assignments[group]):
        expected = stage_pairs(one, where, stage)
        check_pairs(assignment.classes, expected, one.targets)
        check_pairs(assignment.boxes, expected, one.targets)


def check_losses(
    losses: Mapping[str, Tensor],
    one: Scene,
    names: Mapping[str, str],
    group: str = "decoder",
    suffix: str = "",
    scale: float = 1.0,
    rel: float = 1e-10,
    prefix: str = "",
) -> None:
    """Compare every stage's losses.

    Args:
        losses: ours, by key.
        one: the scene.
        names: the released name of each term, such as class -> loss_ce.
        group: whose stages; the last one has a released name without number.
        suffix: end of the released names.
        scale: ours times this is the released number.
        rel: tolerance.
        prefix: begin of the released keys.
    """
    stages = 1 + max(int(key.split("/")[1]) for key in losses if key.startswith(f"{group}/"))
    for term, name in names.items():
        for stage in range(stages):
            number = "" if stage == stages - 1 else f"_{stage}"
            key = f"{prefix}loss.{name}{number}{suffix}"
            close(losses[f"{group}/{stage}/{term}"] * scale, one.expected[key], rel, key)


def close(found: Tensor, expected: Tensor, rel: float, key: str) -> None:
    limit = rel * max(1.0, expected.double().abs().max().item())
    difference = (found.detach().double() - expected.double()).abs().max().item()
    assert difference <= limit, (key, found, expected, difference)


def check_total(
    output: CriterionOutput, one: Scene, rel: float = 1e-10, grad: float = 1e-6, prefix: str = ""
) -> None:
    """Compare the weighted total and the gradient of every input."""
    close(output.total, one.expected[f"{prefix}loss.total_weighted"], rel, "total")
    output.total.backward()
    checked = 0
    for key, expected in one.expected.items():
        if key.startswith(f"{prefix}grad."):
            leaf = one.inputs[key.removeprefix(f"{prefix}grad.")]
            found = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            limit = grad * max(expected.abs().max().item(), 1e-3)
            assert (found - expected.double()).abs().max().item() <= limit, key
            checked += 1
    assert checked


def check_values(
    output: CriterionOutput,
    one: Scene,
    where: str,
    stages: Sequence[StagePrediction],
    value: Callable[[StagePrediction, Pairs], Tensor],
    prefix: str = "",
) -> None:
    """Compare the score that every pair aims at, and its weight where that is named."""
    first = torch.tensor(one.counts).cumsum(0) - torch.tensor(one.counts)
    for index, (stage, assignment) in enumerate(
        zip(stages, output.assignments[where], strict=True)
    ):
        boxes = assignment.boxes
        columns = (boxes.image.tolist(), boxes.query.tolist(), boxes.target.tolist())
        row_of = {key: row for row, key in enumerate(zip(*columns, strict=True))}
        for image, rows in enumerate(stage_pairs(one, f"{prefix}match.{where}", index)):
            keys = [(image, q, t + int(first[image])) for q, t in rows.T.tolist()]
            pairs = boxes.select(torch.tensor([row_of[key] for key in keys], dtype=torch.int64))
            weights = pairs.weights(stage.logits)
            found = {"value": value(stage, pairs).detach() * weights, "weight": weights}
            for what, numbers in found.items():
                key = f"{prefix}{what}.{where}.{index}.{image}"
                if what == "value" or key in one.expected:
                    expected = one.expected[key].double()
                    torch.testing.assert_close(numbers, expected, rtol=0, atol=1e-6)


def group(name: str, stages: Sequence[StagePrediction], **facts: object) -> StageGroup:
    return StageGroup(name, tuple(stages), **facts)  # type: ignore[arg-type]


def run(criterion: Criterion, groups: Sequence[StageGroup], one: Scene) -> CriterionOutput:
    return criterion(groups, one.targets)


def denoising_groups(one: Scene, kind: str = "extra") -> list[StageGroup]:
    """Rows of another prediction as denoising queries: each group starts with its positives."""
    if "dn.groups" not in one.expected:
        return []
    groups, size = int(one.number("dn.groups")), int(one.number("dn.group_size"))
    counts = torch.tensor(one.counts)
    place = torch.arange(len(one.targets)) - (counts.cumsum(0) - counts)[one.targets.image]
    known = Pairs(
        one.targets.image.repeat(groups),
        torch.cat([place + g * size for g in range(groups)]),
        torch.arange(len(one.targets)).repeat(groups),
    )
    rows = groups * size
    stages = [
        replace(s, logits=s.logits[:, :rows], boxes=s.boxes[:, :rows]) for s in one.stages(kind)
    ]
    return [group("denoising", stages, known_pairs=known)]
