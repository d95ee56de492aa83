"""The facts in an exported folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.export import detector
from detrelay.core.export.detector import ExportedDetector, Facts
from detrelay.core.export.pixels import PixelSettings


@pytest.fixture
def facts() -> Facts:
    pixels = PixelSettings.of(DetrelayImageProcessor(do_resize=False))
    return Facts("onnx", ["cat", "dög"], [3, 7], pixels)


def test_facts_are_read_as_they_were_written(facts: Facts, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no exported detector"):
        Facts.read(tmp_path)
    facts.write(tmp_path)
    assert Facts.read(tmp_path) == facts
    (tmp_path / detector.FACTS).write_text('{"format": "onnx"}')
    with pytest.raises(ValueError, match="not what `detrelay export` writes"):
        Facts.read(tmp_path)


def test_images_of_a_batch_keep_their_own_sizes(
    facts: Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts.write(tmp_path)
    asked: list[Any] = []

    def run(pixels: Any, mask: Any) -> Any:
        asked.append(mask)
        logits = np.full((len(pixels), 1, 2), 3.0, np.float32)
        logits[..., 1] = -3
        return logits, np.full((len(pixels), 1, 4), 0.5, np.float32)

    monkeypatch.setattr(detector, "open_file", lambda name, file, threads: run)
    detect = ExportedDetector(tmp_path)
    assert (detect.class_names, detect.category_ids) == (["cat", "dög"], [3, 7])
    images = [np.zeros((8, 16, 3), np.uint8), np.zeros((20, 4, 3), np.uint8)]
    first, second = detect(images)
    assert first["boxes"].tolist() == [[4, 2, 12, 6]]
    assert second["boxes"].tolist() == [[1, 5, 3, 15]]
    assert asked[0].sum(axis=(1, 2)).tolist() == [8 * 16, 20 * 4]
    (alone,) = detect(images[0], threshold=0.96)
    assert len(alone["scores"]) == 0
    with pytest.raises(ValueError, match="there is no image to detect in"):
        detect([])
