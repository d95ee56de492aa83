"""The configuration shared by all detectors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForObjectDetection

import detrelay.heads  # noqa: F401 - registers the Auto classes
from detrelay.core.data.image_processing import DetrelayImageProcessor
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


EARLIER = json.loads((Path(__file__).parents[1] / "assets" / "earlier_models.json").read_text())


@pytest.mark.parametrize("case", EARLIER)
def test_models_saved_by_earlier_code_still_fit(case: str, tmp_path: Path) -> None:
    """Settings, and names and shapes of weights (* is a number), as saved by commit 8a41701."""
    earlier = EARLIER[case]
    (tmp_path / "config.json").write_text(json.dumps(earlier["config"]))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(earlier["processor"]))
    config = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForObjectDetection.from_config(config)
    shapes: dict[str, list[list[int]]] = {}
    for name, value in model.state_dict().items():
        shapes.setdefault(re.sub(r"\d+", "*", name), []).append(list(value.shape))
    assert {
        name: [len(found), sorted(map(list, set(map(tuple, found))))]
        for name, found in shapes.items()
    } == earlier["weights"]
    assert model.config.category_ids == [7, 3, 90, 11]
    processor = DetrelayImageProcessor.from_pretrained(tmp_path)
    assert processor.size == {"shortest_edge": 64, "longest_edge": 96}
