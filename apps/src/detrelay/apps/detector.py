"""From pixels to detections with a saved model and the options of a command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from detrelay.core.errors import unknown_name

if TYPE_CHECKING:
    from detrelay.core.data.image_processing import DetrelayImageProcessor
    from detrelay.core.detector.model import DetectorForObjectDetection

Found = dict[str, Tensor]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Choice:
    """Which detections to keep.

    Attributes:
        threshold: detections score above this, 0 to 1.
        top_k: maximum number of detections per image.
        classes: names of the classes to detect; empty for all. Others do not count for `top_k`.
        nms_iou_threshold: as in `DetrelayImageProcessor`; None leaves it to the model's processor.
    """

    threshold: float = 0.5
    top_k: int = 100
    classes: tuple[str, ...] = ()
    nms_iou_threshold: float | None = None


class Detector:
    """Detects objects in images of any size.

    Args:
        model: on its device, in evaluation mode.
        processor: the model's.
        choice: which detections to keep.

    Raises:
        ValueError: a chosen class is not one of the model's.
    """

    def __init__(
        self,
        model: DetectorForObjectDetection,
        processor: DetrelayImageProcessor,
        choice: Choice,
    ) -> None:
        self.model, self.processor, self.choice = model, processor, choice
        if choice.nms_iou_threshold is not None:
            processor.nms_iou_threshold = choice.nms_iou_threshold
        self.kept = _indices(model.config.class_names, choice.classes)

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor]) -> list[Found]:
        """Detect in images uint8 [3, H, W].

        Only images that are padded to the same size on their own share a batch, so that no image
        affects the detections in another.

        Returns:
            One mapping per image, on the CPU: `scores` float [n], best first, `labels` int64 [n],
            `boxes` float [n, 4] xyxy in pixels of the image.

        Raises:
            NonFiniteOutput: a score or a box is NaN or infinite.
        """
        prepared = [self.processor(images=image, return_tensors="pt") for image in images]
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, inputs in enumerate(prepared):
            groups.setdefault(tuple(inputs["pixel_values"].shape), []).append(index)
        found: dict[int, Found] = {}
        for members in groups.values():
            joined = {
                name: torch.cat([prepared[index][name] for index in members])
                for name in prepared[members[0]]
            }
            sizes = [(images[index].shape[-2], images[index].shape[-1]) for index in members]
            found.update(zip(members, self._detect(joined, sizes), strict=True))
        return [found[index] for index in range(len(images))]

    def _detect(self, inputs: dict[str, Tensor], sizes: Sequence[tuple[int, int]]) -> list[Found]:
        device = self.model.device
        output: Any = self.model(**{name: value.to(device) for name, value in inputs.items()})
        if self.kept is not None:
            output.logits = output.logits[..., self.kept.to(device)]
        results = self.processor.post_process_object_detection(
            output, self.choice.threshold, sizes, self.choice.top_k
        )
        found = [{name: value.cpu() for name, value in result.items()} for result in results]
        if self.kept is not None:
            found = [{**result, "labels": self.kept[result["labels"]]} for result in found]
        return found


def place_model(
    model: DetectorForObjectDetection, device: str | None, dtype: str | None
) -> DetectorForObjectDetection:
    """A model ready to detect.

    Args:
        model: as it was loaded.
        device: as torch names it; None for a GPU if there is one.
        dtype: a key of `DTYPES`; None for that of the saved weights.

    Raises:
        ValueError: the device is not available.
    """
    named = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(named)
        torch.zeros(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {named}: not available: {reason}") from None
    torch.nn.Module.to(model, device=place, dtype=None if dtype is None else DTYPES[dtype])
    return model.eval()


def _indices(names: Sequence[str], chosen: Sequence[str]) -> Tensor | None:
    """Class indices of the chosen names; None for all."""
    unknown = [name for name in chosen if name not in names]
    if unknown:
        raise ValueError(f"--classes: {unknown_name('class', unknown[0], names)}")
    if not chosen:
        return None
    return torch.tensor([index for index, name in enumerate(names) if name in chosen])
