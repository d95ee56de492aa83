"""Addresses of images, which may hold a name and a password."""

from __future__ import annotations

import base64
import re
from urllib.parse import unquote, urlsplit
from urllib.request import Request

_SCHEMES = ("http://", "https://")
_NAME_AND_PASSWORD = re.compile(r"(?<=://)[^/?#]*@")


def is_address(text: str) -> bool:
    """Whether a text is an http or https address."""
    return text.lower().startswith(_SCHEMES)


def without_password(address: str) -> str:
    """An address as messages and results may show it: without name and password."""
    return _NAME_AND_PASSWORD.sub("", address)


def request_of(address: str) -> Request:
    """A request that sends name and password, if there are some, as http asks for it."""
    parts, request = urlsplit(address), Request(without_password(address))
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        token = base64.b64encode(pair.encode("utf-8")).decode("ascii")
        request.add_header("Authorization", f"Basic {token}")
    return request
