"""A program for two ranks: runs of one recipe, one after another in the same processes, which is quicker by far.

Arguments: the recipe's file, the folder of the runs, and the cache of tokens. `test_ranks.py` reads what it leaves:
`stage-1` to `stage-3`, undisturbed; `left-2` and `left-3`, left at a signal that only the second rank gets at its fifth
step, and continued; and `other`, begun by one process without ZeRO and continued by two with it.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from sedd_train import Result, distributed, recipes, train
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
    with mock.patch("sedd_train.training.launch_step", counted):
        return train(recipe, output=folder / name, resume=resume, cache=cache, tensorboard=False)


def left(stage: int) -> None:
    """A run left at its sixth step, and continued."""
    name = f"left-{stage}"
    assert run(name, zero_stage=stage, checkpoint_every=1000, signal_at=5).stopped
    assert (folder / name / "checkpoints" / "step-00000006").is_dir()
    assert not (folder / name / "export").exists()
    assert not run(name, resume=True, checkpoint_every=1000).stopped


for stage in (1, 2, 3):
    run(f"stage-{stage}", zero_stage=stage)
for stage in (2, 3):
    left(stage)
run("other", resume=True, zero_stage=2)
distributed.finish()
