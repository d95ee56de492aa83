"""Images at HTTP addresses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from detrelay.apps.sources.item import Input, Request, Source
from detrelay.core.data.addresses import without_password

if TYPE_CHECKING:
    from torch import Tensor


def open_address(request: Request) -> Source:
    """The image at an address."""
    return Source([address_input(request.place)])


def address_input(address: str) -> Input:
    """An image that is fetched when it is read."""

    def read(max_pixels: int) -> Tensor:
        from detrelay.core.data.image_sources import pixels_of_any

        pixels: Any = pixels_of_any(address, max_pixels=max_pixels)
        return pixels

    return Input(without_password(address), read)
