"""Nested plain values to typed dataclasses; errors name the dotted key."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin
from typing import get_type_hints as hints_of

from detrelay.core.errors import RecipeError, unknown_name

if TYPE_CHECKING:
    from pydantic import ConfigDict, TypeAdapter
    from pydantic_core import ErrorDetails

_Table = TypeVar("_Table")

# Of the outermost dataclass: integers are accepted as floats, nothing else is coerced.
STRICT: ConfigDict = {"strict": True, "extra": "forbid", "allow_inf_nan": False}
_DEEPEST = 20
_MAX_SHOWN = 80
_LARGEST = 2**63  # TOML has integers of 64 bits
# of JSON and pydantic, and what TOML and plain English call it
_WORDS = {
    "an object": "a table",
    "a valid array": "a list",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
}


def convert(kind: type[_Table], values: Any, source: str) -> _Table:
    """Check and convert nested values.

    Args:
        kind: a dataclass with `__pydantic_config__ = STRICT`; its fields may be dataclasses.
        values: tables as read from TOML or JSON; missing keys keep their defaults.
        source: where they come from, for messages.

    Raises:
        RecipeError: unknown key, wrong type or value out of range; names the source and the key.
    """
    from pydantic import ValidationError

    _require_plain(values, (), source)
    try:
        # as JSON, in which a list is accepted for a tuple and nothing else is coerced
        checked: _Table = _adapter()(kind).validate_json(json.dumps(values))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise RecipeError(f"{source}: {_describe(kind, problem)}") from error
    return checked


@cache
def _adapter() -> Callable[[Any], TypeAdapter[Any]]:
    from pydantic import TypeAdapter

    return cache(TypeAdapter)


def _require_plain(value: Any, location: tuple[Any, ...], source: str) -> None:
    """Reject what JSON cannot hold, or cannot hold safely: dates, deep nesting, huge integers."""
    key = _dotted(location[:3])
    if len(location) > _DEEPEST:
        raise RecipeError(f"{source}: {key} is nested more than {_DEEPEST} deep")
    if isinstance(value, Mapping):
        for name, entry in value.items():
            _require_plain(entry, (*location, name), source)
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            _require_plain(entry, (*location, index), source)
    elif isinstance(value, int) and not -_LARGEST <= value < _LARGEST:
        raise RecipeError(f"{source}: {key} must be an integer of at most 64 bits")
    elif isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{source}: {key} must be a finite number, found {_show(value)}")
    elif value is not None and not isinstance(value, str | bool | int | float):
        raise RecipeError(
            f"{source}: {key} must be a string, a number, a boolean, a list or a table, found "
            f"{_show(value)}"
        )


def unknown_key(kind: type, key: str) -> str:
    """Half a sentence that rejects a dotted key of a dataclass and suggests the closest one."""
    known = _dotted_names(kind, "")
    same_ending = [name for name in known if name.endswith(f".{key}")]
    if same_ending:
        return f"unknown key {key}; did you mean {same_ending[0]}?"
    return unknown_name("key", key, known)


def _dotted_names(table: Any, prefix: str) -> list[str]:
    """The dotted names of a dataclass and of those in it."""
    names = []
    for name, hint in hints_of(table).items():
        names.append(f"{prefix}{name}")
        if is_dataclass(hint):
            names += _dotted_names(hint, f"{prefix}{name}.")
        elif get_origin(hint) is dict and is_dataclass(get_args(hint)[1]):
            names += _dotted_names(get_args(hint)[1], f"{prefix}{name}.NAME.")
    return names


def _describe(kind: type, problem: ErrorDetails) -> str:
    """A description of what is wrong with one value."""
    location, found = problem["loc"], _show(problem["input"])
    if problem["type"] == "unexpected_keyword_argument":
        return unknown_key(kind, _dotted(location))
    if problem["type"] == "missing":  # in a tuple of fixed length
        return f"{_dotted(location)} must have more values, found {found}"
    rule = re.sub(r"^\w+ should", "must", problem["msg"])
    for theirs, ours in _WORDS.items():
        rule = rule.replace(theirs, ours)
    return f"{_dotted(location)} {rule}, found {found}"


def _dotted(location: Sequence[Any]) -> str:
    """Names of tables and keys; positions in lists are omitted."""
    return ".".join(part for part in location if isinstance(part, str))


def _show(value: Any) -> str:
    text = repr(value)
    short = text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
    return f"{type(value).__name__} {short}"
