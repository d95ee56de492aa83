"""Frames of video files, streams and cameras, by PyAV."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from detrelay.apps.sources.item import (
    Frame,
    FrameChoice,
    Input,
    Request,
    Source,
)
from detrelay.core.data.addresses import is_address, without_password
from detrelay.core.errors import DataError, one_line

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (
    *(".avi", ".m2ts", ".m3u8", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts"),
    *(".webm", ".wmv"),
)
CAMERA = "camera:"
_STREAMS = re.compile(r"(rtsps?|rtmps?|srt|tcp|udp|rtp|mms)://", re.IGNORECASE)
# ffmpeg's name for the cameras of a platform
_CAMERA_FORMATS = {"linux": "v4l2", "darwin": "avfoundation", "win32": "dshow"}
_SECONDS_TO_OPEN, _SECONDS_TO_READ = 20.0, 30.0


def is_camera(place: str) -> bool:
    """Whether a place names a camera: `camera:/dev/video0`, `camera:0`, `camera:video=NAME`."""
    return place.startswith(CAMERA)


def is_stream(place: str) -> bool:
    """Whether a place is the address of a stream."""
    return _STREAMS.match(place) is not None


def is_video(place: str) -> bool:
    """Whether a place is a video file, local or at an HTTP address."""
    if is_address(place):
        return urlsplit(place).path.lower().endswith(SUFFIXES)
    return place.lower().endswith(SUFFIXES) and Path(place).is_file()


def open_video(request: Request) -> Source:
    """The frames of a video file.

    Raises:
        DataError: it cannot be opened as a video, or later not be decoded further.
    """
    name = (
        without_password(request.place) if is_address(request.place) else Path(request.place).name
    )
    return Source(_frames(_opened(request.place, name), name, request.frames))


def open_stream(request: Request) -> Source:
    """The frames of a stream, until it or the user ends it.

    Raises:
        DataError: as for a video.
    """
    name = without_password(request.place)
    return Source(_frames(_opened(request.place, name), name, request.frames), is_live=True)


def open_camera(request: Request) -> Source:
    """The frames of a camera, until the user ends them.

    Raises:
        DataError: as for a video.
    """
    kind = _CAMERA_FORMATS.get(sys.platform)
    if kind is None:
        raise DataError(f"--input {request.place}: no cameras are known on {sys.platform}")
    opened = _opened(request.place.removeprefix(CAMERA), request.place, kind)
    return Source(_frames(opened, request.place, request.frames), is_live=True)


def _opened(place: str, name: str, kind: str | None = None) -> Any:
    """An open container with a video; whoever reads its frames closes it."""
    try:
        import av
    except ImportError:
        raise DataError(
            f"--input {name}: videos need PyAV, which is not installed: "
            f"pip install 'detrelay[video]'"
        ) from None
    try:
        container = av.open(place, format=kind, timeout=(_SECONDS_TO_OPEN, _SECONDS_TO_READ))
    except (OSError, ValueError) as error:  # PyAV raises one of the two
        raise DataError(f"--input {name}: cannot be opened as a video: {_reason(error)}") from None
    if not container.streams.video:
        container.close()
        raise DataError(f"--input {name}: it contains no video")
    return container


def _frames(container: Any, name: str, choice: FrameChoice) -> Iterator[Input]:
    index, taken, start = -1, 0, None
    with closing(container):
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        try:
            for index, frame in enumerate(container.decode(stream)):
                if choice.limit is not None and taken == choice.limit:
                    return
                time = index / rate if frame.time is None else float(frame.time)
                start = time if start is None else start
                if index % choice.step == 0:
                    taken += 1
                    yield _input(frame, name, Frame(index, time - start))
        except (OSError, ValueError) as error:
            if type(error).__module__.partition(".")[0] != "av":
                raise
            raise DataError(
                f"cannot be decoded after {index + 1} frames: {_reason(error)}"
            ) from None
    if index < 0:
        raise DataError("contains no frames")


def _input(frame: Any, name: str, place: Frame) -> Input:
    def read(max_pixels: int) -> Tensor:
        import numpy as np
        import torch

        from detrelay.core.data.decode import ImageError

        if frame.width * frame.height > max_pixels:
            raise ImageError(
                f"{name} is too large: {frame.width} x {frame.height} pixels, more than the limit "
                f"of {max_pixels} (max_pixels)"
            )
        pixels = np.rot90(frame.to_ndarray(format="rgb24"), _quarter_turns(frame))
        return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).contiguous()

    return Input(name, read, frame=place)


def _quarter_turns(frame: Any) -> int:
    """Counterclockwise quarter turns that bring a frame upright."""
    degrees = float(getattr(frame, "rotation", 0) or 0)
    return round(degrees / 90) % 4 if math.isfinite(degrees) else 0


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or one_line(error)
