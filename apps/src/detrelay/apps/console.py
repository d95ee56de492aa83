"""The entry point of every command: arguments, errors and exit codes."""

from __future__ import annotations

import atexit
import io
import itertools
import os
import re
import signal
import sys
import sysconfig
import traceback
from collections.abc import Callable
from typing import Annotated, NoReturn, TypeVar

import tyro

from detrelay.core.errors import one_line

_Arguments = TypeVar("_Arguments")

FAULT = 1
USER_ERROR = 2
_INTERRUPTED = 128 + signal.SIGINT
_DEBUG = "--debug"
_LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
_OUT_OF_MEMORY = ("CUDA out of memory", "DefaultCPUAllocator: ")

# The field `debug` of every command's arguments. `run` looks for the word itself, because an error
# may come before the arguments are read.
Debug = Annotated[
    tyro.conf.FlagCreatePairsOff[bool],
    tyro.conf.arg(help="Show the traceback of an error too."),
]


def read_arguments(kind: type[_Arguments]) -> _Arguments:
    """The command line as `kind`.

    Raises:
        ValueError: an argument is empty, as from an unset shell variable; as a path it would mean
            the working directory.
    """
    for before, argument in itertools.pairwise(sys.argv):
        if argument == "" or re.fullmatch(r"--[\w-]+=", argument):
            option = before if argument == "" else argument.removesuffix("=")
            raise ValueError(f"an empty argument after {option}; give a value, or omit {option}")
    return tyro.cli(kind)


def require_positive(arguments: object, *options: str) -> None:
    """Refuse options below 1; None stands for an option that is not given.

    Raises:
        ValueError: names the option and what was found.
    """
    for option in options:
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')} must be at least 1, found {value}")


def is_first_process() -> bool:
    """Whether this is the process of its launch that prints and writes; torch is not asked."""
    return os.environ.get("RANK", "0") == "0"


def run(main: Callable[[], int]) -> NoReturn:
    """Exit the process with the code that `main` returns; no exception escapes.

    An error ends in one line on stderr. What the user can fix (ValueError: names, values, data;
    OSError: files) has code 2; anything else is reported with its class and has code 1; an
    interrupt has code 130. With `--debug` the traceback comes before the line.
    """
    for stream in (sys.stdout, sys.stderr):  # names that the terminal cannot show are not an error
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main()
        sys.stdout.flush()
    except SystemExit:
        raise
    except BaseException as error:  # panics of Rust libraries are not an Exception
        if isinstance(error, BrokenPipeError) and _own_place(error) is not None:
            # the reader of the output has exited, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = FAULT
        else:
            if _DEBUG in sys.argv:
                traceback.print_exc()
            code, line = _describe(error)
            print(line, file=sys.stderr, flush=True)
    if _is_one_of_several():
        _leave_at_once(code)
    sys.exit(code)


def _is_one_of_several() -> bool:
    """Whether this run has other processes."""
    distributed = sys.modules.get("torch.distributed")  # not imported: --help works without torch
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _leave_at_once(code: int) -> NoReturn:
    """Exit after Python's cleanup but without that of C++ libraries.

    There, threads of gloo made one exit in a few abort, although all work was done and written.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _describe(error: BaseException) -> tuple[int, str]:
    """Exit code and line of an error."""
    if isinstance(error, KeyboardInterrupt):
        return _INTERRUPTED, "error: interrupted"
    kind, text = _kind_and_text(error)
    if is_out_of_memory(error):
        return FAULT, f"error: out of memory ({text}); use smaller batches, images or models"
    place = _own_place(error)
    ours = place is not None or type(error).__module__.startswith("detrelay.")
    if isinstance(error, OSError) or (isinstance(error, ValueError) and ours):
        return USER_ERROR, f"error: {text}"
    line = f"error: {kind}" if text == kind else f"error: {kind}: {text}"
    if place:
        return FAULT, f"{line}; raised in {place}; {_DEBUG} shows the traceback"
    return FAULT, f"{line}; this may be a fault of detrelay; run again with {_DEBUG}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was too little memory."""
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in _OUT_OF_MEMORY)


def _kind_and_text(error: BaseException) -> tuple[str, str]:
    text = str(error).strip()
    if text.startswith("Caught ") and "DataLoader worker" in text:
        # torch re-raises a worker's error with its traceback, the message itself last
        text = text.splitlines()[-1].partition(": ")[2]
    return type(error).__name__, one_line(text or error)


def _own_place(error: BaseException) -> str | None:
    """Who raised an error: "" for detrelay, None for a library, else file and line of the user."""
    place: str | None = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        if str(frame.f_globals.get("__name__")).startswith("detrelay."):
            place = ""
        elif file.startswith(("<frozen ", *_LIBRARIES)):
            place = None
        else:
            place = f"{file}, line {line}"
    return place
