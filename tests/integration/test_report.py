"""Reports on saved models, detections of files without annotations, recorded figures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessor, ResNetConfig

from commands import command
from detrelay.apps import evaluate, report
from detrelay.core.data.coco import AnnotatedImages
from detrelay.core.data.places import evaluation_split
from factories_data import write_coco, write_shapes
from tiny_run import shrink_backbone, skip_pictures, tiny_run


@pytest.fixture(scope="module")
def coco_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coco")
    write_shapes(folder, [7, 3, 90, 11])
    return folder


@pytest.fixture(scope="module")
def run(coco_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("runs") / "cells"
    with pytest.MonkeyPatch.context() as patch:
        shrink_backbone(patch)
        skip_pictures(patch)
        assert tiny_run(output, data=(coco_folder,)) == 0
        yield output
    torch.set_num_threads(threads)


def test_report_is_one_page_and_its_figures(
    run: Path, coco_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "report"
    code, out, err = command(
        report.report, report.Arguments, capsys,
        *("--model", run / "last", "--data", coco_folder, "--output", output),  # its split val
        *("--beside", run / "best", "--gallery", "1"),
    )  # fmt: skip
    assert code == 0, err
    for letter in "AB":
        assert f"{letter}: AP by stage (maxDets 100): " in out
    figures = json.loads((output / "figures.json").read_text())
    measured = json.loads((run / "results.json").read_text())["stats"]
    assert len(figures["stages"]) == 3
    assert figures["stages"][-1]["stats"] == pytest.approx(measured, abs=1e-6)
    assert [len(row) for row in figures["similarity"]] == [3, 3, 3]
    assert figures["moved_labels"]["own"] == [figures["about"]["objects"]] * 3
    page = (output / "report.html").read_text()
    charts = sorted(path.stem for path in output.glob("*.png"))
    assert charts == [
        "boxes", "duplicates", "errors", "feature_maps", "gates", "hardest_1", "instability",
        "moved_labels", "precision", "query_maps", "separability", "similarity",
    ]  # fmt: skip
    assert page.count("data:image/png;base64,") == len(charts)
    assert "http" not in page  # it needs nothing from elsewhere
    assert figures["beside"]["about"]["model"].endswith("best")
    assert figures["about"]["backend"] == "hotcoco"
    for row in ("A: 3", "B: 3"):
        assert f"<td>{row}</td>" in page
    assert "B: AP is" in page


def test_figures_do_not_depend_on_the_size_of_batches(
    run: Path, coco_folder: Path, tmp_path: Path
) -> None:
    content = json.loads((coco_folder / "val.json").read_text())
    sizes = [(96, 40), (40, 96), (64, 64)]  # padded together they would all be of another shape
    content["images"] = [
        {"id": row, "file_name": f"{row}.png", "width": width, "height": height}
        for row, (width, height) in enumerate(sizes)
    ]
    for row, annotation in enumerate(content["annotations"][:6]):
        annotation |= {"image_id": row % 3, "bbox": [4, 5, 20, 24], "area": 480}
    content["annotations"] = content["annotations"][:6]
    data = write_coco(tmp_path, content)
    samples = AnnotatedImages(evaluation_split(str(data)))
    truth = report.shown_truth(samples, len(samples))
    alone, together = (
        report.figures_of(
            run / "last", samples, truth,
            report.Arguments(run / "last", data, Path("unused"), batch_size=size),
        )[0]
        for size in (1, 3)
    )  # fmt: skip
    for part in ("stages", "errors", "instability", "moved_labels", "hardest"):
        assert evaluate.rounded(alone[part]) == evaluate.rounded(together[part]), part
    assert alone["refinement"]["iou"] == pytest.approx(together["refinement"]["iou"], abs=1e-5)
    np.testing.assert_allclose(alone["similarity"], together["similarity"], atol=1e-4)
    for one, other in zip(alone["query_maps"], together["query_maps"], strict=True):
        assert one["query"] == other["query"]
        np.testing.assert_allclose(one["boxes"], other["boxes"], atol=1e-5)


def test_report_on_a_detector_of_transformers(
    coco_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = json.loads((coco_folder / "val.json").read_text())
    names = ["spare", *(category["name"] for category in truth["categories"])]
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage4"],
    )  # fmt: skip
    config = DetrConfig(
        backbone_config=backbone, d_model=16, encoder_layers=1, decoder_layers=2, num_queries=5,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
        decoder_ffn_dim=16, id2label=dict(enumerate(names)),
    )  # fmt: skip
    folder, output = tmp_path / "detr", tmp_path / "report"
    DetrForObjectDetection(config).save_pretrained(folder)
    DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(folder)
    arguments = ("--data", coco_folder / "val.json", "--model", folder, "--output", output)
    code, _, err = command(
        report.report, report.Arguments, capsys, *arguments, "--gallery", "0", "--num-images", "2"
    )
    assert code == 0, err
    figures = json.loads((output / "figures.json").read_text())
    assert figures["gates"] == []
    assert len(figures["stages"]) == 2
    assert figures["about"]["model_type"] == "detr"
    assert figures["about"]["images"] == 2
    assert len(figures["similarity"]) == 2
    page = (output / "report.html").read_text()
    assert "no gates" in page
    config.id2label = dict(enumerate(["spare"] * len(names)))
    config.save_pretrained(folder)
    code, _, err = command(report.report, report.Arguments, capsys, *arguments)
    assert code == 2
    assert "has no class named" in err


@pytest.mark.parametrize("annotations", [{}, {"annotations": []}])
def test_files_without_annotations_get_detections_only(
    annotations: dict[str, object],
    run: Path,
    coco_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    truth = json.loads((coco_folder / "val.json").read_text())
    unlabelled, written = tmp_path / "test.json", tmp_path / "found.json"
    kept = {key: truth[key] for key in ("images", "categories")}
    unlabelled.write_text(json.dumps(kept | annotations))
    arguments = ("--model", run / "last", "--data", unlabelled, "--images", coco_folder / "images")
    code, out, _ = command(
        evaluate.evaluate, evaluate.Arguments, capsys, *arguments, "--detections", written
    )
    assert code == 0
    assert "no annotations: nothing is scored" in out
    assert "AP" not in out
    rows = json.loads(written.read_text())
    assert {row["image_id"] for row in rows} == {image["id"] for image in truth["images"]}
    code, _, err = command(evaluate.evaluate, evaluate.Arguments, capsys, *arguments)
    assert code == 2
    assert "--detections FILE" in err


@pytest.mark.parametrize(
    ("folder", "truth", "detections"),
    [
        ("bccd", "val.json", "noisy_detections.json"),
        ("coco_mini", "instances.json", "noisy_detections.json"),
        ("coco_fake100", "instances_gt.json", "fakebbox100_results.json"),
    ],
)
def test_evaluator_reproduces_published_figures_to_six_decimals(
    folder: str,
    truth: str,
    detections: str,
    real_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = real_data / folder
    target = tmp_path / "figures.json"
    code, out, _ = command(
        evaluate.evaluate, evaluate.Arguments, capsys,
        *("--predictions", data / detections, "--data", data / truth, "--output", target),
    )  # fmt: skip
    assert code == 0
    expected = json.loads((data / "expected_eval.json").read_text())
    figures = json.loads(target.read_text())
    for part in ("stats", "AP_per_category"):
        assert figures[part] == expected[part]
    lines = [line.split() for line in out.splitlines()]
    assert ["AP", f"{100 * expected['stats']['AP']:.1f}", "maxDets", "100"] in lines
