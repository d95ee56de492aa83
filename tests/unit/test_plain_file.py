"""Pipes and devices where a file is expected: rejected, not waited for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from detrelay.core.data.readers import coco, table
from detrelay.core.errors import DataError
from detrelay.core.evaluation.tables import read_detections
from detrelay.core.plain_file import refuse_endless
from detrelay.core.recipes.recipe import RecipeError, load_recipe
from detrelay.core.weights.files import read_weights


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no named pipes")
@pytest.mark.parametrize(
    "read",
    [
        *(coco.read, table.read_text, table.read_xml, table.read_json),
        *(read_detections, load_recipe, read_weights),
    ],
)
def test_pipes_and_devices_are_refused_by_every_reader(
    read: Callable[[Path], object], tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe.toml"
    os.mkfifo(pipe)
    (tmp_path / "zero.toml").symlink_to("/dev/zero")
    for path in (pipe, tmp_path / "zero.toml"):
        with pytest.raises((DataError, RecipeError, ValueError)) as error:
            read(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def test_files_folders_and_missing_paths_pass(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path, tmp_path / "missing"):
        refuse_endless(path)
    with pytest.raises(OSError, match="/dev/null is a pipe, socket or device, not a file"):
        refuse_endless(Path("/dev/null"))
