"""Seconds and memory to read 100,000 images and a million boxes, and of processes that use them.

    python benchmarks/data_memory.py [--images 100000] [--formats coco cvat] [--train-only]

Writes synthetic annotations in each format (image files only if a format needs their sizes: all
names link to one small file), reads each in a fresh process, and prints CPU seconds and peak memory
above that of the imports. Then a dataset read from COCO is used by 4 loader processes: their
private memory is what a copy would cost. Finally a real training (StageInteractor with ResNet-50,
small images, 4 loader processes) runs some steps on a COCO dataset of that size and on one of a
hundredth: memory of all its processes, with shared pages divided among those that share them (PSS).
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
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from detrelay.core.data.coco import AnnotatedImages
from detrelay.core.data.places import open_place
from detrelay.core.engine import run_folder

_BOXES = 10
_CATEGORIES = 80
_WIDTH, _HEIGHT = 640, 480
_WORKERS = 4
# what a training has done before its memory is read, and what it may take, seconds
_STEPS, _PATIENCE = 5, 900
_TRAINING = (
    *("data.short_sides=[96]", "data.max_size=128", "train.backbone_weights=none"),
    *("data.num_workers=4", "train.batch_size=2", "train.log_every=1", "model.num_queries=20"),
)


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


def write_labelme(folder: Path, corners: np.ndarray) -> None:
    """A json file next to each image."""
    for row, boxes in enumerate(corners.tolist()):
        shapes = [
            {"label": f"class {number}", "points": [box[:2], box[2:]], "shape_type": "rectangle"}
            for number, box in enumerate(boxes)
        ]
        content = {"shapes": shapes, "imagePath": f"{row:012d}.jpg", "imageData": None}
        content |= {"imageWidth": _WIDTH, "imageHeight": _HEIGHT}
        (folder / f"{row:012d}.json").write_text(json.dumps(content))


def write_cvat(folder: Path, corners: np.ndarray) -> None:
    """One XML file."""
    with (folder / "annotations.xml").open("w") as file:
        file.write("<annotations>")
        for row, boxes in enumerate(corners.tolist()):
            drawn = "".join(
                f'<box label="class {number}" xtl="{x1}" ytl="{y1}" xbr="{x2}" ybr="{y2}"/>'
                for number, (x1, y1, x2, y2) in enumerate(boxes)
            )
            size = f'width="{_WIDTH}" height="{_HEIGHT}"'
            file.write(f'<image name="{row:012d}.jpg" {size}>{drawn}</image>')
        file.write("</annotations>")


def write_label_studio(folder: Path, corners: np.ndarray) -> None:
    """One json; boxes are percentages."""
    scale = 100 / np.array([_WIDTH, _HEIGHT])
    low, size = corners[..., :2] * scale, (corners[..., 2:] - corners[..., :2]) * scale
    with (folder / "export.json").open("w") as file:
        for row, boxes in enumerate(np.concatenate([low, size], axis=2).round(4).tolist()):
            results = [
                {
                    "original_width": _WIDTH,
                    "original_height": _HEIGHT,
                    "type": "rectanglelabels",
                    "value": {
                        **dict(zip(("x", "y", "width", "height"), box, strict=True)),
                        "rectanglelabels": [f"class {number}"],
                    },
                }
                for number, box in enumerate(boxes)
            ]
            task = {"id": row, "data": {"image": f"{row:012d}.jpg"}}
            file.write(",["[not row] + json.dumps(task | {"annotations": [{"result": results}]}))
        file.write("]")


def write_imagefolder(folder: Path, corners: np.ndarray) -> None:
    """An image folder with sizes and boxes in `metadata.jsonl`."""
    boxes = np.concatenate([corners[..., :2], corners[..., 2:] - corners[..., :2]], axis=2)
    names = [f"class {number}" for number in range(_BOXES)]
    with (folder / "metadata.jsonl").open("w") as file:
        for row, own in enumerate(boxes.round(2).tolist()):
            entry = {"file_name": f"{row:012d}.jpg", "width": _WIDTH, "height": _HEIGHT}
            file.write(json.dumps(entry | {"objects": {"bbox": own, "category": names}}) + "\n")


def write_parquet(folder: Path, corners: np.ndarray) -> None:
    """A parquet file with the encoded images, which are single pixels here."""
    import datasets

    datasets.utils.logging.disable_progress_bar()
    file = BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    boxes = np.concatenate([corners[..., :2], corners[..., 2:] - corners[..., :2]], axis=2)
    objects = {
        "bbox": datasets.List(datasets.List(datasets.Value("float64"), length=4)),
        "category": datasets.List(datasets.ClassLabel(num_classes=_CATEGORIES)),
    }
    sizes = {"width": datasets.Value("int64"), "height": datasets.Value("int64")}
    columns = {
        "image": [{"bytes": file.getvalue(), "path": None}] * len(corners),
        "width": [_WIDTH] * len(corners),
        "height": [_HEIGHT] * len(corners),
        "objects": [{"bbox": own, "category": list(range(_BOXES))} for own in boxes.tolist()],
    }
    features = datasets.Features({"image": datasets.Image(), **sizes, "objects": objects})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "train.parquet")


WRITERS: dict[str, tuple[Callable[[Path, np.ndarray], None], str]] = {
    "coco": (write_coco, "instances.json"),
    "csv": (write_csv, "boxes.csv"),
    "voc": (write_voc, ""),
    "yolo": (write_yolo, ""),
    "labelme": (write_labelme, ""),
    "cvat": (write_cvat, "annotations.xml"),
    "label_studio": (write_label_studio, "export.json"),
    "imagefolder": (write_imagefolder, ""),
    "parquet": (write_parquet, "train.parquet"),
}


def write(name: str, folder: Path, images: int) -> str:
    """Write a format and links for its images; returns the place to read."""
    folder.mkdir()
    one = folder / ".one.jpg"  # hidden, and inside: readers refuse links that lead out
    Image.new("RGB", (_WIDTH, _HEIGHT)).save(one)
    for row in range(images):
        os.symlink(one, folder / f"{row:012d}.jpg")
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


def family(process: int) -> list[int]:
    """A process and all that it started."""
    text = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [process, *(one for child in text.split() for one in family(int(child)))]


def pss_mib(process: int) -> float:
    """Memory of a process; of shared pages its part."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    (value,) = [line.split()[1] for line in lines if line.startswith("Pss:")]
    return int(value) / 1024


def train(place: str) -> None:
    """Memory of the processes of a training after some steps."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        command = [sys.executable, "-m", "detrelay.apps.train", "--data", place]
        command += ["--output", str(output), "--set", *_TRAINING]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as running:
            try:
                end = time.monotonic() + _PATIENCE
                log = output / run_folder.METRICS
                while not log.is_file() or len(log.read_text().splitlines()) < _STEPS:
                    if running.poll() is not None or time.monotonic() > end:
                        raise RuntimeError(f"the training did not come to step {_STEPS}")
                    time.sleep(1)
                first, *others = (round(pss_mib(process)) for process in family(running.pid))
            finally:
                running.terminate()
    print(json.dumps({"training_process_pss_mib": first, "others": others}))


def measure(name: str, task: str, place: str) -> None:
    """Do a task in a process of its own and print what it says."""
    command = [sys.executable, __file__, task, place]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    print(name, task, done.stdout.strip(), flush=True)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--formats", nargs="+", choices=list(WRITERS))  # all, and training
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--read")
    parser.add_argument("--load")
    parser.add_argument("--train")
    arguments = parser.parse_args()
    if arguments.read:
        return read(arguments.read)
    if arguments.load:
        return load_by_workers(arguments.load)
    if arguments.train:
        return train(arguments.train)
    with tempfile.TemporaryDirectory() as folder:
        for name in [] if arguments.train_only else arguments.formats or WRITERS:
            place = write(name, Path(folder) / name, arguments.images)
            for task in ["--read", "--load"] if name == "coco" else ["--read"]:
                measure(name, task, place)
        for images in () if arguments.formats else (arguments.images // 100, arguments.images):
            place = write("coco", Path(folder) / f"training_{images}", images)
            measure(f"{images} images", "--train", place)
    return None


if __name__ == "__main__":
    main()
