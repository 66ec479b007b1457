"""The engine's step in every ZeRO stage against the same step written by hand, its average, and steps not finite."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sedd_graphs import Absorbing, LogLinear
from sedd_nets import SEDD
from sedd_objectives import denoising_loss
from sedd_train import zero_shards
from sedd_train.deepspeed_options import zero_options
from sedd_train.ema import EMA
from sedd_train.engine import LINEAR, Loss, learning_rate, start_engine, train_step
from sedd_train.objectives import ScoreEntropy

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("process")]  # DeepSpeed warns
GRAPH, NOISE = Absorbing(11), LogLinear()


def network():
    torch.manual_seed(0)
    net = SEDD(12, width=16, depth=2, heads=2, cond_dim=8, dropout=0.0, length=8, scale_by_sigma=True)
    torch.nn.init.normal_(net.output_layer.linear.weight, std=0.1)
    return net


def batch(step, size=4):
    generator = torch.Generator().manual_seed(step)
    x0 = torch.randint(11, (size, 8), generator=generator)
    t = torch.rand(size, generator=generator) * 0.9 + 0.05
    return x0, GRAPH.sample(x0, NOISE(t)[0], generator=generator), t


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_steps_and_their_average_are_those_of_a_plain_loop(stage):
    """AdamW, clipping, accumulation over two micro-batches, and the average with its warm-up, in float32.

    In the fourth step one of the micro-batches has no masks, so that nothing of it reaches the head.
    """
    engine = start_engine(Loss(network(), ScoreEntropy(GRAPH, NOISE)), batch_size=8, micro_batches=2, stage=stage)
    average = EMA(engine, 0.5)

    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    expected = {name: p.detach().clone() for name, p in net.named_parameters()}
    for step in range(5):
        lr = learning_rate(step, peak=1e-2, warmup=3, steps=5)
        micro_batches = [batch(2 * step), batch(2 * step + 1)]
        if step == 3:
            x0, _, t = micro_batches[0]
            micro_batches[0] = x0, x0, t
        done = train_step(engine, micro_batches, lr)
        average.update()

        optimizer.param_groups[0]["lr"] = lr
        losses = [denoising_loss(net, GRAPH, NOISE, x0, t, xt=xt) for x0, xt, t in micro_batches]
        optimizer.zero_grad()
        torch.cat(losses).mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        for name, p in net.named_parameters():
            expected[name].lerp_(p.detach(), 1 - min(0.5, (1 + step) / (10 + step)))

        assert done.applied
        assert done.loss == pytest.approx(float(torch.cat(losses).detach().mean()), rel=1e-5)
        assert done.grad_norm == pytest.approx(float(norm), rel=1e-4)
    found = average.gather()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)
    pieces = zero_shards.scatter(engine, found)  # and apart again
    assert all(torch.equal(a, b) for a, b in zip(pieces, average.pieces, strict=True))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_changes_nothing(stage):
    engine = start_engine(Loss(network(), ScoreEntropy(GRAPH, NOISE)), batch_size=4, micro_batches=1, stage=stage)
    train_step(engine, [batch(0)], 1e-2)
    before = zero_shards.gather(engine)
    hook = engine.module.net.output_layer.linear.bias.register_hook(lambda gradient: gradient * float("nan"))
    assert not train_step(engine, [batch(1)], 1e-2).applied
    hook.remove()
    after = zero_shards.gather(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert train_step(engine, [batch(2)], 1e-2).applied
    assert not torch.equal(zero_shards.gather(engine)["vocab_embed.embedding"], before["vocab_embed.embedding"])


def test_an_engine_of_stage_3_changes_no_later_one():
    """DeepSpeed puts a function of its own in the place of torch's linear layer, and leaves it there."""
    start_engine(Loss(network(), ScoreEntropy(GRAPH, NOISE)), batch_size=4, micro_batches=1, stage=3)
    start_engine(Loss(network(), ScoreEntropy(GRAPH, NOISE)), batch_size=4, micro_batches=1, stage=1)
    assert torch.nn.functional.linear is LINEAR
    assert LINEAR.__module__ == "torch._C._nn"


def test_what_is_compiled_is_compiled_with_torchs_linear_layer():
    """Of DeepSpeed's a compiler made, on a GPU, a step that left weights without a gradient."""
    plain, blocks, again, whole = (network() for _ in range(4))
    blocks.compile_blocks()
    whole.compile()
    for net, own in ((plain, False), (blocks, True), (again, False), (whole, True)):
        start_engine(Loss(net, ScoreEntropy(GRAPH, NOISE)), batch_size=4, micro_batches=1, stage=3)
        assert (torch.nn.functional.linear is LINEAR) == own
    start_engine(Loss(network(), ScoreEntropy(GRAPH, NOISE)), batch_size=4, micro_batches=1, stage=1)


def test_the_learning_rate():
    rates = [learning_rate(step, peak=1.0, warmup=4, steps=10, decay_to=0.1) for step in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert learning_rate(10, peak=1.0, warmup=4, steps=10, decay_to=0.1) == pytest.approx(0.1)
    assert learning_rate(9, peak=2.0, warmup=4, steps=10) == 2.0


def told_to_deepspeed(monkeypatch, **how):
    """What DeepSpeed is given for an engine of these options: its config and the optimiser's numbers."""
    import deepspeed

    told = {}

    def initialize(*, model, optimizer, config):
        told.update(config | {"optimizer": optimizer})
        return SimpleNamespace(device="cpu"), None

    monkeypatch.setattr(deepspeed, "initialize", initialize)
    loss = Loss(network(), ScoreEntropy(GRAPH, NOISE))
    engine = start_engine(loss, **{"batch_size": 12, "micro_batches": 3} | how)
    return told, engine


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("offload", [False, True])
def test_deepspeed_is_told_what_the_recipe_says(monkeypatch, stage, offload):
    told, engine = told_to_deepspeed(
        monkeypatch, stage=stage, offload=offload and stage > 0, clip=0.5, precision="bf16"
    )
    assert (told["train_batch_size"], told["train_micro_batch_size_per_gpu"]) == (12, 4)
    assert told["gradient_clipping"] == (0.5 if stage else 0.0)
    assert engine.clip_without_zero == 0.5
    assert told["torch_autocast"] == {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    assert told["zero_allow_untested_optimizer"] is True
    assert told["zero_force_ds_cpu_optimizer"] is False
    assert told["timers"] == {"throughput": {"enabled": False}}  # which would wait for the device
    zero = told["zero_optimization"]
    assert (zero["stage"], zero["reduce_bucket_size"]) == (stage, 1 << 16)
    assert ("offload_optimizer" in zero) is (offload and stage > 0)
    assert ("offload_param" in zero) is (offload and stage == 3)
    assert all(zero[name]["device"] == "cpu" for name in ("offload_optimizer", "offload_param") if name in zero)
    assert ("stage3_param_persistence_threshold" in zero) is (stage == 3)


def test_options_of_deepspeed_are_added_and_replace_what_is_there(monkeypatch):
    options = {"wall_clock_breakdown": True, "zero_optimization": {"reduce_bucket_size": 7}}
    told, _ = told_to_deepspeed(monkeypatch, stage=2, options=options)
    assert told["wall_clock_breakdown"] is True
    zero = told["zero_optimization"]
    assert (zero["stage"], zero["reduce_bucket_size"], zero["allgather_bucket_size"]) == (2, 7, 1 << 16)
    assert told["train_batch_size"] == 12
    assert "overlap_comm" not in zero
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for ranks, overlap in ((2, True), (1, False)):
        assert zero_options(1, 10**9, offload=False, ranks=ranks) == {
            "stage": 1, "reduce_bucket_size": 1 << 26, "allgather_bucket_size": 1 << 26, "overlap_comm": overlap,
        }  # fmt: skip


def test_deepspeed_itself_takes_the_options():
    """Small buckets, so that one step's gradients go through several: the same weights."""
    weights = []
    for options in ({}, {"zero_optimization": {"reduce_bucket_size": 100, "allgather_bucket_size": 100}}):
        loss = Loss(network(), ScoreEntropy(GRAPH, NOISE))
        engine = start_engine(loss, batch_size=4, micro_batches=1, stage=2, options=options)
        assert train_step(engine, [batch(0)], 1e-2).applied
        weights.append(zero_shards.gather(engine))
        if options:
            assert engine.zero_reduce_bucket_size() == engine.zero_allgather_bucket_size() == 100
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=0, atol=1e-7)


def test_the_optimiser_is_adamw_with_the_numbers_given(monkeypatch):
    told, engine = told_to_deepspeed(monkeypatch, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    optimizer = told["optimizer"]
    assert type(optimizer) is torch.optim.AdamW
    group = optimizer.param_groups[0]
    wanted = {"lr": 0.0, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, "fused": True}
    assert {name: group[name] for name in wanted} == wanted
    assert "torch_autocast" not in told
    assert (told["zero_optimization"]["stage"], engine.clip_without_zero) == (1, 1.0)
    group = told_to_deepspeed(monkeypatch)[0]["optimizer"].param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-8, 0.0)


def test_the_learning_rate_falls_as_a_cosine():
    def rate(step, **how):
        return learning_rate(step, **{"peak": 2.0, "warmup": 10, "steps": 110, "decay_to": 0.1} | how)

    assert rate(0) == pytest.approx(0.2)
    assert rate(9) == rate(10) == pytest.approx(2.0)
    assert rate(60) == pytest.approx(2 * (0.1 + 0.9 / 2))
    assert rate(35) == pytest.approx(2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))))
    assert rate(110) == rate(200) == pytest.approx(0.2)
    assert rate(0, warmup=0) == pytest.approx(2.0)
    assert rate(10, warmup=10, steps=10) == pytest.approx(2.0)


def test_the_loss_is_the_mean_of_its_sequences_and_passes_on_what_is_not_finite():
    class Given:
        def __init__(self, each):
            self.each = torch.tensor(each)

        def losses(self, net, x0, xt, t, *, lengths, dropout_seeds):
            seen.append((lengths, dropout_seeds))
            return (self.each * net.weight).sum(), self.each

    seen: list[object] = []
    net = torch.nn.Linear(1, 1, bias=False)
    x = torch.zeros(4, 3, dtype=torch.int64)
    for each, finite in (([1.0, 2.0, 3.0, 6.0], True), ([1.0, math.inf, 3.0, 6.0], False)):
        net.weight.data.fill_(1.0)
        net.weight.grad = None
        mean, losses = Loss(net, Given(each))(x, x, torch.ones(4), "seeds", "lengths")  # type: ignore[arg-type]
        assert torch.equal(losses, torch.tensor(each))
        mean.backward()
        gradient: Any = net.weight.grad
        assert bool(gradient.isfinite()) is finite
        if finite:
            assert float(mean.detach()) == float(gradient) == 3.0
    assert seen == [("lengths", "seeds")] * 2
