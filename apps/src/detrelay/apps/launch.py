"""Reconcile precision, accumulation, compilation and threads of launcher, user and recipe.

`accelerate launch` passes its options on in environment variables. What the recipe leaves open is
taken from them; where both set a value and differ, the run is rejected.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from detrelay.core.errors import RecipeError
from detrelay.core.recipes.recipe import Recipe, override

if TYPE_CHECKING:
    from accelerate import Accelerator

_PRECISION = "ACCELERATE_MIXED_PRECISION"
_ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
_CLIPPING = "ACCELERATE_GRADIENT_CLIPPING"
_DYNAMO = "ACCELERATE_DYNAMO_"
_THREADS = "OMP_NUM_THREADS"
_UNSET = ("", "no", "none", "auto")
# the defaults of `torch.compile`, which train.compile uses
_PLAIN_DYNAMO = {
    "BACKEND": ("inductor",),
    "MODE": ("default",),
    "USE_FULLGRAPH": ("false", "0"),
    "USE_REGIONAL_COMPILATION": ("false", "0"),
}
_UNSUPPORTED = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sequence parallelism",
}


def with_launch_settings(
    recipe: Recipe, named: Container[str], say: Callable[[str], object]
) -> Recipe:
    """The recipe with the options of `accelerate launch` that it leaves open.

    Args:
        recipe: of the run.
        named: keys that the user has set on the command line.
        say: called with one line for each option that is taken.

    Raises:
        RecipeError: the launcher asks for something other than the recipe, or for something
            training cannot do.
    """
    for variable, what in _UNSUPPORTED.items():
        if os.environ.get(variable, "").lower() == "true":
            raise RecipeError(
                f"accelerate launch asks for {what} ({variable}), which detrelay cannot train "
                f"with; use data parallelism, FSDP or DeepSpeed"
            )
    requested = _requested(recipe)
    for key, (value, source) in requested.items():
        section, _, name = key.partition(".")
        stated = getattr(getattr(recipe, section), name)
        if str(stated).lower() == value:
            continue
        default = getattr(getattr(Recipe(), section), name)
        if stated != default or key in named:
            raise RecipeError(
                f"accelerate launch asks for {key}={value} ({source}), but the recipe says "
                f"{key}={str(stated).lower()}; set it in one of them"
            )
        recipe = override(recipe, [f"{key}={value}"])
        say(f"{key}={value}, as accelerate launch asks ({source})")
    return recipe


def _requested(recipe: Recipe) -> dict[str, tuple[str, str]]:
    """Recipe keys that the launcher sets: the value, and the variable it is in."""
    requested = {}
    precision = os.environ.get(_PRECISION, "").lower()
    if precision not in _UNSET:
        if precision not in ("bf16", "fp16"):
            raise RecipeError(
                f"accelerate launch asks for {precision} ({_PRECISION}); supported: no, bf16 "
                f"and fp16"
            )
        requested["train.mixed_precision"] = (precision, _PRECISION)
    accumulation = os.environ.get(_ACCUMULATION, "").strip().lower()
    if accumulation not in (*_UNSET, "1"):
        if not accumulation.isdecimal() or int(accumulation) == 0:
            raise RecipeError(f"{_ACCUMULATION} must be a whole number, found {accumulation!r}")
        requested["train.accumulation_steps"] = (accumulation, _ACCUMULATION)
    backend = os.environ.get(f"{_DYNAMO}BACKEND", "").lower()
    if backend not in _UNSET:
        _refuse_special_dynamo()
        requested["train.compile"] = ("true", f"{_DYNAMO}BACKEND")
    clipping = os.environ.get(_CLIPPING, "").lower()
    if clipping not in _UNSET and float(clipping) != recipe.train.clip_norm:
        raise RecipeError(
            f"accelerate launch lets DeepSpeed clip gradients at {clipping} ({_CLIPPING}), but the "
            f"recipe says train.clip_norm={recipe.train.clip_norm:g}; make them equal"
        )
    return requested


def _refuse_special_dynamo() -> None:
    for name, plain in _PLAIN_DYNAMO.items():
        value = os.environ.get(_DYNAMO + name, plain[0]).lower()
        if value not in plain:
            raise RecipeError(
                f"accelerate launch asks for {_DYNAMO}{name}={value}; training knows torch.compile "
                f"with its defaults only: launch without, and set train.compile=true"
            )


def make_accelerator(recipe: Recipe, project: Path | None = None) -> Accelerator:
    """Device and processes of a run, in the recipe's precision.

    Args:
        recipe: its precision, accumulation and compilation apply; Accelerate would otherwise read
            the launcher's again, divide by an accumulation that the updater already does, and
            compile twice.
        project: folder of the run, for trackers.
    """
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    return Accelerator(
        mixed_precision=recipe.train.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_backend="no",
        log_with=list(recipe.train.trackers) or None,
        project_dir=project,
    )


def set_threads(threads: int | None, accelerator: Accelerator) -> None:
    """Set the number of torch's CPU threads: the user's, or as many as this process may use.

    Args:
        threads: --threads.
        accelerator: on a GPU, or if several processes share a CPU, nothing is changed unless
            `threads` is given.

    Raises:
        ValueError: `threads` is not positive.
    """
    import torch

    if threads is not None:
        if threads < 1:
            raise ValueError(f"--threads must be at least 1, found {threads}")
        torch.set_num_threads(threads)
    elif (
        accelerator.device.type == "cpu"
        and accelerator.num_processes == 1
        and not threads_are_chosen(os.environ, Path(f"/proc/{os.getppid()}"))
    ):
        torch.set_num_threads(usable_cores())


def threads_are_chosen(environment: Mapping[str, str], launcher: Path) -> bool:
    """Whether the user has set the number of threads.

    Args:
        environment: of this process. `accelerate launch` sets one thread in it if its own
            environment and options give no number.
        launcher: Linux's /proc folder of the parent process.
    """
    if _THREADS not in environment:
        return False
    if environment[_THREADS] != "1" or _PRECISION not in environment:
        return True
    try:
        inherited = (launcher / "environ").read_bytes().split(b"\0")
        options = (launcher / "cmdline").read_bytes().replace(b"-", b"_")
    except OSError:
        return True
    named = any(entry.startswith(f"{_THREADS}=".encode()) for entry in inherited)
    return named or b"num_cpu_threads_per_process" in options


def usable_cores() -> int:
    """CPU cores that this process may use: its affinity, and the quota of its container."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota = cpu_quota()
    return cores if math.isinf(quota) else max(1, min(cores, math.ceil(quota)))


def cpu_quota(
    mount: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> float:
    """CPU cores that the control groups of this process allow; infinite if unlimited.

    Args:
        mount: where control groups are mounted, of version 1 or 2.
        membership: file that names the groups of this process.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return math.inf
    quota = math.inf
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            root = mount
        elif "cpu" in controllers.split(","):
            root = mount / "cpu"
        else:
            continue
        inside = root / group.lstrip("/")
        # inside a container the path may be that of the host, which does not exist here
        for folder in {root, inside, *inside.parents}:
            if folder.is_relative_to(root):
                quota = min(quota, _quota_of(folder))
    return quota


def _quota_of(group: Path) -> float:
    try:
        if (group / "cpu.max").is_file():
            limit, period = (group / "cpu.max").read_text(encoding="utf-8").split()
        else:
            limit, period = (
                (group / f"cpu.cfs_{name}_us").read_text(encoding="utf-8").strip()
                for name in ("quota", "period")
            )
        return math.inf if limit in ("max", "-1") else int(limit) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
