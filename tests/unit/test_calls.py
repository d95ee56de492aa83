"""Calls to the Hub: which errors are transient, how long to wait, and how they are reported."""

from __future__ import annotations

import json
from typing import Any

import pytest
from huggingface_hub import HfApi, get_session
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # exported lazily

from detrelay.core.hub import calls
from detrelay.core.hub.calls import HubError, ask

API = HfApi(endpoint="https://hub")


def answer(code: int, **headers: str) -> HfHubHTTPError:
    request = httpx.Request("GET", "https://hub/x")
    response = httpx.Response(code, headers=headers, request=request)
    return HfHubHTTPError(f"{code}", response=response)


def behind(error: Exception) -> RuntimeError:
    wrapper = RuntimeError("the upload failed")
    wrapper.__cause__ = error
    return wrapper


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr(calls.time, "sleep", waited.append)
    return waited


def failing(*errors: Exception) -> Any:
    left = list(errors)

    def call() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return call


@pytest.mark.parametrize(
    "error",
    [
        answer(503),
        behind(answer(429)),
        behind(behind(answer(500))),
        httpx.ReadTimeout("slow"),
        json.JSONDecodeError("no", "", 0),
    ],
)
def test_errors_that_pass_are_overcome(error: Exception, waits: list[float]) -> None:
    assert ask(API, "x", failing(error)) == "done"
    assert waits == [1]


def test_a_call_is_repeated_with_growing_waits_or_those_asked_for(waits: list[float]) -> None:
    errors = answer(503), answer(503), answer(429, **{"Retry-After": "7"})
    assert ask(API, "x", failing(*errors)) == "done"
    assert waits == [1, 2, 7]
    with pytest.raises(HubError, match=r"^x: https://hub answered 503"):
        ask(API, "x", failing(*[answer(503)] * calls.TRIES))
    assert waits == [1, 2, 7, 1, 2, 4, 8]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (behind(answer(404)), r"^x: https://hub answered 404 \(Not Found\)$"),
        (answer(503, **{"Retry-After": "301"}), "^x: the Hub asks to come back in 301 seconds"),
        (httpx.ConnectError("no\nroute"), r"cannot be reached \(ConnectError: no route\)$"),
        (OfflineModeIsEnabled("unset `HF_HUB_OFFLINE`"), "^x: unset `HF_HUB_OFFLINE`$"),
    ],
)
def test_errors_that_stay_are_told_at_once(
    error: Exception, message: str, waits: list[float]
) -> None:
    with pytest.raises(HubError, match=message):
        ask(API, "x", failing(error), reachable=False)
    assert waits == []


def test_an_answer_that_is_no_json_is_told_as_such(waits: list[float]) -> None:
    with pytest.raises(HubError, match="answered with something that is not JSON"):
        ask(API, "x", failing(*[json.JSONDecodeError("no", "", 0)] * calls.TRIES))


def test_no_request_waits_forever() -> None:
    def timeout() -> Any:
        return get_session().timeout

    before = timeout()
    assert ask(API, "x", timeout) == httpx.Timeout(120, connect=20)
    assert timeout() == before
