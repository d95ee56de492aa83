"""How errors are worded."""

from __future__ import annotations

import pytest

from detrelay.core.errors import nearest, one_line, unknown_name


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (ValueError(" two\n  lines\t"), "two lines"),
        (KeyError(), "KeyError"),  # an error need not say anything
        ("an\nanswer", "an answer"),
        ("", ""),
    ],
)
def test_texts_are_put_on_one_line(text: BaseException | str, line: str) -> None:
    assert one_line(text) == line


def test_the_nearest_name_is_suggested_or_all_are_listed() -> None:
    assert nearest("resnet5", ["swin", "resnet50"]) == "did you mean resnet50?"
    assert nearest("q", ["b", "a"], repr) == "known are 'a', 'b'"
    assert nearest("q", []) == "known are none"
    assert unknown_name("head", "dina", ["dino"]) == "unknown head dina; did you mean dino?"


def test_nobody_is_told_to_run_code_of_a_file() -> None:
    advice = (
        "Weights only load failed. Re-running with weights_only=False. GLOBAL builtins.exec was"
    )
    expected = "not a checkpoint of plain tensors: it stores builtins.exec, which could run code"
    assert expected in one_line(advice)
    assert "weights_only" not in one_line(advice)
    assert one_line("No such model. Pass trust_remote_code=True to allow it.") == "No such model."
