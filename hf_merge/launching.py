"""Which of several processes this is, as its environment says, and how several are started on one machine."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass

from hf_merge.errors import MergeError, shown


@dataclass(frozen=True)
class Environment:
    """What environment variables say of this process.

    Attributes:
        by: who set them.
        world: how many processes there are.
        rank: which of them this is.
        local_rank: which of those on this machine.
        local_world: how many are on this machine.
    """

    by: str = ""
    world: int = 1
    rank: int = 0
    local_rank: int = 0
    local_world: int = 1


_PARENT = "HF_MERGE_PARENT"
"""Says to a process that `launch` started who did."""

_VARIABLES = {
    "torchrun": ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "Open MPI": (
        "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", ""),
    "SLURM": ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", ""),
    "MPI": ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}  # fmt: skip
"""By who sets them: the variables of world, rank, local rank and local world. The first whose world is set counts."""


def environment() -> Environment:
    """Read which of how many processes this is.

    Raises:
        MergeError: WORLD_SIZE names several, and the other variables of a launcher are not set.
    """
    for by, (world, rank, *local) in _VARIABLES.items():
        size = _number(world)
        if size is None or (_number(rank) is None and by != "torchrun"):
            continue
        if size > 1 and by == "torchrun" and (lacking := _not_set("RANK", "MASTER_ADDR", "MASTER_PORT")):
            raise MergeError(
                f"WORLD_SIZE={size} says that this is one of {size} processes, but {', '.join(lacking)} is not set: "
                "start all of them with torchrun, accelerate launch or --processes, or unset WORLD_SIZE."
            )
        number, everywhere = _number(rank) or 0, _slurm_tasks(size) if rank == "SLURM_PROCID" else size
        local_rank, local_world = (_number(name) for name in local)
        return Environment(by, size, number, number if local_rank is None else local_rank, local_world or everywhere)
    return Environment()


def _number(name: str) -> int | None:
    text = os.environ.get(name, "")
    if text and not text.isdecimal():
        raise MergeError(f"The environment variable {name} is {shown(text)}, and should be a number: unset it.")
    return int(text) if text else None


def _not_set(*names: str) -> list[str]:
    return [name for name in names if not os.environ.get(name)]


def _slurm_tasks(world: int) -> int:
    """Return how many of SLURM's tasks are on this machine: that many as `4(x2),3` says of it."""
    text = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("SLURM_TASKS_PER_NODE") or str(world)
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    tasks = [int(tasks) for tasks, nodes in parts for _ in range(int(nodes or 1))] or [world]
    return min(tasks[min(_number("SLURM_NODEID") or 0, len(tasks) - 1)], world)


def _slurm_host() -> str | None:
    """Return the first of SLURM's machines, where rank 0 is: `gpu03` of `gpu[03-07,12],cpu1`."""
    names = next(filter(None, map(os.environ.get, ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"))), "")
    found = re.match(r"(?:[^,\[]|\[[^\]]*\])+", names)
    return found and re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", found[0])


def export(said: Environment) -> None:
    """Say in torchrun's words what SLURM or MPI said, as accelerate and torch read them."""
    alone = said.local_world >= said.world
    host = "127.0.0.1" if alone else _slurm_host() if said.by in ("srun", "SLURM") else None
    if host is None and _not_set("MASTER_ADDR"):
        raise MergeError(f"{said.by} started processes on several machines: set MASTER_ADDR to the host of rank 0.")
    job = (_number("SLURM_JOB_ID") or 9500) + (_number("SLURM_STEP_ID") or 0)
    names = {"MASTER_ADDR": host, "MASTER_PORT": 20000 + job % 20000, "OMP_NUM_THREADS": _threads(said.local_world)}
    for name, value in names.items():
        os.environ.setdefault(name, str(value))
    numbers = {"WORLD_SIZE": said.world, "RANK": said.rank,
               "LOCAL_RANK": said.local_rank, "LOCAL_WORLD_SIZE": said.local_world}  # fmt: skip
    os.environ.update({name: str(value) for name, value in numbers.items()})


def _threads(processes: int) -> int:
    """Return how many threads this process may use: its own cores if it was given some, else its part of all."""
    everywhere = os.cpu_count() or 1
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else everywhere
    return mine if mine < everywhere else max(1, everywhere // processes)


def launch(processes: int, *command: str) -> int:
    """Start a command as several processes on this machine, through torch's launcher, and wait for them.

    Args:
        processes: how many.
        command: arguments of Python.

    Returns:
        Their exit status: that of the first that failed.
    """
    import torch
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.ERROR)  # of the launcher: the processes say themselves what is wrong
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // processes)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ[_PARENT] = str(os.getpid())
    with tempfile.TemporaryDirectory() as folder:
        config = LaunchConfig(
            1, 1, processes, DefaultLogsSpecs(folder), uuid.uuid4().hex, rdzv_backend="c10d",
            rdzv_endpoint="localhost:0", max_restarts=0, local_addr="localhost",
        )  # fmt: skip
        try:
            elastic_launch(config, sys.executable)(*command)
        except ChildFailedError as error:
            return max(error.get_first_failure()[1].exitcode, 1)
        except SignalException as error:
            return 128 + error.sigval
    return 0


def is_launched() -> bool:
    """Tell whether `launch` started this process."""
    return _PARENT in os.environ


def follow_parent() -> None:
    """End this process soon after the one that launched it, however that ended."""
    if is_launched() and hasattr(os, "getppid"):
        threading.Thread(target=_follow, args=(int(os.environ[_PARENT]),), daemon=True).start()


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)  # which a merge answers in an orderly way
    time.sleep(30)
    os.kill(os.getpid(), signal.SIGKILL)


_silent = threading.Event()


def speaks() -> bool:
    """Tell whether this process may say what ended it; one of those that end together does."""
    return not _silent.is_set()


def be_silent() -> None:
    """Leave it to another process to say what ended all of them."""
    _silent.set()
