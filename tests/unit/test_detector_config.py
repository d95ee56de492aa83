"""The configuration shared by all detectors."""

from __future__ import annotations

from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError

from detrelay.core.detector.config import DetectorConfig, require_positive


def test_other_classes_leave_the_ids_of_the_old_ones_behind() -> None:
    config = DetectorConfig(id2label={0: "cat", 1: "dog"}, category_ids=[17, 18])
    assert config.class_names == ["cat", "dog"]
    config.id2label = {0: "cat", 1: "dog"}
    assert config.category_ids == [17, 18]
    config.id2label = {0: "cat", 1: "cup"}
    assert config.category_ids is None
    assert DetectorConfig().num_labels == 80


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"backbone_nam": "x"}, "has no option 'backbone_nam'; did you mean 'backbone_name'"),
        ({"id2label": {0: "a", 2: "b"}}, r"classes 0\.\.1; found \[0, 2\]"),
        ({"num_labels": 2, "category_ids": [1]}, r"one id per class \(2\); found 1"),
        ({"backbone_frozen_stages": 5}, r"must lie in 0\.\.4; found 5"),
        ({"backbone_drop_path": 0.1}, "is for Swin transformers; resnet50 has none"),
        (
            {"backbone_name": "swin_t", "backbone_drop_path": 1.0},
            r"must lie in \[0, 1\); found 1.0",
        ),
        ({"backbone_norm": "none"}, "backbone_norm"),
    ],
)
def test_what_no_model_can_be_built_from_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError, StrictDataclassError), match=message):
        DetectorConfig(**values)


def test_sizes_are_at_least_one_and_not_absurd() -> None:
    config = DetectorConfig()
    require_positive(config, "num_labels")
    config.backbone_frozen_stages = 0
    with pytest.raises(ValueError, match="backbone_frozen_stages must be at least 1; found 0"):
        require_positive(config, "backbone_frozen_stages")
    config.backbone_frozen_stages = 100_001
    with pytest.raises(ValueError, match="must be at most 100000; found 100001"):
        require_positive(config, "backbone_frozen_stages")
