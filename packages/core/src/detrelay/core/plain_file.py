"""Reject files that never end. Imports nothing heavy."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def refuse_endless(path: Path) -> None:
    """Reject a pipe, socket or device, from which reading may never return.

    A missing file or a folder is not checked here: reading it fails.

    Raises:
        OSError: the path is a pipe, socket or device.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(f"{path} is a pipe, socket or device, not a file")
