"""An exported folder in the pipeline of transformers."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from detrelay.core.export.detector import ExportedDetector
from detrelay.core.export.in_transformers import exported_pipeline
from factories_export import constant_folder, noise


def test_a_folder_runs_in_the_pipeline_of_transformers(tmp_path: Path) -> None:
    folder = constant_folder(tmp_path / "exported")
    image = Image.fromarray(noise(40, 60))
    found = exported_pipeline(folder, threads=1)(image, threshold=0.1)
    expected = ExportedDetector(folder)(image, 0.1)[0]
    assert len(found) == len(expected["scores"]) > 0
    for ours, score, label, box in zip(found, *expected.values(), strict=True):
        assert ours["label"] == f"class {label}"
        assert abs(ours["score"] - score) < 0.01  # pixels differ by one of 256 levels
        assert list(ours["box"].values()) == box.astype(int).tolist()
