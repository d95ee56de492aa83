"""Check annotated images before training: counts, defects, a contact sheet; convert them.

detrelay check-data --data cells --output cells_check
detrelay check-data --data cells --write yolo --output cells_yolo
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import tyro

from detrelay.apps.console import Debug, read_arguments, run
from detrelay.core.data.formats import MAX_PIXELS

if TYPE_CHECKING:
    from detrelay.core.data.annotations import Annotations
    from detrelay.core.data.checking import Defect, SplitCheck
    from detrelay.core.data.places import Found

_UNUSABLE, _LOOK = 2, 3
# examples of a defect that are printed; check.json has all
_SHOWN = 5


@dataclass(frozen=True)
class Arguments:
    """Check annotated images, or write them in another format.

    Exit code: 0 nothing found, 3 something to look at, 2 unusable.
    """

    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PLACE|train=PLACE val=PLACE")]
    """Folder or file of annotated images in any known format, or one each; hub:NAME on the Hub."""
    images: Path | None = None
    """Folder of the images if they are elsewhere."""
    output: Path | None = None
    """Folder for check.json and contact_sheet_SPLIT.png; for the converted data with --write."""
    write: str | None = None
    """Convert to coco, yolo, voc or parquet instead of checking."""
    skip_images: tyro.conf.FlagCreatePairsOff[bool] = False
    """Do not open images: misses damaged ones, and images that are in two splits."""
    max_pixels: int = MAX_PIXELS
    """Maximum number of pixels of an image."""
    allow_outside: tyro.conf.FlagCreatePairsOff[bool] = False
    """Also read images whose file_name points outside the image folder."""
    debug: Debug = False


def check_data(arguments: Arguments) -> int:
    """Check or convert; returns the exit code."""
    if arguments.write is not None and arguments.output is None:
        raise ValueError("--write needs --output: the folder to write to")
    found = open_all(arguments)
    splits = {name: part for one in found for name, part in one.splits.items()}
    for one in found:
        print(one.summary())
    if arguments.write is not None:
        assert arguments.output is not None
        return convert(splits, arguments.write, arguments.output)
    from detrelay.core.data.agreement import compare_others
    from detrelay.core.data.checking import Defect, check_split

    checks = {name: check_split(part) for name, part in splits.items()}
    between: list[Defect] = []
    unread: list[str] = []
    for one in found:
        defects, notes = compare_others(one, arguments.images)
        between, unread = between + defects, unread + notes
    for name, part in splits.items():
        if missing := part.images.missing():
            checks[name].defects.append(
                Defect("images are missing", len(missing), missing, blocks=True)
            )
    if not arguments.skip_images and not any(d.blocks for c in checks.values() for d in c.defects):
        between += look_at_pixels(splits, checks, arguments, Path(found[0].place))
    report(checks, between, unread)
    if arguments.output is not None:
        write_report(splits, checks, between, unread, arguments.output)
    return verdict(checks, between)


def open_all(arguments: Arguments) -> list[Found]:
    """The content of the places; one split of each if they are given separately."""
    from dataclasses import replace

    from detrelay.core.data.label_map import with_categories
    from detrelay.core.data.places import open_place, split_of

    named = dict(
        entry.split("=", 1) for entry in arguments.data if entry.startswith(("train=", "val="))
    )
    if not named and len(arguments.data) == 1:
        place = arguments.data[0]
        return [open_place(place, arguments.images, allow_outside=arguments.allow_outside)]
    if set(named) != {"train", "val"} or len(arguments.data) != 2:
        raise ValueError(
            f"--data: expected a place, or train=PLACE val=PLACE, found {' '.join(arguments.data)}"
        )
    parts: dict[str, Annotations] = {}
    result = []
    for split in ("train", "val"):
        found = open_place(named[split], arguments.images, allow_outside=arguments.allow_outside)
        part = split_of(found, split)
        if part is None:
            raise ValueError(f"{named[split]} has no split {split}, only {', '.join(found.splits)}")
        parts[split] = part if split == "train" else with_categories(part, parts["train"])
        result.append(replace(found, splits={split: parts[split]}))
    return result


def convert(splits: dict[str, Annotations], format_name: str, output: Path) -> int:
    """Write the splits in a format and print what it cannot represent."""
    from detrelay.core.data.writing import write_data

    for note in write_data(splits, format_name, output):
        print(f"note: {note}")
    print(f"{format_name} -> {output}")
    return 0


def look_at_pixels(
    splits: dict[str, Annotations], checks: dict[str, SplitCheck], arguments: Arguments, place: Path
) -> list[Defect]:
    """Open all images; returns the defects between the splits."""
    from detrelay.core.data.checking import Defect, unused_files
    from detrelay.core.data.pictures import (
        check_light,
        check_pair,
        check_recurring,
        look_at_images,
    )

    pixels = {}
    for name, part in splits.items():
        pixels[name] = look_at_images(part, arguments.max_pixels)
        if broken := pixels[name].unreadable:
            checks[name].defects.append(
                Defect("images cannot be used", len(broken), broken, blocks=True)
            )
        checks[name].defects += check_light(part, pixels[name])
        if (recurring := check_recurring(part, pixels[name])) is not None:
            checks[name].defects.append(recurring)
    defects = []
    first, *others = splits
    for name in others:
        defects += check_pair(
            (first, splits[first], pixels[first]), (name, splits[name], pixels[name])
        )
    spare = unused_files(splits, place)
    return [*defects, spare] if spare is not None else defects


def report(checks: dict[str, SplitCheck], between: list[Defect], unread: list[str]) -> None:
    """Print counts and defects."""
    names = list(
        dict.fromkeys(name for check in checks.values() for name in check.boxes_per_category)
    )
    width = max([len("median per image"), *map(len, names)])
    print(f"\n{'':<{width}}" + "".join(f"{split:>10}" for split in checks))
    rows: list[tuple[str, list[Any]]] = [
        ("images", [check.images for check in checks.values()]),
        ("without boxes", [check.images_without_boxes for check in checks.values()]),
        ("boxes", [check.boxes for check in checks.values()]),
        ("of them crowds", [check.crowd_boxes for check in checks.values()]),
    ]
    rows += [
        (size, [c.boxes_by_size[size] for c in checks.values()])
        for size in ("small", "medium", "large")
    ]
    rows += [
        (f"{figure} per image", [f"{c.boxes_per_image[figure]:g}" for c in checks.values()])
        for figure in ("median", "max")
    ]
    rows += [(name, [c.boxes_per_category.get(name, 0) for c in checks.values()]) for name in names]
    for title, values in rows:
        print(f"{title:<{width}}" + "".join(f"{value:>10}" for value in values))
    for split, check in checks.items():
        sizes = ", ".join(f"{size} ({count})" for size, count in check.image_sizes.items())
        print(f"\n{split}: image sizes {sizes}")
        for note in check.notes:
            print(f"  {note}")
        for defect in check.defects:
            _print_defect(defect)
    if between or unread:
        print("\nall splits:")
    for defect in between:
        _print_defect(defect)
    for line in unread:
        print(f"  {line}")


def _print_defect(defect: Defect) -> None:
    print(f"  {defect.count} {defect.what}")
    for example in defect.examples[:_SHOWN]:
        print(f"    {example}")
    if len(defect.examples) > _SHOWN:
        print(f"    and {len(defect.examples) - _SHOWN} more (--output writes all to check.json)")


def write_report(
    splits: dict[str, Annotations],
    checks: dict[str, SplitCheck],
    between: list[Defect],
    unread: list[str],
    output: Path,
) -> None:
    """Write check.json and a contact sheet for each split."""
    from detrelay.apps.contact_sheet import draw_contact_sheet

    output.mkdir(parents=True, exist_ok=True)
    content = {
        "splits": {name: asdict(check) for name, check in checks.items()},
        "between_splits": [asdict(defect) for defect in between],
        "not_compared": unread,
    }
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (output / "check.json").write_text(text + "\n", encoding="utf-8")
    for name, part in splits.items():
        if not any(defect.what == "images are missing" for defect in checks[name].defects):
            draw_contact_sheet(part, name, output / f"contact_sheet_{name}.png")
    print(f"\ncheck.json and contact sheets -> {output}")


def verdict(checks: dict[str, SplitCheck], between: list[Defect]) -> int:
    """Print a one-line verdict; returns the exit code."""
    defects = [defect for check in checks.values() for defect in check.defects] + between
    blocking = [defect for defect in defects if defect.blocks]
    empty = [
        name
        for name in next(iter(checks.values())).boxes_per_category
        if not any(check.boxes_per_category.get(name) for check in checks.values())
    ]
    remarks = [
        f"{split}: {defect.count} {defect.what}"
        for split, check in checks.items()
        for defect in check.defects
    ] + [f"{defect.count} {defect.what}" for defect in between]
    if empty:
        remarks.append(
            f"{len(empty)} categories have no box anywhere ({', '.join(empty[:_SHOWN])})"
        )
    remarks += [note for check in checks.values() for note in check.notes]
    if blocking:
        print(f"\nverdict: unusable: {'; '.join(f'{d.count} {d.what}' for d in blocking)}")
        return _UNUSABLE
    if remarks:
        print(f"\nverdict: usable, but look at this first: {'; '.join(dict.fromkeys(remarks))}")
        return _LOOK
    print("\nverdict: ready to train")
    return 0


def main() -> NoReturn:
    """Run the command line."""
    run(lambda: check_data(read_arguments(Arguments)))


if __name__ == "__main__":
    main()
