"""The pipeline of transformers reads images as training does."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from transformers import DetrImageProcessor, PreTrainedConfig, PreTrainedModel, pipeline

from detrelay.core.data.decode import read_image
from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.data.pipeline import DetrelayPipeline
from factories_data import noise_image

# as the pixels are, so that they can be compared
PLAIN = DetrelayImageProcessor(do_resize=False, do_rescale=False, do_normalize=False, do_pad=False)


def test_the_pipeline_of_transformers_reads_so_for_our_models_only(tmp_path: Path) -> None:
    import detrelay.heads  # noqa: F401 - registers

    model = PreTrainedModelStub()
    file = tmp_path / "rgba.png"
    hidden = noise_image(24, 16)
    hidden.putalpha(Image.new("L", hidden.size, 100))
    hidden.save(file)
    image = Image.open(file)
    seen = {}
    for processor in (PLAIN, DetrImageProcessor(do_resize=False, do_rescale=False)):
        detect = pipeline("object-detection", model=model, image_processor=processor)
        assert type(detect) is DetrelayPipeline
        seen[type(processor)] = detect.preprocess(image)["pixel_values"][0]
    assert torch.equal(seen[DetrelayImageProcessor].byte(), read_image(file))
    assert seen[DetrImageProcessor].shape == (3, 16, 24)


class PreTrainedModelStub(PreTrainedModel):
    """Only what a pipeline asks for."""

    def __init__(self) -> None:
        super().__init__(PreTrainedConfig())
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.post_init()
