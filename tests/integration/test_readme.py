"""What the README shows works as written, only smaller."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import tyro
from safetensors.torch import load_file
from transformers import AutoModelForObjectDetection

from detrelay.apps import train
from detrelay.core.data.places import open_place
from detrelay.core.data.writing import write_data
from detrelay.core.recipes.recipe import load_recipe
from factories_data import noise_image, write_shapes
from hub_model import only_hub
from hub_server import USER, running_hub
from official import write_small_checkpoint
from tiny_run import TINY, TinyBlocks, shrink_backbone, skip_pictures, tiny_run

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
INSTALL = "pip install uv && "
COMMAND = re.compile(r"uv run (?:accelerate launch|python) apps/(\w+)\.py ?(.*)")
TESTS = 'uv run pytest -m "not slow"'
BEST = "runs/stageinteractor-cross_stage/best"

DEFORMABLE = (
    *("model.d_model=32", "model.num_attention_heads=2", "model.num_queries=8"),
    *("model.encoder_layers=1", "model.decoder_layers=2", "model.ffn_dim=32"),
    "model.denoising_queries=4",
)
# settings that make training small: per head, and for all
SIZES = {
    "stageinteractor": tuple(entry for entry in TINY if entry.startswith("model.")),
    "dino": DEFORMABLE,
    "my_head:MyHeadConfig": (),  # small as it is
}
SCHEDULE = (
    *(entry for entry in TINY if not entry.startswith("model.")),
    *("train.epochs=1", "train.backbone_weights=none"),
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def python_file(name: str) -> str:
    (found,) = [block for block in blocks("python") if block.startswith(f"# {name}\n")]
    return found


def shell_lines() -> list[str]:
    """Every line of the README for a shell, without its comment and without the installation."""
    lines = (line.partition(" #")[0].strip() for line in "\n".join(blocks("bash")).splitlines())
    return [line.removeprefix(INSTALL) for line in lines if line]


@dataclass(frozen=True)
class Result:
    """What a command left in the working directory, and what it printed."""

    options: list[str]
    printed: str


def shrunk(app: str, options: list[str]) -> list[str]:
    """The options of a command, and those that make it small."""
    if app != "train" or "--dry-run" in options:
        return options
    arguments = tyro.cli(train.Arguments, args=options)
    head = train.resolve(arguments).head
    assert arguments.init or head in SIZES, f"nothing says yet how to make {head} small"
    # a saved model is small already
    smaller = [*(() if arguments.init else SIZES[head]), *SCHEDULE]
    if arguments.init:  # in such a thin model a norm needs more than one cell of the coarsest level
        smaller += ["data.eval_short_side=96", "data.eval_max_size=128"]
    if arguments.resume:
        smaller.append("train.epochs=2")
    own = {entry.partition("=")[0] for group in arguments.set for entry in group}
    assert own.isdisjoint(entry.partition("=")[0] for entry in smaller)
    return [*options, "--set", *smaller]


def run(line: str, capsys: pytest.CaptureFixture[str]) -> Result:
    """Run a command as the shell would, in this process and small."""
    app, options = COMMAND.fullmatch(line).groups()  # type: ignore[union-attr]
    own = shlex.split(options.replace("USER/", f"{USER}/"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{app}.py", *shrunk(app, own)])
        patch.setattr("os.sched_getaffinity", lambda _: {0}, raising=False)
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "apps" / f"{app}.py"), run_name="__main__")
    captured = capsys.readouterr()
    looked = app == "check_data" and stop.value.code == 3  # drawn shapes have boxes on boxes
    assert stop.value.code == 0 or looked, captured.err
    return Result(own, captured.out)


def check_training(result: Result) -> None:
    arguments = tyro.cli(train.Arguments, args=result.options)
    if arguments.dry_run:
        assert not Path("runs").exists()
        for word in ("learning rate", "steps: ", "GiB"):
            assert word in result.printed
        return
    (output,) = Path("runs").iterdir()
    record = json.loads((output / "training.json").read_text())
    head = record["recipe"]["head"]
    assert output.name.endswith(f"{head.replace(':', '.')}-{record['assigner']}")
    assert arguments.head in (None, head)
    assert arguments.assigner in (None, record["assigner"])
    for entry in [entry for group in arguments.set for entry in group]:
        key, _, value = entry.partition("=")
        part, _, name = key.partition(".")
        assert str(record["recipe"][part][name]) == value
    if arguments.data:
        place = arguments.data[0]
        place = place / "train.json" if (place / "train.json").is_file() else place
        assert record["recipe"]["data"]["train_annotations"] == str(place)
        assert f"read from {place}: {FORMATS[str(arguments.data[0])]}, " in result.printed
    assert json.loads((output / "results.json").read_text())["epoch"] == 1 + arguments.resume
    for name in ("metrics.jsonl", "curves.png", "pictures", "checkpoints", "best"):
        assert (output / name).exists()
    model = AutoModelForObjectDetection.from_pretrained(output / "last").eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64)).pred_boxes.shape[-1] == 4


def check_prediction(result: Result) -> None:
    folder = Path(result.options[result.options.index("--output") + 1])
    assert json.loads((folder / "predictions.json").read_text()) is not None
    assert {path.name for path in folder.glob("*.png")} == {"one.png.png", "two.jpg.png"}


def check_evaluation(result: Result) -> None:
    shown = re.search(r"^AP +(\d+\.\d)  maxDets 100$", result.printed, re.MULTILINE)
    assert shown is not None
    assert (float(shown[1]) == 100) == ("--predictions" in result.options)


def check_publication(result: Result) -> None:
    assert f"{USER}/MODEL (private), tag v1" in result.printed


def check_conversion(result: Result) -> None:
    assert "used     " in result.printed
    model = AutoModelForObjectDetection.from_pretrained("my_model")
    assert model.config.model_type == "detrelay_deformable_detr"


def check_checking(result: Result) -> None:
    assert "my_voc: Pascal VOC, 11 images (train 8, val 3), " in result.printed
    output = Path(result.options[result.options.index("--output") + 1])
    if "--write" in result.options:
        assert (output / "data.yaml").is_file()
        assert len(list((output / "labels" / "train").glob("*.txt"))) == 8
    else:
        assert "verdict: " in result.printed
        assert (output / "contact_sheet_train.png").is_file()


FORMATS = {"my_data": "COCO", "my_voc": "Pascal VOC", "my_yolo/data.yaml": "YOLO"}
# a command of an app that is not listed here fails
CHECKS: dict[str, Callable[[Result], None]] = {
    "train": check_training,
    "predict": check_prediction,
    "evaluate": check_evaluation,
    "publish": check_publication,
    "convert": check_conversion,
    "check_data": check_checking,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the README mentions."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        shrink_backbone(patch, TinyBlocks)
        skip_pictures(patch)
        assert tiny_run((folder / BEST).parent, "train.epochs=1") == 0
        write_small_checkpoint(folder / "checkpoint.pth")
    write_shapes(folder / "my_data")
    for name in ("voc", "yolo"):
        write_data(open_place(str(folder / "my_data")).splits, name, folder / f"my_{name}")
    shutil.copytree(folder / "my_data" / "images", folder / "images")
    shutil.copy(folder / "my_data" / "val.json", folder)
    truth = json.loads((folder / "val.json").read_text())
    rows = [{**row, "score": 0.9} for row in truth["annotations"]]
    (folder / "detections.json").write_text(json.dumps(rows))
    (folder / "photos").mkdir()
    for name in ("photos/one.png", "photos/two.jpg", "image.jpg"):
        noise_image(70, 50).save(folder / name)
    coco = folder / "data" / "coco"
    (coco / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        shutil.copytree(folder / "images", coco / f"{split}2017")
        annotations = coco / "annotations" / f"instances_{split}2017.json"
        shutil.copy(folder / "my_data" / f"{split}.json", annotations)
    (folder / "my_head.py").write_text(python_file("my_head.py"))
    return folder


@pytest.fixture(autouse=True)
def here(world: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A copy of these files as the working directory."""
    shrink_backbone(monkeypatch, TinyBlocks)
    copy = shutil.copytree(world, tmp_path / "here")
    monkeypatch.chdir(copy)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield copy
    sys.modules.pop("my_head", None)


def test_every_line_for_a_shell_is_known() -> None:
    lines = shell_lines()
    assert len(lines) > 12
    assert [line for line in lines if not COMMAND.fullmatch(line)] == [TESTS]
    assert '"slow: ' in (ROOT / "pyproject.toml").read_text()


_, _, after = README.read_text().partition("## Fine-tune on your own images\n\n```bash\n")
FINE_TUNING = after.partition("```")[0].splitlines()


def test_fine_tuning_from_a_released_checkpoint_to_predictions(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert, learn, predict = FINE_TUNING
    check_conversion(run(convert, capsys))
    result = run(learn, capsys)
    assert "start from my_model: " in result.printed
    assert "class scores new:  circle, triangle, ring, cross" in result.printed
    record = json.loads(Path("runs/mine/training.json").read_text())
    assert (record["init"], record["recipe"]["head"]) == ("my_model", "deformable_detr")
    assert record["recipe"]["data"]["pad_size_divisor"] == 1
    assert record["recipe"]["train"]["lr_multipliers"]["backbone"] == 0.1
    old, new = (load_file(f"{name}/model.safetensors") for name in ("my_model", "runs/mine/best"))
    assert old.keys() == new.keys()
    assert torch.equal(old["backbone.conv1.weight"], new["backbone.conv1.weight"])  # frozen
    moved = (old["head.queries.weight"] - new["head.queries.weight"]).abs().max()
    assert 0 < moved < 0.01
    check_prediction(run(predict, capsys))


@pytest.mark.parametrize(
    "line",
    [line for line in shell_lines() if "apps/" in line and line not in FINE_TUNING],
    ids=lambda line: line.partition("apps/")[2],
)
def test_commands_do_what_they_say(
    line: str, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    match = COMMAND.fullmatch(line)
    assert match, "a command of no known form"
    app = match[1]
    assert app in CHECKS, f"nothing says yet what apps/{app}.py must do"
    if app == "train" and "--resume" not in line:
        shutil.rmtree("runs")
    with running_hub() as server, only_hub(server, tmp_path / "home"):
        CHECKS[app](run(line, capsys))
        if app == "publish":
            assert server.repositories[f"{USER}/MODEL"].private
            assert b"stageinteractor" in server.files(f"{USER}/MODEL", "v1")["README.md"]


ROWS = re.findall(r"^\| [-yes]+ \| [-yes]+ \| ([\d.]+) \| `(.+)` \|$", README.read_text(), re.M)


@pytest.mark.parametrize(("ap", "options"), ROWS)
def test_rows_of_published_figures_are_recipes(ap: str, options: str) -> None:
    (recipe,) = [
        load_recipe(file)
        for file in train.RECIPES.glob("stageinteractor_r50_1x*.toml")
        if f"AP {ap}," in file.read_text()
    ]
    base = "" if "--recipe" in options else "--recipe stageinteractor_r50_1x "
    arguments = tyro.cli(train.Arguments, args=shlex.split(base + options))
    assert train.resolve(arguments) == recipe


def test_there_is_a_row_for_each_ablation() -> None:
    assert len(ROWS) == 4


def test_own_assigner_and_class_loss_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_pictures(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("late_boxes", "smooth_labels"):
        (tmp_path / f"{name}.py").write_text(python_file(f"{name}.py"), encoding="utf-8")
    settings = ["loss.class_loss=smooth_labels:SmoothClassLoss", "assigner.options.stage=1"]
    settings.append("loss.class_options.smoothing=0.2")
    own = "late_boxes:LateBoxesAssigner"
    assert tiny_run(tmp_path / "run", *settings, assigner=own) == 0


def test_snippet_finds_boxes(capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = [block for block in blocks("python") if "pipeline(" in block]
    assert "threshold=0.5" in snippet
    exec(snippet.replace("threshold=0.5", "threshold=0.0"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 3
    assert re.fullmatch(r"(circle|triangle|ring|cross) 0\.\d+ \{'xmin': .*\}", lines[0])


def test_every_snippet_is_run() -> None:
    names = ("# my_head.py", "# late_boxes.py", "# smooth_labels.py", "import detrelay.heads")
    assert len(blocks("python")) == len(names)
    for name in names:
        assert sum(block.startswith(name) for block in blocks("python")) == 1
    assert any("--head my_head:" in line for line in shell_lines())
