"""The moving average, its parts and the scale of float16, by hand, over masters that are plain tensors."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sedd_nets import SEDD
from sedd_train import engine as engines
from sedd_train import half, zero_shards
from sedd_train.deepspeed_options import check_options, with_options, zero_options
from sedd_train.ema import EMA
from sedd_train.engine import Loss, _groups
from sedd_train.half import LossScale, in_half
from torch import nn


def engine_of(net: nn.Module, stage: int = 0) -> Any:
    trained = [p for p in net.parameters() if p.requires_grad]
    return SimpleNamespace(
        module=SimpleNamespace(net=net),
        basic_optimizer=SimpleNamespace(param_groups=[{"params": trained[:1]}, {"params": trained[1:]}]),
        zero_optimization_stage=lambda: stage,
        optimizer=SimpleNamespace(fp32_partitioned_groups_flat=(p.detach().flatten() for p in trained)),
    )


def linear(*values: float) -> nn.Linear:
    net = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([values]))
    return net


def test_a_young_average_forgets_its_start():
    """decay_n = min(decay, (1 + n) / (10 + n)), from n = 0 on: 1/10, 2/11, 3/12, ... until it is the recipe's."""
    net = linear(0.0, 8.0)
    average = EMA(engine_of(net), 0.2)
    assert average.updates == 0
    found = torch.tensor([[0.0, 8.0]])
    for n, value in enumerate([1.0, -3.0, 5.0, 2.0]):
        with torch.no_grad():
            net.weight.fill_(value)
        average.update()
        decay = [0.1, 2 / 11, 0.2, 0.2][n]
        found = decay * found + (1 - decay) * value
        torch.testing.assert_close(average.pieces[0], found)
        assert average.updates == n + 1
        assert (net.weight == value).all()
    torch.testing.assert_close(average.gather()["weight"], found)


def test_an_average_is_a_copy_and_goes_on_after_so_many_updates():
    net = linear(1.0, 2.0)
    average = EMA(engine_of(net), 0.9999)
    with torch.no_grad():
        net.weight.add_(1)
    assert average.pieces[0].tolist() == [[1.0, 2.0]]
    assert not average.pieces[0].requires_grad
    average.restore({"weight": torch.tensor([[5.0, 6.0]], dtype=torch.float64)}, 90)
    assert (average.updates, average.pieces[0].dtype, average.pieces[0].tolist()) == (90, torch.float32, [[5.0, 6.0]])
    assert net.weight.tolist() == [[2.0, 3.0]]  # what was in the masters' place is gone again
    average.update()
    torch.testing.assert_close(average.pieces[0], torch.tensor([[5.0, 6.0]]) * 0.91 + torch.tensor([[2.0, 3.0]]) * 0.09)
    assert average.updates == 91


def test_what_is_gathered_is_apart_from_what_is_trained():
    net: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    net[0].bias.requires_grad_(False)
    engine = engine_of(net)
    trained = [net[0].weight, *net[1].parameters()]
    assert all(master is p for master, p in zip(zero_shards.owned(engine), trained, strict=True))
    whole, rest = zero_shards.gather(engine), zero_shards.frozen(engine)
    assert list(whole) == ["0.weight", "1.weight", "1.bias"]
    assert list(rest) == ["0.bias"]
    before = {name: value.clone() for name, value in (whole | rest).items()}
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1)
    assert all(torch.equal((whole | rest)[name], value) for name, value in before.items())
    pieces = [torch.full_like(master, 7.0) for master in zero_shards.owned(engine)]
    given = zero_shards.gather(engine, pieces)
    assert all((value == 7).all() for value in given.values())
    assert all((piece == 7).all() for piece in pieces)
    assert torch.equal(net[1].bias, before["1.bias"] + 1)
    with pytest.raises(ValueError, match="zip"):
        zero_shards.gather(engine, pieces[:2])
    assert len(zero_shards.owned(engine_of(net, stage=3))) == 3
    assert all(master.ndim == 1 for master in zero_shards.owned(engine_of(net, stage=3)))


def test_masters_come_back_whatever_happens():
    net = linear(1.0, 2.0)
    with pytest.raises(KeyError):
        zero_shards.scatter(engine_of(net), {"other": torch.ones(1, 2)})
    assert net.weight.tolist() == [[1.0, 2.0]]


# AdamW's groups and DeepSpeed's options


def test_matrices_decay_and_nothing_else():
    net = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Conv1d(1, 1, 2))
    net[0].weight.requires_grad_(False)
    matrices, others = _groups(net, 0.3, muon=False)
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert [p.ndim for p in matrices["params"]] == [3]
    assert [p.ndim for p in others["params"]] == [1, 1, 1, 1]
    (all_of_it,) = _groups(net, 0.0, muon=False)
    assert (len(all_of_it["params"]), all_of_it["weight_decay"]) == (5, 0.0)
    (matrix,) = _groups(nn.Linear(2, 2, bias=False), 0.3, muon=False)
    assert (len(matrix["params"]), matrix["weight_decay"]) == (1, 0.3)
    (vectors,) = _groups(nn.LayerNorm(3), 0.3, muon=False)
    assert (len(vectors["params"]), vectors["weight_decay"]) == (2, 0.0)


@pytest.mark.parametrize(
    ("size", "bucket", "gathered", "ahead"),
    [
        (10, 1 << 16, 1 << 16, 1 << 16),
        ((1 << 18) + 5, (1 << 18) + 5, (1 << 18) + 6, (1 << 16) + 1),
        (1 << 20, 1 << 20, 1 << 20, 1 << 18),
        (1 << 30, 1 << 26, 1 << 26, 1 << 25),
    ],
)
def test_buckets_are_of_the_network_s_size_within_limits(size, bucket, gathered, ahead, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sizes = {"reduce_bucket_size": bucket, "allgather_bucket_size": gathered}
    assert zero_options(1, size, offload=False) == {"stage": 1, **sizes}
    of_three = {
        "stage3_prefetch_bucket_size": ahead,
        "stage3_param_persistence_threshold": 1 << 14,
        "stage3_max_live_parameters": 1 << 30,
    }
    assert zero_options(3, size, offload=False) == {"stage": 3, **sizes, **of_three}


@pytest.mark.parametrize("gpu", [False, True])
def test_what_is_offloaded_in_each_stage(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    where = {"device": "cpu", "pin_memory": gpu}
    for stage in (1, 2, 3):
        found = zero_options(stage, 10, offload=True)
        offloaded = {name: value for name, value in found.items() if name.startswith("offload")}
        assert offloaded == {"offload_optimizer": where} | ({"offload_param": where} if stage == 3 else {})
        assert found.get("overlap_comm") is (False if gpu else None)  # alone there is nothing to reduce
        assert zero_options(stage, 10, offload=True, ranks=2).get("overlap_comm") is (True if gpu else None)


def test_options_are_put_together_section_by_section_and_neither_is_changed():
    config = {"a": 1, "inner": {"b": 2, "deep": {"c": 3}}, "list": {"x": 1}}
    options = {"inner": {"deep": {"d": 4}, "b": 5}, "list": [1], "new": {"e": 6}}
    assert with_options(config, options) == {
        **{"a": 1, "inner": {"b": 5, "deep": {"c": 3, "d": 4}}, "list": [1], "new": {"e": 6}}
    }
    assert config == {"a": 1, "inner": {"b": 2, "deep": {"c": 3}}, "list": {"x": 1}}
    assert options == {"inner": {"deep": {"d": 4}, "b": 5}, "list": [1], "new": {"e": 6}}
    assert with_options({}, {}) == {}


@pytest.mark.parametrize(
    ("option", "by"),
    [
        *(("train_batch_size", "batch_size"), ("train_micro_batch_size_per_gpu", "micro_batch_size")),
        *(("gradient_accumulation_steps", "micro_batch_size"), ("gradient_clipping", "clip")),
        ("optimizer", "optimizer, learning_rate, beta1, beta2, eps and weight_decay"),
        *(("scheduler", "learning_rate, warmup and decay_to"), ("torch_autocast", "precision"), ("bf16", "precision")),
        *(("fp16", "precision"), ("amp", "precision"), ("activation_checkpointing", "activation_checkpointing")),
        *(("steps_per_print", "log_every"), ("zero_optimization.stage", "zero_stage")),
        *(("zero_optimization.offload_optimizer", "offload"), ("zero_optimization.offload_param", "offload")),
    ],
)
def test_what_a_recipe_decides_is_no_option(option, by):
    def nested(name: str, value: Any) -> dict[str, Any]:
        first, _, rest = name.partition(".")
        return {first: nested(rest, value) if rest else value}

    with pytest.raises(ValueError, match=rf"\[deepspeed\] {option} = 3: a recipe says that by {by}; leave it out here"):
        check_options(nested(option, 3))
    with pytest.raises(ValueError, match=rf"\[deepspeed\] {option}"):
        check_options(nested(option, {"device": 3}))
    check_options(nested(f"{option}_of_another_name", 3))
    check_options({"section": {option.rpartition(".")[2]: 3}})


@pytest.mark.parametrize("option", ["zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"])
def test_what_the_trainer_needs_stays_as_it_is(option):
    with pytest.raises(ValueError, match=rf"\[deepspeed\] {option} = True: the trainer needs it as it is"):
        check_options({option: True})


# float16


def stepped(scale: LossScale, *, overflowed: bool) -> bool:
    """One step noted: whether it is forgiven."""
    found = scale.step(overflowed=torch.tensor(overflowed))
    assert (found.shape, found.dtype) == ((), torch.bool)
    return bool(found)


def test_the_scale_begins_grows_and_ends_at_its_numbers():
    assert (half.FIRST, half.LARGEST, half.GROWTH) == (1024.0, 16777216.0, 1000)
    scale = LossScale(nn.Linear(1, 1))
    assert scale.state == [1024.0, 0]
    for _ in range(999):
        assert stepped(scale, overflowed=False) is False
    assert scale.state == [1024.0, 999]
    assert stepped(scale, overflowed=False) is False
    assert scale.state == [2048.0, 0]
    stepped(scale, overflowed=False)
    assert stepped(scale, overflowed=True) is True
    assert scale.state == [1024.0, 0]
    scale.restore([1.0, 7])
    assert stepped(scale, overflowed=True) is False  # nothing less is left to try
    assert scale.state == [1.0, 7]
    scale.restore([half.LARGEST, 999])
    stepped(scale, overflowed=False)
    assert scale.state == [half.LARGEST, 0]
    fixed = LossScale()
    assert [stepped(fixed, overflowed=overflowed) for overflowed in (True, False)] == [False, False]
    assert fixed.state == [1.0, 0]
    loss = torch.tensor(3.0)
    assert fixed.times(loss) is loss
    scale.restore([4.0, 0])
    assert float(scale.times(loss)) == 12.0


def test_a_scale_is_restored_within_its_ends():
    scale = LossScale(nn.Linear(1, 1))
    for state in ([1, 0], [half.LARGEST, half.GROWTH - 1], [2.5, 3]):
        scale.restore(state)
        assert scale.state == state
        assert (scale.value.dtype, scale.good.dtype) == (torch.float32, torch.int64)
    for bad in ([half.LARGEST * 2, 0], [1.0, half.GROWTH], [0.99, 0], [1.0, -1], [1.0, 0, 0], (1.0, 0), [1.0, None]):
        with pytest.raises(ValueError, match="loss_scale must be a scale and a number of steps, got"):
            scale.restore(bad)
    assert scale.state == [2.5, 3]


def test_gradients_are_divided_by_the_scale_that_there_is_then():
    net = linear(1.0, 2.0)
    scale = LossScale(net)
    for value in (4.0, 16.0):
        scale.restore([value, 0])
        (slope,) = torch.autograd.grad(net(torch.tensor([[3.0, 5.0]])).sum(), [net.weight])
        assert slope.tolist() == [[3 / value, 5 / value]]
    plain = linear(1.0, 2.0)
    assert LossScale(None).state == [1.0, 0]
    plain(torch.tensor([[3.0, 5.0]])).sum().backward()
    assert plain.weight.grad is not None
    assert plain.weight.grad.tolist() == [[3.0, 5.0]]


def test_a_trunk_computes_in_float16_and_everything_else_as_it_does():
    net = SEDD(9, width=16, depth=1, heads=2, cond_dim=8, dropout=0.0, length=8, scale_by_sigma=True).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    less: Any = in_half(net)
    x, sigma = torch.zeros(2, 8, dtype=torch.int64), torch.tensor([0.5, 1.0])
    seen: list[torch.dtype] = []
    net.blocks[0].register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    with torch.no_grad():
        hidden = less.hidden(x, sigma)
        full = net.hidden(x, sigma)
    assert hidden.dtype == full.dtype == torch.float32
    assert not torch.equal(hidden, full)
    torch.testing.assert_close(hidden, full, rtol=2e-2, atol=2e-2)
    assert (less.num_states, less.length) == (9, 8)
    assert less.head.__self__ is net

    class Own(nn.Linear):
        def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            out = super().forward(x) * scale
            seen.append(out.dtype)
            return out

    own: Any = in_half(Own(4, 4))
    out = own(torch.ones(1, 4), scale=2.0)
    assert (seen[-1], out.dtype) == (torch.float16, torch.float32)
    torch.testing.assert_close(out, own.net(torch.ones(1, 4), 2.0), rtol=1e-2, atol=1e-2)
    assert own.in_features == 4


def test_a_loss_takes_the_network_in_float16_when_told(monkeypatch):
    class Given:
        def losses(self, net, x0, xt, t, *, lengths, dropout_seeds):
            seen.append(net)
            return torch.tensor(6.0), torch.tensor([2.0, 4.0])

    seen: list[Any] = []
    net = nn.Linear(1, 1)
    loss = Loss(net, Given())  # type: ignore[arg-type]
    x = torch.zeros(2, 3, dtype=torch.int64)
    assert loss.in_float16 is False
    mean, each = loss(x, x, torch.ones(2))
    assert (float(mean), each.tolist()) == (3.0, [2.0, 4.0])
    monkeypatch.setattr(engines, "in_half", lambda net: ("half", net))
    loss.in_float16 = True
    loss(x, x, torch.ones(2))
    assert seen == [net, ("half", net)]
    assert math.isfinite(float(mean))
