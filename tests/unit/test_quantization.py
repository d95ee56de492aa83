"""Exported files in half precision and 8 bits, and files that take images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from detrelay.apps import export as export_app
from detrelay.core.engine.checkpoint import save_model
from detrelay.core.export import folder as export_folder
from detrelay.core.export import quantization
from detrelay.core.export.detector import Facts
from detrelay.core.export.folder import ExportRefused
from detrelay.core.export.quantization import Calibration, layers_by_part, part_of, quantize_parts
from detrelay.heads import HEADS
from factories import small_head_config
from factories_export import OPENVINO, PIXELS, PROCESSOR, noise, write_layers

FACTS = Facts("onnx", ["a", "b", "c", "d"], None, PIXELS)
IMAGES = [noise(70, 90, seed) for seed in range(4)]


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("backbone.network.layer1.0.conv1", "backbone"),
        ("neck.maps.0", "neck"),
        ("head.encoder.layers.0.ffn.widen", "encoder"),
        ("head.stages.3.mixing.generator", "decoder"),
        ("head.stages.3.classify.out", "branches"),
        ("head.refine_proposals.layers.0", "branches"),
    ],
)
def test_a_module_belongs_to_a_part(path: str, part: str) -> None:
    assert part_of(path) == part


@pytest.mark.parametrize("name", ["onnx", OPENVINO])
def test_parts_that_cost_ap_stay_float(name: str, tmp_path: Path) -> None:
    write_layers(tmp_path / "float32.onnx")
    facts = Facts(name, ["a", "b", "c", "d"], None, PIXELS)
    found: list[Any] = []
    told = iter([0.5, 0.499, 0.4])

    def ap(results: Any) -> float:
        found.append(results)
        return next(told)

    calibration = Calibration(IMAGES, ap)
    target = tmp_path / "int8.onnx"
    trials = quantize_parts(tmp_path / "float32.onnx", target, facts, calibration, 0.003)
    assert [(trial.part, trial.layers, trial.kept) for trial in trials] == [
        ("float32", 2, True),
        ("backbone", 1, True),
        ("branches", 1, False),
    ]
    kinds = {node.op_type: node for node in onnx.load(target).graph.node}
    assert kinds["Conv"].input[0].startswith("pixel_values_Dequantize")
    assert kinds["MatMul"].input[0] == "means"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float32.onnx", "int8.onnx"]
    for float_, mixed in zip(found[0], found[1], strict=True):
        assert 0 < np.abs(float_["scores"] - mixed["scores"]).max() < 0.05


def test_int8_is_refused_where_every_part_costs_ap(tmp_path: Path) -> None:
    write_layers(tmp_path / "float32.onnx")
    told = iter([0.5, 0.2, 0.3])
    calibration = Calibration(IMAGES, lambda results: next(told))
    with pytest.raises(
        ValueError,
        match=r"no part .*backbone 20.00, branches 30.00, and 0.3 points are allowed; name",
    ):
        quantize_parts(tmp_path / "float32.onnx", tmp_path / "x.onnx", FACTS, calibration, 0.003)


def test_parts_return_to_float_until_the_file_is_accepted(tmp_path: Path) -> None:
    write_layers(tmp_path / "float32.onnx")
    calibration = Calibration(IMAGES, lambda results: 0.5)
    asked: list[set[str]] = []

    def accepts(folder: Path) -> bool:
        nodes = onnx.load(folder / "model.onnx").graph.node
        asked.append(
            {node.op_type for node in nodes if "Dequantize" in "".join(node.input)}
            & {"Conv", "MatMul"}
        )
        return len(asked) > most

    most = 1
    base, target = tmp_path / "float32.onnx", tmp_path / "int8.onnx"
    trials = quantize_parts(base, target, FACTS, calibration, 0.003, accepts)
    assert asked == [{"Conv", "MatMul"}, {"Conv"}]
    assert [(trial.part, trial.kept, trial.returned) for trial in trials] == [
        ("float32", True, False),
        ("backbone", True, False),
        ("branches", False, True),
    ]
    kinds = {node.op_type: node for node in onnx.load(target).graph.node}
    assert kinds["MatMul"].input[0] == "means"

    asked.clear()
    most = 2
    with pytest.raises(ValueError, match="what passed loses more than that on the other"):
        quantize_parts(base, target, FACTS, calibration, 0.003, accepts)
    assert len(asked) == 2


def test_a_layer_that_does_not_say_where_it_comes_from_is_refused(tmp_path: Path) -> None:
    write_layers(tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    del model.graph.node[0].metadata_props[:]
    with pytest.raises(ValueError, match="conv: does not say which module it comes from"):
        layers_by_part(model)


def annotate_by(model: Any, folder: Path, images: int) -> None:
    """A data set whose objects are what a model finds best in noise."""
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 3, "name": "a"}, {"id": 7, "name": "b"}],
    }
    for number in range(1, images + 1):
        image = Image.fromarray(noise(60, 80, number))
        image.save(folder / f"{number}.png")
        content["images"].append(
            {"id": number, "file_name": f"{number}.png", "width": 80, "height": 60}
        )
        with torch.no_grad():
            output = model(**PROCESSOR(images=[image], return_tensors="pt"))
        found = PROCESSOR.post_process_object_detection(output, 0.0, [(60, 80)], 4)[0]
        for label, box in zip(found["labels"].tolist(), found["boxes"].tolist(), strict=True):
            left, top, right, bottom = box
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": number,
                    "category_id": (3, 7)[label],
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                }
            )
    (folder / "val.json").write_text(json.dumps(content))


@pytest.mark.slow
def test_a_bad_quantisation_is_refused_and_a_good_one_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    config = small_head_config(
        "deformable_detr_one_level",
        encoder_layers=1,
        decoder_layers=1,
        id2label={0: "a", 1: "b"},
        category_ids=[3, 7],
    )
    model = HEADS["deformable_detr"].model(config).eval()
    with torch.no_grad():
        for weight in model.head.parameters():  # boxes and scores that differ by query
            weight += 0.1 * torch.randn_like(weight)
    save_model(model, PROCESSOR, {}, tmp_path / "model")
    (tmp_path / "data").mkdir()
    annotate_by(model, tmp_path / "data", 6)
    arguments = export_app.Arguments(
        tmp_path / "model",
        "onnx",
        tmp_path / "good",
        data=tmp_path / "data/val.json",
        images=tmp_path / "data",
        precision="int8",
        calibration=tmp_path / "data/val.json",
        max_ap_difference=0.3,
        with_processing=True,
    )
    assert export_app.export(arguments) == 0
    report = json.loads((tmp_path / "good/report.json").read_text())
    assert report["precision"]["model"] > 0.9
    assert {trial["part"] for trial in report["trials"]} >= {"backbone", "neck", "decoder"}
    assert "| backbone |" in capsys.readouterr().out
    assert (tmp_path / "good/with_processing.onnx").is_file()

    def plant(base: Path, target: Path, facts: Any, calibration: Any, *_: Any) -> Any:
        names = [name for part in layers_by_part(onnx.load(base)).values() for name in part]
        ranges = target.with_name("ranges.json")
        quantization.quantize(base, target, names, calibration, facts, ranges)
        ranges.unlink()
        broken = onnx.load(target)
        for weight in broken.graph.initializer:
            if weight.name.endswith("_scale"):
                values = onnx.numpy_helper.to_array(weight) / np.float32(8)
                weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        onnx.save(broken, target)
        return []

    monkeypatch.setattr(export_folder, "quantize_parts", plant)
    refused = r"differs from its model: AP by (1|0\.\d+) \(bound 0.3\)"
    with pytest.raises(ExportRefused, match=refused):
        export_app.export(export_app.Arguments(**{**vars(arguments), "output": tmp_path / "bad"}))
    assert not (tmp_path / "bad").exists()
