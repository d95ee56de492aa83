"""A model in memory: the processor and facts that are uploaded with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForObjectDetection

from detrelay.core.hub import push
from detrelay.core.hub.calls import HubError
from detrelay.core.hub.push import push_model
from hub_model import small_model


@pytest.fixture
def facts_of_push(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The facts that would be uploaded with a model."""

    def keep(folder: Path, repo_id: str, **options: object) -> Any:
        assert (folder / "preprocessor_config.json").is_file()
        return json.loads((folder / "training.json").read_text())

    monkeypatch.setattr(push, "publish", keep)
    return lambda model, **options: push_model(model, "tess/shapes", **options)


def test_facts_go_up_with_the_weights_that_they_are_about(
    folder: Path, facts_of_push: Callable[..., Any]
) -> None:
    model = AutoModelForObjectDetection.from_pretrained(folder)
    assert facts_of_push(model) == json.loads((folder / "training.json").read_text())
    assert facts_of_push(model, training={"seed": 3}) == {"seed": 3}
    next(model.parameters()).data.add_(1)
    assert facts_of_push(model) == {"init": str(folder)}


def test_a_processor_must_be_known(best: Path, facts_of_push: Callable[..., Any]) -> None:
    model = small_model()
    with pytest.raises(HubError, match="was not loaded from a folder, so no image processor"):
        facts_of_push(model)
    model.config.name_or_path = str(best.parent)
    with pytest.raises(
        HubError, match=r"its image processor cannot be loaded: .*; pass processor="
    ):
        facts_of_push(model)
