"""A run that is stopped, killed, or loses its disk continues to the very weights it would have reached."""

from __future__ import annotations

import resource
import signal

import pytest
import safetensors.torch
import torch
from sedd_train import checkpoint, load

RUNS = [("python", 1, 1), ("deepspeed", 2, 2), ("deepspeed", 2, 3)]
OPTIONS = ("--steps", "24", "--checkpoint-every", "3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("undisturbed")


@pytest.fixture
def undisturbed(folders, train):
    """undisturbed(launcher, ranks, stage): the folder of a run that nothing happened to."""

    def _undisturbed(launcher="python", ranks=1, stage=1):
        folder = folders / f"{launcher}-{ranks}-{stage}"
        if not folder.exists():
            train(folder, *OPTIONS, "--zero-stage", stage, launcher=launcher, ranks=ranks)
        return folder

    return _undisturbed


def same_weights(one, other):
    for file in ("export/model.safetensors", "checkpoints/step-00000024/training.safetensors"):
        left, right = (safetensors.torch.load_file(run / file) for run in (one, other))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left), file


def test_same_seed_same_weights(undisturbed, train, losses, tmp_path):
    train(tmp_path / "again", *OPTIONS)
    same_weights(undisturbed(), tmp_path / "again")
    assert losses(undisturbed()) == losses(tmp_path / "again")
    train(tmp_path / "other", *OPTIONS, "--seed", "1")
    assert losses(undisturbed()) != losses(tmp_path / "other")


@pytest.mark.parametrize(("launcher", "ranks", "stage"), RUNS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["preempted", "killed"])
def test_stopped_at_a_step(number, launcher, ranks, stage, start, train, undisturbed, losses, tmp_path):
    how = {"launcher": launcher, "ranks": ranks}
    run, log = tmp_path / "run", tmp_path / "run" / "log.jsonl"
    with start(run, *OPTIONS, "--zero-stage", stage, **how) as process:
        process.wait_until(lambda: log.exists() and log.read_text().count('"train"') >= 5)
        process.signal(number)
        process.output()
    assert checkpoint.find(run / "checkpoints") is not None
    assert not (run / "export").exists()
    train(run, "--resume", **how)
    same_weights(undisturbed(launcher, ranks, stage), run)
    assert losses(run) == losses(undisturbed(launcher, ranks, stage))  # every digit


def test_full_disk(start, train, undisturbed, tmp_path):
    run = tmp_path / "run"
    first = run / "checkpoints" / "latest"
    with start(run, *OPTIONS) as process:
        process.wait_until(first.exists)
        resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, (1 << 15, resource.RLIM_INFINITY))
        printed = process.output()
        assert process.process.returncode == 1
    assert "could not be written" in printed
    assert "--resume" in printed
    last = checkpoint.find(run / "checkpoints")
    assert last is not None
    assert str(last) in printed
    assert load(last).net.num_states == 301
    assert not list((run / "checkpoints").glob(".*")), "half-written files are left"
    train(run, "--resume")
    same_weights(undisturbed(), run)


@pytest.mark.parametrize("file", ["training.safetensors", "model.safetensors", "manifest.json", "config.json"])
def test_torn_checkpoint_is_refused_and_the_one_before_used(file, undisturbed, tmp_path):
    import shutil

    run = shutil.copytree(undisturbed() / "checkpoints", tmp_path / "checkpoints")
    torn = run / "step-00000024" / file
    torn.write_bytes(torn.read_bytes()[:-7])
    with pytest.warns(UserWarning, match=f"step-00000024.*{'incomplete' if file == 'manifest.json' else file}"):
        assert checkpoint.find(run) == run / "step-00000021"
    with pytest.raises(checkpoint.CheckpointError, match="step-00000024"):
        checkpoint.read(run / "step-00000024")


def test_resume_with_other_ranks(undisturbed, start, train, losses, tmp_path):
    """From one rank without ZeRO to two with: not bit for bit, but the same run."""
    run, log = tmp_path / "run", tmp_path / "run" / "log.jsonl"
    with start(run, *OPTIONS) as process:
        process.wait_until(lambda: log.exists() and log.read_text().count('"train"') >= 4)
        process.signal(signal.SIGTERM)
        process.output()
    train(run, "--resume", "--zero-stage", "2", launcher="deepspeed", ranks=2)
    for step, line in losses(undisturbed()).items():
        assert losses(run)[step][0] == pytest.approx(line[0], rel=1e-5)


def test_resuming_needs_the_same_run(undisturbed, train, text, tmp_path):
    assert "was started with" in train(undisturbed(), "--resume", "--width", "64", code=2)
    assert "--resume" in train(undisturbed(), *OPTIONS, code=2)
    assert "no run to continue" in train(tmp_path / "none", "--resume", code=2)
