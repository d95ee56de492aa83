"""What goes up: the card, the shim, and what is refused before anything does."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

import detrelay.apps.publish as publish_app
from detrelay.apps.build import load_saved
from detrelay.assigners import ASSIGNERS
from detrelay.assigners.costs import COSTS
from detrelay.core.class_losses import CLASS_LOSSES
from detrelay.core.hub.calls import HubError
from detrelay.core.hub.card import check_card
from detrelay.core.hub.citations import citations
from detrelay.core.hub.folder import CheckedFolder, complete_folder
from detrelay.heads import HEADS
from hub_model import NAMES, small_model, write_run
from tiny_run import shrink_backbone


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        shrink_backbone(patch)
        yield


@pytest.fixture(scope="module")
def best(small: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), small_model())


@pytest.fixture
def folder(best: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be spoilt; its best model."""
    shutil.copytree(best.parent, tmp_path / "run")
    return tmp_path / "run" / "best"


def complete(folder: Path, name: str = "complete") -> CheckedFolder:
    return complete_folder(folder, folder.parent / name, "tess/shapes", "apache-2.0")


def card_of(folder: Path) -> str:
    return (complete(folder).folder / "README.md").read_text()


def complete_card(folder: Path, license: str | None = None) -> str:
    with tempfile.TemporaryDirectory() as temporary:
        copy = complete_folder(folder, Path(temporary) / "copy", "tess/shapes", license).folder
        return (copy / "README.md").read_text()


def change_facts(folder: Path, **changes: object) -> None:
    facts = json.loads((folder / "training.json").read_text())
    (folder / "training.json").write_text(json.dumps({**facts, **changes}))


def test_card_is_written_from_the_facts(folder: Path) -> None:
    text = card_of(folder)
    facts = json.loads((folder / "training.json").read_text())
    for expected in (
        "# shapes\n",
        "head `stageinteractor` on `resnet18`, 4 classes. AP 43.2 on cells.",
        'pipeline("object-detection", model="tess/shapes")',
        "| AP50 | 60.0 |",
        "| AR_100 | 55.0 |",
        "| circle | 50.0 |",
        "| ring | - |",
        r"| cross \| x | 25.0 |",
        "cells, split val, after epoch 3, at most 100 detections per image",
        "![predictions](predictions.png)",
        "| assigner | `cross_stage` |",
        "| started from | torchvision's ImageNet backbone |",
        f"| commit of detrelay | `{facts['commit']}` |",
        f"| hardware | {facts['device']} |",
        "| command | `apps/train.py --data cells` |",
        "| training speed | 2.0 images per second (median) |",
        "| seed | 5 |",
        "teng2023stageinteractor",
        "Weights: `apache-2.0`",
    ):
        assert expected in text
    assert "AP_large" not in text.partition("<details>")[0]


def test_metadata_reads_back_as_the_measured_figures(folder: Path) -> None:
    data = ModelCard(card_of(folder)).data
    assert (data.license, data.pipeline_tag, data.model_name) == (
        "apache-2.0", "object-detection", "shapes",
    )  # fmt: skip
    assert {"detrelay", "stageinteractor", "cross_stage"} <= set(data.tags)
    assert [(r.metric_type, r.metric_name, r.metric_value) for r in data.eval_results] == [
        ("map", "AP", 0.4321), ("map_50", "AP50", 0.6), ("ar_100", "AR_100", 0.55),
    ]  # fmt: skip
    first = data.eval_results[0]
    assert (first.dataset_type, first.dataset_name, first.dataset_split) == (
        "cells",
        "cells",
        "val",
    )


def test_what_is_not_known_is_not_invented(folder: Path) -> None:
    (folder / "training.json").write_text("{}")
    shutil.rmtree(folder.parent / "pictures")
    (folder.parent / "metrics.jsonl").unlink()
    text = card_of(folder)
    assert "Nothing was measured, or it is not known." in text
    for fact in ("data", "hardware", "commit of detrelay", "command", "started from", "seed"):
        assert f"| {fact} | unknown |" in text
    assert "predictions.png" not in text
    assert "training speed" not in text
    assert ModelCard(text).data.eval_results is None


def test_measured_speed_stands_in_the_card(folder: Path) -> None:
    speed = {"seconds to first boxes": 7.25, "device": "x86_64"}
    (folder / "speed.json").write_text(json.dumps(speed))
    assert "| seconds to first boxes | 7.25 |" in card_of(folder)
    (folder / "speed.json").write_text("[1]")
    with pytest.raises(HubError, match=r"speed.json: expected a JSON object of measured speeds"):
        complete(folder, "again")


def test_drawn_shapes_are_named_as_such(folder: Path) -> None:
    facts = json.loads((folder / "training.json").read_text())
    facts["recipe"]["data"] |= {"train_annotations": None, "val_annotations": None}
    change_facts(folder, recipe=facts["recipe"])
    text = card_of(folder)
    assert "| data | shapes drawn by detrelay |" in text
    assert ModelCard(text).data.eval_results[0].dataset_type == "shapes-drawn-by-detrelay"


def test_weights_to_start_from_are_named(folder: Path) -> None:
    change_facts(folder, init="runs/other/best")
    assert "| started from | weights of `runs/other/best` |" in card_of(folder)


CONVERTED = {
    "checkpoint": "released.pth",
    "sha256": "12ab",
    "program": "their/program",
    "variant": None,
    "published": {"some_recipe": "AP 44.5 (val2017; their readme)"},
}


def test_figures_of_others_are_not_those_of_converted_weights(folder: Path) -> None:
    (folder / "training.json").write_text(json.dumps({"converted": CONVERTED}))
    text = card_of(folder)
    for expected in (
        "| converted from the file | `released.pth` |",
        "| its sha256 | `12ab` |",
        "| written by | `their/program` |",
        "| variant | none that was published |",
        "| commit of detrelay | unknown |",
        "Nothing was measured, or it is not known.",
        "not measured here and not known to be of these weights",
        "| recipe | published, not measured |",
        "| some_recipe | AP 44.5 (val2017; their readme) |",
    ):
        assert expected in text
    assert "## Training" not in text
    assert ModelCard(text).data.eval_results is None
    (folder / "training.json").write_text(json.dumps({"converted": {**CONVERTED, "published": {}}}))
    assert "published, not measured" not in complete_card(folder)


def test_the_licence_of_converted_weights_is_not_guessed(folder: Path) -> None:
    assert "Weights: `apache-2.0`" in complete_card(folder)
    change_facts(folder, converted=CONVERTED)
    text = complete_card(folder)
    assert "Weights: not stated; look at where they come from." in text
    assert ModelCard(text).data.license == "unknown"
    assert "Weights: `mit`" in complete_card(folder, "mit")


def test_every_head_has_a_paper() -> None:
    for entry in HEADS.values():
        assert citations(entry.config.model_type, None)
    assert len(citations("detrelay_dino", "cross_stage")) == 2
    assert len(citations("detrelay_stageinteractor", "cross_stage")) == 1
    assert citations("somebody_elses", "hungarian") == []
    (adamixer,) = citations("detrelay_stageinteractor", None, "MCG-NJU/AdaMixer")
    assert "AdaMixer" in adamixer
    (deformable,) = citations("detrelay_deformable_detr", None, "fundamentalvision/Deformable-DETR")
    assert "Deformable DETR" in deformable


TARGETS = {
    "model": {"hybrid_queries": 300, "query_groups": 1},
    "assigner": {
        "name": "cross_stage",
        "base": {"name": "union", "costs": ["l1:5", {"name": "high_order"}]},
    },
    "loss": {"class_loss": "matchability"},
    "groups": {"hybrid": {"assigner": {"name": "repeated"}, "loss": {"class_loss": "softmax"}}},
}


def test_training_targets_have_papers() -> None:
    entries = citations("detrelay_dino", "cross_stage", recipe=TARGETS)
    keys = [entry.partition("{")[2].partition(",")[0] for entry in entries]
    assert keys[2:] == [
        *("jia2023detrs", "peng2025dfine", "pu2023rank", "huang2025deim"),
        "carion2020end",
    ]
    assert all(entry.count("{") == entry.count("}") for entry in entries)
    assert citations("detrelay_dino", "hungarian", recipe={"assigner": {"name": "hungarian"}}) == (
        citations("detrelay_dino", None)
    )


def test_every_assigner_loss_cost_and_pass_of_a_paper_is_cited() -> None:
    plain = {"hungarian", "cross_stage", "focal", "l1", "giou"}
    recipes: list[dict[str, Any]] = [
        *({"assigner": {"name": name}} for name in ASSIGNERS if name not in plain),
        *({"assigner": {"costs": [f"{name}:2"]}} for name in COSTS if name not in plain),
        *({"loss": {"class_loss": name}} for name in CLASS_LOSSES if name not in plain),
    ]
    for recipe in recipes:
        assert len(citations("somebody_elses", None, recipe=recipe)) == 1, recipe
    plain_recipe = {"assigner": {"name": "hungarian", "costs": ["focal:2", "l1"]}}
    assert citations("somebody_elses", None, recipe=plain_recipe) == []


def test_the_card_cites_the_training_targets(folder: Path) -> None:
    change_facts(folder, recipe={"loss": {"class_loss": "varifocal"}})
    assert "DETRs Beat YOLOs" in complete_card(folder)


def test_own_card_is_kept(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    assert card_of(folder) == "---\nlicense: mit\n---\nmine\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# only text\n", "has no metadata; it must begin with a YAML block"),
        ("---\nlicense: [\n---\n", "its metadata cannot be read"),
        ("---\n- license\n---\n", "its metadata cannot be read .*should be a dict"),
        ("---\ntags: [a]\n---\n", "must name a licence"),
        ("---\nlicense: mit\nmodel-index: 3\n---\n", "its metadata cannot be read"),
    ],
)
def test_faulty_cards_are_refused(text: str, message: str, folder: Path) -> None:
    (folder / "README.md").write_text(text)
    with pytest.raises(HubError, match=rf"best/README.md: .*{message}"):
        complete(folder)


def test_a_figure_that_is_no_number_is_refused(folder: Path) -> None:
    spoilt = card_of(folder).replace("value: 0.4321", "value: .nan")
    with pytest.raises(ValueError, match="metric map must be a number, found nan"):
        check_card(spoilt, "README.md")


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


def test_shim_names_the_classes_and_asks_for_the_package(folder: Path) -> None:
    copy = complete(folder).folder
    config = json.loads((copy / "config.json").read_text())
    processor = json.loads((copy / "preprocessor_config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "modeling_detrelay.StageInteractorConfig",
        "AutoModelForObjectDetection": "modeling_detrelay.StageInteractorForObjectDetection",
        "AutoImageProcessor": "modeling_detrelay.DetrelayImageProcessor",
    }
    assert processor["auto_map"]["AutoImageProcessor"] == config["auto_map"]["AutoImageProcessor"]
    shim = (copy / "modeling_detrelay.py").read_text()
    names: dict[str, object] = {}
    exec(shim, names)
    assert names["StageInteractorConfig"] is HEADS["stageinteractor"].config
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "detrelay.heads.stageinteractor.head", None)
        with pytest.raises(ImportError, match=r"needs the Python package detrelay .*pip install"):
            exec(shim, {})
    # transformers reads the imports and would refuse with less help those outside of a `try`
    assert [type(node) for node in ast.parse(shim).body[1:]] == [ast.Try, ast.Assign]


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "no published model can be made of it, it has no config.json"),
        ("training.json", r"it has no training.json \(facts .* \{\} if nothing is known\)"),
        ("preprocessor_config.json", "it has no preprocessor_config.json"),
        ("model.safetensors", "expected model.safetensors or .* found neither"),
    ],
)
def test_a_missing_file_is_named(missing: str, message: str, folder: Path) -> None:
    (folder / missing).unlink()
    with pytest.raises(HubError, match=message):
        complete(folder)


def test_the_folder_of_the_run_is_not_the_model(folder: Path) -> None:
    with pytest.raises(HubError, match=r"it has no config.json; did you mean .*run/best\?"):
        complete(folder.parent, "../complete")


def test_pickles_and_second_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(HubError, match="with its shards, found both"):
        complete(folder)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "optimizer.bin").write_bytes(b"")
    with pytest.raises(HubError, match=r"optimizer.bin: pickles are not published"):
        complete(folder)


@pytest.mark.parametrize(
    "name",
    ["model_best.pth.tar", "old.PTH", "x.joblib", "obj.npy", "dump.pkl.gz", "secret.key", "notes"],
)
def test_only_what_a_model_needs_is_published(name: str, folder: Path) -> None:
    (folder / name).write_bytes(b"x")
    with pytest.raises(HubError, match=rf"best/{name}: pickles are not published, nor is anything"):
        complete(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("LICENSE", "not text"),
        ("drawing.png", "not png"),
        ("speed.json", "not json"),
        ("model-00001-of-00002.safetensors", "pickles are not published"),
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


def test_names_from_elsewhere_are_no_markup(folder: Path) -> None:
    facts = json.loads((folder / "training.json").read_text())
    by_class = {"<img src=x onerror=alert(1)>": 0.5, "[a](b) `c` & *d*": 0.25}
    facts["recipe"]["model"]["note"] = "```\n<script>"
    change_facts(
        folder,
        recipe=facts["recipe"],
        measured={**facts["measured"], "AP_per_category": by_class},
        command="train `rm` <b>",
        device="<i>",
    )
    (folder / "speed.json").write_text(json.dumps({"<u>": "<s>"}))
    text = card_of(folder)
    for expected in (
        "| &lt;img src=x onerror=alert(1)&gt; | 50.0 |",
        r"| \[a\](b) \`c\` &amp; \*d\* | 25.0 |",
        "| command | ``train `rm` <b>`` |",
        "| hardware | &lt;i&gt; |",
        "| &lt;u&gt; | &lt;s&gt; |",
        r'"note": "\u0060\u0060\u0060\n<script>"',
    ):
        assert expected in text


@pytest.mark.parametrize("text", ["{", "[]"])
def test_damaged_facts_are_refused(text: str, folder: Path) -> None:
    (folder / "training.json").write_text(text)
    with pytest.raises(HubError, match=r"training.json: (not json|expected an object)"):
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
    with pytest.raises(HubError, match=f"weights are not those .* 1 missing keys, such as {key}"):
        complete(folder)
    weights[key] = torch.full_like(weights[key], torch.nan)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(HubError, match=r"the model does not run .*not finite"):
        complete(folder, "again")
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(HubError, match="cannot be loaded as a model"):
        complete(folder, "third")


def test_a_model_of_others_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "detrelay_unheard"}))
    with pytest.raises(HubError, match=r"cannot be loaded .*import detrelay.heads"):
        complete(folder)


def test_the_code_of_a_folder_is_not_run_and_nobody_is_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: object) -> str:
        raise AssertionError("asked")

    monkeypatch.setattr("builtins.input", ask)
    config = json.loads((folder / "config.json").read_text())
    foreign = {"AutoConfig": "own.C", "AutoModelForObjectDetection": "own.M"}
    (folder / "config.json").write_text(
        json.dumps({**config, "model_type": "foreign", "auto_map": foreign})
    )
    (folder / "own.py").write_text("raise AssertionError('run')")
    with pytest.raises(ValueError, match="cannot be loaded as a model: ") as error:
        load_saved(folder)
    assert "trust_remote_code" not in str(error.value)


def test_weights_in_a_pickle_are_not_loaded(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot be loaded as a model: .*model.safetensors"):
        load_saved(folder)


def test_rehearsal_prints_and_asks_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_session", None)
    arguments = publish_app.Arguments(folder, "tess/shapes", license="mit", dry_run=True)
    assert publish_app.publish(arguments) == 0
    printed = capsys.readouterr().out
    assert " model.safetensors\n" in printed
    assert "license: mit\n" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repo_id": "a/b/c"}, "expected a name on the Hub, USER/MODEL"),
        ({"tag": "main"}, "tag 'main': would hide the branch"),
        ({"license": "MIT or so"}, "licence 'MIT or so': expected its identifier on the Hub"),
        ({"license": "x\ny: ["}, r"licence 'x\\ny: \['"),
    ],
)
def test_rehearsal_refuses_names_too(options: dict[str, str], message: str, folder: Path) -> None:
    arguments = {"folder": folder, "repo_id": "tess/shapes", "dry_run": True, **options}
    with pytest.raises(HubError, match=message):
        publish_app.publish(publish_app.Arguments(**arguments))  # type: ignore[arg-type]
