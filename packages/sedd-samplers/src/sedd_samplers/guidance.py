"""Guidance: the score of x given a class c, from scores and classifiers of noised sequences.

By Bayes' rule, p_t(x | c) = p_t(x) p_t(c | x) / p(c), so that for the ratio of two sequences x' and x that differ in
one position

    log s(x | c)_x' = log s(x)_x' + log p_t(c | x') - log p_t(c | x)

With a weight gamma, the last difference times gamma (`classifier_guided`); written with two scores (`classifier_free`)

    log s = log s(x) + gamma (log s(x | c) - log s(x))

The reverse rates are then R(x)^(1 - gamma) R(x | c)^gamma: predictor and predictor-free guidance of Nisonoff et al.
2024 (arXiv 2406.01572). Exact at gamma = 1, where it is Bayes' rule, and at gamma = 0. At any other weight there is in
general no law of sequences with this score: samples are sharper, and no more can be said. The guided posterior does not
sum to 1, so that an absorbing process unmasks sooner or later than its schedule says; `controlled(score, graph)`, with
no controls, makes it sum to 1, which is the guidance of Schiff et al. 2024 (arXiv 2412.10193).

A classifier is taken in the form of log-ratios, (x, sigma) -> (B, L, N): log p_t(c | x') - log p_t(c | x) for every x'
that differs from x in one token. `neighbour_ratios` evaluates them, L (N - 1) sequences to each; `first_order_ratios`
takes one gradient instead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .fast import Answer, Part, rows_at_a_time
from .interfaces import RowModel, ScoreModel
from .model_calls import ModelCall, Wrapper
from .positions import Positions

__all__ = ["classifier_free", "classifier_guided", "neighbour_ratios", "first_order_ratios"]


def classifier_free(conditional: ScoreModel, unconditional: ScoreModel, weight: float, *, num_states: int) -> RowModel:
    """The score unconditional + weight (conditional - unconditional), in logarithms.

    Args:
        conditional: the score model given the class, such as `lambda x, sigma, where, rows: net(x, sigma, where,
            condition=labels[rows])`.
        unconditional: without it.
        weight: gamma, at least 0; 1 is the conditional score itself.
        num_states: N.

    Returns:
        A score model. A state that either score excludes (-inf) is excluded, at weight 0 and 1 by the one that counts.

    Raises:
        ValueError: a model is not callable or the weight negative or not finite; when called, for another shape.
    """
    _check_weight(weight)
    with_class = ModelCall(conditional, num_states, "conditional score model")
    without = ModelCall(unconditional, num_states, "unconditional score model")

    def rows_at(x: Tensor, sigma: Tensor, at: Positions, rows: Tensor) -> Answer:
        if weight in (0, 1):
            return (with_class if weight else without)(x, sigma, at, rows)
        conditioned, plain = with_class(x, sigma, at, rows), without(x, sigma, at, rows)

        def combine(log_score: Tensor, part: Part) -> Tensor:
            given_class = conditioned[part].to(log_score.dtype)
            mixed = torch.lerp(log_score, given_class, weight)
            return mixed.masked_fill_((log_score == -torch.inf) | (given_class == -torch.inf), -torch.inf)

        return plain.then(combine, conditioned.work)

    return Wrapper(rows_at, conditional, unconditional)


def classifier_guided(score: ScoreModel, ratios: Callable[..., Tensor], weight: float, *, num_states: int) -> RowModel:
    """The score plus weight times a classifier's log-ratios.

    Args:
        score: the unconditional score model.
        ratios: (x (B, L), sigma (B,)) -> (B, L, N), log p_t(c | x') - log p_t(c | x) in nats, where x' is x with the
            token y in one position; it may offer `where` and `rows`.
        weight: gamma, at least 0; 1 is Bayes' rule.
        num_states: N.

    Returns:
        A score model. A state that the score or, at a positive weight, the classifier excludes (-inf) is excluded.

    Raises:
        ValueError: a model is not callable or the weight negative or not finite; when called, for another shape.
    """
    _check_weight(weight)
    unguided = ModelCall(score, num_states, "score model")
    classifier = ModelCall(ratios, num_states, "classifier's ratios")

    def rows_at(x: Tensor, sigma: Tensor, at: Positions, rows: Tensor) -> Answer:
        answer = unguided(x, sigma, at, rows)
        if weight == 0:
            return answer
        ratio = classifier(x, sigma, at, rows)

        def add(log_score: Tensor, part: Part) -> Tensor:
            log_ratio = ratio[part].to(log_score.dtype)
            return torch.where(log_score == -torch.inf, log_score, log_score + weight * log_ratio)

        return answer.then(add)

    return Wrapper(rows_at, score, ratios)


def neighbour_ratios(
    log_prob: Callable[[Tensor, Tensor], Tensor], num_states: int, *, batch_size: int = 1024
) -> RowModel:
    """A classifier's log-ratios, each by an evaluation of its own: exact and dear.

    Args:
        log_prob: (x (R, L) int64, sigma (R,)) -> log p_t(c | x) (R,), in nats.
        num_states: N.
        batch_size: how many sequences are evaluated at a time.

    Returns:
        (x, sigma) -> (B, L, N), offering `where`: M N evaluations for its M positions.
    """

    def rows_at(x: Tensor, sigma: Tensor, at: Positions, rows: Tensor) -> Tensor:
        sequence, position = at.sequence, at.position
        here = log_prob(x, sigma)[sequence]
        out = here.new_empty(len(sequence) * num_states)
        for i in range(0, len(out), batch_size):
            flat = torch.arange(i, min(i + batch_size, len(out)), device=x.device)
            row, state = flat // num_states, flat % num_states
            changed = x[sequence[row]].scatter(1, position[row, None], state[:, None])
            out[flat] = log_prob(changed, sigma[sequence[row]])
        return out.view(-1, num_states) - here[:, None]

    return Wrapper(rows_at, log_prob)


def first_order_ratios(log_prob: Callable[[Tensor, Tensor], Tensor], num_states: int) -> RowModel:
    """A classifier's log-ratios to first order in the one-hot tokens: one gradient for all of them.

        log p(c | x') - log p(c | x)  ~  (e_y - e_x) . d log p(c | x) / d e

    Exact for a classifier whose logarithm is linear in the tokens. The Taylor approximation of Nisonoff et al. 2024.

    Args:
        log_prob: (one-hot tokens (B, L, N) float32, sigma (B,)) -> log p_t(c | x) (B,), in nats, differentiable.
        num_states: N.

    Returns:
        (x, sigma) -> (B, L, N), offering `where`.
    """

    def rows_at(x: Tensor, sigma: Tensor, at: Positions, rows: Tensor) -> Tensor:
        size = max(1, rows_at_a_time(num_states, x.device) // x.shape[1])
        if size >= len(x):
            return slope(x, sigma, at.flat)
        out: Tensor | None = None
        ends = [0, *at.where.sum(1).cumsum(0).tolist()]
        for i in range(0, len(x), size):
            mine = slice(ends[i], ends[min(i + size, len(x))])
            part = slope(x[i : i + size], sigma[i : i + size], at.flat[mine] - i * x.shape[1])
            out = part.new_empty(len(at), num_states) if out is None else out
            out[mine] = part
            del part  # of a sequence's size
        assert out is not None
        return out

    def slope(x: Tensor, sigma: Tensor, flat: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            tokens = torch.zeros(*x.shape, num_states, dtype=sigma.dtype, device=x.device)
            tokens.scatter_(2, x.clone()[..., None], 1.0).requires_grad_()
            # a sequence's probability depends on its own tokens only, so that the sum's gradient is each one's
            (gradient,) = torch.autograd.grad(log_prob(tokens, sigma.clone()).sum(), tokens)
        del tokens
        here: Tensor = gradient.flatten(0, 1)[flat]
        return here.sub_(here.gather(1, x.flatten()[flat, None]))

    return Wrapper(rows_at, log_prob)


def _check_weight(weight: float) -> None:
    if not 0 <= weight < float("inf"):
        raise ValueError(f"weight must be finite and at least 0, got {weight!r}")
