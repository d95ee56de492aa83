"""Recipe files: TOML that may extend other TOML files, and values written as TOML."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from detrelay.core.errors import RecipeError

# Judges the values of one file; the second argument is what its RecipeError begins with.
Check = Callable[[Mapping[str, Any], str], object]


def read_recipe(path: Path, check: Check) -> dict[str, Any]:
    """The values of a recipe file over those of the files it extends.

    `extends` in a file names another file or a list of them, relative to its own folder. Tables are
    merged key by key. The later of two listed files wins, and the file itself wins over both.

    Args:
        path: TOML file.
        check: called with the own values of every file and its name.

    Raises:
        RecipeError: a file cannot be read or parsed, extends itself, or is refused by `check`.
    """
    return _read(path, check, ())


def to_toml(values: Mapping[str, Any]) -> str:
    """Nested plain values as a TOML file; keys that hold None are left out."""
    return "\n".join(_lines(values, "")) + "\n"


def parse_value(text: str) -> Any:
    """A value as TOML writes it; a plain word may stand without quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _read(path: Path, check: Check, readers: tuple[Path, ...]) -> dict[str, Any]:
    """`readers`: the files that led here, each extending the next."""
    if any(path.resolve() == reader.resolve() for reader in readers):
        chain = " -> ".join(map(str, [*readers, path]))
        raise RecipeError(f"{readers[0]}: extends itself ({chain}); remove one `extends`")
    own = _parse(path, readers)
    bases = own.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise RecipeError(f"{path}: extends must be a file name or a list of them, found {bases!r}")
    check(own, str(path))
    merged: dict[str, Any] = {}
    for base in bases:
        merged = _merge(merged, _read(path.parent / base, check, (*readers, path)))
    return _merge(merged, own)


def _parse(path: Path, readers: tuple[Path, ...]) -> dict[str, Any]:
    wanted = f", which {readers[-1]} extends" if readers else ""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or error
        raise RecipeError(f"{path}: cannot read the recipe ({reason}){wanted}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not a TOML file ({error}){wanted}") from error


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _lines(values: Mapping[str, Any], table: str) -> list[str]:
    lines = [
        f"{_key(name)} = {_value(value)}"
        for name, value in values.items()
        if value is not None and not isinstance(value, Mapping)
    ]
    if table and lines:
        lines = ["", f"[{table}]", *lines]
    for name, value in values.items():
        if isinstance(value, Mapping):
            lines += _lines(value, f"{table}.{_key(name)}" if table else _key(name))
    return lines


def _key(name: str) -> str:
    plain = name.replace("_", "").replace("-", "")
    return name if plain.isascii() and plain.isalnum() else json.dumps(name)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value)
