"""The model card: what was measured and how, from the facts stored by training."""

from __future__ import annotations

import html
import json
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.core.engine.logging import read_metrics
from detrelay.core.errors import one_line
from detrelay.core.hub.citations import citations

PICTURE = "predictions.png"
SPEED = "speed.json"
_UNKNOWN = "unknown"
_LICENSE_OF_OURS = "apache-2.0"
# folder names that say nothing about the data in them
_PLAIN_FOLDERS = frozenset({"annotations", "images", "data", "."})
_METRIC_TYPES = {"AP": "map", "AP50": "map_50", "AP75": "map_75"}


@dataclass(frozen=True)
class CardFacts:
    """The facts that a card is written from.

    Attributes:
        model: the detector.
        training: content of training.json.
        folder: the model folder; its picture and its speed.json are used if they exist.
        images_per_second: median speed of the training; None if unknown.
        license: identifier of the weights' licence, as the Hub lists them.
    """

    model: DetectorForObjectDetection
    training: Mapping[str, Any]
    folder: Path
    images_per_second: float | None
    license: str

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The training recipe; empty if unknown."""
        return self.training.get("recipe") or {}

    @property
    def assigner(self) -> str | None:
        """Name of the assigner; None if unknown."""
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
    """The README.md of a published model. Unknown facts are omitted or marked as unknown.

    Args:
        repo_id: name on the Hub, "user/model".
        facts: where everything in it comes from.
    """
    text = _template().render(
        repo_id=repo_id,
        head=_head(facts),
        config=facts.model.config,
        parameters=sum(parameter.numel() for parameter in facts.model.parameters()),
        facts=facts,
        training=facts.training,
        versions=[f"{name} {v}" for name, v in (facts.training.get("versions") or {}).items()],
        measured=facts.training.get("measured") or {},
        train=facts.recipe.get("train") or {},
        converted=facts.converted,
        dataset=_dataset(facts),
        split=_split(facts),
        start=_start(facts),
        speed=_speed(facts),
        picture=PICTURE if (facts.folder / PICTURE).is_file() else None,
        citations=citations(
            facts.model.config.model_type,
            facts.assigner,
            facts.converted.get("program"),
            facts.recipe,
        ),
    )
    return f"---\n{_metadata(repo_id, facts).to_yaml()}\n---\n\n{text.strip()}\n"


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(  # not escaped as HTML: `plain` and `code` escape markdown
        loader=jinja2.PackageLoader(__package__, "."),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "plain": _plain,
        "known": _known,
        "code": _code,
        "percent": _percent,
        "percents": lambda rows: [(_plain(name), _percent(value)) for name, value in rows.items()],
        "plain_rows": lambda rows: [(_plain(name), _known(value)) for name, value in rows.items()],
        "table": _table,
        "json": lambda value: json.dumps(value, indent=1).replace("`", r"\u0060"),
    }
    return environment.get_template("card.md.jinja")


def default_license(training: Mapping[str, Any]) -> str:
    """The default licence of weights; unknown for weights that others trained."""
    return _UNKNOWN if training.get("converted") else _LICENSE_OF_OURS


def check_card(text: str, source: str) -> None:
    """Reject a card that the Hub would reject.

    Raises:
        ValueError: no metadata, unreadable metadata, or a figure that is not a number.
    """
    if not re.match(r"\s*---\r?\n", text):
        raise ValueError(f"{source}: has no metadata; it must begin with a YAML block between ---")
    try:
        data: Any = ModelCard(text).data
    except Exception as error:  # from the YAML parser or the model-index reader
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
    tags = ["detrelay", "detr", _head(facts), facts.assigner]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="object-detection",
        license=facts.license,
        tags=[tag for tag in tags if tag is not None],
        metrics=["map"] if results else None,
        model_name=repo_id.rpartition("/")[2],
        eval_results=results,
    )


def _speed(facts: CardFacts) -> dict[str, Any]:
    file = facts.folder / SPEED
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: expected a JSON object of measured speeds ({error})") from error


def _head(facts: CardFacts) -> str:
    return str(facts.model.config.model_type.removeprefix("detrelay_"))


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


def _start(facts: CardFacts) -> str:
    if facts.training.get("init"):
        return f"weights of {_code(facts.training['init'])}"
    weights = (facts.recipe.get("train") or {}).get("backbone_weights")
    known = {"none": "random weights", "imagenet": "torchvision's ImageNet backbone"}
    return _UNKNOWN if weights is None else known.get(weights, f"backbone {_code(weights)}")


def _table(rows: Iterable[tuple[str, str]], left: str, right: str) -> str:
    cells = [(left, right), ("---", "---"), *((_cell(name), _cell(value)) for name, value in rows)]
    return "\n".join(f"| {name} | {value} |" for name, value in cells)


def _cell(text: str) -> str:
    return one_line(text).replace("|", r"\|")


def _known(value: Any) -> str:
    return _UNKNOWN if value is None else _plain(value)


def _plain(value: Any) -> str:
    """External text, such as the name of a class, escaped for markdown and HTML."""
    escaped = re.sub(r"([\\`*\[\]~])", r"\\\1", str(value))
    return html.escape(escaped, quote=False)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}" if fraction >= 0 else "-"


def _code(value: Any) -> str:
    """A value as code, in more backticks than any run in it."""
    if value is None:
        return _UNKNOWN
    text = one_line(str(value))
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    edge = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{edge}{text}{edge}{fence}"
