"""Preprocess images for the model, and turn its outputs back into boxes in the image.

It differs from transformers' image processors in three ways: boxes are in units of the unpadded
image, so a target never depends on the other images of its batch; padding goes to a multiple of a
number; one query may yield several detections.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Unpack

import torch
from torch import Tensor
from torchvision.ops import batched_nms
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import ChannelDimension, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from detrelay.core.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from detrelay.core.data.coco import Sample
from detrelay.core.data.collate import DIVISOR, EncodedSample, padded_size
from detrelay.core.data.decode import MAX_PIXELS
from detrelay.core.data.geometry import resized_shape
from detrelay.core.data.image_sources import pixels_of_any
from detrelay.core.errors import NonFiniteOutput
from detrelay.core.export.detections import NMS_CANDIDATES
from detrelay.core.structures import at_least_float32


class DetrelayImageProcessorKwargs(ImagesKwargs, total=False):
    """Options of the processor beyond those of every image processor.

    Attributes:
        pad_size_divisor: height and width of a batch are multiples of it, pixels.
        max_pixels: maximum number of pixels of an image; a larger one is rejected.
        nms_iou_threshold: boxes of one class that overlap a better one by more than this are
            suppressed in post-processing; None suppresses nothing. Needed by detectors trained with
            several queries per object (DETA: 0.7).
    """

    pad_size_divisor: int
    max_pixels: int
    nms_iou_threshold: float | None


class _DetectorOutput(Protocol):
    """The part of a detector's output that post-processing uses."""

    logits: Tensor
    pred_boxes: Tensor


class DetrelayImageProcessor(TorchvisionBackend):
    """Resizes, normalises and pads images; turns scores and boxes into detections.

    Images may be Pillow images, arrays, tensors, paths, addresses or base64 texts, alone or in
    lists, and are read by the rules of `detrelay.core.data.decode`: images are turned upright
    according to their EXIF data, and `target_sizes` of the post-processing must refer to that
    orientation. Arrays and tensors of floats are accepted only with `do_rescale=False` and used as
    they are: [H, W], or 1 or 3 channels. The result has `pixel_values` float [B, 3, H, W] and
    `pixel_mask` int64 [B, H, W], 1 where a pixel is real.

    Raises:
        ImageError: an image cannot be read, or its kind of pixels has no known white.
        ValueError: a setting makes no sense, such as a standard deviation of 0.
    """

    valid_kwargs = DetrelayImageProcessorKwargs
    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"shortest_edge": 800, "longest_edge": 1333}  # noqa: RUF012 - copied by the base
    default_to_square = False
    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_pad = True
    pad_size_divisor = DIVISOR
    max_pixels = MAX_PIXELS
    nms_iou_threshold: float | None = None
    model_input_names = ["pixel_values", "pixel_mask"]  # noqa: RUF012 - never changed

    def __init__(self, **kwargs: Unpack[DetrelayImageProcessorKwargs]) -> None:
        super().__init__(**kwargs)  # type: ignore[misc]  # it accepts what `valid_kwargs` names

    def _standardize_kwargs(  # type: ignore[override]  # everything is passed on
        self, **kwargs: Any
    ) -> dict[str, Any]:
        """The settings as standardised by the base, for the processor and each call, checked."""
        settings: dict[str, Any] = super()._standardize_kwargs(**kwargs)
        deviations, means = settings["image_std"], settings["image_mean"]
        for name, values in (("image_std", deviations), ("image_mean", means)):
            numbers = values if isinstance(values, list | tuple) else [values]
            for number in numbers:
                if number is not None and not math.isfinite(number):
                    raise ValueError(f"{name} must be finite, found {values}")
                if name == "image_std" and number is not None and number <= 0:
                    raise ValueError(f"image_std must be above 0, found {values}")
        if settings.get("max_pixels") is not None and settings["max_pixels"] < 1:
            raise ValueError(f"max_pixels must be at least 1, found {settings['max_pixels']}")
        overlap = settings.get("nms_iou_threshold")
        if overlap is not None and not 0 <= overlap <= 1:
            raise ValueError(f"nms_iou_threshold must lie in [0, 1] or be None, found {overlap}")
        return settings

    def _prepare_image_like_inputs(
        self,
        images: Any,
        *args: Any,
        do_rescale: bool | None = None,
        input_data_format: Any = None,
        max_pixels: int = MAX_PIXELS,
        **kwargs: Any,
    ) -> list[Tensor]:
        """All images as tensors [3, H, W], uint8 unless they hold floats."""
        pixels = pixels_of_any(
            images,
            data_format=input_data_format,
            allow_floats=not do_rescale,
            max_pixels=max_pixels,
        )
        return super()._prepare_image_like_inputs(
            pixels, *args, input_data_format=ChannelDimension.FIRST, **kwargs
        )

    def resize(
        self,
        image: Tensor,
        size: SizeDict,
        resample: Any = None,
        antialias: bool = True,
        **kwargs: Any,
    ) -> Tensor:
        """Resize images [..., 3, H, W]; `shortest_edge` and `longest_edge` bound the sides."""
        if not size.shortest_edge:
            return super().resize(image, size, resample, antialias, **kwargs)
        height, width = image.shape[-2:]
        shape = resized_shape(height, width, size.shortest_edge, size.longest_edge)
        exact = SizeDict(height=shape[0], width=shape[1])
        return super().resize(image, exact, resample, antialias, **kwargs)

    def _preprocess(  # type: ignore[override]  # the base calls it with keywords only
        self,
        images: list[Tensor],
        *,
        do_pad: bool | None,
        pad_size: SizeDict | None,
        pad_size_divisor: int,
        return_tensors: str | None,
        disable_grouping: bool | None,
        **kwargs: Any,
    ) -> BatchFeature:
        """All but the padding is done by the base; images are padded at the bottom and right."""
        features = super()._preprocess(
            images,
            do_pad=False,
            pad_size=None,
            disable_grouping=disable_grouping,
            return_tensors=None,
            **kwargs,
        )
        if do_pad:
            resized = features["pixel_values"]
            if pad_size is None:
                height, width = padded_size(
                    [(image.shape[-2], image.shape[-1]) for image in resized], pad_size_divisor
                )
                pad_size = SizeDict(height=height, width=width)
            features["pixel_values"], features["pixel_mask"] = self.pad(
                resized, pad_size=pad_size, return_mask=True, disable_grouping=disable_grouping
            )
        return BatchFeature(data=dict(features), tensor_type=return_tensors)

    def encode(self, sample: Sample, *, normalize: bool = True) -> EncodedSample:
        """Normalise a sample of final size, and convert its boxes to units of the image.

        Args:
            sample: image and objects.
            normalize: False leaves the pixels as they are, for `normalize_batch` to do it.
        """
        height, width = sample.image.shape[-2:]
        pixel_values = self._normalized(sample.image) if normalize else sample.image
        scale = sample.boxes_xyxy.new_tensor([width, height, width, height])
        labels = {
            "class_labels": sample.class_labels,
            "boxes": xyxy_to_cxcywh(sample.boxes_xyxy / scale),
            "image_id": torch.tensor([sample.image_id]),
            "orig_size": torch.tensor(sample.original_size),
            "size": torch.tensor([height, width]),
        }
        return {"pixel_values": pixel_values, "labels": labels}

    def normalize_batch(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A padded batch with normalised pixels, where they are bytes; any other as it is.

        Normalising after padding, on the device, gives the numbers of `encode` and `collate`: the
        padding becomes zero again. Bytes are a quarter of what loader processes have to hand over.
        """
        pixels = batch.get("pixel_values")
        if pixels is None or pixels.dtype != torch.uint8:
            return dict(batch)
        padding = ~batch["pixel_mask"].bool()[:, None]
        # bytes arrive channels-last, which trains slower on a CPU (docs/performance.md)
        values = self._normalized(pixels.contiguous())
        return {**batch, "pixel_values": values.masked_fill_(padding, 0)}

    def _normalized(self, pixels: Tensor) -> Tensor:
        values: Tensor = self.rescale_and_normalize(
            pixels,
            self.do_rescale,
            self.rescale_factor,
            self.do_normalize,
            self.image_mean,
            self.image_std,
        )
        return values

    def post_process_object_detection(
        self,
        outputs: _DetectorOutput,
        threshold: float = 0.5,
        target_sizes: Tensor | Sequence[tuple[int, int]] | None = None,
        top_k: int = 100,
        *,
        clip: bool = True,
    ) -> list[dict[str, Tensor]]:
        """Turn scores and boxes into detections, best first.

        The `top_k` best of all query and class pairs are kept: a query may yield several classes.
        There is no non-maximum suppression (NMS) unless `nms_iou_threshold` is set; then the
        `top_k` best of those that remain are kept.

        Args:
            outputs: `logits` [B, Q, K] before the sigmoid, `pred_boxes` [B, Q, 4] cxcywh in
                [0, 1].
            threshold: detections score above this.
            target_sizes: (height, width) of each image, pixels, [B, 2]; None leaves boxes in
                [0, 1].
            top_k: maximum detections per image.
            clip: clip boxes to the image. Evaluation does not, as in the released code.

        Returns:
            One mapping per image: `scores` float [n], `labels` int64 [n], `boxes` float [n, 4]
            xyxy.

        Raises:
            NonFiniteOutput: a score or a box is NaN or infinite.
            ValueError: `target_sizes` and the batch differ in length.
        """
        logits = at_least_float32(outputs.logits)
        boxes = cxcywh_to_xyxy(outputs.pred_boxes.to(logits.dtype))
        if not (logits.isfinite().all() and boxes.isfinite().all()):
            raise NonFiniteOutput("the model's scores or boxes are not finite")
        if clip:
            boxes = boxes.clamp(0, 1)
        if target_sizes is not None:
            boxes = _in_pixels(boxes, target_sizes)
        num_classes = logits.shape[-1]
        # Stable, so that equal scores rank alike on every device
        scores, pairs = logits.sigmoid().flatten(1).sort(dim=1, descending=True, stable=True)
        count = top_k if self.nms_iou_threshold is None else NMS_CANDIDATES
        return [
            self._best(
                scores[image, :count],
                pairs[image, :count] % num_classes,
                boxes[image, pairs[image, :count] // num_classes],
                threshold,
                top_k,
            )
            for image in range(len(logits))
        ]

    def _best(
        self, scores: Tensor, labels: Tensor, boxes: Tensor, threshold: float, top_k: int
    ) -> dict[str, Tensor]:
        """Detections of one image among candidates, best first: [n], [n] and [n, 4]."""
        good = scores > threshold
        found = {"scores": scores[good], "labels": labels[good], "boxes": boxes[good]}
        if self.nms_iou_threshold is None:
            return found
        overlap = self.nms_iou_threshold
        kept = batched_nms(found["boxes"], found["scores"], found["labels"], overlap)[:top_k]
        return {name: values[kept] for name, values in found.items()}


def _in_pixels(boxes: Tensor, target_sizes: Tensor | Sequence[tuple[int, int]]) -> Tensor:
    """Boxes [B, Q, 4] in units of their images, scaled to (height, width) of each."""
    sizes = torch.as_tensor(target_sizes, dtype=boxes.dtype, device=boxes.device)
    if sizes.shape != (len(boxes), 2):
        raise ValueError(
            f"target_sizes must hold a (height, width) for each of {len(boxes)} images, "
            f"found shape {list(sizes.shape)}"
        )
    return boxes * sizes.flip(1).repeat(1, 2)[:, None]
