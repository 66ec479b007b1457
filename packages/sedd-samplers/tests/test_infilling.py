"""Given tokens where tokens are noised: the conditional law by particles, and plain clamping told for what it is."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from sedd_samplers import (
    Ancestral,
    ConfidenceUnmasking,
    EntropyBoundRenoising,
    Euler,
    FirstHitting,
    LeaveOneOut,
    Method,
    Particles,
    PredictorCorrector,
    Psi,
    Remasking,
    TauLeaping,
    Trapezoidal,
    Tweedie,
    Uniformization,
    Unmasking,
    at_rate,
    capped,
    clamped,
    infill,
    noise_grid,
    sample,
    trajectory,
    uniform_grid,
)
from sedd_samplers.grids import finite_start

GRAPHS = {
    "uniform": lambda ref: ref.uniform_matrix(4),
    "hybrid": lambda ref: ref.hybrid_matrix(4),
    "clustered": lambda ref: ref.clustered_matrix((0, 0, 1, 1)),
    "ordinal": lambda ref: ref.ordinal_matrix(4),
    "absorbing": lambda ref: ref.absorbing_matrix(4),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def population(ref, graph, p0, given, tokens, *, sequences, steps, count=64, rate=8.0):
    """The weighted law of all particles of all sequences, over the states of all positions."""
    noise = ref.Linear(rate)
    times = noise_grid(noise, steps, t_min=2e-4)
    ends = [*itertools.pairwise(times), (times[-1], torch.zeros((), dtype=torch.float64))]
    x = torch.tensor(tokens).expand(sequences, -1)
    mask = torch.tensor(given).expand(sequences, -1)
    *_, (states, weight) = Particles(count).population(
        ref.ExactScore(p0, graph.Q), graph, noise, x=x, given=mask, seeds=torch.arange(sequences), ends=ends,
        method=Tweedie(), denoise=True,
    )  # fmt: skip
    N, L = p0.shape[0], p0.ndim
    cell = (states * N ** torch.arange(L - 1, -1, -1)).sum(-1)
    law = torch.zeros(N**L, dtype=torch.float64)
    return law.index_add_(0, cell.flatten(), weight.exp().flatten() / sequences).view(p0.shape)


def conditional(p0, given, tokens):
    index = tuple(token if held else slice(None) for token, held in zip(tokens, given, strict=True))
    law = torch.zeros_like(p0)
    law[index] = p0[index]
    return law / law.sum()


def law_of_steps(ref, graph, p0, given, tokens, steps, rate=8.0):
    """What the particles' law tends to as they grow in number: that of the same steps given the tokens, enumerated."""
    noise, prior = ref.Linear(rate), graph.prior(torch.tensor(torch.inf)).value
    start = prior
    for _ in given[1:]:
        start = (start[:, None] * prior).flatten()
    times = noise_grid(noise, steps, t_min=2e-4)
    law = ref.law_of_chain(ref.ExactScore(p0, graph.Q), graph, noise, Tweedie(), times, start, denoise=True)
    return conditional(law.view(p0.shape), given, tokens)


def variation(p, q):
    return float((p - q).abs().sum()) / 2


def problem(ref, name, given, concentration):
    """A graph and a law of tokens that depend on each other, the more so the more concentrated it is."""
    graph = GRAPHS[name](ref)
    return graph, ref.random_data(4, len(given), graph.num_states, graph.mask_id, concentration=concentration)


@pytest.mark.parametrize("name", GRAPHS)
def test_particles_have_the_conditional_law_under_every_graph(ref, name):
    """Two positions, one given, 64 steps: total variation at most .04.

    The steps' part is .006 to .015 by enumeration; the rest is the number of particles and of runs.
    """
    given, tokens = [True, False], [3, 0]
    graph, p0 = problem(ref, name, given, 1.0)
    got = population(ref, graph, p0, given, tokens, sequences=50, steps=64)
    assert variation(got, conditional(p0, given, tokens)) < 0.04


@pytest.mark.parametrize("name", ["uniform", "ordinal"])
def test_a_start_that_has_not_forgotten_its_tokens_is_weighed(ref, name):
    """A schedule that ends at sigma = .8, where the prior is not the law of the noised tokens: the steps' law again.

    .004 and .003; without the weights of the start .018 and .023.
    """
    given, tokens = [True, False], [3, 0]
    graph, p0 = problem(ref, name, given, 1.5)
    limit = law_of_steps(ref, graph, p0, given, tokens, 4, rate=0.8)
    got = population(ref, graph, p0, given, tokens, sequences=120, steps=4, count=128, rate=0.8)
    assert variation(got, limit) < 0.01


TWO_GIVEN = ("uniform", [True, False, True], [1, 0, 2])
PROBLEMS = [*((name, [True, False], [3, 0]) for name in GRAPHS), TWO_GIVEN]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "given", "tokens"), PROBLEMS)
def test_the_error_of_the_steps_falls_with_their_number(ref, name, given, tokens):
    """Without sampling: first order, and below .01 at 256 steps for every graph.

    One token given, 64 and 256 steps: uniform .0121 and .0030, hybrid .0088 and .0022, clustered .0213 and .0053,
    ordinal .0188 and .0046, absorbing .0080 and .0019.
    """
    graph, p0 = problem(ref, name, given, 1.5)
    wanted = conditional(p0, given, tokens)
    error = [variation(law_of_steps(ref, graph, p0, given, tokens, steps), wanted) for steps in (64, 128, 256)]
    assert all(0.4 < less / more < 0.6 for more, less in itertools.pairwise(error))
    assert error[-1] < 0.01


@pytest.mark.slow
@pytest.mark.parametrize(("name", "given", "tokens"), PROBLEMS)
def test_particles_are_within_a_hundredth_of_the_conditional_law(ref, name, given, tokens):
    """256 particles, 256 steps, the law measured over 41,000 particles, whose noise is about .003 of the distance.

    One token given: uniform .0063, hybrid .0046, clustered .0084, ordinal .0047. Under masks 41,000 particles give
    .0100, with .0035 of noise; 123,000 give .0068, with .0020.
    """
    graph, p0 = problem(ref, name, given, 1.5)
    sequences = 480 if name == "absorbing" else 160
    got = population(ref, graph, p0, given, tokens, sequences=sequences, steps=256, count=256)
    assert variation(got, conditional(p0, given, tokens)) < 0.01


@pytest.mark.slow
def test_the_error_of_the_particles_falls_with_their_number(ref):
    """From the law of the same 64 steps, clustered: .024 for 16 particles, .005 for 256, over 51,000 and 102,000."""
    given, tokens = [True, False], [3, 0]
    graph, p0 = problem(ref, "clustered", given, 1.5)
    limit = law_of_steps(ref, graph, p0, given, tokens, 64)
    error = {}
    for count, sequences in ((16, 3200), (256, 400)):
        got = population(ref, graph, p0, given, tokens, sequences=sequences, steps=64, count=count)
        error[count] = variation(got, limit)
    assert error[256] < 0.01
    assert 3 * error[256] < error[16]


def test_particles_that_are_drawn_anew_weigh_what_their_parents_outlook_leaves():
    """Shares .7, .1, .1, .1 at the teeth .125, .375, .625, .875; equal shares leave everything as it is."""
    share = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)
    ahead = torch.tensor([[-1.0, -2.0, -3.0, -4.0]] * 2, dtype=torch.float64)
    weight = share.log() - ahead
    parent, after = Particles(4)._resample(weight, ahead, torch.full((2,), 0.5, dtype=torch.float64))
    assert parent.tolist() == [0, 0, 0, 2, 4, 5, 6, 7]
    assert after.tolist() == [[1.0, 1.0, 1.0, 3.0], weight[1].tolist()]


def test_a_sample_by_particles_keeps_what_is_given_and_depends_on_its_seed_alone(ref):
    graph = GRAPHS["hybrid"](ref)
    p0 = ref.random_data(4, 3, 5, 4)
    given = torch.tensor([[True, False, False], [False, False, False], [True, True, True], [False, True, False]])
    x = torch.tensor([[2, 0, 0], [0, 0, 0], [1, 2, 3], [0, 3, 0]])

    def run(rows):
        return infill(ref.ExactRows(p0, graph.Q), graph, ref.Linear(4.0), x=x[rows], given=given[rows], steps=6,
                      seeds=rows, conditioning=Particles(8))  # fmt: skip

    together = run([0, 1, 2, 3])
    assert torch.equal(together[given], x[given])
    assert not (together == 4).any()
    for row in range(4):
        assert torch.equal(run([row])[0], together[row])


def test_a_condition_for_each_sequence_finds_its_particles(ref):
    """A label a sequence: the model is asked about sequences, not about particles."""
    graph, seen = ref.uniform_matrix(4), []

    def score(x, sigma, rows):
        seen.append(rows.unique().tolist())
        return torch.zeros(*x.shape, 4)

    x = torch.zeros(3, 2, dtype=torch.int64)
    given = torch.tensor([[True, False]]).expand(3, 2)
    options: dict[str, Any] = {"x": x, "given": given, "steps": 2, "seeds": range(3), "conditioning": Particles(4)}
    states = list(trajectory(score, graph, ref.Linear(2.0), **options))  # type: ignore[arg-type]
    assert all(rows == [0, 1, 2] for rows in seen)
    assert [state.step for state in states] == [0, 1, 2, 3]
    assert states[-1].t == 0


@pytest.mark.parametrize("name", ["uniform", "hybrid", "clustered", "ordinal"])
def test_a_given_token_that_is_held_still_has_to_be_asked_for(ref, name):
    graph = GRAPHS[name](ref)
    x, given = torch.zeros(1, 2).long(), torch.tensor([[True, False]])
    score = lambda x, sigma: torch.zeros(*x.shape, graph.num_states)  # noqa: E731
    with pytest.raises(ValueError, match=r"would be an approximation: choose conditioning=Particles\(64\)"):
        infill(score, graph, ref.Linear(2.0), x=x, given=given, steps=2)
    infill(score, graph, ref.Linear(2.0), x=x, given=given, steps=2, conditioning=clamped)
    infill(score, graph, ref.Linear(2.0), x=x, given=given | True, steps=2)  # nothing to infill


def test_clamping_is_the_approximation_it_is_said_to_be(ref):
    """The same problem: clamping is wrong by more than .02 however many steps are made."""
    graph = GRAPHS["uniform"](ref)
    p0 = ref.random_data(4, 2)
    x = torch.zeros(20_000, 2, dtype=torch.int64)
    given = torch.tensor([[True, False]]).expand(20_000, 2)
    out = infill(ref.ExactRows(p0, graph.Q), graph, ref.Geometric(0.02, 12.0), x=x, given=given, steps=40, t_min=1e-3,
                 conditioning=clamped, generator=seeded())  # fmt: skip
    share = torch.bincount(out[:, 1], minlength=4) / 20_000
    assert float((share - p0[0] / p0[0].sum()).abs().sum()) / 2 > 0.02


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"conditioning": Particles(4), "until": lambda state: state}, "neither start nor until"),
        ({"conditioning": Particles(4), "start": torch.zeros(1, 2).long()}, "neither start nor until"),
        ({"start": torch.zeros(1, 3).long()}, r"start must be int64 of x's shape \(1, 2\), got torch.int64 \(1, 3\)"),
        ({"start": torch.full((1, 2), 4)}, "a state outside 0..3"),
        ({"times": [0.5, 0.1], "steps": None}, r"times begin at 0.5, below 1: say from which states, start="),
    ],
)
def test_what_makes_no_sense_is_refused(ref, change, told):
    x = torch.zeros(1, 2).long()
    options: dict[str, Any] = {"x": x, "given": x.bool(), "steps": 2, **change}
    with pytest.raises(ValueError, match=told):
        infill(lambda x, sigma: torch.zeros(*x.shape, 4), GRAPHS["uniform"](ref), ref.Linear(2.0), **options)


@pytest.mark.parametrize(("count", "threshold"), [(1, 0.5), (True, 0.5), (2.0, 0.5), (4, -0.1), (4, math.nan)])
def test_particles_out_of_range_are_refused(count, threshold):
    with pytest.raises(ValueError, match="must"):
        Particles(count, threshold)


@pytest.mark.parametrize("name", ["absorbing", "uniform", "ordinal"])
def test_a_run_begins_from_any_states_at_any_time(ref, name):
    """From true states at t = .6 down to the data: a false alarm once in 10,000 seeds."""
    graph = GRAPHS[name](ref)
    p0 = ref.random_data(4, 1, graph.num_states, graph.mask_id)
    noise, score = ref.Linear(2.0), ref.ExactRows(p0, graph.Q)
    law = score.marginal(torch.tensor([1.2]).double())[0]
    start = torch.multinomial(law, 50_000, replacement=True, generator=seeded())[:, None]
    free = torch.zeros_like(start)
    x = infill(score, graph, noise, x=free, given=free.bool(), start=start, times=uniform_grid(5, 1e-3, t_max=0.6),
               generator=seeded(1))  # fmt: skip
    assert ref.chi_square(x, p0) > 1e-4


def test_a_run_that_is_resumed_goes_on(ref):
    """In two halves with the states handed on: every mask comes to light, and the first half's tokens stay."""
    graph, x = ref.StructuredAbsorbing(5), torch.zeros(4, 30).long()
    score = lambda x, sigma: (-sigma.expm1().log() - math.log(5))[:, None, None].expand(*x.shape, 6)  # noqa: E731
    options: dict[str, Any] = {"x": x, "given": x > 0, "seeds": range(4)}
    half = infill(score, graph, ref.LogLinear(), times=uniform_grid(4, 0.5), denoise=False, **options)
    assert (half == 5).any()
    whole = infill(score, graph, ref.LogLinear(), start=half, times=uniform_grid(4, 1e-5, t_max=0.5), **options)
    assert not (whole == 5).any()
    assert torch.equal(whole[half != 5], half[half != 5])


class Natural:
    """Mask probability t: infinite noise at t = 1."""

    def __call__(self, t):
        return -torch.log1p(-t), 1 / (1 - t)


EVERY: dict[str, list[Method]] = {
    "absorbing": [
        Tweedie(), Euler(), TauLeaping(), Ancestral(), Trapezoidal(), PredictorCorrector(), Psi(0.9), Unmasking(),
        FirstHitting(), Remasking(at_rate(1.0)), Remasking(capped(0.1)), ConfidenceUnmasking(),
    ],
    "uniform": [
        Tweedie(), Euler(), TauLeaping(), Ancestral(), Trapezoidal(), PredictorCorrector(), Psi(0.9), Uniformization(),
        LeaveOneOut(Tweedie()),
    ],
    "hybrid": [Tweedie(), TauLeaping()],
}  # fmt: skip


@pytest.mark.parametrize(("name", "method"), [(name, method) for name in EVERY for method in EVERY[name]])
def test_a_schedule_may_end_in_infinite_noise(ref, name, method):
    """For every method, under masks and noise; a false alarm once in 10,000 seeds each.

    With one position 25 steps are as good as exact, but for two methods: by enumeration, the chi-square of 2000 samples
    rises by at most .05 through the steps' own error, by 7 (uniform) and 8 (hybrid) under tau-leaping in so few.
    """
    graph = GRAPHS[name](ref)
    p0 = ref.random_data(4, 1, graph.num_states, graph.mask_id)
    steps = 100 if method in (TauLeaping(), PredictorCorrector()) else 25
    x = sample(ref.ExactRows(p0, graph.Q), graph, Natural(), shape=(2000, 1), steps=steps, t_min=1e-4, method=method,
               generator=seeded())  # fmt: skip
    assert ref.chi_square(x, p0) > 1e-4


def test_a_decoder_of_canvases_may_begin_in_infinite_noise(ref):
    """It does not follow the law; the likeliest token comes in more than its share."""
    graph = GRAPHS["uniform"](ref)
    p0 = ref.random_data(4, 1)
    x = sample(ref.ExactRows(p0, graph.Q), graph, Natural(), shape=(500, 1), times=uniform_grid(8, 0.0), denoise=False,
               method=EntropyBoundRenoising(), generator=seeded())  # fmt: skip
    assert float((x == p0.argmax()).double().mean()) > float(p0.max())


def test_only_the_first_time_moves_and_by_nothing():
    times = finite_start(Natural(), uniform_grid(4))
    assert times[1:].equal(uniform_grid(4)[1:])
    assert 0 < 1 - float(times[0]) < 1e-15
    assert finite_start(Natural(), uniform_grid(4, 0.1, 0.9)).equal(uniform_grid(4, 0.1, 0.9))

    class Hopeless:
        def __call__(self, t):
            return torch.full_like(t, math.inf), torch.full_like(t, math.inf)

    with pytest.raises(ValueError, match="not finite at t = "):
        finite_start(Hopeless(), uniform_grid(4))
