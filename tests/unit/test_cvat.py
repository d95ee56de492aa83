"""CVAT for images."""

from __future__ import annotations

from pathlib import Path

import pytest

from detrelay.core.data.places import open_place
from detrelay.core.errors import DataError
from factories_formats import only, picture


def cvat(folder: Path, shapes: str) -> Path:
    picture(folder / "a.jpg")
    (folder / "annotations.xml").write_text(
        f'<annotations><image name="a.jpg" width="64" height="48">{shapes}</image></annotations>'
    )
    return folder


def test_rotated_boxes_of_cvat_become_their_extent(tmp_path: Path) -> None:
    box = '<box label="cat" xtl="20" ytl="10" xbr="40" ybr="20" rotation="90"/>'
    part = only(cvat(tmp_path, box))
    assert part.boxes_xywh.tolist() == [pytest.approx([25, 5, 10, 20])]
    assert part.notes == ("1 rotated boxes became their enclosing boxes",)
    part = only(cvat(tmp_path, '<polygon label="cat" points="8,6;28,7;9,22"/><points label="a"/>'))
    assert part.boxes_xywh.tolist() == [[8, 6, 20, 16]]
    assert part.notes[1] == "1 shapes of kind points have no box and are left out"


def test_cvat_for_video_is_refused(tmp_path: Path) -> None:
    cvat(tmp_path, "")
    (tmp_path / "annotations.xml").write_text("<annotations><track/></annotations>")
    with pytest.raises(DataError, match="export for video"):
        open_place(str(tmp_path))
