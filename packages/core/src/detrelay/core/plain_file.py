"""Files that end. Imports nothing big."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def refuse_endless(path: Path) -> None:
    """Refuse a pipe, socket or device, from which reading may never come back.

    What is missing or a folder is left to be found when it is read.

    Raises:
        OSError: the path is none of a file.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(f"{path} is a pipe, socket or device, not a file")
