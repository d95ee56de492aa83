"""An exported folder in the object detection pipeline of transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.data.pipeline import DetrelayPipeline
from detrelay.core.detector.model import DetectorOutput
from detrelay.core.export.detector import ExportedDetector


class ExportedForObjectDetection(PreTrainedModel):
    """An exported file behind the calls of a model of transformers. It cannot be trained or saved.

    Args:
        folder: what `detrelay export` wrote.
        threads: CPU threads to run on; None leaves it to the runtime.

    Raises:
        ValueError: the folder holds no exported detector, or its runtime is not installed.
    """

    main_input_name = "pixel_values"

    def __init__(self, folder: str | Path, *, threads: int | None = None) -> None:
        detector = ExportedDetector(folder, threads=threads)
        names = dict(enumerate(detector.class_names))
        super().__init__(
            PreTrainedConfig(id2label=names, label2id={name: key for key, name in names.items()})
        )
        self._detector = detector

    @property
    def device(self) -> torch.device:
        """Where pixels are taken and outputs given; the file itself runs where its runtime does."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """What pixels are taken in, whatever the file computes in."""
        return torch.float32

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> DetectorOutput:
        """Detect objects.

        Args:
            pixel_values: float32 [B, 3, H, W], normalised, padded bottom and right.
            pixel_mask: [B, H, W], 1 on real pixels; all real if None.
        """
        if pixel_mask is None:
            batch, _, height, width = pixel_values.shape
            pixel_mask = torch.ones(batch, height, width)
        logits, boxes = self._detector.run(
            pixel_values.float().numpy(), pixel_mask.to(torch.int64).numpy()
        )
        return DetectorOutput(logits=torch.from_numpy(logits), pred_boxes=torch.from_numpy(boxes))


# the pipeline believes only of models named here that they can detect objects
MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES["detrelay_exported"] = ExportedForObjectDetection.__name__


def exported_pipeline(folder: str | Path, *, threads: int | None = None) -> DetrelayPipeline:
    """What `transformers.pipeline("object-detection")` makes of a model, for an exported folder.

    Args:
        folder: what `detrelay export` wrote.
        threads: CPU threads to run on; None leaves it to the runtime.

    Raises:
        ValueError: the folder holds no exported detector, or its runtime is not installed.
    """
    return DetrelayPipeline(
        model=ExportedForObjectDetection(folder, threads=threads),
        image_processor=DetrelayImageProcessor.from_pretrained(folder),
        task="object-detection",
    )
