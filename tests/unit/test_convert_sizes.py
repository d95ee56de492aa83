"""Sizes, classes and variant of a released checkpoint, from its names and shapes."""

from __future__ import annotations

import pytest

from detrelay.heads.convert.conversion import convert_state_dict
from detrelay.heads.convert.sizes import guess_head, match_variant
from official import hollow, small_state


def test_sizes_are_read_from_shapes() -> None:
    conversion = convert_state_dict(small_state("two_stage"), variant="two_stage")
    config = conversion.config
    assert (config.encoder_layers, config.decoder_layers, config.num_labels) == (1, 1, 91)
    assert (config.two_stage, config.box_refinement, config.num_queries) == (True, True, 300)
    assert (config.backbone_name, config.backbone_norm) == ("resnet50", "frozen")


def test_other_classes_get_no_names_of_coco() -> None:
    state = small_state()
    for key in [key for key in state if "class_embed" in key]:
        state[key] = state[key][:3]
    config = convert_state_dict(state).config
    assert (config.num_labels, config.category_ids) == (3, None)


def test_eighty_classes_are_those_of_coco() -> None:
    state = small_state()
    for key in [key for key in state if "class_embed" in key]:
        state[key] = state[key][:80]
    config = convert_state_dict(state).config
    assert (config.id2label[79], config.category_ids[79]) == ("toothbrush", 90)


def test_a_part_that_tells_a_size_is_missing() -> None:
    state = small_state()
    del state["query_embed.weight"]
    with pytest.raises(ValueError, match=r"not a whole checkpoint .* it has no query_embed.weight"):
        convert_state_dict(state)


def test_the_head_is_recognised_by_its_own_entry() -> None:
    assert guess_head(small_state()) == "deformable_detr"
    dino = hollow(
        {"transformer.level_embed": [4, 256], "transformer.enc_out_class_embed.weight": [1]}
    )
    assert guess_head(dino) == "dino"
    with pytest.raises(ValueError, match="no head is known by these names, such as a, b"):
        guess_head(hollow({"b": [1], "a": [1]}))


def test_variants_are_recognised_by_their_sizes() -> None:
    sizes = {"backbone_name": "resnet50", "num_levels": 5, "d_model": 256}
    assert match_variant(sizes, "dino", None) == "r50_5scale"
    assert match_variant({**sizes, "num_levels": 3}, "dino", None) is None
    with pytest.raises(ValueError, match=r"num_levels 5 instead of 4; it is r50_5scale"):
        match_variant(sizes, "dino", "r50_4scale")
