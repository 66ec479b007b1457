"""The training script, which waits at a step until a file is there: what a test does to it comes before its end.

HELD_AT is the number of steps that it takes before, HELD_UNTIL the file.
"""

from __future__ import annotations

import os
import runpy
import time
from pathlib import Path
from typing import Any
from unittest import mock

from sedd_train.engine import launch_step

TRAIN = Path(__file__).parents[3] / "integration" / "train_owt.py"


def hold(steps: int, until: Path | None = None) -> None:
    """Runs of this process and its children take so many steps and wait, for a file or, without one, to be killed."""
    taken = 0

    def counted(*args: Any, **given: Any) -> Any:
        nonlocal taken
        while taken == steps and not (until and until.exists()):
            time.sleep(0.01)
        taken += 1
        return launch_step(*args, **given)

    mock.patch("sedd_train.training.launch_step", counted).start()


if __name__ == "__main__":
    hold(int(os.environ["HELD_AT"]), Path(os.environ["HELD_UNTIL"]))
    runpy.run_path(str(TRAIN), run_name="__main__")
