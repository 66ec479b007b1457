"""A program for two ranks: runs of one recipe, one after another in the same processes, which is quicker by far.

Arguments: the recipe's file, the folder of the runs, and the cache of tokens. `test_ranks.py` reads what it leaves:
`stage-1` to `stage-3`, undisturbed, of which the first has its pictures; `left-2` and `left-3`, left at a signal that
only the second rank gets at its fifth step, and continued, the latter in shards; `handed-one` and `handed-shards`,
which go on under ZeRO 1 from the sixth step of `stage-3` and `left-3`; `other`, begun by one process without ZeRO and
continued by two with it; and `trouble.json`, of what goes wrong: the errors of runs that cannot begin, and what becomes
of steps whose loss is not finite on one rank, in every ZeRO stage.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import two_ranks_in_trouble
from sedd_train import Result, TrainingError, distributed, recipes, sharding, train
from sedd_train.engine import launch_step

source, runs, cache = [given for given in sys.argv[1:] if not given.startswith("--")]  # a launcher adds its own
folder = Path(runs)


def run(name: str, *, resume: bool = False, signal_at: int = 0, **values: Any) -> Result:
    """Train into a folder of this name; the second rank is sent SIGTERM at a step."""
    taken = 0

    def counted(*args: Any, **given: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == signal_at and distributed.place()[0] == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return launch_step(*args, **given)

    recipe = recipes.for_run(folder / name, source, values, resume=resume)
    with ExitStack() as patches:
        patches.enter_context(mock.patch("sedd_train.training.launch_step", counted))
        if name != "stage-1":  # pictures take longer than a run
            patches.enter_context(mock.patch("sedd_train.report.write", return_value=""))
        return train(recipe, output=folder / name, resume=resume, cache=cache, tensorboard=False)


def left(stage: int, *, full: bool = False) -> None:
    """A run left at its sixth step, and continued; on a disk that is full at first, if wished."""
    name = f"left-{stage}"
    assert run(name, zero_stage=stage, checkpoint_every=1000, signal_at=5).stopped
    assert (folder / name / "checkpoints" / "step-00000006").is_dir()
    assert not (folder / name / "export").exists()
    if full:
        told = on_a_full_disk(name)
        assert "step 8 could not be written" in told
        assert "rank 1: " in told
        assert "rank 0" not in told
        assert "The last good one is" in told
        assert "step-00000006" in told
        found = sorted(path.name for path in (folder / name / "checkpoints").iterdir())
        assert found == ["latest", "step-00000006"], found
    assert not run(name, resume=True, checkpoint_every=1000).stopped


def on_a_full_disk(name: str) -> str:
    """What each rank is told of a run that goes on where the second one has room for a few kilobytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if distributed.place()[0] == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 13, limits[1]))
    try:
        run(name, resume=True, checkpoint_every=2)
    except TrainingError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    raise AssertionError("a checkpoint was written without room for it")


def handed_on(name: str, source: str) -> None:
    """A run that goes on, under ZeRO 1, from the sixth step of another."""
    if distributed.place()[0] == 0:
        shutil.copytree(folder / source / "checkpoints" / "step-00000006", folder / name / "checkpoints/step-00000006")
        shutil.copy(folder / source / "recipe.toml", folder / name)
    distributed.tell("copied")
    run(name, resume=True, zero_stage=1, checkpoint_every=1000)


said = two_ranks_in_trouble.errors(source, runs, cache)
for stage in (1, 2, 3):
    run(f"stage-{stage}", zero_stage=stage, checkpoint_every=6)
left(2)
handed_on("handed-one", "stage-3")
with mock.patch.object(sharding, "ABOVE", 0):
    left(3, full=True)
    handed_on("handed-shards", "left-3")
run("other", resume=True, zero_stage=2)
found = [two_ranks_in_trouble.steps(stage) for stage in range(4)]
if distributed.place()[0] == 0:
    (folder / "trouble.json").write_text(json.dumps({"said": said, "found": found}))
distributed.finish()
