"""Checkpoints: what was written long ago, in which order things reach the disk, what is kept, what is refused."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from sedd_graphs import Absorbing, LogLinear, Uniform
from sedd_nets import SEDD
from sedd_train import (
    SetupError,
    TrainingError,
    checkpoint,
    load,
    loggers,
    recipes,
    storage,
    token_cache,
    train,
    zero_shards,
)
from sedd_train.corpora import Texts
from sedd_train.objectives import ScoreEntropy

STORED = Path(__file__).parent / "stored"
deepspeed = pytest.mark.filterwarnings("default")  # it warns


# Written by version 0.1.0, before the loop was a function: four of eight steps, and the log of all eight. What was held
# out then, from the last space on, is a file of its own here.


@pytest.fixture
def old(tmp_path, monkeypatch):
    shutil.copytree(STORED, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)  # where its recipe finds its text
    return tmp_path / "run"


def test_an_old_checkpoint_loads(old):
    net, graph, noise, tokenizer = load(old)
    assert (type(net), graph.num_states, tokenizer.decode([1, 2, 0, 26])) == (SEDD, 28, "ab z")
    assert float(noise(torch.ones(1))[0]) == pytest.approx(-math.log(1e-3), rel=1e-3)
    stored = safetensors.torch.load_file(old / "checkpoints" / "step-00000004" / "model.safetensors")
    assert torch.equal(net.vocab_embed.embedding, stored["vocab_embed.embedding"])
    (then,) = [line for line in loggers.read(old / "log.jsonl") if line["kind"] == "valid" and line["step"] == 4]
    assert json.loads((old / "checkpoints/step-00000004/manifest.json").read_text())["bound"] == then["nats_per_token"]


@deepspeed
def test_an_old_run_goes_on_as_it_did_then(old, process, tmp_path):
    """Losses, gradient norms and the held-out bound of its last four steps, dropout included, to five digits."""
    then = loggers.read(old / "log.jsonl")
    train(recipes.for_run(old, "", {}, resume=True), output=old, resume=True, cache=tmp_path, tensorboard=False)
    now = loggers.read(old / "log.jsonl")
    for kind, names in [("train", ("loss", "grad_norm", "lr")), ("valid", ("nats_per_token", "standard_error"))]:
        before, after = ({line["step"]: line for line in lines if line["kind"] == kind} for lines in (then, now))
        assert before.keys() == after.keys() >= {8}
        for step, line in before.items():
            for name in names:
                assert after[step][name] == pytest.approx(line[name], rel=2e-5), (step, name)


# What a config says is taken, and what it does not say is what the paper's own checkpoints mean by that


def published(folder, config, num_states):
    """A checkpoint in the published layout, with weights that are not 0."""
    torch.manual_seed(0)
    net = SEDD(num_states, width=16, depth=1, heads=2, cond_dim=8, dropout=0.0, length=8, scale_by_sigma=False)
    torch.nn.init.normal_(net.output_layer.linear.weight)
    net.save_pretrained(folder, sections=config)
    written = json.loads((folder / "config.json").read_text())
    del written["model"]["scale_by_sigma"]
    (folder / "config.json").write_text(json.dumps(written))
    return net.eval()


class Tokenizer(list[int]):
    """Seven tokens."""

    def get_vocab(self) -> dict[str, int]:
        """By name."""
        return {f"w{token}": token for token in self}


@pytest.mark.parametrize(("kind", "graph"), [("uniform", Uniform(7)), ("absorb", Absorbing(7))])
def test_scaling_is_the_graph_s_where_the_config_does_not_say(kind, graph, tmp_path):
    config = {"graph": {"type": kind}, "noise": {"type": "loglinear"}}
    plain = published(tmp_path, config | {"tokens": 7}, graph.num_states)
    net, *_ = load(tmp_path, tokenizer=Tokenizer(range(7)))
    assert net.scale_by_sigma == (kind == "absorb")
    x, sigma = torch.zeros(1, 8, dtype=torch.int64), torch.tensor([0.7])
    shift = math.log(math.expm1(0.7) * (graph.num_states - 1)) if kind == "absorb" else 0.0
    torch.testing.assert_close(net(x, sigma)[..., 1:], plain(x, sigma)[..., 1:] - shift)


def test_a_schedule_s_numbers_are_those_of_the_config(tmp_path):
    for noise, at_1, at_0 in [
        ({"type": "loglinear", "eps": 0.01}, -math.log(0.01), 0.0),
        ({"type": "geometric", "sigma_min": 0.02, "sigma_max": 5.0}, 5.0, 0.02),
    ]:
        published(tmp_path, {"graph": {"type": "uniform"}, "noise": noise, "tokens": 7}, 7)
        found = load(tmp_path, tokenizer=Tokenizer(range(7))).noise
        assert float(found(torch.ones(1))[0]) == pytest.approx(at_1, rel=1e-5)
        assert float(found(torch.zeros(1))[0]) == pytest.approx(at_0, abs=1e-6)


# The order in which things reach the disk


@pytest.fixture
def disk(monkeypatch):
    """What is synchronised, by name and content, and what is renamed, in order."""
    done: list[tuple[str, Path, Any]] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def note_fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        content = sorted(p.name for p in path.iterdir()) if path.is_dir() else path.stat().st_size
        done.append(("fsync", path, content))
        fsync(descriptor)

    def note(how):
        def _move(self, target):
            done.append(("rename", self, Path(target)))
            return how(self, target)

        return _move

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note(rename))
    monkeypatch.setattr(Path, "replace", note(replace))
    return done


def in_order(done, target):
    """Everything below `target` was synchronised whole before it was renamed, and its folder after that."""
    (moved,) = [i for i, (what, _, to) in enumerate(done) if what == "rename" and to == target]
    scratch = done[moved][1]
    before = {path: content for what, path, content in done[:moved] if what == "fsync"}
    if target.is_dir():
        names = sorted(path.name for path in target.iterdir() if path.name != token_cache.VERIFIED)  # which comes later
        assert before[scratch] == names
        assert {name: before[scratch / name] for name in names} == {n: (target / n).stat().st_size for n in names}
    else:
        assert before[scratch] == target.stat().st_size
    assert any(what == "fsync" and path == target.parent for what, path, _ in done[moved + 1 :])
    return moved


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks Linux which file is synchronised")


@needs_proc
def test_the_cache_is_on_the_disk_before_it_has_its_name(tmp_path, disk):
    texts = Texts("three words", lambda: ["one two three"], lambda: ["four"], lambda: ["four"])
    token_cache.prepare(texts, "bpe:257", tmp_path)
    (folder,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    in_order(disk, folder)
    assert {"meta.json", "train.bin", "train.bin.ends", "tokenizer.json"} <= {path.name for path in folder.iterdir()}


@needs_proc
@deepspeed
def test_a_checkpoint_is_on_the_disk_before_latest_names_it(old, process, tmp_path, disk):
    train(recipes.for_run(old, "", {}, resume=True), output=old, resume=True, cache=tmp_path, tensorboard=False)
    folder = old / "checkpoints" / "step-00000008"
    whole = in_order(disk, folder)
    assert in_order(disk, old / "checkpoints" / "latest") > whole
    assert checkpoint.damage(folder) is None
    in_order(disk, old / "recipe.toml")


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    storage.write_text(tmp_path / "file", "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        storage.write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_stays_until_the_one_in_its_place_is_on_the_disk(tmp_path, monkeypatch):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            storage.publish(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "file").read_text() == "old"
    storage.publish(tmp_path / "new", tmp_path / "old")
    assert [(path.name, (path / "file").read_text()) for path in tmp_path.iterdir()] == [("old", "new")]


# What is kept, and which one is used


def test_the_best_is_the_least_score_that_is_one(tmp_path):
    for step, bound in enumerate(["3.0", "2.0", "2.0", "NaN", "-Infinity", "1" + "0" * 400, '"1.0"', "null", "{"]):
        folder = tmp_path / f"step-{step:08d}"
        folder.mkdir()
        (folder / "manifest.json").write_text(f'{{"bound": {bound}}}')
    assert checkpoint.best(tmp_path) == tmp_path / "step-00000002"  # the last of equals


def test_milestones_and_what_others_put_there_are_left_alone(tmp_path):
    for step in range(1, 8):
        (tmp_path / f"step-{step:08d}").mkdir()
    (tmp_path / "step-00000001-mine").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "step-00000000").symlink_to(tmp_path / "elsewhere")
    checkpoint._prune(tmp_path, 1, keep_every=3)
    left = [f"step-{step:08d}" for step in (0, 3, 6, 7)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", left[0], "step-00000001-mine", *left[1:]]
    assert checkpoint.exist(tmp_path)
    for path in tmp_path.glob("step-0*[367]"):
        path.rmdir()
    assert not checkpoint.exist(tmp_path)  # a copy and a link are no checkpoints of this run


def test_what_latest_names_comes_before_what_was_never_published(tmp_path):
    """A process that died between the two renames leaves a last folder that `latest` does not name."""
    for step in (1, 2, 3):
        folder = tmp_path / f"step-{step:08d}"
        folder.mkdir()
        counts: dict[str, Any] = {"step": step, "adam_steps": step, "ema_updates": step, "files": {}}
        (folder / "manifest.json").write_text(json.dumps(counts))
    assert checkpoint.find(tmp_path) == tmp_path / "step-00000003"
    (tmp_path / "latest").write_text("step-00000002")
    assert checkpoint.find(tmp_path) == tmp_path / "step-00000002"
    (tmp_path / "step-00000002" / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="step-00000002 is incomplete"):
        assert checkpoint.find(tmp_path) == tmp_path / "step-00000003"


def test_the_best_is_kept_besides_the_last(tmp_path):
    bounds = [5.0, 3.0, None, 4.0, 3.5, float("nan")]
    for step, bound in enumerate(bounds):
        folder = tmp_path / f"step-{step:08d}"
        folder.mkdir()
        (folder / "manifest.json").write_text(loggers.to_json({"bound": bound}))
    (tmp_path / "step-00000009").mkdir()  # torn: no manifest
    (tmp_path / ".step-00000010.123").mkdir()  # killed while it was written
    (tmp_path / ".latest.123").write_text("step-00000001")
    assert checkpoint.best(tmp_path) == tmp_path / "step-00000001"
    checkpoint._prune(tmp_path, 2)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["step-00000001", "step-00000005", "step-00000009"]
    assert checkpoint.best(tmp_path / "none") is None


def test_room_for_what_is_kept_the_best_and_one_being_written(tmp_path, monkeypatch):
    """1000 parameters of 16 bytes, five times; what older checkpoints hold is given back."""
    free = SimpleNamespace(free=16 * 1000 * 5)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    checkpoint.check_space(tmp_path, 1000, keep=3)
    free.free -= 7
    with pytest.raises(checkpoint.CheckpointError, match=r"has room for .* a smaller --keep"):
        checkpoint.check_space(tmp_path, 1000, keep=3)
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / "file").write_bytes(b"1234567")
    checkpoint.check_space(tmp_path, 1000, keep=3)


# Runs in this process


@deepspeed
def test_the_average_stands_still_at_a_step_that_is_skipped(old, process, tmp_path, monkeypatch):
    """The sixth step's loss is NaN: seven updates after eight steps, and only then is the average another."""
    averages: list[tuple[int, int, dict[str, torch.Tensor]]] = []
    bounds: list[float | None] = []
    calls: list[int] = []

    class Spoilt(ScoreEntropy):
        def losses(self, net, x0, xt, t, **given):
            total, each = super().losses(net, x0, xt, t, **given)
            calls.append(len(calls))
            return (total * math.nan, each * math.nan) if len(calls) == 2 else (total, each)

    save = checkpoint.save

    def noted(run, engine, ema, tokenizer, **how):
        averages.append((how["step"], ema.updates, ema.gather()))
        bounds.append(how["bound"])
        return save(run, engine, ema, tokenizer, **how)

    monkeypatch.setattr(checkpoint, "save", noted)
    recipe = recipes.for_run(old, "", {"checkpoint_every": 1, "evaluate_every": 2}, resume=True)
    objective = Spoilt(Absorbing(27), LogLinear())
    train(recipe, output=old, resume=True, objective=objective, cache=tmp_path, tensorboard=False)
    assert [(step, updates) for step, updates, _ in averages] == [(5, 5), (6, 5), (7, 6), (8, 7)]
    same = [all(torch.equal(a[n], b[n]) for n in a) for (*_, a), (*_, b) in itertools.pairwise(averages)]
    assert same == [True, False, False]
    assert [bound is None for bound in bounds] == [True, False, True, False]  # measured at every second step
    (skipped,) = [line for line in loggers.read(old / "log.jsonl") if line["kind"] == "skipped"]
    assert skipped["step"] == 6
    assert len(skipped["samples"]) == 8


@deepspeed
def test_an_edited_text_is_noticed_at_resume(old, process, tmp_path):
    recipe = recipes.for_run(old, "", {}, resume=True)
    text = Path("speech.txt").read_text()
    assert " people " in text
    Path("speech.txt").write_text(text.replace(" people ", " crowd ", 1))
    with pytest.raises(SetupError, match=r"step-00000004 was trained on other text .* fingerprint"):
        train(recipe, output=old, resume=True, cache=tmp_path, tensorboard=False)
    assert not list((old / "checkpoints").glob("step-00000008"))


@deepspeed
def test_weights_of_another_network_are_refused(old, process, tmp_path):
    net = SEDD(28, width=32, depth=1, heads=2, cond_dim=8, dropout=0.1, length=16, scale_by_sigma=True)
    with pytest.raises(SetupError, match=r"another network's: .*blocks\.0.* differ in name or shape"):
        train(recipes.for_run(old, "", {}, resume=True), output=old, net=net, resume=True, cache=tmp_path)


@deepspeed
def test_a_run_that_cannot_go_on_says_so_as_an_error(old, process, tmp_path):
    class Broken(ScoreEntropy):
        def losses(self, net, x0, xt, t, **given):
            total, each = super().losses(net, x0, xt, t, **given)
            return total * math.inf, each * math.inf

    recipe = recipes.for_run(old, "", {"max_skipped": 2}, resume=True)
    with pytest.raises(TrainingError, match="2 steps in a row had a loss or gradient that is not finite"):
        train(
            recipe,
            output=old,
            resume=True,
            objective=Broken(Absorbing(27), LogLinear()),
            cache=tmp_path,
            tensorboard=False,
        )
    assert [line["step"] for line in loggers.read(old / "log.jsonl") if line["kind"] == "skipped"] == [5, 6]


def test_adamw_counts_on_from_the_steps_that_it_made(monkeypatch):
    """Fewer than the run's, where some were left out; with its moments and the average's own count."""
    master = torch.zeros(2)
    restored: list[Any] = []
    scales: list[Any] = []
    monkeypatch.setattr(zero_shards, "scatter", lambda engine, values: [values["w"]])
    monkeypatch.setattr(zero_shards, "owned", lambda engine: [master])
    engine: Any = SimpleNamespace(
        basic_optimizer=SimpleNamespace(state={}, param_groups=[]),
        loss_scale_of_ours=SimpleNamespace(restore=scales.append),
        module=SimpleNamespace(net=SimpleNamespace()),
    )
    ema: Any = SimpleNamespace(restore=lambda average, updates: restored.append((average, updates)))
    found: Any = SimpleNamespace(
        moments={"exp_avg": {"w": torch.ones(2)}, "exp_avg_sq": {"w": torch.full((2,), 4.0)}},
        manifest={"step": 9, "adam_steps": 7, "ema_updates": 8},
        average={"w": torch.zeros(2)},
    )
    checkpoint.restore(found, engine, ema)
    state = engine.basic_optimizer.state[master]
    assert {name: value.tolist() for name, value in state.items()} == {
        "step": 7.0,
        "exp_avg": [1.0, 1.0],
        "exp_avg_sq": [4.0, 4.0],
    }
    assert restored == [(found.average, 8)]
    assert scales == [[1.0, 0]]
