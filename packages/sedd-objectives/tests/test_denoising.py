from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
from sedd_objectives import denoising_loss, denoising_score_entropy, denoising_score_entropy_without_constant
from torch import nn

rows_module = importlib.import_module("sedd_objectives.fast.rows")


class TinyNet(nn.Module):
    """A score model that offers `where` and counts its calls and the rows asked for."""

    def __init__(self, num_states):
        super().__init__()
        self.embed = nn.Embedding(num_states, 8)
        self.head = nn.Linear(8, num_states)
        self.calls, self.rows = 0, 0

    def forward(self, x, sigma, where=None):
        hidden = self.embed(x) + sigma[:, None, None].log1p().to(self.head.weight.dtype)
        hidden = hidden if where is None else hidden[where]
        self.calls += 1
        self.rows += hidden[..., 0].numel()
        return self.head(hidden)


@pytest.fixture
def x0(generator):
    return torch.randint(5, (3, 7), generator=generator)


def test_is_dsigma_times_score_entropy_summed_over_positions(graph, log_linear, x0, generator):
    t = torch.tensor([0.1, 0.5, 0.9])
    sigma, dsigma = log_linear(t)
    xt = graph.sample(x0, sigma, generator=generator)
    net = TinyNet(graph.num_states)
    want = dsigma * denoising_score_entropy(net(xt, sigma), graph, xt, x0, sigma).sum(-1)
    torch.testing.assert_close(denoising_loss(net, graph, log_linear, x0, t, xt=xt), want)


def test_where_gives_the_same_loss_and_gradients_as_indexing(graph, log_linear, x0):
    net = TinyNet(graph.num_states).double()
    gradients = []
    for score in (net, lambda x, sigma: net(x, sigma)):
        t = torch.tensor([0.2, 0.4, 0.8], dtype=torch.float64)
        loss = denoising_loss(score, graph, log_linear, x0, t, generator=torch.Generator().manual_seed(1)).sum()
        gradients.append((loss, *torch.autograd.grad(loss, tuple(net.parameters()))))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_positions_that_cannot_move_never_reach_the_head(make_graphs, log_linear, x0):
    for name in ("absorbing", "dense absorbing"):
        graph = make_graphs(5)[name]
        net, t = TinyNet(6), torch.tensor([0.1, 0.5, 0.9])
        xt = x0.clone()
        xt[:, :2] = 5
        loss = denoising_loss(net, graph, log_linear, x0, t, xt=xt)
        assert (net.calls, net.rows) == (1, 6)
        assert (loss > 0).all()


def test_nothing_can_move_still_calls_the_net_once_and_keeps_the_graph(make_graphs, log_linear, x0):
    net = TinyNet(6)
    for score in (net, lambda x, sigma: net(x, sigma)):
        net.calls = 0
        loss = denoising_loss(score, make_graphs(5)["absorbing"], log_linear, x0, torch.full((3,), 0.5), xt=x0)
        assert net.calls == 1
        assert (loss == 0).all()
        loss.sum().backward()
        assert all(p.grad is not None and p.grad.eq(0).all() for p in net.head.parameters())


class Counting:
    """A graph, with the largest number of entries that its rows had in one answer, and how often it was asked."""

    def __init__(self, graph):
        self.graph, self.num_states, self.sample = graph, graph.num_states, graph.sample
        self.calls, self.largest = {"rates_into": 0, "ratio": 0}, {"rates_into": 0, "ratio": 0}

    def _ask(self, name, *arguments):
        row = getattr(self.graph, name)(*arguments)
        self.calls[name] += 1
        self.largest[name] = max(self.largest[name], row.value.numel())
        return row

    def rates_into(self, x):
        return self._ask("rates_into", x)

    def ratio(self, x, x0, sigma):
        return self._ask("ratio", x, x0, sigma)


@pytest.mark.parametrize("kind", ["hybrid", "dense"])
def test_asks_for_rates_once_and_for_ratios_a_chunk_at_a_time(kind, make_graphs, log_linear, generator, monkeypatch):
    """300 positions of a graph with some 30 states, 300 log-scores at a time: no answer is larger than needed."""
    monkeypatch.setattr(rows_module, "CHUNK_ELEMENTS", 300)
    graph = make_graphs(30)[kind]
    x0 = torch.randint(30, (3, 100), generator=generator)
    t = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    xt = graph.sample(x0, log_linear(t)[0], generator=generator)
    log_score = torch.randn(3, 100, graph.num_states, generator=generator, dtype=torch.float64)
    counting = Counting(graph)
    loss = denoising_loss(lambda x, sigma: log_score, counting, log_linear, x0, t, xt=xt)
    assert counting.calls["rates_into"] == 1
    assert counting.calls["ratio"] >= 30
    assert counting.largest["ratio"] <= 300
    assert counting.largest["rates_into"] <= graph.num_states**2
    monkeypatch.undo()
    torch.testing.assert_close(
        loss, denoising_loss(lambda x, sigma: log_score, graph, log_linear, x0, t, xt=xt), rtol=1e-12, atol=0
    )


def test_learnt_rates_are_refused_rather_than_left_without_a_gradient(make_graphs, log_linear, x0):
    graph = make_graphs(5)["uniform"]
    graph.a = torch.tensor(1.0, requires_grad=True)
    with pytest.raises(ValueError, match="rates that require a gradient"):
        denoising_loss(TinyNet(5), graph, log_linear, x0, torch.full((3,), 0.5), xt=x0)


@pytest.mark.parametrize("field", ["base", "value"])
def test_so_are_rates_of_which_only_some_are_learnt(field, make_graphs, log_linear, x0, monkeypatch):
    graph = make_graphs(5)["uniform"]
    rates_into = graph.rates_into

    def learnt(x):
        row = rates_into(x)
        fields = {name: getattr(row, name).clone() for name in ("base", "index", "value")}
        fields[field].requires_grad_()
        return SimpleNamespace(**fields)

    monkeypatch.setattr(graph, "rates_into", learnt)
    with pytest.raises(ValueError, match="rates that require a gradient"):
        denoising_loss(TinyNet(5), graph, log_linear, x0, torch.full((3,), 0.5), xt=x0)


def test_weights_multiply_positions_and_padding_never_reaches_the_head(graph, log_linear, x0, generator):
    t = torch.tensor([0.1, 0.5, 0.9])
    xt = graph.sample(x0, log_linear(t)[0], generator=generator)
    net = TinyNet(graph.num_states)
    per_position = denoising_score_entropy(net(xt, log_linear(t)[0]), graph, xt, x0, log_linear(t)[0])
    weight = torch.rand(3, 7, generator=generator)
    weight[:, 5:] = 0
    want = (log_linear(t)[1][:, None] * weight * per_position).sum(-1)
    torch.testing.assert_close(denoising_loss(net, graph, log_linear, x0, t, xt=xt, weight=weight), want)
    net.rows = 0
    denoising_loss(net, graph, log_linear, x0, t, xt=xt, weight=weight > 0)
    assert net.rows <= 15


def test_time_per_position(graph, log_linear, x0, generator):
    t = torch.rand(3, 7, generator=generator, dtype=torch.float64)
    sigma, dsigma = log_linear(t)
    xt = graph.sample(x0, sigma, generator=generator)
    log_score = torch.randn(3, 7, graph.num_states, generator=generator, dtype=torch.float64)
    loss = denoising_loss(lambda x, s: log_score, graph, log_linear, x0, t, xt=xt)
    for i in range(3):
        for j in range(7):
            at = (slice(i, i + 1), slice(j, j + 1))
            one = denoising_score_entropy(log_score[at], graph, xt[at], x0[at], sigma[i : i + 1, j])
            loss[i] -= dsigma[i, j] * one[0, 0]
    assert loss.abs().max() < 1e-10


@pytest.mark.parametrize("kind", ["uniform", "absorbing", "hybrid"])  # whose closed forms are differentiable
def test_a_learnt_schedule_receives_its_gradient(kind, make_graphs, x0, generator):
    """Through dsigma, through the ratios and through the score's own sigma: against a difference quotient."""
    graph = make_graphs(5)[kind]
    power = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.3, 0.5, 0.9], dtype=torch.float64)
    weights = torch.randn(graph.num_states, generator=generator, dtype=torch.float64)
    xt = graph.sample(x0, t, generator=generator)

    def loss(power):
        def noise(t):
            return t**power, power * t ** (power - 1)

        def score(x, sigma):
            return (sigma[:, None, None] * weights).expand(*x.shape, -1)

        return denoising_loss(score, graph, noise, x0, t, xt=xt).sum()

    (slope,) = torch.autograd.grad(loss(power), power)
    step = 1e-5
    quotient = (loss(power.detach() + step) - loss(power.detach() - step)) / (2 * step)
    torch.testing.assert_close(slope, quotient, rtol=1e-7, atol=1e-7)


def test_draws_times_and_noise_reproducibly(graph, log_linear, x0):
    net = TinyNet(graph.num_states)
    draws = [denoising_loss(net, graph, log_linear, x0, generator=torch.Generator().manual_seed(s)) for s in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_bfloat16_net_gives_a_float32_loss_under_autocast(graph, log_linear, x0):
    net, t = TinyNet(graph.num_states), torch.full((3,), 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = denoising_loss(net, graph, log_linear, x0, t, generator=torch.Generator().manual_seed(0))
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert net.head.weight.grad is not None
    assert net.head.weight.grad.isfinite().all()


@pytest.mark.filterwarnings("default")  # the compiler reads every attribute of what it traces, deprecated ones too
def test_works_inside_torch_compile(make_graphs, log_linear, x0, generator):
    graph, net = make_graphs(5)["uniform"], TinyNet(5)
    t = torch.tensor([0.1, 0.5, 0.9])
    xt = graph.sample(x0, log_linear(t)[0], generator=generator)
    compiled = torch.compile(lambda: denoising_loss(net, graph, log_linear, x0, t, xt=xt), backend="eager")
    torch.testing.assert_close(compiled(), denoising_loss(net, graph, log_linear, x0, t, xt=xt))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x0": torch.zeros(7, dtype=torch.int64)}, r"x0 must have shape \(B, L\)"),
        ({"x0": torch.full((3, 7), 99)}, "x0 must lie in"),
        ({"xt": torch.full((3, 7), -1)}, "xt must lie in"),
        ({"xt": torch.zeros(3, 6, dtype=torch.int64)}, "xt must have shape"),
        ({"t": torch.zeros(3, 1)}, r"t must be floating, of shape \(B,\) or \(B, L\)"),
        ({"t": torch.full((3,), -1.0)}, "sigma is a total noise and must be >= 0"),
        ({"weight": torch.zeros(3, 7)}, "weight is 0 at every position"),
        ({"weight": -torch.ones(3)}, "weight must be >= 0"),
        ({"weight": torch.ones(7)}, "weight must have a shape that is a leading part"),
        ({"score": lambda x, sigma: torch.zeros(3, 7, 4)}, "score model must return log_score of shape"),
        ({"score": lambda x, sigma: None}, "got NoneType"),
        ({"score": lambda x, sigma: torch.full((3, 7, 5), float("nan"))}, "log_score is NaN"),
        ({"t_min": 1.0, "t": None}, "t_min must lie in"),
    ],
)
def test_bad_input_is_named(change, message, make_graphs, log_linear, x0):
    arguments = {"score": TinyNet(5), "x0": x0, "t": torch.full((3,), 0.5), "xt": None, "weight": None} | change
    score, clean, t = (arguments.pop(name) for name in ("score", "x0", "t"))
    with pytest.raises(ValueError, match=message):
        denoising_loss(score, make_graphs(5)["uniform"], log_linear, clean, t, **arguments)


def test_bad_shapes_of_the_function_of_one_noise_level(make_graphs, x0):
    graph, sigma = make_graphs(5)["uniform"], torch.ones(3)
    with pytest.raises(ValueError, match="log_score must have shape"):
        denoising_score_entropy(torch.zeros(3, 7, 6), graph, x0, x0, sigma)
    with pytest.raises(ValueError, match="x0 must have shape"):
        denoising_score_entropy(torch.zeros(3, 7, 5), graph, x0, x0[:2], sigma)
    with pytest.raises(ValueError, match="sigma must be a floating tensor"):
        denoising_score_entropy(torch.zeros(3, 7, 5), graph, x0, x0, sigma.long())


@pytest.mark.parametrize("kind", ["uniform", "absorbing", "hybrid"])  # whose closed forms are differentiable
@pytest.mark.usefixtures("float64_rates")
def test_without_its_constant_it_has_a_slope_by_the_noise(kind, make_graphs, generator):
    """Where ratios are 0 their logarithm has none, and must not be asked."""
    graph = make_graphs(5)[kind]
    x0 = torch.randint(5, (3, 7), generator=generator)
    sigma = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    x = graph.sample(x0, sigma, generator=generator)
    log_score = torch.randn(3, 7, graph.num_states, generator=generator, dtype=torch.float64)

    def loss(sigma):
        return denoising_score_entropy_without_constant(log_score, graph, x, x0, sigma)

    leaf = sigma.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(leaf).sum(), leaf)
    quotient = (loss(sigma + 1e-6) - loss(sigma - 1e-6)).sum(-1) / 2e-6
    torch.testing.assert_close(slope, quotient, rtol=1e-6, atol=1e-7)
