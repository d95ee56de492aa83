"""The model card: what was measured and how, from the facts that training stored."""

from __future__ import annotations

import html
import json
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.core.engine.logging import read_metrics
from detrelay.core.errors import one_line
from detrelay.core.hub.citations import citations

PICTURE = "predictions.png"
SPEED = "speed.json"
_UNKNOWN = "unknown"
_LICENSE_OF_OURS = "apache-2.0"
# names of folders that say nothing about the data in them
_PLAIN_FOLDERS = frozenset({"annotations", "images", "data", "."})
_METRIC_TYPES = {"AP": "map", "AP50": "map_50", "AP75": "map_75"}


@dataclass(frozen=True)
class CardFacts:
    """What a card is written from.

    Attributes:
        model: the detector.
        training: content of training.json.
        folder: the model folder; its picture and its speed.json are used where they are there.
        images_per_second: median speed of the training; None where it is not known.
        license: identifier of the weights' licence, as the Hub lists them.
    """

    model: DetectorForObjectDetection
    training: Mapping[str, Any]
    folder: Path
    images_per_second: float | None
    license: str

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The training recipe; empty where it is not known."""
        return self.training.get("recipe") or {}

    @property
    def assigner(self) -> str | None:
        """Name of the assigner; None where it is not known."""
        named = (self.recipe.get("assigner") or {}).get("name")
        return self.training.get("assigner") or named

    @property
    def converted(self) -> Mapping[str, Any]:
        """Where converted weights came from; empty for weights that were trained here."""
        return self.training.get("converted") or {}

    @property
    def stats(self) -> Mapping[str, float]:
        """The COCO figures that could be measured, as fractions."""
        stats = (self.training.get("measured") or {}).get("stats") or {}
        return {name: value for name, value in stats.items() if value >= 0}


def build_card(repo_id: str, facts: CardFacts) -> str:
    """The README.md of a published model. What is not known is left out or said to be unknown.

    Args:
        repo_id: name on the Hub, "user/model".
        facts: where everything in it comes from.
    """
    sections = [
        f"# {repo_id.partition('/')[2]}",
        _summary(facts),
        _usage(repo_id),
        _results(facts),
        _conversion(facts) if facts.converted else _training(facts),
        _licence(facts),
        _citation(facts),
    ]
    return f"---\n{_metadata(repo_id, facts).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def default_license(training: Mapping[str, Any]) -> str:
    """The licence of weights where nobody has stated one; that of others' weights is not ours."""
    return _UNKNOWN if training.get("converted") else _LICENSE_OF_OURS


def check_card(text: str, source: str) -> None:
    """Refuse a card that the Hub would refuse.

    Raises:
        ValueError: no metadata, metadata that cannot be read, or a figure that is no number.
    """
    if not re.match(r"\s*---\r?\n", text):
        raise ValueError(f"{source}: has no metadata; it must begin with a YAML block between ---")
    try:
        data: Any = ModelCard(text).data
    except Exception as error:  # of the YAML parser or the model-index reader
        raise ValueError(f"{source}: its metadata cannot be read ({one_line(error)})") from error
    if not isinstance(data.license, str):
        raise ValueError(f"{source}: its metadata must name a licence (`license: apache-2.0`)")
    for result in data.eval_results or []:
        value = result.metric_value
        if not isinstance(value, int | float | str) or value != value:
            raise ValueError(
                f"{source}: metric {result.metric_type} must be a number, found {value!r}"
            )


def median_speed(metrics: Path) -> float | None:
    """Images per second in training, the median of a run's log; None without a log."""
    values = [line.get("images_per_second") for line in read_metrics(metrics)]
    numbers = [value for value in values if value is not None]
    return statistics.median(numbers) if numbers else None


def _metadata(repo_id: str, facts: CardFacts) -> ModelCardData:
    dataset = _dataset(facts)
    results = None
    if dataset is not None and facts.stats:
        results = [
            EvalResult(
                task_type="object-detection",
                task_name="Object detection",
                dataset_type=re.sub(r"[^a-z0-9]+", "-", dataset.lower()).strip("-"),
                dataset_name=dataset,
                dataset_split=_split(facts),
                metric_type=_METRIC_TYPES.get(name, name.lower()),
                metric_name=name,
                metric_value=round(value, 4),
            )
            for name, value in facts.stats.items()
        ]
    head = facts.model.config.model_type.removeprefix("detrelay_")
    tags = ["detrelay", "detr", head, facts.assigner]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="object-detection",
        license=facts.license,
        tags=[tag for tag in tags if tag is not None],
        metrics=["map"] if results else None,
        model_name=repo_id.rpartition("/")[2],
        eval_results=results,
    )


def _summary(facts: CardFacts) -> str:
    config = facts.model.config
    head = config.model_type.removeprefix("detrelay_")
    figures = ""
    if facts.stats:
        name, value = next(iter(facts.stats.items()))
        data = _plain(_dataset(facts) or "unnamed data")
        figures = f" {_plain(name)} {100 * value:.1f} on {data}."
    origin = ""
    if facts.converted:
        origin = (
            f" Its weights were converted from a checkpoint of {_code(facts.converted['program'])};"
            f" they were not trained here."
        )
    return (
        f"An object detector: head `{head}` on {_backbone(facts)}, {config.num_labels} classes."
        f"{origin}{figures} It runs with transformers and the Python package `detrelay`."
    )


def _usage(repo_id: str) -> str:
    return f"""## Use

```python
import detrelay.heads
from transformers import pipeline

detector = pipeline("object-detection", model="{repo_id}")
print(detector("image.jpg", threshold=0.5))
```

The code of the model is the Python package `detrelay`. Without the first line,
`pipeline(..., trust_remote_code=True)` imports the package by itself."""


def _results(facts: CardFacts) -> str:
    measured = facts.training.get("measured") or {}
    lines = ["## Results", ""]
    if not facts.stats:
        lines.append("Nothing was measured, or it is not known.")
    else:
        lines += [
            f"COCO figures in percent, {_plain(_dataset(facts) or 'unnamed data')}"
            f"{_named(', split ', _split(facts))}{_named(', after epoch ', measured.get('epoch'))}"
            f"{_named(', at most ', measured.get('max_detections'), ' detections an image')}.",
            "",
            *_table(("metric", "value"), {_plain(k): _percent(v) for k, v in facts.stats.items()}),
        ]
    by_class = measured.get("AP_per_category") or {}
    if by_class:
        lines += [
            "",
            *_table(("class", "AP"), {_plain(k): _percent(v) for k, v in by_class.items()}),
        ]
    if published := facts.converted.get("published"):
        lines += [
            "",
            "Published by the authors, not measured here and not known to be of these weights: "
            "figures of models with exactly these settings, by recipe of `detrelay`.",
            "",
            *_table(
                ("recipe", "published, not measured"),
                {_plain(recipe): _plain(figures) for recipe, figures in published.items()},
            ),
        ]
    if (facts.folder / PICTURE).is_file():
        lines += ["", "Truth (left) and predictions (right):", "", f"![predictions]({PICTURE})"]
    return "\n".join(lines)


def _training(facts: CardFacts) -> str:
    train = facts.recipe.get("train") or {}
    precision = train.get("mixed_precision")
    rows = {
        **_model_rows(facts),
        "assigner": _code(facts.assigner),
        "data": _text(_dataset(facts)),
        "started from": _start(facts),
        "epochs": _text(train.get("epochs")),
        "images per step and process": _text(train.get("batch_size")),
        "learning rate": _text(train.get("learning_rate")),
        "precision": "float32" if precision == "no" else _text(precision),
        "seed": _text(train.get("seed")),
        "hardware": _text(facts.training.get("device")),
        **_program_rows(facts),
        "command": _code(facts.training.get("command")),
    }
    if facts.images_per_second is not None:
        rows["training speed"] = f"{facts.images_per_second:.1f} images per second (median)"
    lines = ["## Training", "", *_table(("fact", "value"), rows), *_speed_lines(facts)]
    if facts.recipe:
        recipe = json.dumps(facts.recipe, indent=1).replace("`", r"\u0060")
        lines += ["", "<details><summary>Recipe</summary>", "", "```json", recipe, "```"]
        lines += ["", "</details>"]
    return "\n".join(lines)


def _conversion(facts: CardFacts) -> str:
    converted = facts.converted
    variant = converted.get("variant")
    rows = {
        **_model_rows(facts),
        "converted from the file": _code(converted["checkpoint"]),
        **({"its weights": _code(place)} if (place := converted.get("weights")) else {}),
        "its sha256": _code(converted["sha256"]),
        "written by": _code(converted["program"]),
        "variant": "none that was published" if variant is None else _code(variant),
        **_program_rows(facts),
    }
    lines = [
        "## Origin",
        "",
        "Converted, not trained here. On which data the weights were trained, for how long and "
        "with which settings is not known to the program.",
        "",
        *_table(("fact", "value"), rows),
        *_speed_lines(facts),
    ]
    return "\n".join(lines)


def _model_rows(facts: CardFacts) -> dict[str, str]:
    parameters = sum(parameter.numel() for parameter in facts.model.parameters())
    return {
        "head": f"`{facts.model.config.model_type}`",
        "backbone": _backbone(facts),
        "parameters": f"{parameters / 1e6:.1f} M",
    }


def _program_rows(facts: CardFacts) -> dict[str, str]:
    versions = facts.training.get("versions") or {}
    return {
        "commit of detrelay": _code(facts.training.get("commit")),
        "versions": ", ".join(_plain(f"{name} {v}") for name, v in versions.items()) or _UNKNOWN,
    }


def _speed_lines(facts: CardFacts) -> list[str]:
    file = facts.folder / SPEED
    if not file.is_file():
        return []
    try:
        values = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: expected a JSON object of measured speeds ({error})") from error
    rows = {_plain(name): _text(value) for name, value in values.items()}
    return ["", "Speed, as measured:", "", *_table(("fact", "value"), rows)]


def _licence(facts: CardFacts) -> str:
    weights = f"{_code(facts.license)}, as stated by who published them"
    if facts.license == _UNKNOWN:
        weights = "not stated; look at where they come from"
    return f"## Licence\n\nWeights: {weights}. The package `detrelay` that runs them: `apache-2.0`."


def _citation(facts: CardFacts) -> str:
    program = facts.converted.get("program")
    entries = citations(facts.model.config.model_type, facts.assigner, program, facts.recipe)
    if not entries:
        return "## Citation\n\nThe paper of this method is not known to the program."
    return "## Citation\n\n```bibtex\n" + "\n\n".join(entries) + "\n```"


_ANNOTATION_FILES = (".json", ".yaml", ".csv", ".xml", ".parquet")


def _dataset(facts: CardFacts) -> str | None:
    """A name for the data: that of the folder that holds the evaluated file."""
    data = facts.recipe.get("data")
    if not data:
        return None
    file = data.get("val_annotations") or data.get("train_annotations")
    if file is None:
        return "shapes drawn by detrelay"
    parts = PurePath(file).parts
    is_file = PurePath(file).suffix in _ANNOTATION_FILES
    folders = [part for part in parts[: -1 if is_file else None] if part not in _PLAIN_FOLDERS]
    return folders[-1] if folders else PurePath(file).stem


def _split(facts: CardFacts) -> str | None:
    file = (facts.recipe.get("data") or {}).get("val_annotations")
    return None if file is None else PurePath(file).stem


def _backbone(facts: CardFacts) -> str:
    return _code(getattr(facts.model.config, "backbone_name", None))


def _start(facts: CardFacts) -> str:
    if facts.training.get("init"):
        return f"weights of {_code(facts.training['init'])}"
    weights = (facts.recipe.get("train") or {}).get("backbone_weights")
    known = {"none": "random weights", "imagenet": "torchvision's ImageNet backbone"}
    return _UNKNOWN if weights is None else known.get(weights, f"backbone {_code(weights)}")


def _table(head: tuple[str, str], rows: Mapping[str, str]) -> list[str]:
    cells = [head, ("---", "---"), *((_cell(k), _cell(v)) for k, v in rows.items())]
    return [f"| {left} | {right} |" for left, right in cells]


def _cell(text: str) -> str:
    return one_line(text).replace("|", r"\|")


def _plain(value: Any) -> str:
    """A text from elsewhere, such as the name of a class, that markdown and HTML leave as it is."""
    escaped = re.sub(r"([\\`*\[\]~])", r"\\\1", str(value))
    return html.escape(escaped, quote=False)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}" if fraction >= 0 else "-"


def _text(value: Any) -> str:
    return _UNKNOWN if value is None else _plain(value)


def _code(value: Any) -> str:
    """A value as code, in more backticks than it holds in a row."""
    if value is None:
        return _UNKNOWN
    text = one_line(str(value))
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    edge = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{edge}{text}{edge}{fence}"


def _named(before: str, value: Any, after: str = "") -> str:
    return "" if value is None else f"{before}{_plain(value)}{after}"
