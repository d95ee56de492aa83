"""From a run to the Hub and back, with the real client against a Hub on the loopback."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from transformers import AutoImageProcessor, AutoModelForObjectDetection, pipeline

import detrelay.apps.publish as publish_app
from detrelay.apps.build import load_saved
from detrelay.core.hub.calls import HubError
from detrelay.core.hub.publish import Published, check_destination, publish
from hub_model import IMAGE, NAMES, environment, only_hub, small_model, write_run
from hub_server import (
    ORGANIZATION,
    READ_ONLY_ORGANIZATION,
    READ_TOKEN,
    STRANGER,
    USER,
    WRITE_TOKEN,
    Fault,
    HubServer,
    running_hub,
)
from tiny_run import shrink_backbone, skip_pictures, tiny_run

REPOSITORY = f"{USER}/shapes"
COMMIT, UPLOAD, TAG = rf"POST .*{REPOSITORY}/commit/", "PUT /lfs/", "POST .*/tag/"
DOWNLOAD = "GET .*/resolve/.*safetensors"


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        shrink_backbone(patch)
        return write_run(tmp_path_factory.mktemp("run"), small_model())


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    shrink_backbone(monkeypatch)
    with running_hub() as server, only_hub(server, tmp_path / "home"):
        yield server


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of each requested wait, without waiting."""
    asked: list[float] = []
    monkeypatch.setattr("time.sleep", asked.append)
    return asked


def assert_published(hub: HubServer, best: Path, result: Published) -> None:
    """Everything is there under the tag, exactly once."""
    files = hub.files(result.repo_id, result.tag)
    assert hub.repositories[result.repo_id].head == result.commit
    assert hub.repositories[result.repo_id].resolve(result.tag) == result.commit
    assert files["model.safetensors"] == (best / "model.safetensors").read_bytes()
    assert set(files) == {
        ".gitattributes", "README.md", "config.json", "model.safetensors", "modeling_detrelay.py",
        "predictions.png", "preprocessor_config.json", "training.json",
    }  # fmt: skip


def assert_nothing_published(hub: HubServer) -> None:
    repository = hub.repositories.get(REPOSITORY)
    if repository is not None:
        assert len(repository.commits) == 1
        assert repository.tags == {}
        assert set(hub.files(REPOSITORY)) == {".gitattributes"}


def test_published_whole_in_one_commit_and_loaded_from_there(
    hub: HubServer, best: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in best.iterdir()}
    result = publish(best, "shapes")
    assert result == Published(
        REPOSITORY, f"{hub.url}/{REPOSITORY}", hub.repositories[REPOSITORY].head, "v1", False
    )
    assert_published(hub, best, result)
    assert hub.count("POST .*/commit/") == 1
    assert {path.name: path.read_bytes() for path in best.iterdir()} == before

    model = AutoModelForObjectDetection.from_pretrained(REPOSITORY)
    expected = small_model().state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    assert model.config.category_ids == [7, 3, 90, 11]
    detector = pipeline("object-detection", model=REPOSITORY, revision="v1")
    alone = detector(IMAGE, threshold=0.0)
    assert len(alone) == len(NAMES) * 8
    assert {found["label"] for found in alone} <= set(NAMES)
    detector.image_processor.pad_size = {"height": 96, "width": 96}  # images of several shapes
    batched = detector([IMAGE, IMAGE.rotate(90, expand=True)], threshold=0.0, batch_size=2)
    assert [len(found) for found in batched] == [32, 32]
    assert [found["label"] for found in batched[0]] == [found["label"] for found in alone]
    assert "not supported" not in capsys.readouterr().err
    asked = len(hub.requests)
    offline = {"local_files_only": True, "revision": "v1"}
    AutoModelForObjectDetection.from_pretrained(REPOSITORY, **offline)
    AutoImageProcessor.from_pretrained(REPOSITORY, **offline)
    assert len(hub.requests) == asked
    with pytest.raises(OSError, match="v2 is not a valid git identifier"):
        AutoModelForObjectDetection.from_pretrained(REPOSITORY, revision="v2")


@pytest.mark.slow
def test_publishing_the_same_again_changes_nothing(hub: HubServer, best: Path) -> None:
    first = publish(best, REPOSITORY)
    assert publish(best, REPOSITORY) == first
    assert publish(best, REPOSITORY, tag="v1") == first
    assert hub.count("POST .*/commit/") == 1
    assert hub.count(TAG) == 1


def test_files_of_an_older_model_go_in_the_same_commit(hub: HubServer, best: Path) -> None:
    old = {"model.safetensors.index.json": b"{}", "model-00001-of-00002.safetensors": b"old"}
    hub.add(REPOSITORY, {**old, "training.json": b"{}"})
    result = publish(best, REPOSITORY)
    assert_published(hub, best, result)
    assert len(hub.repositories[REPOSITORY].commits) == 2


@pytest.mark.slow
def test_another_model_gets_the_next_tag(hub: HubServer, best: Path, tmp_path: Path) -> None:
    first = publish(best, REPOSITORY)
    other = write_run(tmp_path / "other", small_model(seed=1))
    with pytest.raises(HubError, match="the tag v1 names other files; choose another tag; nothing"):
        publish(other, REPOSITORY, tag="v1")
    assert hub.repositories[REPOSITORY].head == first.commit
    second = publish(other, REPOSITORY)
    assert second.tag == "v2"
    assert hub.repositories[REPOSITORY].tags == {"v1": first.commit, "v2": second.commit}
    with pytest.raises(HubError, match="has a tag v1 already, of an older commit"):
        publish(best, REPOSITORY, tag="v1")


def test_private_is_private(hub: HubServer, best: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert publish(best, REPOSITORY, private=True).private
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OSError, match="not a valid model identifier"):
        AutoModelForObjectDetection.from_pretrained(REPOSITORY)
    model = AutoModelForObjectDetection.from_pretrained(REPOSITORY, token=READ_TOKEN)
    assert model.config.num_labels == 4


@pytest.mark.parametrize("private", [True, False])
def test_visibility_of_an_existing_repository_is_not_changed_silently(
    private: bool, hub: HubServer, best: Path
) -> None:
    hub.add(REPOSITORY, {}, private=private)
    is_now, wanted = ("private", "public") if private else ("public", "private")
    with pytest.raises(HubError, match=f"exists and is {is_now}, but {wanted} was asked for"):
        publish(best, REPOSITORY, private=not private)
    assert_nothing_published(hub)


def refusal(**options: object) -> str:
    with pytest.raises((HubError, HFValidationError)) as error:
        check_destination(**{"repo_id": REPOSITORY, **options})  # type: ignore[arg-type]
    message = str(error.value)
    assert "\n" not in message
    return message


def test_preflight_refuses_in_one_line(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Repo id must be in the form" in refusal(repo_id="a/b/c")
    assert "tag 'v 1': expected letters" in refusal(tag="v 1")
    assert "tag 'main': would hide the branch" in refusal(tag="main")
    assert "tag 'deadbeef': would hide the branch or the commit" in refusal(tag="deadbeef")
    assert "answered 401 (Unauthorized); log in" in refusal(token="hf_wrong")
    assert "the token 'test' of tess may only read" in refusal(token=READ_TOKEN)
    assert "no right to write under nobody" in refusal(repo_id="nobody/x")
    message = refusal(repo_id=f"{STRANGER}/x")
    assert f"no right to write under {STRANGER}; may write under tess, lab" in message
    message = refusal(repo_id=f"{READ_ONLY_ORGANIZATION}/x")
    assert f"no right to write under {READ_ONLY_ORGANIZATION}; may write under tess, lab" in message
    hub.add(f"{USER}/text", {"tokenizer.json": b"{}", "pytorch_model.bin": b""})
    message = refusal(repo_id=f"{USER}/text")
    assert "the name is taken by something else (2 files, such as pytorch_model.bin" in message
    monkeypatch.delenv("HF_TOKEN")
    assert "no token found" in refusal()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal(token=WRITE_TOKEN)
    assert hub.repositories.keys() == {f"{USER}/text"}


def test_preflight_accepts_and_changes_nothing(hub: HubServer) -> None:
    assert check_destination("shapes").repo_id == REPOSITORY
    assert check_destination(f"{ORGANIZATION}/shapes").head is None
    assert check_destination(REPOSITORY, private=True).private
    assert hub.repositories == {}
    hub.add(REPOSITORY, {"README.md": b"soon"})
    assert "has a branch next, which a tag would hide" in refusal(tag="next")
    assert check_destination(REPOSITORY).head == hub.repositories[REPOSITORY].head


def test_no_network_is_reported_at_once(tmp_path: Path, waits: list[float]) -> None:
    with running_hub() as server:
        pass
    with only_hub(server, tmp_path):
        assert f"{server.url} cannot be reached (ConnectError" in refusal()
    assert waits == []


def test_write_access_is_asked_for(hub: HubServer) -> None:
    hub.add(REPOSITORY, {})
    hub.faults = [Fault("/auth-check/write", "status", status=403)]
    assert f"{REPOSITORY}: cannot be written to: {hub.url} answered 403" in refusal()


# the others of a kind run the same code as these
QUICK = [
    Fault(UPLOAD, "drop", times=2),
    Fault(COMMIT, "lose"),
    Fault(TAG, "lose"),
]
MORE = [
    Fault(DOWNLOAD, "drop"),
    Fault("POST .*/validate-yaml", "status", status=502),
    Fault(COMMIT, "status", status=503),
    Fault(UPLOAD, "lose"),
    Fault(UPLOAD, "status", times=2, status=503),
    Fault(COMMIT, "drop"),
    Fault("POST .*/repos/create", "lose"),
    Fault("POST .*/validate-yaml", "drop"),
    Fault("POST .*/preupload", "status", status=500),
    Fault("GET .*/whoami", "status", status=502),
    Fault("GET .*/tree/", "drop", times=2),
    Fault(TAG, "status", status=504),
]


def slow(*cases: Any) -> list[Any]:
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in cases
    ]


@pytest.mark.parametrize("fault", [*QUICK, *slow(*MORE)])
def test_faults_that_pass_are_overcome(
    fault: Fault, hub: HubServer, best: Path, waits: list[float]
) -> None:
    fault = dataclasses.replace(fault)
    hub.faults = [fault]
    result = publish(best, REPOSITORY)
    assert fault.times == 0
    assert_published(hub, best, result)
    assert len(hub.repositories[REPOSITORY].commits) == 2
    assert hub.repositories[REPOSITORY].tags == {"v1": result.commit}


@pytest.mark.parametrize(
    ("pattern", "status"),
    [
        (COMMIT, 429),
        (UPLOAD, 503),
        *slow((COMMIT, 503), (UPLOAD, 429), ("GET .*/refs", 429), (TAG, 503)),
    ],
)
def test_retry_after_is_waited_for(
    pattern: str, status: int, hub: HubServer, best: Path, waits: list[float]
) -> None:
    hub.faults = [Fault(pattern, "status", status=status, retry_after=41)]
    assert_published(hub, best, publish(best, REPOSITORY))
    assert [seconds for seconds in waits if seconds >= 1] in ([41], [42])  # the client adds one


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(UPLOAD, "drop", times=99), "not published; the repository has its old content"),
        *slow(
            (Fault(COMMIT, "status", times=99, status=503), r"not published; .* answered 503"),
            (Fault(COMMIT, "drop", times=99), "not published; .* cannot be reached"),
            (Fault(COMMIT, "status", status=403), "not published; .* answered 403"),
            (Fault("POST .*/create", "status", status=403), "nothing was published: .* 403"),
            (Fault("GET .*/whoami", "status", times=99), "answered 503"),
            (Fault(COMMIT, "status", retry_after=9999), "come back in 9999 seconds; try again"),
        ),
    ],
)
def test_faults_that_stay_leave_nothing_behind(
    fault: Fault, message: str, hub: HubServer, best: Path, waits: list[float]
) -> None:
    hub.faults = [dataclasses.replace(fault)]
    with pytest.raises(HubError, match=message) as error:
        publish(best, REPOSITORY)
    assert "\n" not in str(error.value)
    assert_nothing_published(hub)
    hub.faults = []
    assert_published(hub, best, publish(best, REPOSITORY))


@pytest.mark.parametrize("answer", ["lose", "whole"])
def test_a_concurrent_push_is_not_overwritten(
    answer: str, hub: HubServer, best: Path, waits: list[float]
) -> None:
    def push() -> None:
        hub.before_commit = None
        hub.repositories[REPOSITORY].commit({"notes.txt": b"theirs"})

    hub.before_commit = push
    hub.faults = [Fault(COMMIT, "lose")] if answer == "lose" else []
    with pytest.raises(HubError, match="somebody else has pushed to it in the meantime"):
        publish(best, REPOSITORY)
    assert set(hub.files(REPOSITORY)) == {"notes.txt"}
    assert hub.repositories[REPOSITORY].tags == {}


@pytest.mark.slow
def test_a_tag_that_cannot_be_made_is_made_by_the_next_try(
    hub: HubServer, best: Path, waits: list[float]
) -> None:
    hub.faults = [Fault(TAG, "status", times=99)]
    with pytest.raises(HubError, match=r"commit \w+ is published, but its tag cannot be made"):
        publish(best, REPOSITORY)
    hub.faults = []
    assert_published(hub, best, publish(best, REPOSITORY))
    assert hub.count(COMMIT) == 1


def test_a_damaged_upload_is_found(hub: HubServer, best: Path) -> None:
    def damage() -> None:
        for oid, blob in hub.blobs.items():
            hub.blobs[oid] = blob[:-1] + bytes([blob[-1] ^ 1])

    hub.before_commit = damage
    with pytest.raises(HubError, match=r"does not hold the files that were sent: model.safet.*use"):
        publish(best, REPOSITORY)
    assert hub.repositories[REPOSITORY].tags == {}


def test_a_damaged_download_is_found_and_named(hub: HubServer, best: Path) -> None:
    hub.faults = [Fault(DOWNLOAD, "flip")]
    with pytest.raises(HubError, match=r"model.safetensors was damaged in transit \(sha256 \w{12}"):
        publish(best, REPOSITORY)
    # what is on the Hub is right, and the same command confirms it
    assert_published(hub, best, publish(best, REPOSITORY))


def test_a_faulty_card_is_refused_before_anything_goes_up(
    hub: HubServer, best: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(best, folder)
    (folder / "README.md").write_text("---\nlicense: unheard-of\n---\nmine\n")
    with pytest.raises(HubError, match=r'not published.*"license" must be one of the known ones'):
        publish(folder, REPOSITORY)
    assert hub.repositories == {}  # not even an empty one
    with pytest.raises(HubError, match=r'not published.*"license" must be one of the known ones'):
        publish(best, REPOSITORY, license="unheard-of")
    assert hub.repositories == {}
    (folder / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    publish(folder, REPOSITORY)
    assert hub.files(REPOSITORY)["README.md"].endswith(b"mine\n")


def test_facts_are_uploaded_as_they_are(hub: HubServer, best: Path) -> None:
    publish(best, REPOSITORY)
    facts = json.loads(hub.files(REPOSITORY)["training.json"])
    assert facts == json.loads((best / "training.json").read_text())
    with pytest.raises(RepositoryNotFoundError):
        check_destination(REPOSITORY).api.model_info(f"{USER}/other")


def test_training_publishes_its_best_model(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_pictures(monkeypatch)
    output = tmp_path / "run"
    with pytest.raises(HubError, match=f"no right to write under {STRANGER}"):
        tiny_run(output, push_to=f"{STRANGER}/shapes")
    with pytest.raises(ValueError, match="--push-private says how to publish, but no --push-to"):
        tiny_run(output, push_private=True)
    assert not output.exists()
    assert tiny_run(output, "train.epochs=1", push_to=REPOSITORY, push_private=True) == 0
    assert hub.repositories[REPOSITORY].private
    assert (
        hub.files(REPOSITORY, "v1")["model.safetensors"]
        == (output / "best" / "model.safetensors").read_bytes()
    )
    monkeypatch.setattr(hub, "faults", [Fault(COMMIT, "status", status=403)])
    again = tmp_path / "again"
    with pytest.raises(ValueError, match=r"publish it with: detrelay publish \S*best .* --private"):
        tiny_run(again, "train.epochs=1", "train.seed=1", push_to=REPOSITORY, push_private=True)
    assert (again / "best" / "model.safetensors").is_file()


def test_commands_take_models_from_the_hub(
    hub: HubServer, best: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(best, REPOSITORY)
    hub.repositories[REPOSITORY].commit({})
    model, processor = load_saved(Path(f"{REPOSITORY}@v1"))
    assert model.config.id2label == dict(enumerate(NAMES))
    assert processor.size["shortest_edge"] == 64
    with pytest.raises(HubError, match=f"no folder {USER}/none; as a model on the Hub: .* 404"):
        load_saved(Path(f"{USER}/none"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    load_saved(Path(f"{REPOSITORY}@v1"))
    with pytest.raises(HubError, match=r"no folder tess/none; .*HF_HUB_OFFLINE"):
        load_saved(Path(f"{USER}/none"))


def test_damage_in_the_cache_is_found_by_the_commands(hub: HubServer, best: Path) -> None:
    publish(best, REPOSITORY)
    hub.faults = [Fault(DOWNLOAD, "flip")]
    with pytest.raises(HubError, match=r"model.safetensors was damaged .*; delete (\S+) and"):
        load_saved(Path(REPOSITORY))


def test_the_command_says_where_the_model_is(
    hub: HubServer, best: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = tyro.cli(publish_app.Arguments, args=[str(best), "shapes", "--private", "--tag=a"])
    assert publish_app.publish(arguments) == 0
    commit = hub.repositories[REPOSITORY].head
    line = f"published: {hub.url}/{REPOSITORY} (private), tag a, commit {commit}"
    assert capsys.readouterr().out.splitlines()[-1] == line


LOAD = """
import sys
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForObjectDetection, pipeline
repository, trust = sys.argv[1], {"trust_remote_code": True}
assert not any(name.startswith("detrelay") for name in sys.modules)
"""
REMOTE = f"""{LOAD}
detector = pipeline("object-detection", model=repository, revision="v1", **trust)
assert type(detector.model).__module__ == "detrelay.heads.stageinteractor.head"
print(type(detector.image_processor).__name__)
print(len(detector(Image.new("RGB", (96, 64)), threshold=0.0)))
model = AutoModelForObjectDetection.from_pretrained(repository)
model.save_pretrained(sys.argv[2])
"""
WITHOUT_PACKAGE = f"""{LOAD}
sys.modules["detrelay.heads"] = None
for options in ({{}}, trust):
    try:
        AutoModelForObjectDetection.from_pretrained(repository, **options)
    except (ImportError, ValueError) as error:
        print("\\n" + type(error).__name__, " ".join(str(error).split()))
"""


def in_fresh_process(code: str, server: HubServer, home: Path, *arguments: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", code, REPOSITORY, *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=environment(server, home),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_fresh_processes_load_it_without_importing_the_package(tmp_path: Path) -> None:
    with running_hub() as server, only_hub(server, tmp_path / "home"):
        publish(write_run(tmp_path / "run", small_model()), REPOSITORY, private=True)
        printed = in_fresh_process(REMOTE, server, tmp_path / "one", str(tmp_path / "saved"))
        assert printed == ["DetrelayImageProcessor", "32"]
        # saved again, the code stays in the package
        assert not list((tmp_path / "saved").glob("*.py"))
        refusals = "\n".join(in_fresh_process(WITHOUT_PACKAGE, server, tmp_path / "two"))
        assert re.search("^ValueError .*trust_remote_code=True", refusals, re.MULTILINE)
        needs = "^ImportError this model needs the Python package detrelay .*pip install detrelay"
        assert re.search(needs, refusals, re.MULTILINE)
