"""Released checkpoints to our names: what is dropped, and every fault named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from detrelay.heads import StageInteractorConfig
from detrelay.heads.convert.conversion import convert_checkpoint, convert_state_dict, translate
from official import all_shapes, hollow, small_state


def test_wrong_names_of_head_and_variant_are_refused() -> None:
    state = small_state()
    with pytest.raises(ValueError, match=r"unknown head deformable; did you mean deformable_detr"):
        convert_state_dict(state, "deformable")
    with pytest.raises(ValueError, match=r"unknown variant r50 of deformable_detr; known are base"):
        convert_state_dict(state, variant="r50")
    with pytest.raises(
        ValueError, match=r"not a checkpoint of dino: it has no transformer.enc_out"
    ):
        convert_state_dict(state, "dino")
    with pytest.raises(
        ValueError,
        match=r"not variant refine of deformable_detr: box_refinement False instead of True; it is "
        r"base",
    ):
        convert_state_dict(state, variant="refine")
    with pytest.raises(ValueError, match="no head is known by these names, such as a"):
        convert_state_dict({"a": torch.zeros(1)})


def test_every_fault_is_in_one_message() -> None:
    state = small_state()
    del state["transformer.reference_points.bias"]
    state["transformer.extra.weight"] = torch.zeros(1)
    state["transformer.reference_points.weight"] = torch.zeros(3, 256)
    with pytest.raises(ValueError, match="the entries are not those of the model") as caught:
        convert_state_dict(state)
    for part in (
        r"1 missing (our names): head.reference.bias",
        "1 of another shape: head.reference.weight [3, 256] instead of [2, 256]",
        "1 unknown: transformer.extra.weight",
    ):
        assert part in str(caught.value)


def test_copies_must_agree() -> None:
    state = small_state("refine")
    name = "transformer.decoder.bbox_embed.0.layers.0.bias"
    state[name] = torch.ones(256)
    with pytest.raises(ValueError, match=f"{name} differs from bbox_embed.0.layers.0.bias"):
        convert_state_dict(state)


def test_dead_entries_are_named_with_the_reason() -> None:
    shapes = all_shapes("stageinteractor", "r50_1x", None)
    tail = {key: shape for key, shape in shapes.items() if not key.startswith("backbone.")}
    dropped = translate(hollow(tail), StageInteractorConfig()).dropped
    assert dropped["rpn_head.init_proposal_bboxes"].startswith("constant")
    assert len([key for key in dropped if "subbox_score_list" in key]) == 2 * (1 + 2 + 3 + 4)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit",)


def test_files_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    with pytest.raises(ValueError, match=r"model.pth: no such file"):
        convert_checkpoint(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"model.pth: cannot be read as weights"):
        convert_checkpoint(path)
    torch.save({"model": {"a": Bomb()}}, path)
    with pytest.raises(ValueError, match=r"model.pth: cannot be read as weights: .*exec"):
        convert_checkpoint(path)
    torch.save({"model": 3}, path)
    with pytest.raises(ValueError, match="expected a state dict of tensors, alone or under one of"):
        convert_checkpoint(path)
    torch.save({"state_dict": {"a": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match=r"model.pth: no head is known by these names"):
        convert_checkpoint(path)
