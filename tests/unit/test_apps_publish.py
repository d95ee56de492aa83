"""The command: what a dry run prints and rejects."""

from __future__ import annotations

from pathlib import Path

import pytest

import detrelay.apps.publish as publish_app


def test_rehearsal_prints_and_asks_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_session", None)
    arguments = publish_app.Arguments(folder, "tess/shapes", license="mit", dry_run=True)
    assert publish_app.publish(arguments) == 0
    printed = capsys.readouterr().out
    assert " model.safetensors\n" in printed
    assert "license: mit\n" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repo_id": "a/b/c"}, "Repo id must be in the form"),
        ({"tag": "main"}, "tag 'main': would hide the branch"),
        ({"license": "MIT or so"}, "licence 'MIT or so': expected its identifier on the Hub"),
        ({"license": "x\ny: ["}, r"licence 'x\\ny: \['"),
    ],
)
def test_rehearsal_refuses_names_too(options: dict[str, str], message: str, folder: Path) -> None:
    arguments = {"folder": folder, "repo_id": "tess/shapes", "dry_run": True, **options}
    with pytest.raises(ValueError, match=message):
        publish_app.publish(publish_app.Arguments(**arguments))  # type: ignore[arg-type]
