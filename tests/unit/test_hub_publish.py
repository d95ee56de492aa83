"""What is rejected before asking the Hub; the rest is tested against a local Hub."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from detrelay.core.hub.calls import HubError
from detrelay.core.hub.publish import check_destination, check_names


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a/b/c", None, None), "Repo id must be in the form .*'a/b/c'"),
        (("a/b", "v 1", None), "tag 'v 1': expected letters, digits"),
        (("a/b", "main", None), "tag 'main': would hide the branch"),
        (("a/b", "0123abc", None), "tag '0123abc': would hide the branch or the commit"),
        (("a/b", "v1", "Apache 2"), "licence 'Apache 2': expected its identifier"),
    ],
)
def test_names_that_no_hub_takes(names: tuple[str, str | None, str | None], message: str) -> None:
    check_names("user/my-model_2.0", "v1.0+x", "apache-2.0")
    with pytest.raises(ValueError, match=message):
        check_names(*names)


def test_without_a_network_or_a_token_nothing_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(
        HubError, match=r"a/b: cannot be published: .*no token found.*hf auth login"
    ):
        check_destination("a/b")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"a/b: cannot be published: .*HF_HUB_OFFLINE"):
        check_destination("a/b", token="t")
