"""Rows, columns, ratios and products of the closed-form graphs against matrix exponentials in float64."""

from __future__ import annotations

import pytest
import torch
from sedd_graphs import Absorbing, Clustered, Dense, Hybrid, LogLinear, Masked, Ordinal, PacedAbsorbing, Uniform

GRAPHS = [
    Absorbing(5),
    Absorbing(5, mask_id=2),
    Absorbing(5, mask_id=0),
    Absorbing(1),
    Uniform(6),
    Uniform(2),
    Hybrid(5, uniform_rate=0.7, mask_rate=0.4),
    Hybrid(5, uniform_rate=0.7, mask_rate=0.4, mask_id=0),
    Hybrid(5, uniform_rate=0.7, mask_rate=0.4, mask_id=3),
    Hybrid(2, uniform_rate=1.5, mask_rate=0.0),
    Hybrid(4, uniform_rate=0.0, mask_rate=1.0),
    Masked(Uniform(4), rate=0.5, mask_rate=2.0, mask_id=2),
]
SIGMAS = [0.0, 1e-6, 1e-3, 0.3, 2.0, 8.0]


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=GRAPHS, ids=repr)
def graph(request):
    return request.param


@pytest.fixture
def generator_matrix(graph):
    """Q, built here by hand and not by the graph."""
    n, m = graph.num_states, graph.mask_id
    if isinstance(graph, Uniform):
        return torch.full((n, n), 1 / n) - torch.eye(n)
    rate, mask_rate = (0.0, 1.0) if isinstance(graph, Absorbing) else (graph.rate, graph.mask_rate)
    tokens = [y for y in range(n) if y != m]
    q = torch.zeros(n, n)
    if rate:
        q[[[y] for y in tokens], tokens] = rate * (1 / len(tokens) - torch.eye(len(tokens)))
    for x in tokens:
        q[m, x] += mask_rate
        q[x, x] -= mask_rate
    return q


def every_state(graph):
    return torch.arange(graph.num_states)


def test_rates_are_the_rows_and_columns_of_the_generator(graph, generator_matrix):
    torch.testing.assert_close(graph.rates_into(every_state(graph)).dense(), generator_matrix, rtol=0, atol=1e-14)
    torch.testing.assert_close(graph.rates_out_of(every_state(graph)).dense(), generator_matrix.T, rtol=0, atol=1e-14)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_transitions_are_the_rows_and_columns_of_the_exponential(graph, generator_matrix, sigma):
    exact = torch.matrix_exp(sigma * generator_matrix)
    x, level = every_state(graph), torch.tensor(sigma)
    torch.testing.assert_close(graph.transition_from(x, level).dense(), exact.T, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(graph.transition_into(x, level).dense(), exact, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("sigma", SIGMAS[1:])
def test_ratios_are_those_of_the_exponential(graph, generator_matrix, sigma):
    exact = torch.matrix_exp(sigma * generator_matrix)
    x, x0 = torch.cartesian_prod(every_state(graph), every_state(graph)).T
    reached = exact[x, x0] > 0
    x, x0 = x[reached], x0[reached]
    row = graph.ratio(x, x0, torch.tensor(sigma)).dense()
    torch.testing.assert_close(row, exact[:, x0].T / exact[x, x0, None], rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("sigma", [-3.0, -1e-3, 0.0, 1e-3, 3.0])
def test_propagate_multiplies_by_the_exponential_of_either_sign(graph, generator_matrix, sigma):
    v = torch.randn(3, 4, graph.num_states, generator=torch.Generator().manual_seed(0))
    level = torch.full((3,), sigma)
    expected = v @ torch.matrix_exp(sigma * generator_matrix).T
    torch.testing.assert_close(graph.propagate(v, level), expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("sigma", [1e-3, 0.3, 2.0, float("inf")])
def test_prior_is_the_image_of_uniform_tokens(graph, generator_matrix, sigma):
    tokens = torch.ones(graph.num_states)
    if graph.mask_id is not None:
        tokens[graph.mask_id] = 0
    expected = torch.matrix_exp(min(sigma, 200.0) * generator_matrix) @ (tokens / tokens.sum())
    torch.testing.assert_close(graph.prior(torch.tensor(sigma)).dense(), expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("sigma", [1e-3, 0.3, 2.0, 20.0])
def test_prior_kl_is_the_divergence_from_the_prior(graph, sigma):
    x0, level = every_state(graph), torch.tensor(sigma)
    p, q = graph.transition_from(x0, level).dense(), graph.prior(level).dense()
    expected = torch.where(p > 0, torch.xlogy(p, p / q), 0).sum(-1)
    torch.testing.assert_close(graph.prior_kl(x0, level), expected, rtol=1e-8, atol=1e-14)
    assert (graph.prior_kl(x0, level) >= 0).all()


def test_posterior_is_bayes_rule(graph, generator_matrix):
    s, t = torch.tensor(0.4), torch.tensor(1.1)
    x, x0 = torch.cartesian_prod(every_state(graph), every_state(graph)).T
    early, late = torch.matrix_exp(s * generator_matrix), torch.matrix_exp((t - s) * generator_matrix)
    joint = late[x] * early[:, x0].T  # (pairs, x_s)
    possible = joint.sum(-1) > 0
    expected = joint[possible] / joint[possible].sum(-1, keepdim=True)
    row = graph.posterior(x[possible], x0[possible], s, t)
    torch.testing.assert_close(row.dense(), expected, rtol=1e-9, atol=1e-14)


def test_few_have_moved_before_the_fastest_rate_says_so(graph):
    states, share = every_state(graph), 1e-3
    rate = graph.max_rate()
    torch.testing.assert_close(rate, float(-graph.rates_into(states).dense().diagonal().min()))
    stayed = graph.transition_from(states, torch.tensor(share / rate)).at(states)
    assert 1 - share <= stayed.min() < 1 - 0.9 * share


def test_the_default_first_time_is_late_for_many_ordered_states():
    graph, noise, x = Ordinal(256), LogLinear(), torch.tensor(128)
    moved = 1 - graph.transition_from(x, noise(torch.tensor(1e-5))[0]).at(x)
    assert 0.12 < moved < 0.13
    early = noise.inverse(torch.tensor(1e-3 / graph.max_rate()))
    assert 1 - graph.transition_from(x, noise(early)[0]).at(x) < 1.001e-3


def test_noise_level_a_sequence_and_a_position_agree(graph):
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(graph.num_states, (3, 5), generator=generator)
    sigma = torch.rand(3, generator=generator)
    a, b = graph.transition_from(x, sigma), graph.transition_from(x, sigma[:, None].expand(3, 5))
    torch.testing.assert_close(a.dense(), b.dense())
    assert a.shape == (3, 5)
    assert a.value.shape == a.index.shape
    torch.testing.assert_close(a.sum(), torch.ones(3, 5))


def test_samples_follow_the_transition(graph):
    """Each frequency within 6 standard deviations: a false alarm once in 5e8 frequencies."""
    count, level = 100_000, torch.tensor(0.5)
    for x0 in range(graph.num_states):
        start = torch.full((count,), x0)
        drawn = graph.sample(start, level, generator=torch.Generator().manual_seed(x0)).bincount(
            minlength=graph.num_states
        )
        p = graph.transition_from(torch.tensor(x0), level).dense()
        assert ((drawn - count * p).abs() <= 6 * (count * p * (1 - p)).sqrt() + 1e-9 * count).all()


def test_the_hybrid_has_uniform_and_absorbing_at_its_ends():
    x, level = torch.arange(6), torch.tensor(0.8)
    absorbing, end = Absorbing(5, mask_id=1), Hybrid(5, uniform_rate=0, mask_rate=1, mask_id=1)
    torch.testing.assert_close(end.transition_from(x, level).dense(), absorbing.transition_from(x, level).dense())
    uniform, end = Uniform(5), Hybrid(5, uniform_rate=1, mask_rate=0)
    torch.testing.assert_close(
        end.transition_from(x[:5], level).dense()[:, :5], uniform.transition_from(x[:5], level).dense()
    )


def test_sample_prior_is_the_limit():
    assert (Absorbing(4, mask_id=1).sample_prior((2, 3)) == 1).all()
    assert (Hybrid(4, uniform_rate=1, mask_rate=0.1).sample_prior((2, 3)) == 4).all()
    drawn = Uniform(3).sample_prior((200, 300), generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (200, 300)
    assert (drawn.flatten().bincount() - 20_000).abs().max() < 6 * 120  # six standard deviations


def test_sample_prior_lies_where_it_is_asked_for():
    drawn = Uniform(3).sample_prior((2, 3), generator=torch.Generator(), device="meta")
    assert (drawn.device.type, drawn.shape) == ("meta", (2, 3))


@pytest.mark.parametrize("kappa", [1.0, 2.0, 5.0])
def test_kimura_has_its_transitions_and_its_pace(kappa):
    """A-G and C-T at kappa times the rate of each transversion, and one substitution a unit of noise (Kimura 1980)."""
    Q = Clustered.kimura(kappa).rates_into(torch.arange(4)).dense()
    partner = torch.tensor([2, 3, 0, 1])  # A = 0 and G = 2 are purines, C = 1 and T = 3 pyrimidines
    transversion = 1 / (kappa + 2)
    expected = torch.full((4, 4), transversion)
    expected[torch.arange(4), partner] = kappa * transversion
    torch.testing.assert_close(Q, expected.fill_diagonal_(-1.0), rtol=0, atol=1e-14)
    assert repr(Clustered.kimura(kappa)) == f"Clustered.kimura(kappa={kappa:.6g})"


def test_equal_rates_are_the_absorbing_graph():
    """At rates w all alike, exp(sQ) is that of the absorbing graph at noise w s."""
    graph, same = PacedAbsorbing(torch.full((5,), 2.0), mask_id=3), Absorbing(5, mask_id=3)
    x, x0, s = torch.tensor([3, 1, 3, 5]), torch.tensor([0, 1, 5, 5]), torch.tensor([0.4, 1e-6, 3.0, 20.0])
    for found, expected in [
        (graph.transition_from(x0, s), same.transition_from(x0, 2 * s)),
        (graph.transition_into(x, s), same.transition_into(x, 2 * s)),
        (graph.ratio(x, x0, s), same.ratio(x, x0, 2 * s)),
        (graph.prior(s), same.prior(2 * s)),
    ]:
        torch.testing.assert_close(found.dense(), expected.dense(), rtol=1e-12, atol=0)
    torch.testing.assert_close(graph.prior_kl(x0, s), same.prior_kl(x0, 2 * s), rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    "graph",
    [
        *(Absorbing(5, mask_id=2), Uniform(6), Hybrid(5, uniform_rate=0.7, mask_rate=0.4, mask_id=1), Ordinal(4)),
        *(Masked(Uniform(4), rate=0.5, mask_rate=2.0, mask_id=2), Clustered.kimura(kappa=2.5)),
    ],
    ids=repr,
)
def test_a_graph_says_how_it_was_made(graph):
    again = eval(repr(graph), {**globals(), "Clustered": Clustered})
    states = torch.arange(graph.num_states)
    assert (type(again), again.mask_id, repr(again)) == (type(graph), graph.mask_id, repr(graph))
    assert torch.equal(again.rates_into(states).dense(), graph.rates_into(states).dense())


def test_graphs_of_much_data_say_what_they_are():
    assert (
        repr(Clustered([3, 3, 1], within=1.0, between=0.25))
        == "Clustered(3 states in 2 clusters, within=1, between=0.25)"
    )
    assert repr(PacedAbsorbing(torch.ones(4), mask_id=1)) == "PacedAbsorbing(4 rates, mask_id=1)"
    assert repr(Dense(torch.ones(3, 3) - 3 * torch.eye(3), mask_id=1)) == "Dense(Q of 3 states, mask_id=1)"
    assert repr(Dense(torch.ones(3, 3) - 3 * torch.eye(3))) == "Dense(Q of 3 states)"


def test_rates_and_masks_unless_told_otherwise():
    assert (Masked(Uniform(3)).rate, Masked(Uniform(3)).mask_rate, Masked(Uniform(3)).mask_id) == (1, 1, 3)
    assert Absorbing(7).mask_id == Hybrid(7, uniform_rate=1, mask_rate=1).mask_id == 7
    assert PacedAbsorbing(torch.ones(7)).mask_id == 7
    assert (Absorbing(7).vocab_size, Hybrid(7, uniform_rate=1, mask_rate=1).vocab_size, Uniform(7).vocab_size) == (
        7,
        7,
        7,
    )
    assert PacedAbsorbing(torch.ones(7)).vocab_size == 7
    assert (Uniform(3).mask_id, Ordinal(3).mask_id, Clustered.kimura(2.0).mask_id) == (None, None, None)


def test_there_is_no_way_back_from_what_cannot_have_come():
    """NaN where x0 cannot have become x, and a distribution at the other positions of the batch."""
    x, x0 = torch.tensor([1, 1, 2, 2]), torch.tensor([0, 1, 0, 2])
    s, t = torch.tensor([0.4, 0.4, 0.4, 0.4]), torch.tensor([1.1, 1.1, 1.1, 1.1])
    for graph in (Absorbing(5, mask_id=2), PacedAbsorbing(torch.ones(5), mask_id=2)):
        total = graph.posterior(x, x0, s, t).sum()
        assert total.isnan().tolist() == [True, False, False, False]
        torch.testing.assert_close(total[1:], torch.ones(3))
