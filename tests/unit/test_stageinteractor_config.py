"""StageInteractor's configuration: what is rejected, and the published model."""

from __future__ import annotations

from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError

from detrelay.heads.stageinteractor.config import StageInteractorConfig
from factories import small_config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_groups": 5}, r"d_model \(32\) must be a multiple of num_groups \(5\)"),
        ({"num_attention_heads": 3}, "multiple of num_attention_heads"),
        ({"num_out_points": 7}, "num_out_points must be even"),
        ({"max_reused_filters": -1}, "max_reused_filters must be >= 0"),
        ({"num_queries": 0}, "num_queries must be at least 1"),
        ({"initial_boxes": "corner"}, "'image', 'grid'"),
        ({"num_levels": 5}, r"num_levels must lie in 1\.\.4"),
        ({"d_model": 48}, "multiple of 32"),
        ({"backbone_frozen_stages": 9}, r"must lie in 0\.\.4"),
        ({"num_querys": 3}, "has no option 'num_querys'; did you mean 'num_queries'"),
        ({"id2label": {0: "a", 2: "b"}}, r"classes 0\.\.1; found \[0, 2\]"),
        ({"num_queries": 2.5}, "'num_queries' expected int, got float"),
        ({"d_model": "64"}, "'d_model' expected int, got str"),
        ({"backbone_name": "resnet5"}, "unknown backbone resnet5; did you mean resnet50"),
        ({"category_ids": [1, 2]}, r"one id per class \(4\); found 2"),
    ],
)
def test_bad_configs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError, StrictDataclassError), match=message):
        small_config(**changes)


def test_default_config_is_the_published_model() -> None:
    config = StageInteractorConfig()
    assert (config.num_queries, config.d_model, config.num_stages) == (100, 256, 6)
    assert config.num_labels == 80
    assert [config.mixing_shape(stage).reused for stage in range(6)] == [0, 0, 1, 2, 3, 4]
