from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForObjectDetection, ResNetConfig
from transformers import DeformableDetrConfig as TheirConfig
from transformers import DeformableDetrForObjectDetection as TheirModel

from detrelay.apps.convert import Arguments, convert, facts_of_conversion, published_figures, write
from detrelay.heads import StageInteractorConfig
from detrelay.heads.convert.conversion import convert_checkpoint, convert_state_dict, translate
from official import LISTED, all_shapes, hollow, listed_shapes, shallow, with_second_names


def small_state(variant: str = "base") -> dict[str, Tensor]:
    """Entries of a Deformable DETR with one layer."""
    entries = shallow(listed_shapes("deformable_detr", variant, None), 1, 1)
    return hollow(with_second_names(entries, "deformable_detr", variant, 1))


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


def test_a_part_that_tells_a_size_is_missing() -> None:
    state = small_state()
    del state["query_embed.weight"]
    with pytest.raises(ValueError, match=r"not a whole checkpoint .* it has no query_embed.weight"):
        convert_state_dict(state)


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


def test_a_folder_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr(
        "detrelay.core.data.image_processing.DetrelayImageProcessor.save_pretrained", fail
    )
    conversion = convert_state_dict(small_state())
    file = tmp_path / "weights.pth"
    file.touch()
    with pytest.raises(OSError, match="no room"):
        write(conversion, file, tmp_path / "ours")
    assert list(tmp_path.iterdir()) == [file]


def test_an_old_folder_is_never_touched(tmp_path: Path) -> None:
    kept = tmp_path / "notes.txt"
    kept.write_text("mine")
    with pytest.raises(ValueError, match="already there; name a new folder"):
        convert(Arguments(checkpoint=tmp_path / "none.pth", output=tmp_path))
    assert kept.read_text() == "mine"


FIGURES = {
    ("stageinteractor", "r50_1x"): {
        "stageinteractor_r50_1x": "AP 44.8, AP50 63.0, AP75 48.4",
        "stageinteractor_r50_1x_no_labels": "AP 43.0, AP50 61.5, AP75 45.7",
    },
    ("stageinteractor", "r101_3x"): {},
    ("deformable_detr", "refine"): {
        "deformable_detr_refine_r50_50e": "AP 46.2, AP small 28.3, medium 49.2, large 61.5"
    },
    ("dino", "r50_4scale"): {
        "align_detr_r50_12e": "AP 50.3, AP50 67.9, AP75 54.8",
        "stable_dino_r50_12e": "AP 50.4",
        "dino_r50_4scale_12e": "AP 49.0",
        "dino_r50_4scale_24e": "AP 50.4",
        "dino_r50_4scale_36e": "AP 50.9",
    },
}


@pytest.mark.parametrize(("model", "figures"), FIGURES.items())
def test_published_figures_are_those_of_recipes_of_the_same_model(
    model: tuple[str, str], figures: dict[str, str]
) -> None:
    (listed,) = [listed for listed in LISTED if listed[:2] == model]
    head, _, name, base = listed
    config = convert_state_dict(hollow(all_shapes(head, name, base))).config
    found = published_figures(head, config)
    assert {recipe: text.partition(" (val2017; ")[0] for recipe, text in found.items()} == figures
    assert all(text.endswith(")") for text in found.values())
    config.num_queries += 1
    assert published_figures(head, config) == {}
    config.num_queries -= 1
    config.category_ids = None  # classes of their own
    assert published_figures(head, config) == {}


def test_facts_name_the_file_but_no_folder_of_this_machine(tmp_path: Path) -> None:
    conversion = convert_state_dict(small_state(), variant="base")
    file = tmp_path / "weights" / "model.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"weights")
    for checkpoint, name in (
        (file, "model.safetensors"),
        (file.parent, "weights/model.safetensors"),
    ):
        facts = facts_of_conversion(conversion, checkpoint)
        assert facts["converted"] == {
            "checkpoint": name,
            "sha256": hashlib.sha256(b"weights").hexdigest(),
            "program": "fundamentalvision/Deformable-DETR",
            "variant": "base",
            "published": {},
        }
        assert facts["versions"]["torch"] == torch.__version__
        assert str(tmp_path) not in json.dumps(facts)
