"""How errors are worded. Imports nothing, so that command lines answer at once."""

from __future__ import annotations


def one_line(text: BaseException | str) -> str:
    """A text on one line, with single spaces; the name of its class for an error without one."""
    line = " ".join(str(text).split())
    return type(text).__name__ if not line and isinstance(text, BaseException) else line
