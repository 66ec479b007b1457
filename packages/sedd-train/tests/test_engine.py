"""The engine's step in every ZeRO stage against the same step written by hand, its average, and steps not finite."""

from __future__ import annotations

import pytest
import torch
from sedd_graphs import Absorbing, LogLinear
from sedd_nets import SEDD
from sedd_objectives import denoising_loss
from sedd_train import zero_shards
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


def test_the_learning_rate():
    rates = [learning_rate(step, peak=1.0, warmup=4, steps=10, decay_to=0.1) for step in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert learning_rate(10, peak=1.0, warmup=4, steps=10, decay_to=0.1) == pytest.approx(0.1)
    assert learning_rate(9, peak=2.0, warmup=4, steps=10) == 2.0
