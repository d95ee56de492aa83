"""Images to pixels and outputs to boxes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, pipeline
from transformers.utils import ModelOutput

from detrelay.core.data.augmentation import build_eval_transform
from detrelay.core.data.collate import collate
from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.data.transforms import DetectionDataset, UnnormalizedVisits
from factories_data import make_sample, noise_image

SIZE = {"shortest_edge": 48, "longest_edge": 80}
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def processor(**options: Any) -> DetrelayImageProcessor:
    return DetrelayImageProcessor(**({"size": SIZE} | options))


def test_pixels_are_scaled_to_zero_mean_and_unit_deviation() -> None:
    sample = make_sample(48, 64)
    wanted = (sample.image / 255 - MEAN[:, None, None]) / STD[:, None, None]
    pixels = processor()(images=sample.image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels[0, :, :48, :64], wanted)
    torch.testing.assert_close(processor().encode(sample)["pixel_values"], wanted)


def test_batch_is_padded_at_the_bottom_and_the_right() -> None:
    wide, tall = make_sample(30, 40).image, make_sample(70, 35).image
    batch = processor()(images=[wide, tall], return_tensors="pt")
    assert batch["pixel_values"].shape == (2, 3, 96, 64)  # 48 x 64 and 80 x 40
    assert batch["pixel_mask"].dtype == torch.int64
    for mask, pixels, (height, width) in zip(
        batch["pixel_mask"], batch["pixel_values"], [(48, 64), (80, 40)], strict=True
    ):
        assert mask[:height, :width].all()
        assert mask.sum() == height * width
        assert (pixels[:, mask == 0] == 0).all()
        assert (pixels[:, mask == 1] != 0).any()


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (64, 64)),
        ({"pad_size_divisor": 16}, (48, 64)),
        ({"pad_size": {"height": 100, "width": 90}}, (100, 90)),
        ({"size": {"height": 33, "width": 44}, "pad_size_divisor": 1}, (33, 44)),
        ({"size": {"shortest_edge": 96}}, (96, 128)),
        ({"do_resize": False}, (32, 64)),
    ],
)
def test_options_decide_the_size(options: dict[str, Any], shape: tuple[int, int]) -> None:
    image = make_sample(30, 40).image
    assert processor(**options)(images=image, return_tensors="pt")["pixel_mask"].shape[1:] == shape
    assert (
        processor()(images=image, return_tensors="pt", **options)["pixel_mask"].shape[1:] == shape
    )


def test_without_padding_images_keep_their_sizes() -> None:
    images = [make_sample(30, 40).image, make_sample(70, 35).image]
    batch = processor(do_pad=False)(images=images)
    assert [tuple(image.shape) for image in batch["pixel_values"]] == [(3, 48, 64), (3, 80, 40)]
    assert "pixel_mask" not in batch


def test_default_size_is_that_of_detr() -> None:
    image = make_sample(30, 60).image
    mask = DetrelayImageProcessor()(images=image, return_tensors="pt")["pixel_mask"][0]
    # short side round(1333 / 2) = 666 (to even), long side 1332
    assert (int(mask[:, 0].sum()), int(mask[0].sum())) == (666, 1332)


def test_a_target_does_not_depend_on_the_rest_of_the_batch() -> None:
    small, large = make_sample(30, 40, seed=1), make_sample(200, 90, seed=2)
    data = DetectionDataset(
        [small, large],  # type: ignore[arg-type]
        build_eval_transform(48, 80),
        processor(),
        seed=0,
    )
    alone, together = collate([data[0]]), collate([data[0], data[1]])
    assert together["pixel_values"].shape[-2:] != alone["pixel_values"].shape[-2:]
    boxes = alone["labels"][0]["boxes"]
    assert torch.equal(together["labels"][0]["boxes"], boxes)
    assert torch.equal(together["pixel_values"][0, :, :48, :64], data[0]["pixel_values"])
    width, height = 40, 30
    pixels = boxes * torch.tensor([width, height, width, height])
    corners = torch.cat([pixels[:, :2] - pixels[:, 2:] / 2, pixels[:, :2] + pixels[:, 2:] / 2], 1)
    torch.testing.assert_close(corners, small.boxes_xyxy)

    one = processor()(images=[small.image], return_tensors="pt")
    two = processor()(images=[small.image, large.image], return_tensors="pt")
    assert torch.equal(one["pixel_values"][0, :, :48, :64], two["pixel_values"][0, :, :48, :64])


@pytest.mark.parametrize("options", [{}, {"do_normalize": False}])
def test_bytes_normalised_as_a_batch_are_what_images_normalised_alone_are(
    options: dict[str, Any],
) -> None:
    data = DetectionDataset(
        [make_sample(30, 40, seed=1), make_sample(200, 90, seed=2)],  # type: ignore[arg-type]
        build_eval_transform(48, 80),
        processor(**options),
        seed=0,
    )
    floats = collate([data[0], data[1]])
    raw = UnnormalizedVisits(data)
    loaded = collate([raw[0], raw[1]])
    assert loaded["pixel_values"].dtype == torch.uint8
    loaded["pixel_values"] = loaded["pixel_values"].contiguous(memory_format=torch.channels_last)
    batch = processor(**options).normalize_batch(loaded)
    assert torch.equal(batch["pixel_values"], floats["pixel_values"])
    assert batch["pixel_values"].is_contiguous()
    assert torch.equal(batch["pixel_mask"], floats["pixel_mask"])
    again = processor().normalize_batch(batch)
    assert again["pixel_values"] is batch["pixel_values"]


def test_training_and_inference_see_the_same_pixels() -> None:
    sample = make_sample(53, 81)
    encoded = processor().encode(build_eval_transform(48, 80)(sample))
    height, width = encoded["pixel_values"].shape[-2:]
    pixels = processor()(images=sample.image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(pixels[:, :height, :width], encoded["pixel_values"])


def test_labels_of_an_encoded_sample() -> None:
    sample = build_eval_transform(48, 80)(make_sample(60, 80, [[8.0, 15.0, 24.0, 45.0]]))
    labels = processor().encode(sample)["labels"]
    torch.testing.assert_close(labels["boxes"], torch.tensor([[0.2, 0.5, 0.2, 0.5]]))
    assert labels["image_id"].tolist() == [7]
    assert labels["orig_size"].tolist() == [60, 80]
    assert labels["size"].tolist() == [48, 64]
    assert {value.dtype for key, value in labels.items() if key != "boxes"} == {torch.int64}
    empty = processor().encode(make_sample(60, 80, []))["labels"]
    assert empty["boxes"].shape == (0, 4)


def test_annotations_are_refused() -> None:
    with pytest.raises(TypeError, match="annotations"):
        processor()(images=make_sample().image, annotations=[{"image_id": 1, "annotations": []}])


def test_any_kind_of_image_is_taken(tmp_path: Path) -> None:
    image = noise_image(40, 30)
    image.save(tmp_path / "a.png")
    array = np.array(image)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    wanted = processor()(images=image, return_tensors="pt")["pixel_values"]
    for same in (array, tensor, str(tmp_path / "a.png"), [image]):
        assert torch.equal(processor()(images=same, return_tensors="pt")["pixel_values"], wanted)
    grey = image.convert("L")
    grey_wanted = processor()(images=grey.convert("RGB"), return_tensors="pt")["pixel_values"]
    for same in (grey, np.array(grey)):
        found = processor()(images=same, return_tensors="pt")["pixel_values"]
        assert torch.equal(found, grey_wanted)
    opaque = image.convert("RGBA")
    for same in (opaque, np.array(opaque)):
        assert torch.equal(processor()(images=same, return_tensors="pt")["pixel_values"], wanted)


def test_settings_survive_saving(tmp_path: Path) -> None:
    made = processor(pad_size_divisor=64, image_mean=[0.5, 0.5, 0.5])
    made.save_pretrained(tmp_path)
    loaded = DetrelayImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == made.to_dict()
    image = make_sample(30, 40).image
    first, second = (made(images=image, return_tensors="pt") for made in (made, loaded))
    assert torch.equal(first["pixel_values"], second["pixel_values"])
    assert first["pixel_values"].shape[-1] == 64


@dataclass
class Outputs:
    logits: Tensor
    pred_boxes: Tensor


def logit(probability: float) -> float:
    return float(torch.logit(torch.tensor(probability)))


def outputs() -> Outputs:
    """One image, two queries, three classes; the first query answers twice."""
    scores = [[0.9, 0.1, 0.6], [0.2, 0.7, 0.3]]
    boxes = [[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 0.5, 1.0]]
    logits = [[logit(value) for value in row] for row in scores]
    return Outputs(torch.tensor([logits]), torch.tensor([boxes]))


def test_detections_by_hand() -> None:
    (result,) = processor().post_process_object_detection(outputs(), 0.5, [(100, 200)])
    torch.testing.assert_close(result["scores"], torch.tensor([0.9, 0.7, 0.6]))
    assert result["labels"].tolist() == [0, 1, 2]
    first, second = [80.0, 30.0, 120.0, 70.0], [0.0, 0.0, 100.0, 100.0]
    torch.testing.assert_close(result["boxes"], torch.tensor([first, second, first]))


def test_a_score_at_the_threshold_is_no_detection() -> None:
    even = Outputs(logits=torch.zeros(1, 1, 1), pred_boxes=torch.full((1, 1, 4), 0.5))
    process = processor().post_process_object_detection
    assert process(even, 0.5)[0]["scores"].tolist() == []
    assert process(even, 0.4999)[0]["scores"].tolist() == [0.5]


def test_threshold_and_top_k() -> None:
    process = processor().post_process_object_detection
    assert process(outputs(), 0.0, None, 4)[0]["labels"].tolist() == [0, 1, 2, 2]
    assert len(process(outputs(), 0.0)[0]["scores"]) == 6
    assert process(outputs(), 0.65)[0]["labels"].tolist() == [0, 1]
    nothing = process(outputs(), 0.95)[0]
    assert nothing["boxes"].shape == (0, 4)
    assert nothing["labels"].dtype == torch.int64


def crowd() -> Outputs:
    """Four queries in one place, but for the last; the second and third overlap the first by 3/5.

    Their classes are 0, 0, 1 and 0, from the best to the worst.
    """
    table = [[0.9, 0.01], [0.8, 0.02], [0.03, 0.7], [0.6, 0.04]]
    boxes = [
        [0.4, 0.5, 0.2, 0.2],
        [0.45, 0.5, 0.2, 0.2],
        [0.45, 0.5, 0.2, 0.2],
        [0.8, 0.8, 0.2, 0.2],
    ]
    logits = [[logit(value) for value in row] for row in table]
    return Outputs(torch.tensor([logits]), torch.tensor([boxes]))


def test_boxes_are_suppressed_by_class_where_asked_for(tmp_path: Path) -> None:
    def scores(overlap: float | None, top_k: int = 100) -> list[float]:
        made = processor(nms_iou_threshold=overlap)
        made.save_pretrained(tmp_path)
        loaded = DetrelayImageProcessor.from_pretrained(tmp_path)
        (found,) = loaded.post_process_object_detection(crowd(), 0.5, [(480, 640)], top_k)
        return [round(score, 3) for score in found["scores"].tolist()]

    assert scores(None) == scores(0.65) == [0.9, 0.8, 0.7, 0.6]
    assert scores(0.55) == [0.9, 0.7, 0.6]
    assert scores(0.55, top_k=2) == [0.9, 0.7]
    assert processor().nms_iou_threshold is None
    with pytest.raises(ValueError, match=r"nms_iou_threshold must lie in \[0, 1\]"):
        processor(nms_iou_threshold=2)


def test_target_sizes_may_be_a_tensor_or_none() -> None:
    process = processor().post_process_object_detection
    by_list = process(outputs(), 0.5, [(100, 200)])[0]["boxes"]
    by_tensor = process(outputs(), 0.5, torch.IntTensor([[100, 200]]))[0]["boxes"]
    assert torch.equal(by_list, by_tensor)
    scale = torch.tensor([200.0, 100.0, 200.0, 100.0])
    torch.testing.assert_close(process(outputs(), 0.5)[0]["boxes"] * scale, by_list)


def test_boxes_are_cut_to_the_image_unless_told_otherwise() -> None:
    wide = Outputs(torch.tensor([[[3.0]]]), torch.tensor([[[0.9, 0.1, 0.4, 0.4]]]))
    process = processor().post_process_object_detection
    for sizes, scale in (([(100, 200)], (200.0, 100.0)), (None, (1.0, 1.0))):
        whole = torch.tensor([0.7, -0.1, 1.1, 0.3]) * torch.tensor([*scale, *scale])
        cut = torch.minimum(whole.clamp(min=0), torch.tensor([*scale, *scale]))
        torch.testing.assert_close(process(wide, 0.5, sizes)[0]["boxes"][0], cut)
        torch.testing.assert_close(process(wide, 0.5, sizes, clip=False)[0]["boxes"][0], whole)


def test_low_precision_outputs_give_full_precision_boxes() -> None:
    low = Outputs(outputs().logits.bfloat16(), outputs().pred_boxes.bfloat16())
    (result,) = processor().post_process_object_detection(low, 0.5, [(1001, 2003)])
    assert result["boxes"].dtype == result["scores"].dtype == torch.float32
    right = low.pred_boxes[0, 1].float()
    assert result["boxes"][1, 2].item() == pytest.approx(2003 * float(right[0] + right[2] / 2))


def test_equal_scores_rank_by_query_and_class() -> None:
    same = Outputs(torch.zeros(1, 40, 3), torch.rand(1, 40, 4))
    (result,) = processor().post_process_object_detection(same, 0.0, None, 7)
    assert result["labels"].tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_wrong_target_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="each of 1 images, found shape"):
        processor().post_process_object_detection(outputs(), 0.5, [(10, 10), (10, 10)])


@pytest.mark.parametrize("field", ["logits", "pred_boxes"])
def test_non_finite_outputs_are_refused(field: str) -> None:
    bad = outputs()
    getattr(bad, field)[0, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        processor().post_process_object_detection(bad)


class _FixedConfig(PreTrainedConfig):
    model_type = "detrelay_test_fixed"


@dataclass
class _FixedOutput(ModelOutput):
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None


class _FixedDetector(PreTrainedModel):
    """Gives the outputs above whatever the image; looks at the names of its inputs."""

    config: _FixedConfig
    main_input_name = "pixel_values"

    def __init__(self, config: _FixedConfig) -> None:
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.post_init()

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> _FixedOutput:
        assert pixel_mask.shape == pixel_values[:, 0].shape
        made = outputs()
        return _FixedOutput(logits=made.logits, pred_boxes=made.pred_boxes)


def test_object_detection_pipeline_runs() -> None:
    model = _FixedDetector(_FixedConfig(id2label={0: "cat", 1: "dog", 2: "cow"}))
    detect = pipeline("object-detection", model=model, image_processor=processor())
    detections = detect(noise_image(200, 100), threshold=0.65)
    assert [item["label"] for item in detections] == ["cat", "dog"]
    assert detections[1]["box"] == {"xmin": 0, "ymin": 0, "xmax": 100, "ymax": 100}
