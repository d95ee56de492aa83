"""Stop signals."""

from __future__ import annotations

import os
import signal

import pytest

from detrelay.core.engine.stopping import StopSignals, TrainingInterrupted


def test_a_stop_signal_is_remembered_and_the_next_one_acts() -> None:
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_an_interruption_says_what_came_and_where_to_resume() -> None:
    error = TrainingInterrupted(signal.SIGTERM, 7)
    assert str(error) == "stopped by SIGTERM after step 7"
    assert (error.signal_number, error.step) == (signal.SIGTERM, 7)
