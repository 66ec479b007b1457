"""The bound sorted by the number of masks is the bound, by enumeration, and its deviation is a fraction."""

from __future__ import annotations

import importlib
import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from sedd_objectives import (
    denoising_score_entropy,
    likelihood_bound,
    masked_likelihood_bound,
    masks_evenly,
    reconstruction_loss,
)

module = importlib.import_module("sedd_objectives.masked_bound")
TOKENS, LENGTH, T_MIN = 3, 3, 0.02


class WrongScore:
    """A random log-score for every noised sequence of three, that depends on the noise level, and wrongly."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        shape = (TOKENS + 1,) * LENGTH + (LENGTH, TOKENS + 1)
        self.table = torch.randn(shape, generator=generator, dtype=torch.float64)

    def __call__(self, x, sigma):
        sigma = sigma.double()[:, None, None]
        wave = 1 + 0.5 * torch.sin(3 * sigma)
        return self.table[x[:, 0], x[:, 1], x[:, 2]] * wave - 0.9 * torch.log(torch.expm1(sigma))


def enumerated_bound(score, graph, noise, x0, free, weight, rate=1.0):
    """All three terms for one sequence (1, L), with every set of masks, over lambda by quadrature."""
    sigma = noise(torch.tensor([T_MIN, 1.0], dtype=torch.float64))[0]
    low, high = (1 - torch.exp(-rate * sigma)).tolist()
    nodes, weights = np.polynomial.legendre.leggauss(60)
    total = 0.0
    places = free.nonzero()[:, 0].tolist()
    subsets = [s for k in range(1, len(places) + 1) for s in itertools.combinations(places, k)]
    for hidden in subsets:
        k = len(hidden)
        x = x0.clone()
        x[:, list(hidden)] = graph.mask_id
        for node, quadrature in zip(nodes, weights, strict=True):
            level = low + (high - low) * (node + 1) / 2
            s = torch.full((1,), -math.log(1 - level) / rate, dtype=torch.float64)
            loss = (denoising_score_entropy(score(x, s), graph, x, x0, s) * weight).sum()
            chance = level**k * (1 - level) ** (len(places) - k)
            total += quadrature * (high - low) / 2 / (1 - level) / rate * chance * float(loss)
        t = torch.full((1,), T_MIN, dtype=torch.float64)
        loss = reconstruction_loss(score, graph, noise, x0, t, xt=x, weight=weight[None])
        total += low**k * (1 - low) ** (len(places) - k) * float(loss)
    return total + float((graph.prior_kl(x0, sigma[1:])[0] * weight)[free].sum())


CASES = {
    "all": ([True] * 3, [1.0, 1.0, 1.0]),
    "given": ([True, False, True], [1.0, 1.0, 1.0]),
    "weighted": ([True] * 3, [1.0, 0.0, 2.5]),
    "given and weighted": ([False, True, True], [3.0, 0.5, 1.0]),
}


@pytest.mark.parametrize(
    ("kind", "case", "parts"),
    [
        *itertools.product(["absorbing"], CASES, [0, 2]),
        ("dense absorbing", "given", 3),
        ("twice as fast", "given and weighted", 1),
    ],
)
def test_mean_is_the_enumerated_bound_and_its_error_the_spread(
    kind, case, parts, make_graphs, hybrid_graph, log_linear
):
    """4,000 draws within 4.5 standard errors, a false alarm in 150,000 runs; the squared error within 20 %."""
    graph = hybrid_graph(TOKENS, 0.0, 2.0) if kind == "twice as fast" else make_graphs(TOKENS)[kind]
    free, weight = torch.tensor(CASES[case][0]), torch.tensor(CASES[case][1])
    x0, score = torch.tensor([[2, 0, 1]]), WrongScore()
    found = masked_likelihood_bound(
        *(score, graph, log_linear, x0.expand(4000, -1)),
        num_times=4,
        num_parts=parts,
        num_reconstructions=2,
        given=(~free).expand(4000, -1),
        weight=weight.expand(4000, -1),
        generator=torch.Generator().manual_seed(1),
        t_min=T_MIN,
    )
    want = enumerated_bound(score, graph, log_linear, x0, free, weight.double(), 2.0 if "fast" in kind else 1.0)
    error = float(found.value.std()) / 4000**0.5
    assert abs(float(found.value.mean()) - want) < 4.5 * error
    assert error < 0.02 * want
    assert float((found.standard_error**2).mean() / found.value.var()) == pytest.approx(1, abs=0.2)
    torch.testing.assert_close(found.value, found.diffusion + found.prior + found.reconstruction)


def even_score(x, sigma):
    """Every token as probable as any other, whatever else is seen: -log c is log 3 at every position."""
    row = torch.full((*x.shape, TOKENS + 1), -math.log(TOKENS), dtype=torch.float64)
    return row - torch.log(torch.expm1(sigma.double()))[:, None, None]


def test_assembly_is_exact_where_nothing_is_random(make_graphs, log_linear, generator):
    """L log V to the last digits: the pilots' part, the ends' shares of lambda, the prior and the factors of k."""
    graph = make_graphs(TOKENS)["absorbing"]
    x0, given = torch.randint(TOKENS, (6, 20)), torch.zeros(6, 20, dtype=torch.bool)
    given[1, 3:] = True
    given[2] = True
    given[3, :1] = True
    free = (~given).sum(-1)
    found = masked_likelihood_bound(even_score, graph, log_linear, x0, given=given, num_times=8)
    low, high = 0.999e-3, 0.999
    plain = masked_likelihood_bound(
        even_score, graph, log_linear, x0, given=given, num_times=8, num_parts=0, generator=generator
    )
    assert (found.standard_error < 1e-5).all()
    assert (plain.standard_error[0] > 0.01).all()
    torch.testing.assert_close(found.diffusion, (high - low) * free.double() * math.log(TOKENS), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.prior, (1 - high) * free.double() * math.log(TOKENS), rtol=1e-4, atol=0)
    assert float(found.value[2]) == float(found.standard_error[2]) == 0


def test_the_error_has_that_of_the_reconstructions(make_graphs, log_linear, monkeypatch):
    """Where nothing else is random: of draws that are 1 and 3 with any mask, times the probability of one."""
    draws = itertools.cycle([1.0, 3.0])
    drawn = lambda *_, **__: torch.full((2,), next(draws), dtype=torch.float64)  # noqa: E731
    monkeypatch.setattr(module, "reconstruction_loss", drawn)
    x0 = torch.randint(TOKENS, (2, 5))
    how: dict[str, Any] = {"num_times": 8, "num_reconstructions": 4, "t_min": 0.1}
    found = masked_likelihood_bound(even_score, make_graphs(TOKENS)["absorbing"], log_linear, x0, **how)
    some = 1 - (1 - 0.0999) ** 5
    torch.testing.assert_close(found.reconstruction, torch.full((2,), 2 * some).double(), rtol=1e-5, atol=0)
    error = torch.full((2,), some * math.sqrt(4 / 3 / 4)).double()
    torch.testing.assert_close(found.standard_error, error, rtol=1e-4, atol=0)


def test_given_tokens_are_seen_clean_and_others_masked_in_the_announced_numbers(make_graphs, log_linear):
    graph, seen = make_graphs(TOKENS)["absorbing"], []

    def score(x, sigma):
        seen.append((x == TOKENS, x, sigma))
        return even_score(x, sigma)

    x0 = torch.randint(TOKENS, (5, 12))
    given = torch.rand(5, 12) < 0.4
    masked_likelihood_bound(score, graph, log_linear, x0, given=given, num_times=48, num_parts=3, num_reconstructions=2)
    assert len(seen) == 57
    for masked, x, sigma in seen:
        assert not (masked & given).any()
        assert torch.equal(x[~masked], x0[~masked])
        assert sigma.dtype == torch.float32
    free = ~given
    pilots = torch.stack([masked for masked, *_ in seen[:7]])
    assert torch.equal(pilots.sum(0), 4 * free.long())  # alone, with the next, with the one before, among all
    for masked, _, sigma in seen[:7]:  # told the mean of the lambdas that go with so many masks
        level = masked.sum(-1).clamp_min(1) / (free.sum(-1) + 1).double()
        torch.testing.assert_close(sigma, -torch.log1p(-level).float(), rtol=1e-6, atol=0)
    counts = torch.stack([masked.sum(-1) for masked, *_ in seen[7:55]])  # 24 strata of 1..k, k at most 12
    for row, length in zip(counts.T.tolist(), free.sum(-1).tolist(), strict=True):
        assert set(row) == set(range(1, length + 1))
        assert row[:2] == [1, 1]
        assert row[-2:] == [length, length]
        assert row == sorted(row) or max(abs(a - b) for a, b in zip(row, sorted(row), strict=True)) <= 1


def uneven_score(x, sigma):
    """The probability of the token at a place depends on the place and on how many are masked: from 0.01 to 0.99."""
    place = torch.arange(x.shape[1]) * 0.7
    share = (x == TOKENS).double().mean(-1, keepdim=True)
    p = torch.sigmoid(2.5 * torch.sin(place) + 2 - 2 * share)[..., None]
    tokens = torch.cat([p, (1 - p) / 2, (1 - p) / 2, p], -1).log()
    return tokens - torch.log(torch.expm1(sigma.double()))[:, None, None]


def test_at_equal_calls_the_deviation_is_less_than_a_quarter(make_graphs, log_linear):
    """64 measurements of one sequence of 256 tokens, whose surprises are as spread as those of a text."""
    graph, x0 = make_graphs(TOKENS)["absorbing"], torch.zeros(64, 256, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    ours = masked_likelihood_bound(uneven_score, graph, log_linear, x0, generator=generator)
    plain = likelihood_bound(
        uneven_score, graph, log_linear, x0, num_times=112, num_reconstructions=16, generator=generator
    )
    error = float(((ours.value.var() + plain.value.var()) / 64) ** 0.5)
    assert abs(float(ours.value.mean() - plain.value.mean())) < 4.5 * error
    assert float(ours.value.std()) < float(plain.value.std()) / 4


@pytest.mark.parametrize("kind", ["uniform", "hybrid", "dense"])
def test_other_processes_are_refused(kind, make_graphs, log_linear):
    graph, x0 = make_graphs(TOKENS)[kind], torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"graph must .*use likelihood_bound"):
        masked_likelihood_bound(lambda x, s: torch.zeros(2, 4, graph.num_states), graph, log_linear, x0)


def test_uneven_rates_are_refused_if_such_a_token_occurs(make_graphs, log_linear):
    graph = make_graphs(TOKENS)["dense absorbing"]
    graph.matrix = graph.matrix * torch.tensor([1.0, 1.0, 1.5, 1.0])
    x0 = torch.tensor([[0, 1, 1]])
    masked_likelihood_bound(even_score, graph, log_linear, x0, num_times=2, num_reconstructions=2)
    with pytest.raises(ValueError, match="at one rate"):
        masked_likelihood_bound(even_score, graph, log_linear, x0 + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x0": torch.zeros(3, dtype=torch.int64)}, r"x0 must have shape \(B, L\)"),
        ({"x0": torch.full((2, 3), 9)}, "x0 must lie in"),
        (
            {"x0": torch.full((2, 3), TOKENS)},
            r"no mask \(mask_id 3\) .* got it at 6 of 6 positions",
        ),
        ({"num_times": 7}, "num_times must be even"),
        ({"num_parts": -1}, "num_parts must be at least 0"),
        ({"num_reconstructions": 1}, "num_reconstructions must be at least 2"),
        ({"t_min": 0.0}, "t_min must lie in"),
        ({"given": torch.zeros(2, 3)}, "given must be a bool mask of x0's shape"),
        ({"given": torch.zeros(2, 2, dtype=torch.bool)}, "given must be a bool mask of x0's shape"),
        ({"weight": torch.zeros(2)}, "weight is 0 at every position"),
        ({"score": lambda x, s: torch.full((2, 3, 4), float("nan"))}, "log_score is NaN"),
    ],
)
def test_bad_input_is_named(change, message, make_graphs, log_linear):
    arguments = {"score": even_score, "x0": torch.zeros(2, 3, dtype=torch.int64)} | change
    score, x0 = arguments.pop("score"), arguments.pop("x0")
    with pytest.raises(ValueError, match=message):
        masked_likelihood_bound(score, make_graphs(TOKENS)["absorbing"], log_linear, x0, **arguments)


def binomial(n, k, p):
    return math.comb(n, k) * p**k * (1 - p) ** (n - k) if k <= n else 0.0


@pytest.mark.parametrize(("low", "high"), [(0.02, 0.9), (1e-3, 0.999), (0.0, 0.5)])
def test_levels_have_the_law_given_the_number_of_masks(low, high, generator):
    """Sequences of 4, 1 and 0 free positions, out of 5: P_k, the distribution function and its inverse."""
    lengths = torch.tensor([4, 1, 0])
    levels = module._Levels(lengths, 5, *torch.tensor([low, high], dtype=torch.float64))
    want = [
        [sum(binomial(n, j, high) - binomial(n, j, low) for j in range(k, n + 1)) for k in range(1, 6)]
        for n in lengths.tolist()
    ]
    torch.testing.assert_close(levels.probabilities(), torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    middle = (low + high) / 2
    for k in (0, 1, 3, 4):
        found = levels.at_least(torch.full((3,), k), torch.full((3,), middle, dtype=torch.float64))
        due = [sum(binomial(n, j, middle) for j in range(k, n + 1)) for n in lengths.tolist()]
        assert found.tolist() == pytest.approx(due, rel=1e-9, abs=1e-15)
    count = torch.tensor([2, 1, 1])
    level, probability = levels.draw(count, generator)
    assert probability.tolist() == pytest.approx([row[k - 1] for row, k in zip(want, count.tolist(), strict=True)])
    assert ((level >= low) & (level <= high)).all()


def test_levels_of_a_thousand_tokens_have_their_digits():
    """The number of ways to choose k of L has hundreds of them."""
    length, low, high = 1000, 0.25, 0.625
    levels = module._Levels(torch.tensor([length]), length, *torch.tensor([low, high], dtype=torch.float64))
    for k in (1, 280, 450, 620, 1000):
        due = sum(
            math.comb(length, j) * Fraction(high) ** j * Fraction(1 - high) ** (length - j) for j in range(k, 1001)
        )
        found = levels.at_least(torch.tensor([k]), torch.tensor([high], dtype=torch.float64))
        assert float(found) == pytest.approx(float(due), rel=1e-10)
    below, above = (levels.at_least(torch.tensor([450]), end[None]) for end in (levels.low, levels.high))
    assert float(levels.probabilities()[0, 449]) == pytest.approx(float(above - below), rel=1e-12)


def test_a_level_is_the_quantile_of_its_uniform_number(monkeypatch):
    """Beta(2, 3) within [0.1, 0.8] at 0, 1/4 and 1."""
    levels = module._Levels(torch.tensor([4, 4, 4]), 4, *torch.tensor([0.1, 0.8], dtype=torch.float64))
    unit = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: unit)
    level, _ = levels.draw(torch.full((3,), 2), None)
    assert level[[0, 2]].tolist() == pytest.approx([0.1, 0.8], abs=1e-12)
    below, at, above = (sum(binomial(4, j, p) for j in (2, 3, 4)) for p in (0.1, float(level[1]), 0.8))
    assert (at - below) / (above - below) == pytest.approx(0.25, abs=1e-12)


def test_a_guess_and_its_mean_over_all_sets_of_masks(generator):
    """b(M) by its formula, and the P-weighted mean of b / k over every set of k, with given positions between."""
    free = torch.tensor([[True, True, False, True, True]])
    alone, right, left, of_all = torch.rand(4, 1, 5, generator=generator, dtype=torch.float64) * free
    right, left = right * torch.tensor([1, 0, 0, 1, 0]), left * torch.tensor([0, 1, 0, 0, 1])
    guess = module._Guess(free, alone, right, left, of_all)
    probability = torch.rand(1, 5, generator=generator, dtype=torch.float64)
    places, total = [0, 1, 3, 4], 0.0
    for k in range(1, 5):
        values = []
        for chosen in itertools.combinations(places, k):
            masked = torch.zeros(1, 5, dtype=torch.bool)
            masked[0, list(chosen)] = True
            few = sum(
                float(alone[0, i] + (i + 1 in chosen) * right[0, i] + (i - 1 in chosen) * left[0, i]) for i in chosen
            )
            want = (1 - k / 4) * few + k / 4 * sum(float(of_all[0, i]) for i in chosen)
            assert float(guess.at(masked)) == pytest.approx(want, rel=1e-12)
            values.append(want / k)
        total += float(probability[0, k - 1]) * sum(values) / len(values)
    assert float(guess.total(probability.clone().index_fill(1, torch.tensor(4), 0))) == pytest.approx(total, rel=1e-12)


def test_masks_are_told_from_other_processes_by_their_rows(make_graphs, hybrid_graph):
    """Every token to the mask at one rate, known to 1e-4, and nowhere else; the mask itself does not count."""
    x0 = torch.tensor([[0, 2, 3]])
    evenly = {kind: masks_evenly(graph, x0.clamp_max(2)) for kind, graph in make_graphs(3).items()}
    assert evenly == {
        "uniform": False, "absorbing": True, "hybrid": False, "dense": False, "dense absorbing": True,
    }  # fmt: skip
    assert masks_evenly(hybrid_graph(3, 0.0, 2.0), x0)
    assert masks_evenly(hybrid_graph(3, 0.5, 2.0), torch.tensor([3, 3]))  # no token is there
    graph = make_graphs(3)["dense absorbing"]
    even = graph.matrix.clone()
    for off, right in ((0.9e-4, True), (2.2e-4, False)):
        graph.matrix = even * torch.tensor([1.0, 1.0, 1 + off, 1.0])
        assert masks_evenly(graph, torch.tensor([0, 1, 2])) is right
        assert masks_evenly(graph, torch.tensor([0, 1]))
    graph.matrix = even.clone()
    graph.matrix[:, 1] = torch.tensor([0.5, -0.5, 0, 0])  # one that turns into another token alone
    assert not masks_evenly(graph, torch.tensor([1]))
    graph.matrix = even.clone()
    graph.matrix[:, 3] = torch.tensor([0.5, 0, 0, -0.5])  # a mask that becomes a token again
    assert not masks_evenly(graph, torch.tensor([1]))
    graph.matrix = even.clone()
    graph.matrix[:, 1] = torch.tensor([0.1, -1.1, 0, 1.0])  # one that may become another token
    assert not masks_evenly(graph, torch.tensor([1]))


def test_pilots_tell_what_a_masked_neighbour_adds_on_either_side(make_graphs):
    """A model whose surprise is 1, 1/2 more with a mask behind the position and 1/4 more with one before it."""

    def score(x, sigma):
        masked = torch.nn.functional.pad((x == TOKENS).double(), (1, 1))
        p = torch.exp(-(1 + masked[:, 2:] / 2 + masked[:, :-2] / 4))[..., None]
        tokens = torch.cat([p, (1 - p) / 2, (1 - p) / 2, p], -1).log()
        return tokens - torch.log(torch.expm1(sigma.double()))[:, None, None]

    x0, free = torch.zeros(1, 7, dtype=torch.int64), torch.ones(1, 7, dtype=torch.bool)
    problem = module._Problem(score, make_graphs(TOKENS)["absorbing"], x0, free, None, 1.0, TOKENS, None)
    guess = problem.guess(4, torch.float64)
    inner = torch.ones(1, 6, dtype=torch.float64)
    for found, want in (
        (guess.alone, torch.ones(1, 7).double()),
        (guess.right, torch.nn.functional.pad(inner / 2, (0, 1))),
        (guess.left, torch.nn.functional.pad(inner / 4, (1, 0))),
        (guess.all, torch.tensor([[1.5, *[1.75] * 5, 1.25]], dtype=torch.float64)),
    ):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
