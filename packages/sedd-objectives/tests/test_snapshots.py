"""Snapshots alone: the loss from its formula, the bound put together from known parts and against every term summed."""

from __future__ import annotations

import importlib
import itertools
import math
from typing import Any

import pytest
import torch
from sedd_objectives import enumerated_implicit_score_entropy_loss, snapshot_bound, snapshot_loss
from sedd_objectives.decoder import EVEN_SHARE
from sedd_objectives.implicit import total_rate_out
from sedd_objectives.snapshots import log_decoder_of_one_jump

module = importlib.import_module("sedd_objectives.snapshots")
TOKENS = 4


class WithPrior:
    """A graph that says its prior: what noise makes of random tokens."""

    def __init__(self, graph, vector):
        self.graph, self.vector = graph, vector

    def __getattr__(self, name):
        return getattr(self.graph, name)

    def prior(self, sigma):
        tokens = torch.zeros(self.graph.num_states, dtype=sigma.dtype)
        tokens[:TOKENS] = 1 / TOKENS
        value = self.graph.propagate(tokens, sigma)
        return self.vector(torch.zeros_like(value[..., 0]), torch.arange(len(value)), value)


@pytest.fixture(params=["uniform", "absorbing", "hybrid"])
def process(request, make_graphs, vector):
    return WithPrior(make_graphs(TOKENS)[request.param], vector)


@pytest.fixture
def absorbing(make_graphs, vector):
    return WithPrior(make_graphs(TOKENS)["absorbing"], vector)


def test_the_loss_is_minus_log_p_over_tokens_wherever_x_can_have_moved(process, log_linear, generator):
    x0 = torch.randint(TOKENS, (3, 5), generator=generator)
    xt = process.sample(x0, torch.ones(3), generator=generator)
    xt[:, 0] = process.num_states - 1
    x0[:, 0] = 3
    logits = torch.randn(3, 5, process.num_states, generator=generator, dtype=torch.float64).requires_grad_()
    told = []

    def model(x, sigma):
        told.append((x, sigma))
        return logits

    t = torch.tensor([0.2, 0.5, 0.9])
    weight = torch.rand(3, 5, generator=generator)
    weight[1] = 0
    found = snapshot_loss(model, process, log_linear, x0, t, xt=xt, weight=weight)
    each = -logits[..., :TOKENS].log_softmax(-1).gather(-1, x0[..., None])[..., 0]
    moved = (xt == process.mask_id) if process.graph.a == 0 else torch.ones_like(xt, dtype=torch.bool)
    want = (each * moved * weight).sum(-1)
    torch.testing.assert_close(found, want)
    slopes = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (found, want)]
    torch.testing.assert_close(*slopes)
    assert torch.equal(told[0][0], xt)
    assert torch.equal(told[0][1], log_linear(t)[0])
    whole = snapshot_loss(model, process, log_linear, x0, t, xt=xt)
    torch.testing.assert_close(whole, (each * moved).sum(-1))
    given = torch.zeros(3, 5, dtype=torch.bool)
    given[:, 2:] = True
    kept = torch.where(given, x0, xt)
    alone = snapshot_loss(model, process, log_linear, x0, t, xt=kept, given=given, weight=weight)
    torch.testing.assert_close(alone, (each * moved * weight)[:, :2].sum(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_loss_comes_in_float32_or_wider(dtype, absorbing, log_linear):
    logits = torch.randn(2, 3, TOKENS + 1, generator=torch.Generator().manual_seed(0)).to(dtype)
    x0, xt = torch.zeros(2, 3, dtype=torch.int64), torch.full((2, 3), TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        found = snapshot_loss(lambda x, s: logits, absorbing, log_linear, x0, torch.full((2,), 0.5), xt=xt)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.dtype == wide
    want = -logits.to(wide)[..., :TOKENS].log_softmax(-1)[..., 0].sum(-1)
    torch.testing.assert_close(found, want)


def test_the_loss_draws_stratified_times_and_their_noise(absorbing, generator):
    """Of 20,000 positions a share 1 - e^-sigma is masked, within 5 standard errors (a false alarm in 1.7 million)."""
    told = []

    def noise(t):
        told.append(t)
        return 2 * t, torch.full_like(t, 2.0)

    seen = []

    def model(x, sigma):
        seen.append(x == TOKENS)
        return torch.zeros(*x.shape, TOKENS + 1)

    x0 = torch.zeros(4, 20_000, dtype=torch.int64)
    loss = snapshot_loss(model, absorbing, noise, x0, generator=generator, t_min=0.2)
    assert torch.equal(((told[0] - 0.2) / 0.8 * 4).floor().sort().values, torch.arange(4.0))
    share, due = seen[0].double().mean(-1), -torch.expm1(-2 * told[0].double())
    assert ((share - due).abs() < 5 * (due * (1 - due) / 20_000).sqrt()).all()
    torch.testing.assert_close(loss, seen[0].sum(-1) * math.log(TOKENS), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x0": torch.zeros(3, dtype=torch.int64)}, r"x0 must have shape \(B, L\)"),
        ({"x0": torch.full((2, 3), TOKENS)}, "no mask .* where it counts or is given"),
        ({"xt": torch.full((2, 3), -1)}, "xt must lie in"),
        ({"xt": torch.full((2, 3), 1)}, "no jump leads into it, and it is another state, got such pairs at 6 of 6"),
        ({"xt": torch.zeros(2, 2, dtype=torch.int64)}, "xt must have shape"),
        ({"given": torch.ones(2, 3) > 2, "weight": torch.zeros(2)}, "weight is 0 at every position"),
        ({"given": torch.tensor([[True, False, False]] * 2)}, "xt must be x0 where it is given, it differs at 2"),
        ({"model": lambda x, s: torch.full((2, 3, 5), math.nan)}, "logits are NaN, or all -inf, at 6 of 6 positions"),
        ({"model": lambda x, s: torch.zeros(2, 3, 4)}, "the model must return logits of shape"),
        ({"model": lambda x, s: torch.full((2, 3, 5), 0.2)}, "these are probabilities, pass their logarithm"),
    ],
)
def test_bad_input_of_the_loss_is_named(change, message, absorbing, log_linear):
    arguments = {
        "model": lambda x, s: torch.zeros(2, 3, 5),
        "x0": torch.zeros(2, 3, dtype=torch.int64),
        "xt": torch.full((2, 3), TOKENS),
    } | change
    model, x0 = arguments.pop("model"), arguments.pop("x0")
    with pytest.raises(ValueError, match=message):
        snapshot_loss(model, absorbing, log_linear, x0, torch.full((2,), 0.5), **arguments)


def test_padding_of_the_loss_may_be_a_pair_that_cannot_be(absorbing, log_linear):
    x0, xt = torch.tensor([[0, 1]]), torch.tensor([[4, 2]])
    how: dict[str, Any] = {"xt": xt, "weight": torch.tensor([[1, 0]])}
    found = snapshot_loss(lambda x, s: torch.zeros(1, 2, 5), absorbing, log_linear, x0, torch.full((1,), 0.5), **how)
    assert float(found) == pytest.approx(math.log(4))


# The bound


def stub(monkeypatch, implicit, leaving, endings):
    """The parts of the bound as known numbers, and what the first of them was handed."""
    implicit, endings, seen = itertools.cycle(implicit), itertools.cycle(endings), []

    def loss(score, graph, x, sigma, **how):
        seen.append((x, sigma, how))
        return torch.full((len(x),), next(implicit))

    def reconstruction(score, graph, x0, xt, sigma, counted):
        seen.append((xt, sigma, counted))
        return torch.full((len(x0),), next(endings), dtype=torch.float64)

    monkeypatch.setattr(module, "implicit_score_entropy_loss", loss)
    monkeypatch.setattr(module, "total_rate_out", lambda graph, x: torch.full(x.shape, leaving, dtype=torch.float64))
    monkeypatch.setattr(module, "_reconstruction", reconstruction)
    return seen


def straight(t):
    return 3 * t, torch.full_like(t, 3.0)


X0 = torch.zeros(3, 2, dtype=torch.int64)
HOW: dict[str, Any] = {"num_reconstructions": 3, "t_min": 0.5, "small_noise_share": 0.0}


def test_the_bound_is_put_together_from_its_draws(absorbing, monkeypatch):
    """Pairs (0, 2), (4, 10) less 2 for leaving, times dsigma 3; reconstructions 0, 1, 5; the prior of masks."""
    seen = stub(monkeypatch, [0.0, 2.0, 4.0, 10.0], 1.0, [0.0, 1.0, 5.0])
    always_masked = lambda x0, sigma, *, generator=None: torch.full_like(x0, TOKENS)  # noqa: E731
    monkeypatch.setattr(absorbing, "sample", always_masked, raising=False)
    found = snapshot_bound(lambda x, s: None, absorbing, straight, X0, num_times=4, **HOW)
    assert found.diffusion.tolist() == pytest.approx([0.5 * 3 * (4 - 2)] * 3)
    assert found.reconstruction.tolist() == pytest.approx([2.0] * 3)
    assert found.prior.tolist() == pytest.approx([-2 * math.log(1 - math.exp(-3))] * 3, rel=1e-6)
    torch.testing.assert_close(found.value, found.diffusion + found.prior + found.reconstruction)
    variance = (0.5 * 3 * 2 / 4) ** 2 + (0.5 * 3 * 6 / 4) ** 2 + 7 / 3
    assert found.standard_error.tolist() == pytest.approx([variance**0.5] * 3)
    assert all(getattr(found, name).dtype == torch.float64 for name in ("value", "standard_error", "prior"))
    assert len(seen) == 7
    strata = torch.stack([(sigma / 3 - 0.5) / 0.5 * 2 for _, sigma, _ in seen[:4]]).floor()
    assert torch.equal(strata, torch.arange(2.0).repeat_interleave(2)[:, None].expand(4, 3))
    assert not torch.equal(seen[0][1], seen[1][1])
    assert all(torch.equal(sigma, torch.full((3,), 1.5)) for _, sigma, _ in seen[4:])


def test_the_bound_s_prior_is_that_of_the_last_states_and_spreads(absorbing, monkeypatch):
    """x_1 is the token 0 of weight 2 in the first draw, and the mask in the others; token 1 does not count."""
    stub(monkeypatch, [0.0], 0.0, [0.0])
    states = itertools.chain([4, 4], itertools.cycle([0, 4, 4, 4, 4, 4]))

    def sample(x0, sigma, *, generator=None):
        return torch.full_like(x0, next(states))

    monkeypatch.setattr(absorbing, "sample", sample, raising=False)
    weight = torch.tensor([[2.0, 0.0]]).expand(3, 2)
    found = snapshot_bound(lambda x, s: None, absorbing, straight, X0, num_times=2, weight=weight, **HOW)
    token, mask = -2 * (-3 - math.log(4)), -2 * math.log(-math.expm1(-3))
    assert found.prior.tolist() == pytest.approx([(token + 2 * mask) / 3] * 3, rel=1e-6)
    spread = torch.tensor([token, mask, mask]).double().std() / 3**0.5
    assert found.standard_error.tolist() == pytest.approx([float(spread)] * 3, rel=1e-6)


def test_the_bound_counts_what_counts(absorbing, monkeypatch):
    """Weights multiply the rate of leaving, and are handed on to the other terms; given positions stay clean."""
    seen = stub(monkeypatch, [0.0], 1.0, [0.0])
    weight, given = torch.tensor([[0.5, 2.0]]).expand(3, 2), torch.tensor([[False, True]]).expand(3, 2)
    how = HOW | {"generator": torch.Generator().manual_seed(0)}
    found = snapshot_bound(lambda x, s: None, absorbing, straight, X0, num_times=2, weight=weight, given=given, **how)
    assert found.diffusion.tolist() == pytest.approx([-0.5 * 3 * 0.5] * 3)
    assert all((x[:, 1] == 0).all() for x, *_ in seen)
    for _, _, handed in seen[:2]:
        assert torch.equal(handed["weight"], weight)
        assert torch.equal(handed["given"], given)
        assert handed["generator"] is how["generator"]
    for *_, counted in seen[2:]:
        assert torch.equal(counted, torch.tensor([[0.5, 0.0]], dtype=torch.float64).expand(3, 2))


def test_the_weights_of_times_by_noise_make_up_for_their_density(absorbing, monkeypatch):
    """Of a constant integrand the mean is the length of the interval whatever the density; 4,000 sequences."""
    stub(monkeypatch, [1.0], 0.0, [0.0])
    x0 = torch.zeros(4000, 1, dtype=torch.int64)
    how = HOW | {"small_noise_share": 0.5, "t_min": 0.1}
    found = snapshot_bound(lambda x, s: None, absorbing, straight, x0, num_times=8, **how)
    assert float(found.diffusion.mean()) == pytest.approx(0.9 * 3, rel=0.01)
    assert found.diffusion.std() > 0


class Problem:
    """Single tokens of a random law, a score off by a table, and all terms of the bound summed."""

    def __init__(self, graph, enumerated):
        self.graph, self.data = graph, enumerated(graph.graph, length=1)
        n = graph.num_states
        self.wrong = 0.5 * torch.randn(n, n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        self.states = torch.arange(n)[:, None]

    def score(self, x, sigma):
        return self.data.log_ratios(x, sigma).double() + self.wrong[x]

    def total(self, noise, t_min):
        """The bound, by 100 midpoints in log sigma, and every x0, x_t and neighbour."""
        first, last = noise(torch.tensor([t_min, 1.0], dtype=torch.float64))[0].log().tolist()
        width, diffusion = (last - first) / 100, 0.0
        rates = self.graph.rates_into(self.states[:, 0]).dense(self.graph.num_states).double()
        leaving = -rates.diagonal()
        for i in range(100):
            sigma = torch.tensor(first + (i + 0.5) * width, dtype=torch.float64).exp()
            reached = self.data.marginal(sigma) > 0
            each = torch.zeros(len(self.states), dtype=torch.float64)
            each[reached] = enumerated_implicit_score_entropy_loss(
                self.score, self.graph, self.states[reached], sigma.expand(int(reached.sum()))
            )
            diffusion += width * float(sigma * (self.data.marginal(sigma) * (each - leaving)).nansum())
        sigma = torch.tensor([first, last], dtype=torch.float64).exp()
        prior = self.graph.prior(sigma[1]).value.log()
        end = -float(torch.where(self.data.marginal(sigma[1]) > 0, self.data.marginal(sigma[1]) * prior, 0).sum())
        start = sigma[:1].expand(len(self.states))
        kernel, log_score = self.data.kernel(sigma[0]), self.score(self.states, start)[:, 0]
        jumped = torch.where(rates > 0, rates * sigma[0] * log_score.exp(), 0)
        jumped[self.states[:, 0], self.states[:, 0]] = 1
        p = jumped[:, :TOKENS] / jumped[:, :TOKENS].sum(-1, keepdim=True)
        log_p = ((1 - EVEN_SHARE) * p + EVEN_SHARE / TOKENS).log()
        return diffusion + end - float((kernel * self.data.probability * log_p).nansum())


def test_the_bound_is_the_sum_of_its_terms(process, enumerated, geometric, generator, float64_rates):
    """Within 4.5 standard errors, a false alarm in 150,000 runs; its error is its spread over draws, within 30 %."""
    geometric.low, geometric.high = 1e-2, 3.0
    problem, count = Problem(process, enumerated), 4000
    x0 = problem.data.sample(count, generator)
    how: dict[str, Any] = {"num_times": 8, "num_reconstructions": 2, "generator": generator}
    found = snapshot_bound(problem.score, process, geometric, x0, **how)
    error = float(found.value.std()) / count**0.5
    assert abs(float(found.value.mean()) - problem.total(geometric, 1e-3)) < 4.5 * error
    assert error < 0.05
    one = snapshot_bound(problem.score, process, geometric, x0[:1].expand(count, -1), **how)
    assert float((one.standard_error**2).mean() / one.value.var()) == pytest.approx(1, abs=0.3)


def test_the_decoder_of_one_jump_is_its_formula_and_a_distribution(process, generator):
    n, sigma = process.num_states, torch.tensor([0.01, 0.3, 2.0], dtype=torch.float64)
    log_score = torch.randn(3, n, generator=generator, dtype=torch.float64)
    for state in range(n):
        x = torch.full((3,), state)
        spoilt = log_score.clone()
        spoilt[:, state] = 50.0
        rates = process.rates_into(x).dense(n).double()
        weight = rates * sigma[:, None] * log_score.exp()
        weight[:, state] = 1
        p = weight[:, :TOKENS] / weight[:, :TOKENS].sum(-1, keepdim=True)
        total = torch.zeros(3, dtype=torch.float64)
        for clean in range(TOKENS):
            found = log_decoder_of_one_jump(spoilt, process, x, torch.full((3,), clean), sigma)
            want = ((1 - EVEN_SHARE) * p[:, clean] + EVEN_SHARE / TOKENS).log()
            torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)
            total += found.exp()
        torch.testing.assert_close(total, torch.ones(3, dtype=torch.float64))


def test_the_reconstruction_is_the_decoder_at_what_counts(absorbing, generator):
    """Noise one a position, or one a sequence; unmasked positions are clean and tell nothing."""
    log_score = torch.randn(2, 3, TOKENS + 1, generator=generator, dtype=torch.float64)
    x0, xt = torch.tensor([[0, 1, 2], [3, 0, 1]]), torch.tensor([[4, 1, 4], [4, 4, 1]])
    counted = torch.tensor([[0.5, 1, 1], [0, 2, 1]], dtype=torch.float64)
    for sigma in (torch.tensor([0.3, 0.7]), torch.rand(2, 3, generator=generator)):
        found = module._reconstruction(lambda x, s: log_score, absorbing, x0, xt, sigma, counted)
        levels = sigma.double() if sigma.ndim == 2 else sigma.double()[:, None].expand(2, 3)
        want = torch.zeros(2, dtype=torch.float64)
        for b, i in ((0, 0), (0, 2), (1, 1)):
            at = log_score[b, i][None], absorbing, xt[b, i][None], x0[b, i][None], levels[b, i][None]
            want[b] -= counted[b, i] * log_decoder_of_one_jump(*at)[0]
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rate_of_leaving_is_the_sum_of_the_jumps_out(dtype, make_graphs, vector):
    """Also where a row leaves out the state itself, or lists it first; in float64, whatever the rates."""

    class Given:
        num_states = 5

        def __init__(self, row):
            self.row = row

        def rates_out_of(self, x):
            return self.row

    def row(base, index, value):
        return vector(torch.tensor(base, dtype=dtype), torch.tensor(index), torch.tensor(value, dtype=dtype))

    x = torch.tensor([2, 0])
    for given, want in (
        (row([0.25, 0.5], [[2, 1], [0, 3]], [[-9.0, 1.0], [-9, 2]]), [1 + 3 * 0.25, 2 + 3 * 0.5]),
        (row([0.25, 0.5], [[4, 1], [1, 3]], [[4.0, 1.0], [3, 2]]), [5 + 2 * 0.25, 5 + 2 * 0.5]),
        (row([0.25, 0.5], [[2], [1]], [[-9.0], [3]]), [4 * 0.25, 3 + 3 * 0.5]),
    ):
        graph: Any = Given(given)
        found = total_rate_out(graph, x)
        assert found.dtype == torch.float64
        assert found.tolist() == want
    for kind in ("uniform", "absorbing", "hybrid", "dense"):
        graph = make_graphs(5)[kind]
        states = torch.arange(graph.num_states)
        matrix = graph.matrix() if callable(graph.matrix) else graph.matrix
        torch.testing.assert_close(total_rate_out(graph, states), -matrix.diagonal(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x0": torch.zeros(3, dtype=torch.int64)}, r"x0 must have shape \(B, L\)"),
        ({"x0": torch.full((3, 2), TOKENS)}, "no mask .* where it counts or is given"),
        ({"num_times": 7}, "num_times must be even and at least 2, got 7"),
        ({"num_reconstructions": 1}, "num_reconstructions must be at least 2"),
        ({"t_min": 0.0}, r"t_min must lie in \(0, 1\), got 0.0"),
        ({"t_min": 1.0}, r"t_min must lie in \(0, 1\), got 1.0"),
        ({"small_noise_share": 1.0}, r"small_noise_share must lie in \[0, 1\), got 1.0"),
        ({"small_noise_share": -0.1}, "small_noise_share must lie in"),
        ({"weight": torch.zeros(3)}, "weight is 0 at every position"),
        ({"noise": lambda t: (-t, t)}, "sigma is a total noise and must be >= 0"),
        ({"score": lambda x, s: torch.full((3, 2, 5), math.nan)}, "log_score is NaN"),
    ],
)
def test_bad_input_of_the_bound_is_named(change, message, absorbing, log_linear):
    arguments = {"score": lambda x, s: torch.zeros(3, 2, 5), "noise": log_linear, "x0": X0, "num_times": 2} | change
    score, noise, x0 = (arguments.pop(name) for name in ("score", "noise", "x0"))
    with pytest.raises(ValueError, match=message):
        snapshot_bound(score, absorbing, noise, x0, **arguments)
