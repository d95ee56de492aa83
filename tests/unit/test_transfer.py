"""From a checkpoint to other classes: what is new is listed, everything else is kept."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForObjectDetection

from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.core.detector.transfer import transfer_weights
from detrelay.heads import HEADS
from factories import SMALL_HEADS, small_head_config
from tiny_run import shrink_backbone

OF_QUERIES = ("head.content", "head.queries", "head.anchors")


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        shrink_backbone(patch)
        yield


def save_small(case: str, folder: Path) -> Path:
    config = small_head_config(
        case, num_labels=4, id2label=dict(enumerate("abcd")), category_ids=[7, 3, 90, 11]
    )
    torch.manual_seed(0)
    model = HEADS[SMALL_HEADS[case][0]].model(config)
    for parameter in model.parameters():  # away from the initial values
        parameter.data += 0.01
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(small: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small("stageinteractor", tmp_path_factory.mktemp("models") / "saved")


@pytest.mark.parametrize(
    ("case", "classes"),
    [
        ("stageinteractor", {"num_labels": 7}),
        ("stageinteractor", {"id2label": {0: "x", 1: "y"}, "label2id": {"x": 0, "y": 1}}),
        ("deformable_detr_two_stage", {"num_labels": 7}),
        ("dn_detr", {"num_labels": 7}),
        ("dino", {"num_labels": 7}),
    ],
)
def test_every_renewed_weight_is_listed_and_all_others_are_kept(
    case: str, classes: dict[str, object], tmp_path: Path
) -> None:
    saved = save_small(case, tmp_path / "saved")
    old = AutoModelForObjectDetection.from_pretrained(saved).state_dict()
    model, report = AutoModelForObjectDetection.from_pretrained(
        saved, ignore_mismatched_sizes=True, output_loading_info=True, **classes
    )
    new = model.state_dict()
    assert old.keys() == new.keys()
    renewed = {key for key in new if new[key].shape != old[key].shape}
    assert renewed
    assert {key for key, *_ in report["mismatched_keys"]} == renewed
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert all(torch.equal(new[key], old[key]) for key in new if key not in renewed)
    count = classes.get("num_labels", 2)
    assert {new[key].shape[0] for key in renewed} == {count}
    for key in renewed:
        assert new[key].isfinite().all()
        if key.endswith("bias"):  # probability 0.01 for each class, as in a fresh model
            prior = torch.full_like(new[key], 0.01)
            torch.testing.assert_close(new[key].sigmoid(), prior, rtol=1e-5, atol=0)
    assert model.config.num_labels == count
    assert model.config.category_ids is None


def test_ids_of_categories_follow_their_classes(saved: Path) -> None:
    assert AutoConfig.from_pretrained(saved).category_ids == [7, 3, 90, 11]
    assert AutoConfig.from_pretrained(saved, num_labels=4).category_ids == [7, 3, 90, 11]
    renamed = AutoConfig.from_pretrained(saved, id2label=dict(enumerate("abcx")))
    assert renamed.category_ids is None
    own = AutoConfig.from_pretrained(saved, id2label={0: "x"}, label2id={"x": 0}, category_ids=[5])
    assert (own.category_ids, own.num_labels) == ([5], 1)


def test_code_of_a_model_is_not_saved_with_it(saved: Path, tmp_path: Path) -> None:
    model = AutoModelForObjectDetection.from_pretrained(saved)
    type(model.config).register_for_auto_class()  # as transformers does with the classes of a shim
    model.save_pretrained(tmp_path / "again")
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == [
        "config.json", "model.safetensors",
    ]  # fmt: skip


OTHER = dict(enumerate(["D", "x", "b", "y", "z"]))  # two of abcd, in another order


def fresh(case: str, **changes: Any) -> DetectorForObjectDetection:
    torch.manual_seed(1)
    config = small_head_config(case, id2label=OTHER, category_ids=[1, 2, 3, 4, 5], **changes)
    return HEADS[SMALL_HEADS[case][0]].model(config)


@pytest.mark.parametrize(
    ("case", "queries"), [*zip(sorted(SMALL_HEADS), cycle([11, 5, 8]), strict=False)]
)
def test_weights_transfer_to_other_classes_and_numbers_of_queries(
    case: str, queries: int, tmp_path: Path
) -> None:
    old = AutoModelForObjectDetection.from_pretrained(save_small(case, tmp_path / "saved"))
    model = fresh(case, num_queries=queries)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = transfer_weights(old, model)
    assert (found.kept_classes, found.new_classes) == (["D", "b"], ["x", "y", "z"])
    assert (found.old_queries, found.queries) == (8, queries)
    assert (found.new, found.left_out) == ([], [])
    for key, value in model.state_dict().items():
        given = old.state_dict()[key]
        if value.shape == given.shape and not key.startswith(OF_QUERIES):
            assert torch.equal(value, given), key
        elif key.startswith(OF_QUERIES):
            kept = min(8, queries)
            assert torch.equal(value[:kept], given[:kept])
            assert torch.equal(value[kept:], before[key][kept:])
        elif "classify_proposals" in key and case.startswith("deformable"):
            assert torch.equal(value[:4], given)  # entry 0 says "object", whatever the classes
            assert torch.equal(value[4:], before[key][4:])
        else:
            assert given.shape[0] == 4
            assert torch.equal(value[[0, 2]], given[[3, 1]]), key
            assert torch.equal(value[[1, 3, 4]], before[key][[1, 3, 4]]), key
    assert {key for key in before if before[key].shape != old.state_dict()[key].shape} >= {
        key for key in before if "classify" in key and key.endswith("bias") and "hidden" not in key
        and "norm" not in key
    }  # fmt: skip


def test_layers_that_are_more_or_fewer_are_named(tmp_path: Path) -> None:
    old = AutoModelForObjectDetection.from_pretrained(save_small("dn_detr", tmp_path / "saved"))
    more = transfer_weights(old, fresh("dn_detr", decoder_layers=5, encoder_layers=1))
    assert more.new == [
        *("head.classify.3", "head.classify.4", "head.layers.3", "head.layers.4"),
        *("head.refine.3", "head.refine.4"),
    ]
    assert more.left_out == ["head.encoder.layers.1"]
