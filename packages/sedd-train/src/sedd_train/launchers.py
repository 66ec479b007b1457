"""Who started this process: `torchrun`, `deepspeed`, `srun`, `mpirun` or nobody; and when they want it to leave.

`torchrun` and `deepspeed` tell each process its place by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
Slurm's `srun` and the `mpirun`s have variables of their own, which `adopt` translates: a process that took no notice of
them would train alone, beside others that do the same in the same folder.

A scheduler sends SIGTERM to some process or to all of them, once or often. A launcher that is killed itself, or dies of
that SIGTERM, tells its ranks nothing: they see that it is gone. Open MPI's mpirun hands its SIGTERM on and kills its
processes a fifth of a second later, which no step and save fit into; a SIGUSR1 it hands on and no more, as MPICH's does
with both. So SIGUSR1 asks for the same.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["adopt", "lost", "Preemption"]

PLACES = {  # of each launcher: its variables for rank, world size, rank on this machine
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    "mpirun (Open MPI)": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "mpirun (MPICH, Intel MPI)": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
}
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


def adopt() -> None:
    """Put the place that srun or mpirun gave this process where `torchrun` and `deepspeed` put it.

    All processes have to know where the first one listens. `srun` tells the address of the machine it was called on;
    MASTER_ADDR and MASTER_PORT, where they are set, count instead.

    Raises:
        ValueError: one of several processes, of which it is not known where the first one is.
    """
    launcher = _other_launcher()
    if "RANK" in os.environ or launcher is None:
        return
    rank, size, local = PLACES[launcher]
    here = int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", os.environ.get("MPI_LOCALNRANKS", "0")))
    one_machine = here == int(os.environ[size]) or os.environ.get("SLURM_STEP_NUM_NODES") == "1"
    address = os.environ.get("MASTER_ADDR") or (
        "127.0.0.1" if one_machine else os.environ.get("SLURM_LAUNCH_NODE_IPADDR")
    )
    if address is None:
        raise ValueError(
            f"{launcher} started {os.environ[size]} processes, and this one cannot tell where the first of them "
            "is: export MASTER_ADDR=HOST of the first machine, and MASTER_PORT=PORT, or start them by torchrun"
        )
    job = int(os.environ.get("SLURM_JOB_ID", "0"))
    os.environ |= {
        "RANK": os.environ[rank],
        "WORLD_SIZE": os.environ[size],
        "LOCAL_RANK": os.environ.get(local, "0"),
        "MASTER_ADDR": address,
        "MASTER_PORT": os.environ.get("MASTER_PORT", str(20000 + job % 20000)),
    }


def _other_launcher() -> str | None:
    """Which of `PLACES` started this process as one of several, if any did."""
    for launcher, (rank, size, _) in PLACES.items():
        if rank in os.environ and int(os.environ.get(size, "1")) > 1:
            return launcher
    return None


def lost(error: BaseException | None) -> bool:
    """Whether an error says that another process of the run is gone."""
    words = ("connection", "peer", "broken pipe", "remote process")  # of gloo, of NCCL
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


class Preemption:
    """Inside `with`, `requested` becomes true when the run should save and leave.

    That is at SIGTERM or SIGUSR1, however often it comes and to however many of the processes; at SIGINT, of which the
    second ends the process at once; and when the launcher is gone. In another thread than the main one, which Python
    gives no signals, only the last is noticed.

    Signals are heard on after an error that says that another process is gone: its launcher asks this one to leave at
    that very moment, which is to say what has happened first.
    """

    def __init__(self) -> None:
        self.heard = False
        self.before: dict[int, Any] = {}
        self.launcher = _launcher() if _launched() else []

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.launcher and lost(error):
            return
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        """Whether to save and leave."""
        return self.heard or (bool(self.launcher) and _launcher() != self.launcher)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.heard = True
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)


def _launched() -> bool:
    """Whether somebody started this process as one of a run's; at port 0 `distributed.start` made a world of it."""
    given = "RANK" in os.environ and os.environ.get("MASTER_PORT") != "0"
    return given or _other_launcher() is not None


def _launcher() -> list[int]:
    """The processes that look after this one: its parent and, as `deepspeed` is two of them, that one's parent."""
    import psutil

    try:
        parent = psutil.Process(os.getppid())
        of_two = "deepspeed.launcher.launch" in " ".join(parent.cmdline())
        return [parent.pid, parent.ppid()] if of_two else [parent.pid]
    except psutil.Error:  # it is just dying
        return []
