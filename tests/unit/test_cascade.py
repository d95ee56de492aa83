"""A cascade with planted facts, reported by hand-counted figures."""

from __future__ import annotations

import numpy as np
import pytest

from detrelay.core.evaluation.cascade import (
    Cascade,
    ImageErrors,
    Instability,
    Labels,
    StageSimilarity,
    duplicates,
    hardest_images,
    instability,
    moved_labels,
    refinement,
    suppress,
)
from detrelay.core.evaluation.tables import Detections, GroundTruth
from factories_scores import found, truth


def labels(*pairs: tuple[int, int]) -> Labels:
    objects, queries = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return Labels(objects, queries)


A, B, C = range(3)  # small, large, medium; A and C of category 0, B of 1; C in image 1


@pytest.fixture
def cascade() -> Cascade:
    """Three stages, two images, four queries; the last stage does nothing.

    Stage 1 moves object A from query 0 to query 3, and puts three boxes right.
    """
    target_boxes = np.array([[0, 0, 20, 20], [100, 100, 200, 100], [50, 50, 50, 50]], dtype=float)
    boxes = np.tile(np.array([300, 300, 10, 10], dtype=np.float32), (3, 2, 4, 1))
    boxes[:, 0, 0] = [[0, 0, 20, 20], [0, 0, 20, 16], [0, 0, 20, 16]]  # IoU with A 1, 0.8, 0.8
    boxes[:, 0, 3] = [[0, 0, 20, 10], [0, 0, 20, 20], [0, 0, 20, 20]]  # IoU with A 0.5, 1, 1
    boxes[:, 0, 1] = [
        [100, 100, 100, 100],
        target_boxes[B],
        target_boxes[B],
    ]  # IoU with B 0.5, 1, 1
    boxes[:, 1, 2] = target_boxes[C]
    first, later = labels((A, 0), (B, 1), (C, 2)), labels((A, 3), (B, 1), (C, 2))
    return Cascade(
        image=np.array([0, 0, 1]),
        category=np.array([0, 1, 0]),
        target_boxes=target_boxes,
        image_sizes=np.full((2, 2), 400.0),
        boxes=boxes,
        own=(first, later, later),
        learned=(
            labels((A, 0), (A, 3), (B, 1)),  # A also to the query of stage 1; C is lost
            labels((A, 3), (A, 0), (B, 1), (C, 2)),
            labels((A, 3), (B, 1), (C, 2), (C, 0)),  # the last one from nowhere
        ),
    )


def test_matching_changes_are_counted(cascade: Cascade) -> None:
    moves, nothing = instability(cascade)
    assert moves == Instability(objects=3, moved=1, labelled=4, changed=2)
    assert moves.moved_share == pytest.approx(1 / 3)
    assert moves.changed_share == 0.5
    assert nothing == Instability(objects=3, moved=0, labelled=3, changed=0)


def test_a_swap_of_two_objects_changes_labels_of_other_classes_only(cascade: Cascade) -> None:
    swapped = Cascade(
        cascade.image, cascade.category, cascade.target_boxes, cascade.image_sizes, cascade.boxes,
        own=(labels((A, 0), (B, 1)), labels((A, 1), (B, 0))), learned=(),
    )  # fmt: skip
    (change,) = instability(swapped)
    assert change == Instability(objects=2, moved=2, labelled=2, changed=2)
    swapped.category[B] = 0
    assert instability(swapped)[0].changed == 0


def test_moved_labels_and_their_origin_are_counted(cascade: Cascade) -> None:
    moved = moved_labels(cascade, 2)
    assert moved.own == [3, 3, 3]
    assert moved.kept == [2, 3, 3]
    assert moved.moved == [1, 1, 1]
    assert moved.foreign == [0, 0, 1]
    assert moved.origin.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert moved.own_by_category.tolist() == [6, 3]
    assert moved.by_category.tolist() == [[1, 0], [1, 0], [1, 0]]
    assert moved.by_size.tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 0]]
    bins = np.zeros((3, 10), dtype=int)
    bins[0, 5] = bins[1, 8] = bins[2, 0] = 1
    assert moved.by_iou.tolist() == bins.tolist()


def test_boxes_are_followed_back_from_the_last_stage(cascade: Cascade) -> None:
    boxes = refinement(cascade)
    assert boxes.iou == pytest.approx([2 / 3, 1, 1])
    assert boxes.movement == pytest.approx([1 / 3, 0])
    assert boxes.all_movement == pytest.approx([(0.2 + 0.5 + 0.5) / 8, 0])


def test_nothing_to_find_is_no_number(cascade: Cascade) -> None:
    none = labels()
    empty = Cascade(
        cascade.image[:0], cascade.category[:0], cascade.target_boxes[:0], cascade.image_sizes,
        cascade.boxes,
        own=(none,) * 3, learned=(none,) * 3,
    )  # fmt: skip
    assert instability(empty)[0].moved_share is None
    assert refinement(empty).iou == [None] * 3
    assert moved_labels(empty, 2).moved == [0, 0, 0]


TRUTH = GroundTruth.from_coco(
    truth(
        [
            {"bbox": [0, 0, 20, 20]},
            {"bbox": [100, 100, 50, 50], "category_id": 9},
            {"bbox": [0, 0, 20, 20], "image_id": 2},
            {"bbox": [200, 200, 60, 60], "iscrowd": 1},
        ],
        num_images=3,
    )
)
FOUND = TRUTH.place(
    Detections.from_rows(
        [
            found(0.9, [0, 0, 20, 20]),
            found(0.8, [0, 0, 20, 19]),  # IoU 0.95 with the first
            found(0.7, [0, 0, 20, 11]),  # IoU 0.55 with the first, 0.58 with the second
            found(0.6, [0, 0, 20, 20], category=9),  # of another category
            found(0.5, [0, 0, 20, 5]),  # IoU 0.25
            found(0.4, [100, 100, 50, 50], category=9),
            found(0.4, [210, 210, 20, 20]),  # in the crowd
            found(0.1, [0, 0, 20, 20], image=2),  # below the threshold
        ]
    )
)


def test_duplicates_with_and_without_suppression() -> None:
    plain = duplicates(TRUTH, FOUND, 0.3)
    assert (plain.objects, plain.claims, plain.surplus) == (2, 4, 1.0)
    kept = suppress(FOUND, 0.57)
    assert sorted(kept.scores.tolist()) == [0.1, 0.4, 0.4, 0.5, 0.6, 0.7, 0.9]
    after = duplicates(TRUTH, kept, 0.3)
    assert (after.objects, after.claims, after.surplus) == (2, 3, 0.5)
    assert duplicates(TRUTH, FOUND, 0.99).surplus is None


def test_what_is_suppressed_suppresses_nothing() -> None:
    rows = [found(0.9, [0, 0, 10, 10]), found(0.8, [4, 0, 10, 10]), found(0.7, [8, 0, 10, 10])]
    kept = suppress(TRUTH.place(Detections.from_rows(rows)), 0.4)
    assert kept.scores.tolist() == [0.9, 0.7]


def test_hardest_images_come_first() -> None:
    assert hardest_images(TRUTH, FOUND, 0.3, 100, 5) == [
        ImageErrors(image=0, objects=2, missed=0, wrong=4),
        ImageErrors(image=1, objects=1, missed=1, wrong=0),
    ]
    assert len(hardest_images(TRUTH, FOUND, 0.3, 100, 1)) == 1


def test_similarity_of_stages() -> None:
    generator = np.random.default_rng(0)
    first = generator.normal(size=(60, 4))
    turned = 3 * first @ np.linalg.qr(generator.normal(size=(4, 4)))[0] + 5
    other = generator.normal(size=(60, 6))
    constant = np.ones((60, 2))
    similarity = StageSimilarity()
    for rows in (slice(0, 7), slice(7, 60)):  # batches
        similarity.add([first[rows], turned[rows], other[rows], constant[rows]])
    matrix = similarity.matrix()
    x, y = first - first.mean(0), other - other.mean(0)
    direct = np.square(y.T @ x).sum() / np.sqrt(np.square(x.T @ x).sum() * np.square(y.T @ y).sum())
    assert matrix[0, 1] == pytest.approx(1)
    assert matrix[0, 2] == matrix[2, 0] == pytest.approx(direct)
    assert 0 < direct < 0.5
    assert matrix[3].tolist() == [0, 0, 0, 0]
    assert matrix.diagonal()[:3] == pytest.approx(np.ones(3))
