"""What is seldom asked for: ties, starts beside prompts, static shapes by hand, loops to their last digit, autocast."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sedd_samplers import (
    ByConfidence,
    ConfidenceUnmasking,
    EntropyBoundRenoising,
    FirstHitting,
    Remasking,
    Reverse,
    Tweedie,
    Unmasking,
    at_rate,
    capped,
    confidence,
    infill,
    noise_grid,
    sample,
    testing,
    threshold,
    token_grid,
    trajectory,
)
from sedd_samplers.adapters import from_logits, from_posterior, from_velocity, to_posterior
from sedd_samplers.adapters.processes import Masking, Proportional, Replacing
from sedd_samplers.controls import controlled, min_p, temperature, top_k, top_p
from sedd_samplers.grids import finite_start
from sedd_samplers.guidance import classifier_free, first_order_ratios
from sedd_samplers.masked import absorption_rate, mask_probability
from sedd_samplers.positions import Positions
from sedd_samplers.precision import fastest_rate
from torch import Tensor

NOISE = Proportional()
N, MASK = 5, 3


def lively(x: Tensor, sigma: Tensor) -> Tensor:
    near = torch.roll(x, 1, 1) + 2 * torch.roll(x, -1, 1)
    wave = torch.sin(near[..., None] + torch.arange(N) + 0.7 * x.sum(1)[:, None, None])
    return wave - torch.log(torch.expm1(sigma))[:, None, None] - 1.6


# --- loops to their last digit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ordinal", "cycle", "clustered", "hybrid"])
def test_the_fastest_rate_is_found_where_others_are_nearly_as_fast(ref: Any, name: str) -> None:
    graph = {
        "ordinal": lambda: ref.ordinal_matrix(6),
        "cycle": lambda: ref.cycle_matrix(4),
        "clustered": lambda: ref.clustered_matrix((0, 0, 1, 1, 2), 3.0, 2.5),
        "hybrid": lambda: ref.hybrid_matrix(4, 0.8, 0.1),
    }[name]()
    fastest = float(torch.linalg.eigvals(graph.Q).abs().max())
    assert fastest_rate(graph) == pytest.approx(fastest, rel=2e-3)


def test_times_of_a_level_are_found_to_twelve_digits() -> None:
    """Of a schedule with a known inverse, at equal steps of its root and at as many tokens a step."""
    root = noise_grid(NOISE, 7, torch.sqrt, t_min=0.01)
    ends = NOISE(torch.tensor([1.0, 0.01], dtype=torch.float64))[0].sqrt()
    levels = torch.linspace(float(ends[0]), float(ends[1]), 8, dtype=torch.float64) ** 2
    torch.testing.assert_close(root, NOISE.time(levels), rtol=1e-12, atol=0)
    tokens = token_grid(NOISE, 10, 4, t_min=1e-3)
    masked = torch.tensor([0.7, 0.4, 0.2], dtype=torch.float64)  # 3, 3, 2 and 2 of 10
    torch.testing.assert_close(tokens[1:-1], NOISE.time(-torch.log1p(-masked)), rtol=1e-12, atol=0)


def test_the_last_finite_noise_is_found_to_the_last_digit() -> None:
    """Infinite from 0.9 on, or with a slope that is; where the first step ends, too, is told."""

    def noise(t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(t < 0.9, t, torch.inf), torch.where(t < 0.85, 1.0, torch.inf)

    times = torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64)
    found = finite_start(noise, times)
    assert found[1:].tolist() == [0.5, 0.1]
    assert 0.85 - 1e-15 < float(found[0]) < 0.85
    with pytest.raises(ValueError, match=r"the noise is not finite at t = 0\.95, where the first step ends"):
        finite_start(noise, torch.tensor([1.0, 0.95], dtype=torch.float64))
    begins = torch.tensor([0.8, 0.5], dtype=torch.float64)
    assert finite_start(noise, begins) is begins


# --- ties ------------------------------------------------------------------------------------------------------------


def test_of_equals_as_many_are_kept_as_are_asked_for() -> None:
    """Two of three by count, two of three by mass; all that are as likely as is asked by share."""
    p, at = torch.tensor([[0.25, 0.125, 0.25, 0.25, 0.125]]), torch.zeros(1, dtype=torch.int64)
    assert int((top_k(2)(p, at, at) > 0).sum()) == 2
    assert int((top_k(4)(p, at, at) > 0).sum()) == 4
    assert int((top_p(0.5)(p, at, at) > 0).sum()) == 2
    assert int((top_p(0.75)(p, at, at) > 0).sum()) == 3
    assert (min_p(0.5)(p, at, at) == p).all()
    assert (min_p(1.0)(p, at, at) > 0).tolist() == [[True, False, True, True, False]]


def test_a_token_as_likely_as_the_threshold_is_taken() -> None:
    """Two of three masks are at one half; none is due by the grid but one."""
    law = torch.tensor([[0.5, 0.5, 0, 0, 0], [0.5, 0.5, 0, 0, 0], [0.4, 0.4, 0.2, 0, 0]], dtype=torch.float64)
    graph = Masking(N, MASK)
    reverse = Reverse(from_posterior(lambda x, sigma: law.expand(len(x), 3, N), graph), graph, NOISE,
                      frozen=torch.zeros(1, 3).bool(), seeds=torch.tensor([0]))  # fmt: skip
    x, t = torch.full((1, 3), MASK), torch.tensor([0.9], dtype=torch.float64)
    after = ConfidenceUnmasking(confidence, rule=threshold(0.5 - 1e-9))(reverse, x, t, t - 0.01)
    assert (after == MASK).tolist() == [[False, False, True]]


# --- starts and prompts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Tweedie(), Unmasking(), ConfidenceUnmasking(), FirstHitting()])
def test_what_is_given_goes_before_what_a_run_starts_from(method: Any) -> None:
    graph, start = Masking(N, MASK), torch.tensor([[0, 1, MASK, 2]])
    x, given = torch.tensor([[4, 4, 4, 4]]), torch.tensor([[True, False, False, False]])
    run = list(trajectory(lively, graph, NOISE, x=x, given=given, start=start, method=method, steps=2, seeds=[3]))
    for state in run:
        assert state.x[0, [0, 1, 3]].tolist() == [4, 1, 2]
    assert run[0].x[0, 2] == MASK
    assert run[-1].x[0, 2] != MASK


def test_tokens_of_a_start_are_taken_for_certain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside one that was drawn with a probability of a quarter, which is the first to be taken back."""
    graph, flipped, flip = Masking(N, MASK), list[Tensor](), Reverse.flip

    def noted(self: Reverse, x: Tensor, where: Tensor, state: int, probability: Tensor) -> Tensor:
        flipped.append(probability)
        return flip(self, x, where, state, 0 * probability)

    monkeypatch.setattr(Reverse, "flip", noted)
    score = from_logits(lambda x, sigma: torch.zeros(*x.shape, N), graph)
    reverse = Reverse(score, graph, NOISE, frozen=torch.zeros(1, 3).bool(), seeds=torch.tensor([1]))
    t = torch.tensor([0.5], dtype=torch.float64)
    x = ByConfidence(capped(0.2))(reverse, torch.tensor([[0, MASK, 1]]), t, t * 1e-9)
    assert (x != MASK).all()
    ByConfidence(capped(0.2))(reverse, x, t, t - 0.1)
    share = torch.tensor([-1.0, -0.25, -1.0], dtype=torch.float64).softmax(0)
    torch.testing.assert_close(flipped[1][0], 0.2 * share, rtol=1e-6, atol=0)


def test_tokens_that_are_given_are_never_taken_back() -> None:
    graph, given = Masking(N, MASK), torch.tensor([[True, False, True, False]] * 30)
    x = torch.full((30, 4), 2)
    for method in (Remasking(at_rate(3.0)), ByConfidence(at_rate(3.0))):
        taken = False
        before = None
        for state in trajectory(lively, graph, NOISE, x=x, given=given, steps=6, method=method, seeds=range(30)):
            assert (state.x[given] == 2).all()
            taken = taken or (before is not None and bool(((before != MASK) & (state.x == MASK)).any()))
            before = state.x
        assert taken


# --- static shapes by hand -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("static", [False, True])
def test_rows_are_those_that_are_asked_for(static: bool) -> None:
    """By number, in pieces or at once, with static shapes or without; what is no number is told."""
    graph, where = Masking(N, MASK), torch.tensor([[True, False, False], [False, True, True], [False] * 3])
    x, sigma = torch.full((3, 3), MASK), torch.tensor([0.5, 1.0, 2.0])
    reverse = Reverse(lively, graph, NOISE, frozen=~where, seeds=torch.arange(3), static_shapes=static)
    kernel = lambda log_score, y, b, i: log_score.exp() * (1 + b + 10 * i)[:, None]  # noqa: E731
    place = 1 + torch.arange(3)[:, None] + 10 * torch.arange(3)
    expected = (lively(x, sigma).exp() * place[..., None])[where]
    torch.testing.assert_close(reverse.evaluate(x, sigma, where, kernel), expected)
    torch.testing.assert_close(reverse.rows_at(x, sigma, Positions.of(where), kernel).tensor(), expected)
    none = reverse.evaluate(x, sigma, where & False, kernel)
    assert none.shape == (0, N)
    with pytest.raises(ValueError, match=r"returned a log-score of up to .* at sequence 1, position 2"):
        reverse.evaluate(x, sigma, where, lambda log_score, y, b, i: log_score / (b + i - 3)[:, None])


@pytest.mark.parametrize("method", [Tweedie(), Unmasking(), ConfidenceUnmasking(), ByConfidence(at_rate(1.0))])
def test_probabilities_are_told_the_same_with_static_shapes(method: Any) -> None:
    graph, x = Masking(N, MASK), torch.full((3, 4), 2)
    given = torch.tensor([[True, False, True, False], [True] * 4, [False] * 4])
    how: dict[str, Any] = {"x": x, "given": given, "steps": 3, "method": method, "log_probs": True, "seeds": range(3)}
    one, other = (list(trajectory(lively, graph, NOISE, static_shapes=static, **how)) for static in (False, True))
    for plain, static in zip(one, other, strict=True):
        assert torch.equal(plain.x, static.x)
        assert plain.log_prob is not None
        assert static.log_prob is not None
        torch.testing.assert_close(plain.log_prob, static.log_prob)


# --- autocast, and the importable laws -------------------------------------------------------------------------------


def logits(x: Tensor, sigma: Tensor) -> Tensor:
    return torch.sin(x.sum(1)[:, None, None] + x[..., None] * torch.arange(1.0, N + 1)) + sigma[:, None, None] / 7


WRAPPED: dict[str, Any] = {
    "logits": lambda graph: from_logits(logits, graph, controls=[temperature(0.7), top_p(0.97)]),
    "controlled": lambda graph: controlled(from_logits(logits, graph), graph, min_p(0.05)),
    "posterior": lambda graph: to_posterior(from_logits(logits, graph), graph),
    "velocity": lambda graph: from_velocity(lambda x, kappa: logits(x, kappa).softmax(-1) - 0.2, graph),
    "guided": lambda graph: classifier_free(from_logits(logits, graph), logits, 1.7, num_states=N),
    "slope": lambda graph: first_order_ratios(lambda tokens, sigma: tokens.square().sum((1, 2)) * sigma, N),
}


@pytest.mark.parametrize("graph", [Masking(N, MASK), Replacing(N)], ids=["masks", "uniform"])
@pytest.mark.parametrize("name", WRAPPED)
def test_nothing_is_worked_in_less_under_autocast(name: str, graph: Any) -> None:
    model, x = WRAPPED[name](graph), torch.tensor([[3, 1, 3], [0, 3, 3]])
    plain = model(x, torch.tensor([0.4, 1.3]))
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x, torch.tensor([0.4, 1.3]))
    assert found.dtype == plain.dtype == torch.float32
    assert torch.equal(found, plain) or torch.equal(found.nan_to_num(7.0), plain.nan_to_num(7.0))


def test_an_order_is_had_by_what_makes_no_error() -> None:
    """Of noise that stands still nothing is left to do, and nothing to divide by."""
    testing.chain_has_order(Tweedie(), Replacing(3), lambda t: (0 * t + 0.5, 0 * t), order=9, steps=2)


def test_a_bar_for_each_batch(capsys: pytest.CaptureFixture[str]) -> None:
    sample(lively, Masking(N, MASK), NOISE, shape=(5, 2), steps=2, batch_size=2, progress=True, seeds=range(5))
    assert capsys.readouterr().err.count("sampling: 100%|") == 3


def test_a_share_of_masks_is_that_of_its_rate() -> None:
    sigma = torch.tensor([0.0, 0.5, 20.0], dtype=torch.float64)
    assert mask_probability(sigma, 3.0).tolist() == pytest.approx([0.0, 1 - math.exp(-1.5), 1.0])
    assert mask_probability(sigma)[1] == pytest.approx(1 - math.exp(-0.5))
    tiny = torch.tensor(1e-12, dtype=torch.float64)
    assert float(mask_probability(tiny)) == pytest.approx(1e-12, rel=1e-9)


@pytest.mark.parametrize("listed", [False, True])
def test_a_graph_is_absorbing_whose_rows_of_tokens_hold_nothing_above_0(listed: bool) -> None:
    """Neither at the states that are listed nor at all others; of what is found the first token is named."""

    def rates_into(x: Tensor) -> Any:
        masked = (x == MASK).double()
        base = masked if listed else masked + 0.25 * (x == 2)
        value = torch.stack([torch.where(x == MASK, 0.0, -1.0), 0.5 * (x == 2) if listed else masked - masked], -1)
        return SimpleNamespace(base=base, index=torch.stack([x, (x + 1) % N], -1), value=value.double())

    graph: Any = SimpleNamespace(num_states=N, mask_id=MASK, rates_into=rates_into)
    with pytest.raises(ValueError, match="This needs an absorbing graph; under this one a jump leads into the token 2"):
        absorption_rate(graph, torch.device("cpu"), "This")


def test_infilling_is_left_alone_by_the_seeds_of_others() -> None:
    """Of three sequences the middle one, alone with its seed, and in two batches."""
    graph, x = Masking(N, MASK), torch.zeros(3, 4, dtype=torch.int64)
    whole = infill(lively, graph, NOISE, x=x, given=x > 0, steps=3, seeds=[5, 9, 2])
    assert torch.equal(infill(lively, graph, NOISE, x=x[1:2], given=x[1:2] > 0, steps=3, seeds=[9]), whole[1:2])
    assert torch.equal(infill(lively, graph, NOISE, x=x, given=x > 0, steps=3, seeds=[5, 9, 2], batch_size=2), whole)


@pytest.mark.parametrize(("turning", "asked"), [((), 2), ((1,), 6), ((0, 1), 6)])
def test_a_sequence_is_sure_of_itself_at_every_position(turning: tuple[int, ...], asked: int) -> None:
    """Of three positions some are another token with each call: that is not finished before its last step."""
    calls = list[int]()

    def certain(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(1)
        best = torch.tensor([1, 2, 0])
        best[list(turning)] = (best[list(turning)] + len(calls)) % N
        return torch.full((N,), 1e-9).repeat(1, 3, 1).scatter(2, best[None, :, None], 1.0)

    times = torch.linspace(1, 0, 7, dtype=torch.float64)
    x = sample(from_posterior(certain, Replacing(N)), Replacing(N), NOISE, shape=(1, 3), times=times, denoise=False,
               method=EntropyBoundRenoising(bound=0.1, confident=0.01, stable=1), seeds=[0])  # fmt: skip
    assert len(calls) == asked
    assert x[0, 2] == 0
