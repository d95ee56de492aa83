"""Nested plain values to typed dataclasses; errors name the dotted key."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, Union, get_args, get_origin
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
_NAMES = {str: "string", bool: "boolean", int: "integer", float: "number"}


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
        raise RecipeError(f"{source}: {key} must be of type number, found {_show(value)}")
    elif value is not None and not isinstance(value, str | bool | int | float):
        raise RecipeError(
            f"{source}: {key} must be a string, a number, a boolean, a list or a table, found "
            f"{_show(value)}"
        )


def _describe(kind: type, problem: ErrorDetails) -> str:
    """A description of what is wrong with one value."""
    location, found = problem["loc"], problem["input"]
    key = _dotted(location)
    if problem["type"] == "unexpected_keyword_argument":
        table = _bare(_declared(kind, location[:-1]))
        prefix = key.removesuffix(str(location[-1]))
        return unknown_name("key", key, [prefix + item.name for item in fields(table)])
    if problem["type"] in ("missing", "too_long"):  # lengths of a tuple
        location = location[:-1] if problem["type"] == "missing" else location
        size = len(get_args(_bare(_declared(kind, location))))
        return f"{_dotted(location)} must have {size} values, found {_show(found)}"
    if problem["type"] == "literal_error":
        choices = problem["ctx"]["expected"].replace(", ", " or ")
        return f"{key} must be {choices}, found {_show(found)}"
    declared = _declared(kind, location)
    if problem["type"] in ("greater_than_equal", "greater_than", "less_than_equal", "less_than"):
        return f"{key} must be {_limits(declared)}, found {found}"
    return f"{key} must be {_type_name(declared)}, found {_show(found)}"


def _declared(kind: Any, location: Sequence[str | int]) -> Any:
    """The annotation of the value at a location."""
    for part in location:
        kind = _bare(kind)
        if is_dataclass(kind):
            kind = hints_of(kind, include_extras=True)[str(part)]
        else:  # a tuple or a dict
            kind = get_args(kind)[0 if isinstance(part, int) else 1]
    return kind


def _bare(hint: Any) -> Any:
    """An annotation without its limits and without None."""
    if get_origin(hint) is Annotated:
        hint = hint.__origin__
    if get_origin(hint) in (Union, UnionType):
        return _bare(next(item for item in get_args(hint) if item is not type(None)))
    return hint


def _limits(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return _limits(next(item for item in get_args(hint) if item is not type(None)))
    limits = hint.__metadata__[0]
    if limits.le is not None:
        return f"between {limits.ge} and {limits.le}"
    if limits.lt is not None:
        return f"at least {limits.ge} and below {limits.lt}"
    return f"at least {limits.ge}" if limits.ge is not None else f"above {limits.gt}"


def _type_name(hint: Any) -> str:
    hint = _bare(hint)
    if is_dataclass(hint):
        return "a table"
    if get_origin(hint) is tuple:
        return f"a list of {_NAMES.get(_bare(get_args(hint)[0]), 'value')}s"
    return f"of type {_NAMES.get(hint, 'table')}"


def _dotted(location: Sequence[Any]) -> str:
    """Names of tables and keys; positions in lists are omitted."""
    return ".".join(part for part in location if isinstance(part, str))


def _show(value: Any) -> str:
    text = repr(value)
    short = text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
    return f"{type(value).__name__} {short}"
