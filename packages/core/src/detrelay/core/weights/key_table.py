"""Translate parameter names between two layouts, in both directions."""

from __future__ import annotations

import re


class KeyTable:
    """Pairs of parameter name prefixes, theirs and ours; `{}` in a row matches a number.

    Both sides of a row have the same numbers in the same order. Of several matching rows the first
    one applies to their names and the last one to ours, so an old spelling may precede the current
    one.
    """

    def __init__(self, *rows: tuple[str, str]) -> None:
        self._to_ours = [(_pattern(theirs), ours) for theirs, ours in rows]
        self._to_theirs = [(_pattern(ours), theirs) for theirs, ours in reversed(rows)]

    def ours(self, theirs: str) -> str | None:
        """Our name of their parameter; None if no row matches."""
        return _translate(theirs, self._to_ours)

    def theirs(self, ours: str) -> str | None:
        """Their name of our parameter; None if no row matches."""
        return _translate(ours, self._to_theirs)


def _pattern(beginning: str) -> re.Pattern[str]:
    return re.compile(re.escape(beginning).replace(r"\{\}", r"(\d+)"))


def _translate(name: str, rows: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, other in rows:
        if match := pattern.match(name):
            return other.format(*match.groups()) + name[match.end() :]
    return None
