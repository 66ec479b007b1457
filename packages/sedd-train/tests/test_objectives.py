"""The objectives as the training script uses them: their noise, their bounds, and a run of each from end to end."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from sedd_graphs import Absorbing, LogLinear, Uniform
from sedd_nets import MDLM, SEDD, Causal
from sedd_objectives import lambda_cross_entropy_loss
from sedd_train import load, load_trained, randomness
from sedd_train.evaluation import bounds
from sedd_train.objectives import D3PM, Autoregressive, Objective, ScoreEntropy
from sedd_train.tokens import inside

NOISE = LogLinear()
SIZES: dict[str, Any] = {"width": 16, "depth": 1, "heads": 2, "dropout": 0.0, "length": 8}


def randomise(net):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return net.eval()


def test_a_normalised_network_s_score_entropy_is_its_masked_cross_entropy():
    graph, net = Absorbing(11), randomise(MDLM(12, cond_dim=8, **SIZES))
    x0 = torch.randint(11, (6, 8), generator=torch.Generator().manual_seed(1))
    xt, t = ScoreEntropy(graph, NOISE).noised(x0, torch.linspace(0.1, 0.9, 6), seed=0, step=0, samples=range(6))
    total, each = ScoreEntropy(graph, NOISE).losses(net, x0, xt, t)
    # By time, and by the mask probability lambda, which is (1 - eps) t for the log-linear schedule: dlambda / dt apart.
    mask_probability = -torch.expm1(-NOISE(t)[0])
    expected = (1 - 1e-3) * lambda_cross_entropy_loss(net, graph, x0, mask_probability, xt=xt).detach()
    torch.testing.assert_close(each, expected, rtol=1e-5, atol=0)
    assert float(total.detach()) == pytest.approx(float(expected.sum()), rel=1e-5)


@pytest.mark.parametrize(
    ("graph", "objective"),
    [
        (Absorbing(11), D3PM(Absorbing(11), NOISE, 50)),
        (Uniform(11), D3PM(Uniform(11), NOISE, 50)),
        (Absorbing(11), Autoregressive(start=11)),
    ],
)
def test_the_mean_of_a_baseline_s_losses_is_its_bound_without_the_prior_s_term(graph, objective):
    """Within 5 standard errors: a false alarm in 2 million. The autoregressive one is exact."""
    states = graph.num_states
    net = (
        Causal(states, **SIZES)
        if isinstance(objective, Autoregressive)
        else SEDD(states, cond_dim=8, **SIZES, scale_by_sigma=True)
    )
    net = randomise(net)
    x0 = torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(1)).repeat(500, 1)
    t = randomness.times(0, 0, range(len(x0)), len(x0), 1e-6)[torch.randperm(len(x0))]
    with torch.no_grad():
        losses = objective.losses(net, x0, *objective.noised(x0, t, seed=0, step=0, samples=range(len(x0))))[1]
    bound = bounds(net, objective, x0, num_times=2, chunk=500).double() * 8
    difference = bound - losses.double()
    error = float(difference.std()) / len(x0) ** 0.5
    expected = 0.0
    if isinstance(objective, D3PM):
        sigma = NOISE(torch.ones(1))[0].expand(len(x0))
        expected = float(graph.prior_kl(x0, sigma).sum(-1).mean())
    assert abs(float(difference.mean()) - expected) < 5 * error + 1e-6


def test_the_steps_of_d3pm_are_all_hit_alike():
    objective = D3PM(Absorbing(11), NOISE, 10)
    x0 = torch.zeros(1000, 2, dtype=torch.int64)
    t = objective.noised(x0, randomness.times(0, 0, range(1000), 1000, 1e-6), seed=0, step=0, samples=range(1000))[1]
    assert torch.equal((t * 10).round().long().bincount(), torch.tensor([0, *[100] * 10]))


@pytest.mark.parametrize("kind", ["score-entropy", "d3pm", "autoregressive"])
def test_a_document_in_a_padded_row_costs_what_it_costs_alone(kind):
    """In float64: loss, gradient, and bound."""
    graph, x0 = Absorbing(11), torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(1))
    lengths, seeds = torch.tensor([8, 3, 5]), torch.tensor([4, 5, 6])
    objectives: dict[str, Objective] = {
        "score-entropy": ScoreEntropy(graph, NOISE),
        "d3pm": D3PM(graph, NOISE, 50),
        "autoregressive": Autoregressive(start=11),
    }
    objective = objectives[kind]
    sizes = SIZES | {"dropout": 0.5}
    net = Causal(12, **sizes) if kind == "autoregressive" else SEDD(12, cond_dim=8, **sizes, scale_by_sigma=True)
    net = randomise(net).double().train()
    xt, t = objective.noised(x0, torch.tensor([0.9, 0.8, 0.7]).double(), seed=0, step=0, samples=range(3))

    def run(rows, length, given):
        clean, noised = x0[rows, :length], xt[rows, :length]
        total, each = objective.losses(net, clean, noised, t[rows], lengths=given, dropout_seeds=seeds[rows])
        return each, torch.autograd.grad(total, list(net.parameters()), allow_unused=True)

    padded, slopes = run(slice(0, 3), 8, lengths)
    alone = [run(slice(i, i + 1), n, None) for i, n in enumerate(lengths.tolist())]
    torch.testing.assert_close(padded, torch.cat([each for each, _ in alone]), rtol=1e-6, atol=0)
    for slope, *parts in zip(slopes, *(parts for _, parts in alone), strict=True):
        if slope is not None:
            torch.testing.assert_close(slope, sum(parts), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["score-entropy", "d3pm", "autoregressive"])
def test_what_fills_a_row_up_is_no_part_of_its_bound(kind):
    graph, lengths = Absorbing(11), torch.tensor([8, 3, 5])
    objectives: dict[str, Objective] = {
        "score-entropy": ScoreEntropy(graph, NOISE),
        "d3pm": D3PM(graph, NOISE, 50),
        "autoregressive": Autoregressive(start=11),
    }
    net = Causal(12, **SIZES) if kind == "autoregressive" else SEDD(12, cond_dim=8, **SIZES, scale_by_sigma=True)
    net, x0 = randomise(net), torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(1))
    found = []
    for filling in (0, 7):
        rows = torch.where(inside(lengths, 8) > 0, x0, filling)
        generator = torch.Generator().manual_seed(2)
        found.append(objectives[kind].bound(net, rows, num_times=4, generator=generator, lengths=lengths).detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0)


def test_left_to_right_samples_hold_tokens_alone():
    """However likely the network takes the state that stands before the first token."""

    class Fond(torch.nn.Module):
        num_states = 4

        def forward(self, x, **_):
            return torch.tensor([0.0, 0.0, 0.0, 30.0]).expand(*x.shape, 4)

    generator = torch.Generator().manual_seed(0)
    x = Autoregressive(start=3).sample(Fond(), (8, 5), steps=1, generator=generator, device="cpu")
    assert x.shape == (8, 5)
    assert set(x.flatten().tolist()) == {0, 1, 2}


@pytest.mark.filterwarnings("default")  # DeepSpeed warns
@pytest.mark.parametrize(
    "values",
    [
        {
            "objective": "d3pm",
            "graph": "uniform",
            "scale_by_sigma": False,
            "informed_start": False,
            "d3pm_steps": 20,
        },
        {"objective": "autoregressive", "network": "causal"},
        {"network": "mdlm", "packing": False},
    ],
    ids=["d3pm", "autoregressive", "mdlm, padded"],
)
def test_a_run_ends_in_a_model_that_is_read_back_as_what_it_is(here, tmp_path, values):
    output = tmp_path / "run"
    here(output, **values, steps=2, dropout=0.1)
    summary = json.loads((output / "summary.json").read_text())
    net, objective, tokenizer = load_trained(output)
    text = objective.sample(net, (2, 8), steps=2, generator=torch.Generator().manual_seed(0), device="cpu")
    assert text.shape == (2, 8)
    assert len(tokenizer.decode(text[0].tolist())) > 0
    assert 0 < summary["nats_per_token"] < 12
    if "mdlm" in values.values():
        assert isinstance(load(output).net, MDLM)
    else:
        with pytest.raises(ValueError, match="is no score model: read it by"):
            load(output)
