from __future__ import annotations

import pytest

from detrelay.core.errors import one_line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (ValueError(" two\n  lines\t"), "two lines"),
        (KeyError(), "KeyError"),  # an error need not say anything
        ("an\nanswer", "an answer"),
        ("", ""),
    ],
)
def test_texts_stand_on_one_line(text: BaseException | str, line: str) -> None:
    assert one_line(text) == line
