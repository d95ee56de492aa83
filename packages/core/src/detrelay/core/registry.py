"""Parts by name: an entry of a plain table, or a custom class as `module:Class`."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

from detrelay.core.errors import nearest, one_line

Part = Callable[..., Any]


def find_part(kind: str, name: str, table: Mapping[str, Part]) -> Part:
    """The class of that name.

    Args:
        kind: what it is, for messages, such as "assigner".
        name: a key of `table`, or `package.module:Class` of a class defined elsewhere; the working
            directory is searched too.
        table: the project's own parts.

    Raises:
        ValueError: there is no such part.
    """
    module_name, colon, class_name = name.partition(":")
    if not colon:
        if name not in table:
            raise ValueError(f"unknown {kind} {name!r}; {nearest(name, table, repr)}")
        return table[name]
    part = getattr(import_module(kind, name, module_name), class_name, None)
    if not callable(part):
        raise ValueError(f"{kind} {name!r}: {module_name} has no class {class_name!r}")
    return part


def import_module(kind: str, name: str, module_name: str) -> Any:
    """A module that may be in the working directory.

    Raises:
        ValueError: it cannot be found; `kind` and `name` say what it was needed for.
    """
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise ValueError(
            f"{kind} {name!r}: expected package.module:Class, as Python imports it, not a path"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{kind} {name!r}: {error}") from error
    except Exception as error:  # importing the module may raise anything
        kind_of = type(error).__name__
        raise ValueError(
            f"{kind} {name!r}: {module_name} cannot be imported ({kind_of}: {one_line(error)})"
        ) from error


def make_part(
    kind: str,
    name: str,
    part: Part,
    options: Mapping[str, Any],
    given: Mapping[str, Any],
    reserved: Collection[str] = (),
) -> Any:
    """Build a part from a user's options.

    Args:
        kind: what it is, for messages.
        name: how the user named it, for messages.
        part: its class.
        options: the user's arguments; they take precedence over `given`.
        given: what the project passes to parts whose constructor asks for it by name.
        reserved: arguments that no option may set, since they are set elsewhere.

    Raises:
        ValueError: an unknown option, or one that the part rejects.
    """
    parameters = inspect.signature(part).parameters
    allowed = [key for key in parameters if key not in reserved]
    for key in options:
        if key not in allowed:
            raise ValueError(
                f"{kind} {name!r} has no option {key!r}; {nearest(key, allowed, repr)}"
            )
    accepted = {key: value for key, value in given.items() if key in parameters}
    try:
        return part(**{**accepted, **options})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{kind} {name!r}: {one_line(error)}") from error
