"""transformers' object detection pipeline, but reading images as training does.

Its own reader converts every image to RGB before the processor sees it: it clips 16-bit pixels at
255 and reveals colours that are hidden by transparency.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.pipelines import SUPPORTED_TASKS
from transformers.pipelines.object_detection import ObjectDetectionPipeline

from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.data.image_sources import pixels_of_any

_TASK = "object-detection"


class DetrelayPipeline(ObjectDetectionPipeline):
    """Detects in Pillow images, paths, addresses and base64 texts.

    Models with an image processor of another project are handled as by the base class.
    """

    def preprocess(  # type: ignore[override]  # as in the base
        self, image: Any, timeout: float | None = None
    ) -> Any:
        """Read an image and turn it into the model's inputs."""
        if isinstance(self.image_processor, DetrelayImageProcessor):
            image = pixels_of_any(image, max_pixels=self.image_processor.max_pixels)
            inputs = self.image_processor(images=[image], return_tensors="pt").to(self.dtype)
            inputs["target_size"] = torch.tensor([image.shape[-2:]])
            return inputs
        return super().preprocess(image, timeout)


def register_pipeline() -> None:
    """Make `transformers.pipeline` use this class."""
    tasks: dict[str, Any] = SUPPORTED_TASKS
    tasks[_TASK]["impl"] = DetrelayPipeline
