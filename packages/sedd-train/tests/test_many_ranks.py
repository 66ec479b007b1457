"""The long evidence: every stage, precision and number of ranks trains the same run, and twenty kills leave no trace.

All of it is marked slow; the suites beside it hold quick versions.
"""

from __future__ import annotations

import random
import signal
import time
from typing import Any

import pytest
import safetensors.torch
import torch
from sedd_train import checkpoint

pytestmark = pytest.mark.slow

TINY = (
    *("--recipe", "tiny", "--network", "sedd", "--optimizer", "adamw", "--zero-stage", "1"),
    *("--learning-rate", "1.5e-3"),
    *("--steps", "50", "--warmup", "10", "--log-every", "1", "--evaluate-blocks", "2"),
    *("--evaluate-times", "2", "--sample-steps", "2", "--evaluate-every", "1000"),
)
RESUMED = ("--steps", "24", "--checkpoint-every", "8")


LONG = 900  # seconds, also where other work shares the cores


def how(count: int) -> dict[str, Any]:
    return {"launcher": "deepspeed" if count > 1 else "python", "ranks": count}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("references")


@pytest.fixture
def reference(folders, train, losses):
    """The losses of one process in float32."""
    if not (folders / "tiny").exists():
        train(folders / "tiny", "--zero-stage", "1", base=TINY, seconds=LONG)
    return losses(folders / "tiny")


@pytest.mark.parametrize(("stage", "ranks"), [(1, 1), (0, 2), (1, 2), (2, 2), (3, 2)])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_fifty_steps(precision, tolerance, stage, ranks, reference, train, losses, tmp_path):
    train(tmp_path / "run", "--zero-stage", stage, "--precision", precision, base=TINY, seconds=LONG, **how(ranks))
    found = losses(tmp_path / "run")
    assert found.keys() == reference.keys() == set(range(1, 51))
    worst = max(abs(found[step][0] / reference[step][0] - 1) for step in reference)
    print(f"{precision}, stage {stage}, {ranks} ranks: losses of 50 steps differ by {worst:.2g} at most")
    assert worst <= tolerance


def test_the_small_recipe_gives_the_same_bits_twice(train, losses, tmp_path):
    """Its own network, tokens and optimizers, by the command; and another seed gives others."""
    base = ("--recipe", "tiny", *TINY[TINY.index("--warmup") :], "--steps", "12", "--no-tensorboard")
    for name, more in (("one", []), ("two", []), ("other", ["--seed", "1"])):
        train(tmp_path / name, *more, base=base, seconds=LONG)
    for file in ("export/model.safetensors", "export/config.json", "checkpoints/step-00000012/training.safetensors"):
        one, two = ((tmp_path / name / file).read_bytes() for name in ("one", "two"))
        assert one == two, file
    assert losses(tmp_path / "one") == losses(tmp_path / "two") != losses(tmp_path / "other")


def test_four_ranks_under_torchrun(reference, train, losses, tmp_path):
    train(tmp_path / "run", base=TINY, seconds=LONG, launcher="torchrun", ranks=4)
    found = losses(tmp_path / "run")
    assert found.keys() == reference.keys()
    assert max(abs(found[step][0] / reference[step][0] - 1) for step in reference) <= 1e-5


@pytest.mark.parametrize(("before", "stage"), [(2, 2), (2, 3)])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["preempted", "killed"])
def test_stopped_ranks_continue_digit_for_digit(number, before, stage, start, train, losses, tmp_path):
    options = (*RESUMED, "--zero-stage", str(stage))
    train(tmp_path / "undisturbed", *options, seconds=LONG, **how(before))
    run, log = tmp_path / "run", tmp_path / "run" / "log.jsonl"
    with start(run, *options, **how(before), held=(18, tmp_path / "go")) as process:
        process.wait_until(lambda: (run / "checkpoints" / "latest").exists() and log.read_text().count('"train"') >= 9)
        process.signal(number)
        (tmp_path / "go").touch()
        process.output()
    assert not (run / "export").exists()
    train(run, "--resume", "--zero-stage", stage, seconds=LONG, **how(before))
    assert losses(run) == losses(tmp_path / "undisturbed")
    for file in ("export/model.safetensors", "checkpoints/step-00000024/training.safetensors"):
        left, right = (safetensors.torch.load_file(folder / file) for folder in (tmp_path / "undisturbed", run))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left), file


@pytest.mark.parametrize("stage", [1, 3])
def test_compiled(stage, reference, start, losses, tmp_path):
    """Needs a C++ compiler on a CPU."""
    options = ("--zero-stage", str(stage), "--compile")
    with start(tmp_path / "run", *options, base=TINY, **how(2)) as process:
        printed = process.output(seconds=LONG)
        assert process.process.returncode == 0, printed[-2000:]
    found = losses(tmp_path / "run")
    worst = max(abs(found[step][0] / reference[step][0] - 1) for step in reference)
    print(f"compiled, stage {stage}: losses of 50 steps differ by {worst:.2g} at most")
    assert worst <= 1e-4


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_resumed_with_other_ranks(before, after, stage, folders, start, train, losses, tmp_path):
    if not (folders / "resumed").exists():
        train(folders / "resumed", *RESUMED, seconds=LONG)
    run, options = tmp_path / "run", (*RESUMED, "--zero-stage", str(stage))
    with start(run, *options, **how(before), held=(18, tmp_path / "go")) as process:
        process.wait_until((run / "checkpoints" / "step-00000008").exists)
        process.signal(signal.SIGKILL)
        process.output()
    found_there = checkpoint.find(run / "checkpoints")
    assert found_there is not None
    done = checkpoint.read(found_there).step
    assert done < 24
    train(run, "--resume", "--zero-stage", stage, seconds=LONG, **how(after))
    undisturbed, found = losses(folders / "resumed"), losses(run)
    assert found.keys() == undisturbed.keys()
    worst = max(abs(found[step][0] / undisturbed[step][0] - 1) for step in undisturbed)
    print(f"stage {stage}, {before} -> {after} ranks at step {done}: losses differ by {worst:.2g} at most")
    assert worst <= 1e-5


def test_twenty_kills_at_random_moments(start, tmp_path):
    """SIGKILL to every process at once, at any moment of starting, training and saving; at the end the same weights."""
    options = ("--steps", "64", "--checkpoint-every", "1", "--zero-stage", "2")
    again = ("--resume", "--zero-stage", "2")
    with start(tmp_path / "undisturbed", *options, **how(2)) as process:
        process.output(seconds=LONG)
        assert process.process.returncode == 0
    run, log = tmp_path / "run", tmp_path / "run" / "log.jsonl"
    moments, while_saving, while_starting = random.Random(0), 0, 0
    for kill in range(20):
        before = set(run.glob("checkpoints/.step-*"))  # by the kill before
        begun = again if list(run.glob("checkpoints/step-*")) else options
        with start(run, *begun, **how(2), held=(3, tmp_path / "never")) as process:  # three steps a kill at most
            moment = moments.random()
            if moment < 0.15:  # starting, loading
                delay = moments.uniform(1, 8)
            elif moment < 0.5:  # training, and what comes
                lines = log.read_text().count("\n") if log.exists() else 0
                process.wait_until(lambda lines=lines: log.exists() and log.read_text().count("\n") > lines + 1)
                delay = moments.uniform(0, 0.3)
            else:  # saving
                process.wait_until(lambda before=before: set(run.glob("checkpoints/.step-*")) - before)
                delay = moments.uniform(0, 0.05)
            until = time.monotonic() + delay
            process.wait_until(lambda until=until: time.monotonic() > until)
            assert process.process.poll() is None, f"the run was over before kill {kill}"
            process.signal(signal.SIGKILL)
            process.output()
        while_saving += bool(set(run.glob("checkpoints/.step-*")) - before)
        found = checkpoint.find(run / "checkpoints") if run.exists() else None
        while_starting += found is None
    with start(run, *again, **how(2)) as process:
        process.output(seconds=LONG)
        assert process.process.returncode == 0
    print(f"20 kills, {while_saving} of them while saving, {while_starting} before the first checkpoint")
    assert while_saving >= 5
    for file in ("export/model.safetensors", "checkpoints/step-00000064/training.safetensors"):
        left, right = (safetensors.torch.load_file(folder / file) for folder in (tmp_path / "undisturbed", run))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left), file
    assert not list(run.glob("checkpoints/.step-*")), "half-written checkpoints are left"
