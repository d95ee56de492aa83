from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from detrelay.core.criterion import Criterion
from detrelay.core.losses import LossConfig
from detrelay.core.structures import StageGroup, StagePrediction, Targets
from detrelay.heads import DinoConfig, DnDetrConfig
from detrelay.heads.deformable.denoising import Denoising, no_targets
from detrelay.heads.deformable.dn_detr import _silence
from factories import mask_beside

BOXES = torch.tensor([[0.4, 0.5, 0.1, 0.2], [0.6, 0.4, 0.2, 0.1], [0.5, 0.6, 0.1, 0.1]])
# two objects in the first image, one in the second
TARGETS = Targets(torch.tensor([3, 1, 2]), BOXES, torch.tensor([0, 0, 1]), 2)


def contrastive(**changes: float | int | None) -> Denoising:
    config = DinoConfig(num_labels=5, d_model=32, **changes)
    return Denoising(config, label_dim=32, contrastive=True, epsilon=1e-3)


def plain(**changes: float | int | None) -> Denoising:
    config = DnDetrConfig(num_labels=5, d_model=32, **changes)
    return Denoising(config, label_dim=31, contrastive=False, epsilon=1e-5)


def test_groups_hold_near_and_far_copies() -> None:
    queries = contrastive(denoising_groups=2)(TARGETS, 3)
    # group by group: 2 near, 2 far; the second image uses one of two places
    assert queries.used.tolist() == [[True] * 8, [True, False] * 4]
    order = torch.stack([queries.pairs.image, queries.pairs.query, queries.pairs.target], 1)
    expected = [[0, 0, 0], [0, 1, 1], [1, 0, 2], [0, 4, 0], [0, 5, 1], [1, 4, 2]]
    assert order.tolist() == expected


def test_groups_see_themselves_and_the_decoder_but_not_each_other() -> None:
    mask = mask_beside(contrastive(denoising_groups=2)(TARGETS, 3), 3)
    expected = torch.zeros(11, 11, dtype=torch.bool)
    expected[:4, 4:8] = expected[4:8, :4] = True
    expected[8:, :8] = True
    assert torch.equal(mask, expected)


def test_number_of_groups_follows_the_fullest_image() -> None:
    assert contrastive(denoising_queries=10)(TARGETS, 3).used.shape == (2, 2 * 2 * 5)
    assert contrastive(denoising_queries=1)(TARGETS, 3).used.shape == (2, 2 * 2 * 1)
    assert plain()(TARGETS, 3).used.shape == (2, 2 * 5)


@pytest.mark.parametrize(("make", "copies"), [(contrastive, 2), (plain, 1)])
def test_padding_makes_few_numbers_of_queries(make: type, copies: int) -> None:
    sizes = {}
    for objects in range(1, 17):
        image = torch.zeros(objects, dtype=torch.int64)
        targets = Targets(image, BOXES[:1].expand(objects, 4), image, 1)
        queries = make(denoising_queries=32, denoising_groups=None, denoising_padding=True)(
            targets, 3
        )
        sizes[objects] = (queries.used.shape[1], queries.groups)
        assert int(queries.used.sum()) == copies * queries.groups * objects
        assert sorted(set(queries.pairs.target.tolist())) == list(range(objects))
    assert len(set(sizes.values())) == 5  # for 1, 2, 4, 8 and 16 places
    assert sizes[9] == sizes[16] == (copies * 32, 2)


@pytest.mark.parametrize("make", [contrastive, plain])
def test_no_objects_make_no_queries(make: type) -> None:
    denoising = make()
    queries = denoising(no_targets(2, BOXES), 3)
    assert queries.content.shape == (2, 0, 32)
    assert queries.references.shape == (2, 0, 4)
    mask = mask_beside(queries, 3)
    assert mask.shape == (3, 3)
    assert not mask.any()
    queries.content.sum().backward()
    assert denoising.labels.weight.grad is not None


def test_near_copies_move_less_than_a_half_side_and_far_ones_more() -> None:
    torch.manual_seed(0)
    target = Targets(TARGETS.labels[:1], BOXES[:1], TARGETS.image[:1], 1)
    boxes = contrastive(denoising_groups=200)(target, 1).references[0]
    low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    half = BOXES[0, 2:] / 2
    corners = torch.stack([BOXES[0, :2] - half, BOXES[0, :2] + half])
    moved = torch.stack([(low - corners[0]).abs(), (high - corners[1]).abs()]) / half
    # a far copy may turn inside out; then its size is cut to almost nothing
    whole = (boxes[:, 2:] > 2e-3).all(1)
    near = torch.arange(400) % 2 == 0
    assert moved[:, near].max() <= 1.001
    assert moved[:, near].max() > 0.9
    assert moved[:, ~near & whole].min() >= 0.999
    assert moved[:, ~near & whole].max() <= 2.001


def test_plain_copies_move_centre_and_size() -> None:
    torch.manual_seed(0)
    boxes = plain(denoising_groups=300)(TARGETS, 3).references[0, 0::2]
    assert boxes.shape == (300, 4)
    moved = (boxes - BOXES[0]).abs() / BOXES[0, [2, 3, 2, 3]]
    reach = moved.amax(0)
    torch.testing.assert_close(reach, torch.tensor([0.2, 0.2, 0.4, 0.4]), atol=0.01, rtol=0)


def test_labels_are_replaced_by_chance() -> None:
    torch.manual_seed(0)
    denoising = contrastive(denoising_groups=500, label_flip_chance=0.25)
    content = denoising(TARGETS, 3).content[0, 0::2]
    same = (content == denoising.labels.weight[3]).all(1).float().mean()
    # a replaced label may be the old one: 1 - 0.25 * 4 / 5
    assert same.item() == pytest.approx(0.8, abs=0.04)


def test_last_channel_tells_denoising_queries() -> None:
    queries = plain(label_flip_chance=0.0, box_noise_scale=0.0)(TARGETS, 3)
    assert torch.equal(queries.content[..., -1], queries.used.float())
    pairs = queries.pairs
    torch.testing.assert_close(
        queries.references[pairs.image, pairs.query], BOXES[pairs.target], atol=1e-6, rtol=0
    )


def test_unused_queries_of_dn_detr_cost_nothing() -> None:
    torch.manual_seed(0)
    queries = plain(denoising_groups=1)(TARGETS, 3)
    logits = torch.randn(2, 2, 5, requires_grad=True)
    stage = StagePrediction(logits, torch.rand(2, 2, 4))
    losses = []
    for shift in (0.0, 7.0):
        moved = logits.clone()
        moved[1, 1] += shift  # the place that the second image leaves empty
        noisy = _silence(replace(stage, logits=moved), queries.used)
        group = StageGroup("denoising", (noisy,), known_pairs=queries.pairs)
        losses.append(Criterion(LossConfig().terms(), {})((group,), TARGETS).total)
    assert losses[0] == losses[1]
    losses[0].backward()
    assert not logits.grad[1, 1].any()
    assert logits.grad[1, 0].any()


def crowd(*counts: int) -> Targets:
    """Images with so many objects; object t has class t % 5."""
    image = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    boxes = torch.rand(len(image), 4, generator=torch.Generator().manual_seed(0)) / 5 + 0.4
    return Targets(torch.arange(len(image)) % 5, boxes, image, len(counts))


@pytest.mark.parametrize(("make", "copies", "groups"), [(contrastive, 2, 1), (plain, 1, 5)])
def test_a_crowded_image_is_told_once(
    make: type, copies: int, groups: int, caplog: pytest.LogCaptureFixture
) -> None:
    denoising = make()
    assert denoising(crowd(30, 2), 300).used.shape[1] <= 300
    assert not caplog.records
    for _ in range(2):
        assert denoising(crowd(301, 2), 300).used.shape[1] == 301 * copies * groups
    assert len(caplog.records) == (301 * copies * groups > 600)
    assert all("an image with 301 objects makes" in text for text in caplog.messages)


@pytest.mark.parametrize("make", [contrastive, plain])
def test_the_limit_leaves_out_groups_and_then_targets(
    make: type, caplog: pytest.LogCaptureFixture
) -> None:
    limited = make(max_denoising_queries=40, label_flip_chance=0, box_noise_scale=0)
    torch.manual_seed(0)
    few = crowd(10, 2)
    queries = limited(few, 3)
    assert queries.used.shape[1] == 40  # all ten, in fewer groups
    assert set(queries.pairs.target.tolist()) == set(range(12))
    many = crowd(50, 2, 0)
    chosen = [limited(many, 3) for _ in range(2)]
    for queries in chosen:
        assert queries.used.shape == (3, 40)
        assert queries.used.sum(1).tolist()[2] == 0
        pairs = queries.pairs
        assert torch.equal(many.image[pairs.target], pairs.image)
        assert {50, 51} <= set(pairs.target.tolist())
        # every denoising query stands where its target is
        moved = queries.references[pairs.image, pairs.query]
        torch.testing.assert_close(moved, many.boxes[pairs.target], atol=1e-3, rtol=0)
        assert len({*zip(pairs.image.tolist(), pairs.query.tolist(), strict=True)}) == len(pairs)
    first, second = (set(queries.pairs.target.tolist()) for queries in chosen)
    assert first != second
    assert not caplog.records
