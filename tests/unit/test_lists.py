"""Paths and addresses, one per line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from factories_data import noise_image
from fixed_model import Fixed, rows, run


def test_a_list_names_images_from_its_own_folder(
    model: Fixed, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "more").mkdir()
    noise_image(40, 30).save(tmp_path / "more" / "a.png")
    (tmp_path / "list.txt").write_text("photos/a.png\n\nmore/a.png\nphotos/gone.png\n")
    output = tmp_path / "out"
    assert run(input=tmp_path / "list.txt", output=output) == 1
    assert [row["file_name"] for row in rows(output)[::2]] == ["photos/a.png", "more/a.png"]
    assert (output / "photos__a.png.png").is_file()
    assert "skipped photos/gone.png: cannot read image" in capsys.readouterr().err
    (tmp_path / "list.txt").write_text("photos/a.png\nphotos/a.png\n")
    assert run(input=tmp_path / "list.txt", output=tmp_path / "other") == 2
    assert "two images have the same file name" in capsys.readouterr().err
    (tmp_path / "list.txt").write_text("\n")
    assert run(input=tmp_path / "list.txt", output=tmp_path / "other") == 2
    assert "lists no image" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_paths_on_standard_input_are_gone_through_as_they_come(
    model: Fixed, photos: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    seen_before = []

    def lines() -> Iterator[str]:
        for name in ("photos/b.png", "photos/gone.png", "photos/b.png", "photos/a.png"):
            seen_before.append(len(model.seen))
            yield f"{name}\n"

    monkeypatch.setattr(sys, "stdin", lines())
    assert run(input="-", output=Path("out")) == 1
    assert seen_before == [0, 1, 1, 1]
    assert [row["file_name"] for row in rows(Path("out"))[::2]] == ["photos/b.png", "photos/a.png"]
    gone, twice = capsys.readouterr().err.splitlines()
    assert gone.startswith("skipped photos/gone.png: ")
    assert twice.startswith(
        "skipped photos/b.png: out/photos__b.png.png already has the results of"
    )
