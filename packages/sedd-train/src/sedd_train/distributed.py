"""Starting: one process or many, under `deepspeed`, `torchrun` or plain `python`.

A launcher tells each process its place by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Without one,
`start` sets them for a world of one, with a free port. On a machine without an accelerator the processes talk over
gloo, keep the memory that they free, and DeepSpeed is told not to compile its C++ operators at first use.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import traceback
import warnings
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

__all__ = ["place", "say", "start", "finish", "free_port", "keep_memory", "Preemption"]


def place() -> tuple[int, int]:
    """(rank, world size) as the launcher set them, (0, 1) without a launcher."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def say(text: str) -> None:
    """Print above the progress bar, on rank 0 alone."""
    if place()[0] == 0:
        tqdm.write(text)


def start() -> torch.device:
    """Join the other processes, if any; the device of this one.

    Raises:
        RuntimeError: the launcher's address cannot be reached, or its port is taken.
    """
    alone = "RANK" not in os.environ
    if alone:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(free_port())
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
            deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timedelta(minutes=10))
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
    traceback.print_exception(kind, error, trace)
    lost = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in ("connection", "peer"))
    why = "lost another rank, whose own error, if it had time to say one, stands elsewhere" if lost else str(error)
    print(
        f"rank {dist.get_rank()} of {dist.get_world_size()} ends, and the run with it: {why}. "
        "Checkpoints written so far are whole: continue with --resume",
        file=sys.stderr,
        flush=True,
    )
    sys.stdout.flush()
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
        dist.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    dist.destroy_process_group()
    sys.exit(code)


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


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


class Preemption:
    """Inside `with`, `requested` becomes true at SIGTERM or SIGINT, so that the loop may save and leave.

    A second signal kills. In another thread than the main one, which Python gives no signals, nothing is heard.
    """

    def __init__(self) -> None:
        self.requested = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(number, signal.SIG_DFL)
