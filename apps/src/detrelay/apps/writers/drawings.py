"""Images and videos with boxes drawn on them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from detrelay.apps.sources.item import Input, flat_name
from detrelay.apps.writers.base import Classes, Seen

if TYPE_CHECKING:
    from torch import Tensor

_TICKS = 90_000  # units of frame times per second
_CODECS = ("libx264", "mpeg4")


class DrawingsWriter:
    """`IMAGE.png`, or `VIDEO.mp4` for the frames of a video, with labelled boxes."""

    def __init__(self, output: Path, classes: Classes) -> None:
        self.output = output
        self.classes = classes
        self.videos: dict[str, VideoFile] = {}

    @staticmethod
    def target(output: Path, item: Input) -> Path | None:
        """The drawn image; None for frames, which share a file."""
        return output / f"{item.flat_name}.png" if item.frame is None else None

    def add(self, seen: Seen) -> None:
        """Draw an image."""
        import torch
        from torchvision.transforms.v2 import functional as tv_functional

        from detrelay.apps.drawing import draw_boxes
        from detrelay.core.engine.atomic_folder import written_aside

        drawn = draw_boxes(
            seen.pixels,
            torch.tensor([one.box_xyxy for one in seen.found]).reshape(-1, 4),
            [one.index for one in seen.found],
            [f"{self.classes.names[one.index]} {one.score:.2f}" for one in seen.found],
        )
        item = seen.item
        target = self.target(self.output, item)
        if item.frame is not None:
            name = flat_name(item.file_name)
            if name not in self.videos:
                self.videos[name] = VideoFile(self.output / f"{name}.mp4", drawn)
            self.videos[name].add(drawn, item.frame.time)
        elif target is not None:
            with written_aside(target) as aside:
                tv_functional.to_pil_image(drawn).save(aside, "PNG")

    def close(self, *, complete: bool) -> None:
        """Finish the videos, so that they can be played even if incomplete."""
        for video in self.videos.values():
            video.close()


class VideoFile:
    """A video of drawn frames, each shown at its own time.

    Args:
        target: an .mp4 file.
        first: its first frame, uint8 [3, H, W]; others are cropped or padded to its size.
    """

    def __init__(self, target: Path, first: Tensor) -> None:
        from fractions import Fraction

        import av

        codec = next(name for name in _CODECS if name in av.codecs_available)
        self.container: Any = av.open(str(target), "w")
        stream: Any = self.container.add_stream(codec, rate=30)
        # codecs halve the colour resolution of both axes
        stream.height, stream.width = (side + side % 2 for side in first.shape[-2:])
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, _TICKS)
        self.stream = stream
        self.last = -1

    def add(self, drawn: Tensor, time: float) -> None:
        """Add a frame uint8 [3, H, W] at a time in seconds, after those before it."""
        import av
        import torch

        pixels = torch.zeros(self.stream.height, self.stream.width, 3, dtype=torch.uint8)
        shown = drawn.permute(1, 2, 0)[: self.stream.height, : self.stream.width]
        pixels[: shown.shape[0], : shown.shape[1]] = shown
        frame: Any = av.VideoFrame.from_ndarray(pixels.numpy(), format="rgb24")
        self.last = max(self.last + 1, round(time * _TICKS))
        frame.pts = self.last
        frame.time_base = self.stream.codec_context.time_base
        self.container.mux(self.stream.encode(frame))

    def close(self) -> None:
        """Flush the codec and write the index of the file."""
        self.container.mux(self.stream.encode(None))
        self.container.close()
