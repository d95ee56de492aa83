"""Build the criterion of a recipe's head: assigners and losses of every stage group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from detrelay.assigners import build_assigner
from detrelay.core.criterion import Assigner, Criterion, check_join
from detrelay.core.detector.config import DetectorConfig
from detrelay.core.errors import RecipeError, one_line
from detrelay.core.losses import LossConfig, changed
from detrelay.core.progress import TrainingProgress
from detrelay.core.recipes.recipe import AssignerSettings, GroupSettings, Recipe
from detrelay.core.structures import GroupFacts
from detrelay.heads import HeadEntry, find_head

_DECODER = "decoder"
# groups that need no entry in the recipe: they are matched one to one
_MATCHED_BY_DEFAULT = ("proposals",)


def head_entry(name: str) -> HeadEntry:
    """The head of that name; a custom one may be in the working directory.

    Raises:
        RecipeError: there is no such head.
    """
    try:
        return find_head(name)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def model_config(recipe: Recipe, entry: HeadEntry, **values: Any) -> DetectorConfig:
    """The config of the recipe's model.

    Raises:
        RecipeError: the head rejects its settings.
    """
    try:
        return entry.config(**values, **recipe.model)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise RecipeError(f"model settings of head {recipe.head}: {one_line(error)}") from error


def build_criterion(recipe: Recipe) -> Criterion:
    """The head's published losses with the recipe's changes, and an assigner for each group.

    Raises:
        RecipeError: an unknown part, option or group, a group without an assigner, or an impossible
            combination; says which key and why.
    """
    entry = head_entry(recipe.head)
    facts = model_config(recipe, entry).training_groups()
    if facts is not None:
        recipe = replace(recipe, groups=_by_group(recipe.groups, facts))
        _check_groups(recipe, facts)
    progress = TrainingProgress()
    try:
        loss = changed(entry.model.loss_config, recipe.loss)
        losses = {
            name: changed(loss, group.loss, f"groups.{name}.loss")
            for name, group in recipe.groups.items()
            if group.loss
        }
        assigners: dict[str, Assigner] = {}
        built: list[tuple[AssignerSettings, LossConfig, Assigner]] = []
        for name, settings in _assigners(recipe, entry).items():
            own = losses.get(name, loss)
            # groups that are assigned alike share the object, and so one call
            same = [one for made, of, one in built if made == settings and of == own]
            assigners[name] = same[0] if same else build_assigner(settings, own, progress)
            built.append((settings, own, assigners[name]))
        criterion = Criterion(
            loss.terms(progress),
            assigners,
            {name: group.weight for name, group in recipe.groups.items()},
            group_terms={name: own.terms(progress) for name, own in losses.items()},
            joins={name: group.joins for name, group in recipe.groups.items() if group.joins},
            progress=progress,
        )
    except (ValueError, TypeError) as error:
        raise RecipeError(one_line(error)) from error
    if facts is not None:
        _check_references(assigners, criterion.joins, facts)
    return criterion


def _assigners(recipe: Recipe, entry: HeadEntry) -> dict[str, AssignerSettings]:
    """Settings by group."""
    name = recipe.assigner.name or entry.assigner
    options = {**entry.model.assigner_options.get(name, {}), **recipe.assigner.options}
    found = {_DECODER: replace(recipe.assigner, name=name, options=options)}
    for name in _MATCHED_BY_DEFAULT:
        found[name] = AssignerSettings()
    for name, group in recipe.groups.items():
        if group.joins:
            found.pop(name, None)
        elif group.assigner is not None:
            found[name] = group.assigner
    return found


def _by_group(
    settings: Mapping[str, GroupSettings], facts: tuple[GroupFacts, ...]
) -> dict[str, GroupSettings]:
    """Settings by group: the table "group" applies to each "group/..." without its own."""
    families = {fact.name: fact.name.split("/")[0] for fact in facts if "/" in fact.name}
    shared = {
        name: settings[family]
        for name, family in families.items()
        if family in settings and name not in settings
    }
    own = {name: group for name, group in settings.items() if name not in families.values()}
    return {**own, **shared}


def _check_groups(recipe: Recipe, facts: tuple[GroupFacts, ...]) -> None:
    """Reject settings of groups that the head does not have or does not support."""
    known = {fact.name: fact for fact in facts}
    for name, group in recipe.groups.items():
        if name not in known:
            raise RecipeError(
                f"groups.{name}: head {recipe.head} has no such group of stages with these "
                f"settings; it has {', '.join(known)}"
            )
        _check_group(name, group, known)
        leader = recipe.groups.get(group.joins or "", GroupSettings())
        if leader.joins:
            raise RecipeError(f"groups.{name}.joins: {group.joins} itself joins {leader.joins}")
    for name, fact in known.items():
        settings = recipe.groups.get(name, GroupSettings())
        served = name == _DECODER or name in _MATCHED_BY_DEFAULT or fact.known_pairs
        if not served and settings.assigner is None and settings.joins is None:
            raise RecipeError(
                f"groups.{name}: head {recipe.head} has this group of stages, and nothing assigns "
                f"it; set groups.{name}.assigner.name or groups.{name}.joins"
            )


def _check_group(name: str, group: GroupSettings, known: Mapping[str, GroupFacts]) -> None:
    if known[name].known_pairs and (group.assigner is not None or group.joins is not None):
        raise RecipeError(
            f"groups.{name}: which query learns which object is known by construction there, so no "
            f"assigner is used; remove its assigner and joins"
        )
    if name == _DECODER and (group.assigner is not None or group.joins is not None):
        raise RecipeError(f"groups.{name}: its assigner is set in the table assigner")
    if group.joins is None:
        return
    if group.assigner is not None:
        raise RecipeError(
            f"groups.{name}: it joins {group.joins}, whose assigner serves both; remove its own"
        )
    if group.joins not in known:
        raise RecipeError(
            f"groups.{name}.joins: unknown group {group.joins}; the head has {', '.join(known)}"
        )
    leader = known[group.joins]
    if leader.known_pairs or leader.name == name:
        raise RecipeError(f"groups.{name}.joins: {group.joins} has no assigner to join")
    try:
        check_join(known[name], leader)
    except ValueError as error:
        raise RecipeError(f"groups.{name}.joins: {error}") from error


def _check_references(
    assigners: Mapping[str, Assigner], joins: Mapping[str, str], facts: tuple[GroupFacts, ...]
) -> None:
    """Reject assigners that need boxes which the head does not provide."""
    for fact in facts:
        assigner: Any = assigners.get(joins.get(fact.name, fact.name))
        while assigner is not None:
            boxes = getattr(assigner, "boxes", "predicted")
            if boxes != "predicted" and not fact.references:
                raise RecipeError(
                    f"the assigner of group {fact.name} needs the boxes that stages started "
                    f"from (boxes = {boxes!r}), which the head does not provide; use boxes = "
                    f"'predicted'"
                )
            assigner = getattr(assigner, "base", None)
