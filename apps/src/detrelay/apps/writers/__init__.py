"""Writers of results: one class per format."""

from __future__ import annotations

from detrelay.apps.writers.base import Writer
from detrelay.apps.writers.crops import CropsWriter
from detrelay.apps.writers.drawings import DrawingsWriter
from detrelay.apps.writers.rows import CocoWriter, CsvWriter, JsonLinesWriter
from detrelay.apps.writers.yolo import YoloWriter

WRITERS: dict[str, type[Writer]] = {
    "coco": CocoWriter,
    "csv": CsvWriter,
    "jsonl": JsonLinesWriter,
    "yolo": YoloWriter,
    "crops": CropsWriter,
    "drawings": DrawingsWriter,
}
