"""Image stores: where the pixels of a dataset come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from detrelay.core.data.image_paths import ImagePaths
from detrelay.core.data.sample import shown
from detrelay.core.errors import DataError


class ImageStore(Protocol):
    """The images of a split, opened one at a time."""

    def name(self, index: int) -> str:
        """The name of image `index` in the annotations, for messages and for output."""

    def open(self, index: int) -> Path | BytesIO:
        """The file of image `index`, or its encoded bytes."""

    def missing(self) -> list[str]:
        """Names of the images that are not there."""

    def place(self) -> str:
        """Where the images are, for messages."""

    def advice(self, name: str) -> str:
        """What to do if the image of that name is missing."""


class ImageFiles:
    """Images that are files.

    Args:
        folder: the folder that names are relative to, or several, best first.
        names: a name for each image; kept in one block of memory, which processes can share.
        source: the file that lists the names, for messages.
        allow_outside: also accept names that point outside the folder.

    Raises:
        DataError: a name contains half a character (a lone UTF-16 surrogate), or points outside the
            folder.
    """

    def __init__(
        self,
        folder: Path | Sequence[Path],
        names: Sequence[str],
        source: str,
        *,
        allow_outside: bool = False,
    ) -> None:
        folders = [folder] if isinstance(folder, Path) else folder
        self.paths = ImagePaths(folders, source, allow_outside=allow_outside)
        try:
            self._names: NDArray[Any] = np.array(names, dtype=np.dtypes.StringDType())
        except UnicodeEncodeError as error:
            raise DataError(
                f"{source}: a file name holds half a character, which no file can have: "
                f"{shown(error.object)}"
            ) from None
        self.paths.refuse_outside(names)

    def name(self, index: int) -> str:
        """Name of image `index` as the annotations give it."""
        return str(self._names[index])

    def open(self, index: int) -> Path:
        """The file of image `index`."""
        name = self.name(index)
        return Path(self.paths.find(name) or self.paths.folders[0] / name)

    def missing(self) -> list[str]:
        """Names without a file in the folder."""
        names = map(self.name, range(len(self._names)))
        return [name for name in names if self.paths.find(name) is None]

    def place(self) -> str:
        """Where the files are."""
        return f"folder {self.paths.place()}"

    def advice(self, name: str) -> str:
        """Where such a file is instead, or how to name the folder."""
        return self.paths.advice(name)


@dataclass(frozen=True, slots=True)
class Selected:
    """Some images of a store, in a given order.

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

    def advice(self, name: str) -> str:
        """What to do if an image is missing."""
        return self.whole.advice(name)
