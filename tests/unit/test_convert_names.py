"""Names of the released code and ours."""

from __future__ import annotations

import pytest
import torch

from detrelay.heads.convert.names import layout_of
from detrelay.heads.stageinteractor.config import ADAMIXER
from factories import small_head_config


def test_one_head_for_all_layers_has_several_names() -> None:
    layout = layout_of(small_head_config("deformable_detr"))
    names = [f"class_embed.{layer}.bias" for layer in range(3)]
    assert layout.all_names("class_embed.0.bias") == names
    assert {layout.first_name(name) for name in names} == {"class_embed.0.bias"}
    assert layout.all_names("query_embed.weight") == ["query_embed.weight"]


def test_heads_of_two_stages_appear_twice_and_the_last_is_the_encoders() -> None:
    layout = layout_of(small_head_config("deformable_detr_two_stage"))
    name = "bbox_embed.1.layers.0.bias"
    assert layout.all_names(name) == [name, f"transformer.decoder.{name}"]
    assert layout.first_name(f"transformer.decoder.{name}") == name
    assert layout.table.ours("class_embed.2.bias") == "head.classify.2.bias"
    assert layout.table.ours("class_embed.3.bias") == "head.classify_proposals.bias"


def test_the_decoder_of_dino_shares_its_heads() -> None:
    layout = layout_of(small_head_config("dino"))
    assert layout.first_name("transformer.decoder.bbox_embed.2.layers.1.bias") == (
        "bbox_embed.0.layers.1.bias"
    )
    assert len(layout.all_names("class_embed.0.weight")) == 6
    theirs = "transformer.decoder.layers.2.norm1.weight"
    assert layout.table.ours(theirs) == "head.layers.2.cross_attention_norm.weight"


def test_an_adamixer_is_recognised_by_its_settings() -> None:
    layout = layout_of(small_head_config("stageinteractor", **ADAMIXER))
    (start,) = layout.constants.values()
    assert torch.equal(start, torch.tensor([0.5, 0.5, 1.0, 1.0]).expand(8, 4))
    assert not layout_of(small_head_config("stageinteractor")).constants


def test_a_head_without_released_checkpoints_is_refused() -> None:
    with pytest.raises(ValueError, match="no released checkpoints are known for this head"):
        layout_of(small_head_config("dn_detr"))
