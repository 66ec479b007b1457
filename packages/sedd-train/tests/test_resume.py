"""A run that is stopped, killed, or loses its disk continues to the very weights it would have reached."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from sedd_train import checkpoint, load

pytestmark = pytest.mark.filterwarnings("default")  # DeepSpeed warns
VALUES = {"steps": 24, "checkpoint_every": 3}
HELD = 12  # the step at which runs wait, so that what stops them comes before their end
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def beginner():
    """The process that begins runs."""
    script = str(Path(__file__).with_name("runs_that_are_stopped.py"))
    outside = {name: value for name, value in os.environ.items() if name not in PLACE}
    with subprocess.Popen(
        [sys.executable, script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=outside | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"},
    ) as process:
        yield process
        process.kill()


class Begun:
    """A run that is under way in a process of its own."""

    def __init__(self, beginner: subprocess.Popen[str], options: list[str], printed: Path) -> None:
        self.beginner, self.printed = beginner, printed
        assert beginner.stdin is not None
        print(json.dumps([options, str(printed), HELD]), file=beginner.stdin, flush=True)
        self.number = self._answer()

    def _answer(self) -> int:
        assert self.beginner.stdout is not None
        return int(self.beginner.stdout.readline())

    def wait_until(self, condition, seconds: float = 120) -> None:
        """Wait for something that it does, such as a file it writes."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                os.killpg(self.number, signal.SIGKILL)
            try:
                os.kill(self.number, 0)
            except ProcessLookupError:
                raise AssertionError(
                    f"the run ended or hung before that:\n{self.printed.read_text()[-3000:]}"
                ) from None
            time.sleep(0.02)

    def exit_code(self) -> int:
        """Lets it go on, and waits for its end."""
        Path(f"{self.printed}.go").touch()
        return self._answer()


@pytest.fixture
def begin(beginner, text, cache, small, tmp_path):
    """begin(output, **values): a run of the small network on `text` in a process of its own."""

    def _begin(output: Path, **values: object) -> Begun:
        where = {"corpus": text, "output": output, "cache": cache} | values
        options = [f"--{name.replace('_', '-')}={value}" for name, value in where.items()]
        return Begun(beginner, [*small, *options], tmp_path / "printed")

    return _begin


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("undisturbed")


@pytest.fixture
def undisturbed(folders, here):
    """The folder of a run in this process that nothing happened to."""
    if not (folders / "run").exists():
        here(folders / "run", **VALUES)
    return folders / "run"


def same_weights(one, other):
    for file in ("export/model.safetensors", "checkpoints/step-00000024/training.safetensors"):
        left, right = (safetensors.torch.load_file(run / file) for run in (one, other))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left), file


def test_same_seed_same_weights(undisturbed, here, losses, tmp_path):
    here(tmp_path / "again", **VALUES)
    same_weights(undisturbed, tmp_path / "again")
    assert losses(undisturbed) == losses(tmp_path / "again")
    here(tmp_path / "other", **VALUES, seed=1)
    assert losses(undisturbed) != losses(tmp_path / "other")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["preempted", "killed"])
def test_stopped_at_a_step(number, begin, here, undisturbed, losses, tmp_path):
    """A process of its own is stopped, and this one continues: every digit, across processes too.

    A signal that can be heard ends in a checkpoint of the step then done, though the next was due much later.
    """
    heard = number == signal.SIGTERM
    run, log = tmp_path / "run", tmp_path / "run" / "log.jsonl"
    process = begin(run, **(VALUES | {"checkpoint_every": 1000} if heard else VALUES))
    process.wait_until(lambda: log.exists() and log.read_text().count('"train"') >= 5)
    os.killpg(process.number, number)
    assert process.exit_code() == (0 if heard else -signal.SIGKILL), process.printed.read_text()[-3000:]
    found = checkpoint.find(run / "checkpoints")
    assert found is not None
    if heard:
        assert found.name == f"step-{max(losses(run)):08d}"
    assert not (run / "export").exists()
    here(run, resume=True)
    same_weights(undisturbed, run)
    assert losses(run) == losses(undisturbed)


def test_full_disk(begin, here, undisturbed, tmp_path):
    run = tmp_path / "run"
    first = run / "checkpoints" / "latest"
    process = begin(run, **VALUES)
    process.wait_until(first.exists)
    resource.prlimit(process.number, resource.RLIMIT_FSIZE, (1 << 15, resource.RLIM_INFINITY))
    assert process.exit_code() == 1
    printed = process.printed.read_text()
    assert "could not be written" in printed
    assert "--resume" in printed
    last = checkpoint.find(run / "checkpoints")
    assert last is not None
    assert str(last) in printed
    assert load(last).net.num_states == 301
    assert not list((run / "checkpoints").glob(".*")), "half-written files are left"
    here(run, resume=True)
    same_weights(undisturbed, run)


@pytest.mark.parametrize("file", ["training.safetensors", "model.safetensors", "manifest.json", "config.json"])
def test_torn_checkpoint_is_refused_and_the_one_before_used(file, undisturbed, tmp_path):
    run = shutil.copytree(undisturbed / "checkpoints", tmp_path / "checkpoints")
    torn = run / "step-00000024" / file
    torn.write_bytes(torn.read_bytes()[:-7])
    with pytest.warns(UserWarning, match=f"step-00000024.*{'incomplete' if file == 'manifest.json' else file}"):
        assert checkpoint.find(run) == run / "step-00000021"
    with pytest.raises(checkpoint.CheckpointError, match="step-00000024"):
        checkpoint.read(run / "step-00000024")


def test_resuming_needs_the_same_run(undisturbed, here, tmp_path):
    with pytest.raises(ValueError, match="was started with"):
        here(undisturbed, resume=True, width=64)
    with pytest.raises(ValueError, match="--resume"):
        here(undisturbed, **VALUES)
    with pytest.raises(ValueError, match="no run to continue"):
        here(tmp_path / "none", resume=True)
