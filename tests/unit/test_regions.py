"""Classification of annotated regions from the backbone's maps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from detrelay.core.detector.regions import RegionClassifier
from detrelay.core.losses import CLASS_PRIOR_BIAS
from detrelay.core.structures import Targets
from factories import make_head, make_targets


def ramp(height: int, width: int, stride: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A map whose value is the x of its cells' centres, in pixels."""
    x = (torch.arange(width, dtype=dtype) + 0.5) * stride
    return x.expand(2, 1, height, width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_region_is_scored_by_the_mean_over_its_box(dtype: torch.dtype) -> None:
    regions = RegionClassifier([1, 1], 3).to(dtype)
    with torch.no_grad():
        regions.classify.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [1, 1]]))
        regions.classify.bias.zero_()
    targets = Targets(
        labels=torch.tensor([0, 2, 1]),
        boxes=torch.tensor([[0.5, 0.5, 0.5, 0.25], [0.25, 0.5, 0.25, 0.5], [0.5, 0.4, 0.6, 0.2]]),
        image=torch.tensor([0, 0, 1]),
        batch_size=2,
    )
    maps = (ramp(16, 24, 4, dtype), ramp(8, 12, 8, dtype))
    sizes = torch.tensor([[64, 96], [64, 64]])  # the second image is padded
    group = regions(maps, (4, 8), targets, sizes)
    (stage,) = group.stages
    assert stage.logits.shape == (2, 3, 3)
    middle = torch.tensor([48.0, 24.0, 32.0])
    expected = torch.stack([middle, middle, 2 * middle], dim=1)
    scores = stage.logits[targets.image, torch.arange(3)].float()
    torch.testing.assert_close(scores, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5,
                               atol=0)  # fmt: skip
    empty = torch.tensor([[False, False, True], [True, True, False]])
    assert (stage.logits[empty].float() - CLASS_PRIOR_BIAS).abs().max() < 0.02
    assert group.known_pairs is not None
    assert group.known_pairs.query.tolist() == group.known_pairs.target.tolist() == [0, 1, 2]
    assert group.known_pairs.image.tolist() == [0, 0, 1]


@pytest.mark.parametrize("case", ["stageinteractor", "dino", "deformable_detr_two_stage"])
def test_regions_teach_the_backbone_of_every_head(case: str) -> None:
    model, criterion = make_head(case, classify_regions=True)
    targets = make_targets()
    groups = model(torch.randn(2, 3, 64, 96), targets=targets).groups
    result = criterion(groups, targets)
    assert result.losses["regions/0/l1"] == 0
    assert result.losses["regions/0/giou"] < 1e-4  # of the epsilon
    loss = result.losses["regions/0/class"]
    weight = model.backbone.get_parameter("conv1.weight")
    assert torch.autograd.grad(loss, weight)[0].abs().max() > 0
    assert [group.name for group in groups][-1] == "regions"
    facts = model.config.training_groups()
    assert facts is not None
    assert {fact.name for fact in facts} == {group.name for group in groups}


def test_regions_of_no_object_cost_nothing() -> None:
    model, criterion = make_head("stageinteractor", classify_regions=True)
    targets = make_targets((0, 0))
    result = criterion(model(torch.randn(2, 3, 64, 96), targets=targets).groups, targets)
    assert result.losses["regions/0/class"] == 0
    result.total.backward()  # every parameter has a gradient, so that processes agree
    assert model.regions is not None
    assert model.regions.classify.weight.grad is not None


def test_predictions_do_not_classify_regions() -> None:
    with_regions, _ = make_head("stageinteractor", classify_regions=True)
    plain, _ = make_head("stageinteractor")
    plain.load_state_dict(with_regions.state_dict(), strict=False)
    pixels = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        outputs = [model.eval()(pixels) for model in (with_regions, plain)]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert "regions.classify.weight" in with_regions.state_dict()
    assert not any(name.startswith("regions") for name in plain.state_dict())
