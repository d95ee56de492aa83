"""Options of tiles."""

from __future__ import annotations

import pytest

from detrelay.apps.tiling import check_tiles


def test_tiles_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(ValueError, match="--tiles must be at least 32 pixels, found 5"):
        check_tiles(5, 0.2)
    with pytest.raises(ValueError, match="--overlap must be at least 0 and below 1, found 1"):
        check_tiles(64, 1.0)
