"""Run a detector over a whole dataset, on any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader

from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.errors import NonFiniteOutput

ImageResult = dict[str, Tensor]
# what a detector takes of a batch: pixels, or maps that a frozen backbone made of them
_INPUTS = ("pixel_values", "feature_maps", "pixel_mask")


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a batch that a detector reads, but for the objects."""
    return {name: batch[name] for name in _INPUTS if name in batch}


@torch.no_grad()
def detect(
    accelerator: Accelerator,
    model: nn.Module,
    loader: DataLoader[Any],
    processor: DetrelayImageProcessor,
    max_detections: int,
    on_batch: Callable[[], None] | None = None,
) -> tuple[list[int], list[ImageResult]]:
    """Detect objects once in every image; to be called by every process.

    Args:
        accelerator: gathers the results of all processes.
        model: prepared by the accelerator.
        loader: what `make_eval_loader` gives this process.
        processor: turns outputs into boxes in pixels of the original image.
        max_detections: boxes per image, best scores first.
        on_batch: called after each batch; may raise to stop.

    Returns:
        Image ids in ascending order, and for each `scores` [n], `labels` [n] and `boxes` [n, 4]
        xyxy in pixels, on the CPU; the same on every process. Boxes are not clipped to the image.

    Raises:
        NonFiniteOutput: a score or a box is NaN or infinite; names the images.
    """
    was_training = model.training
    model.eval()
    rows: list[tuple[int, ImageResult]] = []
    try:
        for held in loader:
            batch = processor.normalize_batch(
                send_to_device(held, accelerator.device, non_blocking=True)
            )
            output = model(**model_inputs(batch))
            sizes = torch.stack([label["orig_size"] for label in batch["labels"]])
            ids = torch.cat([label["image_id"] for label in batch["labels"]]).tolist()
            try:
                found = processor.post_process_object_detection(
                    output, 0.0, sizes, max_detections, clip=False
                )
            except NonFiniteOutput as error:
                raise NonFiniteOutput(
                    f"{error}, in a batch of the image ids {ids}: training has diverged, or the "
                    f"weights are damaged"
                ) from None
            rows += [
                (image_id, {key: value.cpu() for key, value in result.items()})
                for image_id, result in zip(ids, found, strict=True)
            ]
            if on_batch is not None:
                on_batch()
    finally:
        model.train(was_training)
    by_id = dict(gather_object(rows))  # a process may have repeated an image
    return sorted(by_id), [by_id[image_id] for image_id in sorted(by_id)]
