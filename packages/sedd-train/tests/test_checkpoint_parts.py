"""The parts of a checkpoint, each by itself: what is written, checked, read back, and refused at its edge."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from sedd_graphs import Absorbing, LogLinear
from sedd_nets import SEDD
from sedd_train import checkpoint, load, pretrained, recipes, storage, zero_shards
from sedd_train.text8 import character_tokenizer
from torch import Tensor, nn

SECTIONS = pretrained.sections(recipes.Recipe(), Absorbing(27), LogLinear())
SIZES: dict[str, Any] = {"width": 16, "depth": 1, "heads": 2, "cond_dim": 8, "dropout": 0.0, "length": 8}


def network(seed: int = 0) -> SEDD:
    torch.manual_seed(seed)
    return SEDD(28, **SIZES, scale_by_sigma=True)


@pytest.fixture
def alone(monkeypatch):
    """A world of one process that was never started, whose masters are the network's own weights."""
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    return monkeypatch


def engine_of(net: nn.Module, states: dict[Tensor, dict[str, Any]]) -> Any:
    optimizer = SimpleNamespace(state=states, param_groups=[{"params": list(net.parameters())}])
    return SimpleNamespace(
        module=SimpleNamespace(net=net),
        basic_optimizer=optimizer,
        loss_scale_of_ours=SimpleNamespace(state=[64.0, 3]),
        zero_optimization_stage=lambda: 0,
    )


def averages(net: nn.Module, updates: int = 5) -> Any:
    def gather(*, keep: Any) -> dict[str, Tensor]:
        assert keep is None  # all, of the rank that writes
        return {name: p.detach() + 1 for name, p in net.named_parameters()}

    return SimpleNamespace(updates=updates, gather=gather)


def save(run: Path, net: nn.Module, states: Any = None, **how: Any) -> Path:
    given: dict[str, Any] = {"step": 7, "sections": SECTIONS, "keep": 2} | how
    return checkpoint.save(run, engine_of(net, states or {}), averages(net), character_tokenizer(), **given)


def test_what_is_saved_is_read_back_weight_by_weight(alone, tmp_path):
    net = network()
    states = {
        p: {"step": torch.tensor(4.0), "exp_avg": p.detach() * 2, "exp_avg_sq": p.detach() * 3}
        for p in net.parameters()
    }
    folder = save(tmp_path, net, states, bound=1.25, fingerprint="abc", more=[1.0, float("nan")])
    assert folder == tmp_path / "step-00000007"
    assert (tmp_path / "latest").read_text() == "step-00000007"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000007"]
    found = checkpoint.read(folder)
    files = {path.name for path in folder.iterdir()}
    assert found.manifest == {
        **{"step": 7, "adam_steps": 4, "ema_updates": 5, "bound": 1.25, "loss_scale": [64.0, 3]},
        **{"fingerprint": "abc", "more": [1.0, None]},
        "files": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files - {"manifest.json"}},
    }
    assert {"config.json", "model.safetensors", "training.safetensors", "tokenizer.json"} < files
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # read by whoever may read one of them
    assert (found.step, found.folder) == (7, folder)
    names = {name for name, _ in net.named_parameters()}
    assert found.weights.keys() == found.moments["exp_avg"].keys() == found.moments["exp_avg_sq"].keys() == names
    for name, p in net.named_parameters():
        assert torch.equal(found.weights[name], p)
        assert torch.equal(found.moments["exp_avg"][name], 2 * p)
        assert torch.equal(found.moments["exp_avg_sq"][name], 3 * p)
    again: Any = load(folder).net
    assert all(torch.equal(p, found.weights[name] + 1) for name, p in again.named_parameters())
    assert checkpoint.last(tmp_path, "abc").step == 7


def test_before_the_first_step_there_are_no_moments(alone, tmp_path):
    found = checkpoint.read(save(tmp_path, network(), step=0))
    assert found.moments == {}
    assert (found.manifest["adam_steps"], found.manifest["bound"]) == (0, None)


def test_the_last_ones_the_best_and_milestones_are_kept(alone, tmp_path):
    net, bounds = network(), [3.0, 1.0, 2.0, None, 2.5, 2.5]
    for step, bound in enumerate(bounds, 1):
        save(tmp_path, net, step=step, keep=1, keep_every=3, bound=bound)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [f"step-0000000{step}" for step in (2, 3, 6)]
    assert checkpoint.best(tmp_path) == tmp_path / "step-00000002"


def test_what_fails_while_it_is_written_leaves_what_was_there(alone, tmp_path):
    net = network()
    save(tmp_path, net, step=1)

    def full(tensors, path, **how):
        if Path(path).name == "training.safetensors":
            raise OSError(28, "No space left on device")
        write(tensors, path, **how)

    write = safetensors.torch.save_file
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        told = r"step 2 could not be written to .*No space left.* The last good one is .*step-00000001; make"
        with pytest.raises(checkpoint.CheckpointError, match=told):
            save(tmp_path, net, step=2)
        with pytest.raises(checkpoint.CheckpointError, match="None is left"):
            save(tmp_path / "other", net, step=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "other", "step-00000001"]
    assert list((tmp_path / "other").iterdir()) == []
    assert (tmp_path / "latest").read_text() == "step-00000001"


def test_an_average_is_exported_with_the_network_s_buffers(tmp_path):
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.register_buffer("kept", torch.ones(3))
            self.register_buffer("made", torch.ones(3), persistent=False)

    net = Own()
    assert checkpoint._with_buffers(net, {"a": torch.zeros(1)}).keys() == {"a", "kept"}
    average = {name: p.detach() + 2 for name, p in net.named_parameters()}
    checkpoint.export(tmp_path / "deep" / "own", net, average, character_tokenizer(), {"tokens": 27})
    folder = tmp_path / "deep" / "own"
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    assert stored.keys() == average.keys()
    assert all(torch.equal(stored[name], average[name]) for name in stored)
    config = json.loads((folder / "config.json").read_text())
    assert config == {"tokens": 27, "model": {"type": Own.__qualname__}}
    assert (folder / "tokenizer.json").is_file()


def test_weights_are_given_by_name_and_shape():
    net, other = network(), network(1)
    given = {name: p.detach().clone() for name, p in other.named_parameters()}
    checkpoint.set_weights(net, given)
    for name, p in net.named_parameters():
        assert torch.equal(p, given[name])
        assert p.requires_grad
        assert p.data_ptr() != given[name].data_ptr()
    few = dict(list(given.items())[:-2])
    missing = sorted(list(given)[-2:])
    with pytest.raises(
        checkpoint.CheckpointError, match=f"another network's: {missing[0]}, {missing[1]} differ in name or"
    ):
        checkpoint.set_weights(net, few)
    flat = {f"{name}": weight.flatten()[None] for name, weight in given.items()}
    names = sorted(flat)
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.set_weights(net, flat)
    assert f": {', '.join(names[:4])} and {len(names) - 4} more differ in name or shape" in str(caught.value)
    assert all(torch.equal(p, given[name]) for name, p in net.named_parameters())


MANIFEST: dict[str, Any] = {"step": 4, "adam_steps": 3, "ema_updates": 2, "files": {}}


@pytest.mark.parametrize("name", ["step", "adam_steps", "ema_updates"])
def test_counts_are_whole_or_not_within_their_ends(name, tmp_path):
    for value, taken in [(0, True), (2**53 - 1, True), (2**53, False), (-1, False), (True, False), ("3", False)]:
        (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST | {name: value}))
        wrong = checkpoint.damage(tmp_path)
        assert (wrong is None) is taken, value
        assert taken or f"manifest.json: {name} must be a number of at least 0; got {value!r}" in str(wrong)
    (tmp_path / "manifest.json").write_text(json.dumps({key: count for key, count in MANIFEST.items() if key != name}))
    assert f"{name} must be a number" in str(checkpoint.damage(tmp_path))


@pytest.mark.parametrize(
    ("name", "taken"), [("a.txt", True), ("_a-b.c", True), ("-a", True), (".a", False), ("a/b", False), ("", False)]
)
def test_files_of_a_manifest_are_plain_names(name, taken, tmp_path):
    if taken:
        (tmp_path / name).write_text("content")
    files = {name: hashlib.sha256(b"content").hexdigest()}
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST | {"files": files}))
    wrong = checkpoint.damage(tmp_path)
    assert (wrong is None) is taken
    assert taken or "files must name files of the folder and their sums" in str(wrong)
    if taken:
        (tmp_path / name).write_text("another")
        assert checkpoint.damage(tmp_path) == f"{tmp_path / name} is not as it was written (its checksum differs)"
        (tmp_path / name).unlink()
        assert "is incomplete (FileNotFoundError" in str(checkpoint.damage(tmp_path))


def test_folders_of_checkpoints_are_named_by_eight_digits_or_more(tmp_path):
    for name in ("step-1", "step-0000001", "step-00000001", "step-123456789", "step-00000002x", "xstep-00000003"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000004").write_text("a file")
    assert [path.name for path in checkpoint._folders(tmp_path)] == ["step-123456789", "step-00000001"]


def test_the_average_of_a_network_with_adapters_is_what_was_trained_beside_the_rest(tmp_path):
    """Of the weights that are frozen there is one value; what is published has the adapters added in."""
    names = ("weights/a", "weights/a.lora_A", "average/a.lora_A", "exp_avg/a.lora_A", "exp_avg_sq/a.lora_A")
    tensors = {name: torch.full((2,), float(number)) for number, name in enumerate(names)}
    safetensors.torch.save_file(tensors, tmp_path / "training.safetensors")
    safetensors.torch.save_file({"a": torch.full((2,), 9.0)}, tmp_path / "model.safetensors")
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST))
    found = checkpoint.read(tmp_path)
    assert {name: float(value[0]) for name, value in found.average.items()} == {"a": 0.0, "a.lora_A": 2.0}
    assert {name: float(value[0]) for name, value in found.weights.items()} == {"a": 0.0, "a.lora_A": 1.0}
    assert {moment: list(values) for moment, values in found.moments.items()} == {
        **{"exp_avg": ["a.lora_A"], "exp_avg_sq": ["a.lora_A"]}
    }
    del tensors["average/a.lora_A"]
    safetensors.torch.save_file(tensors, tmp_path / "training.safetensors")
    assert {name: float(value[0]) for name, value in checkpoint.read(tmp_path).average.items()} == {"a": 9.0}
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(checkpoint.CheckpointError, match="is incomplete"):
        checkpoint.read(tmp_path)


def test_a_run_goes_on_with_its_own_text_alone(alone, tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match=r"no whole checkpoint in .* start anew without --resume"):
        checkpoint.last(tmp_path, "abc")
    save(tmp_path, network(), fingerprint="0a1b-300")
    assert checkpoint.last(tmp_path, "0a1b-300").step == 7
    assert checkpoint.last(tmp_path, "0a1b-300-tokenizer").step == 7  # written before the tokenizer was a part of it
    for other in ("0a1b-301", "0a1b-300-x-y", "0a1b", "x0a1b-300-y"):
        told = rf"other text or another vocabulary \(its fingerprint is 0a1b-300, the corpus's now {other}\)"
        with pytest.raises(checkpoint.CheckpointError, match=told):
            checkpoint.last(tmp_path, other)


@pytest.mark.parametrize("moments", [True, False])
def test_a_network_that_publishes_other_names_restores_by_its_own(moments, monkeypatch):
    done: list[Any] = []
    monkeypatch.setattr(zero_shards, "scatter", lambda engine, values: [values["w"]])
    monkeypatch.setattr(zero_shards, "owned", lambda engine: [torch.zeros(2)])
    net = SimpleNamespace(own_keys=lambda average: {f"own.{name}": value for name, value in average.items()})
    engine: Any = SimpleNamespace(
        basic_optimizer=SimpleNamespace(state={}, param_groups=[]),
        loss_scale_of_ours=SimpleNamespace(restore=done.append),
        module=SimpleNamespace(net=net),
    )
    ema: Any = SimpleNamespace(restore=lambda average, updates: done.append((average, updates)))
    held = {moment: {"w": torch.ones(2)} for moment in ("exp_avg", "exp_avg_sq")} if moments else {}
    manifest = {"adam_steps": 7, "ema_updates": 8, "loss_scale": [2.0, 5]}
    found: Any = SimpleNamespace(moments=held, manifest=manifest, average={"w": 3})
    checkpoint.restore(found, engine, ema)
    assert done == [[2.0, 5], ({"own.w": 3}, 8)]
    assert len(engine.basic_optimizer.state) == moments
    for state in engine.basic_optimizer.state.values():
        assert (state["step"].dtype, float(state["step"])) == (torch.float32, 7.0)


def test_a_folder_is_tried_before_a_run_begins(tmp_path, monkeypatch):
    checkpoint.check_space(tmp_path / "deep" / "run", 1, keep=1)
    assert list((tmp_path / "deep" / "run").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(checkpoint.CheckpointError, match=r"checkpoints cannot be written to .*file: "):
        checkpoint.check_space(tmp_path / "file", 1, keep=1)

    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(checkpoint.CheckpointError, match="No space left on device"):
        checkpoint.check_space(tmp_path, 1, keep=1)


# Files and folders that are whole or absent


def test_a_text_is_written_beside_its_place_in_this_process_s_own_file(tmp_path, monkeypatch):
    seen: list[Any] = []
    replace = Path.replace

    def noted(self, target):
        seen.append((self.name, self.read_text(encoding="utf-8")))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", noted)
    storage.write_text(tmp_path / "file", "dé")
    assert seen == [(f".file.{os.getpid()}", "dé")]
    assert (tmp_path / "file").read_bytes() == "dé".encode()


def test_a_lock_is_waited_for_as_long_as_told(tmp_path):
    with storage.locked(tmp_path / "lock"):
        assert (tmp_path / "lock").exists()
    with storage.owned(tmp_path / "deep" / "run"):
        assert [path.name for path in (tmp_path / "deep" / "run").iterdir()] == [".lock"]
        again = storage.owned(tmp_path / "deep" / "run")
        with pytest.raises(ValueError, match=r"another process is at work in .*run: wait for it"), again:
            pass
    with storage.owned(tmp_path / "deep" / "run"):
        pass
