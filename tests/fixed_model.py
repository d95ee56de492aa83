"""`predict` with a model that knows its answer beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detrelay.apps import console, predict
from detrelay.apps.predict import Arguments
from detrelay.core.data.image_processing import DetrelayImageProcessor
from factories_data import noise_image


class Fixed(nn.Module):
    """Finds one object that fills the left half of any image, and one that reaches out of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.config = SimpleNamespace(class_names=["cat", "dog"], category_ids=[7, 3])
        self.device = torch.device("cpu")
        self.seen: list[Tensor] = []
        self.batches: list[int] = []
        self.before: Callable[[int], None] = lambda count: None

    def forward(self, pixel_values: Tensor, **_: Any) -> SimpleNamespace:
        self.before(len(self.seen))
        self.batches.append(len(pixel_values))
        self.seen += [pixels.to(torch.uint8) for pixels in pixel_values]
        logits = self.weight * torch.tensor([[9.0, -9.0], [-9.0, 8.0]])
        boxes = torch.tensor([[0.25, 0.5, 0.5, 1.0], [0.9, 0.5, 0.4, 0.5]])
        logits, boxes = (values.expand(len(pixel_values), 2, -1) for values in (logits, boxes))
        return SimpleNamespace(logits=logits, pred_boxes=boxes)


def fixed_model(monkeypatch: pytest.MonkeyPatch) -> Fixed:
    fixed = Fixed()
    processor = DetrelayImageProcessor(
        do_resize=False, do_rescale=False, do_normalize=False, do_pad=False
    )
    monkeypatch.setattr("detrelay.apps.build.load_saved", lambda *_: (fixed, processor))
    return fixed


def write_photos(folder: Path) -> Path:
    """Three photos, a.png, b.png and c.png, 40 x 30."""
    folder.mkdir()
    for name in ("a.png", "b.png", "c.png"):
        noise_image(40, 30).save(folder / name)
    return folder


def run(*, output: Path, **options: Any) -> int:
    """Exit code of the command; errors end it as in a shell."""
    options = {key: str(value) if key == "input" else value for key, value in options.items()}
    with pytest.raises(SystemExit) as stop:
        console.run(lambda: predict.predict(Arguments(Path("m"), output, **options)))
    return int(stop.value.code or 0)


def rows(output: Path) -> list[dict[str, Any]]:
    return json.loads((output / "predictions.json").read_text())
