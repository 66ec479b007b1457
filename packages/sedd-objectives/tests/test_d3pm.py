"""D3PM's bound on problems that can be enumerated: what it must exceed, what it tends to, and how fast."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from sedd_objectives import d3pm_bound, d3pm_loss, denoising_score_entropy, reconstruction_loss
from torch import nn

pytestmark = pytest.mark.usefixtures("float64_rates")
KINDS = ["uniform", "absorbing", "hybrid", "dense"]


class Problem:
    """A random distribution of two tokens, its exact posterior p(x0 | x) or a wrong one, and exact expectations."""

    def __init__(self, graph, enumerated, noise, wrong=0.0):
        self.graph, self.noise, self.data = graph, noise, enumerated(graph, length=2)
        self.tokens = self.data.tokens
        generator = torch.Generator().manual_seed(3)
        self.wrong = wrong * torch.randn(len(self.data.states), 2, self.tokens, generator=generator)
        number = torch.cartesian_prod(torch.arange(len(self.data.states)), torch.arange(len(self.data.sequences)))
        self.state, self.clean = number.T

    def model(self, x, sigma):
        """Logits of the clean tokens, all sequences at one noise level; anything at the mask."""
        joint = self.data.kernel(sigma[0]) * self.data.probability
        one_hot = nn.functional.one_hot(self.data.sequences, self.tokens).double()
        posterior = torch.einsum("xs,sly->xly", joint / joint.sum(-1, keepdim=True), one_hot)
        logits = posterior.clamp_min(1e-300).log() + self.wrong
        extra = torch.full((*logits.shape[:2], self.graph.num_states - self.tokens), 9.0)
        return torch.cat([logits, extra], -1)[self.data.number(x)]

    def pairs(self, sigma):
        joint = (self.data.kernel(sigma) * self.data.probability)[self.state, self.clean]
        keep = joint > 1e-30
        return joint[keep], self.data.states[self.state[keep]], self.data.sequences[self.clean[keep]]

    def term(self, step, num_steps):
        """The expected divergence of one step."""
        probability, x, x0 = self.pairs(self.noise(torch.tensor(step / num_steps))[0])
        steps = torch.full((len(x),), step)
        loss = d3pm_loss(self.model, self.graph, self.noise, x0, steps, num_steps=num_steps, xt=x) / num_steps
        return float((probability * loss).sum())

    def prior(self):
        kl = self.graph.prior_kl(self.data.sequences, self.noise(torch.ones(()))[0].expand(len(self.data.sequences)))
        return float((kl.sum(-1) * self.data.probability).sum())

    def bound(self, num_steps):
        return self.prior() + sum(self.term(step, num_steps) for step in range(1, num_steps + 1))

    def exact(self):
        """Entropy and the prior's mismatch: the least that any bound with this prior can be."""
        sigma = self.noise(torch.ones(()))[0]
        uniform = torch.full_like(self.data.probability, 1 / len(self.data.probability))
        p, prior = self.data.marginal(sigma), self.data.kernel(sigma) @ uniform
        return self.data.entropy() + float(torch.where(p > 0, p * (p / prior).log(), 0).sum())

    def log_score(self, x, sigma):
        """The score that matches the model: sum_{x0} p(x0 | x) p(y | x0) / p(x | x0)."""
        p = self.model(x, sigma)[..., : self.tokens].softmax(-1)
        n = self.graph.num_states
        kernel = torch.stack(
            [self.dense(self.graph.transition_from(torch.tensor([y]), sigma[:1]))[0] for y in range(self.tokens)]
        )
        at_x = kernel.T[x]
        weight = torch.where(at_x > 0, p / at_x, 0)
        return (weight @ kernel).log().reshape(*x.shape, n)

    def dense(self, row):
        full = row.base[..., None].expand(*row.base.shape, self.graph.num_states)
        return full.scatter(-1, row.index, row.value)

    def continuous(self, t_min):
        """The bound in continuous time of the matching score, by quadrature over log sigma."""
        low, high = (float(self.noise(torch.tensor(t))[0].log()) for t in (t_min, 1.0))
        nodes, weights = np.polynomial.legendre.leggauss(20)
        total = self.prior()
        for node, weight in zip(nodes, weights, strict=True):
            sigma = torch.tensor(np.exp(low + (high - low) * (node + 1) / 2))
            probability, x, x0 = self.pairs(sigma)
            levels = sigma.expand(len(x))
            loss = denoising_score_entropy(self.log_score(x, levels), self.graph, x, x0, levels)
            total += weight * (high - low) / 2 * float(sigma * (probability * loss.sum(-1)).sum())
        probability, x, x0 = self.pairs(self.noise(torch.tensor(t_min))[0])
        t = torch.full((len(x),), t_min)
        loss = reconstruction_loss(self.log_score, self.graph, self.noise, x0, t, xt=x)
        return total + float((probability * loss).sum())


@pytest.fixture(params=KINDS)
def graph3(request, make_graphs):
    return make_graphs(3)[request.param]


def test_with_the_exact_posterior_it_bounds_the_entropy_for_every_number_of_steps_and_tends_to_it(
    graph3, enumerated, log_linear
):
    """The excess is that of stepping back independently; it halves as the steps double."""
    problem = Problem(graph3, enumerated, log_linear)
    least = problem.exact()
    excess = [problem.bound(num_steps) - least for num_steps in (1, 2, 4, 8, 16)]
    assert all(one > other > 0 for one, other in itertools.pairwise(excess))
    print(excess)
    assert 1.8 < excess[-2] / excess[-1] < 2.2
    assert excess[0] > 0.02


def test_any_posterior_gives_a_bound_for_every_number_of_steps(graph3, enumerated, log_linear):
    problem = Problem(graph3, enumerated, log_linear, wrong=0.7)
    least = problem.exact()
    assert all(problem.bound(num_steps) > least + 0.01 for num_steps in (1, 2, 3, 8))


@pytest.mark.parametrize("wrong", [0.0, 0.7])
def test_tends_to_the_continuous_bound_of_the_matching_score(graph3, enumerated, geometric, wrong):
    """In first order: the difference at 2 T is half of that at T, and extrapolated to T -> infinity it is gone."""
    geometric.low, geometric.high = 1e-3, 4.0
    problem = Problem(graph3, enumerated, geometric, wrong)
    limit = problem.continuous(1e-4)
    coarse, fine = (problem.bound(num_steps) - limit for num_steps in (12, 24))
    assert abs(2 * fine - coarse) < 2e-3
    assert coarse > 0.01


def test_one_step_is_the_reconstruction_from_the_end(graph3, enumerated, geometric):
    """-log p(x0 | x_1): a step to clean data, although this schedule's sigma(0) is not 0."""
    geometric.low, geometric.high = 0.1, 2.0
    problem = Problem(graph3, enumerated, geometric, wrong=0.5)
    sigma = geometric(torch.ones(()))[0]
    _, x, x0 = problem.pairs(sigma)
    found = d3pm_loss(problem.model, graph3, geometric, x0, torch.ones(len(x), dtype=torch.int64), num_steps=1, xt=x)
    possible = problem.dense(graph3.transition_into(x, sigma.expand(len(x))))[..., : problem.tokens] > 0
    logits = problem.model(x, sigma.expand(len(x)))[..., : problem.tokens]
    log_p = logits.masked_fill(~possible, -torch.inf).log_softmax(-1)
    want = -log_p.gather(-1, x0[..., None])[..., 0].sum(-1)
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)


def test_a_step_is_the_divergence_of_posteriors_mixed_by_the_model(graph3, generator, log_linear):
    """From the definition: sum_{x0} p(x_s | x, x0) p_theta(x0 | x), N posteriors, over the x0 that can become x."""
    num_steps, tokens = 5, 3
    for step in range(1, num_steps + 1):
        now = log_linear(torch.tensor(step / num_steps))[0]
        before = log_linear(torch.tensor((step - 1) / num_steps))[0]
        x0 = torch.randint(tokens, (1, 6), generator=generator)
        x = graph3.sample(x0, now[None], generator=generator)
        logits = torch.randn(1, 6, graph3.num_states, generator=generator).requires_grad_()
        model, steps = (lambda x, s, v=logits: v), torch.tensor([step])
        found = d3pm_loss(model, graph3, log_linear, x0, steps, num_steps=num_steps, xt=x)

        def dense(row):
            return row.base[..., None].expand(*row.base.shape, graph3.num_states).scatter(-1, row.index, row.value)

        possible = dense(graph3.transition_into(x, now[None]))[..., :tokens] > 0
        p_clean = logits[..., :tokens].masked_fill(~possible, -torch.inf).softmax(-1)
        p = sum(
            torch.where(possible[..., y], p_clean[..., y], 0)[..., None]
            * dense(graph3.posterior(x, torch.full_like(x, y), before[None], now[None])).nan_to_num()
            for y in range(tokens)
        )
        q = dense(graph3.posterior(x, x0, before[None], now[None]))
        terms = torch.where(q > 0, q * (q / torch.where(q > 0, p, 1)).log(), 0)
        torch.testing.assert_close(found / num_steps, terms.sum((-1, -2)), rtol=1e-9, atol=1e-12)
        one, other = (torch.autograd.grad(loss.sum(), logits)[0] for loss in (found / num_steps, terms))
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-11)


def test_the_drawn_bound_is_the_enumerated_one_within_its_error(graph3, enumerated, log_linear, generator):
    """Value within 4.5 standard errors: a false alarm in 150,000 runs a graph. T = 1 has no diffusion part."""
    problem = Problem(graph3, enumerated, log_linear, wrong=0.7)
    x0 = problem.data.sample(150, generator)
    for num_steps, num_times in ((4, 6), (9, 4)):
        found = d3pm_bound(
            lambda x, s: rows_of(problem, x, s), graph3, log_linear, x0,
            num_steps=num_steps, num_times=num_times, num_reconstructions=4, generator=generator,
        )  # fmt: skip
        error = float(found.value.std()) / len(x0) ** 0.5
        assert abs(float(found.value.mean()) - problem.bound(num_steps)) < 4.5 * error
        torch.testing.assert_close(found.value, found.diffusion + found.prior + found.reconstruction)
        assert found.standard_error.mean() > 0
    single = d3pm_bound(lambda x, s: rows_of(problem, x, s), graph3, log_linear, x0, num_steps=1, generator=generator)
    assert (single.diffusion == 0).all()


def rows_of(problem, x, sigma):
    """The problem's model where sequences have different noise levels."""
    logits = torch.empty(*x.shape, problem.graph.num_states)
    for level in sigma.unique():
        logits[sigma == level] = problem.model(x[sigma == level], sigma[sigma == level])
    return logits


def test_standard_error_is_the_spread_over_seeds(make_graphs, enumerated, log_linear):
    """Mean squared standard error against the variance over 400 seeds; both know it to some 10 %, 40 % are allowed."""
    graph = make_graphs(3)["uniform"]
    problem = Problem(graph, enumerated, log_linear, wrong=0.7)
    x0 = problem.data.sequences[:1].expand(400, -1)
    found = d3pm_bound(
        lambda x, s: rows_of(problem, x, s), graph, log_linear, x0,
        num_steps=20, num_times=8, num_reconstructions=4, generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    assert 0.6 < float((found.standard_error**2).mean() / found.value.var()) < 1.4


def test_weights_multiply_positions_in_all_three_terms_of_the_bound(graph3, log_linear):
    x0 = torch.randint(3, (2, 3), generator=torch.Generator().manual_seed(0))
    logits = torch.randn(2, 3, graph3.num_states, generator=torch.Generator().manual_seed(1))

    def bound(weight):
        return d3pm_bound(
            lambda x, s: logits, graph3, log_linear, x0,
            num_steps=5, num_times=4, num_reconstructions=2, weight=weight, generator=torch.Generator().manual_seed(2),
        )  # fmt: skip

    whole, parts = bound(torch.tensor([2.0, 1.0, 0.5]).expand(2, 3)), [bound(w.expand(2, 3)) for w in torch.eye(3)]
    for name in ("value", "diffusion", "prior", "reconstruction"):
        terms = [getattr(part, name) for part in parts]
        torch.testing.assert_close(getattr(whole, name), 2 * terms[0] + terms[1] + 0.5 * terms[2])


@pytest.mark.parametrize("kind", ["uniform", "absorbing", "hybrid"])  # whose closed forms are differentiable
def test_a_learnt_schedule_receives_its_gradient(kind, make_graphs, generator):
    graph, steps = make_graphs(3)[kind], torch.tensor([2, 3, 5])
    x0 = torch.randint(3, (3, 4), generator=generator)
    xt = graph.sample(x0, steps / 5, generator=generator)
    logits = torch.randn(3, 4, graph.num_states, generator=generator)
    power = torch.tensor(1.3, requires_grad=True)

    def loss(power):
        def noise(t):
            return t**power, power * t ** (power - 1)

        return d3pm_loss(lambda x, s: logits, graph, noise, x0, steps, num_steps=5, xt=xt).sum()

    (slope,) = torch.autograd.grad(loss(power), power)
    h = 1e-5
    quotient = (loss(power.detach() + h) - loss(power.detach() - h)) / (2 * h)
    torch.testing.assert_close(slope, quotient, rtol=1e-6, atol=1e-7)


class Net(nn.Module):
    def __init__(self, num_states):
        super().__init__()
        self.embed, self.head = nn.Embedding(num_states, 8), nn.Linear(8, num_states)
        self.calls, self.rows, self.dtype = 0, 0, None

    def forward(self, x, sigma, where=None):
        hidden = self.embed(x) + sigma[:, None, None].to(self.head.weight.dtype)
        hidden = hidden if where is None else hidden[where]
        self.calls, self.rows = self.calls + 1, self.rows + hidden[..., 0].numel()
        return self.head(hidden)


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_can_move_and_counts_reaches_the_head_and_learns(kind, make_graphs, log_linear, generator):
    graph3 = make_graphs(3)[kind]
    x0 = torch.randint(3, (4, 6), generator=generator)
    weight = torch.tensor([1, 1, 0.5, 1, 0, 0]).expand(4, 6)
    steps = torch.tensor([1, 3, 7, 10])
    xt = graph3.sample(x0, log_linear(steps / 10)[0], generator=generator)
    net = Net(graph3.num_states)
    one = d3pm_loss(net, graph3, log_linear, x0, steps, num_steps=10, xt=xt, weight=weight)
    movable = xt == 3 if kind == "absorbing" else xt >= 0
    assert (net.calls, net.rows) == (1, int((movable & (weight > 0)).sum()))
    one_gradient = torch.autograd.grad(one.sum(), net.head.weight)[0]
    assert one_gradient.abs().sum() > 0
    other = d3pm_loss(lambda x, s: net(x, s), graph3, log_linear, x0, steps, num_steps=10, xt=xt, weight=weight)
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(one_gradient, torch.autograd.grad(other.sum(), net.head.weight)[0])
    parts = [
        weight[:, i] * d3pm_loss(net, graph3, log_linear, x0, steps, num_steps=10, xt=xt, weight=column.expand(4, 6))
        for i, column in enumerate(torch.eye(6))
    ]
    torch.testing.assert_close(one, sum(parts))


def test_bfloat16_is_computed_in_float32_under_autocast(graph3, log_linear, generator):
    torch.set_default_dtype(torch.float32)
    x0 = torch.randint(3, (4, 6), generator=generator)
    steps = torch.tensor([1, 3, 70, 100])
    xt = graph3.sample(x0, log_linear(steps / 100)[0], generator=generator)
    logits = torch.randn(4, 6, graph3.num_states, generator=generator).bfloat16()

    def run(logits):
        return d3pm_loss(lambda x, s: logits, graph3, log_linear, x0, steps, num_steps=100, xt=xt)

    with torch.autocast("cpu", torch.bfloat16):
        found = run(logits)
    assert found.dtype == torch.float32
    assert torch.equal(found, run(logits.float()))
    torch.testing.assert_close(found.double(), run(logits.double()), rtol=2e-5, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x0": torch.zeros(6, dtype=torch.int64)}, r"x0 must have shape \(B, L\)"),
        ({"x0": torch.full((2, 4), 9)}, "x0 must lie in"),
        ({"xt": torch.full((2, 4), -1)}, "xt must lie in"),
        ({"xt": torch.zeros(2, 5, dtype=torch.int64)}, "xt must have shape"),
        ({"step": torch.tensor([0, 1])}, r"step must lie in 1..4 \(num_steps\), got \[0, 1\]"),
        ({"step": torch.tensor([1, 5])}, "step must lie in 1..4"),
        ({"step": torch.tensor([0.5, 1.0])}, "step must be integers"),
        ({"step": torch.tensor([[1], [2]])}, r"step must be integers of shape \(B,\)"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"noise": lambda t: (-t, t)}, "sigma is a total noise and must be >= 0"),
        ({"noise": lambda t: (1 - t, t), "step": torch.tensor([2, 3])}, "noise must not decrease with t"),
        ({"weight": torch.zeros(2)}, "weight is 0 at every position"),
        ({"model": lambda x, s: torch.zeros(2, 4, 5)}, "the model must return logits of shape"),
        ({"model": lambda x, s: torch.full((2, 4, 3), torch.nan)}, "logits are NaN"),
    ],
)
def test_bad_input_is_named(change, message, make_graphs, log_linear):
    arguments = {
        "model": lambda x, s: torch.zeros(2, 4, 3),
        "noise": log_linear,
        "x0": torch.zeros(2, 4, dtype=torch.int64),
        "step": torch.tensor([1, 4]),
        "num_steps": 4,
    } | change
    model, noise, x0, step = (arguments.pop(name) for name in ("model", "noise", "x0", "step"))
    with pytest.raises(ValueError, match=message):
        d3pm_loss(model, make_graphs(3)["uniform"], noise, x0, step, **arguments)


def test_one_nan_is_its_own_sequence_s_where_the_caller_counts_them(make_graphs, log_linear):
    logits = torch.zeros(2, 4, 3)
    logits[1, 2] = torch.nan
    x0, step = torch.zeros(2, 4, dtype=torch.int64), torch.tensor([1, 4])
    loss = d3pm_loss(
        lambda x, s: logits, make_graphs(3)["uniform"], log_linear, x0, step, num_steps=4, refuse_nan=False
    )
    assert loss.isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_times": 7}, "num_times must be even"),
        ({"num_reconstructions": 1}, "num_reconstructions must be at least 2"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
    ],
)
def test_bad_input_of_the_bound_is_named(change, message, make_graphs, log_linear):
    with pytest.raises(ValueError, match=message):
        d3pm_bound(
            lambda x, s: torch.zeros(2, 4, 3), make_graphs(3)["uniform"], log_linear, torch.zeros(2, 4).long(),
            **({"num_steps": 4} | change),
        )  # fmt: skip


def walk(num_states, rate, dense_graph: Any):
    """A walk to either neighbour, whose probabilities of far states are tiny, and right to their last digits."""

    class Walk(dense_graph):  # type: ignore[misc]
        def exp(self, sigma):
            """Of positive terms only: e^-z times the series of e^(z P), z <= 1, and squarings."""
            levels, place = sigma.double().unique(return_inverse=True)
            identity = torch.eye(num_states, dtype=torch.float64)
            z = (2 * rate * levels / 2**20)[:, None, None]
            hop, total = identity + self.matrix / (2 * rate), identity
            for k in range(12, 0, -1):
                total = identity + z / k * (hop.clamp_min(0) @ total)
            total = (-z).exp() * total
            for _ in range(20):
                total = total @ total
            return total[place]

    hops = torch.diag(torch.ones(num_states - 1, dtype=torch.float64), 1)
    hops = rate * (hops + hops.T)
    return Walk(hops - torch.diag(hops.sum(0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", [1e-4, 1e-2, 1.0])
def test_far_states_of_a_chain_count_by_the_sum_over_clean_states(level, dtype, make_graphs, generator):
    """Every pair of 12 states at three noise levels, p(x | x0) down to 1e-49; against p_theta(c) p(y | x, c) summed."""
    n = 12
    graph = walk(n, 3.0, type(make_graphs(3)["dense"]))
    logits = 3 * torch.randn(n, n, generator=generator).to(dtype)
    pairs = torch.cartesian_prod(torch.arange(n), torch.arange(n))
    x, x0 = pairs[:, :1], pairs[:, 1:]

    def noise(t):
        return level * t, torch.full_like(t, level)

    def model(x, sigma):
        return logits[x]

    leaf = logits.requires_grad_()
    loss = d3pm_loss(model, graph, noise, x0, torch.full((n * n,), 3), num_steps=4, xt=x) / 4
    (slope,) = torch.autograd.grad(loss.sum(), leaf)
    assert slope.isfinite().all()
    earlier, later, step = (graph.exp(torch.tensor([level * share]))[0] for share in (0.5, 0.75, 0.25))
    posterior = step[:, :, None] * earlier[None] / later[:, None]  # (x, y, c)
    assert later.min() < (1e-40 if level == 1e-4 else 1)
    p = torch.einsum("xc,xyc->xy", logits.detach().double().softmax(-1), posterior)
    q = posterior[x[:, 0], :, x0[:, 0]]
    want = torch.where(q > 0, q * (q / p[x[:, 0]]).log(), 0).sum(-1)
    tolerance: dict[str, Any] = (
        {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    )
    torch.testing.assert_close(loss.double(), want, **tolerance)


@pytest.mark.parametrize(("kind", "step", "most"), [("dense", "_log_mixture", 2), ("uniform", "_log_step_back", 10)])
def test_chunks_have_room_for_what_a_position_makes(kind, step, most, make_graphs, log_linear, generator, monkeypatch):
    """Fifty numbers at a time: N^2 of five states where posteriors are mixed one by one, N where they are not."""
    module, seen = importlib.import_module("sedd_objectives.d3pm"), []
    whole = getattr(module, step)

    def counted(logits, *rest):
        seen.append(len(logits))
        return whole(logits, *rest)

    monkeypatch.setattr(module, step, counted)
    monkeypatch.setattr("sedd_objectives.fast.rows.CHUNK_ELEMENTS", 50)
    graph, x0 = make_graphs(5)[kind], torch.randint(5, (3, 7), generator=generator)
    logits, steps = torch.randn(3, 7, 5, generator=generator), torch.tensor([1, 2, 4])
    how: dict[str, Any] = {"num_steps": 4, "xt": graph.sample(x0, log_linear(steps / 4)[0], generator=generator)}
    found = d3pm_loss(lambda x, s: logits, graph, log_linear, x0, steps, **how)
    assert sum(seen) == 21
    assert max(seen) == most
    monkeypatch.undo()
    torch.testing.assert_close(found, d3pm_loss(lambda x, s: logits, graph, log_linear, x0, steps, **how))
