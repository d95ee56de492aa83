"""Find the images of an annotation file: from `file_name`, as tools write it, to a path.

A name is relative to the image folder. Windows separators, `./`, and names that begin with the last
parts of the image folder itself (`images/a.png` for the folder `images`) are accepted too. A name
that points outside the folder (`../a.png`, an absolute path elsewhere) could read any file on the
machine, so it is rejected unless explicitly allowed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from detrelay.core.data.sample import some
from detrelay.core.errors import DataError

_DRIVE = re.compile(r"[A-Za-z]:")


def image_folders(annotations: Path, images: Path | None) -> list[Path]:
    """The folders that names in an annotation file may be relative to, best first.

    Args:
        annotations: the file.
        images: the folder if known; None means the folder `images` next to the file, if there is
            one, then the file's own folder.

    Raises:
        DataError: `images` is not a folder.
    """
    if images is None:
        beside = annotations.parent / "images"
        return [*([beside] if beside.is_dir() else []), annotations.parent]
    if not Path(images).is_dir():
        raise DataError(f"no image folder {images}; name the folder that holds the images")
    return [Path(images)]


class ImagePaths:
    """Finds the image files of an annotation file.

    Args:
        folders: the folders that names are relative to, best first.
        source: the annotation file, for messages.
        allow_outside: also accept names that point outside these folders.
    """

    def __init__(
        self, folders: Sequence[Path], source: str, *, allow_outside: bool = False
    ) -> None:
        self.folders = list(folders)
        self.source = source
        self.allow_outside = allow_outside

    def find(self, name: str) -> str | None:
        """The path of an image; None if there is no such file."""
        # isfile, unlike Path.is_file, accepts any odd name
        return next((path for path in self._candidates(name) if os.path.isfile(path)), None)

    def refuse_outside(self, names: Sequence[str]) -> None:
        """Check that no name points outside the image folder, unless that is allowed.

        Raises:
            DataError: one does.
        """
        if self.allow_outside:
            return
        outside = [name for name in names if not any(self._candidates(name))]
        if outside:
            raise DataError(
                f"{len(outside)} of {len(names)} file names of {self.source} lead out of "
                f"the image folder {self.place()}: {some(outside)}; {self.advice(outside[0])}, "
                f"or allow such names (allow_outside)"
            )

    def _candidates(self, name: str) -> Iterator[str]:
        """Where the image may be, best first."""
        slashed = name.replace("\\", "/")
        for folder in self.folders:
            literal = os.path.join(folder, name)
            # a backslash may be part of the name, or a separator, checked below
            if not _leads_out(name, folder) and (slashed == name or os.path.isfile(literal)):
                yield literal
        for folder in self.folders:
            if not _leads_out(slashed, folder):
                yield os.path.join(folder, os.path.normpath(slashed))
        parts = os.path.normpath(slashed).split("/")
        for folder in self.folders:
            own = Path(os.path.abspath(folder)).parts
            for count in range(1, len(parts)):
                if own[-count:] == tuple(parts[:count]):
                    yield os.path.join(folder, *parts[count:])
        if self.allow_outside:
            for folder in self.folders:
                yield os.path.normpath(os.path.join(folder, slashed))

    def advice(self, name: str) -> str:
        """What to do if an image is missing."""
        base = name.replace("\\", "/").rpartition("/")[2]
        for folder in self.folders:
            if base and os.path.isfile(os.path.join(folder, base)):
                return f"{folder / base} is there: write file_name as {base!r}"
        return "name the folder that holds the images, or correct file_name"

    def place(self) -> str:
        """The folders, for messages."""
        return " or ".join(str(folder) for folder in self.folders)


def _leads_out(name: str, folder: Path) -> bool:
    """Whether a name refers to a file outside the folder, from its text alone."""
    if _DRIVE.match(name) and os.sep == "/":
        return True
    if ".." not in name and not os.path.isabs(name):
        return False
    root = os.path.abspath(folder)
    full = os.path.normpath(os.path.join(root, name))
    return full != root and not full.startswith(os.path.join(root, ""))
