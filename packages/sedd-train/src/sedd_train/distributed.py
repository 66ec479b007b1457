"""Starting: one process or many, under `deepspeed`, `torchrun` or plain `python`.

A launcher tells each process its place by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT (see `launchers`
for those that have other names). Without one, `start` sets them for a world of one, at port 0, which is whichever is
free when it is listened at. On a machine without an accelerator the processes talk over gloo, keep the memory that they
free, and DeepSpeed is told not to compile its C++ operators at first use.
"""

from __future__ import annotations

import ctypes
import functools
import os
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from sedd_train.launchers import adopt, lost

__all__ = ["place", "say", "tell", "agree", "by_leader", "patient", "start", "finish", "keep_memory"]

TIMEOUT = timedelta(minutes=10)  # of what all ranks do together, in training


def place() -> tuple[int, int]:
    """(rank, world size) as the launcher set them, (0, 1) without a launcher.

    Raises:
        ValueError: see `launchers.adopt`.
    """
    adopt()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def say(text: str) -> None:
    """Print above the progress bar, on rank 0 alone. A reader that is gone, such as a killed launcher, stops no run."""
    if int(os.environ.get("RANK", 0)) == 0:
        with suppress(BrokenPipeError):
            tqdm.write(text)


def tell(value: Any) -> list[Any]:
    """What every rank tells, by rank. Collective, once started; any of them may take days before it tells."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        return [value]
    told: list[Any] = [None] * world_size
    dist.all_gather_object(told, value, group=patient())
    return told


def agree(failure: str) -> str:
    """What went wrong on any of the ranks in what each did alone, said once and by name; nothing if nothing did.

    Collective. Every rank calls this once, with what went wrong on it or an empty text, after as long as it takes: a
    rank that left without a word would leave the others waiting, or its user without a reason.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        start()
    failures = tell(failure)
    ranks: dict[str, list[int]] = {}
    for number, text in enumerate(failures):
        if text:
            ranks.setdefault(text, []).append(number)
    if len(ranks) == 1 and failures.count("") == 0:
        return failure
    return "\n".join(f"rank {', '.join(map(str, numbers))}: {text}" for text, numbers in ranks.items())


def by_leader(work: Callable[[], str], asked: str) -> str:
    """What one process of each machine made, as all processes of that machine have it. Collective.

    The others wait, for as long as it takes. So files are read once a machine, however many processes it has.

    Args:
        work: what the first process of each machine does.
        asked: in words, which has to be the same in all.

    Raises:
        ValueError: the work raised a ValueError or an OSError, or this process was asked for something else.
    """
    rank, world_size = place()
    if world_size == 1:
        return work()
    start()
    hosts = tell((socket.gethostname(), asked))
    leader = next(number for number, (host, _) in enumerate(hosts) if host == hosts[rank][0])
    made, failure = "", ""
    if rank == leader:
        try:
            made = work()
        except (ValueError, OSError) as error:
            failure = str(error) or repr(error)
    told = tell((made, failure))
    if asked != hosts[leader][1]:
        raise ValueError(f"was started with {asked}, and rank {leader} with {hosts[leader][1]}")
    if told[leader][1]:
        raise ValueError(told[leader][1])
    return str(told[leader][0])


def patient() -> Any:
    """A group of all processes, any of which may take days over what the others wait for. Collective at first."""
    return _patient(dist.group.WORLD)


@functools.lru_cache(maxsize=1)
def _patient(world: Any) -> Any:
    return dist.new_group(backend="gloo", timeout=timedelta(days=7))


def start() -> torch.device:
    """Join the other processes, if any; the device of this one.

    Raises:
        RuntimeError: the launcher's address cannot be reached, or its port is taken.
    """
    alone = "RANK" not in os.environ
    if alone:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        keep_memory()
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            share = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // share))
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")
    deepspeed = _import_deepspeed()
    if on_cpu:
        # Its shared-memory all-reduce needs a compiler and half a minute, or hangs on a stale lock file; gloo does.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        backend = "gloo" if on_cpu else "nccl"
        try:
            deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=TIMEOUT)
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise RuntimeError(
                f"the {os.environ['WORLD_SIZE']} processes did not find each other at {os.environ['MASTER_ADDR']}:"
                f"{os.environ['MASTER_PORT']} ({error}); if another run holds the port, choose one with --master_port"
            ) from error
    if dist.get_world_size() > 1:
        sys.excepthook = _fail
    return torch.device("cpu" if on_cpu else f"cuda:{os.environ['LOCAL_RANK']}")


def _fail(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say what ended this rank, and leave at once.

    The interpreter's own clean-up would wait for the other ranks. They learn of it by a broken connection, or from the
    launcher, which ends them.
    """
    gone = "lost another rank, whose own error, if it had time to say one, stands elsewhere"
    try:
        traceback.print_exception(kind, error, trace)
        print(
            f"rank {dist.get_rank()} of {dist.get_world_size()} ends, and the run with it: "
            f"{gone if lost(error) else error}. Checkpoints written so far are whole: continue with --resume",
            file=sys.stderr,
            flush=True,
        )
        sys.stdout.flush()
    finally:  # also where nobody reads that
        os._exit(1)


def _import_deepspeed() -> Any:
    import logging

    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def finish(code: int = 0) -> None:
    """End this process after all the others have come here too.

    Several ranks leave without the interpreter's own clean-up: tearing down gloo's groups under ZeRO 3 aborts now and
    then, after all the work is done and saved.
    """
    if not dist.is_initialized():
        sys.exit(code)
    if dist.get_world_size() > 1:
        dist.barrier(group=patient())  # the first writes what has come of it meanwhile
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    dist.destroy_process_group()
    sys.exit(code)


def keep_memory() -> None:
    """Let this process keep the memory it frees for its next tensors, as torch's allocator on GPUs does.

    glibc hands large blocks back to the system at once, which clears every page anew when the next step asks for them.
    With another C library nothing changes.
    """
    if sys.platform != "linux":
        return
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)
