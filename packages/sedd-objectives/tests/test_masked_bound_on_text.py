"""The bounds' standard deviations on a trained model: a minute's training on English text, then 300 repeats."""

from __future__ import annotations

import pydoc_data.topics  # half a million characters of English that come with Python
from typing import Any

import pytest
import torch
from sedd_objectives import (
    any_order_loss,
    lambda_cross_entropy_loss,
    likelihood_bound,
    masked_likelihood_bound,
    monte_carlo,
)
from torch import nn

LENGTH, HELD_OUT, REPEATS = 256, 40_000, 300


class Convolutions(nn.Module):
    """Logits of the characters from nine neighbours on either side and the noise level."""

    def __init__(self, num_states, width=64):
        super().__init__()
        self.embed, self.noise = nn.Embedding(num_states, width), nn.Linear(3, width)
        self.layers = nn.ModuleList(nn.Conv1d(width, width, 5, padding=2 * d, dilation=d) for d in (1, 2, 1))
        self.head = nn.Linear(width, num_states)

    def forward(self, x, sigma):
        level = -torch.expm1(-sigma)
        noise = self.noise(torch.stack([level, level**2, sigma.log() / 8], -1))
        hidden = (self.embed(x) + noise[:, None]).mT
        for layer in self.layers:
            hidden = hidden + nn.functional.gelu(layer(hidden))
        return self.head(hidden.mT)


@pytest.mark.slow
def test_at_equal_calls_the_deviation_is_at_most_a_quarter(make_graphs, log_linear, capsys):
    """128 calls each; means within 4 standard errors of 300 repeats, a false alarm in 16,000 runs."""
    text = " ".join(pydoc_data.topics.topics.values())
    characters = sorted(set(text))
    ids = torch.tensor([characters.index(c) for c in text])
    graph = make_graphs(len(characters))["absorbing"]
    net, generator = Convolutions(graph.num_states), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(1500):
        start = torch.randint(len(ids) - HELD_OUT - LENGTH, (4, 1), generator=generator)
        loss = lambda_cross_entropy_loss(net, graph, ids[start + torch.arange(LENGTH)], generator=generator).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 256.0)
        optimizer.step()

    def score(x, sigma):
        logits = net(x, sigma)
        log_p = logits.scatter(-1, torch.full_like(x, graph.mask_id)[..., None], -torch.inf).log_softmax(-1)
        return log_p - torch.expm1(sigma).log()[:, None, None]

    x0 = ids[len(ids) - HELD_OUT // 2 :][:LENGTH].expand(REPEATS // 6, -1)
    how: dict[str, Any] = {"generator": generator}

    def repeated(call):
        return torch.cat([call() for _ in range(6)])

    ours = repeated(lambda: masked_likelihood_bound(score, graph, log_linear, x0, **how).value)
    plain = repeated(lambda: likelihood_bound(score, graph, log_linear, x0, num_times=112, **how).value)
    found = {"masked_likelihood_bound": ours, "likelihood_bound": plain}
    draw = lambda: lambda_cross_entropy_loss(net, graph, x0, generator=generator)  # noqa: E731
    found["lambda_cross_entropy_loss"] = monte_carlo(draw, 128).value
    found["any_order_loss"] = monte_carlo(lambda: any_order_loss(net, graph, x0, generator=generator), 128).value
    error = float(((ours.var() + plain.var()) / REPEATS) ** 0.5)
    with capsys.disabled():
        for name, values in found.items():
            print(f"\n| `{name}` | {float(values.mean()):.1f} | {float(values.std()):.2f} |", end="")
    assert abs(float(ours.mean() - plain.mean())) < 4 * error
    assert float(ours.std()) <= float(plain.std()) / 4
