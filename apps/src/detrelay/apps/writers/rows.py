"""Results as rows of one file: COCO's list, csv, and one line of JSON per image."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from detrelay.apps.sources.item import Input
from detrelay.apps.writers.base import PREDICTIONS, Classes, RowFile, Seen, coco_rows

_BOX = ("x", "y", "width", "height")
_COLUMNS = (
    *("file_name", "image_id", "frame", "time", "category_id", "category", "score"),
    *_BOX,
)


class CocoWriter:
    """`predictions.json`, a COCO results list; until it is complete, one line per image."""

    def __init__(self, output: Path, classes: Classes) -> None:
        self.classes = classes
        self.whole = output / f"{PREDICTIONS}.json"
        self.partial = output / f"{PREDICTIONS}.partial.jsonl"
        self.lines = RowFile(self.whole, self.partial)

    @staticmethod
    def target(output: Path, item: Input) -> None:
        """None: all images share the file."""

    def add(self, seen: Seen) -> None:
        """Keep the rows of an image."""
        self.lines.write(json.dumps(coco_rows(seen, self.classes)) + "\n")

    def close(self, *, complete: bool) -> None:
        """Join the lines into the list."""
        from detrelay.core.engine.atomic_folder import written_aside

        self.lines.close(complete=False)
        if not complete:
            return
        with (
            written_aside(self.whole) as aside,
            aside.open("w", encoding="utf-8") as whole,
            self.partial.open(encoding="utf-8") as lines,
        ):
            separator = "[\n"
            for line in lines:
                for row in json.loads(line):
                    whole.write(separator + json.dumps(row))
                    separator = ",\n"
            whole.write("[]\n" if separator == "[\n" else "\n]\n")
        self.partial.unlink()


class JsonLinesWriter:
    """`predictions.jsonl`: one object per image, including those without detections."""

    def __init__(self, output: Path, classes: Classes) -> None:
        self.classes = classes
        self.lines = RowFile(output / f"{PREDICTIONS}.jsonl")

    @staticmethod
    def target(output: Path, item: Input) -> None:
        """None: all images share the file."""

    def add(self, seen: Seen) -> None:
        """Write the line of an image."""
        height, width = seen.size
        own = seen.facts.keys()
        objects = [
            {key: value for key, value in row.items() if key not in own}
            for row in coco_rows(seen, self.classes)
        ]
        line = {**seen.facts, "width": width, "height": height, "objects": objects}
        self.lines.write(json.dumps(line, ensure_ascii=False) + "\n")

    def close(self, *, complete: bool) -> None:
        """End the file."""
        self.lines.close(complete=complete)


class CsvWriter:
    """`predictions.csv`: one line per detection, boxes in pixels."""

    def __init__(self, output: Path, classes: Classes) -> None:
        self.classes = classes
        self.lines = RowFile(output / f"{PREDICTIONS}.csv")
        self._write([_COLUMNS])

    @staticmethod
    def target(output: Path, item: Input) -> None:
        """None: all images share the file."""

    def add(self, seen: Seen) -> None:
        """Write the lines of an image."""
        rows = coco_rows(seen, self.classes)
        named = [{**row, **dict(zip(_BOX, row["bbox"], strict=True))} for row in rows]
        self._write([[row.get(column, "") for column in _COLUMNS] for row in named])

    def _write(self, rows: Iterable[Sequence[object]]) -> None:
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows(rows)
        self.lines.write(buffer.getvalue())

    def close(self, *, complete: bool) -> None:
        """End the file."""
        self.lines.close(complete=complete)
