"""Muon against its formula in float64 by singular values, in the engine, continued, and on two ranks."""

from __future__ import annotations

import math
import os
import signal
from typing import Any

import pytest
import safetensors.torch
import torch
from sedd_graphs import Absorbing, LogLinear
from sedd_nets import RADD, SEDD
from sedd_train import SetupError, plan, recipes, train
from sedd_train.engine import Loss, launch_step, start_engine, train_step
from sedd_train.muon import COEFFICIENTS, MOMENTUM, Muon, matrices_of, orthogonal
from sedd_train.objectives import ScoreEntropy
from torch import nn

pytestmark = pytest.mark.filterwarnings("default")  # DeepSpeed warns
MUON = {"optimizer": "muon", "zero_stage": 0, "weight_decay": 0.1}


def by_singular_values(u, steps=5):
    """The iteration on a matrix is its polynomial on the singular values: U p(...p(S / |S|)) V^T, in float64."""
    left, values, right = torch.linalg.svd(u.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(steps):
        a, b, c = COEFFICIENTS
        values = a * values + b * values**3 + c * values**5
    return (left * values) @ right


@pytest.mark.parametrize("shape", [(8, 8), (16, 4), (4, 16), (128, 512), (512, 128), (1, 5)], ids=str)
def test_a_matrix_becomes_about_orthogonal(shape):
    u = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonal(u)
    torch.testing.assert_close(found.double(), by_singular_values(u), rtol=0, atol=1e-4)
    values = torch.linalg.svdvals(found)
    if min(shape) > 8 or shape[0] != shape[1]:  # a square one of random numbers has a value close to 0
        assert 0.65 < float(values.min()) <= float(values.max()) < 1.25
    torch.testing.assert_close(orthogonal(1e-6 * u), found, rtol=0, atol=1e-3)  # of whatever size


def test_each_matrix_of_a_stack_becomes_so_by_itself_and_nothing_stays_nothing():
    stack = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1))
    found = orthogonal(stack)
    for one, whole in zip(stack, found, strict=True):
        torch.testing.assert_close(orthogonal(one), whole)
    assert torch.equal(orthogonal(torch.zeros(4, 6)), torch.zeros(4, 6))


def test_steps_are_those_of_the_formula():
    """Three of them, with decay, for a matrix and for a stack of three; the rest is AdamW's, bit for bit."""
    generator = torch.Generator().manual_seed(2)
    one, three, vector = (torch.randn(s, generator=generator, requires_grad=True) for s in ((6, 4), (6, 4), (5,)))
    other = vector.detach().clone().requires_grad_()
    lr, beta, decay = 0.03, MOMENTUM, 0.5
    given: dict[str, Any] = {"lr": lr, "betas": (0.8, 0.9), "eps": 1e-8, "fused": True}
    groups: list[dict[str, Any]] = [
        {"params": [one], "parts": 1},
        {"params": [three], "parts": 3},
        {"params": [vector]},
    ]
    muon, adamw = Muon(groups, weight_decay=decay, **given), torch.optim.AdamW([other], weight_decay=decay, **given)
    expected = [one.detach().double(), three.detach().double()]
    momenta = [torch.zeros(6, 4).double() for _ in range(2)]
    for _ in range(3):
        for weight in (one, three, vector):
            weight.grad = torch.randn(weight.shape, generator=generator)
        assert vector.grad is not None
        other.grad = vector.grad.clone()
        for i, (weight, parts) in enumerate(((one, 1), (three, 3))):
            assert weight.grad is not None
            gradient = weight.grad.double()
            momenta[i] = beta * momenta[i] + (1 - beta) * gradient
            ahead = beta * momenta[i] + (1 - beta) * gradient
            steps = [0.2 * math.sqrt(max(part.shape)) * by_singular_values(part) for part in ahead.chunk(parts)]
            expected[i] = (1 - lr * decay) * expected[i] - lr * torch.cat(steps)
        muon.step()
        adamw.step()
    for weight, wanted in zip((one, three), expected, strict=True):
        torch.testing.assert_close(weight.detach().double(), wanted, rtol=0, atol=1e-5)
        assert muon.state[weight].keys() == {"exp_avg"}
    assert torch.equal(vector, other)
    before = one.detach().clone()
    muon.step()  # without gradients
    assert torch.equal(one, before)


def network(kind=SEDD):
    torch.manual_seed(0)
    more = {"cond_dim": 8, "scale_by_sigma": True} if kind is SEDD else {}
    return kind(12, width=16, depth=2, heads=2, dropout=0.0, length=8, **more)


@pytest.mark.parametrize("kind", [SEDD, RADD])
def test_it_trains_the_matrices_of_the_blocks_alone(kind):
    net = network(kind)
    net.blocks[1].attn_out.weight.requires_grad_(False)
    names = {id(p): name for name, p in net.named_parameters()}
    found = {parts: {names[id(p)] for p in weights} for parts, weights in matrices_of(net).items()}
    plain = {"blocks.0.attn_out.weight", *(f"blocks.{b}.mlp.{i}.weight" for b in (0, 1) for i in (0, 2))}
    assert found == {1: plain, 6: {"blocks.0.attn_qkv.weight", "blocks.1.attn_qkv.weight"}}
    assert matrices_of(nn.Linear(3, 3)) == {}


def test_the_engine_gives_every_weight_to_one_of_the_two(process):
    graph, noise = Absorbing(11), LogLinear()
    net = network()
    loss = Loss(net, ScoreEntropy(graph, noise))
    engine = start_engine(loss, batch_size=2, micro_batches=1, stage=0, optimizer="muon", weight_decay=0.1)
    groups = engine.basic_optimizer.param_groups
    given = [id(p) for group in groups for p in group["params"]]
    assert sorted(given) == sorted(id(p) for p in net.parameters())
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.1, 0.0]
    x0 = torch.zeros(2, 8, dtype=torch.int64)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    done = train_step(engine, [(x0, torch.full((2, 8), 11), torch.full((2,), 0.5))], 1e-2)
    assert done.applied
    still = {name for name, p in net.named_parameters() if torch.equal(before[name], p)}
    assert "output_layer.linear.weight" not in still
    hook = net.output_layer.linear.bias.register_hook(lambda gradient: gradient * float("nan"))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    assert not train_step(engine, [(x0, torch.full((2, 8), 11), torch.full((2,), 0.5))], 1e-2).applied
    hook.remove()
    assert all(torch.equal(before[name], p) for name, p in net.named_parameters())


def test_a_run_goes_on_to_the_same_digits(here, losses, tmp_path, monkeypatch):
    """Left at its fifth step and continued, it is the run that nothing happened to; its momenta are stored."""
    values = {**MUON, "steps": 10, "checkpoint_every": 1000}
    here(tmp_path / "whole", **values)
    taken: list[None] = []

    def left(*args, **given):
        taken.append(None)
        if len(taken) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return launch_step(*args, **given)

    monkeypatch.setattr("sedd_train.training.launch_step", left)
    assert here(tmp_path / "left", **values).step == 5
    here(tmp_path / "left", resume=True)
    assert losses(tmp_path / "whole") == losses(tmp_path / "left")
    one, other = (
        safetensors.torch.load_file(tmp_path / run / "checkpoints" / "step-00000010" / "training.safetensors")
        for run in ("whole", "left")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    first, second = (
        {name.partition("/")[2] for name in one if name.startswith(kind)} for kind in ("exp_avg/", "exp_avg_sq/")
    )
    of_muon = {name for name in first if name.startswith("blocks.") and "adaLN" not in name and "norm" not in name}
    assert first - second == {name for name in of_muon if name.endswith("weight")}
    assert one["exp_avg/blocks.0.attn_qkv.weight"].abs().max() > 0


@pytest.mark.slow
def test_two_ranks_train_as_one_process_does(here, start, losses, tmp_path):
    """By Muon, without ZeRO: the same losses but for rounding, and a run that both of them go on with."""
    values = {**MUON, "steps": 8, "eps": 1e-4, "checkpoint_every": 4}
    here(tmp_path / "alone", **values)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    with start(tmp_path / "two", *options, launcher="deepspeed", ranks=2) as run:
        printed = run.output()
        assert run.process.returncode == 0, printed[-3000:]
    here(tmp_path / "two", resume=True, steps=10)  # by one process, from what two have saved
    one, two = losses(tmp_path / "alone"), losses(tmp_path / "two")
    assert set(two) == set(range(1, 11))
    for step, (loss, norm, _) in one.items():
        assert two[step][0] == pytest.approx(loss, rel=1e-5)
        assert two[step][1] == pytest.approx(norm, rel=1e-3)


def test_where_it_does_not_apply_it_is_refused(tmp_path, cache):
    for stage in (1, 2, 3):
        with pytest.raises(ValueError, match=f"adamw with zero_stage = {stage}, whose pieces cut matrices apart"):
            recipes.override(recipes.Recipe(), {"optimizer": "muon", "zero_stage": stage})
    thin = {"optimizer": "muon", "zero_stage": 0, "init": "somewhere", "lora": 4}
    with pytest.raises(ValueError, match="adamw for LoRA's thin matrices"):
        recipes.override(recipes.Recipe(), thin)
    with pytest.raises(ValueError, match="optimizer = 'sgd': expected adamw, muon"):
        recipes.override(recipes.Recipe(), {"optimizer": "sgd"})
    recipe = recipes.override(recipes.Recipe(), {"optimizer": "muon", "zero_stage": 0})
    with pytest.raises(SetupError, match="Linear are like them is not known: train it by adamw"):
        train(recipe, output=tmp_path / "run", net=nn.Linear(2, 2), cache=cache)
    assert not list(tmp_path.glob("run/*"))


def test_it_keeps_one_moment_of_its_matrices():
    held = [plan.memory(1000, stage, 4, muon=600) for stage in (0, 1)]
    assert [held[0]["moments"], held[1]["moments"]] == [8000 - 4 * 600, 2000]
