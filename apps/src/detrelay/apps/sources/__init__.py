"""Sources of images: one file per kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from detrelay.apps.sources import addresses, files, lists, video
from detrelay.apps.sources.item import FrameChoice, Request, Source
from detrelay.core.data.addresses import is_address


@dataclass(frozen=True)
class SourceKind:
    """A kind of source.

    Attributes:
        takes: whether the value of --input names one.
        open: returns its images.
        has_frames: whether they are frames of a video.
    """

    takes: Callable[[str], bool]
    open: Callable[[Request], Source]
    has_frames: bool = False


# the first kind that takes a place opens it
SOURCES = {
    "standard input": SourceKind(lambda place: place == "-", lists.open_standard_input),
    "camera": SourceKind(video.is_camera, video.open_camera, has_frames=True),
    "stream": SourceKind(video.is_stream, video.open_stream, has_frames=True),
    "video": SourceKind(video.is_video, video.open_video, has_frames=True),
    "address": SourceKind(is_address, addresses.open_address),
    "list": SourceKind(lists.is_list, lists.open_list),
    "files": SourceKind(lambda place: True, files.open_files),
}


def open_source(request: Request) -> Source:
    """The images of --input.

    Raises:
        ValueError: there are none, or frames are chosen of something other than a video.
    """
    kind = next(kind for kind in SOURCES.values() if kind.takes(request.place))
    if request.frames != FrameChoice() and not kind.has_frames:
        raise ValueError(
            f"--frame-step and --max-frames are for videos; --input {request.place} is not a video"
        )
    return kind.open(request)
