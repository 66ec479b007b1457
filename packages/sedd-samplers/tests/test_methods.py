"""What holds for every method: prompts stay, a row depends on its seed alone, masks go, errors name their cause."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from sedd_samplers import (
    Ancestral,
    ConfidenceUnmasking,
    Euler,
    FirstHitting,
    Method,
    PredictorCorrector,
    Remasking,
    Reverse,
    TauLeaping,
    Trapezoidal,
    Tweedie,
    Uniformization,
    adaptive_grid,
    at_rate,
    capped,
    clamped,
    confidence,
    entropy,
    entropy_bound,
    infill,
    margin,
    noise_grid,
    random_order,
    rescaled,
    sample,
    threshold,
    trajectory,
)
from sedd_samplers.adapters import to_posterior
from sedd_samplers.controls import controlled, top_k
from sedd_samplers.masked import absorption_rate
from sedd_samplers.multistage import correct

ANY_GRAPH: dict[str, Method] = {
    "Euler": Euler(),
    "tau-leaping": TauLeaping(),
    "Tweedie": Tweedie(),
    "ancestral": Ancestral(),
    "trapezoidal": Trapezoidal(),
    "trapezoidal, late": Trapezoidal(0.8),
    "uniformization": Uniformization(),
    "corrected Tweedie": PredictorCorrector(),
    "corrected trapezoidal": PredictorCorrector(Trapezoidal(), corrections=2, ratio=0.3),
}
ABSORBING: dict[str, Method] = {
    "first-hitting": FirstHitting(),
    "remasking, capped": Remasking(capped(0.3)),
    "remasking, rescaled": Remasking(rescaled(0.5)),
    "remasking at a rate": Remasking(at_rate(2.0)),
    "by confidence": ConfidenceUnmasking(),
    "by confidence at random": ConfidenceUnmasking(confidence, randomness=2.0),
    "by entropy": ConfidenceUnmasking(entropy),
    "by margin": ConfidenceUnmasking(margin),
    "in random order": ConfidenceUnmasking(random_order),
    "by confidence, of two": ConfidenceUnmasking(confidence, controls=(top_k(2),)),
    "corrected first-hitting": PredictorCorrector(FirstHitting()),
}
METHODS = {**ANY_GRAPH, **ABSORBING}
GRAPHS = {
    "absorbing": lambda ref: ref.StructuredAbsorbing(5),
    "absorbing, mask amid the tokens": lambda ref: ref.StructuredAbsorbing(5, 2),
    "uniform": lambda ref: ref.StructuredUniform(6),
    "hybrid": lambda ref: ref.hybrid_matrix(5),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def lively(x, sigma):
    """A score that belongs to no distribution, depends on the whole sequence and grows like 1 / sigma."""
    near = torch.roll(x, 1, 1) + 2 * torch.roll(x, -1, 1)
    wave = torch.sin(near[..., None] + torch.arange(6) + 0.7 * x.sum(1)[:, None, None])
    return wave - torch.log(torch.expm1(sigma))[:, None, None] - 1.6


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@drawn(data=st.data())
def test_given_positions_never_change(ref, data):
    name = data.draw(st.sampled_from(sorted(METHODS)))
    graph = GRAPHS[
        data.draw(st.sampled_from(sorted(GRAPHS if name in ANY_GRAPH else [g for g in GRAPHS if "abs" in g])))
    ](ref)
    shape = (data.draw(st.integers(1, 3)), data.draw(st.integers(1, 7)))
    rng = seeded(data.draw(st.integers(0, 2**31)))
    tokens = torch.tensor([y for y in range(6) if y != graph.mask_id])
    x = tokens[torch.randint(len(tokens), shape, generator=rng)]
    fixed = torch.rand(shape, generator=rng) < data.draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    denoise, stopping = data.draw(st.booleans()), data.draw(st.booleans())
    finished = torch.rand(shape[0], generator=rng) < 0.3
    noise, steps = ref.Linear(3.0), data.draw(st.integers(1, 4))
    grid = data.draw(st.sampled_from(["uniform", "by level", "adaptive"]))
    if grid == "uniform":
        times = {"steps": steps, "t_min": 0.01}
    elif grid == "by level":
        times = {"times": noise_grid(noise, steps, torch.log, t_min=0.01)}
    else:
        times = {"times": adaptive_grid(lively, graph, noise, x=x, given=fixed, target=5.0, t_min=0.1)}
    states = trajectory(
        lively, graph, noise, x=x, given=fixed, method=METHODS[name], denoise=denoise, generator=rng,
        until=(lambda state: finished) if stopping else None, conditioning=clamped, **times,
    )  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16, enabled=data.draw(st.booleans())):
        for state in states:
            assert torch.equal(state.x[fixed], x[fixed])
            assert ((state.x >= 0) & (state.x < 6)).all()
    if denoise and not stopping and graph.mask_id is not None:
        assert not (state.x == graph.mask_id).any()


@pytest.mark.parametrize("name", METHODS)
def test_a_row_depends_on_its_seed_alone(ref, name):
    """Not on its batch, nor on its place in it, nor on what is given or finished beside it."""
    graph = GRAPHS["absorbing" if name in ABSORBING else "hybrid"](ref)

    def run(seeds, free=4):
        x = torch.zeros(len(seeds), 4, dtype=torch.int64)
        given = torch.zeros_like(x, dtype=torch.bool)
        given[1::2, free:] = True
        return infill(lively, graph, ref.Linear(3.0), x=x, given=given, steps=4, t_min=0.01, method=METHODS[name],
                      seeds=seeds, conditioning=clamped)  # fmt: skip

    together = run(list(range(30)))
    assert torch.equal(together[[7]], run([7]))
    assert torch.equal(together[[20, 2]], run([20, 2]))
    assert torch.equal(together[::2], run(list(range(30)), free=1)[::2])
    assert len(together.unique(dim=0)) > 10


@pytest.mark.parametrize("name", METHODS)
def test_pieces_of_the_vocabulary_axis_change_nothing(ref, name, monkeypatch):
    graph = GRAPHS["absorbing" if name in ABSORBING else "hybrid"](ref)

    def run():
        return sample(lively, graph, ref.Linear(3.0), shape=(7, 4), steps=3, t_min=0.01, method=METHODS[name],
                      seeds=range(7))  # fmt: skip

    whole = run()
    monkeypatch.setattr("sedd_samplers.fast.answer.rows_at_a_time", lambda num_states, device: 3)
    assert torch.equal(run(), whole)


@pytest.mark.parametrize("name", METHODS)
def test_x_is_left_alone(ref, name):
    graph = GRAPHS["absorbing"](ref)
    x = torch.full((8, 4), graph.mask_id)
    reverse = Reverse(lively, graph, ref.Linear(3.0), frozen=torch.zeros(8, 4, dtype=torch.bool), seeds=torch.arange(8))
    t = torch.ones(8, dtype=torch.float64)
    y = METHODS[name](reverse, x, t, t / 10)
    assert (x == graph.mask_id).all()
    assert (y != graph.mask_id).any()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("precision", [torch.float32, torch.float64, torch.bfloat16])
def test_any_precision_of_the_model_is_welcome(ref, name, precision):
    graph = GRAPHS["absorbing"](ref)
    x = sample(
        lambda x, sigma: lively(x, sigma).to(precision), graph, ref.Linear(3.0), shape=(3, 4), steps=3, t_min=0.05,
        method=METHODS[name], seeds=range(3),
    )  # fmt: skip
    assert not (x == graph.mask_id).any()


@pytest.mark.parametrize("name", METHODS)
def test_nan_is_named(ref, name):
    def score(x, sigma):
        return lively(x, sigma).where(sigma[:, None, None] > 1, math.nan)

    with pytest.raises(ValueError, match=r"returned NaN at sequence \d+, position \d+, sigma = 0\."):
        sample(score, GRAPHS["absorbing"](ref), ref.Linear(3.0), shape=(3, 4), steps=6, t_min=0.05,
               method=METHODS[name], seeds=range(3))  # fmt: skip


@pytest.mark.parametrize("name", [n for n in ABSORBING if "corrected" not in n])
@pytest.mark.parametrize(
    ("graph", "told"),
    [("uniform", "has no mask"), ("hybrid", r"a jump leads into the token 0")],
)
def test_methods_for_masks_refuse_other_graphs(ref, name, graph, told):
    with pytest.raises(ValueError, match=f"{type(METHODS[name]).__name__} needs an absorbing graph.*{told}"):
        sample(lively, GRAPHS[graph](ref), ref.Linear(3.0), shape=(2, 4), steps=3, method=METHODS[name])


def test_tokens_that_turn_into_the_mask_at_different_rates_are_refused(ref):
    Q = ref.StructuredAbsorbing(2).Q.clone()
    Q[:, 0] *= 2
    with pytest.raises(ValueError, match=r"FirstHitting needs .* one rate for all tokens; .* from 1 to 2"):
        sample(lambda x, sigma: torch.zeros(*x.shape, 3), ref.MatrixGraph(Q, 2), ref.Linear(3.0), shape=(2, 4),
               method=FirstHitting())  # fmt: skip


def test_a_negative_probability_is_0_and_the_rest_sums_to_1(ref):
    """Trap: -.05 left in shifts .476 to .450; 100,000 draws, a false alarm once in 15,000 seeds."""
    n = 100_000
    reverse = Reverse(lively, ref.StructuredAbsorbing(5), ref.Linear(1.0), frozen=torch.zeros(n, 1).bool(),
                      seeds=torch.arange(n))  # fmt: skip
    row = torch.tensor([0.5, 0.55, 0.0, 0.0, 0.0, -0.05], dtype=torch.float64)
    x = torch.full((n, 1), 5)
    y = reverse.redraw(x, torch.ones(n), x == 5, lambda log_score, x, b, i: row.expand(len(x), 6).clone())
    share = float((y == 0).double().mean())
    assert share == pytest.approx(0.5 / 1.05, abs=4 * math.sqrt(0.25 / n))


def test_a_margin_is_a_difference(ref):
    """The likeliest token first is not the clearest: .5 against .45 comes after .4 against .2."""
    posterior = torch.tensor([[0.5, 0.45, 0.05, 0.0], [0.4, 0.2, 0.2, 0.2]])
    assert margin(posterior, posterior.argmax(1)).tolist() == pytest.approx([0.05, 0.2])


def test_every_correction_is_made(ref):
    graph, calls = ref.StructuredAbsorbing(5), []

    def score(x, sigma):
        calls.append(float(sigma[0]))
        return lively(x, sigma)

    reverse = Reverse(score, graph, ref.Linear(1.0), frozen=torch.zeros(2, 4).bool(), seeds=torch.arange(2))
    t = torch.ones(2, dtype=torch.float64)
    PredictorCorrector(corrections=3)(reverse, torch.full((2, 4), 5), t, t / 2)
    assert calls == pytest.approx([1.0, 0.5, 0.5, 0.5])


def test_a_model_is_given_float32_noise(ref):
    seen = []

    def score(x, sigma):
        seen.append(sigma.dtype)
        return lively(x, sigma)

    for method in METHODS.values():
        sample(score, GRAPHS["absorbing"](ref), ref.Linear(3.0), shape=(2, 3), steps=2, t_min=0.05, method=method,
               seeds=range(2))  # fmt: skip
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("rate", [0.5, 3.0])
def test_the_rate_of_absorption_sets_the_clock(ref, rate):
    """At the rate b and noise sigma / b the process is the same, and so are the samples."""
    graph = ref.StructuredAbsorbing(5)
    scaled = ref.MatrixGraph(rate * graph.Q, 5)

    def lively(x, sigma):  # what comes to light depends on when
        wave = torch.sin(x.sum(1)[:, None, None] + torch.arange(6) + 5 * sigma[:, None, None])
        return wave.expand(*x.shape, 6) - torch.log(torch.expm1(sigma))[:, None, None] - 1.6

    for method in (FirstHitting(), Remasking(rescaled(0.5)), ConfidenceUnmasking()):
        one = sample(lively, graph, ref.Linear(3.0), shape=(20, 4), steps=4, method=method, seeds=range(20))
        other = sample(
            lambda x, sigma: lively(x, rate * sigma), scaled, ref.Linear(3.0 / rate), shape=(20, 4), steps=4,
            method=method, seeds=range(20),
        )  # fmt: skip
        assert torch.equal(one, other)


def test_the_corrector_refuses_a_graph_that_only_runs_backwards(ref):
    class Backwards:
        def __init__(self, graph):
            self.num_states, self.mask_id = graph.num_states, graph.mask_id
            self.prior, self.rates_into = graph.prior, graph.rates_into
            self.transition_into, self.propagate = graph.transition_into, graph.propagate

    graph = Backwards(ref.StructuredAbsorbing(5))
    sample(lively, graph, ref.Linear(3.0), shape=(2, 4), steps=3)
    with pytest.raises(ValueError, match=r"graph\.rates_out_of\(x\).*a Backwards has none"):
        sample(lively, graph, ref.Linear(3.0), shape=(2, 4), steps=3, method=PredictorCorrector())


def test_nothing_is_corrected_without_noise(ref):
    """At sigma = 0 the corrector would only add masks."""
    x = sample(lively, ref.StructuredAbsorbing(5), ref.Linear(3.0), shape=(50, 4), steps=3, t_min=0.0,
               method=PredictorCorrector(Ancestral()), denoise=False, seeds=range(50))  # fmt: skip
    assert not (x == 5).any()


def test_a_flip_has_its_sequence_s_probability(ref):
    """100,000 coins a sequence, within four standard deviations: a false alarm once in 8,000 seeds."""
    shape, n = (2, 100_000), 100_000
    reverse = Reverse(
        lively, ref.StructuredAbsorbing(5), ref.Linear(1.0), frozen=torch.zeros(shape).bool(), seeds=torch.arange(2)
    )
    x = torch.zeros(shape, dtype=torch.int64)
    where = torch.ones(shape, dtype=torch.bool)
    where[:, 0] = False
    flipped = reverse.flip(x, where, 5, torch.tensor([0.01, 0.3], dtype=torch.float64)) == 5
    assert not x.any()
    assert not flipped[:, 0].any()
    for count, p in zip(flipped.sum(1).tolist(), (0.01, 0.3), strict=True):
        assert abs(count - n * p) < 4 * math.sqrt(n * p * (1 - p))


def test_what_a_model_says_of_unmasked_positions_means_nothing(ref):
    def score(x, sigma):
        return lively(x, sigma).where((x == 5)[..., None], math.nan)

    x, y = (
        sample(s, ref.StructuredAbsorbing(5), ref.Linear(3.0), shape=(20, 4), steps=5, method=PredictorCorrector(),
               seeds=range(20))
        for s in (lively, score)
    )  # fmt: skip
    assert torch.equal(x, y)


def test_correctors_move_tokens_and_masks_and_no_given_position(ref):
    graph = ref.StructuredAbsorbing(5)
    frozen = torch.zeros(200, 4, dtype=torch.bool)
    frozen[:, 0] = True
    reverse = Reverse(lively, graph, ref.Linear(1.0), frozen=frozen, seeds=torch.arange(200))
    x = torch.tensor([0, 1, 5, 5]).expand(200, -1)
    level = torch.full((200,), 0.5, dtype=torch.float64)
    y = correct(reverse, x, level, level)
    assert torch.equal(y[:, 0], x[:, 0])
    assert (y[:, 1] == 5).any()
    assert (y[:, 2:] != 5).any()


@pytest.mark.parametrize("order", [confidence, entropy, margin, random_order])
def test_confidence_unmasking_unmasks_as_many_as_the_grid_says(ref, order):
    graph, masked = ref.StructuredAbsorbing(5), []
    x = torch.zeros(3, 12, dtype=torch.int64)
    given = torch.zeros_like(x, dtype=torch.bool)
    given[1, :4] = True
    given[2] = True
    times = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.001])
    for state in trajectory(lively, graph, ref.LogLinear(0.0), x=x, given=given, method=ConfidenceUnmasking(order),
                            times=times, seeds=range(3), denoise=False):  # fmt: skip
        masked.append((state.x == 5).sum(1).tolist())
    assert masked == [[12, 8, 0], [9, 6, 0], [6, 4, 0], [3, 2, 0], [0, 0, 0]]


def test_the_order_decides_who_comes_first(ref):
    """A posterior that is sharpest at position 2, then 0, 3, 1."""
    graph = ref.StructuredAbsorbing(5)
    sharpness = torch.tensor([3.0, 0.0, 4.0, 1.0])

    def score(x, sigma):
        return torch.nn.functional.one_hot(torch.tensor(1), 6) * sharpness[None, :, None].expand(len(x), -1, -1)

    for order in (entropy, margin):
        x, seen = torch.zeros(40, 4, dtype=torch.int64), []
        for state in trajectory(score, graph, ref.LogLinear(0.0), x=x, given=x > 0, method=ConfidenceUnmasking(order),
                                times=torch.tensor([1.0, 0.75, 0.5, 0.25, 0.001]), seeds=range(40)):  # fmt: skip
            seen.append((state.x != 5).float().mean(0).tolist())
        assert seen[:5] == [[0, 0, 0, 0], [0, 0, 1, 0], [1, 0, 1, 0], [1, 0, 1, 1], [1, 1, 1, 1]]


@pytest.mark.parametrize("order", [confidence, entropy, margin])
def test_greedy_decoding_takes_the_likeliest_token_where_the_order_says(ref, order):
    """Against a loop on the exact posterior; the ranks are the model's, not those of what the control leaves."""
    graph = ref.StructuredAbsorbing(3)
    score = ref.ExactScore(ref.random_data(3, 4, 4, 3), graph.Q)
    times = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.001])
    x = torch.zeros(30, 4, dtype=torch.int64)
    method = ConfidenceUnmasking(order, controls=(top_k(1),))
    run = trajectory(score, graph, ref.LogLinear(0.0), x=x, given=x > 0, method=method, times=times, seeds=range(30))
    got = [state.x for state in run]
    state = torch.full((1, 4), 3)
    for step in range(1, 5):
        p = to_posterior(score, graph)(state, torch.ones(1, dtype=torch.float64))[0]
        top = p.topk(2).values
        rank = {confidence: top[:, 0], entropy: torch.xlogy(p, p).sum(-1), margin: top[:, 0] - top[:, 1]}[order]
        i = int(rank.masked_fill(state[0] != 3, -math.inf).argmax())
        state[0, i] = p[i].argmax()
        assert (got[step] == state).all()


def test_what_is_drawn_is_controlled_and_what_ranks_is_not(ref):
    """Of two tokens allowed by top-k both come, of the third none; a score with one token left ranks nothing."""
    graph = ref.StructuredAbsorbing(3)
    score = ref.ExactScore(ref.random_data(3, 4, 4, 3), graph.Q)
    x = torch.zeros(400, 4, dtype=torch.int64)

    def first(score, method):
        return infill(score, graph, ref.LogLinear(0.0), x=x, given=x > 0, method=method, denoise=False,
                      times=torch.tensor([1.0, 0.75]), seeds=range(400))  # fmt: skip

    out = first(score, ConfidenceUnmasking(entropy, controls=(top_k(2),)))
    places = (out != 3).nonzero()[:, 1]
    assert len(places.unique()) == 1
    p = to_posterior(score, graph)(torch.full((1, 4), 3), torch.ones(1, dtype=torch.float64))[0, places[0]]
    assert out[:, places[0]].unique().tolist() == p.topk(2).indices.sort().values.tolist()
    anywhere = first(controlled(score, graph, top_k(1)), ConfidenceUnmasking(entropy))
    assert len((anywhere != 3).nonzero()[:, 1].unique()) == 4


def test_randomness_disturbs_the_order(ref):
    """With much of it every position comes first about equally often; a false alarm once in 10,000 seeds."""
    graph = ref.StructuredAbsorbing(5)
    score = lambda x, sigma: torch.arange(4.0)[:, None].expand(len(x), 4, 6)  # noqa: E731
    x = torch.zeros(4000, 4, dtype=torch.int64)
    times = torch.tensor([1.0, 0.75])
    method = ConfidenceUnmasking(confidence, randomness=1e6)
    first = infill(score, graph, ref.LogLinear(0.0), x=x, given=x > 0, times=times, method=method, denoise=False,
                   seeds=range(4000))  # fmt: skip
    count = (first != 5).sum(0).double()
    assert count.sum() == 4000
    assert float(((count - 1000) ** 2 / 1000).sum()) < 21.1  # chi-square, 3 degrees of freedom


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Trapezoidal(0.0), r"theta must lie in \(0, 1\), got 0.0"),
        (lambda: Trapezoidal(1.0), r"theta must lie in \(0, 1\), got 1.0"),
        (lambda: Trapezoidal(math.nan), "theta must lie in"),
        (lambda: PredictorCorrector(corrections=0), "corrections must be a positive integer, got 0"),
        (lambda: PredictorCorrector(corrections=True), "corrections must be a positive integer, got True"),
        (lambda: PredictorCorrector(ratio=-1.0), "ratio must be finite and positive, got -1.0"),
        (lambda: PredictorCorrector(ratio=math.nan), "ratio must be finite and positive"),
        (lambda: Uniformization(slack=0.9), "slack must be at least 1, got 0.9"),
        (lambda: Uniformization(shrink=1.0), r"shrink must lie in \(0, 1\), got 1.0"),
        (lambda: ConfidenceUnmasking(randomness=-0.1), "randomness must be finite and at least 0, got -0.1"),
        (lambda: capped(1.5), r"eta must be finite and lie in \[0, 1\], got 1.5"),
        (lambda: rescaled(-0.5), r"eta must be finite and lie in \[0, 1\], got -0.5"),
        (lambda: at_rate(math.inf), r"gamma must be finite"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(make, told):
    with pytest.raises(ValueError, match=told):
        make()


def test_a_schedule_that_remasks_too_much_is_refused(ref):
    method = Remasking(lambda sigma_t, sigma_s, r_max: 2 * r_max)
    with pytest.raises(ValueError, match=r"must stay within \[0, r_max\]"):
        sample(lively, ref.StructuredAbsorbing(5), ref.Linear(3.0), shape=(2, 4), steps=3, method=method)


def test_trapezoidal_takes_a_fourth_of_a_large_batch_at_a_time(ref, monkeypatch):
    """The samples are the same, and the model is asked about every fourth sequence."""
    graph, asked = GRAPHS["hybrid"](ref), []

    def score(x, sigma):
        asked.append(len(x))
        return lively(x, sigma)

    def run():
        asked.clear()
        return sample(score, graph, ref.Linear(3.0), shape=(6, 4), steps=2, t_min=0.05, method=Trapezoidal(),
                      seeds=range(6), denoise=False)  # fmt: skip

    whole = run()
    assert asked == [6] * 4
    monkeypatch.setattr("sedd_samplers.multistage.rows_at_a_time", lambda num_states, device: 5)
    assert torch.equal(run(), whole)
    assert asked == [2, 2, 2, 2, 1, 1, 1, 1] * 2
    monkeypatch.setattr("sedd_samplers.multistage.rows_at_a_time", lambda num_states, device: 6)
    assert torch.equal(run(), whole)
    assert asked == [6] * 4  # 24 rows are four pieces


def test_a_step_in_which_none_is_due_asks_nothing(ref):
    """Four positions in twelve steps: four calls."""
    asked = []

    def score(x, sigma):
        asked.append(len(x))
        return lively(x, sigma)

    x = torch.zeros(3, 4, dtype=torch.int64)
    infill(score, GRAPHS["absorbing"](ref), ref.LogLinear(0.0), x=x, given=x > 0, steps=12, t_min=1e-4,
           method=ConfidenceUnmasking(), seeds=range(3))  # fmt: skip
    assert asked == [3] * 4


def test_orders_are_what_they_are_called():
    posterior = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.1, 0.9, 0.0, 0.0]], dtype=torch.float64)
    token = torch.tensor([2, 1])
    assert confidence(posterior, token).tolist() == pytest.approx([math.log(0.25), math.log(0.9)])
    expected = [0.5 * math.log(0.5) + 0.5 * math.log(0.25), 0.1 * math.log(0.1) + 0.9 * math.log(0.9)]
    assert entropy(posterior, token).tolist() == pytest.approx(expected)
    assert margin(posterior, token).tolist() == pytest.approx([0.25, 0.8])
    assert random_order(posterior, token).tolist() == [0.0, 0.0]


def test_schedules_are_what_they_are_called():
    t, s, most = torch.tensor([2.0, 0.5]), torch.tensor([1.0, 0.4]), torch.tensor([0.6, 1.0])
    assert capped(0.7)(t, s, most).tolist() == pytest.approx([0.6, 0.7])
    assert rescaled(0.7)(t, s, most).tolist() == pytest.approx([0.42, 0.7])
    assert at_rate(0.5)(t, s, most).tolist() == pytest.approx([0.5, 0.05])
    assert at_rate(2.0)(t, s, most).tolist() == pytest.approx([0.6, 0.2])


def test_rules_are_what_they_are_called():
    """Of values in the order of the ranks, behind whose last there are no numbers."""
    posterior, token = torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]]).double(), torch.tensor([1, 1])
    rule = threshold(0.25)
    assert rule.statistic(posterior, token).tolist() == pytest.approx([math.log(0.25), 0.0])
    values = torch.tensor([[0.9, 0.25, 0.2499, math.nan]]).log()
    assert rule.within(values).tolist() == [[True, True, False, False]]
    rule = entropy_bound(0.5)
    assert rule.statistic(posterior, token).tolist() == pytest.approx([1.5 * math.log(2), 0.0])
    values = torch.tensor([[0.2, 0.3, 0.4, 0.1], [0.5, 0.1, 0.0, math.nan]], dtype=torch.float64)
    assert rule.within(values).tolist() == [[True, True, True, False], [True, True, True, False]]


@pytest.mark.parametrize(("change", "told"), [(1e-7, None), (1e-5, "at rates from 2 to 2.00002")])
def test_one_rate_of_absorption_is_one_to_six_digits(ref, change, told):
    Q = 2 * ref.StructuredAbsorbing(3, 1).Q.clone()
    Q[:, 0] *= 1 + change
    graph = ref.MatrixGraph(Q, 1)
    if told is None:
        assert absorption_rate(graph, torch.device("cpu"), "This") == pytest.approx(2.0, rel=1e-6)
    else:
        with pytest.raises(ValueError, match=f"This needs an absorbing graph with one rate for all .* {told}"):
            absorption_rate(graph, torch.device("cpu"), "This")
    still = ref.StructuredAbsorbing(2, 0).Q.clone()
    still[:, 1] = 0
    with pytest.raises(ValueError, match="at rates from 0 to 1"):
        absorption_rate(ref.MatrixGraph(still, 0), torch.device("cpu"), "This")
