"""Frames of videos, streams and cameras."""

from __future__ import annotations

import socket
import struct
import sys
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from factories_data import write_coco
from fixed_model import Fixed, rows, run

av = pytest.importorskip("av", reason="videos need PyAV (the extra `video`)")
WIDTH, HEIGHT, RATE = 48, 32, 10


def write_video(target: Path | str, frames: int = 6, **options: Any) -> None:
    """Frames in grey that gets lighter, the left half always black."""
    with av.open(str(target), "w", **options) as container:
        stream: Any = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for index in range(frames):
            pixels = np.full((HEIGHT, WIDTH, 3), 40 * index, dtype=np.uint8)
            pixels[:, : WIDTH // 2] = 0
            frame: Any = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_frames_of_a_video_are_rows_and_a_video(
    model: Fixed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_video(tmp_path / "clip.mp4")
    output = tmp_path / "out"
    formats = ("coco", "yolo", "drawings", "csv")
    assert run(input=tmp_path / "clip.mp4", output=output, format=formats, frame_step=2) == 0
    first, _, second, *_ = rows(output)
    assert (first["file_name"], first["frame"], first["time"]) == ("clip.mp4", 0, 0)
    assert (second["frame"], second["time"]) == (2, pytest.approx(0.2))
    assert len(rows(output)) == 6
    grey = [int(pixels[:, :, -8:].float().mean()) for pixels in model.seen]
    assert grey == pytest.approx([0, 80, 160], abs=6)
    assert (output / "labels" / "clip.mp4_000004.txt").is_file()
    line = (output / "predictions.csv").read_text().splitlines()[3]
    assert line.startswith("clip.mp4,,2,0.2,7,cat,")
    with av.open(str(output / "clip.mp4.mp4")) as drawn:
        frames = list(drawn.decode(video=0))
    assert [frame.time for frame in frames] == pytest.approx([0, 0.2, 0.4])
    assert (frames[0].width, frames[0].height) == (480, 320)  # enlarged, as images are
    edge = frames[2].to_ndarray(format="rgb24")[160, 239]
    assert edge.max() - edge.min() > 60  # the coloured side of a box
    assert "6 objects in 3 images, 0 images skipped" in capsys.readouterr().out


def test_a_video_that_lies_on_its_side_is_turned(model: Fixed, tmp_path: Path) -> None:
    """As telephones write them: the way up stands in a matrix of the file."""
    path = tmp_path / "clip.mp4"
    write_video(path, frames=1)
    unit = 1 << 16
    upright = struct.pack(">9i", unit, 0, 0, 0, unit, 0, 0, 0, 1 << 30)
    clockwise = struct.pack(">9i", 0, unit, 0, -unit, 0, 0, 0, 0, 1 << 30)
    content = path.read_bytes()
    header = content.index(b"tkhd")
    place = content.index(upright, header)
    path.write_bytes(content[:place] + clockwise + content[place + len(upright) :])
    write_light = model.seen
    assert run(input=path, output=tmp_path / "out", format=("coco",)) == 0
    assert write_light[0].shape[-2:] == (WIDTH, HEIGHT)


def test_a_damaged_video_gives_what_can_be_read(
    model: Fixed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("text.mp4", "whole.ts"):
        (tmp_path / name).write_text("no video")
    assert run(input=tmp_path / "text.mp4", output=tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --input text.mp4: cannot be opened as a video: Invalid data")
    assert not (tmp_path / "out").exists()
    path = tmp_path / "half.mp4"
    write_video(path, frames=6)

    def broken(frames: Iterator[Any]) -> Iterator[Any]:
        yield next(frames)
        raise av.error.InvalidDataError(1, "Invalid data found")

    decode = av.container.InputContainer.decode
    with pytest.MonkeyPatch.context() as patch:
        container = av.open(str(path))
        patch.setattr("av.open", lambda *_, **__: Broken(container, broken, decode))
        assert run(input=path, output=tmp_path / "out", format=("coco",)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("half.mp4: cannot be decoded after 1 frames: Invalid data found")
    assert len(rows(tmp_path / "out")) == 2


class Broken:
    """A container whose frames end in an error."""

    def __init__(self, container: Any, broken: Any, decode: Any) -> None:
        self.container, self.broken = container, broken
        self.streams = container.streams
        self.close = container.close

    def decode(self, stream: Any) -> Iterator[Any]:
        frames: Iterator[Any] = self.broken(self.container.decode(stream))
        return frames


def test_a_stream_ends_with_its_sender(model: Fixed, tmp_path: Path) -> None:
    write_video(tmp_path / "clip.ts")
    content = (tmp_path / "clip.ts").read_bytes()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def send() -> None:
            receiver, _ = server.accept()
            with receiver:
                receiver.sendall(content)

        sender = threading.Thread(target=send)
        sender.start()
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        assert run(input=address, output=tmp_path / "out", max_frames=4) == 0
        sender.join(10)
    found = rows(tmp_path / "out")
    assert {row["file_name"] for row in found} == {address}
    assert [row["frame"] for row in found[::2]] == [0, 1, 2, 3]


def test_an_interrupt_is_the_end_of_a_camera(
    model: Fixed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A camera of the test: the picture that ffmpeg draws for tests."""
    opened = av.open

    def camera(place: str, *mode: str, **_: Any) -> Any:
        if place == "/dev/video0":
            return opened("testsrc=size=48x32", format="lavfi")
        return opened(place, *mode)

    monkeypatch.setattr("av.open", camera)

    def stop(count: int) -> None:
        if count == 3:
            raise KeyboardInterrupt

    model.before = stop
    assert run(input="camera:/dev/video0", output=tmp_path / "out") == 0
    assert [row["frame"] for row in rows(tmp_path / "out")[::2]] == [0, 1, 2]
    with av.open(str(tmp_path / "out" / "camera__dev__video0.mp4")) as drawn:
        assert len(list(drawn.decode(video=0))) == 3


def test_choices_about_videos_are_refused_elsewhere(
    model: Fixed, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(input=photos, output=tmp_path / "out", frame_step=2) == 2
    assert "--frame-step and --max-frames are for videos" in capsys.readouterr().err
    assert run(data=write_coco(tmp_path), output=tmp_path / "out", max_frames=2) == 2
    assert "--frame-step and --max-frames are for videos" in capsys.readouterr().err


def test_a_missing_library_is_said(
    model: Fixed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "clip.mp4").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "av", None)
    assert run(input=tmp_path / "clip.mp4", output=tmp_path / "out") == 2
    assert "videos need PyAV, which is not installed: pip install 'detrelay[video]'" in (
        capsys.readouterr().err
    )


def test_frames_beyond_the_limit_of_pixels_are_skipped(
    model: Fixed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_video(tmp_path / "clip.mp4", frames=2)
    assert run(input=tmp_path / "clip.mp4", output=tmp_path / "out", max_pixels=1535) == 1
    one, two = capsys.readouterr().err.splitlines()
    assert one.startswith("skipped clip.mp4 0: clip.mp4 is too large: 48 x 32 pixels")
    assert two.startswith("skipped clip.mp4 1: ")
