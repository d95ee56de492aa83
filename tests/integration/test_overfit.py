"""Training works at all: four real images can be overfitted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMAGES = 4


def subset(source: Path, target: Path) -> None:
    """The first images of a COCO file, with absolute file names."""
    data = json.loads(source.read_text())
    images = data["images"][:IMAGES]
    ids = {image["id"] for image in images}
    for image in images:
        image["file_name"] = str(source.parent / "images" / image["file_name"])
    data["images"] = images
    data["annotations"] = [row for row in data["annotations"] if row["image_id"] in ids]
    target.write_text(json.dumps(data))


@pytest.mark.slow
def test_four_real_images_can_be_overfitted(real_data: Path, tmp_path: Path) -> None:
    subset(real_data / "bccd" / "train.json", tmp_path / "train.json")
    subset(real_data / "bccd" / "train.json", tmp_path / "val.json")
    output = tmp_path / "run"
    settings = [
        *("train.epochs=600", "train.milestones=[400,540]", "train.evaluate_every=600"),
        *("train.batch_size=4", "train.warmup_steps=30", "train.checkpoint_every=1000"),
        *("data.flip_probability=0.0", "data.color_jitter=0.0", "data.num_workers=0"),
    ]
    command = [sys.executable, "apps/train.py", "--recipe", "bccd_small", "--output", str(output)]
    subprocess.run(
        [*command, "--data", str(tmp_path), "--set", *settings], cwd=ROOT, check=True, timeout=3600
    )
    stats = json.loads((output / "results.json").read_text())["stats"]
    assert stats["AP"] > 0.9
