"""Conversion as a command: its folder, its facts, and the figures that it quotes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from detrelay.apps.convert import Arguments, convert, facts_of_conversion, published_figures, write
from detrelay.heads.convert.conversion import convert_state_dict
from official import LISTED, all_shapes, hollow, small_state, write_small_checkpoint
from tiny_run import TinyBlocks, shrink_backbone


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
    with pytest.raises(ValueError, match="already exists; name a new folder"):
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


def test_the_command_says_which_weights_it_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shrink_backbone(monkeypatch, TinyBlocks)
    file = tmp_path / "released.pth"
    plain = write_small_checkpoint(file)
    key = "transformer.level_embed"
    average = {**plain, key: plain[key] + 1}
    torch.save({"model": plain, "ema_model": average}, file)
    for which, place, other in (
        (None, "ema_model", "--weights plain takes model"),
        ("plain", "model", "--weights average takes ema_model"),
    ):
        output = tmp_path / place
        assert convert(Arguments(checkpoint=file, output=output, weights=which)) == 0  # type: ignore[arg-type]
        assert f"weights  {place}: " in (said := capsys.readouterr().out)
        assert other in said
        facts = json.loads((output / "training.json").read_text())
        assert facts["converted"]["weights"] == place
        found = load_file(output / "model.safetensors")["head.encoder.level_code"]
        torch.testing.assert_close(found, (average if which is None else plain)[key])
