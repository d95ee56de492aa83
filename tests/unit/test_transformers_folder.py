"""Folders of transformers: the same detections, and what is rejected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForObjectDetection, ResNetConfig
from transformers import DeformableDetrConfig as TheirConfig
from transformers import DeformableDetrForObjectDetection as TheirModel

from detrelay.apps.convert import Arguments, convert
from detrelay.heads.convert.conversion import convert_checkpoint
from detrelay.heads.convert.transformers_folder import read_image_settings, to_official_names


@pytest.mark.parametrize("variant", ["base", "refine", "two_stage"])
def test_folder_of_transformers(variant: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = TheirConfig(
        backbone_config=ResNetConfig(
            hidden_sizes=[64, 128, 256, 512],
            depths=[2, 2, 2, 2],
            layer_type="basic",
            out_features=["stage2", "stage3", "stage4"],
        ),
        d_model=64,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=7,
        id2label={0: "cat", 1: "dog", 2: "hen"},
        with_box_refine=variant != "base",
        two_stage=variant == "two_stage",
        two_stage_num_proposals=7,
    )
    theirs = TheirModel(config).eval()
    if variant == "two_stage":  # else the features of all padding would tie with the best ones
        theirs.model.enc_output_norm.weight.data.neg_()
    for name, parameter in theirs.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.05)
    theirs.save_pretrained(tmp_path / "theirs")
    output = tmp_path / "ours"
    assert convert(Arguments(checkpoint=tmp_path / "theirs", output=output)) == 0
    ours = AutoModelForObjectDetection.from_pretrained(output).eval()
    pixels, mask = torch.randn(2, 3, 96, 128), torch.ones(2, 96, 128, dtype=torch.int64)
    mask[1, 70:], pixels[1, :, 70:] = 0, 0
    with torch.no_grad():
        expected, found = theirs(pixels, mask), ours(pixels, mask)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.pred_boxes, expected.pred_boxes, atol=1e-5, rtol=1e-4)
    assert ours.config.id2label == {0: "cat", 1: "dog", 2: "hen"}
    assert ours.config.num_attention_heads == 4
    facts = json.loads((output / "training.json").read_text())["converted"]
    assert facts["program"] == "huggingface/transformers"
    assert facts["checkpoint"] == "theirs/model.safetensors"


def test_folders_of_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config.json: cannot be read as a model's config"):
        convert_checkpoint(tmp_path)
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "detr"}')
    with pytest.raises(ValueError, match="expected model_type 'deformable_detr', found 'detr'"):
        convert_checkpoint(tmp_path)
    config.write_text('{"model_type": "deformable_detr", "dilation": true}')
    with pytest.raises(ValueError, match="a dilated backbone cannot be converted"):
        convert_checkpoint(tmp_path)
    config.write_text('{"model_type": "deformable_detr"}')
    with pytest.raises(ValueError, match=r"model.safetensors: no such file"):
        convert_checkpoint(tmp_path)


def test_queries_keys_and_values_are_joined_under_the_released_name() -> None:
    layer = "model.decoder.layers.0.self_attn."
    parts = {f"{layer}{part}_proj.bias": torch.full((2,), n) for n, part in enumerate("kqv")}
    state, used = to_official_names(parts)
    (name,) = state
    assert name == "transformer.decoder.layers.0.self_attn.in_proj_bias"
    assert state[name].tolist() == [1, 1, 0, 0, 2, 2]
    assert used == [(f"{layer}{part}_proj.bias", name) for part in "qkv"]
    with pytest.raises(ValueError, match=r"model\.odd: not an entry of transformers' Defor"):
        to_official_names({"model.odd": torch.zeros(1)})


def test_sizes_of_images_may_stand_in_the_old_form(tmp_path: Path) -> None:
    assert read_image_settings(tmp_path) == {}
    path = tmp_path / "preprocessor_config.json"
    path.write_text('{"size": 800, "max_size": 1333, "do_pad": true}')
    size = {"shortest_edge": 800, "longest_edge": 1333}
    assert read_image_settings(tmp_path) == {"size": size}
    path.write_text('{"size": {"height": 1}}')
    with pytest.raises(ValueError, match="size must state longest_edge and shortest_edge"):
        read_image_settings(tmp_path)
