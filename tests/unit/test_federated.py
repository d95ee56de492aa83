"""LVIS's figures: by hand, and those of lvis 0.5.3."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from detrelay.apps import evaluate
from detrelay.core.errors import DataError
from detrelay.core.evaluation.backends import BACKENDS, BackendName
from detrelay.core.evaluation.federated import (
    Federation,
    evaluate_federated,
    prepared,
    read_federation,
)
from detrelay.core.evaluation.tables import Detections, GroundTruth
from factories_scores import Row, found, random_lvis_case, truth

# what lvis 0.5.3 says of `random_lvis_case`, by detections per image
EXPECTED = {
    300: {
        "AP": 0.2723801170517827, "AP50": 0.4337459201102183, "AP75": 0.3077453309325761,
        "AP_small": 0.375044790193305, "AP_medium": 0.22058305830583055,
        "AP_large": 0.27173267326732675, "AP_rare": 0.18236661166116613,
        "AP_common": 0.3220224822255981, "AP_frequent": 0.31275125726858394,
        "AR_300": 0.4313912938912939, "AR_small": 0.41400000000000003,
        "AR_medium": 0.36666666666666664, "AR_large": 0.4666666666666667,
    },
    20: {
        "AP": 0.24482486152623015, "AP50": 0.3960171472329306, "AP75": 0.26979153555303814,
        "AP_small": 0.375044790193305, "AP_medium": 0.1911276127612761,
        "AP_large": 0.26752475247524754, "AP_rare": 0.18236661166116613,
        "AP_common": 0.23935671564894045, "AP_frequent": 0.31275125726858394,
        "AR_20": 0.39805796055796056, "AR_small": 0.41400000000000003,
        "AR_medium": 0.30833333333333335, "AR_large": 0.4583333333333333,
    },
}  # fmt: skip
BOX, AWAY = [10.0, 10.0, 50.0, 50.0], [300.0, 300.0, 50.0, 50.0]


def figures(
    case: dict[str, Any], rows: list[Row], limit: int, backend: BackendName = "pycocotools"
) -> dict[str, float]:
    objects = GroundTruth.from_coco(case)
    claims = objects.place(Detections.from_rows(rows))
    federation = Federation(
        absent={image["id"]: image["neg_category_ids"] for image in case["images"]},
        not_exhaustive={
            image["id"]: image["not_exhaustive_category_ids"] for image in case["images"]
        },
        frequency={entry["id"]: entry.get("frequency", "") for entry in case["categories"]},
    )
    counted = prepared(objects, claims, federation, limit)
    return evaluate_federated(*counted, federation, max_detections=limit, backend=backend)[0].stats


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("limit", [300, 20])
def test_figures_are_those_of_lvis(limit: int, backend: BackendName) -> None:
    assert figures(*random_lvis_case(), limit, backend) == pytest.approx(EXPECTED[limit], abs=1e-12)


def case_with(absent: list[int], not_exhaustive: list[int]) -> dict[str, Any]:
    """One image with a cat (4); its record about dogs (9) is given."""
    case = truth([{"bbox": BOX}, {"bbox": BOX, "category_id": 9, "image_id": 2}], num_images=2)
    for image in case["images"]:
        image |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    case["images"][0] |= {
        "neg_category_ids": absent,
        "not_exhaustive_category_ids": not_exhaustive,
    }
    return case


# the dog of image 2 is found with a score of 0.5, and a false dog in image 1 with 0.9
DOGS = [found(0.9, BOX), found(0.5, BOX, 9, image=2), found(0.9, AWAY, 9)]


@pytest.mark.parametrize(
    ("absent", "not_exhaustive", "expected"),
    [
        ([], [], 1.0),  # nobody looked for dogs in image 1
        ([9], [], 0.75),  # they were looked for: one right of two, and the cat
        ([9], [9], 1.0),  # not all of them are annotated
    ],
)
def test_a_category_counts_where_it_was_looked_for(
    absent: list[int], not_exhaustive: list[int], expected: float
) -> None:
    assert figures(case_with(absent, not_exhaustive), DOGS, 300)["AP"] == pytest.approx(expected)


def test_the_limit_counts_all_categories_of_an_image() -> None:
    # of image 1 only the cat's 0.9 is left, which stands first
    assert figures(case_with([9], []), DOGS, 1)["AP"] == pytest.approx(1.0)


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_files_say_whether_they_are_federated(tmp_path: Path) -> None:
    case, _ = random_lvis_case()
    federation = read_federation(write(tmp_path / "lvis.json", case))
    assert federation is not None
    assert federation.absent[1] == case["images"][0]["neg_category_ids"]
    assert federation.frequency == {1: "c", 2: "f", 3: "r", 4: "c", 5: "f", 6: "r"}
    assert read_federation(write(tmp_path / "coco.json", truth([{"bbox": BOX}]))) is None
    strange = truth([{"bbox": [0, 0, float("nan"), 1]}])  # json's readers take it, LVIS or not
    assert read_federation(write(tmp_path / "nan.json", strange)) is None


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        ("images", {"neg_category_ids": None}, "1 of 8 images lack"),
        ("images", {"neg_category_ids": "all"}, "neg_category_ids"),
        ("categories", {"frequency": "often"}, "frequency"),
    ],
)
def test_half_federated_files_are_refused(
    tmp_path: Path, place: str, change: dict[str, Any], message: str
) -> None:
    case, _ = random_lvis_case()
    case[place][0] |= change
    with pytest.raises(DataError, match=message):
        read_federation(write(tmp_path / "lvis.json", case))


def test_evaluate_prints_them_where_the_data_ask_for_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, rows = random_lvis_case()
    data, claims = write(tmp_path / "lvis.json", case), write(tmp_path / "found.json", rows)
    output = tmp_path / "figures.json"
    arguments = evaluate.Arguments(
        data=data, predictions=claims, output=output, details=tmp_path / "details"
    )
    assert evaluate.evaluate(arguments) == 0
    stats = json.loads(output.read_text())["stats"]
    assert stats == pytest.approx(EXPECTED[300], abs=1e-6)
    text = capsys.readouterr().out
    assert "figures as LVIS defines them" in text
    assert ["AP_rare", "18.2", "maxDets", "300"] in [line.split() for line in text.splitlines()]
    assert (tmp_path / "details" / "errors.png").is_file()
    with pytest.raises(ValueError, match="leave out --class-agnostic"):
        evaluate.evaluate(evaluate.Arguments(data=data, predictions=claims, class_agnostic=True))
