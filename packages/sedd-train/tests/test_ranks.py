"""Two ranks, any ZeRO stage: the same run as in one process, what it measures included; left, continued, and handed on.

With dropout, to see that this too is a sample's own, whichever rank runs it. AdamW divides a gradient by its size:
where that is a rounding error, so is the step's sign, and weights would part by whole steps. A larger epsilon keeps
such gradients small, so that weights can be compared as closely as losses.

What one process does is done in this one, and what two do by one program (`two_ranks.py`), what goes wrong on one of
them or on both included.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from sedd_train import checkpoint, load, recipes, train
from sedd_train.engine import launch_step

pytestmark = pytest.mark.filterwarnings("default")  # DeepSpeed warns
STEPS = 12
SIXTH, LAST = "checkpoints/step-00000006", f"checkpoints/step-{STEPS:08d}"
KINDS = ("weights", "exp_avg", "exp_avg_sq")
SHARDS = [f"training-0000{number}-of-00002.safetensors" for number in (1, 2)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text, cache, world, values, port):
    """A folder of runs: `alone` and `other` by this process, the rest by two ranks under the deepspeed launcher."""
    folder = tmp_path_factory.mktemp("runs")
    more = {"corpus": str(text), "steps": STEPS, "dropout": 0.1, "eps": 1e-4, "checkpoint_every": 1000}
    recipe = recipes.override(recipes.read_recipe("tiny"), values | more)
    (folder / "recipe.toml").write_text(recipes.to_toml(recipe))
    taken: list[None] = []

    def left(*args, **given):
        taken.append(None)
        if len(taken) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return launch_step(*args, **given)

    with pytest.MonkeyPatch.context() as patch:
        world(patch)
        train(recipe, output=folder / "alone", cache=cache, tensorboard=False)
        patch.setattr("sedd_train.training.launch_step", left)
        without = recipes.override(recipe, {"zero_stage": 0})
        found = train(without, output=folder / "other", cache=cache, tensorboard=False)
    assert (found.step, found.stopped) == (4, True)
    program = Path(__file__).parent / "two_ranks.py"
    launcher = [Path(sys.executable).parent / "deepspeed", "--num_gpus", "2"]
    command = [*launcher, "--master_port", str(port()), program, folder / "recipe.toml", folder, cache]
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    for stage in (1, 2, 3):
        assert f"on 2 x cpu, ZeRO {stage}, fp32" in done.stdout
    return folder


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_train_as_one_process_does(stage, runs, losses, measured):
    one, many = losses(runs / "alone"), losses(runs / f"stage-{stage}")
    assert one.keys() == many.keys() == set(range(1, STEPS + 1))
    for step, (loss, norm, lr) in one.items():
        assert many[step][0] == pytest.approx(loss, rel=1e-5), step
        assert many[step][1] == pytest.approx(norm, rel=1e-3), step
        assert many[step][2] == lr
    weights = [
        safetensors.torch.load_file(runs / run / "export" / "model.safetensors") for run in ("alone", f"stage-{stage}")
    ]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=1e-5)
    assert weights[0]["output_layer.linear.weight"].abs().max() > 1e-3  # where it began at 0: they did train


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_measure_what_one_process_does(stage, runs, measured):
    """Each sequence once, whichever rank it falls to: the bound, its error, and every noise level."""
    one, many = measured(runs / "alone"), measured(runs / f"stage-{stage}")
    assert [line["kind"] for line in one] == [line["kind"] for line in many] == ["levels", "valid"]
    for names, before, after in [
        (("nats_per_token", "standard_error", "t"), one[0], many[0]),
        (("nats_per_token", "standard_error", "perplexity", "bits_per_character"), one[1], many[1]),
    ]:
        for name in names:
            assert after[name] == pytest.approx(before[name], rel=1e-4), name


def test_two_ranks_write_one_report(runs):
    assert json.loads((runs / "stage-1" / "summary.json").read_text())["steps"] == STEPS
    assert {"loss.png", "levels.png", "report.html"} <= {path.name for path in (runs / "stage-1").iterdir()}


def same_state(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same, to the last bit, in whatever files."""
    left, right = checkpoint.read(one), checkpoint.read(other)
    parts = [
        *((left.weights, right.weights), (left.average, right.average)),
        *((left.moments[moment], right.moments[moment]) for moment in ("exp_avg", "exp_avg_sq")),
    ]
    counters = ("step", "adam_steps", "ema_updates", "bound", "loss_scale", "fingerprint")
    return all(left.manifest[name] == right.manifest[name] for name in counters) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in parts
    )


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_that_one_rank_was_asked_to_leave_goes_on_to_the_same_weights(stage, runs, losses):
    """Every digit, in one file and in shards.

    That it saved when it left, and what the second rank's full disk does in between, `two_ranks.py` has seen.
    """
    undisturbed, left = runs / f"stage-{stage}", runs / f"left-{stage}"
    assert losses(left) == losses(undisturbed)
    one, other = (safetensors.torch.load_file(run / "export" / "model.safetensors") for run in (undisturbed, left))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert same_state(undisturbed / LAST, left / LAST)


def test_both_ranks_write_a_shard(runs):
    """Under ZeRO 3 and 1; what they hold together is what one file does, and is read by whoever reads that."""
    for run, sharded in (("stage-3", False), ("left-3", True), ("handed-one", False), ("handed-shards", True)):
        names = sorted(path.name for path in (runs / run / LAST).glob("training*"))
        assert names == (SHARDS if sharded else ["training.safetensors"]), run
    shards = [safetensors.torch.load_file(runs / "left-3" / LAST / name) for name in SHARDS]
    assert not shards[0].keys() & shards[1].keys()
    assert {name.split("/", 1)[1] for name in shards[0]} == {
        name.split("/", 1)[1] for name in shards[0] if "sq" in name
    }
    sizes = [sum(tensor.numel() for tensor in shard.values()) for shard in shards]
    average = sum(tensor.numel() for tensor in checkpoint.read(runs / "left-3" / LAST).average.values())
    assert abs(sizes[0] + average - sizes[1]) < 0.2 * sum(sizes), "one rank writes much more than the other"
    modes = {path.stat().st_mode for path in (runs / "left-3" / LAST).iterdir()}
    assert len(modes) == 1
    assert all(torch.isfinite(p).all() for p in load(runs / "left-3" / LAST).net.parameters())


def test_a_run_goes_on_from_shards_as_from_one_file(runs, here, tmp_path):
    """On two ranks under ZeRO 1, and on one without ZeRO; from the same bits to the same bits."""
    assert same_state(runs / "stage-3" / SIXTH, runs / "left-3" / SIXTH)
    assert same_state(runs / "handed-one" / LAST, runs / "handed-shards" / LAST)
    for run in ("stage-3", "left-3"):
        shutil.copytree(runs / run / SIXTH, tmp_path / run / SIXTH)
        shutil.copy(runs / run / "recipe.toml", tmp_path / run)
        here(tmp_path / run, resume=True, zero_stage=0)
    assert same_state(tmp_path / "stage-3" / LAST, tmp_path / "left-3" / LAST)
    assert sorted(path.name for path in (tmp_path / "left-3" / LAST).glob("training*")) == ["training.safetensors"]


def test_a_shard_that_is_gone_or_torn_is_told(runs, tmp_path):
    for fault, told in ((Path.unlink, "incomplete"), (lambda path: path.write_bytes(b""), SHARDS[1])):
        shutil.copytree(runs / "left-3" / "checkpoints", tmp_path, dirs_exist_ok=True)
        fault(tmp_path / Path(LAST).name / SHARDS[1])
        with pytest.warns(UserWarning, match=rf"{Path(LAST).name}.*{told}"):
            assert checkpoint.find(tmp_path) == tmp_path / Path(SIXTH).name
        with pytest.raises(checkpoint.CheckpointError, match=SHARDS[1]):
            checkpoint.read(tmp_path / Path(LAST).name)
    manifest = json.loads((runs / "left-3" / LAST / "manifest.json").read_text())
    del manifest["files"][SHARDS[0]]
    (tmp_path / Path(LAST).name / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(checkpoint.CheckpointError, match=f"incomplete .{SHARDS[0]} is not in its manifest"):
        checkpoint.read(tmp_path / Path(LAST).name)


def test_a_run_goes_on_with_other_ranks_and_another_stage(runs, losses):
    """From one rank without ZeRO to two with: not bit for bit, but the same run."""
    alone, other = losses(runs / "alone"), losses(runs / "other")
    assert alone.keys() == other.keys()
    for step, line in alone.items():
        assert other[step][0] == pytest.approx(line[0], rel=1e-5)


# What goes wrong


@pytest.fixture(scope="module")
def trouble(runs):
    return json.loads((runs / "trouble.json").read_text())


def test_an_error_of_any_rank_is_said_once_and_by_name(trouble, runs, text):
    both, second, each = trouble["said"]
    assert both.startswith("batch_size = 7 cannot be divided over 2 ranks")
    assert both.count("cannot be divided") == 1
    assert second.startswith("rank 1: was started with corpus 'no/such/folder' in tokenizer 'bpe:300', and rank 0 with")
    assert f"and rank 0 with corpus {str(text)!r}" in second
    assert "rank 0: tokenizer 'bpe:3'" in each
    assert "rank 1: was started with corpus 'no/such/folder'" in each
    assert not (runs / "run" / "log.jsonl").exists()


def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_by_both(trouble):
    """NaN, then infinite, in one of two micro-batches of one of two ranks; and the next step is taken."""
    assert [part["stage"] for part in trouble["found"]] == [0, 1, 2, 3]
    for part in trouble["found"]:
        assert part["applied"] == [True, False, False, True], part
        assert part["bad"] == [[], [5, 7], [5, 7], []], part
        assert "weights: all finite" in part["diagnosis"]
        assert "forward pass: rank 1: vocab_embed is the first that is not finite (100% of its" in part["diagnosis"]
        assert "rank 0:" not in part["diagnosis"]
        assert "2 of 8 with a loss that is not finite, and their noise levels: 5 (t = 0.5000), 7" in part["diagnosis"]
