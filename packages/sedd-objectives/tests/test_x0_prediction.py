"""Losses of models of the clean token are the denoising score entropy of the score that their output implies."""

from __future__ import annotations

import math

import pytest
import torch
from sedd_objectives import (
    cross_entropy_loss,
    denoising_loss,
    denoising_score_entropy,
    leave_one_out_loss,
    leave_one_out_score_entropy,
    posterior_loss,
    posterior_score_entropy,
    time_varying_loss,
)
from torch import nn

TOKENS = 5


class Line:
    """Tokens in a row, each jumping to its neighbours; rows of three rates, and transitions to the last digit.

    exp(sigma Q) is the series of P = I + Q / r, all of whose terms are positive.
    """

    mask_id = None

    def __init__(self, num_states, vector):
        self.num_states, self.vector, self.rate = num_states, vector, num_states**2 / 10
        q = torch.zeros(num_states, num_states, dtype=torch.float64)
        for i in range(num_states - 1):
            q[i, i + 1] = q[i + 1, i] = self.rate
        self.matrix = q - torch.diag(q.sum(0))

    def exp(self, sigma):
        fastest, n = 2 * self.rate, self.num_states
        p = torch.eye(n, dtype=torch.float64) + self.matrix / fastest
        halvings = max(0, math.ceil(math.log2(max(1e-300, fastest * sigma))))
        dose = fastest * sigma / 2**halvings
        term = total = torch.eye(n, dtype=torch.float64)
        for k in range(1, 3 * n + 20):
            term = term @ p * (dose / k)
            total = total + term
        total = total * math.exp(-dose)
        for _ in range(halvings):
            total = total @ total
        return total

    def _all(self, x, sigma):
        sigma = sigma.reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim)).expand(x.shape)
        rows = [self.exp(float(s))[i] for i, s in zip(x.flatten(), sigma.flatten(), strict=True)]
        value = torch.stack(rows).reshape(*x.shape, -1) if rows else torch.zeros(*x.shape, self.num_states)
        return self.vector(torch.zeros_like(value[..., 0]), torch.arange(self.num_states).expand(value.shape), value)

    def transition_into(self, x, sigma):
        return self._all(x, sigma)

    def transition_from(self, x, sigma):
        return self._all(x, sigma)

    def propagate(self, v, sigma):
        raise AssertionError("every jump into a state is listed, so that rows will do")

    def ratio(self, x, x0, sigma):
        row = self._all(x0, sigma)
        return row._replace(value=row.value / row.value.gather(-1, x[..., None]))

    def rates_into(self, x):
        """The neighbours and x; at the ends a state two steps away, with rate 0, fills the third place."""
        last = self.num_states - 1
        left, right = torch.where(x == 0, 2, x - 1), torch.where(x == last, last - 2, x + 1)
        index = torch.stack([left, right, x], -1)
        return self.vector(torch.zeros(x.shape), index, self.matrix[x[..., None], index].to(torch.get_default_dtype()))

    def sample(self, x0, sigma, *, generator=None):
        p = self._all(x0, sigma).value
        return torch.multinomial(p.reshape(-1, self.num_states), 1, generator=generator).reshape(x0.shape)


class MiddleMask:
    """An absorbing process whose mask is state 2."""

    num_states, mask_id = TOKENS + 1, 2

    def __init__(self, inner, vector):
        self.inner, self.vector = inner, vector

    def _in(self, x):
        return torch.where(x == 2, TOKENS, x - (x > 2).long())

    def _out(self, row):
        index = row.index
        return self.vector(row.base, torch.where(index == TOKENS, 2, index + (index >= 2).long()), row.value)

    def rates_into(self, x):
        return self._out(self.inner.rates_into(self._in(x)))

    def transition_into(self, x, sigma):
        return self._out(self.inner.transition_into(self._in(x), sigma))

    def transition_from(self, x, sigma):
        return self._out(self.inner.transition_from(self._in(x), sigma))

    def ratio(self, x, x0, sigma):
        return self._out(self.inner.ratio(self._in(x), self._in(x0), sigma))

    def sample(self, x0, sigma, *, generator=None):
        x = self.inner.sample(self._in(x0), sigma, generator=generator)
        return torch.where(x == TOKENS, 2, x + (x >= 2).long())

    def propagate(self, v, sigma):
        v = torch.cat([v[..., :2], v[..., 3:], v[..., 2:3]], -1)
        v = self.inner.propagate(v, sigma)
        return torch.cat([v[..., :2], v[..., -1:], v[..., 2:-1]], -1)


KINDS = ["uniform", "absorbing", "hybrid", "dense", "dense absorbing", "line", "middle mask"]


@pytest.fixture(params=KINDS)
def process(request, make_graphs, vector, hybrid_graph):
    if request.param == "line":
        return Line(TOKENS, vector)
    if request.param == "middle mask":
        return MiddleMask(hybrid_graph(TOKENS, 0.3, 0.7), vector)
    return make_graphs(TOKENS)[request.param]


def transitions(graph, sigma):
    """exp(sigma Q), (N, N), from the graph's own columns."""
    n = graph.num_states
    row = graph.transition_from(torch.arange(n), torch.full((n,), sigma, dtype=torch.float64))
    return row.dense(n).double().mT


def implied(logits, graph, x, sigma, *, leave_one_out):
    """The log-score straight from its definition, a position at a time, (..., N)."""
    out = torch.zeros_like(logits)
    for place in torch.cartesian_prod(*map(torch.arange, x.shape)):
        at = tuple(place.tolist())
        T, row = transitions(graph, float(sigma[at[0]])), logits[at].clone()
        if graph.mask_id is not None:
            row[graph.mask_id] = -torch.inf
        if leave_one_out:
            moved = T @ row.softmax(-1)
            out[at] = (moved / moved[x[at]]).log()
        else:
            possible = T[x[at]] > 0
            p = row[possible].softmax(-1)
            ratio = (p * T[:, possible] / T[x[at], possible]).sum(-1)
            out[at] = torch.where(ratio > 0, ratio, 1).log().masked_fill(ratio == 0, -torch.inf)
    return out


@pytest.fixture
def case(process, generator):
    tokens = torch.tensor([y for y in range(process.num_states) if y != process.mask_id])
    x0 = tokens[torch.randint(len(tokens), (4, 6), generator=generator)]
    sigma = torch.tensor([1e-3, 0.2, 1.0, 6.0], dtype=torch.float64)
    x = process.sample(x0, sigma, generator=generator)
    logits = 2 * torch.randn(4, 6, process.num_states, generator=generator, dtype=torch.float64)
    return logits, x, x0, sigma


@pytest.mark.parametrize("loss", [posterior_score_entropy, leave_one_out_score_entropy])
def test_is_the_denoising_score_entropy_of_the_implied_score_with_its_gradient(loss, process, case, float64_rates):
    logits, x, x0, sigma = case
    logits.requires_grad_()
    found = loss(logits, process, x, x0, sigma)
    score = implied(logits, process, x, sigma, leave_one_out=loss is leave_one_out_score_entropy)
    want = denoising_score_entropy(score, process, x, x0, sigma)
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)
    one, other = (torch.autograd.grad(v.sum(), logits)[0] for v in (found, want))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    assert float(found.detach().max()) > 0.1


@pytest.mark.parametrize("loss", [posterior_loss, leave_one_out_loss])
def test_the_loss_in_t_is_the_denoising_loss(loss, process, case, log_linear):
    logits, x, x0, _ = case
    t = torch.tensor([0.05, 0.3, 0.6, 0.99], dtype=torch.float64)
    weight = torch.tensor([1.0, 2, 0, 1, 1, 0.5]).expand(4, 6)
    x = process.sample(x0, log_linear(t)[0])
    found = loss(lambda x, s: logits, process, log_linear, x0, t, xt=x, weight=weight)
    score = implied(logits, process, x, log_linear(t)[0], leave_one_out=loss is leave_one_out_loss)
    want = denoising_loss(lambda x, s: score, process, log_linear, x0, t, xt=x, weight=weight)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-9)


def test_under_absorption_both_are_cross_entropy(make_graphs, generator, log_linear):
    graph = make_graphs(TOKENS)["absorbing"]
    x0 = torch.randint(TOKENS, (3, 7), generator=generator)
    logits, t = torch.randn(3, 7, TOKENS + 1, generator=generator), torch.rand(3, generator=generator)
    xt = graph.sample(x0, log_linear(t)[0], generator=generator)
    want = cross_entropy_loss(lambda x, s: logits, graph, log_linear, x0, t, xt=xt)
    for loss in (posterior_loss, leave_one_out_loss):
        torch.testing.assert_close(loss(lambda x, s: logits, graph, log_linear, x0, t, xt=xt), want, rtol=1e-5, atol=0)


def test_is_the_published_loss_of_udlm(make_graphs, generator, float64_rates):
    """Schiff et al. 2024, the loss in continuous time, with alpha = e^-sigma: alpha' / alpha = -1 a unit of noise.

    As their code has it: diffusion.py of kuleshov-group/discrete-diffusion-guidance.
    """
    graph, n = make_graphs(TOKENS)["uniform"], TOKENS
    x0 = torch.randint(n, (4, 6), generator=generator)
    sigma = torch.tensor([0.01, 0.3, 1.0, 5.0], dtype=torch.float64)
    x = graph.sample(x0, sigma, generator=generator)
    logits = torch.randn(4, 6, n, generator=generator, dtype=torch.float64)
    alpha = torch.exp(-sigma)[:, None, None]
    true = n * alpha * nn.functional.one_hot(x0, n) + 1 - alpha
    model = n * alpha * logits.softmax(-1) + 1 - alpha
    true_x, model_x = (v.gather(-1, x[..., None]) for v in (true, model))
    logs = (true / true_x * (model_x * true / (model * true_x)).log()).sum(-1)
    want = -1 / n * (n / true_x - n / model_x)[..., 0] + 1 / n * logs
    found = leave_one_out_score_entropy(logits, graph, x, x0, sigma)
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)


class Interpolation:
    """x_t stays x0 with probability alpha, else it comes from a mixture of masks and tokens that changes with t (GIDD).

    The jump from any state into z has the rate z . (beta pi' - alpha' / alpha pi), GIDD's forward rate; alpha = 1 - t.
    """

    num_states, mask_id = TOKENS + 1, TOKENS

    def __init__(self, vector):
        self.vector = vector

    def mixture(self, t):
        """pi_t and its derivative: of tokens there is most half-way."""
        tokens = (t * (1 - t))[..., None] * 0.8
        slope = (1 - 2 * t)[..., None] * 0.8
        even = torch.cat([torch.ones(TOKENS) / TOKENS, torch.zeros(1)]).to(t.dtype)
        mask = torch.eye(TOKENS + 1, dtype=t.dtype)[-1]
        return tokens * even + (1 - tokens) * mask, slope * (even - mask)

    def into(self, t):
        """The rate into every state, (..., N)."""
        pi, slope = self.mixture(t)
        return t[..., None] * slope + pi / (1 - t)[..., None]

    def rates_into(self, x, t):
        t = t.reshape(t.shape + (1,) * (x.ndim - t.ndim)).expand(x.shape)
        rate = self.into(t).gather(-1, x[..., None])[..., 0]
        return self.vector(rate, x[..., None], (rate - self.into(t).sum(-1))[..., None])

    def propagate(self, v, t):
        t = t.reshape(t.shape + (1,) * (v.ndim - 1 - t.ndim))
        return (1 - t)[..., None] * v + t[..., None] * self.mixture(t)[0] * v.sum(-1, keepdim=True)

    def sample(self, x0, t, *, generator=None):
        p = self.propagate(nn.functional.one_hot(x0, self.num_states).to(t.dtype), t)
        return torch.multinomial(p.flatten(0, -2), 1, generator=generator).reshape(x0.shape)


def test_is_the_published_loss_of_gidd(vector, generator):
    """Von Ruette et al. 2025, the bound: w (KL(q_0 || q_p) + IS(q_0(x), q_p(x))), w = rate into x / q_0(x).

    As their code has it: `GiddLoss` in loss.py of dvruette/gidd.
    """
    process, x0 = Interpolation(vector), torch.randint(TOKENS, (5, 8), generator=generator)
    t = torch.tensor([0.02, 0.3, 0.5, 0.8, 0.99], dtype=torch.float64)
    assert (process.into(t) >= 0).all()
    x = process.sample(x0, t, generator=generator)
    logits = torch.randn(5, 8, TOKENS + 1, generator=generator, dtype=torch.float64, requires_grad=True)
    found = time_varying_loss(lambda x, t: logits, process, x0, t, xt=x)
    p = logits[..., :TOKENS].softmax(-1)
    true = process.propagate(nn.functional.one_hot(x0, TOKENS + 1).double(), t)
    model = process.propagate(torch.cat([p, torch.zeros(5, 8, 1)], -1), t)
    true_x, model_x = (v.gather(-1, x[..., None])[..., 0] for v in (true, model))
    divergence = torch.where(true > 0, true * (true / model).log(), 0).sum(-1)
    itakura_saito = true_x / model_x - (true_x / model_x).log() - 1
    rate = process.into(t)[:, None].expand(5, 8, -1).gather(-1, x[..., None])[..., 0]
    want = (rate / true_x * (divergence + itakura_saito)).sum(-1)
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)
    one, other = (torch.autograd.grad(v.sum(), logits)[0] for v in (found, want))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_a_process_that_keeps_its_proportions_is_the_graph(make_graphs, generator, log_linear):
    class Fixed:
        """The hybrid graph run by a schedule, as a process in time."""

        def __init__(self, graph):
            self.graph, self.num_states, self.mask_id = graph, graph.num_states, graph.mask_id

        def sample(self, x0, t, *, generator=None):
            return self.graph.sample(x0, log_linear(t)[0], generator=generator)

        def rates_into(self, x, t):
            row = self.graph.rates_into(x)
            rate = log_linear(t)[1].reshape(t.shape + (1,) * (x.ndim - t.ndim)).expand(x.shape)
            return row._replace(base=row.base * rate, value=row.value * rate[..., None])

        def propagate(self, v, t):
            return self.graph.propagate(v, log_linear(t)[0])

    graph = make_graphs(TOKENS)["hybrid"]
    x0, t = torch.randint(TOKENS, (4, 9), generator=generator), torch.rand(4, generator=generator).double()
    logits = torch.randn(4, 9, TOKENS + 1, generator=generator, dtype=torch.float64)
    weight = torch.tensor([1.0, 0, 2]).repeat(3).expand(4, 9)
    draws = [torch.Generator().manual_seed(3) for _ in range(2)]
    found = time_varying_loss(lambda x, t: logits, Fixed(graph), x0, t, weight=weight, generator=draws[0])
    want = leave_one_out_loss(lambda x, s: logits, graph, log_linear, x0, t, weight=weight, generator=draws[1])
    torch.testing.assert_close(found, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("loss", [posterior_score_entropy, leave_one_out_score_entropy])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_states_tiny_and_huge_noise_give_numbers(loss, dtype, process, generator):
    """The loss and its gradient are finite, and not negative, whatever the model says of tokens."""
    tokens = torch.tensor([y for y in range(process.num_states) if y != process.mask_id])
    x0 = tokens[torch.randint(len(tokens), (5, 6), generator=generator)]
    sigma = torch.tensor([1e-12, 1e-6, 1e-2, 30.0, 500.0], dtype=torch.float64)
    x = process.sample(x0, sigma, generator=generator)
    for scale in (0.0, 1.0, 60.0):
        logits = scale * torch.randn(5, 6, process.num_states, generator=generator, dtype=dtype)
        logits.requires_grad_()
        found = loss(logits, process, x, x0, sigma.to(dtype))
        assert found.isfinite().all()
        assert (found >= 0).all()
        assert torch.autograd.grad(found.sum(), logits)[0].isfinite().all()


def test_far_tokens_on_a_line_are_right_to_the_last_digits(vector):
    """64 tokens in a row at noise 1e-6: tokens across the line have likelihoods of 1e-200, and do not matter."""
    graph, n = Line(64, vector), 64
    x, x0 = torch.tensor([[30, 31]]), torch.tensor([[30, 30]])
    sigma, logits = torch.tensor([1e-6], dtype=torch.float64), torch.zeros(1, 2, n, dtype=torch.float64)
    found = posterior_score_entropy(logits, graph, x, x0, sigma)
    T = transitions(graph, 1e-6)
    for i in range(2):
        want = 0.0
        for y in (int(x[0, i]) - 1, int(x[0, i]) + 1):
            s = float((T[y] / T[x[0, i]]).mean())  # every token could have become x, if barely
            r = float(T[y, 30] / T[x[0, i], 30])
            want += graph.rate * (s - r * math.log(s / r) - r)
        assert float(found[0, i]) == pytest.approx(want, rel=1e-6)


class Net(nn.Module):
    def __init__(self, num_states):
        super().__init__()
        self.embed, self.rows = nn.Embedding(num_states, num_states), 0

    def forward(self, x, sigma, where=None):
        logits = self.embed(x)
        logits = logits if where is None else logits[where]
        self.rows += logits[..., 0].numel()
        return logits


def test_only_positions_that_count_reach_the_head(make_graphs, log_linear, generator):
    graph, x0 = make_graphs(TOKENS)["absorbing"], torch.randint(TOKENS, (4, 6), generator=generator)
    net, weight = Net(TOKENS + 1), torch.tensor([1, 1, 0]).repeat(2).expand(4, 6)
    xt = graph.sample(x0, torch.ones(4), generator=generator)
    posterior_loss(net, graph, log_linear, x0, torch.full((4,), 0.5), xt=xt, weight=weight).sum().backward()
    assert net.rows == int(((xt == TOKENS) & (weight > 0)).sum())
    grad = net.embed.weight.grad
    assert grad is not None
    assert grad[TOKENS, :TOKENS].abs().sum() > 0
    assert (grad[:, TOKENS] == 0).all()  # what it says of the mask


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x0": torch.zeros(6, dtype=torch.int64)}, r"x0 must have shape \(B, L\)"),
        ({"x0": torch.full((4, 6), 9)}, "x0 must lie in"),
        ({"xt": torch.zeros(4, 5, dtype=torch.int64)}, "xt must have shape"),
        ({"t": torch.zeros(4, 1)}, r"t must be floating, of shape \(B,\) or \(B, L\)"),
        ({"weight": torch.zeros(4)}, "weight is 0 at every position"),
        ({"model": lambda x, s: torch.zeros(4, 6, 3)}, "the model must return logits of shape"),
        ({"model": lambda x, s: torch.full((4, 6, 6), torch.nan)}, "logits are NaN"),
    ],
)
@pytest.mark.parametrize("loss", [posterior_loss, leave_one_out_loss, time_varying_loss])
def test_bad_input_is_named(loss, change, message, make_graphs, log_linear, vector):
    arguments = {
        "model": lambda x, s: torch.zeros(4, 6, 6),
        "x0": torch.zeros(4, 6, dtype=torch.int64),
        "t": torch.full((4,), 0.5),
    } | change
    model, x0, t = (arguments.pop(name) for name in ("model", "x0", "t"))
    process = (Interpolation(vector),) if loss is time_varying_loss else (make_graphs(TOKENS)["hybrid"], log_linear)
    with pytest.raises(ValueError, match=message):
        loss(model, *process, x0, t, **arguments)


def test_logits_of_another_shape_are_refused(make_graphs):
    graph, x = make_graphs(TOKENS)["uniform"], torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="logits must have shape"):
        posterior_score_entropy(torch.zeros(2, 3, 9), graph, x, x, torch.ones(2))


@pytest.mark.parametrize("loss", [posterior_score_entropy, leave_one_out_score_entropy])
def test_tokens_that_cannot_have_become_x_are_left_out_of_the_posterior(loss, graph_of, generator):
    """Of two groups of states without a way between them: what is said of the other group changes nothing."""
    rates = torch.block_diag(torch.tensor([[-1.0, 0.5], [1.0, -0.5]]), torch.tensor([[-2.0, 1.0], [2.0, -1.0]]))
    graph, sigma = graph_of(rates), torch.full((2,), 0.7, dtype=torch.float64)
    x, x0 = torch.tensor([1, 2]), torch.tensor([0, 2])
    logits = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    other = logits.clone()
    other[0, 2:] += torch.tensor([5.0, -3.0])
    other[1, :2] += torch.tensor([-1.0, 40.0])
    torch.testing.assert_close(loss(other, graph, x, x0, sigma), loss(logits, graph, x, x0, sigma), rtol=1e-10, atol=0)


@pytest.mark.parametrize("loss", [posterior_score_entropy, leave_one_out_score_entropy])
@pytest.mark.parametrize("kept", [0.0, 1e-3, 2.0])
def test_a_score_is_no_less_than_what_the_clean_token_alone_adds_to_it(
    loss, kept, make_graphs, generator, float64_rates
):
    """Where a graph's propagation loses most of a sum, or all of it, x0's share of (T v)_x times its ratio is left."""
    graph = make_graphs(TOKENS)["uniform"]
    x, x0 = torch.tensor([0, 1, 1]), torch.tensor([3, 1, 2])
    sigma = torch.tensor([0.3, 0.3, 2.0], dtype=torch.float64)
    logits = torch.randn(3, TOKENS, generator=generator, dtype=torch.float64)
    p, rows = logits.softmax(-1), torch.stack([transitions(graph, float(s)) for s in sigma])  # (m, y, c)
    at_x = rows[torch.arange(3), x]
    v = p if loss is leave_one_out_score_entropy else p / at_x
    total = (at_x * v).sum(-1, keepdim=True)
    least = (at_x * v).gather(-1, x0[:, None]) / total * rows[torch.arange(3), :, x0] / at_x.gather(-1, x0[:, None])
    exact = (rows @ v[..., None])[..., 0] / total
    score = torch.maximum(kept * exact, least)
    whole = graph.propagate
    graph.propagate = lambda v, sigma: kept * whole(v, sigma)
    want = denoising_score_entropy(score.log(), graph, x, x0, sigma)
    torch.testing.assert_close(loss(logits, graph, x, x0, sigma), want, rtol=1e-9, atol=1e-12)
    assert (score > kept * exact).any() == (kept < 1)
