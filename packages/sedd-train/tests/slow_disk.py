"""A program for two ranks, the first of which takes longer to write a checkpoint than the ranks' timeout.

Arguments: the recipe's file, the folder of the run, and the cache of tokens. It prints what the second rank kept of the
weights while it waited.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from sedd_train import checkpoint, distributed, recipes, train, zero_shards

source, output, cache = [given for given in sys.argv[1:] if not given.startswith("--")]  # a launcher adds its own
SECONDS = 20  # of the ranks' timeout
publish, gather = checkpoint._publish, zero_shards.gather
kept: list[int] = []


def slowly(*given: Any) -> None:
    """As on a slow disk."""
    time.sleep(SECONDS + 5)
    publish(*given)


def counted(*given: Any, keep: Any = None, **how: Any) -> dict[str, torch.Tensor]:
    """How many tensors a rank has for a checkpoint."""
    found = gather(*given, keep=keep, **how)
    kept.append(len(found))
    return found


with (
    mock.patch.object(distributed, "TIMEOUT", timedelta(seconds=SECONDS)),
    mock.patch.object(checkpoint, "_publish", slowly),
    mock.patch.object(zero_shards, "gather", counted),
):
    recipe = recipes.for_run(Path(output), source, {}, resume=False)
    done = train(recipe, output=output, cache=cache, tensorboard=False)
rank, _ = distributed.place()
Path(output, f"rank-{rank}.json").write_text(json.dumps([done.step, kept]))
distributed.finish()
