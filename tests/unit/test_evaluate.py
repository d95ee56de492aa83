"""`detrelay evaluate` on files: every option that scores, without a model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from detrelay.apps.evaluate import Arguments, evaluate
from detrelay.core.evaluation import backends
from factories_scores import found, truth

CAT, DOG = [0.0, 0.0, 20.0, 20.0], [100.0, 100.0, 50.0, 50.0]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A dog is taken for a cat; of two cats one is found."""
    objects = [{"bbox": CAT}, {"bbox": [300, 0, 40, 40]}, {"bbox": DOG, "category_id": 9}]
    (tmp_path / "truth.json").write_text(json.dumps(truth(objects)))
    rows = [found(0.9, DOG), found(0.8, CAT)]
    (tmp_path / "found.json").write_text(json.dumps(rows))
    return {"data": tmp_path / "truth.json", "predictions": tmp_path / "found.json"}


def figures(files: dict[str, Path], tmp_path: Path, **options: Any) -> dict[str, Any]:
    output = tmp_path / "figures.json"
    assert evaluate(Arguments(**files, output=output, **options)) == 0
    content: dict[str, Any] = json.loads(output.read_text())
    return content


def test_class_agnostic_asks_only_whether_objects_are_found(
    files: dict[str, Path], tmp_path: Path
) -> None:
    plain = figures(files, tmp_path)
    assert plain["stats"]["AP50"] == pytest.approx((51 * 0.5) / 101 / 2, abs=1e-6)
    assert set(plain["AP_per_category"]) == {"cat", "dog"}
    agnostic = figures(files, tmp_path, class_agnostic=True)
    assert agnostic["stats"]["AP50"] == pytest.approx(67 / 101, abs=1e-6)
    assert set(agnostic["AP_per_category"]) == {"object"}


def test_the_named_back_end_computes(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    for name, compute in backends.BACKENDS.items():

        def spy(*arguments: Any, name: str = name, compute: Any = compute) -> Any:
            called.append(name)
            return compute(*arguments)

        monkeypatch.setitem(backends.BACKENDS, name, spy)
    first = figures(files, tmp_path)
    second = figures(files, tmp_path, backend="hotcoco")
    assert called == ["pycocotools", "hotcoco"]
    assert first == second


def test_every_figure_names_its_max_dets(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = figures(files, tmp_path, max_detections=300)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for name, limit in content["maxDets"].items():
        assert any(row[:1] == [name] and row[-2:] == ["maxDets", str(limit)] for row in lines)
    assert (content["maxDets"]["AP"], content["maxDets"]["AP50"]) == (100, 300)
    assert (content["maxDets"]["AR_10"], content["maxDets"]["AR_300"]) == (10, 300)


def test_details_go_into_a_folder(files: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "details"
    figures(files, tmp_path, details=folder, backend="hotcoco")
    assert sorted(path.name for path in folder.iterdir()) == [
        "analysis.json", "calibration.png", "confusion.png", "errors.png", "figures.json",
        "precision_recall.png", "table.txt",
    ]  # fmt: skip
    content = json.loads((folder / "analysis.json").read_text())
    assert content["confusion"]["counts"] == [[1, 0, 1], [1, 0, 0], [0, 0, 0]]
    assert content["errors"]["counts"]["classification"] == 1


def test_one_of_several_processes_scores(
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert evaluate(Arguments(**files, output=tmp_path / "figures.json")) == 0
    assert not (tmp_path / "figures.json").exists()
    assert capsys.readouterr().out == ""


def test_files_are_scored_without_torch(tmp_path: Path) -> None:
    truth = {
        "images": [{"id": 3}],
        "annotations": [{"id": 1, "image_id": 3, "category_id": 2, "bbox": [0, 0, 9, 9]}],
        "categories": [{"id": 2, "name": "cell"}],
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "found.json").write_text(json.dumps([truth["annotations"][0] | {"score": 1}]))
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print(*{name.partition('.')[0] for name in sys.modules}))\n"
        "sys.argv = ['evaluate', '--data', 'truth.json', '--predictions', 'found.json']\n"
        "from detrelay.apps.evaluate import main\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "100.0  maxDets 100" in done.stdout
    assert not {"torch", "transformers", "accelerate"} & set(done.stdout.split())
