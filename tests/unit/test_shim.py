"""The file that imports the package."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from detrelay.heads import HEADS
from hub_model import complete


def test_shim_names_the_classes_and_asks_for_the_package(folder: Path) -> None:
    copy = complete(folder).folder
    config = json.loads((copy / "config.json").read_text())
    processor = json.loads((copy / "preprocessor_config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "modeling_detrelay.StageInteractorConfig",
        "AutoModelForObjectDetection": "modeling_detrelay.StageInteractorForObjectDetection",
        "AutoImageProcessor": "modeling_detrelay.DetrelayImageProcessor",
    }
    assert processor["auto_map"]["AutoImageProcessor"] == config["auto_map"]["AutoImageProcessor"]
    shim = (copy / "modeling_detrelay.py").read_text()
    names: dict[str, object] = {}
    exec(shim, names)
    assert names["StageInteractorConfig"] is HEADS["stageinteractor"].config
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "detrelay.heads.stageinteractor.head", None)
        with pytest.raises(ImportError, match=r"needs the Python package detrelay .*pip install"):
            exec(shim, {})
    # transformers reads the imports and would refuse with less help those outside of a `try`
    assert [type(node) for node in ast.parse(shim).body[1:]] == [ast.Try, ast.Assign]
