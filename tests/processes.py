"""Several training processes on this CPU, talking through gloo."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import PrepareForLaunch, patch_environment
from torch.multiprocessing import start_processes


def in_processes(
    function: Callable[..., object], *arguments: Any, count: int = 2, seconds: float = 240
) -> None:
    """Call a function in `count` forked processes that can reduce and gather.

    An exception in one of them is raised here; none outlives the call.

    Args:
        function: its assertions are the test.
        arguments: handed to it as they are; results come back through files.
        count: how many processes.
        seconds: after which they count as stuck.
    """
    with (
        tempfile.TemporaryDirectory() as meeting,
        patch_environment(
            world_size=count,
            master_addr="127.0.0.1",
            master_port="29500",
            accelerate_mixed_precision="no",
            accelerate_debug_rdv_file=f"{meeting}/store",
            accelerate_use_cpu="yes",
            gloo_socket_ifname="lo",
        ),
    ):
        launcher = PrepareForLaunch(partial(_alone, function), debug=True)
        context = start_processes(
            launcher, args=arguments, nprocs=count, join=False, start_method="fork"
        )
        deadline = time.monotonic() + seconds
        try:
            while not context.join(timeout=1):
                assert time.monotonic() < deadline, f"the processes are stuck after {seconds} s"
        finally:
            for process in context.processes:
                process.kill()
                process.join()


def _alone(function: Callable[..., object], *arguments: Any) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # what the parent had
    torch.set_num_threads(1)
    function(*arguments)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
