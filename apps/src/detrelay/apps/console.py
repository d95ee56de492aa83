"""What the command lines share: how they end when something is wrong."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from detrelay.core.errors import one_line

USER_ERROR = 2


def run(main: Callable[[], int]) -> NoReturn:
    """Leave the process with the code that `main` returns.

    What the user can mend (ValueError: names, values, data; OSError: files) ends in one line on
    stderr and code 2. Anything else is a fault of the program and keeps its traceback;
    `python -X dev` shows it for user errors too.
    """
    try:
        code = main()
        if _is_one_of_several():
            _leave_at_once(code)
    except BrokenPipeError:  # the reader of stdout has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"error: {_told(error)}", file=sys.stderr, flush=True)
        code = USER_ERROR
    sys.exit(code)


def _is_one_of_several() -> bool:
    """Whether other processes take part in this run."""
    distributed = sys.modules.get("torch.distributed")  # not imported: --help does without torch
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _leave_at_once(code: int) -> NoReturn:
    """Leave without the end of C++ libraries, after that of Python.

    Threads that gloo still has there made one end in a few abort, though all was done and written.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _told(error: Exception) -> str:
    text = str(error).strip()
    if text.startswith("Caught ") and "DataLoader worker" in text:
        # torch hands on a worker's error with its traceback, the message itself last
        return one_line(text.splitlines()[-1].partition(": ")[2])
    return one_line(error)
