"""Detect objects in images and videos, draw them, and write them to files.

detrelay predict --model runs/stageinteractor-cross_stage/best --input photos --output out
detrelay predict --model runs/stageinteractor-cross_stage/best --data val.json --output out
detrelay predict --model runs/stageinteractor-cross_stage/best --input clip.mp4 --output out
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

import tyro

from detrelay.apps.console import Debug, is_out_of_memory, read_arguments, require_positive, run
from detrelay.apps.sources import open_source
from detrelay.apps.sources.dataset import open_dataset
from detrelay.apps.sources.item import FrameChoice, Input, Request, Source
from detrelay.apps.stopwatch import Stopwatch
from detrelay.apps.tiling import check_tiles, in_tiles
from detrelay.apps.writers import WRITERS
from detrelay.apps.writers.base import Classes, Detection, Seen, Writer
from detrelay.core.data.formats import MAX_PIXELS
from detrelay.core.errors import DataError, one_line, unknown_name

if TYPE_CHECKING:
    from torch import Tensor

    from detrelay.apps.detector import Detector, Found

_SOME_IMAGES_FAILED = 1
_FRAMES_PER_LINE = 100


@dataclass(frozen=True)
class Arguments:
    """Write and draw the detections of a saved model."""

    model: Path
    """Folder of a saved model, or its name on the Hub."""
    output: Path
    """Folder for the results."""
    input: str | None = None
    """Image, folder, pattern in quotes, list of paths (.txt), address, video (file, rtsp://...,
    camera:/dev/video0), or - for paths on standard input."""
    data: Path | None = None
    """COCO json, or another dataset, whose images to process; results have its image ids."""
    images: Path | None = None
    """Folder of the images of --data; looked for near the json if not given."""
    format: tuple[str, ...] = ("coco", "drawings")
    """One or several of coco, csv, jsonl, yolo, crops, drawings."""
    threshold: float = 0.5
    """Minimum score of a detection, 0 to 1."""
    top_k: int = 100
    """Maximum number of detections per image, best scores first."""
    classes: tuple[str, ...] = ()
    """Names of the classes to detect; all if not given."""
    nms_iou_threshold: float | None = None
    """IoU threshold of class-wise NMS; as saved if not given."""
    batch_size: int = 1
    """Images per batch; affects the speed only."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps, ...; a GPU if there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the model; as saved if not given."""
    threads: int | None = None
    """CPU threads; torch's default if not given."""
    frame_step: int = 1
    """Process every n-th frame of a video."""
    max_frames: int | None = None
    """Maximum number of frames of a video; all if not given."""
    tiles: int = 0
    """Side of overlapping tiles to process instead of the whole image, pixels; 0 for no tiles."""
    overlap: float = 0.2
    """Minimum share of a tile that overlaps the next one."""
    head: str | None = None
    """The model's head as module:ConfigClass, for a custom head."""
    max_pixels: int = MAX_PIXELS
    """Maximum number of pixels of an image; larger ones are not decoded."""
    allow_outside: tyro.conf.FlagCreatePairsOff[bool] = False
    """Also read images whose file_name in --data points outside the image folder."""
    debug: Debug = False


def predict(arguments: Arguments) -> int:
    """Process the images; returns the exit code."""
    _check(arguments)
    source = _source(arguments)
    if source.left_out:
        print(f"left out: {source.left_out}", file=sys.stderr)
    if isinstance(source.inputs, list):
        _refuse_equal_targets(arguments, source.inputs)

    import torch

    from detrelay.apps.build import load_saved
    from detrelay.apps.detector import Choice, Detector, place_model

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    model, processor = load_saved(arguments.model, arguments.head)
    choice = Choice(
        arguments.threshold, arguments.top_k, arguments.classes, arguments.nms_iou_threshold
    )
    detector = Detector(place_model(model, arguments.device, arguments.dtype), processor, choice)
    names = model.config.class_names
    classes = Classes(names, model.config.category_ids or list(range(len(names))))
    with _writers(arguments, classes) as writers:
        job = Job(arguments, detector, writers)
        job.process(source)
    print(job.summary())
    return _SOME_IMAGES_FAILED if job.failed else 0


def _check(arguments: Arguments) -> None:
    """Reject numbers and names out of range."""
    check_tiles(arguments.tiles, arguments.overlap)
    overlap = arguments.nms_iou_threshold
    for name, value in (("--threshold", arguments.threshold), ("--nms-iou-threshold", overlap)):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name} must be between 0 and 1, found {value}")
    require_positive(
        *(arguments, "top_k", "batch_size", "threads", "frame_step", "max_frames", "max_pixels")
    )
    for name in arguments.format:
        if name not in WRITERS:
            raise ValueError(f"--format: {unknown_name('format', name, WRITERS)}")
    if not arguments.format or len(set(arguments.format)) < len(arguments.format):
        raise ValueError(f"--format: expected one or several of {', '.join(WRITERS)}, once each")


def _source(arguments: Arguments) -> Source:
    """The requested images."""
    if (arguments.input is None) == (arguments.data is None):
        raise ValueError("name either --input or --data")
    frames = FrameChoice(arguments.frame_step, arguments.max_frames)
    if arguments.data is not None:
        if frames != FrameChoice():
            raise ValueError("--frame-step and --max-frames are for videos; --data has none")
        return open_dataset(arguments.data, arguments.images, allow_outside=arguments.allow_outside)
    assert arguments.input is not None
    for option, value in (
        ("--images", arguments.images),
        ("--allow-outside", arguments.allow_outside),
    ):
        if value:
            raise ValueError(f"{option} is for --data; omit it with --input")
    return open_source(Request(arguments.input, arguments.output, frames))


@contextmanager
def _writers(arguments: Arguments, classes: Classes) -> Iterator[list[Writer]]:
    """The writers of the chosen formats; closed as complete unless an error occurs."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    writers = [WRITERS[name](arguments.output, classes) for name in arguments.format]
    complete = False
    try:
        yield writers
        complete = True
    finally:
        for writer in writers:
            writer.close(complete=complete)


@dataclass
class Job:
    """Processes images and counts the outcome.

    Attributes:
        arguments: of the command.
        detector: finds objects.
        writers: of all results.
        done: images so far.
        failed: images that were skipped.
        objects: detections so far.
        watch: time spent per step.
    """

    arguments: Arguments
    detector: Detector
    writers: Sequence[Writer]
    done: int = 0
    failed: int = 0
    objects: int = 0
    watch: Stopwatch = field(default_factory=Stopwatch)
    _taken: dict[Path, str] = field(default_factory=dict)

    def process(self, source: Source) -> None:
        """Process all images; an interrupt ends a live source normally."""
        inputs = self._until_broken(source)
        try:
            while batch := list(itertools.islice(inputs, self.arguments.batch_size)):
                self._write(self._detect(self._read(batch)))
        except KeyboardInterrupt:
            if not source.is_live:
                raise

    def summary(self) -> str:
        """Counts and speed."""
        return (
            f"{self.objects} objects in {self.done} images, {self.failed} images skipped\n"
            f"{self.watch.summary(self.done)} -> {self.arguments.output}"
        )

    def _until_broken(self, source: Source) -> Iterator[Input]:
        """The inputs up to the first that cannot be read: a video may be damaged in the middle."""
        inputs = iter(source.inputs)
        while True:
            try:
                with self.watch.of("reading"):
                    item = next(inputs, None)
            except DataError as error:
                self._skip(self.arguments.input or "", error)
                return
            if item is None:
                return
            yield item

    def _read(self, batch: Iterable[Input]) -> list[tuple[Input, Tensor]]:
        read = []
        for item in batch:
            try:
                with self.watch.of("reading"):
                    self._take_targets(item)
                    read.append((item, item.read(self.arguments.max_pixels)))
            except (ValueError, MemoryError) as error:
                self._skip(item.display_name, error)
        return read

    def _take_targets(self, item: Input) -> None:
        """Reject an image whose results would overwrite those of another one."""
        for target in _targets(self.arguments, item):
            if target in self._taken:
                raise ValueError(f"{target} already has the results of {self._taken[target]}")
            self._taken[target] = item.display_name

    def _detect(self, read: list[tuple[Input, Tensor]]) -> list[Seen]:
        with self.watch.of("detecting"):
            results = self._detect_each([pixels for _, pixels in read])
        seen = []
        for (item, pixels), result in zip(read, results, strict=True):
            if isinstance(result, Exception):
                self._refuse_damaged_weights()
                self._skip(item.display_name, result)
            else:
                seen.append(Seen(item, pixels, _detections(result)))
        return seen

    def _detect_each(self, images: Sequence[Tensor]) -> list[Found | Exception]:
        """The detections in each image, or its error; after an error of a batch, one by one."""
        try:
            detect = in_tiles(self.detector, self.arguments.tiles, self.arguments.overlap)
            return [*detect(images)] if images else []
        except (ValueError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            if len(images) == 1:
                return [error]
        return [result for image in images for result in self._detect_each([image])]

    def _refuse_damaged_weights(self) -> None:
        """Stop if no image can give a valid result."""
        weights = list(self.detector.model.named_parameters())
        damaged = [name for name, weight in weights if not weight.isfinite().all()]
        if damaged:
            raise ValueError(
                f"{self.arguments.model}: {len(damaged)} of its weights have NaN or infinite "
                f"values, such as {damaged[0]}; no image can be processed with them"
            )

    def _write(self, batch: Iterable[Seen]) -> None:
        for seen in batch:
            with self.watch.of("writing"):
                for writer in self.writers:
                    writer.add(seen)
            self.done += 1
            self.objects += len(seen.found)
            if seen.item.frame is None or self.done % _FRAMES_PER_LINE == 0:
                print(f"{seen.item.display_name}: {len(seen.found)} objects", flush=True)

    def _skip(self, name: str, error: Exception) -> None:
        self.failed += 1
        print(f"skipped {name}: {one_line(error)}", file=sys.stderr)


def _detections(found: Found) -> list[Detection]:
    columns = (found[name].tolist() for name in ("labels", "scores", "boxes"))
    return [
        Detection(label, score, (left, top, right, bottom))
        for label, score, (left, top, right, bottom) in zip(*columns, strict=True)
    ]


def _targets(arguments: Arguments, item: Input) -> list[Path]:
    """The files written for this image alone."""
    targets = [WRITERS[name].target(arguments.output, item) for name in arguments.format]
    return [target for target in targets if target is not None]


def _refuse_equal_targets(arguments: Arguments, inputs: Sequence[Input]) -> None:
    """Check beforehand that no two images would be written to one file."""
    before: dict[Path, str] = {}
    for item in inputs:
        for target in _targets(arguments, item):
            if target in before:
                raise ValueError(
                    f"two images have the same file name ({before[target]}, {item.file_name}), and "
                    f"would both be written to {target}; process one folder at a time"
                )
            before[target] = item.file_name


def main() -> NoReturn:
    """Run the command line."""
    run(lambda: predict(read_arguments(Arguments)))


if __name__ == "__main__":
    main()
