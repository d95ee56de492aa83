"""Names of two layouts, in both directions."""

from __future__ import annotations

from detrelay.core.weights.key_table import KeyTable

TABLE = KeyTable(
    ("layers.{}.old.", "blocks.{}.new."),
    ("layers.{}.{}.", "blocks.{}.parts.{}."),
    ("layers.{}.present.", "blocks.{}.new."),
    ("head.", "classify."),
)


def test_numbers_and_ends_are_kept() -> None:
    assert TABLE.ours("layers.3.12.weight") == "blocks.3.parts.12.weight"
    assert TABLE.theirs("blocks.3.parts.12.weight") == "layers.3.12.weight"
    assert TABLE.ours("head.bias") == "classify.bias"


def test_the_first_row_reads_and_the_last_one_writes() -> None:
    assert TABLE.ours("layers.0.old.x") == TABLE.ours("layers.0.present.x") == "blocks.0.new.x"
    assert TABLE.theirs("blocks.0.new.x") == "layers.0.present.x"


def test_names_are_literal_and_stand_at_the_beginning() -> None:
    assert TABLE.ours("headxbias") is None
    assert TABLE.ours("my.head.bias") is None
    assert TABLE.theirs("head.bias") is None
