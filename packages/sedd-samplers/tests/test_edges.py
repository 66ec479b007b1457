"""Small parts by themselves, at their ends: what is asked, told, counted and shown, each by its value."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sedd_samplers import (
    Ancestral,
    ByConfidence,
    ConfidenceUnmasking,
    Euler,
    FirstHitting,
    Looped,
    Particles,
    PathPlanning,
    PredictorCorrector,
    Psi,
    Remasking,
    State,
    TauLeaping,
    Trapezoidal,
    Tweedie,
    Uniformization,
    Unmasking,
    adaptive_grid,
    at_rate,
    draw_lengths,
    generate,
    infill,
    infilling,
    pad_prompts,
    random_order,
    sample,
    trajectory,
    when_still,
)
from sedd_samplers.adapters import from_logits
from sedd_samplers.adapters.processes import Masking, Proportional, Replacing
from sedd_samplers.autoregressive import continue_left_to_right, sample_left_to_right
from sedd_samplers.controls import allowed_tokens, apply_controls, repetition_penalty
from sedd_samplers.fast import Answer
from sedd_samplers.interfaces import check_graph
from sedd_samplers.masked import _first
from sedd_samplers.positions import Positions
from sedd_samplers.precision import limit_law
from sedd_samplers.reverse import Reverse
from sedd_samplers.views import live, record
from sedd_samplers.waiting import at_once, reading_waits
from torch import Tensor

NOISE = Proportional()
MASK = 5


def flat(x: Tensor, sigma: Tensor) -> Tensor:
    return torch.zeros(*x.shape, 6)


# --- what was drawn, and with what probability -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        Euler(), TauLeaping(), Tweedie(), Ancestral(), Trapezoidal(0.4), PredictorCorrector(), Psi(0.9), Unmasking(),
        Remasking(at_rate(1.0)), ByConfidence(at_rate(1.0)), ConfidenceUnmasking(random_order), FirstHitting(),
        Uniformization(), PathPlanning(flat, 0.5),
    ],
    ids=lambda method: type(method).__name__,
)  # fmt: skip
def test_a_token_s_log_probability_is_its_share_of_the_tokens(method: Any) -> None:
    """Of tokens that do not depend on each other, by whatever method: log p(x0 = token) at its place, or 0."""
    graph, rng = Masking(6, 2), torch.Generator().manual_seed(0)
    logits = torch.randn(7, 6, generator=rng)
    score = from_logits(lambda x, sigma: logits.expand(len(x), -1, -1), graph)
    x, given = torch.zeros(9, 7, dtype=torch.int64), torch.rand(9, 7, generator=rng) < 0.3
    law = logits.index_fill(1, torch.tensor([2]), -torch.inf).log_softmax(-1).double()
    run = trajectory(score, graph, NOISE, x=x, given=given, steps=3, t_min=0.05, method=method, log_probs=True,
                     seeds=range(9))  # fmt: skip
    for state in run:
        right = law[torch.arange(7), state.x].masked_fill(given | (state.x == 2), 0.0)
        torch.testing.assert_close(state.log_prob, right, rtol=1e-4, atol=1e-5)
    assert not (state.x == 2).any()


@pytest.mark.parametrize("static", [False, True])
def test_what_is_told_of_a_token_is_not_changed_where_it_stays(static: bool) -> None:
    """By a corrector, at no noise, that redraws nothing; by a draw of other positions, though all are asked about."""
    graph, x = Masking(6, 2), torch.zeros(9, 7, dtype=torch.int64)
    logits = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    law = logits.index_fill(1, torch.tensor([2]), -torch.inf).log_softmax(-1).double()
    score = from_logits(lambda x, sigma: logits.expand(len(x), -1, -1), graph)
    for state in trajectory(score, graph, NOISE, x=x, given=x > 0, steps=3, t_min=0.0, denoise=False, seeds=range(9),
                            method=PredictorCorrector(), static_shapes=static, log_probs=True):  # fmt: skip
        right = law[torch.arange(7), state.x].masked_fill(state.x == 2, 0.0)
        torch.testing.assert_close(state.log_prob, right, rtol=1e-4, atol=1e-5)
    reverse = Reverse(flat, Replacing(6), NOISE, frozen=x > 0, seeds=torch.arange(9), static_shapes=static)
    reverse.log_prob = torch.full((9, 7), -7.0, dtype=torch.float64)
    some = torch.rand(9, 7, generator=torch.Generator().manual_seed(1)) < 0.5
    even: Any = lambda log_score, x, b, i: torch.ones(len(x), 6)  # noqa: E731
    moved = reverse.redraw(x, torch.ones(9), some, even) != x
    torch.testing.assert_close(reverse.log_prob, torch.where(moved, -math.log(5.0), -7.0).double())
    assert (moved & some).any()
    assert not (moved & ~some).any()


def test_what_is_told_of_a_draw() -> None:
    """Of a state that was left, its share of all that could have come; of one that stayed, what was told before."""
    reverse = Reverse(flat, Masking(6, MASK), NOISE, frozen=torch.zeros(2, 2).bool(), seeds=torch.arange(2))
    reverse.tell(torch.tensor([1]), torch.ones(1, 6), torch.tensor([0]), torch.tensor([5]))
    assert reverse.log_prob is None  # nobody asks
    reverse.log_prob = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]], dtype=torch.float64)
    probs = torch.tensor([[1.0, 2, 0, 0, 0, 5], [4.0, 0, 0, 0, 0, 0], [3.0, 1, 0, 0, 0, 9]])
    reverse.tell(torch.tensor([1, 2, 3]), probs, torch.tensor([1, 0, 5]), torch.tensor([5, 5, 5]))
    assert reverse.log_prob.flatten().tolist() == pytest.approx([-1.0, math.log(2 / 3), 0.0, -4.0])
    assert reverse.log_prob.shape == (2, 2)
    reverse.tell(torch.tensor([0]), torch.tensor([[1.0, 1e20, 0, 0, 0, 0]]), torch.tensor([0]), torch.tensor([1]))
    assert reverse.log_prob[0, 0] == 0  # what is rounded away beside the state that was left is not above 1


def test_a_flip_has_the_probability_of_its_sequence_or_its_position() -> None:
    """By the sequence's own number at each place, which lies below it or does not."""
    frozen = torch.zeros(2, 3, dtype=torch.bool)
    x, where = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[True, True, False], [True, True, True]])
    new = lambda: Reverse(flat, Masking(6, MASK), NOISE, frozen=frozen, seeds=torch.tensor([3, 4]))  # noqa: E731
    u = new().uniforms_at(where)
    for chance in (torch.tensor([0.5, 0.25]).double(), u + 1e-9 * torch.tensor([[1, -1, 1], [-1, 1, 0]])):
        limit = chance[:, None] if chance.ndim == 1 else chance
        flipped = new().flip(x, where, 4, chance)
        assert torch.equal(flipped, torch.where(where & (u < limit), 4, x))


# --- pieces of answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("picked", [False, True])
def test_a_shift_is_added_but_at_a_row_s_own_state(picked: bool) -> None:
    """Before it is converted, in the working precision, whichever rows are read; what the model returned stands."""
    rows = torch.arange(12.0).view(4, 3).bfloat16()
    pick = torch.tensor([3, 1]) if picked else None
    count = 2 if picked else 4
    shift, state = 0.001 * torch.arange(1, count + 1).double(), torch.tensor([2, 0, 1, 1])[:count]
    own = (rows if pick is None else rows[pick]).float()
    plain = (own + shift.float()[:, None]).scatter(1, state[:, None], 0.0)
    answer = Answer(rows, pick, shift=shift, state=state)
    assert torch.equal(answer.tensor(), plain)
    assert torch.equal(answer[torch.tensor([1, 0])], plain[[1, 0]])
    assert torch.equal(answer.then(lambda r, part: 2 * r)[1:], 2 * plain[1:])
    returned = answer.as_returned()
    assert returned is not None
    assert returned[0] is rows
    assert returned[1] is pick
    assert returned[2] is shift
    with torch.autocast("cpu", torch.bfloat16):
        product = answer.then(lambda r, part: r @ torch.ones(3, 1))
        assert product[:].dtype == torch.float32


def test_an_answer_with_a_gradient_hands_it_on() -> None:
    rows = torch.arange(6.0).view(3, 2).requires_grad_()
    answer = Answer(rows, torch.tensor([2, 0])).then(lambda r, part: torch.cat([r, 3 * r], 1), width=4)
    (slope,) = torch.autograd.grad(answer.tensor().sum(), rows)
    assert slope.tolist() == [[4.0, 4.0], [0.0, 0.0], [4.0, 4.0]]
    assert Answer(rows[:0]).tensor().shape == (0, 2)
    assert answer.then(lambda r, part: r, torch.float64).tensor().dtype == torch.float32  # the model's, as without one
    with torch.no_grad():
        assert not answer.tensor().requires_grad


# --- what stands in a sequence ---------------------------------------------------------------------------------------


def counting(told: list[Any]) -> Any:
    def control(p: Tensor, sequence: Tensor, position: Tensor, counts: Tensor) -> Tensor:
        told.append((sequence.tolist(), position.tolist(), counts.tolist()))
        return p

    return control


@pytest.mark.parametrize("waits", [False, True])
def test_states_are_counted_in_the_row_s_own_sequence(waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is told by its number, or by the row of x that it is; what is not written is nothing."""
    monkeypatch.setattr("sedd_samplers.controls.reading_waits", lambda device: waits)
    x, p, told = torch.tensor([[0, 2, 2], [1, -1, 1], [2, 0, -1]]), torch.full((2, 3), 1 / 3), list[Any]()
    sequence, position = torch.tensor([2, 1]), torch.tensor([0, 1])
    apply_controls([counting(told)], p, sequence, position, x)
    apply_controls([counting(told)], p, sequence + 7, position, x, torch.tensor([0, 2]))
    assert told[0] == ([2, 1], [0, 1], [[1, 0, 1], [0, 2, 0]])
    assert told[1] == ([9, 8], [0, 1], [[1, 0, 2], [1, 0, 1]])


def test_what_is_written_from_left_to_right_is_counted() -> None:
    """With what is given, wherever it stands; of the sequences that are written to."""
    told = list[Any]()
    x, given = torch.tensor([[1, 0, 2], [2, 2, 2]]), torch.tensor([[True, False, True], [False, True, False]])

    def model(x: Tensor) -> Tensor:
        return 30.0 * torch.eye(3)[(x + 1) % 3]

    out = continue_left_to_right(model, x=x, given=given, start=2, num_states=3, controls=[counting(told)])
    assert out.tolist() == [[1, 2, 2], [0, 2, 0]]
    assert told == [([1], [0], [[0, 0, 1]]), ([0], [1], [[0, 1, 1]]), ([1], [2], [[1, 0, 1]])]


def test_what_is_wrong_from_left_to_right_is_told_of_the_run_s_own_sequence() -> None:
    """Of three the last one, when the first is given at the second place, and asked about no more."""
    x, given = torch.zeros(3, 2, dtype=torch.int64), torch.tensor([[False, True], [False, False], [False, False]])

    def model(x: Tensor) -> Tensor:
        return torch.zeros(*x.shape, 3).masked_fill(
            (torch.arange(len(x)) == 1)[:, None, None] & (len(x) == 2), torch.nan
        )

    with pytest.raises(ValueError, match="returned NaN at sequence 2, position 1"):
        continue_left_to_right(model, x=x, given=given, start=0, num_states=3)


def test_a_penalty_is_a_power_of_what_stands_there() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2]])
    law = apply_controls([repetition_penalty(2.0)], p, torch.tensor([0]), torch.tensor([0]), torch.tensor([[1, 1]]))
    assert law[0].tolist() == pytest.approx([0.5 / 0.79, 0.09 / 0.79, 0.2 / 0.79])


def test_constraints_are_as_large_as_what_is_sampled() -> None:
    """By position, or by sequence and position; one too far is told, and a width that is not N."""
    p, at = torch.full((2, 3), 1 / 3), torch.tensor([0, 1])
    whole = torch.ones(2, 3, dtype=torch.bool)
    assert torch.equal(allowed_tokens(whole)(p, torch.tensor([9, 9]), at), p)
    assert torch.equal(allowed_tokens(whole.expand(2, 2, 3))(p, at, at), p)
    for tokens, sequence, position in ((whole, at, at + 1), (whole.expand(2, 2, 3), at + 1, at)):
        with pytest.raises(ValueError, match=r"too small for sequence \d, position \d and 3 states"):
            allowed_tokens(tokens)(p, sequence, position)
    with pytest.raises(ValueError, match=r"have the shape \(2, 4\): .* and 3 states"):
        allowed_tokens(torch.ones(2, 4, dtype=torch.bool))(p, at, at)
    for wrong in (whole[0], whole.float(), whole[None, None]):
        with pytest.raises(ValueError, match=r"must be bool of shape \(L, N\) or \(B, L, N\), got"):
            allowed_tokens(wrong)
    none = whole.clone()
    none[1] = False
    with pytest.raises(ValueError, match=r"no token is allowed at position 1$"):
        allowed_tokens(none)
    with pytest.raises(ValueError, match=r"no token is allowed at sequence, position 2, 1$"):
        allowed_tokens(torch.stack([whole, whole, none]))


# --- order and clock -------------------------------------------------------------------------------------------------


def test_places_are_by_rank_and_then_by_tie() -> None:
    """The highest first, in each sequence by itself; a rank that is no number is 0."""
    where = torch.tensor([[True, True, False, True], [False, True, True, True]])
    rank = torch.tensor([1.0, 3.0, 1.0, torch.nan, -1.0, 0.0], dtype=torch.float64)
    tie = torch.tensor([0.1, 0.2, 0.3, 0.1, 0.5, 0.2], dtype=torch.float64)
    place = _first(where, Positions.of(where), rank, tie)
    assert place[0, [1, 3, 0]].tolist() == [0, 1, 2]
    assert place[1, [3, 1, 2]].tolist() == [0, 1, 2]


def test_a_loop_runs_through_its_schedule_with_its_pace() -> None:
    """Three parts, at their ends and in their middles; the pace is the derivative where there is one."""
    loop = Looped(lambda t: (t**2, 2 * t), at=0.3, on=0.6, off=0.2)
    t = torch.tensor([0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0], dtype=torch.float64)
    sigma, dsigma = loop(t)
    clock = [0.0, 0.15, 0.3, 0.3, 0.3, 0.65, 1.0]
    assert sigma.tolist() == pytest.approx([c**2 for c in clock])
    pace = [1.5, 1.5, 0.0, 0.0, 0.0, 1.75, 1.75]
    assert dsigma.tolist() == pytest.approx([2 * c * p for c, p in zip(clock, pace, strict=True)])


def test_tokens_are_taken_back_where_the_noise_stands_still() -> None:
    sigma, later, r_max = torch.tensor([1.0, 1.0, 2.0]), torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.1, 0.9, 0.9])
    assert when_still(0.5)(sigma, later, r_max).tolist() == pytest.approx([0.1, 0.5, 0.0])


def test_a_pilot_finds_the_grid_that_it_has_always_found(ref: Any) -> None:
    graph = ref.StructuredAbsorbing(3)
    score = ref.SpectralScore(ref.random_data(3, 3, 4, 3), graph.Q)
    x = torch.zeros(20, 3, dtype=torch.int64)
    times = adaptive_grid(score, graph, ref.LogLinear(), x=x, given=x > 0, target=0.05, t_min=0.01, seed=5)
    known = [1.0, 0.938125, 0.814375, 0.684153542, 0.572134209, 0.458898505, 0.333028534, 0.241195287, 0.151571722,
             0.101859595, 0.049791118, 0.030939293, 0.01]  # fmt: skip
    assert times.tolist() == pytest.approx(known, rel=1e-6)


def test_particles_of_one_sequence_have_numbers_of_their_own(ref: Any) -> None:
    """And a run's states are shown as they will be: given positions with their tokens from the first on."""
    graph, x, given = ref.StructuredUniform(4), torch.tensor([[3, 0]]), torch.tensor([[True, False]])
    score = ref.ExactScore(ref.random_data(4, 2), graph.Q)
    ends = list(itertools.pairwise(torch.tensor(t, dtype=torch.float64) for t in (1.0, 0.5, 0.0)))
    how: dict[str, Any] = {"x": x, "given": given, "seeds": torch.tensor([2]), "method": Tweedie(), "denoise": True}
    states = list(Particles(8).run(score, graph, ref.Linear(3.0), ends=ends, **how))
    assert [tuple(state.shape) for state in states] == [(1, 2)] * 3
    assert all(state[0, 0] == 3 for state in states)
    crowd = list(Particles(8).population(score, graph, ref.Linear(3.0), ends=ends, **how))
    assert [tuple(each.shape) for each, _ in crowd] == [(1, 8, 2)] * 3
    assert all(float(weight.exp().sum()) == pytest.approx(1.0) for _, weight in crowd)
    assert len(crowd[0][0][0, :, 1].unique()) > 1
    assert (crowd[2][0][0, :, 0] == 3).all()
    assert states[0][0, 1] == crowd[0][0][0, 0, 1]
    assert states[2][0, 1] in crowd[2][0][0, :, 1]


def test_a_particle_is_drawn_by_its_weight_where_a_run_ends_and_not_before(ref: Any) -> None:
    """On the way the first one of each sequence is shown; of thirty sequences some end with another."""
    graph, x = ref.StructuredUniform(4), torch.tensor([[3, 0, 0]]).repeat(30, 1)
    score, given = ref.ExactScore(ref.random_data(4, 3), graph.Q), torch.tensor([[True, False, False]]).repeat(30, 1)
    ends = list(itertools.pairwise(torch.tensor(t, dtype=torch.float64) for t in (1.0, 0.7, 0.4, 0.1, 0.0)))
    how: dict[str, Any] = {"x": x, "given": given, "seeds": torch.arange(30), "method": Tweedie(), "denoise": True}
    shown = list(Particles(4).run(score, graph, ref.Linear(3.0), ends=ends, **how))
    crowd = [states for states, _ in Particles(4).population(score, graph, ref.Linear(3.0), ends=ends, **how)]
    for state, particles in zip(shown[:-1], crowd[:-1], strict=True):
        assert torch.equal(state[:, 1:], particles[:, 0, 1:])
    assert (crowd[-1] == shown[-1][:, None]).all(2).any(1).all()
    assert not torch.equal(crowd[-1][:, 0], shown[-1])


def test_particles_are_drawn_anew_below_their_threshold_and_beyond_no_last_one() -> None:
    """At the threshold they stay; a tooth at the end of the comb is the last one's, whatever the sum is rounded to."""
    half, nothing = torch.full((1, 4), 0.5, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64)
    u = torch.tensor([0.5], dtype=torch.float64)
    assert torch.equal(Particles(4, 1.0)._resample(half, nothing, u)[1], half)
    one = torch.tensor([[0.0, -90.0, -90.0, -90.0]], dtype=torch.float64)
    for threshold, parents in ((0.0, [0, 1, 2, 3]), (0.25, [0, 1, 2, 3]), (0.26, [0, 0, 0, 0])):
        assert Particles(4, threshold)._resample(one, nothing, u)[0].tolist() == parents
    weight = torch.rand(400, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log()
    assert (weight.softmax(1).sum(1) < 1).any()
    last = torch.full((400,), 1 - 2.0**-53, dtype=torch.float64)
    parent, _ = Particles(7, 1.0)._resample(weight, torch.zeros_like(weight), last)
    assert torch.equal(parent.view(400, 7)[:, -1], 7 * torch.arange(400) + 6)


def test_a_hopeless_particle_weighs_a_number_in_any_precision() -> None:
    for dtype in (torch.float32, torch.float64):
        found = infilling._log(torch.tensor([0.0, 1.0, 0.25], dtype=dtype))
        assert found.tolist() == pytest.approx([math.log(torch.finfo(dtype).tiny), 0.0, math.log(0.25)], rel=1e-6)


def test_bridges_are_made_in_pieces_of_two_rows_a_state() -> None:
    graph: Any = SimpleNamespace(num_states=2**18)  # of float64 numbers, and as many again beside them
    pieces = infilling._pieces(5, graph, torch.device("cpu"))
    assert [(part.start, part.stop) for part in pieces] == [(0, 2), (2, 4), (4, 6)]


def test_a_bridge_that_no_path_leads_over_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a token to another, which masks do not allow; where reading waits, at the next read."""
    graph = Masking(6, MASK)
    x, tokens, t = torch.tensor([[2]]), torch.tensor([[1]]), torch.tensor([0.9], dtype=torch.float64)
    reverse = Reverse(from_logits(flat, graph), graph, NOISE, frozen=torch.tensor([[True]]), seeds=torch.tensor([0]))
    model = infilling._given_rows(reverse, x, tokens, t, t / 2)

    def bridge() -> Tensor:
        return infilling._bridge(reverse, x, tokens, model, torch.arange(1), t, t / 2)[0]

    with pytest.raises(ValueError, match=r"row 0 of the probabilities sums to 0\.0"):
        bridge()
    for module in ("reverse", "randomness"):
        monkeypatch.setattr(f"sedd_samplers.{module}.reading_waits", lambda device: True)
    assert bridge().tolist() == [[1]]
    with pytest.raises(ValueError, match=r"row 0 of the probabilities sums to 0\.0"):
        reverse.finish()
    reverse.finish()  # told once


@pytest.mark.parametrize("denoise", [False, True])
def test_particles_leave_masks_where_their_run_ends_in_noise(denoise: bool) -> None:
    graph, x = Masking(6, MASK), torch.ones(30, 3, dtype=torch.int64)
    given = torch.tensor([[True, False, False]]).expand_as(x)
    out = infill(from_logits(flat, graph), graph, NOISE, x=x, given=given, steps=2, t_min=0.5, denoise=denoise,
                 conditioning=Particles(3), seeds=range(30))  # fmt: skip
    assert bool((out == MASK).any()) != denoise
    assert (out[:, 0] == 1).all()


# --- what is said ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["num_states", "mask_id", "rates_into", "propagate"])
def test_a_graph_without_a_part_is_told_which(name: str) -> None:
    parts = dict.fromkeys(("num_states", "mask_id", "rates_into", "propagate"), 1)
    check_graph(SimpleNamespace(**parts))
    del parts[name]
    with pytest.raises(ValueError, match=f"the graph, a SimpleNamespace, has no {name}: see"):
        check_graph(SimpleNamespace(**parts))
    with pytest.raises(ValueError, match="got the class Masking"):
        check_graph(Masking)


def test_values_are_read_on_a_cpu_and_elsewhere_when_something_is_known_to_be_wrong() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert not reading_waits(cpu)
    assert reading_waits(gpu)
    with at_once():
        assert not reading_waits(cpu)
        assert not reading_waits(gpu)
        with at_once():
            assert not reading_waits(gpu)
        assert not reading_waits(gpu)
    assert reading_waits(gpu)
    with pytest.raises(KeyError), at_once():
        raise KeyError
    assert reading_waits(gpu)


def test_a_bar_is_called_after_what_it_counts(capsys: pytest.CaptureFixture[str]) -> None:
    """Three steps and the denoise; nothing where nobody asks."""
    graph = Masking(6, MASK)
    x = torch.zeros(2, 4, dtype=torch.int64)
    how: dict[str, Any] = {"x": x, "given": x > 0, "steps": 3, "seeds": [0, 1]}
    sample(flat, graph, NOISE, shape=(2, 4), steps=3)
    infill(flat, graph, NOISE, **how)
    generate(flat, graph, NOISE, block_size=4, **how)
    causal: dict[str, Any] = {"start": 0, "num_states": 6, "seeds": [0, 1]}
    sample_left_to_right(lambda x: flat(x, x), shape=(2, 4), **causal)
    continue_left_to_right(lambda x: flat(x, x), x=x, given=x > 0, **causal)
    assert not capsys.readouterr().err
    for run, said in (
        (lambda: sample(flat, graph, NOISE, shape=(2, 4), steps=3, progress=True), "sampling"),
        (lambda: infill(flat, graph, NOISE, progress=True, **how), "sampling"),
        (lambda: generate(flat, graph, NOISE, block_size=4, progress=True, **how), "generating"),
        (lambda: sample_left_to_right(lambda x: flat(x, x), shape=(2, 4), progress=True, **causal), "sampling"),
        (
            lambda: continue_left_to_right(lambda x: flat(x, x), x=x, given=x > 0, progress=True, **causal),
            "sampling",
        ),
    ):
        run()  # type: ignore[no-untyped-call]
        shown = capsys.readouterr().err
        assert shown.startswith(f"\r{said}:   0%")
        assert "| 4/4 [" in shown


@pytest.mark.parametrize("function", [sample, infill])
def test_options_are_those_of_the_function_that_was_called(function: Any) -> None:
    x = torch.zeros(1, 2, dtype=torch.int64)
    how: dict[str, Any] = {"shape": (1, 2)} if function is sample else {"x": x, "given": x > 0}
    for name, meant in (("n_steps", "you may mean steps="), ("sampler", "you may mean method="), ("of", "Its options")):
        with pytest.raises(TypeError, match=f"{function.__name__} has no option '{name}'.*{meant}.*log_probs$"):
            function(flat, Masking(6, MASK), NOISE, **how, **{name: 1})


def test_prompts_and_lengths_are_made_where_they_are_asked_for() -> None:
    for device in ("meta", torch.device("meta")):
        x, given = pad_prompts([[1], []], 3, device=device)
        assert x.device == given.device == torch.device("meta")
    x, given = pad_prompts([[1, 2], []], 3)
    assert (x.dtype, x.tolist()) == (torch.int64, [[1, 2, 0], [0, 0, 0]])
    assert (given.dtype, given.int().tolist()) == (torch.bool, [[1, 1, 0], [0, 0, 0]])
    assert draw_lengths(torch.tensor([0, 0, 3, 0]), [1, 2]).tolist() == [3, 3]
    assert draw_lengths(torch.tensor([0.0, 2.0]), torch.tensor([5])).dtype == torch.int64


@pytest.mark.parametrize("graph", [Masking(4, 1), Replacing(4)])
def test_a_run_begins_with_the_limit_of_the_process(graph: Any) -> None:
    law = limit_law(graph, torch.device("cpu"))
    assert law.dtype == torch.float64
    assert law.tolist() == ([0.0, 1.0, 0.0, 0.0] if graph.mask_id == 1 else [0.25] * 4)


# --- what is shown ---------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def written(monkeypatch: pytest.MonkeyPatch, states: list[State], size: tuple[int, int], **how: Any) -> list[str]:
    """The frames on a terminal of that many columns and lines."""
    monkeypatch.setattr(shutil, "get_terminal_size", lambda fallback=(80, 24): os.terminal_size(size))
    stream = Terminal()
    list(live(states, lambda token: "abcdef"[token], stream=stream, every=0, **how))
    return stream.getvalue().split("\r\x1b[J")[1:]


def course(*texts: list[int]) -> list[State]:
    steps = len(texts) - 1
    return [State(torch.tensor([text]), 1 - k / steps, k, steps) for k, text in enumerate(texts)]


def test_frames_are_these_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of 20 blocks that fill up, the text below it, and the next frame over both."""
    frames = written(monkeypatch, course([5, 5], [5, 0], [1, 0], [1, 2]), (60, 9), mask_id=5)
    dim, fresh, plain, up = "\x1b[2m", "\x1b[1;32m", "\x1b[0m", "\x1b[2A"
    full, mask = "\u2588", f"{dim}\u2591{plain}"
    texts = [mask + mask, f"{mask}{fresh}a{plain}", f"{fresh}b{plain}a", f"b{fresh}c{plain}"]
    for k, (filled, t) in enumerate(((0, "1.000"), (7, "0.667"), (13, "0.333"), (20, "0.000"))):
        head = f"\x1b[1mstep {k}/3  t = {t}{plain} {full * filled}{dim}{full * (20 - filled)}{plain}"
        assert frames[k] == f"{head}\n{texts[k]}\n{up * (k < 3)}"


def test_a_terminal_has_20_columns_and_4_lines_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them for text where more follows; of 25 columns 6 are left to the bar, which begins with a space."""
    small = written(monkeypatch, course([0] * 70, [1] * 70), (3, 2))[0]
    assert small.count("a") == 20
    assert "\u2026 3 more lines" in small
    assert small.startswith("\x1b[1mstep 0/1  t = 1.000\x1b[0m \x1b[2m\x1b[0m\n")
    fits = written(monkeypatch, course([0] * 40, [1] * 40), (20, 4))[0]
    assert fits.count("a") == 40
    assert "more lines" not in fits
    assert written(monkeypatch, course([0], [1]), (25, 9))[1].count("\u2588") == 5


def test_a_terminal_is_as_wide_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the number of its file; where it has none, or it is no terminal's, as wide as the environment says."""
    asked = list[int]()

    def size(number: int) -> os.terminal_size:
        asked.append(number)
        if number == 8:
            raise OSError
        return os.terminal_size((30, 9))

    monkeypatch.setattr(os, "get_terminal_size", size)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda fallback=(80, 24): os.terminal_size((40, 9)))
    for number, width in ((7, 30), (8, 40), (None, 40)):
        stream: Any = Terminal()
        if number is not None:
            stream.fileno = lambda number=number: number
        list(live(course([0] * 80, [0] * 80), "abc".__getitem__, stream=stream, every=0))
        text = stream.getvalue().split("\r\x1b[J")[1].split("\n")[1:-1]
        assert {len(line) for line in text} - {20} == {width}
    assert {*asked} == {7, 8}


def test_a_page_holds_these_data(tmp_path: Path) -> None:
    """The first rows, the changes of each step, the characters of what is seen, and what was given."""
    texts = [[[5, 1], [5, 5], [0, 0]], [[2, 1], [5, 5], [0, 0]], [[2, 1], [3, 0], [1, 1]]]
    states = [State(torch.tensor(x), 1 - k / 2, k, 2) for k, x in enumerate(texts)]
    given = torch.tensor([[False, True], [False, False], [True, True]])
    path = tmp_path / "page.html"
    seen = list(record(states, path, "abcdef".__getitem__, mask_id=5, given=given, rows=2, title="<A>"))
    assert all(one is other for one, other in zip(seen, states, strict=True))
    page = path.read_text(encoding="utf-8")
    found = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    assert json.loads(found[1]) == {
        "t": [1.0, 0.5, 0.0],
        "start": [[5, 1], [5, 5]],
        "changes": [[[0], [0], [2]], [[1, 1], [0, 1], [3, 0]]],
        "mask": 5,
        "text": {"0": "a", "1": "b", "2": "c", "3": "d"},
        "given": [[0, 1], [0, 0]],
    }
    assert page.count("<title>&lt;A&gt;</title>") == page.count("<h1>&lt;A&gt;</h1>") == 1


def test_a_page_that_cannot_be_written_at_the_end_is_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for state in record(course([5], [1]), path, str):
            if state.step == 1:
                path.unlink()
                path.mkdir()
    assert [str(each.message)[:9] for each in seen] == ["the page "]
    assert "could not be written" in str(seen[0].message)


@pytest.mark.parametrize(
    ("characters", "shown", "columns"),
    [
        ("ab", "ab", 2),
        ("e\u0301x", "e\u0301x", 2),  # an accent stands over its letter
        ("\u4e16", "\u4e16", 2),
        ("\uff21", "\uff21", 2),
        ("\u00e9", "\u00e9", 1),
        ("a\r\nb\nc\rd\te", "a\u23ceb\u23cec\u23ced\u21e5e", 9),
        ("\x1b[2J\x07\x00", "\ufffd[2J\ufffd\ufffd", 6),
        ("a b\u00a0c", "a b\ufffdc", 5),
        ("", "", 0),
    ],
)
def test_characters_take_their_columns(
    characters: str, shown: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none of them moves the cursor: 40 times the same are as many lines of 20 as that takes."""
    monkeypatch.setattr(shutil, "get_terminal_size", lambda fallback=(80, 24): os.terminal_size((20, 99)))
    stream = Terminal()
    list(live(course([0] * 40, [0] * 40), lambda token: characters, stream=stream, every=0))
    text = stream.getvalue().split("\r\x1b[J")[1].split("\n", 1)[1]
    assert text.replace("\n", "").startswith(shown * 40)
    assert text.count("\n") == max(1, math.ceil(40 * columns / 20)) or "\u4e16" in characters or "\uff21" in characters
    if not columns % 2:
        assert text.count("\n") == max(1, 2 * columns)
