"""What losses do before their formulas: whom the model is asked about, what it is told, what it may answer."""

from __future__ import annotations

import importlib
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sedd_objectives.batch import (
    check_clean,
    check_kept,
    check_logits,
    check_possible,
    check_times,
    counted,
    keep_given,
    logit_rows,
    noised,
    over_tokens,
    score_rows,
    spread,
)
from sedd_objectives.checks import (
    arithmetic_dtype,
    check_evaluations,
    check_given,
    check_not_nan,
    check_states,
    check_weight,
    expand_leading,
    reading_waits,
    sum_dtype,
)
from torch import nn

X = torch.tensor([[0, 1, 2], [3, 4, 0]])
WHERE = torch.tensor([[True, False, True], [False, False, True]])


def table(x, sigma):
    return torch.arange(float(x.numel() * 5)).view(*x.shape, 5)


class Offers(nn.Module):
    """A network that takes `where`, and keeps what it was told."""

    def forward(self, x, sigma, where=None):
        self.told = x, sigma, where
        return table(x, sigma)[where]


class Unsigned:
    """As a compiled model may be, of whose arguments nothing can be learnt."""

    __signature__ = "none"

    def __call__(self, x, sigma):
        return table(x, sigma)


def test_a_model_is_asked_once_for_the_rows_that_count():
    sigma, net = torch.tensor([0.1, 0.2]), Offers()
    rows, positions = score_rows(net, X, sigma, WHERE, 5)
    assert positions is None
    assert torch.equal(rows, table(X, sigma)[WHERE])
    assert all(one is other for one, other in zip(net.told, (X, sigma, WHERE), strict=True))
    for model in (table, lambda x, s, /, where=None: table(x, s)[where], Unsigned()):
        rows, positions = score_rows(model, X, sigma, WHERE, 5)
        chosen = rows if positions is None else rows.reshape(-1, 5)[positions]
        assert torch.equal(chosen, table(X, sigma)[WHERE])


@pytest.mark.parametrize(
    ("model", "got"),
    [
        (lambda x, s: torch.zeros(2, 3, 4), r"of shape \(2, 3, 5\), got \(2, 3, 4\)"),
        (lambda x, s: torch.zeros(3, 5), r"of shape \(2, 3, 5\), got \(3, 5\)"),
        (lambda x, s: (torch.zeros(2, 3, 5),), r"of shape \(2, 3, 5\), got tuple"),
        (lambda x, s, where=None: torch.zeros(2, 3, 5), r"of shape \(3, 5\), got \(2, 3, 5\)"),
        (lambda x, s, where=None: None, r"of shape \(3, 5\), got NoneType"),
    ],
)
def test_what_it_answers_has_one_shape(model, got):
    with pytest.raises(ValueError, match="the score model must return log_score " + got):
        score_rows(model, X, torch.ones(2), WHERE, 5)
    with pytest.raises(ValueError, match="the model must return logits " + got):
        logit_rows(model, X, torch.ones(2), WHERE, 5)


def probabilities(num_rows):
    return torch.rand(num_rows, 5, generator=torch.Generator().manual_seed(0)).softmax(-1)


def test_probabilities_are_told_from_logits_by_eight_rows():
    message = "got rows that are >= 0 and sum to 1: these are probabilities"
    for rows in (probabilities(1), probabilities(20), probabilities(3).bfloat16() * 0 + 0.2, probabilities(3) + 1.9e-4):
        with pytest.raises(ValueError, match=message):
            check_logits(rows)
    late = probabilities(20)
    late[8:] = -3.0
    with pytest.raises(ValueError, match=message):
        check_logits(late)
    with pytest.raises(ValueError, match=message):
        logit_rows(lambda x, s: probabilities(6).view(2, 3, 5), X, torch.ones(2), WHERE, 5)
    one_is_none = probabilities(20)
    one_is_none[7] *= 1.1
    below = probabilities(2)
    below[1, :2] += torch.tensor([-1.0, 1.0])
    for rows in (one_is_none, below, probabilities(3) + 3e-4, torch.zeros(0, 5), probabilities(3).log()):
        check_logits(rows)


def test_probabilities_are_not_sought_where_that_waits(monkeypatch):
    module = importlib.import_module("sedd_objectives.batch")
    monkeypatch.setattr(module, "reading_waits", lambda device: True)
    check_logits(probabilities(3))


def test_the_mask_is_ruled_out_among_tokens():
    logits = torch.arange(6.0).view(2, 3)
    assert over_tokens(logits, None) is logits
    assert over_tokens(logits, 1).tolist() == [[0.0, -math.inf, 2.0], [3.0, -math.inf, 5.0]]
    assert over_tokens(logits, 0).tolist() == [[-math.inf, 1.0, 2.0], [-math.inf, 4.0, 5.0]]
    assert logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_are_put_in_their_places_with_their_slopes(dtype):
    values = torch.tensor([1.0, 2.0, 3.0], dtype=dtype, requires_grad=True)
    found = spread(values, WHERE)
    assert found.dtype == dtype
    assert found.tolist() == [[1.0, 0.0, 2.0], [0.0, 0.0, 3.0]]
    (slope,) = torch.autograd.grad((found * torch.arange(6.0).view(2, 3)).sum(), values)
    assert slope.tolist() == [0.0, 2.0, 5.0]


def test_the_factor_of_a_position_is_its_weight_but_where_it_is_given():
    weight, given = torch.tensor([[0.5, 2.0, 0.0], [1.0, 1.0, 3.0]]), ~WHERE
    assert counted(None, None) is None
    assert counted(weight, None) is weight
    alone = counted(None, given)
    assert alone is not None
    assert alone.dtype == torch.float32
    assert alone.tolist() == [[1.0, 0, 1], [0, 0, 1]]
    both = counted(weight, given)
    assert both is not None
    assert both.tolist() == [[0.5, 0, 0], [0, 0, 3.0]]


class Graph:
    num_states: int = 5
    mask_id: int | None = 4

    def sample(self, x0, sigma, *, generator=None):
        return torch.full_like(x0, 4)


def test_clean_data_and_what_counts_of_it():
    graph: Any = Graph()
    assert check_clean(X % 4, graph) is None
    spread_out = check_clean(X % 4, graph, torch.tensor([2, 0]))
    assert spread_out is not None
    assert spread_out.tolist() == [[2.0] * 3, [0.0] * 3]
    hows: list[dict[str, Any]] = [{}, {"given": X == 4}, {"weight": torch.ones(2)}]
    for how in (*hows, {"weight": (X != 4).float(), "given": X == 4}):
        with pytest.raises(ValueError, match=r"no mask \(mask_id 4\) where .*, got it at 1 of 6 positions"):
            check_clean(X, graph, **how)
    check_clean(X, graph, weight=X != 4)
    for unmasked in (SimpleNamespace(num_states=5, mask_id=None), SimpleNamespace(num_states=5)):
        graph = unmasked
        assert check_clean(X, graph) is None


def test_times_are_one_a_sequence_or_a_position():
    assert check_times(torch.tensor(0.5), X).tolist() == [0.5, 0.5]
    for t in (torch.tensor([0.1, 0.9]), torch.rand(2, 3)):
        assert check_times(t, X) is t


@pytest.mark.parametrize("t", [[0.5], [0.1, 0.2, 0.3], [[0.1], [0.2]], [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]])
def test_other_times_are_refused(t):
    with pytest.raises(ValueError, match=r"t must be floating, of shape \(B,\) or \(B, L\), \(2,\) or \(2, 3\), got"):
        check_times(torch.tensor(t), X)
    with pytest.raises(ValueError, match="t must be floating"):
        check_times(torch.ones(2, dtype=torch.int64), X)


def test_a_batch_is_noised_by_the_schedule_s_numbers():
    """Per position as well as they came; what is given stays clean; what the caller brings is taken as it is."""
    graph: Any = Graph()

    def noise(t):
        return 2 * t, 3 * t

    t, given = torch.tensor([0.25, 0.5]), torch.tensor([[True, False, False], [False, False, True]])
    how: dict[str, Any] = {"generator": None, "t_min": 0.0}
    xt, sigma, levels, dsigma = noised(graph, noise, X % 4, t, None, given=given, **how)
    assert torch.equal(xt, torch.where(given, X % 4, 4))
    assert sigma.tolist() == [0.5, 1.0]
    assert levels.tolist() == [[0.5] * 3, [1.0] * 3]
    assert dsigma.tolist() == [[0.75] * 3, [1.5] * 3]
    assert noised(graph, noise, X % 4, t, xt, given=given, **how)[0] is xt
    with pytest.raises(ValueError, match="xt must be x0 where it is given, it differs at 2 of these positions"):
        noised(graph, noise, X % 4, t, torch.full_like(X, 4), given=given, **how)
    with pytest.raises(ValueError, match="sigma is a total noise and must be >= 0"):
        noised(graph, lambda t: (-t, t), X % 4, t, None, **how)
    with pytest.raises(ValueError, match="dsigma must have a shape that is a leading part"):
        noised(graph, lambda t: (t, t[:1]), X % 4, t, None, **how)


def test_given_positions_are_kept():
    assert keep_given(X, X + 1, None) is X
    assert torch.equal(keep_given(X, X + 1, WHERE), torch.where(WHERE, X + 1, X))
    check_kept(X, X + 1, None)
    check_kept(torch.where(WHERE, X, 9), X, WHERE)
    with pytest.raises(ValueError, match="xt must be x0 where it is given, it differs at 3 of these positions"):
        check_kept(X + 1, X, WHERE)


def test_pairs_that_cannot_be():
    """Where no jump leads, x is x0, unless it weighs nothing."""
    other = torch.where(WHERE, X, X + 1)
    check_possible(torch.where(WHERE, 9, X), X, WHERE)
    check_possible(other, X, WHERE, WHERE.float())
    for weight, count in ((None, 3), (torch.ones(2, 3), 3), (1e-30 * (X != 3), 2)):
        with pytest.raises(ValueError, match=f"got such pairs at {count} of 6 positions"):
            check_possible(other, X, WHERE, weight)


# Checks of single arguments


@pytest.mark.parametrize(
    ("dtypes", "found"),
    [
        ([torch.float32], torch.float32),
        ([torch.bfloat16, torch.float16], torch.float32),
        ([torch.float32, torch.float64], torch.float64),
        ([torch.float64, torch.bfloat16], torch.float64),
    ],
)
def test_arithmetic_is_as_wide_as_its_widest_and_float32_at_least(dtypes, found):
    assert arithmetic_dtype(*(torch.zeros(1, dtype=dtype) for dtype in dtypes)) == found


@pytest.mark.parametrize(("device", "dtype", "waits"), [("cpu", 64, False), ("cuda", 64, True), ("mps", 32, False)])
def test_what_a_device_can_do(device, dtype, waits):
    assert sum_dtype(torch.device(device)) == getattr(torch, f"float{dtype}")
    assert reading_waits(torch.device(device)) is waits


@pytest.mark.parametrize(
    "states", [torch.zeros(2), torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.complex64)]
)
def test_states_are_integers(states):
    with pytest.raises(ValueError, match=f"x holds states and must be an integer tensor, got dtype {states.dtype}"):
        check_states("x", states, 5)
    check_states("x", torch.zeros(2, dtype=torch.int32), 5, torch.Size([2]))
    with pytest.raises(ValueError, match=r"x must have shape \(2, 1\), got \(2,\)"):
        check_states("x", torch.zeros(2, dtype=torch.int32), 5, torch.Size([2, 1]))


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (7.0, [[7.0] * 3] * 2),
        ([1.0, 2.0], [[1.0] * 3, [2.0] * 3]),
        ([[1.0, 2, 3], [4, 5, 6]], [[1.0, 2, 3], [4, 5, 6]]),
    ],
)
def test_values_lead(value, want):
    assert expand_leading("sigma", torch.tensor(value), X).tolist() == want


@pytest.mark.parametrize("shape", [(3,), (2, 1), (1, 3), (2, 3, 1), (1,)])
def test_values_that_do_not_lead_are_refused(shape):
    with pytest.raises(ValueError, match=r"leading part of x's, \(\) or \(2,\) or \(2, 3\), got \(" + str(shape)[1:-1]):
        expand_leading("sigma", torch.zeros(shape), X)


def test_weights_become_float_and_given_stays_itself():
    found = check_weight(torch.tensor([True, False]), X)
    assert found.dtype == torch.float32
    assert found.tolist() == [[1.0] * 3, [0.0] * 3]
    wide = torch.tensor([1.5, 0.0], dtype=torch.float64)
    assert check_weight(wide, X).dtype == torch.float64
    assert check_given(WHERE, X) is WHERE


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, 2), "num_times must be even and at least 2, got 0"),
        ((3, 2), "num_times must be even and at least 2, got 3"),
        ((2, 1), "num_reconstructions must be at least 2, to estimate an error, got 1"),
        ((2, 2, 0.0), r"t_min must lie in \(0, 1\), got 0.0"),
        ((2, 2, 1.0), r"t_min must lie in \(0, 1\), got 1.0"),
        ((2, 2, 0.5, -1e-9), r"small_noise_share must lie in \[0, 1\), got -1e-09"),
        ((2, 2, 0.5, 1.0), r"small_noise_share must lie in \[0, 1\), got 1.0"),
        ((2, 2, None, 1.0), "small_noise_share must lie in"),
    ],
)
def test_numbers_of_an_estimate(numbers, message):
    with pytest.raises(ValueError, match=message):
        check_evaluations(*numbers)
    for right in ((2, 2), (4, 3, 1e-9), (2, 2, 1 - 1e-9, 0.0), (2, 2, None, 1 - 1e-9)):
        check_evaluations(*right)


def test_a_nan_is_told_from_the_score_or_from_the_pair():
    loss = torch.tensor([[1.0, math.nan], [math.inf, 2.0]])
    with pytest.raises(
        ValueError, match="the loss is NaN at 1 of 4 positions: log_score is NaN at a state that counts"
    ):
        check_not_nan(loss, torch.tensor([0.0, math.nan]))
    with pytest.raises(ValueError, match="at 1 of 4 positions: log_score has no NaN, so some x cannot have come from"):
        check_not_nan(loss, torch.zeros(2))
    check_not_nan(torch.tensor([math.inf, -math.inf]), torch.tensor([math.nan]))
