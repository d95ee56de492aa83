"""Calls to the Hub, with retries and timeouts that the client lacks, and one-line errors."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub import HfApi, get_session
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # exported lazily

from detrelay.core.errors import one_line

_Answer = TypeVar("_Answer")

TRIES = 5
# 412 after a commit: the head has moved, perhaps by this very commit, whose answer was lost
_TRANSIENT_STATUS = frozenset({408, 412, 429, 500, 502, 503, 504})
_MAX_WAIT = 300  # seconds; if the Hub asks for more, give up
# The client itself waits forever. Seconds without a single byte, enough even for a large commit.
_TIMEOUT = httpx.Timeout(120, connect=20)

# Uploads and downloads of files hide the actual error behind these.
_WRAPPERS = (RuntimeError, LocalEntryNotFoundError)
# a failing gateway answers with a page, which the client cannot parse as JSON
_NO_ANSWER = (httpx.TransportError, json.JSONDecodeError)
_ERRORS = (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    *_NO_ANSWER,
    *_WRAPPERS,
)


class HubError(ValueError):
    """Something cannot be published or fetched; the message says what to do."""


def ask(api: HfApi, what: str, call: Callable[[], _Answer], *, reachable: bool = True) -> _Answer:
    """Make a call that may safely be repeated, with retries after transient errors.

    Args:
        api: the client that makes the call.
        what: what fails if the call does, for the message.
        call: asks the Hub; a lost answer must not matter.
        reachable: whether the Hub is known to answer; if not, a failed connection is a final error.

    Raises:
        HubError: `what`, and the error of the last try.
    """
    for attempt in range(TRIES):
        session = get_session()
        before, session.timeout = session.timeout, _TIMEOUT
        try:
            return call()
        except _ERRORS as error:
            cause = _root_cause(error)
            unreachable = isinstance(cause, httpx.ConnectError) and not reachable
            if attempt == TRIES - 1 or unreachable or not _is_transient(cause):
                raise HubError(f"{what}: {_explain(cause, api)}") from error
            _wait(cause, attempt, what)
        finally:
            session.timeout = before
    raise AssertionError("the last try returns or raises")


def _root_cause(error: BaseException) -> BaseException:
    while isinstance(error, _WRAPPERS) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _TRANSIENT_STATUS
    return isinstance(error, _NO_ANSWER)


def _wait(error: BaseException, attempt: int, what: str) -> None:
    """Sleep before the next try: as long as the Hub asks for, or 1, 2, 4, ... seconds."""
    asked = error.response.headers.get("Retry-After") if isinstance(error, HfHubHTTPError) else None
    seconds = int(asked) if asked is not None and asked.isdecimal() else 2**attempt
    if seconds > _MAX_WAIT:
        raise HubError(
            f"{what}: the Hub asks to come back in {seconds} seconds; try again then"
        ) from error
    time.sleep(seconds)


def _explain(error: BaseException, api: HfApi) -> str:
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        reason = error.server_message or error.response.reason_phrase
        advice = "; log in by `hf auth login`, or set HF_TOKEN" if status == 401 else ""
        return f"{api.endpoint} answered {status} ({one_line(reason)}){advice}"
    if isinstance(error, json.JSONDecodeError):
        return f"{api.endpoint} answered with something that is not JSON"
    if isinstance(error, httpx.TransportError):
        kind = type(error).__name__
        return f"{api.endpoint} cannot be reached ({kind}: {one_line(error)})"
    return one_line(error)
