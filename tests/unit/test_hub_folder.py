"""What is uploaded: the card, the shim, and what is rejected before that."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from detrelay.core.hub.calls import HubError
from hub_model import NAMES, change_facts, complete, small_model


def test_the_copy_is_complete_and_the_source_untouched(folder: Path) -> None:
    (folder / ".cache").mkdir()
    (folder / ".cache" / "secret").write_text("not for others")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    checked = complete(folder)
    assert checked.files == [
        "README.md", "config.json", "model.safetensors", "modeling_detrelay.py", "predictions.png",
        "preprocessor_config.json", "training.json",
    ]  # fmt: skip
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    model = small_model()
    assert all(torch.equal(v, checked.weights[k]) for k, v in model.state_dict().items())
    assert checked.logits.shape == (1, 8, len(NAMES))


def test_weights_keep_their_precision(folder: Path) -> None:
    small_model().to(torch.bfloat16).save_pretrained(folder)
    written = load_file(complete(folder).folder / "model.safetensors")
    before = load_file(folder / "model.safetensors")
    assert {value.dtype for value in written.values()} == {value.dtype for value in before.values()}
    assert all(torch.equal(value, before[key]) for key, value in written.items())


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "no published model can be made of it, it has no config.json"),
        ("training.json", r"it has no training.json \(facts .* \{\} if nothing is known\)"),
        ("preprocessor_config.json", "it has no preprocessor_config.json"),
        ("model.safetensors", "no file named model.safetensors"),
    ],
)
def test_a_missing_file_is_named(missing: str, message: str, folder: Path) -> None:
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=message):
        complete(folder)


def test_the_folder_of_the_run_is_not_the_model(folder: Path) -> None:
    with pytest.raises(HubError, match=r"it has no config.json; did you mean .*run/best\?"):
        complete(folder.parent, "../complete")


def test_weights_are_written_from_the_model_never_copied(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")
    (folder / "model-00001-of-00002.safetensors").write_bytes(pickle.dumps({"a": print}))
    checked = complete(folder)
    assert [name for name in checked.files if "safetensors" in name] == ["model.safetensors"]
    written = load_file(checked.folder / "model.safetensors")
    assert all(torch.equal(v, written[k]) for k, v in small_model().state_dict().items())


@pytest.mark.parametrize(
    "name",
    [
        "optimizer.bin",
        "model_best.pth.tar",
        "old.PTH",
        "x.joblib",
        "obj.npy",
        "dump.pkl.gz",
        "secret.key",
        "notes",
    ],
)
def test_only_what_a_model_needs_is_published(name: str, folder: Path) -> None:
    (folder / name).write_bytes(b"x")
    with pytest.raises(HubError, match=rf"best/{name}: pickles are not published, nor is anything"):
        complete(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("LICENSE", "not text"),
        ("drawing.png", "not PNG"),
        ("speed.json", "not text"),
    ],
)
def test_a_pickle_under_another_name_is_refused(name: str, message: str, folder: Path) -> None:
    (folder / name).write_bytes(pickle.dumps({"a": print}))
    with pytest.raises(HubError, match=rf"best/{name}: {message}"):
        complete(folder)


def test_no_link_leads_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    Image.new("RGB", (2, 2)).save(secret)
    shown = folder / "shown.png"
    shown.symlink_to(secret)
    with pytest.raises(HubError, match=r"best/shown.png: .* plain files only, no folders and no l"):
        complete(folder)
    shown.unlink()
    (folder / "more").symlink_to(tmp_path)
    with pytest.raises(HubError, match=r"best/more: a model folder holds plain files only"):
        complete(folder)
    (folder / "more").unlink()
    picture = folder.parent / "pictures" / "epoch_3.png"
    picture.unlink()
    picture.symlink_to(secret)
    assert "predictions.png" not in complete(folder).files


def test_the_epoch_of_the_facts_leads_to_no_other_file(folder: Path, tmp_path: Path) -> None:
    (folder.parent / "pictures" / "epoch_").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "run" / "secret.png")
    facts = json.loads((folder / "training.json").read_text())
    change_facts(folder, measured={**facts["measured"], "epoch": "/../../secret"})
    assert "predictions.png" not in complete(folder).files


@pytest.mark.parametrize("text", ["{", "[]"])
def test_damaged_facts_are_refused(text: str, folder: Path) -> None:
    (folder / "training.json").write_text(text)
    with pytest.raises(HubError, match=r"training.json: (not JSON|expected an object)"):
        complete(folder)


@pytest.mark.parametrize("facts", [{"recipe": 3}, {"measured": {"stats": [0.5]}}])
def test_facts_of_another_shape_are_refused(facts: dict[str, object], folder: Path) -> None:
    (folder / "training.json").write_text(json.dumps(facts))
    with pytest.raises(HubError, match=r"no card can be made of training.json"):
        complete(folder)


def test_weights_must_be_those_of_the_config(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    key = "head.content.weight"
    save_file({k: v for k, v in weights.items() if k != key}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"weights are not those .* 1 missing \(such as {key}"):
        complete(folder)
    weights[key] = torch.full_like(weights[key], torch.nan)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(HubError, match=r"the model does not run .*not finite"):
        complete(folder, "again")
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="cannot be loaded as a model"):
        complete(folder, "third")


def test_a_model_of_others_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "detrelay_unheard"}))
    with pytest.raises(ValueError, match=r"cannot be loaded .*import detrelay.heads"):
        complete(folder)
