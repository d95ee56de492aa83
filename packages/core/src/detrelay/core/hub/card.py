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
from detrelay.core.hub.calls import HubError
from detrelay.core.hub.citations import citations

PICTURE = "predictions.png"
SPEED = "speed.json"
_UNKNOWN = "unknown"
_LICENSE_OF_OURS = "apache-2.0"
# folder names that say nothing about the data in them
_PLAIN_FOLDERS = frozenset({"annotations", "images", "data", "."})
_ANNOTATION_FILES = (".json", ".yaml", ".csv", ".xml", ".parquet")
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
    def head(self) -> str:
        """Name of the head."""
        return str(self.model.config.model_type.removeprefix("detrelay_"))

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
    def measured(self) -> Mapping[str, Any]:
        """What the evaluation of these weights found; empty if unknown."""
        return self.training.get("measured") or {}

    @property
    def stats(self) -> Mapping[str, float]:
        """The COCO figures that could be measured, as fractions."""
        stats = self.measured.get("stats") or {}
        return {name: value for name, value in stats.items() if value >= 0}

    @property
    def dataset(self) -> str | None:
        """A name for the data: that of the folder that holds the evaluated file."""
        data = self.recipe.get("data")
        if not data:
            return None
        file = data.get("val_annotations") or data.get("train_annotations")
        if file is None:
            return "shapes drawn by detrelay"
        parts = PurePath(file).parts
        is_file = PurePath(file).suffix in _ANNOTATION_FILES
        folders = [part for part in parts[: -1 if is_file else None] if part not in _PLAIN_FOLDERS]
        return folders[-1] if folders else PurePath(file).stem

    @property
    def split(self) -> str | None:
        """Name of the evaluated file; None if unknown."""
        file = (self.recipe.get("data") or {}).get("val_annotations")
        return None if file is None else PurePath(file).stem

    @property
    def start(self) -> str:
        """The weights that training started from, as markdown."""
        if self.training.get("init"):
            return f"weights of {_code(self.training['init'])}"
        weights = (self.recipe.get("train") or {}).get("backbone_weights")
        known = {"none": "random weights", "imagenet": "torchvision's ImageNet backbone"}
        return _UNKNOWN if weights is None else known.get(weights, f"backbone {_code(weights)}")

    @property
    def speed(self) -> Mapping[str, Any]:
        """Measured speeds; empty if there are none."""
        file = self.folder / SPEED
        speeds = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if not isinstance(speeds, dict):
            raise ValueError(f"{file}: expected a JSON object of measured speeds")
        return speeds


def build_card(repo_id: str, facts: CardFacts) -> str:
    """The README.md of a published model. Unknown facts are omitted or marked as unknown.

    Args:
        repo_id: name on the Hub, "user/model".
        facts: where everything in it comes from.
    """
    text = _template().render(
        repo_id=repo_id,
        facts=facts,
        config=facts.model.config,
        training=facts.training,
        converted=facts.converted,
        measured=facts.measured,
        train=facts.recipe.get("train") or {},
        parameters=sum(parameter.numel() for parameter in facts.model.parameters()),
        versions=[f"{name} {v}" for name, v in (facts.training.get("versions") or {}).items()],
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
    """Reject a card whose metadata cannot be read or name no licence; the Hub checks the rest.

    Raises:
        HubError: names `source` and what is wrong.
    """
    try:
        license = ModelCard(text).data.get("license")
    except Exception as error:  # from the YAML parser or the model-index reader
        raise HubError(f"{source}: its metadata cannot be read ({one_line(error)})") from error
    if not isinstance(license, str):
        raise HubError(
            f"{source}: must begin with metadata between lines of ---, which name a licence "
            f"(`license: apache-2.0`)"
        )


def median_speed(metrics: Path) -> float | None:
    """Images per second in training, the median of a run's log; None without a log."""
    values = [line.get("images_per_second") for line in read_metrics(metrics)]
    numbers = [value for value in values if value is not None]
    return statistics.median(numbers) if numbers else None


def _metadata(repo_id: str, facts: CardFacts) -> ModelCardData:
    dataset = facts.dataset
    results = None
    if dataset is not None and facts.stats:
        results = [
            EvalResult(
                task_type="object-detection",
                task_name="Object detection",
                dataset_type=re.sub(r"[^a-z0-9]+", "-", dataset.lower()).strip("-"),
                dataset_name=dataset,
                dataset_split=facts.split,
                metric_type=_METRIC_TYPES.get(name, name.lower()),
                metric_name=name,
                metric_value=round(value, 4),
            )
            for name, value in facts.stats.items()
        ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="object-detection",
        license=facts.license,
        tags=["detrelay", "detr", facts.head, *([facts.assigner] if facts.assigner else [])],
        metrics=["map"] if results else None,
        model_name=repo_id.rpartition("/")[2],
        eval_results=results,
    )


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
