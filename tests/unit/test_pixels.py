"""Pixels for exported detectors, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.export.pixels import PixelSettings, prepare, read_any
from factories_data import noise_image

PLAIN = PixelSettings(
    shortest_edge=None,
    longest_edge=None,
    height=None,
    width=None,
    resample=None,
    scale=1 / 255,
    mean=(0.2, 0.4, 0.6),
    std=(0.5, 0.25, 2.0),
    pad_size_divisor=4,
    max_pixels=1000,
    nms_iou_threshold=None,
)


def test_values_are_normalised_and_images_padded() -> None:
    images = [np.full((3, 5, 3), 255, np.uint8), np.zeros((2, 2, 3), np.uint8)]
    pixels, mask = prepare(images, PLAIN)
    assert pixels.shape == (2, 3, 4, 8)
    white, black = pixels[0, :, :3, :5], pixels[1, :, :2, :2]
    assert white.reshape(3, -1)[:, 0].tolist() == pytest.approx([1.6, 2.4, 0.2], rel=1e-5)
    assert black.reshape(3, -1)[:, 0].tolist() == pytest.approx([-0.4, -1.6, -0.3], rel=1e-5)
    assert np.ptp(white, axis=(1, 2)).max() == 0
    assert mask[0].tolist() == [[1] * 5 + [0] * 3] * 3 + [[0] * 8]
    assert not pixels[:, :, 3].any()
    assert not pixels[1, :, :, 2:].any()


@pytest.mark.parametrize(
    ("sides", "shape"),
    [
        ({"shortest_edge": 10, "longest_edge": 12}, (6, 12)),
        ({"height": 9, "width": 4}, (9, 4)),
        ({"shortest_edge": 8, "longest_edge": 99}, (8, 16)),
    ],
)
def test_images_are_resized_as_the_settings_say(
    sides: dict[str, int], shape: tuple[int, int]
) -> None:
    settings = replace(PLAIN, resample=2, **sides)  # type: ignore[arg-type]
    _, mask = prepare([np.zeros((8, 16, 3), np.uint8)], settings)
    assert (int(mask[0, :, 0].sum()), int(mask[0, 0].sum())) == shape


def test_settings_are_those_of_the_processor_and_survive_json() -> None:
    processor = DetrelayImageProcessor(
        size={"shortest_edge": 64, "longest_edge": 96},  # type: ignore[arg-type]
        do_normalize=False,
        pad_size_divisor=16,
        nms_iou_threshold=0.5,
    )
    settings = PixelSettings.of(processor)
    assert (settings.shortest_edge, settings.longest_edge, settings.height) == (64, 96, None)
    assert (settings.mean, settings.std) == ((0, 0, 0), (1, 1, 1))
    assert settings.scale == pytest.approx(1 / 255)
    assert (settings.pad_size_divisor, settings.nms_iou_threshold) == (16, 0.5)
    content = {**settings.to_dict(), "mean": list(settings.mean), "std": list(settings.std)}
    assert PixelSettings.from_dict(content) == settings


def test_images_are_read_from_paths_pillow_and_arrays(tmp_path: Path) -> None:
    image = noise_image(12, 8)
    image.save(tmp_path / "a.png")
    for form in (image, np.array(image), tmp_path / "a.png", str(tmp_path / "a.png")):
        assert np.array_equal(read_any(form, 1000), np.array(image))
    with pytest.raises(TypeError, match=r"an image must be a path, .* found int"):
        read_any(3, 1000)  # type: ignore[arg-type]
