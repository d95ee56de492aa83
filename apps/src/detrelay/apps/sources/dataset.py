"""The images of a dataset, with their ids."""

from __future__ import annotations

from pathlib import Path

from detrelay.apps.sources.item import Source, file_input


def open_dataset(data: Path, images: Path | None, *, allow_outside: bool) -> Source:
    """The images that a COCO json or the evaluation split of a place lists, with ids and sizes.

    Raises:
        DataError: the file cannot be used, or a name points outside the image folder.
    """
    from detrelay.core.data.places import evaluation_split
    from detrelay.core.data.readers import coco

    if data.is_file() and data.suffix == ".json":  # annotations are optional
        listed = coco.read(data, images, annotated=False, allow_outside=allow_outside)
    else:
        listed = evaluation_split(str(data), images, allow_outside=allow_outside)
    return Source(
        [
            file_input(listed.images.open(row), listed.images.name(row), image_id, tuple(size))
            for row, (image_id, size) in enumerate(
                zip(listed.image_ids.tolist(), listed.sizes.tolist(), strict=True)
            )
        ]
    )
