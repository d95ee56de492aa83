"""One reader of images: the same pixels, or the same refusal, on every way in."""

from __future__ import annotations

import base64
import functools
import http.server
import json
import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from detrelay.core.data import decode
from detrelay.core.data.augmentation import build_eval_transform
from detrelay.core.data.coco import CocoDataset
from detrelay.core.data.decode import ImageError, pixels_of_array, read_image
from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.data.pipeline import DetrelayPipeline
from detrelay.core.data.transforms import DetectionDataset
from factories_data import noise_image
from factories_images import HEIGHT, WIDTH, image_files, refused_files, saved

FILES = image_files()
REFUSED = refused_files()
# as the pixels are, so that they can be compared
PLAIN = DetrelayImageProcessor(do_resize=False, do_rescale=False, do_normalize=False, do_pad=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, file in FILES.items():
        (tmp_path / name).write_bytes(file.content)
    for name, (content, _) in REFUSED.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def in_training(path: Path, size: tuple[int, int]) -> Tensor:
    """Through a COCO file and its data set."""
    image = {"id": 1, "file_name": path.name, "height": size[0], "width": size[1]}
    content = {"images": [image], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    file = path.parent / "instances.json"
    file.write_text(json.dumps(content))
    return CocoDataset(file)[0].image


def in_evaluation(path: Path, size: tuple[int, int]) -> Tensor:
    """Through the data that evaluation encodes."""
    in_training(path, size)
    samples = CocoDataset(path.parent / "instances.json")
    data = DetectionDataset(samples, build_eval_transform(min(size), None), PLAIN, seed=0)
    return data[0]["pixel_values"]


def in_processor(image: Any) -> Tensor:
    return PLAIN(images=image, return_tensors="pt")["pixel_values"][0]


def in_pipeline(image: Any) -> Tensor:
    pipe = DetrelayPipeline.__new__(DetrelayPipeline)
    pipe.image_processor = PLAIN
    pipe.model = SimpleNamespace(dtype=torch.float32)
    inputs = pipe.preprocess(image)
    assert inputs["target_size"].tolist() == [list(inputs["pixel_values"].shape[-2:])]
    return inputs["pixel_values"][0]


WAYS: dict[str, Callable[[Path, tuple[int, int]], Tensor]] = {
    "training": in_training,
    "evaluation": in_evaluation,
    "processor by path": lambda path, size: in_processor(path),
    "processor by name": lambda path, size: in_processor(str(path)),
    "processor by image": lambda path, size: in_processor(Image.open(path)),
    "pipeline by name": lambda path, size: in_pipeline(str(path)),
    "pipeline by image": lambda path, size: in_pipeline(Image.open(path)),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_file_gives_the_same_pixels_on_every_way_in(way: str, folder: Path) -> None:
    assert len(FILES) >= 24
    for name, file in FILES.items():
        expected = read_image(folder / name)
        size = (WIDTH, HEIGHT) if name.startswith("turned") else (HEIGHT, WIDTH)
        assert expected.shape == (3, *size), name
        if file.pixels is not None:
            assert np.array_equal(expected.permute(1, 2, 0).numpy(), file.pixels), name
        assert torch.equal(WAYS[way](folder / name, size).to(torch.uint8), expected), name


@pytest.mark.parametrize("way", WAYS)
def test_every_file_is_refused_alike_on_every_way_in(way: str, folder: Path) -> None:
    for name, (_, words) in REFUSED.items():
        if "by image" in way and "known format" in words:
            continue  # what is never opened is no image to hand over
        with pytest.raises(ImageError, match=words) as error:
            WAYS[way](folder / name, (HEIGHT, WIDTH))
        assert name in str(error.value)
        assert "\n" not in str(error.value)


def test_arrays_give_the_pixels_of_their_files(folder: Path) -> None:
    for name, file in FILES.items():
        if file.array is None:
            continue
        expected = read_image(folder / name)
        tensor = torch.from_numpy(file.array)
        channels_first = tensor.permute(2, 0, 1) if tensor.ndim == 3 else tensor
        for same in (file.array, tensor, channels_first, channels_first.numpy()):
            assert torch.equal(in_processor(same), expected), name
            assert torch.equal(in_processor([same, same]), expected), name
    assert sum(file.array is not None for file in FILES.values()) > 12


def test_sixteen_bits_and_transparency_by_their_mean(folder: Path) -> None:
    assert float(read_image(folder / "grey16.png").float().mean()) == pytest.approx(127, abs=1)
    assert read_image(folder / "rgba.png")[:, [0, 12, 12], [0, 12, 30]].T.tolist() == [
        [255, 255, 255],
        [255, 0, 0],
        [127, 127, 255],
    ]


def test_json_may_say_that_an_image_is_not_turned(folder: Path) -> None:
    stored = in_training(folder / "turned.png", (HEIGHT, WIDTH))
    assert torch.equal(stored, read_image(folder / "rgb.png"))
    with pytest.raises(ImageError, match=r"30 x 40 pixels \(40 x 30 as stored\).* say 41 x 30"):
        in_training(folder / "turned.png", (HEIGHT, 41))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((4, 5, 3), np.float32), "found float32"),
        (np.zeros((4, 5, 3), np.int64), "found int64"),
        (torch.zeros(3, 4, 5, dtype=torch.bfloat16), "found float32"),
        (torch.zeros(3, 4, 5, dtype=torch.int16), "found int16"),
        (np.zeros((6, 5, 2), np.uint8), r"found shape \[6, 5, 2\]"),
        (np.zeros((4,), np.uint8), r"found shape \[4\]"),
        (np.zeros((0, 5, 3), np.uint8), r"found shape \[0, 5, 3\]"),
    ],
)
def test_arrays_without_a_known_white_or_shape_are_refused(array: Any, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        DetrelayImageProcessor()(images=array)


def test_floats_are_taken_as_they_are_where_nothing_is_to_be_scaled() -> None:
    values = torch.rand(3, HEIGHT, WIDTH)
    for same in (values, values.permute(1, 2, 0).numpy()):
        assert torch.equal(in_processor(same), values)
    with pytest.raises(ImageError, match="found float32"):
        DetrelayImageProcessor()(images=values)


def test_thin_arrays_are_read_by_the_custom_of_their_library() -> None:
    thin = np.random.default_rng(0).integers(0, 256, (3, 50, 3), dtype=np.uint8)
    assert pixels_of_array(thin).shape == (3, 3, 50)
    assert pixels_of_array(torch.from_numpy(thin)).shape == (3, 50, 3)
    first = PLAIN(images=thin, input_data_format="channels_first")["pixel_values"][0]
    assert first.shape == (3, 50, 3)


def test_a_dark_image_of_16_bits_is_said_once(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode._dark_images_reported.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            read_image(folder / "12_in_16.png")
            read_image(folder / "grey16.png")
            read_image(folder / "grey12.tif")
    (line,) = caplog.messages
    assert "12_in_16.png: no value of this 16-bit image is above 4095" in line


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 5}])
def test_plain_jpegs_are_decoded_at_once_to_pillows_pixels(
    mode: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = saved(noise_image(61, 37).convert(mode), "JPEG", **options)
    expected = torch.from_numpy(decode.read_pixels(content)).permute(2, 0, 1)
    monkeypatch.setattr(decode, "_upright_pixels", None)  # Pillow's way is not needed
    assert torch.equal(read_image(content), expected)
    assert torch.equal(read_image(content, size=(37, 61)), expected)


def test_jpegs_that_are_not_plain_are_left_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    image = noise_image(61, 37)
    whole = saved(image, "JPEG")
    exif = Image.Exif()
    exif[274] = 6
    monkeypatch.setattr(decode, "_pixels_of_jpeg", None)
    turned = read_image(saved(image, "JPEG", exif=exif.tobytes()))
    assert turned.shape == (3, 61, 37)
    assert read_image(saved(image.convert("CMYK"), "JPEG")).shape == (3, 37, 61)
    monkeypatch.undo()
    for cut in (whole[:-2], whole[: len(whole) // 2], whole[: len(whole) // 2] + b"\xff\xd9"):
        with suppress(ImageError):  # what Pillow says of it, whatever that is
            expected = torch.from_numpy(decode.read_pixels(cut)).permute(2, 0, 1)
            assert torch.equal(read_image(cut), expected)
            continue
        with pytest.raises(ImageError):
            read_image(cut)


def test_damaged_files_give_pixels_or_one_line() -> None:
    random = np.random.default_rng(0)
    contents = [file.content for file in FILES.values()]
    read = 0
    for turn in range(600):
        damaged = bytearray(contents[turn % len(contents)])
        for place in random.integers(0, len(damaged), 1 + turn % 7):
            damaged[place] = random.integers(0, 256)
        with suppress(ImageError):  # and nothing else
            pixels = read_image(bytes(damaged), max_pixels=10**6)
            assert (pixels.dtype, len(pixels)) == (torch.uint8, 3)
            read += 1
    assert 100 < read < 500


def test_too_many_pixels_are_refused_on_every_way_in(folder: Path) -> None:
    path = folder / "rgb.png"
    settings = {"max_pixels": HEIGHT * WIDTH - 1}
    small = DetrelayImageProcessor(**settings)
    image = {"id": 1, "file_name": path.name, "height": HEIGHT, "width": WIDTH}
    content = {"images": [image], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    (folder / "one.json").write_text(json.dumps(content))
    data = CocoDataset(folder / "one.json", max_pixels=settings["max_pixels"])
    for way in (
        lambda: data[0],
        lambda: small(images=path),
        lambda: small(images=Image.open(path)),
        lambda: DetrelayImageProcessor()(images=path, **settings),
    ):
        with pytest.raises(ImageError, match=r"rgb.png is too large: 40 x 30 pixels, .* 1199"):
            way()
    assert in_processor(path).shape == (3, HEIGHT, WIDTH)


def test_the_limit_may_be_above_pillows_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ImageError, match=r"too large: Image size .* set max_pixels higher"):
        read_image(folder / "rgb.png", max_pixels=20)
    assert read_image(folder / "rgb.png", max_pixels=1200).shape == (3, HEIGHT, WIDTH)


def test_a_bomb_is_refused_without_being_unpacked(tmp_path: Path) -> None:
    whole = saved(Image.new("1", (20_000, 20_000)), "PNG")
    (tmp_path / "bomb.png").write_bytes(whole)
    with pytest.raises(ImageError, match=r"bomb.png is too large: .*400000000 pixels"):
        read_image(tmp_path / "bomb.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no named pipes")
def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    for name, words in (
        ("pipe.png", "a pipe, socket or device"),
        ("zero.png", "a pipe, socket or device"),
        ("folder.png", "it is a folder"),
        ("none.png", "No such file"),
        ("zero\0byte.png", "null byte"),
    ):
        with pytest.raises(ImageError, match=words):
            in_processor(str(tmp_path / name))


def test_addresses_and_texts_are_read_too(folder: Path) -> None:
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_port}"
        expected = read_image(folder / "rgba.png")
        assert torch.equal(in_processor(f"{place}/rgba.png"), expected)
        assert torch.equal(in_pipeline(f"{place}/rgba.png"), expected)
        with pytest.raises(ImageError, match=r"cannot fetch image http.*/none.png: .*404"):
            in_processor(f"{place}/none.png")
        server.shutdown()
    text = base64.b64encode(FILES["rgba.png"].content).decode()
    assert torch.equal(in_processor(text), expected)
    assert torch.equal(in_processor(f"data:image/png;base64,{text}"), expected)
    with pytest.raises(ImageError, match="cannot read image nothing"):
        in_processor("nothing")
    with pytest.raises(TypeError, match="found dict"):
        in_processor({})


@pytest.mark.parametrize("size", [(1, 20_000), (3000, 1), (1, 1), (2, 3)])
def test_thin_images_have_pixels_left(size: tuple[int, int]) -> None:
    image = np.zeros((*size, 3), np.uint8)
    processor = DetrelayImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    batch = processor(images=Image.fromarray(image), return_tensors="pt")
    assert min(batch["pixel_mask"][0].any(1).sum(), batch["pixel_mask"][0].any(0).sum()) >= 1
    assert max(batch["pixel_values"].shape[-2:]) <= 96
    assert torch.equal(
        batch["pixel_values"], processor(images=image, return_tensors="pt")["pixel_values"]
    )


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"image_std": [0.2, 0.0, 0.2]}, "image_std must be above 0"),
        ({"image_std": -1.0}, "image_std must be above 0"),
        ({"image_std": float("nan")}, "image_std must be finite"),
        ({"image_mean": [0.5, float("inf"), 0.5]}, "image_mean must be finite"),
        ({"max_pixels": 0}, "max_pixels must be at least 1"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DetrelayImageProcessor(**settings)
    with pytest.raises(ValueError, match=words):
        DetrelayImageProcessor()(images=noise_image(20, 20), **settings)
