"""The autoregressive likelihood: -log p(x) = -sum_i log p(x_i | x_1 ... x_{i-1}), exact, for comparison with bounds."""

from __future__ import annotations

import torch
from torch import Tensor

from . import fast
from .batch import counted
from .checks import arithmetic_dtype, check_given, check_states, check_weight, require
from .interfaces import NextTokenModel

__all__ = ["autoregressive_loss"]


def autoregressive_loss(
    model: NextTokenModel,
    x: Tensor,
    *,
    start: int | Tensor,
    weight: Tensor | None = None,
    given: Tensor | None = None,
    refuse_nan: bool = True,
) -> Tensor:
    """-log p(x) given a starting token, in nats a sequence. Nothing is drawn: it has no standard error.

    The model reads (start, x_1, ..., x_{L-1}) and its row i predicts x_i, so that all L tokens count. To leave out the
    first token, as is often done, pass x[:, 1:] with start=x[:, 0].

    Args:
        model: the causal model; called once, with (B, L) states.
        x: (B, L) int64, tokens, less than N of the model's logits (B, L, N).
        start: the token before the first, for all sequences or (B,) int64: GPT-2's is its end-of-text.
        weight: (B,) or (B, L) factor >= 0 of each token's term, bool or float; 0 for padding.
        given: (B, L) bool, a prefix of each sequence that does not count: the loss is -log p of the rest given it.
        refuse_nan: whether to raise where a term is NaN. False returns it, for a caller that counts such sequences.

    Returns:
        (B,) nats a sequence, float32, or float64 if the logits are.

    Raises:
        ValueError: shapes that do not fit, states out of range, NaN logits, a weight that is negative somewhere or 0
            everywhere, given positions that are no prefix.
    """
    if x.ndim != 2 or x.is_floating_point():
        raise ValueError(f"x must be integers of shape (B, L), got {x.dtype} of shape {tuple(x.shape)}")
    first = start if isinstance(start, Tensor) else torch.full_like(x[:, 0], start)
    if first.shape != x.shape[:1]:
        raise ValueError(f"start must be one token or have shape (B,), {tuple(x.shape[:1])}, got {tuple(first.shape)}")
    logits = model(torch.cat([first[:, None], x[:, :-1]], -1))
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != x.shape:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the model must return logits of shape {(*x.shape, 'N')}, got {got}")
    check_states("x", x, logits.shape[-1])
    weight = None if weight is None else check_weight(weight, x)
    if given is not None:
        given = check_given(given, x)
        behind = given[:, 1:] & ~given[:, :-1]
        expected = (
            "given must be a prefix of each sequence: of what comes later this model cannot tell the tokens before"
        )
        require(~behind.any(), expected, lambda: f"got a token given behind others at {int(behind.sum())} places")
    factor = counted(weight, given)
    rows = logits.reshape(-1, logits.shape[-1])
    places = None if factor is None else factor.flatten().nonzero()[:, 0]
    tokens = x.flatten() if places is None else x.flatten()[places]
    surprise = fast.each_row(_negative_log, rows, places, tokens, dtype=arithmetic_dtype(logits))
    if refuse_nan and bool(surprise.isnan().any()):
        raise ValueError(f"logits are NaN, or all -inf, at {int(surprise.isnan().sum())} of {len(surprise)} tokens")
    if factor is None or places is None:
        return surprise.reshape(x.shape).sum(-1)
    terms = surprise * factor.flatten()[places].to(surprise.dtype)
    return surprise.new_zeros(x.shape).masked_scatter(factor > 0, terms).sum(-1)


def _negative_log(logits: Tensor, x: Tensor) -> Tensor:
    return logits.logsumexp(-1) - logits.gather(-1, x[:, None])[:, 0]
