"""Seconds and memory to read 100,000 images and a million boxes, and of loader processes.

    python benchmarks/data_memory.py [--images 100000] [--formats coco yolo voc csv parquet]

Writes synthetic annotations in each format (image files only if a format needs their sizes: all
names link to one small file), reads each in a fresh process, and prints CPU seconds and peak memory
above that of the imports. Then a dataset read from COCO is used by 4 loader processes: their
private memory is what a copy would cost.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from detrelay.core.data.coco import AnnotatedImages
from detrelay.core.data.places import open_place

_BOXES = 10
_CATEGORIES = 80
_WIDTH, _HEIGHT = 640, 480
_WORKERS = 4


def made_up(images: int) -> np.ndarray:
    """Corners of ten boxes for each image, [images, 10, 4], whole hundredths of pixels."""
    random = np.random.default_rng(0)
    low = random.random((images, _BOXES, 2)) * (_WIDTH - 140, _HEIGHT - 140)
    size = 4 + random.random((images, _BOXES, 2)) * 130
    return np.concatenate([low, low + size], axis=2).round(2)


def write_coco(folder: Path, corners: np.ndarray) -> None:
    """One json."""
    images = [
        {"id": row, "file_name": f"{row:012d}.jpg", "width": _WIDTH, "height": _HEIGHT}
        for row in range(len(corners))
    ]
    boxes = np.concatenate([corners[..., :2], corners[..., 2:] - corners[..., :2]], axis=2)
    annotations = [
        {
            "id": number,
            "image_id": number // _BOXES,
            "category_id": number % _CATEGORIES + 1,
            "bbox": [round(value, 2) for value in box],
            "area": round(box[2] * box[3], 3),
            "iscrowd": 0,
            "segmentation": [],
        }
        for number, box in enumerate(boxes.reshape(-1, 4).tolist())
    ]
    categories = [{"id": row + 1, "name": f"class {row}"} for row in range(_CATEGORIES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))


def write_csv(folder: Path, corners: np.ndarray) -> None:
    """TensorFlow's columns."""
    with (folder / "boxes.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["filename", "width", "height", "class", "xmin", "ymin", "xmax", "ymax"])
        for row, boxes in enumerate(corners.tolist()):
            for number, box in enumerate(boxes):
                table.writerow([f"{row:012d}.jpg", _WIDTH, _HEIGHT, f"class {number}", *box])


def write_voc(folder: Path, corners: np.ndarray) -> None:
    """An XML file next to each image."""
    for row, boxes in enumerate(corners.tolist()):
        objects = "".join(
            f"<object><name>class {number}</name><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>"
            f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            for number, (x1, y1, x2, y2) in enumerate(boxes)
        )
        size = f"<size><width>{_WIDTH}</width><height>{_HEIGHT}</height></size>"
        text = f"<annotation>{size}{objects}</annotation>"
        (folder / f"{row:012d}.xml").write_text(text)


def write_yolo(folder: Path, corners: np.ndarray) -> None:
    """A text file next to each image; sizes come from the images."""
    (folder / "classes.txt").write_text("\n".join(f"class {row}" for row in range(_CATEGORIES)))
    scale = (_WIDTH, _HEIGHT)
    centre, size = (corners[..., :2] + corners[..., 2:]) / 2, corners[..., 2:] - corners[..., :2]
    rows = np.concatenate([centre / scale, size / scale], axis=2).round(6)
    for row, boxes in enumerate(rows.tolist()):
        lines = [f"{number} {' '.join(map(str, box))}" for number, box in enumerate(boxes)]
        (folder / f"{row:012d}.txt").write_text("\n".join(lines))


WRITERS: dict[str, tuple[Callable[[Path, np.ndarray], None], str]] = {
    "coco": (write_coco, "instances.json"),
    "csv": (write_csv, "boxes.csv"),
    "voc": (write_voc, ""),
    "yolo": (write_yolo, ""),
}


def write(name: str, folder: Path, images: int) -> str:
    """Write a format and links for its images; returns the place to read."""
    folder.mkdir()
    Image.new("RGB", (_WIDTH, _HEIGHT)).save(folder.parent / "one.jpg")
    for row in range(images):
        os.symlink(folder.parent / "one.jpg", folder / f"{row:012d}.jpg")
    writer, place = WRITERS[name]
    writer(folder, made_up(images))
    return str(folder / place)


def peak() -> float:
    """Largest resident memory of this process so far, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (value,) = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    return int(value) / 1024


def read(place: str) -> None:
    """Read a place and print time and memory; run in a separate process."""
    before, start, clock = peak(), time.process_time(), time.monotonic()
    (part,) = open_place(place).splits.values()
    samples = AnnotatedImages(part)
    print(
        json.dumps(
            {
                "images": len(samples),
                "boxes": samples.report.boxes,
                "cpu_seconds": round(time.process_time() - start, 1),
                "seconds": round(time.monotonic() - clock, 1),
                "peak_mib": round(peak()),
                "above_imports_mib": round(peak() - before),
            }
        )
    )


class Touched(Dataset[int]):
    """Reads the annotations of every image, as a loader process does, without its pixels."""

    def __init__(self, samples: AnnotatedImages) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> int:
        rows = slice(self.samples._starts[index], self.samples._starts[index + 1])
        boxes = torch.from_numpy(self.samples._boxes[rows].copy())
        return len(boxes) + len(self.samples.file_name(index))


def private_mib(process: int | str) -> float:
    """Memory of a process that is not shared with others."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    values = [int(line.split()[1]) for line in lines if line.startswith("Private_")]
    return sum(values) / 1024


def load_by_workers(place: str) -> None:
    """Private memory of loader processes at their start and after an epoch over the annotations."""
    (part,) = open_place(place).splits.values()
    loader: Any = DataLoader(
        Touched(AnnotatedImages(part)), batch_size=64, num_workers=_WORKERS, persistent_workers=True
    )
    batches = iter(loader)
    for _ in range(4 * _WORKERS):
        next(batches)
    workers = [worker.pid for worker in batches._workers]
    first = [private_mib(worker) for worker in workers]
    for _ in batches:
        pass
    last = [private_mib(worker) for worker in workers]
    print(
        json.dumps(
            {
                "main_process_mib": round(peak()),
                "workers_private_mib_at_start": [round(value) for value in first],
                "workers_private_mib_after_an_epoch": [round(value) for value in last],
            }
        )
    )


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--formats", nargs="+", default=list(WRITERS), choices=list(WRITERS))
    parser.add_argument("--read")
    parser.add_argument("--load")
    arguments = parser.parse_args()
    if arguments.read:
        return read(arguments.read)
    if arguments.load:
        return load_by_workers(arguments.load)
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.formats:
            place = write(name, Path(folder) / name, arguments.images)
            tasks = ["--read", "--load"] if name == "coco" else ["--read"]
            for task in tasks:
                done = subprocess.run(
                    [sys.executable, __file__, task, place],
                    check=True,
                    capture_output=True,
                    text=True,
                )
                print(name, task, done.stdout.strip(), flush=True)
    return None


if __name__ == "__main__":
    main()
