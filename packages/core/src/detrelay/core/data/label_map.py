"""The categories a model learns: one list for training and evaluation, with ids and names kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from detrelay.core.data.annotations import Annotations
from detrelay.core.data.sample import Category, some
from detrelay.core.errors import DataError


def with_categories(held_out: Annotations, learned: Annotations) -> Annotations:
    """The same boxes, with the categories of another split.

    Categories correspond by id and must then have the same name; by name if one of the formats has
    no ids. The other split may have categories that this one lacks.

    Raises:
        DataError: a box of `held_out` has a category that `learned` lacks, or an id has another
            name there.
    """
    by_id = held_out.own_ids and learned.own_ids
    known = {
        category.id if by_id else category.name: (row, category)
        for row, category in enumerate(learned.categories)
    }
    used = np.bincount(held_out.box_class, minlength=len(held_out.categories))
    place = np.full(len(held_out.categories), -1, dtype=np.int64)
    strange, notes = [], []
    for row, category in enumerate(held_out.categories):
        match = known.get(category.id if by_id else category.name)
        if match is not None and match[1].name == category.name:
            place[row] = match[0]
        elif used[row] or match is not None:
            strange.append(category)
        else:
            notes.append(f"category {_listed([category])} left out: training lacks it, no box here")
    if strange:
        raise DataError(
            f"{held_out.source}: its categories must be among those of {learned.source} "
            f"({_listed(learned.categories)}), found {_listed(strange)}"
        )
    return replace(
        held_out,
        categories=learned.categories,
        box_class=place[held_out.box_class],
        notes=(*held_out.notes, *notes),
    )


def chosen_categories(
    annotations: Annotations, names: Sequence[str] = (), *, keep_unused: bool = True
) -> Annotations:
    """Only some categories and their boxes; all images are kept.

    Args:
        annotations: what a reader found.
        names: the categories to keep, still in the order of their ids; empty for all.
        keep_unused: keep categories without boxes.

    Raises:
        DataError: a name is not a category, or nothing is left.
    """
    found = [category.name for category in annotations.categories]
    for name in names:
        if name not in found:
            raise DataError(
                f"data.categories: {annotations.source} has no category {name!r}; known are "
                f"{_listed(annotations.categories)}"
            )
    counts = np.bincount(annotations.box_class, minlength=len(found))
    kept = np.array([not names or name in names for name in found])
    unused = kept & (counts == 0)
    if not keep_unused:
        kept &= counts > 0
    if not kept.any():
        raise DataError(f"{annotations.source}: no category with a box is left")
    if kept.all():
        return annotations
    notes = []
    without = [category for row, category in enumerate(annotations.categories) if not kept[row]]
    boxes = int(counts[~kept].sum())
    notes.append(f"categories left out: {_listed(without)} ({boxes} boxes)")
    if not keep_unused and unused.any():
        notes.append(f"{int(unused.sum())} of them have no box")
    chosen = annotations.with_boxes(kept[annotations.box_class])
    place = kept.cumsum() - 1
    return replace(
        chosen,
        categories=tuple(
            category for row, category in enumerate(annotations.categories) if kept[row]
        ),
        box_class=place[chosen.box_class],
        notes=(*annotations.notes, *notes),
    )


def _listed(categories: Sequence[Category]) -> str:
    return some([f"{category.id} {category.name}" for category in categories], examples=12)
