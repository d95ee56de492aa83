"""Formats and their requirements."""

from __future__ import annotations

from pathlib import Path

import pytest

from detrelay.core.export.runtimes import FORMATS, find_format, open_file, require, versions


def test_formats_are_found_by_name() -> None:
    assert find_format("onnx").file == "model.onnx"
    with pytest.raises(ValueError, match="unknown format onx; did you mean onnx"):
        find_format("onx")
    assert set(versions("torch-export")) == {"torch"}


def test_packages_that_are_missing_are_named_together() -> None:
    require("onnx", ("json", "math"))
    with pytest.raises(ValueError, match=r"needs nowhere_a, nowhere_b, .*detrelay\[openvino\]"):
        require("openvino", ("nowhere_a", "json", "nowhere_b"))
    with pytest.raises(ValueError, match="needs nowhere_a, not installed here: pip install nowhe"):
        require("torch-export", ("nowhere_a",))


@pytest.mark.parametrize("name", FORMATS)
def test_files_that_are_none_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    file = tmp_path / FORMATS[name].file
    with pytest.raises(ValueError, match="missing; export the model again"):
        open_file(name, file)
    file.write_bytes(b"none")
    with pytest.raises(ValueError, match=f"cannot be opened as {name}") as error:
        open_file(name, file)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="threads must be at least 1, found 0"):
        open_file(name, file, threads=0)
