"""Error classes and their wording. Imports nothing heavy, so that commands start at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable

# torch explains at length how to load a pickle that may run code; no user should be told to
_PICKLE_ADVICE = "Weights only load failed"
_CODE_ADVICE = re.compile(r"[^.;:]*\btrust_remote_code\b[^.;]*[.;]?")


class RecipeError(ValueError):
    """A recipe or an override is malformed; the message names the source and the key."""


class DataError(ValueError):
    """The data cannot be used; the message says which file, what is wrong and what to do."""


class NonFiniteOutput(FloatingPointError, ValueError):
    """A model predicted scores or boxes that are NaN or infinite."""


def one_line(text: BaseException | str) -> str:
    """A text on one line, with single spaces; for an error without text the name of its class.

    A library's advice to run code that is stored in a file is left out.
    """
    line = " ".join(str(text).split())
    if _PICKLE_ADVICE in line:
        return f"not a checkpoint of plain tensors{_stored_object(line)}; only those are opened"
    line = _CODE_ADVICE.sub("", line).strip()
    return type(text).__name__ if not line and isinstance(text, BaseException) else line


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Half a sentence that rejects a name and suggests the closest known one."""
    return f"unknown {kind} {name}; {nearest(name, known)}"


def nearest(name: str, known: Iterable[str], show: Callable[[str], str] = str) -> str:
    """Half a sentence that suggests the known name closest to another, or lists all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {show(close[0])}?"
    return f"known are {', '.join(map(show, names)) or 'none'}"


def _stored_object(advice: str) -> str:
    """What torch found in a pickle."""
    stored = re.search(r"GLOBAL ([\w.]+)", advice)
    return f": it stores {stored[1]}, which could run code" if stored else ""
