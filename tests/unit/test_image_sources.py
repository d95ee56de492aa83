"""An image in any form that a user may have."""

from __future__ import annotations

import base64
import urllib.request
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detrelay.core.data import image_sources
from detrelay.core.data.decode import ImageError
from detrelay.core.data.image_sources import pixels_of_any
from factories_data import noise_image

IMAGE = noise_image(12, 8)
PIXELS = torch.from_numpy(np.array(IMAGE)).permute(2, 0, 1)


def encoded() -> bytes:
    file = BytesIO()
    IMAGE.save(file, "PNG")
    return file.getvalue()


def test_every_form_gives_the_same_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded())
    text = base64.b64encode(encoded()).decode()
    forms: list[Any] = [IMAGE, np.array(IMAGE), PIXELS, path, str(path), text]
    forms += [f"data:image/png;base64,{text}", PIXELS.permute(1, 2, 0)]
    for form in forms:
        assert torch.equal(pixels_of_any(form), PIXELS)
    nested = pixels_of_any([[IMAGE], [IMAGE, np.array(IMAGE)]])
    assert [len(part) for part in nested] == [1, 2]
    several = pixels_of_any(torch.stack([PIXELS, 255 - PIXELS]))
    assert torch.equal(several[1], 255 - PIXELS)


def test_floats_are_taken_only_where_allowed() -> None:
    grey = torch.rand(8, 12)
    assert torch.equal(pixels_of_any(grey, allow_floats=True), grey.expand(3, -1, -1))
    last = torch.rand(8, 12, 3)
    found = pixels_of_any(last, allow_floats=True, data_format="channels_last")
    assert torch.equal(found, last.permute(2, 0, 1))
    with pytest.raises(ImageError):
        pixels_of_any(grey)
    with pytest.raises(ImageError, match="must have 1 or 3 channels, found 4"):
        pixels_of_any(torch.rand(4, 8, 12), allow_floats=True)


def test_an_address_is_fetched_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(request: urllib.request.Request, timeout: float) -> BytesIO:
        if request.full_url.endswith("none"):
            raise OSError("no\nroute")
        return BytesIO(encoded())

    monkeypatch.setattr(image_sources.urllib.request, "urlopen", fetch)
    for address in ("https://host/a.png", "HTTPS://host/a.png"):
        assert torch.equal(pixels_of_any(address), PIXELS)
    with pytest.raises(ImageError, match=r"cannot fetch image https://host/none: no route"):
        pixels_of_any("https://host/none")
    monkeypatch.setattr(image_sources, "_LARGEST_DOWNLOAD", 10)
    with pytest.raises(ImageError, match=r"a\.png is larger than 10 bytes"):
        pixels_of_any("https://host/a.png")


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(TypeError, match=r"an image must be a Pillow image, .* found int"):
        pixels_of_any(3)
    with pytest.raises(ImageError, match=r"none\.png"):
        pixels_of_any("none.png")
