"""Where images come from: one file for each kind of place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from detrelay.apps.sources import addresses, files, lists, video
from detrelay.apps.sources.item import FrameChoice, Source, Wanted
from detrelay.core.data.addresses import is_address


@dataclass(frozen=True)
class SourceKind:
    """A kind of place.

    Attributes:
        takes: whether a text behind --input is such a place.
        open: its images.
        has_frames: they are frames of a video.
    """

    takes: Callable[[str], bool]
    open: Callable[[Wanted], Source]
    has_frames: bool = False


# the first that takes a place opens it
SOURCES = {
    "standard input": SourceKind(lambda place: place == "-", lists.open_standard_input),
    "camera": SourceKind(video.is_camera, video.open_camera, has_frames=True),
    "stream": SourceKind(video.is_stream, video.open_stream, has_frames=True),
    "video": SourceKind(video.is_video, video.open_video, has_frames=True),
    "address": SourceKind(is_address, addresses.open_address),
    "list": SourceKind(lists.is_list, lists.open_list),
    "files": SourceKind(lambda place: True, files.open_files),
}


def open_source(wanted: Wanted) -> Source:
    """The images behind --input.

    Raises:
        ValueError: there are none, or frames are chosen where there is no video.
    """
    kind = next(kind for kind in SOURCES.values() if kind.takes(wanted.place))
    if wanted.frames != FrameChoice() and not kind.has_frames:
        raise ValueError(
            f"--frame-step and --max-frames are about videos; --input {wanted.place} is none"
        )
    return kind.open(wanted)
