"""Any generator matrix: exponentials of reversible and irreversible chains, gradients, and what is no generator."""

from __future__ import annotations

import pytest
import torch
from sedd_graphs import Dense, Ordinal

DOUBLE = torch.float64
SIGMAS = [0.0, 1e-6, 1e-3, 0.3, 2.0, 50.0]


def generator_of(rates):
    rates = rates.clone().fill_diagonal_(0)
    return rates - rates.sum(0).diag()


def random(*shape):
    return torch.rand(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))


def irreversible():
    return generator_of(random(6, 6))


def cycle():
    return generator_of(torch.eye(5, dtype=DOUBLE).roll(1, 0))


def reversible():
    """Symmetric conductances over stationary weights that are not uniform."""
    conductance, weight = random(6, 6), random(6) + 0.1
    return generator_of((conductance + conductance.T) / weight)


def two_parts():
    return torch.block_diag(generator_of(random(3, 3) + random(3, 3).T), generator_of(random(2, 2)))


CHAINS = {"irreversible": irreversible, "cycle": cycle, "reversible": reversible, "two parts": two_parts}


@pytest.fixture(params=CHAINS, ids=str)
def Q(request):
    return CHAINS[request.param]()


def test_reversible_chains_are_recognised():
    assert not Dense(irreversible()).reversible
    assert not Dense(cycle()).reversible
    assert Dense(reversible()).reversible
    assert Dense(two_parts()).reversible
    flow = reversible()  # one conductance changed one way: detailed balance no longer holds around a triangle
    flow[0, 1] *= 1.01
    assert not Dense(generator_of(flow)).reversible


@pytest.mark.parametrize("sigma", SIGMAS)
def test_rows_and_columns_are_those_of_the_exponential(Q, sigma):
    graph, states, level = Dense(Q), torch.arange(len(Q)), torch.tensor(sigma, dtype=DOUBLE)
    exact = torch.matrix_exp(sigma * Q)
    torch.testing.assert_close(graph.transition_from(states, level).dense(), exact.T, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(graph.transition_into(states, level).dense(), exact, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(graph.transition_from(states, level).sum(), torch.ones(len(Q), dtype=DOUBLE))


@pytest.mark.parametrize("sigma", [1e-3, 0.3, 2.0])
def test_ratios_are_those_of_the_exponential(Q, sigma):
    exact = torch.matrix_exp(sigma * Q)
    x, x0 = torch.cartesian_prod(torch.arange(len(Q)), torch.arange(len(Q))).T
    reached = exact[x, x0] > 1e-6  # the reference has digits down to 1e-15 only, whence the tolerance
    x, x0 = x[reached], x0[reached]
    row = Dense(Q).ratio(x, x0, torch.tensor(sigma, dtype=DOUBLE)).dense()
    torch.testing.assert_close(row, exact[:, x0].T / exact[x, x0, None], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("sigma", [-1.0, -1e-3, 0.0, 1e-3, 3.0])
def test_propagate_multiplies_by_the_exponential_of_either_sign(Q, sigma):
    v = random(3, 4, len(Q))
    expected = v @ torch.matrix_exp(sigma * Q).T
    moved = Dense(Q).propagate(v, torch.full((3,), sigma, dtype=DOUBLE))
    torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-11)


def test_improbable_states_keep_their_digits():
    """Five steps along the cycle in so short a time: sigma^k / k! for k steps, to first order."""
    graph, sigma = Dense(cycle()), torch.tensor(1e-6, dtype=DOUBLE)
    p = graph.transition_from(torch.tensor(0), sigma).dense()
    k = torch.arange(5, dtype=DOUBLE)
    torch.testing.assert_close(p, sigma**k / (k + 1).lgamma().exp(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("sigma", [1e-5, 1e-3, 0.1])
def test_improbable_states_of_reversible_chains_keep_their_digits(sigma):
    """A walk among neighbours is the ordinal graph, whose closed form has them; eigenvectors have 1e-16 in all."""
    ordinal, states = Ordinal(7), torch.arange(7)
    graph, level = Dense(ordinal.rates_out_of(states).dense().double().T), torch.tensor(sigma, dtype=DOUBLE)
    assert graph.reversible
    for found, expected in [
        (graph.transition_from(states, level), ordinal.transition_from(states, level)),
        (graph.transition_into(states, level), ordinal.transition_into(states, level)),
    ]:
        torch.testing.assert_close(found.dense(), expected.dense(), rtol=1e-6, atol=0)  # rates came in float32


@pytest.mark.parametrize("sigma", [1e-2, 1.0, 20.0])
def test_very_uneven_limits_cost_no_digits(sigma):
    """A walk whose limit spans 24 orders of magnitude is reversible, but its eigenvectors are no help."""
    rates = torch.diag(torch.ones(6, dtype=DOUBLE), 1) + torch.diag(torch.full((6,), 1e-4, dtype=DOUBLE), -1)
    graph, level = Dense(generator_of(rates)), torch.tensor(sigma, dtype=DOUBLE)
    exact = torch.matrix_exp(sigma * generator_of(rates))
    torch.testing.assert_close(graph.propagate(torch.eye(7, dtype=DOUBLE), level), exact.T, rtol=0, atol=1e-12)
    row = graph.transition_from(torch.arange(7), level)
    torch.testing.assert_close(graph.propagate(torch.eye(7, dtype=DOUBLE), level), row.dense(), rtol=1e-9, atol=0)


def test_infinite_noise_is_the_limit(Q):
    prior = Dense(Q).prior(torch.tensor(torch.inf, dtype=DOUBLE)).dense()
    expected = torch.matrix_exp(1e3 * Q).mean(1)
    torch.testing.assert_close(prior, expected, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(Q @ prior, torch.zeros_like(prior), rtol=0, atol=1e-12)


def test_levels_of_a_batch_do_not_mix():
    graph, x = Dense(irreversible()), torch.randint(6, (3, 4), generator=torch.Generator().manual_seed(1))
    sigma = torch.tensor([0.5, 2.0, 0.5], dtype=DOUBLE)
    rows = graph.transition_from(x, sigma).dense()
    for b in range(3):
        torch.testing.assert_close(rows[b], Dense(irreversible()).transition_from(x[b], sigma[b]).dense())


def test_many_levels_are_taken_in_parts(monkeypatch):
    """Five levels, two matrices at a time, give what they give all at once."""
    states, sigma = torch.arange(6)[:5], torch.tensor([0.5, 2.0, 0.1, 1.0, 0.3], dtype=DOUBLE)
    v = random(5, 6)
    expected = [Dense(irreversible()).transition_from(states, sigma).dense(), Dense(irreversible()).propagate(v, sigma)]
    monkeypatch.setattr("sedd_graphs.dense._AT_ONCE", 2 * 6 * 6)
    found = [Dense(irreversible()).transition_from(states, sigma).dense(), Dense(irreversible()).propagate(v, sigma)]
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


def test_gradients_reach_sigma(Q):
    """d exp(sigma Q) / d sigma = Q exp(sigma Q)."""
    graph, states = Dense(Q), torch.arange(len(Q))
    sigma = torch.full((len(Q),), 0.7, dtype=DOUBLE, requires_grad=True)
    weight = random(len(Q), len(Q))
    derivative = Q @ torch.matrix_exp(0.7 * Q)
    for row, expected in [
        (graph.transition_from(states, sigma), derivative.T),
        (graph.transition_into(states, sigma), derivative),
    ]:
        (gradient,) = torch.autograd.grad((weight * row.dense()).sum(), sigma)
        torch.testing.assert_close(gradient, (weight * expected).sum(-1))
    moved = graph.propagate(weight, sigma)
    (gradient,) = torch.autograd.grad(moved.sum(), sigma)
    torch.testing.assert_close(gradient, (weight @ derivative.T).sum(-1), rtol=1e-7, atol=1e-12)


def test_the_mask_may_be_any_state():
    Q = generator_of(torch.tensor([[0, 0, 0], [1, 0, 1], [0, 0, 0]], dtype=DOUBLE))
    graph = Dense(Q, mask_id=1)
    torch.testing.assert_close(
        graph.prior(torch.tensor(0.0, dtype=DOUBLE)).dense(), torch.tensor([0.5, 0, 0.5], dtype=DOUBLE)
    )
    assert (graph.sample_prior((3, 4)) == 1).all()


def test_single_precision_generators_are_taken():
    Q = irreversible()
    p = Dense(Q.float()).transition_from(torch.arange(6), torch.tensor(0.5))
    assert p.value.dtype == torch.float32
    torch.testing.assert_close(p.dense(), torch.matrix_exp(0.5 * Q).T.float())


class TestNoGenerator:
    def test_columns_must_sum_to_zero(self):
        with pytest.raises(ValueError, match=r"Q must have columns that sum to 0, found 1 in column 1"):
            Dense(torch.tensor([[-1.0, 1.0], [1.0, 0.0]]))

    def test_a_transposed_generator_is_explained(self):
        with pytest.raises(ValueError, match=r"columns that sum to 0, found .* columns are the sources here, pass Q.T"):
            Dense(irreversible().T)

    def test_rates_must_not_be_negative(self):
        with pytest.raises(ValueError, match=r"Q must have off-diagonal rates of at least 0, found Q\[1, 0\] = -0.5"):
            Dense(torch.tensor([[0.5, 1.0], [-0.5, -1.0]]))

    def test_rates_must_be_finite(self):
        with pytest.raises(ValueError, match=r"Q must be finite, found Q\[0, 1\] = nan"):
            Dense(torch.tensor([[-1.0, torch.nan], [1.0, -1.0]]))

    @pytest.mark.parametrize("shape", [(2, 3), (4,), (1, 1), (2, 2, 2)])
    def test_the_matrix_must_be_square(self, shape):
        with pytest.raises(ValueError, match="Q must be a square matrix of at least 2 x 2, got shape"):
            Dense(torch.zeros(shape))

    def test_the_matrix_must_be_of_floats(self):
        with pytest.raises(TypeError, match=r"Q must be a floating-point tensor, got a torch\.int64 tensor"):
            Dense(torch.tensor([[-1, 1], [1, -1]]))

    def test_the_mask_must_be_a_state(self):
        with pytest.raises(ValueError, match="mask_id must be between 0 and 5, got 6"):
            Dense(irreversible(), mask_id=6)


def test_a_chain_of_one_matrix_too_many_is_still_taken(monkeypatch):
    """Where not even one exponential fits the memory that is meant for them, one is made at a time."""
    states, sigma = torch.arange(6)[:3], torch.tensor([0.5, 2.0, 0.1], dtype=DOUBLE)
    v = random(3, 6)
    expected = [Dense(irreversible()).transition_from(states, sigma).dense(), Dense(irreversible()).propagate(v, sigma)]
    monkeypatch.setattr("sedd_graphs.dense._AT_ONCE", 1)
    found = [Dense(irreversible()).transition_from(states, sigma).dense(), Dense(irreversible()).propagate(v, sigma)]
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


def test_rounding_of_a_generator_is_no_error():
    """Columns of 400 float32 numbers sum to 0 but for rounding; one rate off by a thousandth of its column does not."""
    rates = torch.rand(400, 400, generator=torch.Generator().manual_seed(0)).fill_diagonal_(0)
    Q = rates - rates.sum(0).diag()
    assert Q.double().sum(0).abs().max() > 0
    graph = Dense(Q)
    total = graph.rates_out_of(torch.arange(400)).sum()
    torch.testing.assert_close(total, torch.zeros(400), rtol=0, atol=1e-3)
    assert graph.max_rate() == pytest.approx(float(rates.double().sum(0).max()), rel=1e-6)
    with pytest.raises(ValueError, match=r"columns that sum to 0, found .* in column 7"):
        Dense(Q.index_put((torch.tensor(3), torch.tensor(7)), Q[3, 7] + 0.2))


def test_a_generator_is_taken_as_numbers_at_that_time():
    Q = irreversible().requires_grad_()
    graph = Dense(Q)
    before = graph.rates_into(torch.tensor(0)).value
    assert not before.requires_grad
    assert not graph.transition_from(torch.tensor(0), torch.tensor(0.5)).value.requires_grad
    with torch.no_grad():
        Q.zero_()
    assert torch.equal(graph.rates_into(torch.tensor(0)).value, before)
