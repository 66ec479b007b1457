from __future__ import annotations

import importlib

import pytest
import torch
from sedd_objectives import enumerated_implicit_score_entropy_loss, implicit_score_entropy_loss, monte_carlo
from torch import nn

implicit_module = importlib.import_module("sedd_objectives.implicit")
SIGMA = torch.tensor(0.7, dtype=torch.float64)


class Net(nn.Module):
    """A score model that offers `where` and counts its calls and rows."""

    def __init__(self, num_states):
        super().__init__()
        self.embed = nn.Embedding(num_states, 8)
        self.head = nn.Linear(8, num_states)
        self.calls, self.rows = 0, 0

    def forward(self, x, sigma, where=None):
        hidden = self.embed(x) + self.embed(x).mean(1, keepdim=True)
        hidden = hidden if where is None else hidden[where]
        self.calls += 1
        self.rows += hidden[..., 0].numel()
        return self.head(hidden)


@pytest.fixture
def x(generator):
    return torch.randint(5, (4, 6), generator=generator)


@pytest.mark.parametrize("kind", ["uniform", "absorbing", "hybrid", "dense"])
def test_one_neighbour_estimates_value_and_gradient_without_bias(
    kind, make_graphs, enumerated, generator, float64_rates
):
    """Each draw has its own copy of a table of scores, so that its gradient is seen alone.

    The value and at most 96 entries of the gradient, those that over 400 draws contribute to, within 5.5 standard
    errors: a false alarm in 250,000 runs a graph.
    """
    graph = make_graphs(3)[kind]
    data = enumerated(graph, length=2)
    count = 5000
    states = torch.multinomial(data.marginal(SIGMA), count, replacement=True, generator=generator)
    table = torch.randn(len(data.states), 2, graph.num_states, generator=generator, dtype=torch.float64)
    copies = table.expand(count, *table.shape).clone().requires_grad_()

    def own(x, sigma):
        return copies[torch.arange(count), data.number(x)]

    x = data.states[states]
    loss = implicit_score_entropy_loss(own, graph, x, SIGMA, generator=generator)
    (slopes,) = torch.autograd.grad(loss.sum(), copies)

    shared = table.clone().requires_grad_()
    exact = enumerated_implicit_score_entropy_loss(lambda x, sigma: shared[data.number(x)], graph, data.states, SIGMA)[
        states
    ]
    (slope,) = torch.autograd.grad(exact.mean(), shared)
    away = loss.detach() - exact.detach()
    assert float(away.mean().abs()) < 5.5 * float(away.std()) / count**0.5
    often = (slopes != 0).sum(0) > 400
    assert often.sum() >= 8
    assert ((slopes.mean(0) - slope).abs() < 5.5 * slopes.std(0) / count**0.5)[often].all()


def test_weights_multiply_positions(graph, generator, float64_rates):
    """Enumerated: exactly. Drawn: within 5 standard errors, a false alarm in 1.7 million runs a sequence."""
    net = Net(graph.num_states).double()
    x = torch.randint(5, (3, 4), generator=generator)
    sigma = torch.full((3,), 0.5, dtype=torch.float64)
    weight = torch.tensor([[1.0, 0.5, 0, 0], [2, 1, 1, 0], [0, 0, 0, 1]], dtype=torch.float64)
    with torch.no_grad():
        whole = enumerated_implicit_score_entropy_loss(net, graph, x, sigma, weight=weight)
        parts = sum(
            enumerated_implicit_score_entropy_loss(net, graph, x, sigma, weight=torch.eye(4)[i].double().expand(3, 4))
            * weight[:, i]
            for i in range(4)
        )
    torch.testing.assert_close(whole, parts)
    found = monte_carlo(
        lambda: implicit_score_entropy_loss(net, graph, x, sigma, weight=weight, generator=generator), 200
    )
    assert ((found.value - whole).abs() <= 5 * found.standard_error + 1e-12).all()


def test_calls_the_net_twice_and_asks_for_what_it_needs(make_graphs, x):
    graph, net = make_graphs(5)["absorbing"], Net(6)
    x[:, :2] = 5
    implicit_score_entropy_loss(net, graph, x, torch.ones(4)).sum().backward()
    assert (net.calls, net.rows) == (2, 4 * 2 + 4)
    assert net.head.weight.grad is not None
    assert net.head.weight.grad.abs().sum() > 0


def test_where_gives_the_same_as_indexing(graph, x):
    net = Net(graph.num_states).double()
    sigma = torch.ones(4, dtype=torch.float64)
    losses = []
    for score in (net, lambda x, sigma: net(x, sigma)):
        losses.append(implicit_score_entropy_loss(score, graph, x, sigma, generator=torch.Generator().manual_seed(1)))
        losses.append(enumerated_implicit_score_entropy_loss(score, graph, x, sigma, batch_size=50))
    torch.testing.assert_close(losses[0], losses[2])
    torch.testing.assert_close(losses[1], losses[3])


def test_no_jump_leads_out_of_masks(make_graphs):
    """All masked: only the first term is left, and the meaningless entry of a mask at a mask may be anything."""
    graph, x = make_graphs(5)["absorbing"], torch.full((2, 3), 5)
    log_score = torch.zeros(2, 3, 6)
    log_score[..., 5] = torch.nan
    log_score.requires_grad_()
    loss = implicit_score_entropy_loss(lambda x, sigma: log_score, graph, x, torch.ones(2))
    assert loss.tolist() == [15, 15]
    loss.sum().backward()
    assert log_score.grad is not None
    assert log_score.grad[..., :5].eq(1).all()
    assert log_score.grad[..., 5].eq(0).all()


def test_bfloat16_is_computed_in_float32_under_autocast(graph, x):
    net = Net(graph.num_states)
    with torch.autocast("cpu", torch.bfloat16):
        loss = implicit_score_entropy_loss(net, graph, x, torch.ones(4), generator=torch.Generator().manual_seed(0))
        exact = enumerated_implicit_score_entropy_loss(net, graph, x, torch.ones(4))

    def rounded(x, sigma):
        with torch.autocast("cpu", torch.bfloat16):
            return net(x, sigma).float()

    want = implicit_score_entropy_loss(rounded, graph, x, torch.ones(4), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(exact, enumerated_implicit_score_entropy_loss(rounded, graph, x, torch.ones(4)))
    assert loss.dtype == exact.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(6, dtype=torch.int64)}, r"x must have shape \(B, L\)"),
        ({"x": torch.full((4, 6), 5)}, "x must lie in"),
        ({"x": torch.zeros(4, 6)}, "x holds states"),
        ({"sigma": torch.ones(4, 1)}, "sigma must have a shape that is a leading part"),
        ({"sigma": -torch.ones(4)}, "sigma is a total noise and must be >= 0"),
        ({"weight": torch.zeros(4)}, "weight is 0 at every position"),
        ({"weight": -torch.ones(4)}, "weight must be >= 0"),
        ({"score": lambda x, sigma: torch.zeros(4, 6, 4)}, "score model must return log_score of shape"),
        ({"score": lambda x, sigma: torch.full((len(x), 6, 5), float("nan"))}, "log_score is NaN"),
    ],
)
@pytest.mark.parametrize("loss", [implicit_score_entropy_loss, enumerated_implicit_score_entropy_loss])
def test_bad_input_is_named(loss, change, message, make_graphs, x):
    arguments = {"score": Net(5), "x": x, "sigma": torch.ones(4)} | change
    with pytest.raises(ValueError, match=message):
        loss(arguments.pop("score"), make_graphs(5)["uniform"], arguments.pop("x"), arguments.pop("sigma"), **arguments)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 95, 96, 97])
def test_neighbours_in_any_number_of_calls_are_all_counted(batch_size, make_graphs, x):
    """96 of them, of four sequences of six positions."""
    net, graph, sigma = Net(5), make_graphs(5)["uniform"], torch.ones(4)
    whole = enumerated_implicit_score_entropy_loss(net, graph, x, sigma)
    assert net.calls == 2
    parts = enumerated_implicit_score_entropy_loss(net, graph, x, sigma, batch_size=batch_size)
    assert net.calls == 3 + -(-96 // batch_size)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


def test_batch_size_must_be_positive(make_graphs, x):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        enumerated_implicit_score_entropy_loss(Net(5), make_graphs(5)["uniform"], x, torch.ones(4), batch_size=0)


WEIGHTS = torch.tensor([[0.0, 1, 0, 3, 0], [2, 0, 0, 0, 0], [0, 0, 0, 0, 5], [0.0] * 5], dtype=torch.float64)


@pytest.mark.parametrize(("u", "drawn"), [(0.0, [1, 0, 4]), (0.249, [1, 0, 4]), (0.25, [3, 0, 4]), (1.0, [3, 0, 4])])
def test_an_index_is_drawn_by_the_sum_of_the_weights_before_it(u, drawn, monkeypatch):
    """Never one of weight 0, at the ends neither; and some index where all are 0."""
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, u, dtype=torch.float64))
    found = implicit_module._draw(WEIGHTS, None)
    assert found.dtype == torch.int64
    assert found[:3].tolist() == drawn
    assert 0 <= found[3] < 5


def test_indices_are_drawn_in_proportion_and_row_by_row(generator):
    """40,000 draws of a quarter, within 4.5 standard errors: a false alarm in 150,000 runs."""
    drawn = implicit_module._draw(WEIGHTS[:1].expand(40_000, 5), generator)
    assert drawn.unique().tolist() == [1, 3]
    assert abs(float((drawn == 1).double().mean()) - 0.25) < 4.5 * (0.25 * 0.75 / 40_000) ** 0.5


def test_a_neighbour_is_asked_at_its_noise_for_the_way_back(make_graphs, x, monkeypatch):
    """x without the second position, at which 1 became 4: s(y)_1 there, times the rate of leaving; noise a position."""
    x[:] = 1
    draws = iter([torch.full((4,), 2), torch.full((4,), 4)])
    monkeypatch.setattr(implicit_module, "_draw", lambda weights, generator: next(draws))
    seen = []

    def score(x, sigma):
        seen.append((x.clone(), sigma))
        return torch.arange(5.0).expand(*x.shape, 5) / 10 + 0.01 * torch.arange(6)[:, None]

    for sigma in (torch.tensor(0.5), torch.rand(4), torch.rand(4, 6)):
        draws, seen[:] = iter([torch.full((4,), 2), torch.full((4,), 4)]), []
        found = implicit_score_entropy_loss(score, make_graphs(5)["uniform"], x, sigma)
        assert torch.equal(seen[0][0], x)
        assert seen[1][0].tolist() == [[1, 1, 4, 1, 1, 1]] * 4
        assert all(torch.equal(told, sigma) for _, told in seen)
        states = torch.tensor([0, 2, 3, 4]) / 10
        rising = sum(float((states + 0.01 * i).exp().sum()) / 5 for i in range(6))
        torch.testing.assert_close(found, torch.full((4,), rising - 6 * 0.8 * (0.1 + 0.02)))


def test_noise_of_sequences_goes_with_their_neighbours():
    sigma, chosen = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([2, 0, 0])
    assert implicit_module._of_sequences(sigma, chosen).tolist() == pytest.approx([0.3, 0.1, 0.1])
    assert implicit_module._of_sequences(torch.tensor(0.7), chosen).shape == ()


def test_each_sequence_of_an_enumeration_is_asked_at_its_own_noise(make_graphs, x):
    graph, told = make_graphs(5)["hybrid"], []

    def score(x, sigma):
        told.append((x, sigma))
        return sigma[:, None, None] * torch.ones(*x.shape, 6)

    sigma = torch.tensor([0.1, 0.2, 0.3, 0.4])
    together = enumerated_implicit_score_entropy_loss(score, graph, x, sigma, batch_size=7)
    alone = [enumerated_implicit_score_entropy_loss(score, graph, x[i : i + 1], sigma[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone))
    assert max(len(asked) for asked, _ in told[1:-8]) == 7


@pytest.mark.parametrize("loss", [implicit_score_entropy_loss, enumerated_implicit_score_entropy_loss])
def test_a_mask_that_is_given_is_named_and_one_that_is_not_is_noise(loss, make_graphs, x):
    graph, given = make_graphs(5)["absorbing"], torch.zeros(4, 6, dtype=torch.bool)
    x[0, 1] = x[2, 3] = 5
    given[2, 3] = True
    message = r"x must be clean where it is given, and hold no mask \(mask_id 5\) there, got it at 1 positions"
    with pytest.raises(ValueError, match=message):
        loss(Net(6), graph, x, torch.ones(4), given=given)
    loss(Net(6), graph, x, torch.ones(4), given=given.roll(1, 1))
    with pytest.raises(ValueError, match="given must be a bool mask"):
        loss(Net(6), graph, x, torch.ones(4), given=given[:, :5])
