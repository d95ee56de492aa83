"""External causes that end a run, reported in one line by every process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from detrelay.core.errors import one_line

_WORKER_DIED = re.compile(
    r"DataLoader worker \(pid\(?s?\)?.* (is killed by signal|exited unexpect)"
)
_LOST = re.compile(r"gloo|Connection (closed|reset)|Broken pipe|NCCL|TCPStore", re.IGNORECASE)
_MAX_REASON = 200  # characters of a library's message


class RunFault(ValueError):
    """Something outside the training ended it; what was saved before is intact."""


@contextmanager
def told_in_one_line(accelerator: Accelerator, resume: str) -> Iterator[None]:
    """Say what happened when a loader process is killed or another training process ends.

    Args:
        accelerator: knows whether there are other processes.
        resume: the command that continues the run.

    Raises:
        RunFault: instead of torch's errors.
    """
    try:
        yield
    except RuntimeError as error:
        reason = one_line(error)
        if _WORKER_DIED.search(reason):
            raise RunFault(
                f"a process that loads images was killed ({reason[:_MAX_REASON]}), perhaps by "
                f"the system for lack of memory; data.num_workers=0 needs less; resume with: "
                f"{resume}"
            ) from error
        is_lost = isinstance(error, torch.distributed.DistError) or _LOST.search(reason)
        if accelerator.num_processes > 1 and is_lost:
            raise RunFault(
                f"another process of this run has ended (its own message says why, unless it was "
                f"killed); process {accelerator.process_index} cannot continue without it "
                f"({reason[:_MAX_REASON]}); resume with: {resume}"
            ) from error
        raise


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """Wait until every process has done its part; a user error on one is raised on all.

    Raises:
        RunFault: on the processes that had no error of their own.
    """
    problem: Exception | None = None
    try:
        yield
    except (ValueError, OSError) as error:
        problem = error
    reasons = gather_object([None if problem is None else one_line(problem)])
    if problem is not None:
        raise problem
    for process, reason in enumerate(reasons):
        if reason is not None:
            raise RunFault(f"process {process} could not begin: {reason}")
