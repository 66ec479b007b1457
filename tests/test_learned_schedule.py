"""A learned schedule and a network in one backward pass: the loss is the network's, its square the schedule's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from sedd_graphs import Absorbing, Geometric, Learned, Uniform
from sedd_objectives import denoising_loss, denoising_score_entropy
from torch import Tensor, nn

START = Geometric(1e-3, 8.0)
DATA = torch.tensor([0.6, 0.2, 0.15, 0.05], dtype=torch.float64)


def gradients(graph, noise, paced):
    """Those of a table of scores, and of the schedule, for one batch."""
    torch.manual_seed(0)
    table = torch.nn.Embedding(graph.num_states, graph.num_states)
    x0, t = torch.randint(4, (16, 6)), torch.rand(16)
    loss = denoising_loss(lambda x, sigma: table(x), graph, noise, x0, t=t)
    total = loss.mean() + (noise.second_moment(t, loss).mean() if paced else 0)
    total.backward()
    return table.weight.grad, noise.log_density.grad if paced else None


@pytest.mark.parametrize("graph", [Uniform(5), Absorbing(4)], ids=repr)
def test_network_and_schedule_learn_side_by_side(graph):
    """The network's gradient is what it is with the schedule fixed; the schedule has one of its own."""
    noise = Learned(START, knots=6)
    together, pace = gradients(graph, noise, paced=True)
    alone, _ = gradients(graph, START, paced=False)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)  # a learned schedule computes in float64
    assert pace.isfinite().all()
    assert pace.abs().max() > 0


class Scores(nn.Module):
    """Log-scores that are linear in a few functions of the noise, and under absorption less log(e^sigma - 1)."""

    def __init__(self, graph: Any) -> None:
        super().__init__()
        self.absorbs = graph.mask_id is not None
        self.weight = nn.Parameter(torch.zeros(graph.num_states, graph.num_states, 4))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.reshape(-1, 1, 1, 1).float()
        basis = torch.cat([torch.ones_like(level), (-level).exp(), (-4 * level).exp(), level.log() / 8], -1)
        log_score = (self.weight[x] * basis).sum(-1)
        return log_score - level[..., 0].expm1().log() if self.absorbs else log_score


def moments(net: nn.Module, graph: Any, noise: Any) -> tuple[float, float]:
    """The mean and the second moment of dsigma l over uniform times, over all tokens and states."""
    t = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    with torch.no_grad():
        sigma, dsigma = noise(t)
        x0, x = (
            part.flatten() for part in torch.meshgrid(torch.arange(4), torch.arange(graph.num_states), indexing="ij")
        )
        p = graph.transition_from(x0.expand(1000, -1), sigma).at(x.expand(1000, -1))
        possible = (p > 0).all(0)
        x0, x, p = x0[possible].expand(1000, -1), x[possible].expand(1000, -1), p[:, possible]
        estimate = dsigma[:, None] * denoising_score_entropy(net(x, sigma).double(), graph, x, x0, sigma)
        weight = DATA[x0] * p / 1000
    return float((weight * estimate).sum()), float((weight * estimate.square()).sum())


def trained(graph: Any, noise: Any, steps: int, seed: int) -> nn.Module:
    """A network, and the schedule if it learns, after so many steps of one optimiser for both."""
    random = torch.Generator().manual_seed(seed)
    net = Scores(graph)
    parameters = [{"params": net.parameters(), "lr": 0.05}]
    if isinstance(noise, Learned):
        parameters.append({"params": noise.parameters(), "lr": 0.08})
    optimizer = torch.optim.Adam(parameters)
    for step in range(steps):
        x0 = torch.multinomial(DATA, 512, replacement=True, generator=random)[:, None]
        t = torch.rand(512, generator=random)
        loss = denoising_loss(net, graph, noise, x0, t, generator=random)
        total = loss.mean()
        if isinstance(noise, Learned):
            total = total + noise.second_moment(t, loss).mean()
        for group in optimizer.param_groups[:1]:
            group["lr"] = 0.05 * (1 - step / steps)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return net


@pytest.mark.parametrize(
    ("steps", "seeds"),
    [pytest.param(150, [0], id="few"), pytest.param(600, [0, 1, 2], id="more", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("graph", [Uniform(4), Absorbing(4)], ids=repr)
def test_trained_together_the_variance_falls_and_the_bound_is_no_worse(
    graph: Any, steps: int, seeds: list[int]
) -> None:
    """Against the same network under the schedule to begin with: enumerated mean and second moment of both."""
    for seed in seeds:
        noise = Learned(START, knots=6)
        together, alone = trained(graph, noise, steps, seed), trained(graph, START, steps, seed)
        mean, moment = moments(together, graph, noise)
        mean_alone, moment_alone = moments(alone, graph, START)
        assert moment < 0.9 * moment_alone
        assert mean < 1.01 * mean_alone


def test_the_readme_trains_both() -> None:
    """The passage of sedd-graphs' README as it stands, on tokens of these frequencies."""
    text = (Path(__file__).parents[1] / "packages/sedd-graphs/README.md").read_text(encoding="utf-8")
    (passage,) = (block for block in re.findall(r"```py\n(.*?)```", text, re.DOTALL) if "second_moment" in block)
    torch.manual_seed(0)
    batches = (torch.multinomial(DATA, 512, replacement=True)[:, None] for _ in range(150))
    names: dict[str, Any] = {"torch": torch, "graph": Uniform(4), "score": Scores(Uniform(4)), "batches": batches}
    exec(passage, names)
    mean, moment = moments(names["score"], names["graph"], names["noise"])
    assert mean < 1.01 * float(-(DATA * DATA.log()).sum())
    assert moment < 12
