"""Calls to the Hub, with retries and timeouts that the client lacks, and one-line errors."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from huggingface_hub import HfApi, get_session
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # exported lazily

from detrelay.core.errors import one_line

_Answer = TypeVar("_Answer")

TRIES = 5
_TRANSIENT_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_MAX_WAIT = 300  # seconds; if the Hub asks for more, give up
# The client itself waits forever. Seconds without a single byte, enough even for a large commit.
_TIMEOUT = httpx.Timeout(120, connect=20)

# Uploads and downloads of files hide the actual error behind these.
_WRAPPERS = (RuntimeError, LocalEntryNotFoundError)
# What a call to the Hub may raise.
CALL_ERRORS = (
    HfHubHTTPError,
    httpx.HTTPError,
    OfflineModeIsEnabled,
    json.JSONDecodeError,
    *_WRAPPERS,
)


class HubError(ValueError):
    """Something cannot be published or fetched; the message says what to do."""


@contextmanager
def bounded_waits() -> Iterator[None]:
    """Let no request wait forever for a silent server."""
    session = get_session()
    before = session.timeout
    session.timeout = _TIMEOUT
    try:
        yield
    finally:
        session.timeout = before


def patiently(call: Callable[[], _Answer], *, reachable: bool = True) -> _Answer:
    """Make a call that may safely be repeated, with retries after transient errors.

    Args:
        call: asks the Hub; a lost answer must not matter.
        reachable: whether the Hub is known to answer; if not, a failed connection is a final error.

    Raises:
        Exception: the error of the last try.
    """
    for attempt in range(TRIES):
        try:
            with bounded_waits():
                return call()
        except CALL_ERRORS as error:
            unreachable = isinstance(root_cause(error), httpx.ConnectError) and not reachable
            if attempt == TRIES - 1 or unreachable or not is_transient(error):
                raise
            wait(error, attempt)
    raise AssertionError("the last try returns or raises")


def root_cause(error: BaseException) -> BaseException:
    """The Hub's own error behind that of an upload or a download."""
    while isinstance(error, _WRAPPERS) and error.__cause__ is not None:
        error = error.__cause__
    return error


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed later."""
    error = root_cause(error)
    if isinstance(error, HfHubHTTPError):
        return status(error) in _TRANSIENT_STATUS
    # a failing gateway answers with a page, which the client cannot parse as JSON
    return isinstance(error, httpx.TransportError | json.JSONDecodeError)


def status(error: BaseException) -> int | None:
    """The HTTP status of the Hub's answer, None without an answer."""
    error = root_cause(error)
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def wait(error: BaseException, attempt: int) -> None:
    """Sleep before the next try: as long as the Hub asks for, or 1, 2, 4, ... seconds."""
    error = root_cause(error)
    asked = error.response.headers.get("Retry-After") if isinstance(error, HfHubHTTPError) else None
    seconds = int(asked) if asked is not None and asked.isdecimal() else 2**attempt
    if seconds > _MAX_WAIT:
        raise HubError(f"the Hub asks to come back in {seconds} seconds; try again then") from error
    time.sleep(seconds)


def explain(error: BaseException, api: HfApi) -> str:
    """Half a sentence that explains the error of a call."""
    error = root_cause(error)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it"
    if isinstance(error, HfHubHTTPError):
        reason = error.server_message or error.response.reason_phrase
        return f"{api.endpoint} answered {error.response.status_code} ({one_line(reason)})"
    if isinstance(error, json.JSONDecodeError):
        return f"{api.endpoint} answered with something that is not JSON"
    if isinstance(error, httpx.TransportError):
        kind = type(error).__name__
        return f"{api.endpoint} cannot be reached ({kind}: {one_line(error)})"
    return one_line(error)
