"""Query features: planted facts."""

from __future__ import annotations

import numpy as np
import pytest

from detrelay.core.evaluation.query_features import QueryFeatures, feature_maps, separability


def planted_features() -> QueryFeatures:
    """24 queries, 2 in each of 12 images, of classes 0 and 1, in three stages of 6 channels.

    The first stage says nothing, the second mixes up one half of class 1, the third says all.
    """
    category = np.tile([0, 1], 12)
    values = np.zeros((3, 24, 6), dtype=np.float32)
    values[1, :, 0] = category * (np.arange(24) % 4 == 1)
    values[2, :, 3] = 2 * category - 1
    return QueryFeatures(values, category, np.repeat(np.arange(12), 2))


def test_separability_is_told_apart_on_images_that_were_not_learned() -> None:
    pytest.importorskip("sklearn")
    probe = separability(planted_features())
    assert probe is not None
    assert (probe.learned, probe.held_out, probe.chance) == (12, 12, 0.5)
    nothing, half, everything = probe.right
    assert nothing == 0.5
    assert 0.5 < half < 1
    assert everything == 1


def test_one_class_or_one_image_has_no_separability() -> None:
    features = planted_features()
    alone = QueryFeatures(features.values[:, :2], features.category[:2], features.image[:2])
    assert separability(alone) is None
    same = QueryFeatures(features.values, np.zeros(24, dtype=np.int64), features.image)
    assert separability(same) is None


def test_feature_maps_show_the_same_queries_in_every_stage() -> None:
    pytest.importorskip("sklearn")
    features = planted_features()
    maps = feature_maps(features)
    assert maps is not None
    assert maps.places.shape == (3, 24, 2)
    assert maps.category.tolist() == features.category.tolist()
    assert not maps.places[0].any()  # features that do not vary have one place
    first, second = (maps.places[2][features.category == value] for value in (0, 1))
    apart = np.linalg.norm(first.mean(axis=0) - second.mean(axis=0))
    assert apart > 3 * max(first.std(), second.std()) / 2
    few = QueryFeatures(features.values[:, :4], features.category[:4], features.image[:4])
    assert feature_maps(few) is None


def test_queries_to_look_at_are_spread_over_all_images() -> None:
    spread = planted_features().spread(4)
    assert spread.image.tolist() == [0, 4, 7, 11]
    assert spread.values.shape == (3, 4, 6)
