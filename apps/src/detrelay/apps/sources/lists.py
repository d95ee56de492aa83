"""Paths and addresses, one per line, from a file or standard input."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from detrelay.apps.sources.addresses import address_input
from detrelay.apps.sources.item import Input, Request, Source, file_input
from detrelay.core.data.addresses import is_address
from detrelay.core.errors import DataError, one_line
from detrelay.core.plain_file import refuse_endless

STANDARD_INPUT = "-"
_SUFFIX = ".txt"


def is_list(place: str) -> bool:
    """Whether a place is a file that lists images."""
    return place.lower().endswith(_SUFFIX) and Path(place).exists()


def open_list(request: Request) -> Source:
    """The images that a file lists; paths are relative to its folder.

    Raises:
        DataError: the file cannot be read, or lists nothing.
    """
    path = Path(request.place)
    try:
        refuse_endless(path)
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(
            f"--input {path}: cannot be read as a list of images: {one_line(error)}"
        ) from None
    inputs = list(_inputs(lines, path.parent))
    if not inputs:
        raise DataError(
            f"--input {path}: lists no image; expected paths or addresses, one per line"
        )
    return Source(inputs)


def open_standard_input(request: Request) -> Source:
    """The images whose paths arrive on standard input; relative to the working directory."""
    return Source(_inputs(sys.stdin, Path()))


def _inputs(lines: Iterable[str], folder: Path) -> Iterator[Input]:
    for line in lines:
        name = line.rstrip("\r\n")
        if is_address(name):
            yield address_input(name)
        elif name.strip():
            yield file_input(folder / name, name)
