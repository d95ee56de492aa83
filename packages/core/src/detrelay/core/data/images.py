"""Where the pixels of a data set are: files in a folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from detrelay.core.data.sample import shown
from detrelay.core.errors import DataError, one_line

_ORIENTATION = 0x0112  # EXIF tag; from 5 on the picture is shown on its side


class ImageStore(Protocol):
    """The images of a split, asked for one at a time."""

    def name(self, index: int) -> str:
        """The name that the annotations give image `index`, for messages and for output."""

    def open(self, index: int) -> Path | BytesIO:
        """The file of image `index`, or its encoded bytes."""

    def missing(self) -> list[str]:
        """Names of the images that are not there."""

    def place(self) -> str:
        """Where the images are, for messages."""


class ImageFiles:
    """Images that are files.

    Args:
        folder: the folder that names start from.
        names: a name for each image; kept in one block of memory, which processes can share.
        source: the file that gives the names, for messages.

    Raises:
        DataError: a name holds half a character (a lone surrogate of UTF-16).
    """

    def __init__(self, folder: Path, names: Sequence[str], source: str) -> None:
        self.folder = folder
        try:
            self._names: NDArray[Any] = np.array(names, dtype=np.dtypes.StringDType())
        except UnicodeEncodeError as error:
            raise DataError(
                f"{source}: a file name holds half a character, which no file can have: "
                f"{shown(error.object)}"
            ) from None

    def name(self, index: int) -> str:
        """Name of image `index` as the annotations give it."""
        return str(self._names[index])

    def open(self, index: int) -> Path:
        """The file of image `index`."""
        return self.folder / self.name(index)

    def missing(self) -> list[str]:
        """Names that no file in the folder has."""
        names = map(self.name, range(len(self._names)))
        # unlike Path.is_file, os.path.isfile takes any odd name
        return [name for name in names if not os.path.isfile(self.folder / name)]

    def place(self) -> str:
        """Where the files are."""
        return f"folder {self.folder}"


@dataclass(frozen=True, slots=True)
class Selected:
    """Some images of a store, in an order of their own.

    Attributes:
        whole: all of them.
        chosen: position of each selected one.
    """

    whole: ImageStore
    chosen: NDArray[np.int64]

    def name(self, index: int) -> str:
        """Name of image `index`."""
        return self.whole.name(int(self.chosen[index]))

    def open(self, index: int) -> Path | BytesIO:
        """Image `index`."""
        return self.whole.open(int(self.chosen[index]))

    def missing(self) -> list[str]:
        """Names that are not there, among those selected."""
        gone = set(self.whole.missing())
        names = map(self.name, range(len(self.chosen))) if gone else ()
        return [name for name in names if name in gone]

    def place(self) -> str:
        """Where the images are."""
        return self.whole.place()


def image_folder(annotations: Path, images: Path | None) -> Path:
    """The folder that the names in an annotation file start from.

    Args:
        annotations: the file.
        images: the folder if it is known; None means the folder `images` beside the file where
            there is one, else the file's own folder.
    """
    if images is None:
        beside = annotations.parent / "images"
        return beside if beside.is_dir() else annotations.parent
    if not Path(images).is_dir():
        raise DataError(f"no image folder {images}; name the folder that holds the images")
    return Path(images)


def upright_size(file: Path | BytesIO) -> tuple[int, int]:
    """(height, width) of an image as it is shown, pixels; only its head is read.

    Raises:
        DataError: the file is missing or no image.
    """
    try:
        with Image.open(file) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION, 1) >= 5
    except Exception as error:  # what Pillow's readers raise on damaged files has no common base
        raise DataError(f"cannot read the size of image {file}: {one_line(error)}") from error
    return (width, height) if turned else (height, width)
