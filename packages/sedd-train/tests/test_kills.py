"""SIGKILL while a run saves, and while it goes on: nothing is lost, to the last bit of the weights at its end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from sedd_train import checkpoint, recipes

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["saving", "resuming", "saving-shards"])
def test_twenty_kills(moment, text, cache, values, losses, port, tmp_path):
    """Of one process or, where two write shards under ZeRO 3, of one of them."""
    more = {"zero_stage": 3} if moment == "saving-shards" else {}
    recipe = recipes.override(
        recipes.read_recipe("tiny"), values | {"corpus": str(text), "steps": 60, "checkpoint_every": 1} | more
    )
    (tmp_path / "recipe.toml").write_text(recipes.to_toml(recipe))
    done = subprocess.run(
        [
            *(sys.executable, str(Path(__file__).with_name("killed.py"))),
            *(str(tmp_path / "recipe.toml"), str(tmp_path), str(cache), moment, "20"),
        ],
        env={name: value for name, value in os.environ.items() if name not in PLACE}
        | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "MASTER_PORT": str(port())},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    print(f"{told['met']} of {told['tries']} kills came while {moment}")
    assert told["met"] == 20
    assert told["left"] == 0, "half-written checkpoints are left"
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    assert losses(run) == losses(undisturbed)
    last = "checkpoints/step-00000060"
    left, right = (safetensors.torch.load_file(folder / "export/model.safetensors") for folder in (undisturbed, run))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    before, after = (checkpoint.read(folder / last) for folder in (undisturbed, run))
    assert len(list((run / last).glob("training*"))) == (2 if moment == "saving-shards" else 1)
    for one, other in [
        *((before.weights, after.weights), (before.average, after.average)),
        *((before.moments[moment], after.moments[moment]) for moment in ("exp_avg", "exp_avg_sq")),
    ]:
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
