"""Write docs/target_matrix.md: which training targets go with which heads, and their sources.

python benchmarks/target_matrix.py
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from detrelay.apps.training_targets import build_criterion, head_entry
from detrelay.assigners import ASSIGNERS
from detrelay.core.class_losses import CLASS_LOSSES
from detrelay.core.errors import RecipeError
from detrelay.core.recipes.recipe import AssignerSettings, Recipe
from detrelay.heads import HEADS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "target_matrix.md"
PARITY = ROOT / "tests" / "parity"
# every head, and a variant with other stage groups
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in HEADS},
    "deformable_detr_two_stage": ("deformable_detr", {"box_refinement": True, "two_stage": True}),
}
# settings that add stage groups, and the groups; `tests/unit/test_passes.py` runs them
PASSES: dict[str, tuple[dict[str, Any], str]] = {
    "hybrid_queries": ({"hybrid_queries": 4}, "hybrid"),
    "query_groups": ({"query_groups": 2}, "group/1"),
    "recollect_queries": (
        {"recollect_queries": True, "max_reused_filters": 0, "reuse_spatial_filters": False},
        "recollected",
    ),
    "without_self_attention": ({"without_self_attention": True}, "no_self_attention"),
    "one_to_many_branch": ({"one_to_many_branch": True}, "one_to_many"),
}


class Cell(NamedTuple):
    """One combination.

    Attributes:
        assigner: of the decoder.
        class_loss: of all groups.
        case: a key of `CASES`.
    """

    assigner: str
    class_loss: str
    case: str


@dataclass(frozen=True)
class Idea:
    """A published training target.

    Attributes:
        name: of the method.
        source: who and where.
        rule: what it does.
        setting: the recipe values.
        tests: functions in `tests/parity` that compare with numbers of the released code.
    """

    name: str
    source: str
    rule: str
    setting: str
    tests: tuple[str, ...] = field(default=())


IDEAS = (
    Idea(
        "Cross-stage labels (StageInteractor)",
        "Teng et al., ICCV 2023, arXiv 2304.04978",
        "A query also learns classes that it was given at other stages, if its box fits the "
        "object. Boxes stay those of its own stage.",
        'assigner `"cross_stage"`',
        ("test_assigner_cases",),
    ),
    Idea(
        "Hybrid matching (H-DETR)",
        "Jia et al., CVPR 2023, arXiv 2207.13080",
        "A second query set, hidden from the first, is matched to every object six times.",
        '`model.hybrid_queries`, group `hybrid`, assigner `"repeated"`',
        ("test_hdetr",),
    ),
    Idea(
        "Query groups (Group DETR)",
        "Chen et al., ICCV 2023, arXiv 2207.13085",
        "Several sets of queries, each hidden from the others and matched one to one.",
        "`model.query_groups`, groups `group/1`, ...",
        ("test_groupdetr",),
    ),
    Idea(
        "Query recollection (SQR)",
        "Chen et al., CVPR 2023, arXiv 2212.07593",
        "Every stage also refines queries that skipped the stage before it.",
        "`model.recollect_queries`, group `recollected`",
    ),
    Idea(
        "Mixed supervision (MS-DETR)",
        "Zhao et al., CVPR 2024, arXiv 2401.03989",
        "Predictions between cross-attention and self-attention learn one to many: up to six "
        "queries per object by 0.7 IoU + 0.3 p.",
        '`model.one_to_many_branch`, group `one_to_many`, assigner `"one_to_many"`',
        ("test_msdetr",),
    ),
    Idea(
        "Divided decoder (DAC-DETR)",
        "Hu et al., NeurIPS 2023",
        "The same queries run once more without self-attention and learn one to many, assigned by "
        "the decoder's boxes.",
        '`model.without_self_attention`, group `no_self_attention`, assigner `"rank_weighted"` '
        'over `"one_to_many"`',
        ("test_dacdetr",),
    ),
    Idea(
        "IoU assignment (DETA)",
        "Ouyang-Zhang et al., arXiv 2212.06137",
        "Up to four queries per object by the overlap of the boxes they start from, the same in "
        "all stages; NMS removes duplicates.",
        'assigner `"iou"`, `train.nms_iou_threshold`',
        ("test_deta",),
    ),
    Idea(
        "Union of matches (D-FINE)",
        "Peng et al., ICLR 2025, arXiv 2410.13842",
        "Box losses of every stage use the matches of all stages together; class losses keep "
        "their own.",
        'assigner `"union"`, on DINO `groups.proposals.joins = "decoder"`',
        ("test_union",),
    ),
    Idea(
        "Stable matching (Stable-DINO)",
        "Liu et al., ICCV 2023, arXiv 2304.04742",
        "The target score is the squared IoU, scaled to 1 for the best of an image; the matching "
        "cost weights scores by position.",
        'class loss `"position_supervised"`, cost `"position_modulated"`',
        ("test_stabledino",),
    ),
    Idea(
        "Aligned scores (Align-DETR)",
        "Cai et al., BMVC 2024, arXiv 2304.07527",
        "The target score is p^0.25 IoU^0.75. Inner stages match two queries per object, the "
        "worse one with a smaller weight.",
        'class loss `"ia_bce"`, assigner `"rank_weighted"` over `"repeated"`',
        ("test_aligndetr",),
    ),
    Idea(
        "Rank-oriented targets (Rank-DETR)",
        "Pu et al., NeurIPS 2023, arXiv 2310.08854",
        "The target score is (GIoU + 1) / 2; the last quarter of training matches by p IoU^4.",
        'class loss `"rank_giou"`, cost `"high_order"` with `start = 0.75`',
        ("test_rankdetr",),
    ),
    Idea(
        "Varifocal loss (RT-DETR)",
        "Zhao et al., CVPR 2024, arXiv 2304.08069",
        "The target score is the IoU, which also weights the positives.",
        'class loss `"varifocal"`',
        ("test_rtdetr",),
    ),
    Idea(
        "Matchability-aware loss (DEIM)",
        "Huang et al., CVPR 2025, arXiv 2412.04234",
        "The target score is IoU^1.5; a positive has weight 1 however poor its box.",
        'class loss `"matchability"`',
        ("test_union",),
    ),
    Idea(
        "Softmax set loss (DETR)",
        "Carion et al., ECCV 2020, arXiv 2005.12872",
        'Cross entropy over the classes and "no object", which has weight 0.1.',
        'class loss `"softmax"`, cost `"softmax"`',
        ("test_detr",),
    ),
    Idea(
        "simOTA",
        "Ge et al., CVPR 2021, arXiv 2103.14259",
        "An object takes as many of its cheapest queries as its best overlaps add up to.",
        'assigner `"simota"`',
        ("test_simota",),
    ),
    Idea(
        "Restricted matching (TSP-RCNN)",
        "Sun et al., ICCV 2021, arXiv 2011.10881",
        "Of the queries that fit an object, the cheapest learns its class; all learn its box.",
        'assigner `"restricted"`',
        ("test_tsp",),
    ),
)


def cells() -> Iterator[Cell]:
    """Every combination of assigner, class loss and head."""
    for assigner in ASSIGNERS:
        for class_loss in CLASS_LOSSES:
            for case in CASES:
                yield Cell(assigner, class_loss, case)


def recipe_of(cell: Cell) -> Recipe:
    """The recipe of a combination."""
    head, model = CASES[cell.case]
    return Recipe(
        head=head,
        model=model,
        assigner=AssignerSettings(cell.assigner),
        loss={"class_loss": cell.class_loss},
    )


def page() -> str:
    """The page of the docs."""
    parts = [
        "# The target matrix",
        "<!-- written by benchmarks/target_matrix.py -->",
        "How a recipe names these parts, and how they combine: [targets.md](targets.md).",
        "![Who learns what under three assigners](images/targets.png)",
        "*A real image of blood cells (BCCD, MIT licence) with planted predictions, not those of a "
        "trained model: four objects with three queries each and two strays, in three stages. "
        "Solid: learns class and box; dashed: the class only; dotted: the box only; grey: nothing. "
        "`cross_stage` shares labels across stages, `union` boxes, `one_to_many` (here without its "
        "limit to a quarter of the queries) gives both to every query that fits. Made by "
        "`benchmarks/targets_picture.py`.*",
        "## Assigners and heads",
        "How many of the class losses " + ", ".join(f"`{name}`" for name in CLASS_LOSSES) + " a "
        "head trains with under each assigner: every one is two steps in a test "
        "(`tests/integration/test_target_matrix.py`), with finite losses and a gradient for every "
        "parameter.",
        _table(["assigner", *(f"`{case}`" for case in CASES)], assigner_rows()),
        "## Decoder passes and heads",
        "Further stage groups that a head can train in addition to its decoder; they do not affect "
        "evaluation (`tests/unit/test_passes.py`).",
        _table(["setting", "groups", *(f"`{case}`" for case in CASES)], _pass_rows()),
        "## Ideas",
        "Parity is the largest difference from numbers of the released code that a test in "
        "`tests/parity` allows, in float64: of losses relative, of gradients relative to the "
        "largest. Pairs must be equal.",
        _table(["idea", "source", "rule", "setting", "parity"], _idea_rows()),
    ]
    return "\n\n".join(parts) + "\n"


def assigner_rows() -> Iterator[list[str]]:
    """Each assigner, and how many class losses work with it on each head."""
    for assigner in ASSIGNERS:
        counts = []
        for case in CASES:
            built = [_builds(Cell(assigner, loss, case)) for loss in CLASS_LOSSES]
            counts.append(f"{sum(built)} of {len(built)}")
        yield [f"`{assigner}`", *counts]


def _builds(cell: Cell) -> bool:
    try:
        build_criterion(recipe_of(cell))
    except RecipeError:
        return False
    return True


def _pass_rows() -> Iterator[list[str]]:
    for setting, (values, group) in PASSES.items():
        marks = ["yes" if _has(case, values, group) else "-" for case in CASES]
        yield [f"`{setting}`", f"`{group}`", *marks]


def _has(case: str, values: dict[str, Any], group: str) -> bool:
    head, model = CASES[case]
    config = head_entry(head).config
    known = {key: value for key, value in values.items() if key in config.__dataclass_fields__}
    if next(iter(values)) not in known:
        return False
    facts = config(**model, **known).stage_groups() or ()
    return group in {fact.name for fact in facts}


def _idea_rows() -> Iterator[list[str]]:
    for idea in IDEAS:
        parity = ", ".join(_parity(name) for name in idea.tests) or "no released numbers"
        yield [idea.name, idea.source, idea.rule, idea.setting, parity]


def _parity(test: str) -> str:
    """Tolerances of a parity test, from its source."""
    found = _functions(*sorted(PARITY.glob("test_*.py")))
    if test not in found:
        raise ValueError(f"no parity test {test} in {PARITY}")
    shared = _functions(ROOT / "tests" / "target_vectors.py")
    limits: dict[str, float] = {}
    for call in ast.walk(found[test]):
        if not isinstance(call, ast.Call):
            continue
        called = getattr(call.func, "id", getattr(call.func, "attr", ""))
        if called in ("check_losses", "check_weighted", "check_total", "close"):
            default = _default(shared["check_losses"], "rel")
            _raise_to(limits, "losses", _tolerance(call, "rel", default))
        if called == "check_total":
            default = _default(shared["check_total"], "grad")
            _raise_to(limits, "gradients", _tolerance(call, "grad", default))
        if called == "assert_close":
            _raise_to(limits, "gradients", _tolerance(call, "rtol", 0.0))
    return ", ".join(f"{what} {limit:.0e}" for what, limit in limits.items())


def _raise_to(limits: dict[str, float], what: str, limit: float) -> None:
    limits[what] = max(limits.get(what, 0.0), limit)


def _tolerance(call: ast.Call, keyword: str, default: float) -> float:
    """A number in a call, by keyword or, for `rel`, by position."""
    by_name = [item.value for item in call.keywords if item.arg == keyword]
    by_place = call.args if keyword == "rel" else []
    numbers = [node.value for node in (*by_name, *by_place) if isinstance(node, ast.Constant)]
    return next((value for value in numbers if isinstance(value, float)), default)


@cache
def _functions(*files: Path) -> dict[str, ast.FunctionDef]:
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    nodes = [node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {node.name: node for node in nodes}


def _default(function: ast.FunctionDef, argument: str) -> float:
    names = [arg.arg for arg in function.args.args]
    values = dict(zip(reversed(names), reversed(function.args.defaults), strict=False))
    return float(ast.literal_eval(values[argument]))


def _table(head: list[str], rows: Iterator[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
