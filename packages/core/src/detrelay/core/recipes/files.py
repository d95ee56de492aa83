"""Recipe files: TOML that may extend other TOML files, and values written as TOML."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from detrelay.core.errors import RecipeError, one_line

# Checks the values of one file; the second argument is the prefix of its RecipeError.
Check = Callable[[Mapping[str, Any], str], object]

_LARGEST = 2**16  # bytes of a file; tomllib takes minutes for some files of a megabyte


def read_recipe(path: Path, check: Check) -> dict[str, Any]:
    """The values of a recipe file, merged over those of the files it extends.

    `extends` in a file names another file or a list of them, relative to its own folder. Tables are
    merged key by key. Of two listed files the later one takes precedence, and the file itself over
    both.

    Args:
        path: TOML file.
        check: called with every file's own values and its name.

    Raises:
        RecipeError: a file cannot be read or parsed, extends itself, or is rejected by `check`.
    """
    return _read(path, check, (), {})


def to_toml(values: Mapping[str, Any]) -> str:
    """Nested plain values as a TOML file; keys with value None are omitted."""
    import tomlkit

    return tomlkit.dumps(_without_none(values))


def parse_value(text: str, source: str) -> Any:
    """A value in TOML syntax; a plain word needs no quotes.

    Raises:
        RecipeError: it is too long or too deeply nested to parse; begins with `source`.
    """
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{source}: not a TOML value ({one_line(error)})") from error


def _read(
    path: Path, check: Check, readers: tuple[Path, ...], known: dict[Path, dict[str, Any]]
) -> dict[str, Any]:
    """`readers`: the files that led here, each extending the next; `known`: files read before."""
    place = path.resolve()
    if any(place == reader.resolve() for reader in readers):
        chain = " -> ".join(map(str, [*readers, path]))
        raise RecipeError(f"{readers[0]}: extends itself ({chain}); remove one `extends`")
    if place in known:
        return known[place]
    own = _parse(path, readers)
    bases = own.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise RecipeError(f"{path}: extends must be a file name or a list of them, found {bases!r}")
    check(own, str(path))
    merged: dict[str, Any] = {}
    for base in bases:
        merged = _merge(merged, _read(path.parent / base, check, (*readers, path), known))
    known[place] = _merge(merged, own)
    return known[place]


def _parse(path: Path, readers: tuple[Path, ...]) -> dict[str, Any]:
    needed_by = f", which {readers[-1]} extends" if readers else ""
    try:
        if path.exists() and not path.is_dir() and not path.is_file():
            raise RecipeError(f"{path}: cannot read the recipe (not a plain file){needed_by}")
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise RecipeError(
                f"{path}: larger than {_LARGEST} bytes, the limit of a recipe{needed_by}"
            )
        return tomllib.loads(content.decode())
    except OSError as error:
        reason = error.strerror or error
        raise RecipeError(f"{path}: cannot read the recipe ({reason}){needed_by}") from error
    except RecipeError:
        raise
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: not a TOML file ({one_line(error)}){needed_by}") from error


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    return value
