"""Parameter names of two layouts, in both directions."""

from __future__ import annotations

import re


class KeyTable:
    """Beginnings of parameter names, theirs beside ours; `{}` in a row stands for a number.

    Both sides of a row hold the same numbers in the same order. Of several rows that fit, the
    first one counts for their names and the last one for ours, so an old spelling may stand above
    the present one.
    """

    def __init__(self, *rows: tuple[str, str]) -> None:
        self._to_ours = [(_pattern(theirs), ours) for theirs, ours in rows]
        self._to_theirs = [(_pattern(ours), theirs) for theirs, ours in reversed(rows)]

    def ours(self, theirs: str) -> str | None:
        """Our name of their parameter; None where no row fits."""
        return _translate(theirs, self._to_ours)

    def theirs(self, ours: str) -> str | None:
        """Their name of our parameter; None where no row fits."""
        return _translate(ours, self._to_theirs)


def _pattern(beginning: str) -> re.Pattern[str]:
    return re.compile(re.escape(beginning).replace(r"\{\}", r"(\d+)"))


def _translate(name: str, rows: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, other in rows:
        if match := pattern.match(name):
            return other.format(*match.groups()) + name[match.end() :]
    return None
