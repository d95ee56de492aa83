"""What is rejected before asking the Hub; the rest is tested against a local Hub."""

from __future__ import annotations

import pytest

from detrelay.core.hub import publish
from detrelay.core.hub.calls import HubError
from detrelay.core.hub.publish import check_destination, check_names


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a/b/c", None, None), "'a/b/c': expected a name on the Hub, USER/MODEL"),
        (("a/b", "v 1", None), "tag 'v 1': expected letters, digits"),
        (("a/b", "main", None), "tag 'main': would hide the branch"),
        (("a/b", "0123abc", None), "tag '0123abc': would hide the branch or the commit"),
        (("a/b", "v1", "Apache 2"), "licence 'Apache 2': expected its identifier"),
    ],
)
def test_names_that_no_hub_takes(names: tuple[str, str | None, str | None], message: str) -> None:
    check_names("user/my-model_2.0", "v1.0+x", "apache-2.0")
    with pytest.raises(HubError, match=message):
        check_names(*names)


def test_without_a_network_or_a_token_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "get_token", lambda: None)
    monkeypatch.setattr(publish, "is_offline_mode", lambda: False)
    with pytest.raises(HubError, match="a/b: no token to publish with; log in by"):
        check_destination("a/b")
    monkeypatch.setattr(publish, "is_offline_mode", lambda: True)
    with pytest.raises(HubError, match="a/b: cannot be published while HF_HUB_OFFLINE is set"):
        check_destination("a/b", token="t")
