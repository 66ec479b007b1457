"""float16: the steps of float32 within its rounding, in every ZeRO stage; scales that are too large or too small."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sedd_graphs import Absorbing, LogLinear
from sedd_nets import SEDD
from sedd_train import half, loggers, zero_shards
from sedd_train.engine import Loss, start_engine, train_step
from sedd_train.half import LossScale, in_half
from sedd_train.objectives import D3PM, ScoreEntropy
from torch import nn

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("process")]  # DeepSpeed warns
GRAPH, NOISE = Absorbing(11), LogLinear()


def network():
    torch.manual_seed(0)
    net = SEDD(12, width=16, depth=2, heads=2, cond_dim=8, dropout=0.0, length=8, scale_by_sigma=True)
    with torch.no_grad():
        for parameter in net.parameters():  # none is 0, as some are at first, through which no gradient passes
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def batch(step, size=4):
    generator = torch.Generator().manual_seed(step)
    x0 = torch.randint(11, (size, 8), generator=generator)
    t = torch.rand(size, generator=generator) * 0.9 + 0.05
    return x0, GRAPH.sample(x0, NOISE(t)[0], generator=generator), t


def engine_of(precision, stage, objective: Any = None, **how):
    loss = Loss(network(), objective or ScoreEntropy(GRAPH, NOISE))
    return start_engine(loss, batch_size=8, micro_batches=2, stage=stage, precision=precision, **how)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("objective", [ScoreEntropy(GRAPH, NOISE), D3PM(GRAPH, NOISE, 10)])
def test_steps_are_those_of_float32_within_rounding(stage, objective):
    """Loss and gradient norm are told as they are, not scaled; clipping sees them so, too."""
    engines = [engine_of(precision, stage, objective, clip=3.0) for precision in ("fp32", "fp16")]
    for step in range(4):
        batches = [batch(2 * step), batch(2 * step + 1)]
        full, less = (train_step(engine, batches, 1e-2) for engine in engines)
        assert (less.applied, less.scale) == (True, half.FIRST)
        assert less.loss == pytest.approx(full.loss, rel=5e-3)
        assert less.grad_norm != full.grad_norm  # it is another precision
        assert less.grad_norm == pytest.approx(full.grad_norm, rel=2e-2)
    one, other = (zero_shards.gather(engine) for engine in engines)
    assert all(weight.dtype == torch.float32 for weight in other.values())
    moved = torch.cat([(one[name] - value).flatten() for name, value in network().state_dict().items() if name in one])
    apart = torch.cat([(one[name] - other[name]).flatten() for name in one])
    assert apart.norm() < 0.1 * moved.norm()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_scale_that_is_too_large_costs_steps_and_nothing_else(stage):
    engine, same = engine_of("fp16", stage), engine_of("fp16", stage)
    before = zero_shards.gather(engine)
    engine.loss_scale_of_ours.value.fill_(2.0**28)
    scales = []
    while not (done := train_step(engine, [batch(0), batch(1)], 1e-2)).applied:
        assert done.forgiven
        assert math.isfinite(done.loss)
        scales.append(done.scale)
        after = zero_shards.gather(engine)
        assert all(torch.equal(after[name], value) for name, value in before.items())
    assert scales == [2.0 ** (28 - n) for n in range(len(scales))]
    assert len(scales) > 10
    like = train_step(same, [batch(0), batch(1)], 1e-2)  # at the scale that one begins with
    assert done.loss == like.loss
    assert done.grad_norm == pytest.approx(like.grad_norm, rel=1e-2)


def test_what_is_not_finite_itself_is_not_forgiven():
    class Broken(ScoreEntropy):
        def losses(self, net, x0, xt, t, **given):
            total, each = super().losses(net, x0, xt, t, **given)
            return total * math.inf, each * math.inf

    done = train_step(engine_of("fp16", 1, Broken(GRAPH, NOISE)), [batch(0), batch(1)], 1e-2)
    assert not done.applied
    assert not done.forgiven
    engine = engine_of("fp16", 1)
    engine.loss_scale_of_ours.value.fill_(1.0)
    next(engine.module.net.parameters()).register_hook(lambda gradient: gradient * math.nan)
    done = train_step(engine, [batch(0), batch(1)], 1e-2)
    assert (done.applied, done.forgiven, done.scale) == (False, False, 1.0)  # nothing less is left to try


class Faint(nn.Module):
    """Whose gradients are lost in float16 unless they are scaled."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x)


def test_small_gradients_survive_by_the_scale():
    def gradient(scaled):
        torch.manual_seed(0)
        net = Faint()
        scale = LossScale(net if scaled else None)
        out = in_half(net)(torch.eye(4))
        assert out.dtype == torch.float32
        (out.sum() * 1e-8 * scale.value).backward()
        return net.linear.weight.grad

    assert torch.equal(gradient(scaled=False), torch.zeros(4, 4))
    torch.testing.assert_close(gradient(scaled=True), torch.full((4, 4), 1e-8), rtol=5e-3, atol=0)


def test_the_scale_grows_after_steps_that_went_well_and_is_kept(monkeypatch):
    monkeypatch.setattr(half, "GROWTH", 3)
    scale, well, overflowed = LossScale(Faint()), torch.tensor(False), torch.tensor(True)
    for _ in range(3):
        assert not scale.step(overflowed=well)
    assert scale.state == [2 * half.FIRST, 0]
    scale.step(overflowed=well)
    assert scale.step(overflowed=overflowed)
    assert scale.state == [half.FIRST, 0]
    scale.step(overflowed=well)
    other = LossScale(Faint())
    other.restore(scale.state)
    assert other.state == scale.state == [half.FIRST, 1]
    scale.value.fill_(half.LARGEST)
    for _ in range(6):
        scale.step(overflowed=well)
    assert scale.value == half.LARGEST
    scale.restore([1.0, 1])
    assert not scale.step(overflowed=overflowed)  # nothing less is left to try
    assert scale.state == [1.0, 1]
    fixed = LossScale()
    fixed.restore([64.0, 2])
    assert (fixed.state, bool(fixed.step(overflowed=overflowed))) == ([1.0, 0], False)
    for bad in (None, [1.0], [0.5, 0], [1.0, -1], ["x", 0], [math.nan, 0], {"a": 1}):
        with pytest.raises(ValueError, match="loss_scale must be"):
            scale.restore(bad)


def test_only_matrices_decay():
    engine = engine_of("fp32", 1, weight_decay=0.5)
    matrices, others = engine.basic_optimizer.param_groups
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.5, 0.0)
    before = zero_shards.gather(engine)
    same = engine_of("fp32", 1)
    for each in (engine, same):
        train_step(each, [batch(0), batch(1)], 1e-2)
    decayed, plain = zero_shards.gather(engine), zero_shards.gather(same)
    for name, weight in before.items():
        wanted = plain[name] - (0.5 * 1e-2 * weight if weight.ndim > 1 else 0)
        torch.testing.assert_close(decayed[name], wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_are_averaged_in_float32(stage):
    assert set(engine_of("bf16", stage).optimizer.ipg_buckets) == {torch.float32}


@pytest.mark.usefixtures("zero_on_one_rank")
def test_a_run_in_float16_goes_on_digit_for_digit(here, losses, tmp_path):
    values = {"steps": 4, "checkpoint_every": 2, "precision": "fp16", "zero_stage": 2}
    here(tmp_path / "whole", **values)
    here(tmp_path / "cut", **(values | {"steps": 2}))
    here(tmp_path / "cut", steps=4, resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert not [line for line in loggers.read(tmp_path / "whole" / "log.jsonl") if line["kind"] == "skipped"]
