"""Parts by name, from a table or from a custom module."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from detrelay.core.registry import find_part, import_module, make_part


class Part:
    def __init__(self, size: int = 1, shared: str = "") -> None:
        if size < 1:
            raise ValueError(f"size must be positive, found {size}")
        self.size, self.shared = size, shared


TABLE: dict[str, Callable[..., object]] = {"part": Part}


def test_a_name_stands_for_its_entry_or_for_a_class_elsewhere() -> None:
    assert find_part("part", "part", TABLE) is Part
    assert find_part("part", "collections:Counter", {}) is sys.modules["collections"].Counter
    with pytest.raises(ValueError, match="unknown part 'parts'; did you mean 'part'"):
        find_part("part", "parts", TABLE)
    with pytest.raises(ValueError, match="part 'math:Pi': math has no class 'Pi'"):
        find_part("part", "math:Pi", TABLE)


def test_a_module_may_be_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "part_of_ones_own.py").write_text("SIZE = 3\n")
    (tmp_path / "part_that_fails.py").write_text("1 / 0\n")
    assert import_module("part", "x", "part_of_ones_own").SIZE == 3
    monkeypatch.delitem(sys.modules, "part_of_ones_own")
    with pytest.raises(ValueError, match="part 'x': No module named 'part_of_nobody'"):
        import_module("part", "x", "part_of_nobody")
    with pytest.raises(ValueError, match=r"part_that_fails cannot be imported \(ZeroDivision"):
        import_module("part", "x", "part_that_fails")
    with pytest.raises(ValueError, match="as Python imports it, not a path"):
        import_module("part", "x", "folder/part")


def test_options_win_over_what_is_given_and_unknown_ones_are_refused() -> None:
    part = make_part("part", "part", Part, {"size": 3}, {"size": 2, "shared": "s", "other": 0})
    assert (part.size, part.shared) == (3, "s")
    with pytest.raises(ValueError, match="part 'part' has no option 'sise'; did you mean 'size'"):
        make_part("part", "part", Part, {"sise": 3}, {})
    with pytest.raises(ValueError, match="no option 'shared'"):
        make_part("part", "part", Part, {"shared": "s"}, {}, reserved=("shared",))
    with pytest.raises(ValueError, match="part 'part': size must be positive, found 0"):
        make_part("part", "part", Part, {"size": 0}, {})
