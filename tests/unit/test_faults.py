"""External causes that end a run, in one line on every process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from detrelay.core.engine import faults
from detrelay.core.engine.faults import RunFault, together, told_in_one_line

RESUME = "detrelay train --resume run"


def processes(count: int) -> Any:
    return SimpleNamespace(num_processes=count, process_index=1)


def test_a_killed_loader_process_is_told_with_a_remedy() -> None:
    message = r"was killed \(DataLoader worker .* killed by signal: Killed\.\), .*num_workers=0"
    with pytest.raises(RunFault, match=message) as error, told_in_one_line(processes(1), RESUME):
        raise RuntimeError("DataLoader worker (pid 7)\nis killed by signal: Killed.")
    assert str(error.value).endswith(f"resume with: {RESUME}")


@pytest.mark.parametrize(
    "error", [RuntimeError("[gloo] Connection closed by peer"), torch.distributed.DistError("lost")]
)
def test_the_end_of_another_process_is_told_where_there_are_others(error: RuntimeError) -> None:
    with (
        pytest.raises(RunFault, match="process 1 cannot continue without it"),
        told_in_one_line(processes(2), RESUME),
    ):
        raise error
    with pytest.raises(type(error)) as raised, told_in_one_line(processes(1), RESUME):
        raise error
    assert raised.value is error


def test_an_error_on_one_process_is_one_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    others: list[str | None] = [None, "no such file"]
    monkeypatch.setattr(faults, "gather_object", lambda own: [*own, *others])
    with (
        pytest.raises(RunFault, match="process 2 could not begin: no such file"),
        together(processes(3)),
    ):
        pass
    with pytest.raises(ValueError, match="mine"), together(processes(3)):
        raise ValueError("mine")
    others[:] = [None]
    with together(processes(2)):
        pass
