"""A checkpoint that takes longer to write than ranks wait for each other elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sedd_train import checkpoint, recipes

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.slow
def test_the_others_wait_for_as_long_as_the_first_writes(text, cache, values, tmp_path):
    """Two ranks of ZeRO 2, a timeout of 20 s, a save of 25 s; only the rank that writes holds what is written."""
    given = values | {"corpus": str(text), "steps": 1, "zero_stage": 2}
    recipe = recipes.override(recipes.read_recipe("tiny"), given)
    (tmp_path / "recipe.toml").write_text(recipes.to_toml(recipe))
    torchrun = [Path(sys.executable).parent / "torchrun", "--standalone", "--nproc_per_node", "2"]
    program = Path(__file__).with_name("slow_disk.py")
    done = subprocess.run(
        [str(part) for part in (*torchrun, program, tmp_path / "recipe.toml", tmp_path / "run", cache)],
        capture_output=True,
        text=True,
        timeout=400,
        env={name: value for name, value in os.environ.items() if name not in PLACE} | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    found = checkpoint.find(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert checkpoint.read(found).step == 1
    first, second = (json.loads((tmp_path / "run" / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert (first[0], second[0]) == (1, 1)
    # Gathered are the average, to be measured, of all ranks; then weights, two moments and average, to be written, and
    # the average again, to be exported.
    assert all(first[1])
    assert second[1][0] == first[1][0]
    assert second[1][1:] == [0, 0, 0, 0, 0]
