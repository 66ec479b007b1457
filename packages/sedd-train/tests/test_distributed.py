"""Joining the other processes and leaving them, with the others made up: addresses, time limits, words, exit codes."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from sedd_train import distributed, launchers

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")


@pytest.fixture
def outside(monkeypatch):
    """No launcher, and an environment that is put back."""
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name not in PLACE})
    return monkeypatch


@pytest.fixture
def others(outside):
    """others(rank, told): this process as that rank of a world of which `told` has what each gives, in turn."""
    outside.setattr(distributed, "_patient", distributed._patient.__wrapped__)  # keeps no group

    def world(rank: int, *told: list[Any]) -> list[Any]:
        given: list[Any] = []
        turns = list(told)

        def gather(into, own, *, group):
            given.append((own, group))
            into[:] = turns.pop(0)

        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(len(told[0]))}
        outside.setattr(distributed, "start", lambda: given.append("started"))
        outside.setattr(dist, "new_group", lambda **how: how)
        outside.setattr(dist, "all_gather_object", gather)
        outside.setattr("sedd_train.distributed.socket.gethostname", lambda: "b")
        return given

    return world


PATIENT = {"backend": "gloo", "timeout": timedelta(days=7)}


def test_the_first_process_of_a_machine_does_the_work_of_all(others):
    """Ranks 0 and 3 are of machine a, 1 and 2 of b, where rank 1 leads."""
    hosts = [("a", "it"), ("b", "it"), ("b", "it"), ("a", "it")]
    told = [("made a", ""), ("made b", ""), ("", ""), ("", "")]
    done: list[int] = []

    def work() -> str:
        done.append(1)
        return "made b"

    given = others(1, hosts, told)
    assert distributed.by_leader(work, "it") == "made b"
    assert given == ["started", (("b", "it"), PATIENT), (("made b", ""), PATIENT)]
    assert done == [1]
    given = others(2, hosts, told)
    assert distributed.by_leader(work, "it") == "made b"
    assert given[1:] == [(("b", "it"), PATIENT), (("", ""), PATIENT)]
    assert done == [1]


def test_what_fails_at_the_leader_fails_at_all_of_its_machine(others):
    def broken() -> str:
        raise OSError("no disk")

    def silent() -> str:
        raise ValueError

    hosts = [("a", "it"), ("b", "it"), ("b", "it")]
    for rank, work, failure in ((1, broken, "no disk"), (1, silent, "ValueError()"), (2, broken, "no disk")):
        given = others(rank, hosts, [("fine", ""), ("", failure), ("", "")])
        with pytest.raises(ValueError, match=failure.replace("(", r"\(").replace(")", r"\)")):
            distributed.by_leader(work, "it")
        assert given[-1][0] == ("", failure if rank == 1 else "")

    def wrong() -> str:
        raise KeyError("not foreseen")

    others(1, hosts)
    with pytest.raises(KeyError):
        distributed.by_leader(wrong, "it")


def test_a_process_that_was_asked_for_something_else_is_told(others):
    others(2, [("a", "it"), ("b", "it"), ("b", "other")], [("", ""), ("made", ""), ("", "")])
    with pytest.raises(ValueError, match=r"^was started with other, and rank 1 with it$"):
        distributed.by_leader(str, "other")
    others(2, [("b", "it"), ("a", "it"), ("b", "it")], [("made", ""), ("", ""), ("", "")])
    assert distributed.by_leader(str, "it") == "made"


def test_one_process_asks_nobody(outside):
    assert distributed.by_leader(lambda: "made", "it") == "made"


# Starting


@pytest.fixture
def starting(outside):
    """What `start` does, without doing it; `asked` is what DeepSpeed was told."""
    asked: list[Any] = []
    ops = SimpleNamespace(__compatible_ops__={"deepspeed_shm_comm": True})
    deepspeed = SimpleNamespace(ops=ops, init_distributed=lambda **how: asked.append(how))
    state = SimpleNamespace(asked=asked, ops=ops.__compatible_ops__, deepspeed=deepspeed, kept=[])
    outside.setattr(distributed, "_import_deepspeed", lambda: deepspeed)
    outside.setattr(distributed, "keep_memory", lambda: state.kept.append(1))
    outside.setattr(torch, "set_num_threads", lambda count: None)
    outside.setattr(torch.cuda, "is_available", lambda: False)
    outside.setattr(dist, "is_initialized", lambda: False)
    outside.setattr(dist, "get_world_size", lambda: int(os.environ["WORLD_SIZE"]))
    outside.setattr(sys, "excepthook", sys.__excepthook__)
    outside.setattr("sedd_train.distributed.warnings.filterwarnings", lambda *_, **__: None)
    return state


def test_alone_it_is_a_world_of_one_at_any_port(starting):
    assert distributed.start() == torch.device("cpu")
    assert {name: os.environ[name] for name in PLACE} == {
        **{"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},
        "DS_ACCELERATOR": "cpu",
    }
    assert starting.asked == [{"dist_backend": "gloo", "verbose": False, "timeout": timedelta(minutes=10)}]
    assert starting.ops == {"deepspeed_shm_comm": False}
    assert starting.kept == [1]
    assert sys.excepthook is sys.__excepthook__


def test_among_others_on_gpus(starting, outside):
    outside.setattr(torch.cuda, "is_available", lambda: True)
    os.environ |= {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "first", "MASTER_PORT": "29"}
    assert distributed.start() == torch.device("cuda:1")
    assert starting.asked == [{"dist_backend": "nccl", "verbose": False, "timeout": timedelta(minutes=10)}]
    assert (os.environ["MASTER_PORT"], "DS_ACCELERATOR" in os.environ) == ("29", False)
    assert starting.ops == {"deepspeed_shm_comm": True}
    assert starting.kept == []
    assert sys.excepthook is distributed._fail
    outside.setattr(dist, "is_initialized", lambda: True)
    distributed.start()  # once is enough
    assert len(starting.asked) == 1


@pytest.mark.parametrize("error", [dist.DistNetworkError, dist.DistStoreError])
def test_processes_that_do_not_find_each_other_say_where_they_looked(error, starting):
    def lost(**how):
        raise error("timed out")

    starting.deepspeed.init_distributed = lost
    os.environ |= {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "first", "MASTER_PORT": "29"}
    told = r"the 4 processes did not find each other at first:29 \(.*timed out.*\); .* choose one with --master_port"
    with pytest.raises(RuntimeError, match=told):
        distributed.start()


# Leaving


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (RuntimeError("Connection closed by peer"), "lost another rank, whose own error"),
        (RuntimeError("[..] Connection reset"), "lost another rank, whose own error"),
        (RuntimeError("broken PEER"), "lost another rank, whose own error"),
        (RuntimeError("writev [127.0.0.1]:5: Broken pipe"), "lost another rank, whose own error"),
        (RuntimeError("due to a network error or a remote process exiting"), "lost another rank, whose own error"),
        (RuntimeError("out of memory"), "ends, and the run with it: out of memory. Checkpoints"),
        (ValueError("a connection is none"), "ends, and the run with it: a connection is none. Checkpoints"),
    ],
)
def test_the_last_words_of_a_rank(error, why, monkeypatch, capsys):
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    monkeypatch.setattr(dist, "get_rank", lambda: 2)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    distributed._fail(type(error), error, None)
    said = capsys.readouterr().err
    assert "rank 2 of 4 ends, and the run with it: " in said
    assert why in said
    assert "Checkpoints written so far are whole: continue with --resume" in said
    assert said.startswith(type(error).__name__)  # the whole error, first
    assert left == [1]


def test_a_rank_leaves_where_nobody_reads_its_last_words(monkeypatch):
    def gone(*_):
        raise BrokenPipeError

    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    monkeypatch.setattr("sedd_train.distributed.traceback.print_exception", gone)
    with pytest.raises(BrokenPipeError):  # but for the exit
        distributed._fail(ValueError, ValueError("wrong"), None)
    assert left == [1]


def test_memory_is_kept_by_the_c_library_s_own_names(monkeypatch):
    """M_MMAP_MAX = -4 and M_TRIM_THRESHOLD = -1 of malloc.h: nothing by mmap, and nothing given back."""
    told: list[tuple[int, int]] = []
    glibc = SimpleNamespace(mallopt=lambda *given: told.append(given), gnu_get_libc_version=None)
    monkeypatch.setattr("sedd_train.distributed.ctypes.CDLL", lambda name: glibc if name is None else None)
    monkeypatch.setattr(sys, "platform", "darwin")
    distributed.keep_memory()
    assert told == []
    monkeypatch.setattr(sys, "platform", "linux")
    distributed.keep_memory()
    assert sorted(told) == [(-4, 0), (-1, -1)]
    del glibc.gnu_get_libc_version
    distributed.keep_memory()
    assert len(told) == 2


# Who looks after a process


class Process:
    """One of a family: torchrun or deepspeed's inner launcher, whose own parent is deepspeed."""

    words = ("python", "-m", "deepspeed.launcher.launch", "x")

    def __init__(self, pid: int) -> None:
        assert pid == 77
        self.pid = pid

    def cmdline(self) -> list[str]:
        return list(self.words)

    def ppid(self) -> int:
        return 66


def test_deepspeed_s_launcher_is_two_processes(monkeypatch):
    monkeypatch.setattr(os, "getppid", lambda: 77)
    monkeypatch.setattr(psutil, "Process", Process)
    assert launchers._launcher() == [77, 66]
    monkeypatch.setattr(Process, "words", ("torchrun", "deepspeed"))
    assert launchers._launcher() == [77]

    def gone(pid):
        raise psutil.NoSuchProcess(pid)

    monkeypatch.setattr(psutil, "Process", gone)
    assert launchers._launcher() == []


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        (
            {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"},
            ("1", "4", "1", "127.0.0.1", "20000"),
        ),
        (
            {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "20007"}
            | {"SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7", "SLURM_STEP_NUM_NODES": "2"},
            ("1", "2", "1", "10.0.0.7", "20007"),
        ),
        (
            {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
            | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "first"},
            ("3", "4", "1", "first", "20000"),
        ),
    ],
)
def test_places_of_further_launchers(variables, place, outside):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    outside.setattr(os, "environ", dict(variables))
    launchers.adopt()
    assert tuple(os.environ[name] for name in names) == place
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in variables:  # two of four are here: the first is elsewhere
        outside.setattr(os, "environ", {name: value for name, value in variables.items() if name != "MASTER_ADDR"})
        with pytest.raises(ValueError, match=r"mpirun \(Open MPI\) started 4 processes"):
            launchers.adopt()
