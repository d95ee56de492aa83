"""The card: written from the facts, with nothing invented."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from detrelay.core.hub.calls import HubError
from hub_model import card_of, change_facts, complete, complete_card


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


def test_the_card_cites_the_training_targets(folder: Path) -> None:
    change_facts(folder, recipe={"loss": {"class_loss": "varifocal"}})
    assert "DETRs Beat YOLOs" in complete_card(folder)


def test_own_card_is_kept(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    assert card_of(folder) == "---\nlicense: mit\n---\nmine\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# only text\n", "must begin with metadata between lines of ---"),
        ("---\nlicense: [\n---\n", "its metadata cannot be read"),
        ("---\n- license\n---\n", "its metadata cannot be read .*should be a dict"),
        ("---\ntags: [a]\n---\n", "which name a licence"),
        ("---\nlicense: mit\nmodel-index: 3\n---\n", "its metadata cannot be read"),
    ],
)
def test_faulty_cards_are_refused(text: str, message: str, folder: Path) -> None:
    (folder / "README.md").write_text(text)
    with pytest.raises(HubError, match=rf"best/README.md: .*{message}"):
        complete(folder)


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
