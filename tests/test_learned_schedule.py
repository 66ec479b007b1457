"""A learned schedule and a network in one backward pass: the loss is the network's, its square the schedule's."""

from __future__ import annotations

import pytest
import torch
from sedd_graphs import Absorbing, Geometric, Learned, Uniform
from sedd_objectives import denoising_loss

START = Geometric(1e-3, 8.0)


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
