"""Results as rows of a file that grows."""

from __future__ import annotations

from pathlib import Path

from fixed_model import Fixed, run


def test_rows_are_there_while_the_others_are_waited_for(
    model: Fixed, photos: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    growing = []

    def look(count: int) -> None:
        for name in ("predictions.csv.partial", "predictions.jsonl.partial"):
            growing.append(len((output / name).read_text().splitlines()))

    model.before = look
    assert run(input=photos, output=output, format=("csv", "jsonl")) == 0
    assert growing == [1, 0, 3, 1, 5, 2]
