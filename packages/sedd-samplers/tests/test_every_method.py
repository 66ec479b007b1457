"""What holds of every method, each asked the same: sequences by themselves, levels of noise, calls, blocks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sedd_samplers import (
    Ancestral,
    ByConfidence,
    ConfidenceUnmasking,
    EntropyBoundRenoising,
    Euler,
    FirstHitting,
    LeaveOneOut,
    Particles,
    PathPlanning,
    PredictorCorrector,
    Psi,
    Remasking,
    Reverse,
    TauLeaping,
    Trapezoidal,
    Tweedie,
    Uniformization,
    Unmasking,
    adaptive_grid,
    at_rate,
    blockwise,
    clamped,
    confidence,
    entropy,
    entropy_bound,
    generate,
    infill,
    margin,
    threshold,
    trajectory,
)
from sedd_samplers.adapters import from_logits
from sedd_samplers.adapters.processes import Masking, Replacing
from sedd_samplers.autoregressive import continue_left_to_right, left_to_right
from sedd_samplers.controls import allowed_tokens, controlled, repetition_penalty, top_k
from sedd_samplers.steps import final_denoise
from sedd_samplers.testing._enumerated import Enumerating
from torch import Tensor

N, MASK = 6, 2
STATES = torch.arange(N).double()


def planner(x: Tensor, sigma: Tensor) -> Tensor:
    return 2 * torch.cos(x.sum(1)[:, None, None] * 1.1 + x[..., None] * STATES) + sigma[:, None, None]


def lively(x: Tensor, sigma: Tensor) -> Tensor:
    """A score of no law, which depends on all of the sequence and on its noise."""
    near = torch.roll(x, 1, 1) + 2 * torch.roll(x, -1, 1)
    wave = torch.sin(near[..., None] + STATES + 0.7 * x.sum(1)[:, None, None] + sigma[:, None, None])
    return wave - torch.log(torch.expm1(sigma.double()))[:, None, None] - 1.6


MASKS: dict[str, Any] = {
    "unmasking": Unmasking(),
    "first hitting": FirstHitting(),
    "remasking": Remasking(at_rate(1.5)),
    "confidence": ConfidenceUnmasking(),
    "confidence, disturbed, of two": ConfidenceUnmasking(confidence, randomness=1.0, controls=(top_k(2),)),
    "margin": ConfidenceUnmasking(margin),
    "threshold": ConfidenceUnmasking(rule=threshold(0.45)),
    "entropy bound": ConfidenceUnmasking(entropy, rule=entropy_bound(1.2)),
    "by confidence": ByConfidence(at_rate(1.5)),
    "path planning": PathPlanning(planner, 0.8),
    "path planning, draft": PathPlanning(planner, 1.2, reads_draft=True),
}
ANY: dict[str, Any] = {
    "Euler": Euler(),
    "tau-leaping": TauLeaping(),
    "Tweedie": Tweedie(),
    "ancestral": Ancestral(),
    "trapezoidal": Trapezoidal(0.4),
    "uniformization": Uniformization(slack=3.0),
    "corrected": PredictorCorrector(),
    "corrected twice": PredictorCorrector(Trapezoidal(), corrections=2, ratio=0.3),
    "superposition": Psi(lambda t: 1 - t / 2),
}
NOISED: dict[str, Any] = {
    "one out": LeaveOneOut(share=0.5, corrections=2),
    "renoising": EntropyBoundRenoising(1.5, confident=1.2),
}
EACH = [
    *((Masking(N, MASK), name) for name in MASKS | ANY),
    *((Replacing(N), name) for name in ANY | NOISED if name != "uniformization"),  # which takes its time
]


def noise(t: Tensor) -> tuple[Tensor, Tensor]:
    """No number at one time is that at another, nor in proportion."""
    return 2 * t + t**2, 2 + 2 * t


def method_of(name: str) -> Any:
    return (MASKS | ANY | NOISED)[name]


X = torch.tensor([[2, 2, 1, 2, 0], [2, 3, 2, 4, 2], [5, 5, 5, 5, 5], [2, 2, 2, 2, 2]])
FROZEN = torch.tensor([[0, 0, 1, 0, 0], [0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
T = torch.tensor([0.9, 0.6, 0.8, 0.7], dtype=torch.float64)
S = torch.tensor([0.2, 0.3, 0.1, 0.25], dtype=torch.float64)


@pytest.mark.parametrize(("graph", "name"), EACH)
def test_a_sequence_at_its_own_times_moves_as_it_would_alone(graph: Any, name: str) -> None:
    """Two steps in a row, of four sequences of which no two have a time in common; one is given throughout."""

    def steps(rows: list[int]) -> Tensor:
        reverse = Reverse(lively, graph, noise, frozen=FROZEN[rows], seeds=torch.tensor([3, 1, 4, 1])[rows])
        x, t, s = X[rows].clone(), T[rows], S[rows]
        method = method_of(name)
        x = method(reverse, x, t, s)
        x = method(reverse, x, s, s / 3)
        return final_denoise(reverse, x, s / 3)

    together = steps([0, 1, 2, 3])
    assert torch.equal(together[FROZEN], X[FROZEN])
    for rows in ([0], [2], [3, 1]):
        assert torch.equal(steps(rows), together[rows])


LEVELS = {  # of one step from t to s, as multiples of t - s before t; the others are asked at t alone
    "trapezoidal": [0.0, 0.4],
    "corrected": [0.0, 1.0],
    "corrected twice": [0.0, 0.5, 1.0, 1.0],
    "one out": [0.0, 1.0, 1.0],
}


@pytest.mark.parametrize(
    ("graph", "name"), [each for each in EACH if "hitting" not in each[1] and "uniformi" not in each[1]]
)
def test_a_model_is_asked_at_these_levels_of_noise(graph: Any, name: str) -> None:
    asked = list[Tensor]()

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        asked.append(sigma)
        return lively(x, sigma)

    reverse = Reverse(score, graph, noise, frozen=torch.zeros(1, 9).bool(), seeds=torch.tensor([5]))
    method_of(name)(reverse, torch.full((1, 9), MASK), T[:1], S[:1])
    expected = [noise(T[:1] - part * (T[:1] - S[:1]))[0].float() for part in LEVELS.get(name, [0.0])]
    torch.testing.assert_close(torch.cat(asked), torch.cat(expected))


@pytest.mark.parametrize("name", ["first hitting", "uniformization"])
def test_an_exact_method_asks_between_the_levels_of_its_step(name: str) -> None:
    asked = list[Tensor]()

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        asked.append(sigma)
        return lively(x, sigma)

    reverse = Reverse(score, Masking(N, MASK), noise, frozen=torch.zeros(1, 9).bool(), seeds=torch.tensor([5]))
    method_of(name)(reverse, torch.full((1, 9), MASK), T[:1], S[:1])
    levels = torch.cat(asked)
    assert (levels <= noise(T[:1])[0].float()).all()
    assert (levels >= noise(S[:1])[0].float()).all()
    assert len(levels.unique()) > 2
    if name == "first hitting":
        assert (levels.diff() < 0).all()


@pytest.mark.parametrize(("graph", "name"), EACH)
def test_a_sequence_that_is_given_throughout_is_not_asked_about(graph: Any, name: str) -> None:
    """Nor anything where all are; the others by their numbers in the run."""
    asked = set[int]()

    def told(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        asked.update(rows.tolist())
        return lively(x, sigma)

    score: Any = told

    x = X.clamp(min=3)  # tokens under both graphs
    how: dict[str, Any] = {"steps": 3, "t_min": 0.05, "method": method_of(name), "conditioning": clamped}
    out = infill(score, graph, noise, x=x, given=FROZEN, seeds=range(4), **how)
    assert asked == {0, 1, 3}
    assert torch.equal(out[FROZEN], x[FROZEN])
    assert graph.mask_id is None or not (out == MASK).any()
    asked.clear()
    assert torch.equal(infill(score, graph, noise, x=x, given=FROZEN | True, seeds=range(4), **how), x)
    assert not asked


@pytest.mark.parametrize("name", [name for name in MASKS | ANY if name != "uniformization"])
def test_blocks_that_see_nothing_of_each_other_are_the_same_absent_or_masked(name: str) -> None:
    """Of tokens that do not depend on each other, behind given ones, in blocks of 3 with the last one shorter."""
    graph = Masking(N, MASK)
    table = torch.randn(8, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        law = table[: x.shape[1]].index_fill(1, torch.tensor([MASK]), -torch.inf).log_softmax(-1)
        return law.expand(len(x), -1, -1) - torch.log(torch.expm1(sigma.double()))[:, None, None]

    method: Any = method_of(name)
    if isinstance(method, PathPlanning):
        method = PathPlanning(lambda x, sigma: table[: x.shape[1]].expand(len(x), -1, -1), method.eta)
    x, given = torch.full((3, 8), 4), torch.arange(8) < torch.tensor([[0], [1], [4]])
    how: dict[str, Any] = {"x": x, "given": given, "block_size": 3, "steps": 2, "t_min": 0.05, "method": method,
                           "seeds": range(3)}  # fmt: skip
    runs = [list(blockwise(score, graph, noise, growing=growing, **how)) for growing in (False, True)]
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one.x, other.x)
        assert (one.t, one.step, one.steps) == (other.t, other.step, other.steps)
        assert torch.equal(one.x[given], x[given])
        done = 3 * (one.step // 3)
        assert not (one.x[:, :done] == MASK).any()
    assert not (runs[0][-1].x == MASK).any()


def test_a_block_of_given_positions_takes_no_step() -> None:
    """Nor one in which all that are not finished have nothing left; steps are counted as if it did."""
    calls = list[int]()

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(len(x))
        return lively(x, sigma)

    x, given = torch.full((2, 6), 4), torch.tensor([[0, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]]).bool()
    run = blockwise(score, Masking(N, MASK), noise, x=x, given=given, block_size=2, steps=1, t_min=0.1, seeds=[0, 1])
    assert [state.step for state in run] == [0, 1, 2, 5, 6]
    assert calls[0] == 1
    until = lambda state: torch.tensor([True, state.step > 0])  # noqa: E731
    run = blockwise(score, Masking(N, MASK), noise, x=x, given=given, block_size=2, steps=1, t_min=0.1, seeds=[0, 1],
                    until=until, pad_id=0)  # fmt: skip
    assert [state.step for state in run] == [0, 5, 6]


def test_what_is_finished_stays_so_whatever_is_said_of_it_later() -> None:
    """In every loop: of two sequences one is finished after a step, and then said not to be."""
    said = lambda state: torch.tensor([state.step == 1, False])  # noqa: E731
    graph, x = Masking(N, MASK), torch.zeros(2, 6, dtype=torch.int64)
    run: Any = trajectory(lively, graph, noise, x=x, given=x > 0, steps=4, t_min=0.1, seeds=[0, 1], until=said)
    states = [state.x for state in run]
    assert all(torch.equal(later[0], states[1][0]) for later in states[1:])
    assert not (states[-1][1] == MASK).any()
    run = blockwise(lively, graph, noise, x=x, given=x > 0, block_size=1, steps=1, denoise=False, t_min=0.1, pad_id=3,
                    seeds=[0, 1], until=said, method=FirstHitting())  # fmt: skip
    states = [state.x for state in run]
    assert states[-1][0, 1:].tolist() == [3] * 5
    assert not (states[-1][1] == MASK).all()
    run = left_to_right(lambda x: torch.zeros(*x.shape, 4), x=x, given=x > 0, start=0, num_states=4, seeds=[0, 1],
                        until=said)  # fmt: skip
    states = [state.x for state in run]
    assert states[-1][0, 1:].tolist() == [-1] * 5
    assert (states[-1][1] >= 0).all()


@pytest.mark.parametrize(("graph", "name"), EACH)
def test_what_is_said_of_positions_that_do_not_move_is_nothing(graph: Any, name: str) -> None:
    """No number at given ones, nor at tokens under absorption, with static shapes: the same sample, and no error."""
    x = X.clamp(min=3)

    def spoilt(x: Tensor, sigma: Tensor, rows: Tensor | None = None) -> Tensor:
        fixed = FROZEN if rows is None else FROZEN[rows]
        if graph.mask_id is not None and not moves_tokens:
            fixed = fixed | (x != MASK)
        return lively(x, sigma).masked_fill(fixed[..., None], torch.nan)

    method, score = method_of(name), lively
    moves_tokens = isinstance(method, PredictorCorrector | Psi)  # under any graph
    how: dict[str, Any] = {"x": x, "given": FROZEN, "steps": 3, "t_min": 0.05, "method": method, "seeds": range(4),
                           "conditioning": clamped}  # fmt: skip
    expected = infill(score, graph, noise, **how)
    assert torch.equal(infill(spoilt, graph, noise, static_shapes=True, **how), expected)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", ["Tweedie", "unmasking", "confidence", "by confidence"])
def test_a_constraint_is_none_on_what_is_given(name: str, static: bool) -> None:
    """A prompt's own token may be one that is not allowed at its place; a mask's that leaves nothing is told."""
    graph, given = Masking(N, MASK), torch.tensor([[True, False, False]])
    allowed = torch.ones(3, N, dtype=torch.bool)
    allowed[0, 4] = False
    score = from_logits(planner, graph, controls=[allowed_tokens(allowed)])
    how: dict[str, Any] = {"x": torch.full((1, 3), 4), "given": given, "steps": 2, "static_shapes": static}
    controls = (allowed_tokens(allowed),)
    plain = from_logits(planner, graph)
    methods = {"confidence": ConfidenceUnmasking(controls=controls)}
    assert infill(score, graph, noise, method=method_of(name), **how)[0, 0] == 4
    assert infill(controlled(plain, graph, *controls), graph, noise, method=method_of(name), **how)[0, 0] == 4
    assert infill(plain, graph, noise, method=methods.get(name, method_of(name)), **how)[0, 0] == 4
    allowed[1] = torch.arange(N) == MASK
    with pytest.raises(ValueError, match="the controls leave no token at sequence 0, position 1"):
        infill(score, graph, noise, method=method_of(name), **how)


@pytest.mark.parametrize("loop", ["trajectory", "blocks", "left to right", "particles"])
def test_a_state_that_was_shown_does_not_change_any_more(loop: str) -> None:
    """Whoever keeps all states of a run has all states of a run; nor does what was given to it."""
    x, given = torch.full((2, 5), 4), torch.tensor([[True, False, False, False, False]] * 2)
    how: dict[str, Any] = {"x": x, "given": given, "seeds": [0, 1]}
    before = x.clone(), given.clone()
    runs: dict[str, Any] = {
        "trajectory": lambda: trajectory(lively, Masking(N, MASK), noise, steps=4, t_min=0.1, log_probs=True, **how),
        "blocks": lambda: blockwise(lively, Masking(N, MASK), noise, block_size=2, end_id=3, log_probs=True, **how),
        "left to right": lambda: left_to_right(lambda x: torch.zeros(*x.shape, 5), start=0, num_states=5, **how),
        "particles": lambda: trajectory(
            lively, Replacing(N), noise, steps=3, t_min=0.1, conditioning=Particles(4), **how
        ),
    }
    kept, copies = list[Any](), list[Any]()

    def parts(state: Any) -> list[Tensor]:
        return [part for part in vars(state).values() if isinstance(part, Tensor)]

    for state in runs[loop]():
        kept.append(state)
        copies.append([part.clone() for part in parts(state)])
    assert len(kept) > 3
    for state, copy in zip(kept, copies, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(parts(state), copy, strict=True))
    assert len({tuple(state.x.flatten().tolist()) for state in kept}) > 1
    assert torch.equal(x, before[0])
    assert torch.equal(given, before[1])


@pytest.mark.parametrize("name", [name for name in MASKS | ANY if name != "uniformization"])
def test_at_another_rate_of_absorption_the_clock_is_another(name: str, ref: Any) -> None:
    """At the rate 4 and a fourth of the noise the process is the same, and so is what is drawn."""
    graph, of_rate = ref.absorbing_matrix(N - 1, MASK), ref.MatrixGraph(4 * ref.absorbing_matrix(N - 1, MASK).Q, MASK)
    method = method_of(name)
    slow: Any = method
    if isinstance(method, Remasking | ByConfidence):  # at a rate of its own, of the noise
        slow = type(method)(at_rate(6.0))
    if isinstance(method, PathPlanning):
        quick = lambda x, sigma: planner(x, 4 * sigma.double())  # noqa: E731
        slow = PathPlanning(quick, method.eta, reads_draft=method.reads_draft)
    how: dict[str, Any] = {"x": X.clamp(min=3), "given": FROZEN, "steps": 4, "t_min": 0.1, "seeds": range(4)}
    one = infill(lively, graph, noise, method=method, **how)
    quarter = lambda t: tuple(part / 4 for part in noise(t))  # noqa: E731
    other = infill(lambda x, sigma: lively(x, 4 * sigma.double()), of_rate, quarter, method=slow, **how)  # type: ignore[arg-type]
    assert torch.equal(one, other)


@pytest.mark.parametrize("method", [Remasking, ByConfidence])
def test_a_share_of_tokens_is_taken_back_up_to_all_that_may_be(method: Any) -> None:
    """r_max, which is 1 where more masks are due than there are tokens; above it and below 0 is no share."""
    x, t = torch.tensor([[4, MASK, 3, 1]]).repeat(3, 1), torch.tensor([0.9, 0.5, 0.05], dtype=torch.float64)
    new = lambda: Reverse(lively, Masking(N, MASK), noise, frozen=x < 0, seeds=torch.arange(3))  # noqa: E731
    most = list[Tensor]()

    def all_of_it(sigma_t: Tensor, sigma_s: Tensor, r_max: Tensor) -> Tensor:
        most.append(r_max)
        return r_max

    method(all_of_it)(new(), x, t, t / 2)
    later, now = (-torch.expm1(-noise(time)[0]) for time in (t / 2, t))
    torch.testing.assert_close(most[0], (later / (1 - now)).clamp(max=1))
    assert most[0].max() == 1
    assert most[0].min() < 1
    method(lambda sigma_t, sigma_s, r_max: 0 * r_max)(new(), x, t, t / 2)
    for wrong in (lambda t, s, r: r * (1 + 1e-9), lambda t, s, r: 0 * r - 1e-9):
        with pytest.raises(ValueError, match=r"the remasking schedule must stay within \[0, r_max\], got \["):
            method(wrong)(new(), x, t, t / 2)


def test_one_out_is_not_redrawn_where_no_noise_is_left() -> None:
    """Of two sequences one ends at none: the other alone is asked about again."""
    asked = list[list[int]]()

    def told(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        asked.append(rows.tolist())
        return lively(x, sigma)

    score: Any = told
    reverse = Reverse(score, Replacing(N), noise, frozen=torch.zeros(2, 3).bool(), seeds=torch.tensor([0, 1]))
    x, t = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0.5, 0.5], dtype=torch.float64)
    LeaveOneOut(share=1.0, corrections=2)(reverse, x, t, torch.tensor([0.0, 0.2], dtype=torch.float64))
    assert asked == [[0, 1], [1], [1]]


def test_a_planner_is_told_its_noise_in_float32_and_may_lack_a_column() -> None:
    """Of the mask, which no token is: what it says of it does not count either."""
    graph, seen = Masking(N, N - 1), list[torch.dtype]()

    def wide(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(sigma.dtype)
        return planner(x, sigma)

    x = torch.zeros(4, 5, dtype=torch.int64)
    how: dict[str, Any] = {"x": x, "given": x > 0, "steps": 4, "t_min": 0.1, "seeds": range(4)}
    expected = infill(lively, graph, noise, method=PathPlanning(wide), **how)
    assert {*seen} == {torch.float32}
    louder = PathPlanning(lambda x, sigma: planner(x, sigma) + 50.0 * (torch.arange(N) == N - 1))
    for other in (PathPlanning(lambda x, sigma: planner(x, sigma)[..., :-1]), louder):
        assert torch.equal(infill(lively, graph, noise, method=other, **how), expected)


@pytest.mark.parametrize(("graph", "name"), EACH)
def test_all_is_made_where_the_states_are(graph: Any, name: str, ref: Any) -> None:
    how: dict[str, Any] = {"x": X.clamp(min=3), "given": FROZEN, "times": torch.tensor([1.0, 0.6, 0.3, 0.05]),
                           "method": method_of(name), "conditioning": clamped, "seeds": torch.arange(4)}  # fmt: skip
    expected = list(trajectory(lively, graph, noise, log_probs=True, **how))
    with ref.Elsewhere():
        plain = infill(lively, graph, noise, batch_size=3, **how)
        found = list(trajectory(lively, graph, noise, static_shapes=True, log_probs=True, **how))
    assert torch.equal(plain, expected[-1].x)
    assert all(torch.equal(one.x, other.x) for one, other in zip(found, expected, strict=True))
    assert found[-1].log_prob is not None
    torch.testing.assert_close(found[-1].log_prob, expected[-1].log_prob)


ELSEWHERE: dict[str, Any] = {
    "particles": lambda **how: infill(
        lively, Replacing(N), noise, conditioning=Particles(4), times=torch.tensor([1.0, 0.5, 0.1]), **how
    ),
    "blocks": lambda **how: generate(
        lively, Masking(N, MASK), noise, block_size=2, end_id=4, times=torch.tensor([1.0, 0.5, 0.1]), log_probs=True,
        until=lambda state: state.x[:, 0] == 0, batch_size=3, **how
    ),
    "blocks that grow": lambda **how: generate(
        lively, Masking(N, MASK), noise, block_size=2, growing=True, times=torch.tensor([1.0, 0.5, 0.1]), **how
    ),
    "left to right": lambda **how: continue_left_to_right(
        lambda x: (x[..., None] * STATES).cos(), start=X[:, 0], num_states=N, controls=[repetition_penalty(1.5)], **how
    ),
    "a pilot": lambda seeds, **how: adaptive_grid(lively, Masking(N, MASK), noise, target=0.5, t_min=0.1, **how),
}  # fmt: skip


@pytest.mark.parametrize("loop", ELSEWHERE)
def test_every_loop_makes_all_where_the_states_are(loop: str, ref: Any) -> None:
    how: dict[str, Any] = {"x": X.clamp(min=3), "given": FROZEN, "seeds": torch.arange(4)}
    expected = ELSEWHERE[loop](**how)
    with ref.Elsewhere():
        found = ELSEWHERE[loop](**how)
    torch.testing.assert_close(found, expected)


def test_an_extrapolated_rate_below_nothing_is_none() -> None:
    """Of two rates of a state that stood still: 2 (2/3) 2 - 2/3 = 2, and 2 (2/3) 0.1 - 2/3, which is less than 0."""

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        later = torch.tensor([1.0, 2.0, 0.1], dtype=torch.float64).log()
        return torch.where(sigma[:, None, None] > 1.75, 0.0, later).expand(*x.shape, 3)

    x, t = torch.tensor([[0]]), torch.tensor([1.0], dtype=torch.float64)
    run = Enumerating(score, Replacing(3), lambda t: (2 * t, torch.full_like(t, 2.0)), x, [x])
    Trapezoidal()(run, x, t, t / 2)
    expected = torch.tensor([math.exp(-0.5), 1 - math.exp(-0.5), 0.0], dtype=torch.float64)
    torch.testing.assert_close(run.draws[1][0, 0], expected, rtol=1e-6, atol=0)
