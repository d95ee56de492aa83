"""Which images a command goes through, and where what is drawn of them goes."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from detrelay.core.data.formats import SUFFIXES

_APPLE_DOUBLE = "._"  # files beside the real ones that macOS leaves on foreign disks


@dataclass(frozen=True)
class Input:
    """An image to go through.

    Attributes:
        source: its file, or its encoded bytes.
        file_name: what results call it.
        target: where the drawn image goes.
        image_id: the id in the annotation file that lists the image; None where none does.
        size: (height, width) in that file, pixels.
    """

    source: Path | BytesIO
    file_name: str
    target: Path
    image_id: int | None = None
    size: tuple[int, int] | None = None


def find_inputs(pattern: str, output: Path) -> tuple[list[Input], str]:
    """The images that a path, a folder or a pattern stands for, sorted, and what was left out.

    Images that lie directly in the output folder are left out: drawings go there.

    Raises:
        ValueError: there is no image, or two have the same name.
    """
    path = Path(pattern)
    left_out: Counter[str] = Counter()
    if path.is_dir():
        paths = _images(path.iterdir(), left_out)
    elif path.exists():
        paths = [path]
    else:
        paths = _images(map(Path, glob.glob(pattern, recursive=True)), left_out)
    place = output.resolve()
    others = [item for item in paths if item.parent.resolve() != place]
    if paths and not others:
        raise ValueError(
            f"--output {output}: holds the images of --input {pattern}, and what is drawn of them "
            f"would lie among them; name another folder"
        )
    left_out["images in the output folder"] += len(paths) - len(others)
    counted = ", ".join(f"{count} {kind}" for kind, count in left_out.items() if count)
    if not others:
        raise ValueError(
            f"--input {pattern}: no image there (looked for {' '.join(SUFFIXES)}"
            f"{'; found ' + counted if counted else ''})"
        )
    inputs = [Input(item, item.name, output / f"{item.name}.png") for item in sorted(others)]
    _refuse_equal_targets("--input", inputs)
    return inputs, counted


def listed_inputs(
    data: Path, images: Path | None, output: Path, *, allow_outside: bool
) -> list[Input]:
    """The images that a COCO json or the evaluation split of a place lists, with ids and sizes.

    Raises:
        DataError: the file cannot be used, or names lead out of the image folder.
        ValueError: two images would be drawn to the same file.
    """
    from detrelay.core.data.places import evaluation_split
    from detrelay.core.data.readers import coco

    if data.is_file() and data.suffix == ".json":  # which needs no annotations
        listed = coco.read(data, images, annotated=False, allow_outside=allow_outside)
    else:
        listed = evaluation_split(str(data), images, allow_outside=allow_outside)
    inputs = []
    for row, (image_id, size) in enumerate(
        zip(listed.image_ids.tolist(), listed.sizes.tolist(), strict=True)
    ):
        name = listed.images.name(row)
        parts = name.replace("\\", "/").replace(":", "").split("/")
        flat = "__".join(part for part in parts if part not in ("", ".", ".."))
        inputs.append(
            Input(listed.images.open(row), name, output / f"{flat}.png", image_id, tuple(size))
        )
    _refuse_equal_targets(str(data), inputs)
    return inputs


def _images(paths: Iterable[Path], left_out: Counter[str]) -> list[Path]:
    """The paths with the suffix of an image; others are counted."""
    images = []
    for path in paths:
        suffix = path.suffix.lower()
        if path.name.startswith(_APPLE_DOUBLE):
            left_out[f"files named {_APPLE_DOUBLE}* (AppleDouble)"] += 1
        elif suffix in SUFFIXES:
            images.append(path)
        elif path.is_dir():
            left_out["folders"] += 1
        else:
            left_out[f"{suffix} files" if suffix else "files without a suffix"] += 1
    return images


def _refuse_equal_targets(source: str, inputs: list[Input]) -> None:
    counts = Counter(item.target for item in inputs)
    if len(counts) < len(inputs):
        target, _ = counts.most_common(1)[0]
        one, two, *_ = (item.file_name for item in inputs if item.target == target)
        raise ValueError(
            f"{source}: two images have the same file name ({one}, {two}), and would both be drawn "
            f"to {target}; go folder by folder"
        )
