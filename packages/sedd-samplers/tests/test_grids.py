"""Grids by noise level, and the grid that a pilot run chooses."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from sedd_samplers import TauLeaping, adaptive_grid, mask_probability, noise_grid, trajectory, uniform_grid
from sedd_samplers.grids import warn_of_text_left


class Geometric:
    def __call__(self, t):
        sigma = 1e-3 ** (1 - t) * 20.0**t
        return sigma, sigma * math.log(20.0 / 1e-3)


class Cosine:
    """Mask probability sin^2(pi t / 2): infinite noise at t = 1."""

    def __call__(self, t):
        return -2 * torch.log(torch.cos(math.pi / 2 * t)), math.pi * torch.tan(math.pi / 2 * t)


class Endless:
    """Mask probability t."""

    def __call__(self, t):
        return -torch.log1p(-t), 1 / (1 - t)


LEVELS = {"sigma": lambda sigma: sigma, "log": torch.log, "root": torch.sqrt, "mask probability": mask_probability}


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("schedule", ["linear", "log-linear", "geometric"])
@pytest.mark.parametrize("steps", [1, 2, 17])
def test_steps_are_equally_long_in_the_level(ref, schedule, level, steps):
    noise = {"linear": ref.Linear(4.0), "log-linear": ref.LogLinear(), "geometric": Geometric()}[schedule]
    times = noise_grid(noise, steps, level, t_min=0.01)
    assert times.dtype == torch.float64
    assert times.shape == (steps + 1,)
    assert times[[0, -1]].tolist() == [1.0, 0.01]
    lengths = -level(noise(times)[0]).diff()
    torch.testing.assert_close(lengths, lengths.mean().expand(steps), rtol=1e-9, atol=1e-9)


def test_known_grids(ref):
    """Equal steps in time are equal steps in sigma when it is linear, in mask probability when it is log-linear."""
    torch.testing.assert_close(noise_grid(ref.Linear(3.0), 7, lambda sigma: sigma), uniform_grid(7))
    torch.testing.assert_close(noise_grid(ref.LogLinear(), 7), uniform_grid(7))
    torch.testing.assert_close(noise_grid(Geometric(), 7, torch.log), uniform_grid(7))
    # infinite noise at t = 1 is mask probability 1; equal steps of it are the times of the inverse
    times = noise_grid(Cosine(), 4, t_min=0.0)
    torch.testing.assert_close(
        times, 2 / math.pi * torch.asin(torch.linspace(1, 0, 5).double().sqrt()), atol=1e-7, rtol=0
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"steps": 0}, "steps must be a positive integer"),
        ({"t_min": 1.0}, "t_min must lie in"),
        ({"level": torch.log, "t_min": 0.0}, "it is -inf at t = 0"),
        ({"noise": Endless(), "level": lambda sigma: sigma}, "inf at t = 1"),
        ({"level": torch.neg}, "rise with sigma"),
    ],
)
def test_levels_that_make_no_grid_are_refused(ref, change, told):
    with pytest.raises(ValueError, match=told):
        noise_grid(**{"noise": ref.Linear(2.0), "steps": 4, **change})


def pilot(ref, target, *, t_min=1e-3, **options):
    graph = ref.StructuredAbsorbing(3)
    score = ref.SpectralScore(ref.random_data(3, 3, 4, 3), graph.Q)
    x = torch.zeros(400, 3, dtype=torch.int64)
    options = {"x": x, "given": x > 0, **options}
    return adaptive_grid(score, graph, ref.LogLinear(), target=target, t_min=t_min, **options)


def test_a_quarter_of_the_target_takes_twice_the_steps(ref):
    """The error of a step grows like its square."""
    few, many = pilot(ref, 0.02), pilot(ref, 0.005)
    for times in (few, many):
        assert times.dtype == torch.float64
        assert times[[0, -1]].tolist() == [1.0, 1e-3]
        assert (times.diff() < 0).all()
    assert (len(many) - 1) / (len(few) - 1) == pytest.approx(2, abs=0.3)


def test_the_error_of_a_step_is_what_it_is_said_to_be(ref):
    """One position that comes to light at the rate 1 / t: the error in closed form, at most the target and near it."""
    graph = ref.StructuredAbsorbing(3)
    score = ref.SpectralScore(ref.random_data(3, 1, 4, 3), graph.Q)
    x = torch.zeros(20_000, 1, dtype=torch.int64)
    times = adaptive_grid(score, graph, ref.LogLinear(1e-9), x=x, given=x > 0, target=0.002, t_min=0.2)
    t, s = times[:-1], times[1:]
    still = torch.exp(-(t - s) / t)
    masked = torch.cat([torch.ones(1), still.cumprod(0)[:-1]])  # by tau-leaping up to here
    error = masked * still * (t - s) / 2 * (1 / s - 1 / t)
    settled = error[2:-1] / 0.002
    assert len(settled) > 5
    assert settled.max() < 1.05
    assert settled.min() > 0.7


def test_the_pilot_alone_decides_the_grid(ref):
    assert torch.equal(pilot(ref, 0.02), pilot(ref, 0.02))
    assert not torch.equal(pilot(ref, 0.02), pilot(ref, 0.02, seed=1000))


def test_the_adaptive_grid_beats_the_uniform_one(ref):
    """Tau-leaping where rates grow like 1 / t: the law of the chain, by enumeration, with equally many steps."""
    graph, noise = ref.StructuredAbsorbing(3), ref.LogLinear()
    score = ref.SpectralScore(ref.random_data(3, 3, 4, 3), graph.Q)
    times = pilot(ref, 0.01)
    begin, true = score.marginal(noise(times[[0, -1]])[0]).flatten(1)
    adaptive, uniform = (
        float((ref.law_of_chain(score, graph, noise, TauLeaping(), grid, begin) - true).abs().sum()) / 2
        for grid in (times, uniform_grid(len(times) - 1, 1e-3))
    )
    assert adaptive < uniform / 2


def test_the_error_of_all_steps_bounds_the_law(ref):
    """The sum of the targets, to leading order."""
    graph, noise = ref.StructuredAbsorbing(3), ref.LogLinear()
    score = ref.SpectralScore(ref.random_data(3, 3, 4, 3), graph.Q)
    for target in (0.02, 0.005):
        times = pilot(ref, target)
        begin, true = score.marginal(noise(times[[0, -1]])[0]).flatten(1)
        law = ref.law_of_chain(score, graph, noise, TauLeaping(), times, begin)
        assert float((law - true).abs().sum()) / 2 < target * (len(times) - 1)


def test_nothing_to_sample_takes_no_care(ref):
    """With every position given there is no error, and steps grow to the end."""
    x = torch.zeros(2, 3, dtype=torch.int64)
    times = pilot(ref, 0.01, x=x, given=x == 0)
    assert len(times) < 10


def test_a_sample_on_the_grid(ref):
    times = pilot(ref, 0.05)
    graph = ref.StructuredAbsorbing(3)
    score = ref.SpectralScore(ref.random_data(3, 3, 4, 3), graph.Q)
    x = torch.zeros(4, 3, dtype=torch.int64)
    states = trajectory(score, graph, ref.LogLinear(), x=x, given=x > 0, times=times, method=TauLeaping())
    assert [state.t for state in states] == [*times.tolist(), 0.0]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"target": 0.0}, "target must be finite and positive, got 0.0"),
        ({"target": math.nan}, "target must be finite and positive"),
        ({"t_min": 0.0}, r"t_min must lie in \(0, 1\), got 0.0"),
        ({"most": 0}, "most must be a positive integer, got 0"),
        ({"most": 3}, "3 steps only lead to t = "),
        ({"x": torch.zeros(2, 3), "given": torch.zeros(2, 3).bool()}, "x must be int64"),
        ({"x": torch.full((2, 3), 3), "given": torch.ones(2, 3).bool()}, "the mask"),
    ],
)
def test_pilots_that_make_no_sense_are_refused(ref, change, told):
    with pytest.raises(ValueError, match=told):
        pilot(ref, **{"target": 0.01, **change})


def test_steps_without_error_are_doubled_from_a_sixteenth(ref):
    x = torch.zeros(2, 3, dtype=torch.int64)
    for t_min in (0.001, 0.2):
        length = (1 - t_min) / 16
        expected = [1.0, *(1 - k * length for k in (1, 3, 7, 15)), t_min]
        assert pilot(ref, 0.01, t_min=t_min, x=x, given=x == 0).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_a_pilot_s_steps_grow_and_shrink_within_bounds_and_leave_no_crumb(ref, seed):
    """At most twice the length of the one before, and the last no tenth of what was wanted."""
    lengths = -pilot(ref, 0.01, seed=seed).diff()
    assert (lengths[1:] / lengths[:-1]).max() < 2.0 + 1e-9
    assert lengths[-1] > lengths[-2] / 30
    assert lengths[0] <= (1 - 1e-3) / 16 + 1e-12


@pytest.mark.parametrize(("left", "warned"), [(0.049, False), (0.051, True)])
@pytest.mark.parametrize("name", ["absorbing", "uniform", "slow last state"])
def test_a_twentieth_of_a_token_may_be_left(ref, name, left, warned):
    """Of the first and of the last token, whichever has more: e^-sigma of a masked one, 3/4 of it among four."""
    graph = {"absorbing": ref.StructuredAbsorbing(4, 0), "uniform": ref.StructuredUniform(4)}.get(name)
    share = 0.75 if name == "uniform" else 1.0
    if graph is None:
        Q = ref.StructuredAbsorbing(3, 1).Q.clone()
        Q[:, 0] *= 9
        graph = ref.MatrixGraph(Q, 1)
    level = math.log(share / left)
    noise = lambda t: (level * t, torch.full_like(t, level))  # noqa: E731
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warn_of_text_left(graph, noise, torch.tensor(1.0, dtype=torch.float64))
    assert [f"{left:.0%} is left of a token" in str(each.message) for each in seen] == [True] * warned
