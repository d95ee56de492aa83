"""Invalid values in a recipe: one short line that names the key."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
from annotated_types import Interval

from detrelay.core.errors import RecipeError
from detrelay.core.recipes.recipe import (
    load_recipe,
)
from detrelay.core.recipes.validation import STRICT, convert
from factories_data import write_toml

DEEP = 10**5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[model]\na = " + "[" * DEEP + "]" * DEEP,
            "larger than 65536 bytes, the limit of a recipe",
        ),
        ("[model]\na = " + "[" * 5000 + "]" * 5000, "not a TOML file (maximum recursion depth"),
        ("[model" + ".a" * 5000 + "]", "model.a.a is nested more than 20 deep"),
        ("[model]\na = 2026-01-01", "model.a must be a string, a number, a boolean, a list or a"),
        ("[train]\nepochs = 2026-01-01", "train.epochs must be a string, a number, a boolean, a"),
        (
            "[train]\nlearning_rate = 1" + "0" * 400,
            "train.learning_rate must be an integer of at most 64",
        ),
        ("[train]\nepochs = 1" + "0" * 400, "train.epochs must be an integer of at most 64 bits"),
        ("[train]\nepochs = 1" + "0" * 5000, "not a TOML file (Exceeds the limit"),
        (
            "[train]\nlearning_rate = 1e400",
            "train.learning_rate must be a finite number, found floa",
        ),
        ("[model]\na = nan", "model.a must be a finite number, found float nan"),
        (
            "[assigner]\noptions = {a = [-inf]}",
            "assigner.options.a must be a finite number, found flo",
        ),
        ("[train]\nema_decay = 1.0", "train.ema_decay must be less than 1, found float 1.0"),
        ("[train.lr_multipliers]\nhead = -1", "train.lr_multipliers.head must be at least 0"),
        ("head = '" + "x" * 5000 + "'\ntrain = 3", "train must be a table, found int 3"),
        ("[train]\nepochs = '" + "x" * 5000 + "'", "train.epochs must be a valid integer, found"),
    ],
)
def test_hostile_values_are_refused_in_one_short_line(
    text: str, message: str, tmp_path: Path
) -> None:
    path = write_toml(tmp_path, text)
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    said = str(error.value).removeprefix(f"{path}: ")
    assert said.startswith(message)
    assert "\n" not in said
    assert len(said) < 200


@dataclass(frozen=True)
class Inner:
    share: Annotated[float, Interval(ge=0, le=1)] = 0.5
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outer:
    __pydantic_config__ = STRICT

    inner: Inner = field(default_factory=Inner)
    count: int | None = None


def test_tables_become_dataclasses_and_integers_numbers() -> None:
    found = convert(Outer, {"inner": {"share": 1, "names": ["a"]}}, "here")
    assert found == Outer(Inner(1.0, ("a",)))
    assert isinstance(found.inner.share, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"iner": {}}, "here: unknown key iner; did you mean inner?"),
        ({"inner": {"share": 2}}, "here: inner.share must be at most 1, found int 2"),
        ({"inner": {"names": "a"}}, "here: inner.names must be a list, found str 'a'"),
        ({"inner": {"names": [1]}}, "here: inner.names must be a valid string, found int 1"),
        ({"count": 1.5}, "here: count must be a valid integer, found float 1.5"),
        ({"count": True}, "here: count must be a valid integer, found bool True"),
        ({"inner": 3}, "here: inner must be a table, found int 3"),
    ],
)
def test_what_does_not_fit_is_named_by_its_dotted_key(values: object, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        convert(Outer, values, "here")
    assert str(error.value) == message
