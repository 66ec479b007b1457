"""What holds of every adapter, control and guide, each asked the same; and what a score of no law is made into."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sedd_samplers import cached
from sedd_samplers.adapters import (
    from_logits,
    from_posterior,
    from_reverse,
    from_velocity,
    per_sequence,
    to_posterior,
    to_reverse,
    to_velocity,
)
from sedd_samplers.adapters.processes import Masking, Replacing
from sedd_samplers.controls import (
    allowed_tokens,
    controlled,
    min_p,
    repetition_penalty,
    temperature,
    top_k,
    top_p,
)
from sedd_samplers.guidance import classifier_free, classifier_guided, first_order_ratios, neighbour_ratios
from sedd_samplers.testing import rows_are_those_of_the_whole, sequences_are_answered_one_by_one
from torch import Tensor

N, LENGTH = 5, 6
STATES = torch.arange(N)


def logits(x: Tensor, sigma: Tensor) -> Tensor:
    """Of every position, by all of the sequence and its noise."""
    near = x.sum(1)[:, None, None] + x[..., None] * (STATES + 1) + torch.arange(x.shape[1], device=x.device)[:, None]
    return torch.sin(near * 1.1) + torch.tanh(sigma)[:, None, None] * STATES


def posterior(x: Tensor, sigma: Tensor) -> Tensor:
    return logits(x, sigma).softmax(-1)


def network(x: Tensor, sigma: Tensor) -> Tensor:
    return logits(x, torch.ones_like(sigma))


def log_prob(x: Tensor, sigma: Tensor) -> Tensor:
    return torch.sin(x * torch.arange(1.0, x.shape[1] + 1, device=x.device)).sum(1) * sigma


def log_prob_of_tokens(tokens: Tensor, sigma: Tensor) -> Tensor:
    return torch.sin(tokens * (0.3 + STATES / 3)).sum((1, 2)) * sigma


ALLOWED = torch.rand(4, LENGTH, N, generator=torch.Generator().manual_seed(0)) < 0.7
ALLOWED[..., [0, 4]] = True
CONTROLS = (temperature(0.8), top_k(4), top_p(0.95), min_p(0.01), repetition_penalty(1.3))


def flow(x: Tensor, kappa: Tensor) -> Tensor:
    p = posterior(x, -torch.log(kappa))
    return (p - torch.nn.functional.one_hot(x, N)) / (1 - kappa)[:, None, None]


WRAPPED: dict[str, Any] = {
    "posterior": lambda graph: from_posterior(posterior, graph),
    "posterior, controlled": lambda graph: from_posterior(posterior, graph, controls=CONTROLS),
    "logits": lambda graph: from_logits(logits, graph, banned=[1]),
    "logits, controlled": lambda graph: from_logits(logits, graph, controls=CONTROLS),
    "logits as they stand": lambda graph: from_logits(logits, graph, subs=False),
    "reverse": lambda graph: from_reverse(posterior, graph, lambda sigma: sigma / 3),
    "velocity": lambda graph: from_velocity(flow, graph),
    "controlled": lambda graph: controlled(from_posterior(posterior, graph), graph, *CONTROLS),
    "there and back": lambda graph: from_posterior(to_posterior(from_posterior(posterior, graph), graph), graph),
    "a step there and back": lambda graph: from_reverse(
        to_reverse(from_posterior(posterior, graph), graph, lambda sigma: sigma / 2), graph, lambda sigma: sigma / 2
    ),
    "a flow there and back": lambda graph: from_velocity(to_velocity(from_posterior(posterior, graph), graph), graph),
    "cached": lambda graph: from_logits(cached(network), graph),
    "free of a classifier": lambda graph: classifier_free(
        from_posterior(posterior, graph), from_logits(network, graph), 1.5, num_states=N
    ),
    "a classifier's neighbours": lambda graph: classifier_guided(
        from_posterior(posterior, graph), neighbour_ratios(log_prob, N, batch_size=7), 0.7, num_states=N
    ),
    "a classifier's slope": lambda graph: classifier_guided(
        from_posterior(posterior, graph), first_order_ratios(log_prob_of_tokens, N), 0.7, num_states=N
    ),
}
GRAPHS = {"masks": Masking(N, 3), "uniform": Replacing(N)}


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.parametrize("name", WRAPPED)
def test_a_sequence_is_answered_by_itself(name: str, kind: str, pieces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a noise of its own, all of it and some positions, whatever is worked at a time."""
    if pieces:
        for module in ("fast.answer", "guidance"):
            monkeypatch.setattr(f"sedd_samplers.{module}.rows_at_a_time", lambda num_states, device: 7)
    graph: Any = GRAPHS[kind]
    score = WRAPPED[name](graph)
    sequences_are_answered_one_by_one(score, graph, length=LENGTH, tolerance=2e-4)
    rows_are_those_of_the_whole(score, graph, length=LENGTH, tolerance=2e-4)


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.parametrize("name", WRAPPED)
def test_all_is_made_where_the_states_are(
    name: str, kind: str, pieces: bool, ref: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pieces:
        monkeypatch.setattr("sedd_samplers.guidance.rows_at_a_time", lambda num_states, device: 7)
    x, sigma = torch.tensor([[0, 3, 1, 3], [3, 3, 2, 4], [1, 1, 3, 0]]), torch.tensor([0.3, 0.9, 1.7])
    where = torch.tensor([[True, True, False, True], [False] * 4, [True, False, True, False]])
    with ref.Elsewhere(torch.tensor):
        score = WRAPPED[name](GRAPHS[kind])
        found = score(x, sigma), score(x, sigma, where=where, rows=torch.arange(3, device=x.device))
    score = WRAPPED[name](GRAPHS[kind])
    torch.testing.assert_close(found, (score(x, sigma), score(x, sigma, where=where)), equal_nan=True)


@pytest.mark.parametrize("kind", GRAPHS)
def test_conditions_and_constraints_follow_their_sequence(kind: str) -> None:
    """Asked about the third and first of four sequences: what the four would have been told."""
    graph: Any = GRAPHS[kind]

    def labelled(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        return logits(x, sigma) + label[:, None, None] * torch.arange(N)

    score = from_logits(per_sequence(labelled, label=torch.arange(4)), graph, controls=[allowed_tokens(ALLOWED)])
    further = controlled(score, graph, allowed_tokens(ALLOWED.flip(2)))
    x = torch.randint(N, (4, LENGTH), generator=torch.Generator().manual_seed(1))
    x = x if kind == "uniform" else torch.full_like(x, 3)  # a token of an absorbing graph is certain, allowed or not
    sigma, some = torch.tensor([0.3, 0.8, 1.5, 2.0]), torch.tensor([2, 0])
    where = torch.rand(4, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.5
    for model in (score, further):
        whole = model(x, sigma)
        torch.testing.assert_close(model(x[some], sigma[some], rows=some), whole[some], equal_nan=True)
        found = model(x[some], sigma[some], where=where[some], rows=some)
        torch.testing.assert_close(found, whole[some][where[some]], equal_nan=True)


@pytest.mark.parametrize(("step", "told"), [(0.5, False), (8.5, False), (9.5, True)])
def test_a_step_is_told_from_a_score_where_the_step_is_short_enough(step: float, told: bool) -> None:
    """Whatever the noise it begins at: what it takes away decides, and of a posterior that is all of it."""
    graph, x, sigma = Replacing(N), torch.tensor([[0, 3, 1]]), torch.tensor([20.0])
    length = lambda sigma: 0 * sigma + step  # noqa: E731
    score = from_reverse(posterior, graph, length)
    with pytest.raises(ValueError, match=r"cannot be told from a torch\.float32 score at sigma = 20"):
        to_posterior(score, graph)(x, sigma)
    if told:
        with pytest.raises(ValueError, match=rf"cannot be told from a torch\.float32 score at sigma = {step}"):
            to_reverse(score, graph, length)(x, sigma)
    else:
        found = to_reverse(score, graph, length)(x, sigma)
        torch.testing.assert_close(found, posterior(x, sigma), rtol=1e-6 * math.exp(step), atol=1e-7 * math.exp(step))


@pytest.mark.parametrize("kind", GRAPHS)
def test_a_score_of_no_law_becomes_one_without_what_is_below_nothing(kind: str, ref: Any) -> None:
    """Its posterior and its step, negative in places by the equation: those are 0, and the rest sums to 1."""
    graph: Any = GRAPHS[kind]
    dense = ref.absorbing_matrix(4, 3) if kind == "masks" else ref.uniform_matrix(5)
    x = torch.full((1, 4), 3)
    log_score = torch.tensor([[2.0, -3.0, 1.0, 0.0, -9.0], [-8.0, 2.0, 2.0, 0.0, 1.0], [0.5, 0.5, -7.0, 0.0, -7.0],
                              [1.0, 1.0, 1.0, 0.0, 1.0]], dtype=torch.float64)[None]  # fmt: skip
    sigma = torch.tensor([0.9], dtype=torch.float64)

    def plain(step: float) -> Tensor:
        forward = torch.linalg.matrix_exp(step * dense.Q)
        out: Tensor = torch.linalg.solve(forward, log_score[0].exp().T).T * forward[3]
        return out

    score = lambda x, sigma: log_score  # noqa: E731
    step = plain(0.6)
    assert (step < -0.01).any()
    clean = plain(0.9)
    clean = clean.index_fill(1, torch.tensor([3]), 0.0) if kind == "masks" else clean
    for found, expected in (
        (to_posterior(score, graph)(x, sigma), clean),
        (to_reverse(score, graph, lambda sigma: sigma - 0.3)(x, sigma), step),
    ):
        expected = expected.clamp(min=0)
        torch.testing.assert_close(found[0], expected / expected.sum(1, keepdim=True), rtol=1e-5, atol=1e-7)
    kappa = torch.exp(-sigma)
    u = to_velocity(score, graph)(x, kappa)[0]
    clean = clean.clamp(min=0) / clean.clamp(min=0).sum(1, keepdim=True)
    own = torch.nn.functional.one_hot(x[0], N)
    torch.testing.assert_close(u, (clean - own) / (1 - kappa), rtol=1e-5, atol=1e-7)
