"""Who writes a checkpoint: which ranks, which weights, in which files; and what all are told of what fails on one."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from sedd_graphs import Absorbing, LogLinear
from sedd_nets import SEDD
from sedd_train import adapters, checkpoint, distributed, pretrained, recipes, sharding
from sedd_train.text8 import character_tokenizer
from torch import Tensor, nn

SECTIONS = pretrained.sections(recipes.Recipe(), Absorbing(27), LogLinear())
SIZES: dict[str, Any] = {"width": 16, "depth": 1, "heads": 2, "cond_dim": 8, "dropout": 0.0, "length": 8}
FIRST, SECOND = (f"training-0000{number}-of-00002.safetensors" for number in (1, 2))


def weights(*sizes: int, frozen: tuple[int, ...] = ()) -> nn.Module:
    net = nn.Module()
    for number, size in enumerate(sizes):
        net.register_parameter(f"w{number}", nn.Parameter(torch.zeros(size), requires_grad=number not in frozen))
    return net


# Which ranks


def test_one_rank_writes_up_to_a_number_of_parameters(monkeypatch, tmp_path):
    def never(value: Any) -> list[Any]:
        raise AssertionError("asked for no need")

    assert sharding.ABOVE == 10**9
    monkeypatch.setattr(sharding, "ABOVE", 10)
    monkeypatch.setattr(distributed, "tell", never)
    assert sharding.writers(weights(7, 3), tmp_path) == [0]
    monkeypatch.setattr(distributed, "tell", lambda value: [value] * 3)
    assert sharding.writers(weights(7, 4), tmp_path) == [0, 1, 2]
    split = weights(1, 1)
    split.get_parameter("w0").ds_numel = 10  # type: ignore[attr-defined]  # as under ZeRO 3
    assert sharding.writers(split, tmp_path) == [0, 1, 2]


def test_those_of_the_first_machine_write_that_see_its_folder(monkeypatch, tmp_path):
    own: list[Any] = []

    def tell(value: Any) -> list[Any]:
        own.append(value)
        return [("a", True), ("a", True), ("b", True), ("b", False), ("a", False), ("a", True)]

    monkeypatch.setattr(sharding, "ABOVE", 0)
    monkeypatch.setattr(distributed, "tell", tell)
    monkeypatch.setattr("sedd_train.sharding.socket.gethostname", lambda: "here")
    assert sharding.writers(weights(1), tmp_path) == [0, 1, 5]
    sharding.writers(weights(1), tmp_path / "none")
    assert own == [("here", True), ("here", False)]


# Which weights


def test_each_weight_is_one_rank_s_and_all_have_about_as_much():
    """4 bytes a parameter of averages, 12 of the rest: of 8 ranks no one has more than the averages and a weight."""
    sizes = [5000, *[40 * 40, 3 * 40 * 40, 4 * 40 * 40, 40] * 12, 5000]
    net, total = weights(*sizes), sum(sizes)
    for count in (1, 2, 3, 4, 8):
        found = sharding.shares(net, list(range(count)))
        names = [name for share in found.values() for name in share]
        assert sorted(names) == sorted(name for name, _ in net.named_parameters())
        loads = {rank: 3 * sum(net.get_parameter(name).numel() for name in share) for rank, share in found.items()}
        loads[0] = loads.get(0, 0) + total
        assert max(loads.values()) <= max(total, 4 * total / count + 3 * max(sizes))
        assert sharding.shares(net, list(range(count))) == found
    assert 0 not in sharding.shares(net, list(range(8)))  # which writes the averages
    assert list(sharding.shares(net, [3, 4])) == [3, 4]


def test_a_weight_that_is_not_trained_has_no_moments():
    """9 numbers, of which the first rank has the averages; 3 + 1 + 1 + 4 or 3 * (3 + 1 + 1 + 4) more."""
    assert sharding.shares(weights(3, 1, 1, 4, frozen=(0, 1, 2, 3)), [0, 1]) == {1: {"w0", "w1", "w2", "w3"}}
    assert sharding.shares(weights(3, 1, 1, 4), [0, 1]) == {0: {"w0"}, 1: {"w3", "w1", "w2"}}


# Which files


def test_files_are_numbered_by_the_ranks_that_have_something():
    assert sharding.file_names({0: {"a"}}) == {0: "training.safetensors"}
    assert sharding.file_names({2: {"a"}}) == {2: "training.safetensors"}
    assert sharding.file_names({1: {"a"}, 5: {"b"}}) == {1: FIRST, 5: SECOND}


def test_files_are_found_by_their_names():
    others = ["config.json", "training.json", "training-1-of-2.safetensors", "model.safetensors"]
    assert sharding.files(others) == sharding.files([*others, "training.safetensors"]) == ["training.safetensors"]
    assert sharding.files([SECOND, *others, FIRST]) == [FIRST, SECOND]
    assert sharding.lacking(others) == sharding.lacking([FIRST, SECOND]) == ""
    assert sharding.lacking([FIRST, *others]) == SECOND
    assert sharding.lacking([SECOND]) == FIRST
    assert sharding.lacking(["training-00001-of-99999.safetensors"]) == "training-00002-of-99999.safetensors"


# Two ranks, as threads that tell each other what ranks do


@pytest.fixture
def two(monkeypatch):
    """two(work): what comes of `work()` on two ranks of a large network; an error is what comes of it."""
    rank, meeting = threading.local(), threading.Barrier(2, timeout=20)
    told: list[Any] = [None, None]

    def tell(value: Any) -> list[Any]:
        told[rank.number] = value
        meeting.wait()
        heard = list(told)
        meeting.wait()
        return heard

    monkeypatch.setattr(sharding, "ABOVE", 0)
    monkeypatch.setattr(distributed, "tell", tell)
    monkeypatch.setattr(distributed, "start", lambda: None)
    monkeypatch.setattr(dist, "get_rank", lambda: rank.number)

    def _two(work: Callable[[], Any]) -> list[Any]:
        found: list[Any] = [None, None]

        def _work(number: int) -> None:
            rank.number = number
            try:
                found[number] = work()
            except Exception as error:
                found[number] = error

        threads = [threading.Thread(target=_work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    return _two


def save(run: Path, net: nn.Module, **how: Any) -> Callable[[], Path]:
    """Saving a network, its moments being twice and three times its weights, and its average four times.

    Each rank has a network of its own, whose weights are others for a moment.
    """
    tokenizer = character_tokenizer()
    given: dict[str, Any] = {"step": 7, "sections": SECTIONS, "keep": 2} | how
    average = {name: 4 * p.detach() for name, p in net.named_parameters()}

    def gather(*, keep: Any) -> dict[str, Tensor]:
        return {name: average[name] for name in average if keep is None or name in keep}

    def _save() -> Path:
        own = copy.deepcopy(net)
        trained = {
            p: {"exp_avg": 2 * p.detach(), "exp_avg_sq": 3 * p.detach()} for p in own.parameters() if p.requires_grad
        }
        engine = SimpleNamespace(
            module=SimpleNamespace(net=own),
            basic_optimizer=SimpleNamespace(state=trained, param_groups=[{"params": list(trained)}]),
            loss_scale_of_ours=SimpleNamespace(state=[1.0, 0]),
            zero_optimization_stage=lambda: 0,
        )
        ema: Any = SimpleNamespace(updates=5, gather=gather)
        return checkpoint.save(run, engine, ema, tokenizer, **given)

    return _save


@pytest.mark.parametrize("lora", [False, True])
def test_what_two_ranks_write_is_read_as_one(lora, two, tmp_path):
    if lora:
        pytest.importorskip("peft")
    net = SEDD(28, **SIZES, scale_by_sigma=True)
    if lora:
        adapters.add_adapters(net, rank=2, alpha=2.0, seed=0)
    assert two(save(tmp_path, net)) == [tmp_path / "step-00000007"] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000007"]
    folder = tmp_path / "step-00000007"
    assert {path.name for path in folder.glob("training*")} == {FIRST, SECOND}
    found = checkpoint.read(folder)
    assert found.manifest["files"].keys() == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert found.weights.keys() == {name for name, _ in net.named_parameters()} <= found.average.keys()
    for name, p in net.named_parameters():
        trained = p.requires_grad
        assert torch.equal(found.weights[name], p)
        assert torch.equal(found.average[name], 4 * p if trained else p)
        for factor, moment in ((2, "exp_avg"), (3, "exp_avg_sq")):
            assert (name in found.moments[moment]) == trained
            assert not trained or torch.equal(found.moments[moment][name], factor * p)
    averages = [any("average/" in n for n in safetensors.torch.load_file(folder / file)) for file in (FIRST, SECOND)]
    assert any(averages) == lora


@pytest.mark.parametrize(
    ("at", "said"), [(FIRST, "rank 0: no room"), (SECOND, "rank 1: no room"), ("manifest.json", "rank 0: no room")]
)
def test_what_fails_on_one_is_told_on_both(at, said, two, tmp_path, monkeypatch):
    net = SEDD(28, **SIZES, scale_by_sigma=True)
    assert two(save(tmp_path, net, step=1)) == [tmp_path / "step-00000001"] * 2
    write, write_text = safetensors.torch.save_file, Path.write_text

    def no_room(how: Callable[..., Any], place: int) -> Callable[..., Any]:
        def _write(*given: Any, **more: Any) -> Any:
            if Path(given[place]).name == at:
                Path(given[place]).touch()  # half written
                raise OSError("no room")
            return how(*given, **more)

        return _write

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", no_room(write, 1))
        patch.setattr(Path, "write_text", no_room(write_text, 0))
        found = two(save(tmp_path, net, step=2))
    for error in found:
        assert isinstance(error, checkpoint.CheckpointError)
        assert f"step 2 could not be written to {tmp_path}: {said}. The last good one is" in str(error)
        assert "step-00000001; make room" in str(error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]
    assert (tmp_path / "latest").read_text() == "step-00000001"
    (tmp_path / "file").write_text("")
    found = two(save(tmp_path / "file", net))
    assert all("rank 0: [Errno" in str(error) and "None is left" in str(error) for error in found)
    assert two(save(tmp_path, net, step=2)) == [tmp_path / "step-00000002"] * 2
