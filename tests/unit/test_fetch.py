"""Models from the Hub: which names are valid, and damage that the client does not notice."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from detrelay.core.hub import fetch
from detrelay.core.hub.calls import HubError
from detrelay.core.hub.fetch import fetch_verified, model_folder


def test_folders_go_before_names_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None]] = []

    def verified(api: object, repo_id: str, revision: str | None, **options: object) -> Path:
        asked.append((repo_id, revision))
        return Path("cache")

    monkeypatch.setattr(fetch, "fetch_verified", verified)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "best").mkdir(parents=True)
    for name in ("runs/best", "best", "a/b/c", tmp_path):
        assert model_folder(name) == Path(name)
    assert asked == []
    assert model_folder("user/model") == model_folder("user/model@v1.2") == Path("cache")
    assert asked == [("user/model", None), ("user/model", "v1.2")]


@pytest.mark.parametrize(
    ("mismatches", "missing", "message"),
    [
        (
            [{"path": "x", "algorithm": "sha256", "actual": "a" * 20, "expected": "b" * 20}],
            [],
            r"x was damaged in transit \(sha256 a{12}\.\.\. instead of b{12}\.\.\.\); delete",
        ),
        ([], ["y", "z"], "u/m: y, z did not arrive"),
    ],
)
def test_files_are_compared_with_the_checksums_of_the_hub(
    mismatches: list[dict[str, str]],
    missing: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = SimpleNamespace(mismatches=mismatches, missing_paths=missing)
    api: Any = SimpleNamespace(
        token=None, endpoint="https://hub", verify_repo_checksums=lambda *_, **__: found
    )
    monkeypatch.setattr(fetch, "snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr(fetch, "is_offline_mode", lambda: False)
    with pytest.raises(HubError, match=message):
        fetch_verified(api, "u/m", None)
    found.mismatches, found.missing_paths = [], []
    assert fetch_verified(api, "u/m", None) == tmp_path
