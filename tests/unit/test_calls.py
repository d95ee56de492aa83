"""Calls to the Hub: which errors are transient, how long to wait, and how they are reported."""

from __future__ import annotations

import json
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # exported lazily

from detrelay.core.hub import calls
from detrelay.core.hub.calls import HubError, explain, is_transient, patiently, root_cause, status


def answer(code: int, **headers: str) -> HfHubHTTPError:
    request = httpx.Request("GET", "https://hub/x")
    response = httpx.Response(code, headers=headers, request=request)
    return HfHubHTTPError(f"{code}", response=response)


def behind(error: Exception) -> RuntimeError:
    wrapper = RuntimeError("the upload failed")
    wrapper.__cause__ = error
    return wrapper


def test_errors_that_pass_are_told_from_those_that_stay() -> None:
    assert is_transient(answer(503))
    assert is_transient(behind(answer(429)))
    assert is_transient(httpx.ReadTimeout("slow"))
    assert is_transient(json.JSONDecodeError("no", "", 0))
    assert not is_transient(answer(404))
    assert not is_transient(OfflineModeIsEnabled())
    assert status(behind(answer(404))) == 404
    assert status(httpx.ReadTimeout("slow")) is None
    error = answer(500)
    assert root_cause(behind(behind(error))) is error


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


def test_a_call_is_repeated_with_growing_waits_or_those_asked_for(waits: list[float]) -> None:
    assert (
        patiently(failing(answer(503), answer(503), answer(429, **{"Retry-After": "7"}))) == "done"
    )
    assert waits == [1, 2, 7]


def test_errors_that_stay_are_raised_at_once(waits: list[float]) -> None:
    for error in (answer(404), answer(503, **{"Retry-After": "301"})):
        with pytest.raises((HfHubHTTPError, HubError)):
            patiently(failing(error))
    with pytest.raises(httpx.ConnectError):
        patiently(failing(httpx.ConnectError("no")), reachable=False)
    assert waits == []
    with pytest.raises(HfHubHTTPError):
        patiently(failing(*[answer(503)] * calls.TRIES))
    assert waits == [1, 2, 4, 8]


def test_errors_are_told_in_half_a_sentence() -> None:
    api = HfApi(endpoint="https://hub")
    assert explain(behind(answer(503)), api) == "https://hub answered 503 (Service Unavailable)"
    assert explain(OfflineModeIsEnabled(), api) == "HF_HUB_OFFLINE is set; unset it"
    assert explain(httpx.ConnectError("no\nroute"), api) == (
        "https://hub cannot be reached (ConnectError: no route)"
    )
    assert "not JSON" in explain(json.JSONDecodeError("no", "", 0), api)
