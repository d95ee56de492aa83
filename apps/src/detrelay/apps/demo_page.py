"""The page of `detrelay demo`: its functions, and its layout in gradio."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detrelay.apps.stage_view import (
    Objects,
    StageView,
    detections,
    draw_detections,
    draw_labels,
    label_rows,
    learned_labels,
    look_at,
)
from detrelay.core.criterion import Assigner
from detrelay.core.data.coco import AnnotatedImages
from detrelay.core.data.decode import read_image
from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.core.errors import nearest

Picture = NDArray[np.uint8]  # [H, W, 3]

_THRESHOLD = 0.5
_MOST_CHOICES = 500
_BLANK = 64  # side of an image to count stages with, pixels
_COLUMNS = ["query", "object", "class", "label from", "IoU"]
_HELP = """Boxes as if the decoder ended with this stage. With objects (one per line: class, left,
top, width, height in pixels) the second picture shows which queries learn a label in this stage:
solid lines are the stage's own matching, dashed ones a label from another stage, white ones the
objects."""
_FONTS: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}


# class, left, top, width, height; a class may have spaces and commas of its own
_OBJECT = re.compile(r"(.+?)" + 4 * r"[\s,]+([^\s,]+)")


@dataclass(frozen=True)
class Shown:
    """What the page shows for a stage.

    Attributes:
        detected: drawing of the detections.
        labelled: drawing of the queries that learn a label; None without objects.
        rows: a table of these labels, see `_COLUMNS`.
        summary: a line about both.
    """

    detected: Picture
    labelled: Picture | None
    rows: list[list[str | int | float]]
    summary: str


@dataclass(frozen=True)
class Demo:
    """A model to try out, without the page around it.

    Attributes:
        title: of the page.
        model: in evaluation mode.
        processor: the model's.
        assigners: the stages' own matching, and the one that lends labels.
        samples: images to choose from; None for uploads only.
        classes: class index of the model by that of the samples.
    """

    title: str
    model: DetectorForObjectDetection
    processor: DetrelayImageProcessor
    assigners: tuple[Assigner, Assigner]
    samples: AnnotatedImages | None = None
    classes: list[int] | None = None

    @property
    def names(self) -> list[str]:
        """Names of the classes."""
        return self.model.config.class_names

    def number_of_stages(self) -> int:
        """Number of decoder stages."""
        blank = torch.zeros(3, _BLANK, _BLANK, dtype=torch.uint8)
        return len(look_at(self.model, self.processor, blank).stages)

    def choices(self) -> list[tuple[str, int]]:
        """The first images of the data: name and index."""
        if self.samples is None:
            return []
        count = min(len(self.samples), _MOST_CHOICES)
        return [(self.samples.file_name(index), index) for index in range(count)]

    def chosen(self, index: int) -> tuple[Picture, str]:
        """An image of the data, and its objects as text."""
        assert self.samples is not None
        assert self.classes is not None
        sample = self.samples[index]
        lines = []
        for (left, top, right, bottom), label in zip(
            sample.boxes_xyxy.tolist(), sample.class_labels.tolist(), strict=True
        ):
            sides = (left, top, right - left, bottom - top)
            name = self.names[self.classes[label]]
            lines.append(" ".join([name, *(f"{side:.6g}" for side in sides)]))
        return _picture(sample.image), "\n".join(lines)

    def look(self, image: str, objects: str) -> StageView:
        """Run the model over an image file.

        Raises:
            ImageError: the file cannot be read.
            ValueError: the objects cannot be parsed.
        """
        pixels = read_image(image, max_pixels=self.processor.max_pixels, name=Path(image).name)
        truth = read_objects(objects, self.names, (pixels.shape[-2], pixels.shape[-1]))
        return look_at(self.model, self.processor, pixels, truth, self.assigners)

    def show(self, view: StageView, stage: int, threshold: float, overlap: float) -> Shown:
        """Draw a stage.

        Args:
            view: the image.
            stage: counted from 1.
            threshold: minimum score, 0 to 1.
            overlap: IoU threshold of class-wise NMS; 1 for none.
        """
        limit = overlap if overlap < 1 else None
        found = detections(view, stage - 1, self.processor, threshold, limit)
        detected = _picture(draw_detections(view, found, self.names))
        summary = f"Stage {stage}: {len(found['scores'])} detections"
        if view.objects is None:
            return Shown(detected, None, [], f"{summary}. Name objects to see whose labels travel.")
        labels = learned_labels(view, stage - 1)
        own = sum(label.origin == stage - 1 for label in labels)
        summary += (
            f"; {len(view.objects.labels)} objects, {own} labels of its own matching, "
            f"{len(labels) - own} from other stages."
        )
        drawn = _picture(draw_labels(view, stage - 1, labels, self.names))
        return Shown(detected, drawn, label_rows(view, stage - 1, labels, self.names), summary)


def read_objects(text: str, names: list[str], size: tuple[int, int]) -> Objects | None:
    """Parse typed objects, one per line: class, left, top, width, height in pixels.

    Spaces or commas separate them.

    Args:
        text: empty if nothing is known.
        names: of the model's classes.
        size: (height, width) of the image.

    Raises:
        ValueError: a line cannot be parsed; names the line.
    """
    boxes, labels = [], []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        found = _OBJECT.fullmatch(line.strip())
        try:
            name, *sides = found.groups() if found else ()
            left, top, width, height = map(float, sides)
        except ValueError:
            raise ValueError(
                f"objects, line {number}: expected class, left, top, width, height; found {line!r}"
            ) from None
        if name not in names:
            raise ValueError(f"objects, line {number}: class {name!r}: {nearest(name, names)}")
        box = (left, top, left + width, top + height)
        if not (0 <= left < box[2] <= size[1] + 1 and 0 <= top < box[3] <= size[0] + 1):
            raise ValueError(
                f"objects, line {number}: the box is empty or extends outside the image, which is "
                f"{size[1]} x {size[0]} pixels (width x height)"
            )
        boxes.append(box)
        labels.append(names.index(name))
    if not boxes:
        return None
    return Objects(torch.tensor(boxes), torch.tensor(labels))


def _picture(image: Tensor) -> Picture:
    pixels: Picture = image.permute(1, 2, 0).contiguous().numpy()
    return pixels


def _functions(demo: Demo) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The functions of the page: `look` at an image, and `show` a stage of it."""

    def look(image: str | None, objects: str) -> StageView | None:
        try:
            return None if image is None else demo.look(image, objects)
        except ValueError as error:
            raise gr.Error(str(error)) from error

    def show(view: StageView | None, stage: float, threshold: float, limit: float) -> list[Any]:
        if view is None:
            return [None, None, [], ""]
        shown = demo.show(view, int(stage), threshold, limit)
        return [shown.detected, shown.labelled, shown.rows, shown.summary]

    return look, show


def build_page(demo: Demo) -> gr.Blocks:
    """The page, not yet served. Its functions have the names `choose`, `look` and `show`."""
    stages = demo.number_of_stages()
    overlap = demo.processor.nms_iou_threshold
    look, show = _functions(demo)
    with gr.Blocks(title=f"detrelay: {demo.title}", analytics_enabled=False) as page:
        gr.Markdown(f"### {demo.title}\n{_HELP}")
        view = gr.State()
        with gr.Row():
            with gr.Column(min_width=300):
                choice = gr.Dropdown(
                    demo.choices(),
                    value=None,
                    label="image of the dataset",
                    visible=demo.samples is not None,
                )
                image = gr.Image(
                    type="filepath", image_mode=None, format="png", label="image", height=280
                )
                objects = gr.Textbox(label="objects, if known", lines=3, max_lines=6)
                again = gr.Button("Detect", variant="primary")
                stage = gr.Slider(1, stages, value=stages, step=1, label="decoder stage")
                threshold = gr.Slider(0, 1, value=_THRESHOLD, step=0.01, label="minimum score")
                limit = gr.Slider(
                    0, 1, value=overlap or 1, step=0.01, label="NMS IoU threshold (1 for none)"
                )
            with gr.Column(scale=2, min_width=300):
                summary = gr.Markdown()
                detected = gr.Image(label="detections of this stage", format="png")
                labelled = gr.Image(label="labels that queries learn in this stage", format="png")
                rows = gr.Dataframe(headers=_COLUMNS, label="labels", interactive=False)
        looked: Any = {"fn": look, "inputs": [image, objects], "outputs": view}
        drawn: Any = {
            "fn": show,
            "inputs": [view, stage, threshold, limit],
            "outputs": [detected, labelled, rows, summary],
        }
        again.click(**looked, api_name="look").success(**drawn, api_name="show")
        image.upload(lambda: "", outputs=objects, api_visibility="private").success(
            **looked, api_visibility="private"
        ).success(**drawn, api_visibility="private")
        choice.change(demo.chosen, choice, [image, objects], api_name="choose").success(
            **looked, api_visibility="private"
        ).success(**drawn, api_visibility="private")
        for slider in (stage, threshold, limit):
            slider.change(
                **drawn,
                api_visibility="private",
                show_progress="hidden",
                trigger_mode="always_last",
            )
    return page


def launch(demo: Demo, *, host: str, port: int, block: bool = True) -> gr.Blocks:
    """Serve the page.

    Args:
        demo: the model.
        host: where to listen.
        port: 0 for any free one.
        block: return only after an interrupt.

    Raises:
        OSError: the port is taken.
    """
    page = build_page(demo)
    page.launch(
        server_name=host,
        server_port=port or _free_port(host),
        theme=gr.themes.Default(**_FONTS),
        prevent_thread_lock=not block,
        quiet=not block,
        share=False,
        ssr_mode=False,
        show_error=True,
        footer_links=[],
    )
    return page


def _free_port(host: str) -> int:
    with socket.socket() as free:
        free.bind((host, 0))
        port: int = free.getsockname()[1]
    return port
