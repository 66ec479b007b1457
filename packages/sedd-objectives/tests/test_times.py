"""Times are uniform one by one, spread together, and leave less variance the better they are spread."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from sedd_objectives import ImportanceTimes, denoising_loss, low_discrepancy_times, stratified_times, uniform_times
from sedd_objectives.times import NoiseTimes, of_time

times_module = importlib.import_module("sedd_objectives.times")
SAMPLERS = [uniform_times, stratified_times, low_discrepancy_times]


def draws(sampler, size, runs=4000):
    generator = torch.Generator().manual_seed(0)
    return torch.stack([sampler(size, generator=generator, t_min=0.1) for _ in range(runs)])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_single_time_is_uniform(sampler):
    """Kolmogorov-Smirnov at 4000 draws: 1.95 / sqrt(n) is exceeded once in a thousand."""
    t = draws(sampler, 4)
    assert ((t >= 0.1) & (t < 1)).all()
    for b in range(4):
        ordered = (t[:, b].sort().values - 0.1) / 0.9
        distance = (ordered - torch.arange(len(ordered)) / len(ordered)).abs().max()
        assert distance < 1.95 / len(ordered) ** 0.5 + 1 / len(ordered)


@pytest.mark.parametrize("sampler", [stratified_times, low_discrepancy_times])
def test_one_time_in_each_stratum(sampler):
    t = draws(sampler, 8, runs=200).sort(-1).values
    if sampler is low_discrepancy_times:
        torch.testing.assert_close(t.diff(dim=-1), torch.full((200, 7), 0.9 / 8), rtol=0, atol=1e-6)
    else:
        assert torch.equal(((t - 0.1) / 0.9 * 8).floor().clamp(0, 7), torch.arange(8.0).expand(200, -1))


def test_the_variance_that_is_left():
    """Of a batch mean of f(t) = t^2, against what theory leaves; 4000 means know it to 2.2 %, 10 % are allowed."""
    batch, width = 16, 0.9
    mean_square = (1 - 0.1**3) / (3 * width)  # E t^2, and E t^4 below
    expected = {
        uniform_times: ((1 - 0.1**5) / (5 * width) - mean_square**2) / batch,
        stratified_times: 4 * mean_square * (width / batch) ** 2 / 12 / batch,  # E f'^2 times a stratum's variance
        low_discrepancy_times: (1 - 0.1**2) ** 2 / (12 * batch**2),  # the jump from f(1) to f(t_min) that wraps around
    }
    for sampler, variance in expected.items():
        left = float((draws(sampler, batch) ** 2).mean(-1).var())
        assert left == pytest.approx(variance, rel=0.1), sampler.__name__


def trained(profile, batches=300, **how):
    """Importance sampling that has seen f(t) = profile(t) for so many batches."""
    times, generator = ImportanceTimes(**how), torch.Generator().manual_seed(1)
    for _ in range(batches):
        t, _ = times.draw(32, generator=generator)
        times.update(t, profile(t))
    return times


def test_importance_sampling_is_unbiased_and_follows_the_profile():
    """4000 batches of 8: the mean of t^2 within 4 of its standard errors (a false alarm in 16,000)."""
    times, generator = trained(lambda t: 1 / t, num_bins=16, t_min=0.1), torch.Generator().manual_seed(0)
    drawn = [times.draw(8, generator=generator) for _ in range(4000)]
    t, weight = (torch.stack(part).double() for part in zip(*drawn, strict=True))
    assert ((t >= 0.1) & (t < 1)).all()
    assert weight.max() <= 10
    means = (weight * t**2).mean(-1)
    assert abs(means.mean() - (1 - 0.1**3) / 2.7) < 4 * means.std() / 4000**0.5
    edges = torch.linspace(0.1, 1, 17, dtype=torch.float64)
    expected = (1 / edges[:-1] - 1 / edges[1:]).div(edges.diff()).sqrt()  # the root of the mean of 1 / t^2 in a bin
    torch.testing.assert_close(times.probability(), 0.9 * expected / expected.sum() + 0.1 / 16, rtol=0.03, atol=0)


def test_importance_sampling_begins_uniformly_and_ignores_what_is_not_finite():
    times = ImportanceTimes(4, t_min=0.0)
    t, weight = times.draw(64, generator=torch.Generator().manual_seed(0))
    assert (weight == 1).all()
    assert torch.equal((t * 64).floor().sort().values, torch.arange(64.0))
    times.update(torch.tensor([0.1, 0.2, 0.6]), torch.tensor([1.0, float("nan"), 3.0]))
    torch.testing.assert_close(times.probability(), 0.9 * torch.tensor([1, 2, 3, 2]).double() / 8 + 0.1 / 4)


def test_importance_sampling_forgets_at_its_rate():
    times = ImportanceTimes(2, decay=0.5, t_min=0.0)
    for loss in (4.0, 2.0):
        times.update(torch.tensor([0.1, 0.6]), torch.tensor([loss, 1.0]))
    assert times.square.tolist() == [0.5 * 16 + 4, 1.5]
    assert times.count.tolist() == [1.5, 1.5]


def test_importance_sampling_goes_on_where_it_was():
    one = trained(lambda t: t, batches=5)
    other = ImportanceTimes()
    other.load_state_dict(one.state_dict())
    draws = [times.draw(16, generator=torch.Generator().manual_seed(3)) for times in (one, other)]
    assert torch.equal(draws[0][0], draws[1][0])
    assert torch.equal(draws[0][1], draws[1][1])
    one.update(*draws[0])
    assert not torch.equal(one.square, other.square)


def test_bad_input_of_importance_sampling():
    for change, message in (
        ({"num_bins": 0}, "num_bins must be at least 1, got 0"),
        ({"decay": 1.5}, "decay must lie in"),
        ({"uniform_share": 0.0}, "uniform_share must lie in"),
        ({"t_min": 1.0}, "t_min must lie in"),
    ):
        with pytest.raises(ValueError, match=message):
            ImportanceTimes(**change)
    times = ImportanceTimes(4)
    with pytest.raises(ValueError, match="t and loss must be of one shape"):
        times.update(torch.rand(3), torch.rand(2))
    with pytest.raises(ValueError, match="t must lie in"):
        times.update(torch.tensor([1.5]), torch.ones(1))
    with pytest.raises(ValueError, match="state must have 4 bins, got 16"):
        times.load_state_dict(ImportanceTimes().state_dict())


def text_loss(graph, noise):
    """(t, generator) -> the diffusion loss (B,) of 16 characters of this package's README.

    The model is the best one that takes characters to be independent: the exact score of their frequencies.
    """
    text = (Path(__file__).parents[1] / "README.md").read_bytes()
    ids = torch.tensor(list(text)) % 128
    frequency = torch.bincount(ids, minlength=128).double() / len(ids)

    def score(x, sigma):
        clean = torch.cat([frequency, frequency.new_zeros(graph.num_states - 128)])
        log_p = graph.propagate(clean.expand(len(x), -1), sigma.double()).log()
        return (log_p[:, None] - log_p.gather(-1, x)[..., None]).float()

    def loss(t, generator):
        start = torch.randint(len(ids) - 16, (len(t), 1), generator=generator)
        x0 = ids[start + torch.arange(16)]
        return denoising_loss(score, graph, noise, x0, t, generator=generator)

    return loss


def test_the_variance_left_on_text(hybrid_graph, geometric):
    """Of the mean over a batch of 16, from 300 batches, which know a variance to some 10 %; a seed is fixed."""
    graph, noise = hybrid_graph(128, 1.0, 0.0), geometric
    loss, generator = text_loss(graph, noise), torch.Generator().manual_seed(0)
    importance = ImportanceTimes()
    for _ in range(100):
        t, _ = importance.draw(16, generator=generator)
        importance.update(t, loss(t, generator))
    variance = {}
    samplers: list[Any] = [*SAMPLERS, importance.draw]
    for sampler in samplers:
        means = []
        for _ in range(300):
            drawn = sampler(16, generator=generator)
            t, weight = drawn if isinstance(drawn, tuple) else (drawn, 1)
            means.append((weight * loss(t, generator)).mean())
        variance[sampler.__name__] = float(torch.stack(means).var())
    ratios = {name: round(value / variance["uniform_times"], 2) for name, value in variance.items()}
    assert ratios["stratified_times"] < 1
    assert ratios["draw"] < 0.9


@pytest.mark.parametrize("seed", range(5))
def test_importance_sampling_leaves_less_variance_where_large_losses_are_rare(seed):
    """An absorbing graph whose masks come with probability t: the loss of L positions is 1/t times the masked ones'.

    With surprises c of mean 1 and mean square m, E f(t)^2 = (L t m + L (L - 1) t^2) / t^2 in closed form, so that the
    variance under any density is an integral and no rare draw is missed. After 300 batches of 16.
    """
    length, square, t_min, bins = 16, 1.4, 1e-3, 16
    generator = torch.Generator().manual_seed(seed)

    def loss(t):
        masked = torch.rand(len(t), length, generator=generator) < t[:, None]
        surprise = 1 + (square - 1) ** 0.5 * (2 * torch.randint(2, masked.shape, generator=generator) - 1)
        return (masked * surprise).sum(-1) / t

    times = ImportanceTimes(bins, t_min=t_min)
    for _ in range(300):
        t, _ = times.draw(16, generator=generator)
        times.update(t, loss(t))
    t = torch.logspace(-3, 0, 100_001, dtype=torch.float64)
    density = times.probability()[((t - t_min) / (1 - t_min) * bins).long().clamp(0, bins - 1)] * bins
    second_moment = length * square / t + length * (length - 1)

    def variance(density):
        return torch.trapezoid(second_moment / density, t) / (1 - t_min) - length**2

    assert variance(density) < 0.97 * variance(torch.ones_like(t))


def test_times_by_noise_are_unbiased_and_even_in_the_logarithm(log_linear):
    """100,000 stratified quantiles leave an error of 1e-5 of the largest slope; f(t) = t^2 and a step at small t."""
    times = NoiseTimes(log_linear, 0.5, t_min=1e-4)
    unit = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    t, weight = times.at(unit)
    assert ((t >= 1e-4) & (t < 1)).all()
    assert weight.max() <= 2 + 1e-9
    assert float((weight * t**2).mean()) == pytest.approx((1 - 1e-12) / (3 * (1 - 1e-4)), rel=1e-4)
    assert float((weight * (t < 1e-3)).mean()) == pytest.approx(9e-4 / (1 - 1e-4), rel=1e-3)
    depth = [float(torch.log(-torch.expm1(-log_linear(torch.tensor(s))[0]))) for s in (1e-4, 1e-3, 1.0)]
    share = 0.5 * (depth[1] - depth[0]) / (depth[2] - depth[0]) + 0.5 * 9e-4
    assert float((t < 1e-3).double().mean()) == pytest.approx(share, rel=1e-3)
    coarse = NoiseTimes(log_linear, 0.5, t_min=0.3)
    t, weight = coarse.at(unit)
    assert float(weight.mean()) == pytest.approx(1, rel=1e-6)
    assert float((weight * t**2).mean()) == pytest.approx((1 - 0.3**3) / (3 * 0.7), rel=1e-4)
    assert torch.equal(NoiseTimes(log_linear, 0.0, t_min=1e-4).at(unit)[1], torch.ones_like(unit))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_bad_input(sampler):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        sampler(0)
    with pytest.raises(ValueError, match=r"t_min must lie in \[0, 1\), got 1.0"):
        sampler(4, t_min=1.0)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
def test_times_have_the_digits_of_float32_at_least(sampler, default):
    torch.set_default_dtype(default)
    try:
        t = sampler(1000, generator=torch.Generator().manual_seed(0))
    finally:
        torch.set_default_dtype(torch.float32)
    assert t.dtype == (torch.float64 if default == torch.float64 else torch.float32)
    assert len(t.unique()) == 1000
    assert (t < 1).all()


def test_a_generator_draws_on_its_own_device():
    class Elsewhere:
        device = torch.device("meta")

    assert times_module._device(Elsewhere(), None) == torch.device("meta")
    assert times_module._device(Elsewhere(), "cpu") == "cpu"
    assert times_module._device(None, None) is None


def test_a_network_of_time_is_told_the_time_and_the_nearest_end_beyond_the_schedule(log_linear):
    """Sigma 0 and infinity included; a schedule refuses what lies beyond its ends."""

    class Schedule:
        def __call__(self, t):
            return log_linear(t)

        def inverse(self, sigma):
            assert (sigma <= log_linear(torch.ones(()))[0] * (1 + 1e-6)).all(), sigma
            return -torch.expm1(-sigma) / 0.999

    told = []

    def network(x, t):
        told.append(t)
        return torch.zeros(*x.shape, 6)

    with pytest.raises(ValueError, match="must be a schedule with an inverse, got a function: is the order right"):
        of_time(Schedule(), network)  # type: ignore[arg-type]
    model, x = of_time(network, Schedule()), torch.zeros(3, 4, dtype=torch.int64)
    t = torch.tensor([0.001, 0.25, 0.9])
    assert model(x, log_linear(t)[0]).shape == (3, 4, 6)
    torch.testing.assert_close(told[0], t, rtol=1e-4, atol=1e-6)
    model(x, torch.tensor([0.0, 7.5, torch.inf]))
    torch.testing.assert_close(told[1], torch.tensor([0.0, 1.0, 1.0]))
    assert ((told[1] >= 0) & (told[1] <= 1)).all()


def test_no_time_is_one():
    """The greatest uniform number of either precision is put below 1, where some schedules are infinite."""
    for dtype in (torch.float32, torch.float64):
        unit = torch.tensor([0.0, 0.5, 1.0], dtype=dtype)
        t = times_module._onto_interval(unit, 0.1)
        assert t[:2].tolist() == pytest.approx([0.1, 0.55])
        assert 1 - torch.finfo(dtype).eps <= t[2] < 1
        by_noise = NoiseTimes(lambda t: (5 * t, torch.full_like(t, 5.0)), 0.5, t_min=0.1).at(unit[2:])[0]
        assert by_noise.dtype == dtype
        assert 1 - torch.finfo(dtype).eps <= by_noise[0] < 1


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_times_by_noise_have_the_mixed_density(share):
    """Under sigma = 5 t: P(t < s) = share log-part + (1 - share) uniform part, at three times; weights its inverse."""
    times = NoiseTimes(lambda t: (5 * t, torch.full_like(t, 5.0)), share, t_min=0.01)
    unit = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    t, weight = times.at(unit)
    depth = [math.log(-math.expm1(-5 * s)) for s in (0.01, 1.0)]
    for s in (0.03, 0.2, 0.7):
        due = (
            share * (math.log(-math.expm1(-5 * s)) - depth[0]) / (depth[1] - depth[0]) + (1 - share) * (s - 0.01) / 0.99
        )
        assert float((t < s).double().mean()) == pytest.approx(due, abs=2e-3)
        slope = 5 / math.expm1(5 * s) / (depth[1] - depth[0])
        at = int((t - s).abs().argmin())
        assert float(weight[at]) == pytest.approx(1 / (share * slope * 0.99 + 1 - share), rel=0.02)


def test_importance_sampling_unless_told_otherwise():
    times = ImportanceTimes()
    assert (len(times.square), times.decay, times.uniform_share, times.t_min) == (16, 0.99, 0.1, 1e-3)
    assert times.square.dtype == times.count.dtype == torch.float64
    times.update(torch.tensor([1e-3, 1.0]), torch.tensor([2.0, 3.0]))  # both ends are times
    assert times.square[[0, -1]].tolist() == [4.0, 9.0]
    with pytest.raises(ValueError, match="t must lie in"):
        times.update(torch.tensor([0.0]), torch.ones(1))
    state = times.state_dict()
    state["square"].zero_()
    assert times.square[0] == 4


def five(t):
    return 5 * t, torch.full_like(t, 5.0)


def test_the_density_of_times_by_noise_is_that_of_their_quantiles():
    """At times of any shape, the ends included; its mean is 1, and a time's weight is its inverse."""
    times = NoiseTimes(five, 0.5, t_min=0.01)
    unit = ((torch.arange(2000, dtype=torch.float64) + 0.5) / 2000).view(40, 50)
    t, weight = times.at(unit)
    torch.testing.assert_close(times.density(t), 1 / weight, rtol=1e-9, atol=0)
    even = 0.01 + 0.99 * (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    assert float(times.density(even).mean()) == pytest.approx(1, rel=1e-4)
    ends = times.density(torch.tensor([0.01, 1.0]))
    assert ends.dtype == torch.float64
    assert ends[0] > 10 > 1 > ends[1] > 0.5
    assert float(NoiseTimes(five, 0.0, t_min=0.01).density(t).sub(1).abs().max()) < 1e-9


def test_quantiles_at_the_ends_are_the_ends():
    times = NoiseTimes(five, 0.5, t_min=0.01)
    for dtype in (torch.float32, torch.float64):
        t, weight = times.at(torch.tensor([0.0, 1.0], dtype=dtype))
        assert t.dtype == dtype
        assert t.tolist() == pytest.approx([0.01, 1.0])
        assert weight.dtype == torch.float64
    unit = torch.tensor([0.0, 0.25], dtype=torch.float32)
    t, weight = NoiseTimes(five, 0.0, t_min=0.2).at(unit)
    assert t.tolist() == pytest.approx([0.2, 0.4])
    assert weight.dtype == t.dtype == torch.float32
    assert times.knots[0] == 0.01
    assert times.knots[-1] == 1
    assert len(times.knots) > 500


def test_a_schedule_that_learns_draws_times_without_its_gradient():
    rate = torch.tensor(5.0, requires_grad=True)
    t, weight = NoiseTimes(lambda t: (rate * t, rate.expand(t.shape)), 0.5, t_min=0.01).at(torch.rand(4))
    assert not t.requires_grad
    assert not weight.requires_grad


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_batch_of_any_size_from_t_min_zero_on_its_own_generator(sampler):
    """The same seed, the same times, whatever the global one; one sequence's time is anywhere."""
    one, other = (sampler(7, generator=torch.Generator().manual_seed(5), t_min=0.0) for _ in range(2))
    assert torch.equal(one, other)
    assert one.shape == (7,)
    assert sampler(1).shape == (1,)
    state = torch.get_rng_state()
    sampler(3, generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)
    assert sampler(2, device="meta").device.type == "meta"
    assert sampler(1, t_min=0.0, generator=torch.Generator().manual_seed(0)) < 1
    least = min(float(sampler(1, t_min=0.7).min()) for _ in range(50))
    assert 0.7 <= least < 0.8


def test_low_discrepancy_times_are_in_order_but_for_one_step(generator):
    t = low_discrepancy_times(5, generator=generator, t_min=0.0)
    assert int((t.diff() < 0).sum()) <= 1
    assert not torch.equal(t, t.sort().values) or float(t[0]) < 0.2


def test_importance_sampling_draws_by_the_given_profile():
    """Probabilities 0.9 q + 0.1 / 4 of q = (1, 2, 0, 1) / 4: 1,000 stratified draws come as often, with 1 / (4 p)."""
    times = ImportanceTimes(4, t_min=0.2)
    times.square, times.count = torch.tensor([1.0, 4, 0, 1]).double() * 3, torch.full((4,), 3.0).double()
    p = 0.9 * torch.tensor([1.0, 2, 0, 1]).double() / 4 + 0.025
    torch.testing.assert_close(times.probability(), p)
    t, weight = times.draw(1000, generator=torch.Generator().manual_seed(0))
    assert t.dtype == weight.dtype == torch.float32
    k = ((t.double() - 0.2) / 0.8 * 4).long().clamp(0, 3)
    assert (torch.bincount(k, minlength=4) - 1000 * p).abs().max() < 2
    torch.testing.assert_close(weight.double(), 1 / (4 * p[k]), rtol=1e-6, atol=0)
    for bin in range(4):
        within = (t[k == bin].double() - 0.2) / 0.8 * 4 - bin
        assert float(within.mean()) == pytest.approx(0.5, abs=0.05)  # evenly within a bin
    assert not torch.equal(t, t.sort().values)


def test_importance_sampling_takes_in_losses_by_their_bins():
    times = ImportanceTimes(2, decay=0.25, t_min=0.5)
    times.update(torch.tensor([0.5, 0.74, 0.75, 0.99, 0.6]), torch.tensor([1.0, 2.0, 3.0, 4.0, math.inf]))
    assert times.square.tolist() == [5.0, 25.0]
    assert times.count.tolist() == [2.0, 2.0]
    times.update(torch.zeros(0), torch.zeros(0))
    assert times.square.tolist() == [1.25, 6.25]
    with pytest.raises(ValueError, match=r"t must lie in \[0.5, 1\], got times in \[0.4\d*, 0.4\d*\]"):
        times.update(torch.tensor([0.49]), torch.ones(1))
    with pytest.raises(ValueError, match=r"of one shape \(B,\), got \(2, 1\) and \(2, 1\)"):
        times.update(torch.ones(2, 1), torch.ones(2, 1))
    state = {name: value.float() for name, value in times.state_dict().items()}
    times.load_state_dict(state)
    assert times.square.dtype == torch.float64
    state["square"].zero_()
    assert times.square.tolist() == [1.25, 6.25]
    with pytest.raises(ValueError, match="state must have 2 bins, got 3"):
        times.load_state_dict({"square": torch.zeros(2), "count": torch.zeros(3)})
    with pytest.raises(ValueError, match="state must have 2 bins"):
        times.load_state_dict({"square": torch.zeros(3), "count": torch.zeros(2)})


@pytest.mark.parametrize(
    "edge", [{"decay": 0.0}, {"decay": 1.0}, {"uniform_share": 1.0}, {"num_bins": 1}, {"t_min": 0}]
)
def test_importance_sampling_at_the_edges_of_its_numbers(edge):
    times = ImportanceTimes(**edge)
    times.update(torch.tensor([0.2, 0.9]), torch.tensor([1.0, 5.0]))
    p = times.probability()
    assert float(p.sum()) == pytest.approx(1)
    if "uniform_share" in edge:
        assert p.tolist() == pytest.approx([1 / 16] * 16)
    beyond: list[dict[str, Any]] = [{"decay": -0.01}, {"uniform_share": 1.01}, {"t_min": -0.01}]
    for wrong in beyond:
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must lie in"):
            ImportanceTimes(**wrong)


def test_losses_of_zero_alone_leave_the_draws_uniform():
    times = ImportanceTimes(4)
    times.update(torch.tensor([0.1, 0.9]), torch.zeros(2))
    assert times.probability().tolist() == [0.25] * 4
