"""Left to right: exact samples of an autoregressive model, the baseline of every diffusion model.

    p(x) = prod_i p(x_i | x_1 ... x_{i-1})

A model of the next token is a callable x (B, L) int64 -> logits (B, L, N) whose row i depends on x[:, : i + 1] only and
predicts the token after it. It reads (start, x_1, ..., x_{i-1}), and the last row is the law of x_i: one call a token,
with a sequence that grows. As other models here it may offer `where` (answer at those positions only: here the last,
so that its head runs on one row a sequence) and `rows` (which sequences of the run these are).

    left_to_right            a generator of states, one a token
    sample_left_to_right     its last state
    continue_left_to_right   its last state, with given tokens

The chain rule is exact, so that nothing is approximated here: tokens are drawn by `draw_categorical`, with the one
uniform number that belongs to the sequence's seed and the token's position. A given beginning is a condition, and what
follows has the conditional law. A given token *after* a free one is kept, but what was written before did not know of
it: padding may stand there, a condition may not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypedDict, Unpack

import torch
from torch import Generator, Tensor

from .controls import Control, apply_controls
from .model_calls import ModelCall, device_of
from .positions import Positions
from .prompts import check_prompt, check_shape
from .randomness import draw_categorical, row_seeds, uniforms
from .sampling import State, check_finished, last_state

__all__ = ["left_to_right", "sample_left_to_right", "continue_left_to_right"]

UNWRITTEN = -1


class LeftToRightOptions(TypedDict, total=False):
    """What `sample_left_to_right` and `continue_left_to_right` hand on to `left_to_right`, where each is explained."""

    controls: Sequence[Control]
    generator: Generator | None
    seeds: Sequence[int] | Tensor | None
    until: Callable[[State], Tensor] | None


def sample_left_to_right(
    model: Callable[..., Any],
    *,
    shape: tuple[int, int],
    start: int | Tensor,
    num_states: int,
    device: torch.device | str | None = None,
    progress: bool = False,
    **options: Unpack[LeftToRightOptions],
) -> Tensor:
    """Samples of a model of the next token.

    Args:
        model: x (B, L) int64 -> logits (B, L, N) of the token after each, causal.
        shape: (B, L).
        start: the token before the first, for all sequences or (B,) int64.
        num_states: N.
        device: where the states live; the device of the model's first parameter when None, else the CPU.
        progress: whether to show a bar.
        **options: `controls`, `generator`, `seeds`, `until`; and the errors: see `left_to_right`.

    Returns:
        (B, L) int64.
    """
    check_shape(shape)
    free = torch.zeros(shape, dtype=torch.bool, device=device_of(model, device))
    states = left_to_right(model, x=free.long(), given=free, start=start, num_states=num_states, **options)
    return last_state(states, progress)


def continue_left_to_right(
    model: Callable[..., Any],
    *,
    x: Tensor,
    given: Tensor,
    start: int | Tensor,
    num_states: int,
    progress: bool = False,
    **options: Unpack[LeftToRightOptions],
) -> Tensor:
    """Samples of what follows given tokens; `pad_prompts` makes `x` and `given` of prompts and lengths.

    Args:
        model: x (B, L) int64 -> logits (B, L, N) of the token after each, causal.
        x: (B, L) int64, the given tokens; what it holds at free positions does not matter.
        given: (B, L) bool, the positions that are kept, another set for each sequence if so wished.
        start: the token before the first, for all sequences or (B,) int64.
        num_states: N.
        progress: whether to show a bar.
        **options: as for `sample_left_to_right`; and the errors: see `left_to_right`.

    Returns:
        (B, L) int64, equal to x at the given positions.
    """
    states = left_to_right(model, x=x, given=given, start=start, num_states=num_states, **options)
    return last_state(states, progress)


@torch.no_grad()
def left_to_right(
    model: Callable[..., Any],
    *,
    x: Tensor,
    given: Tensor,
    start: int | Tensor,
    num_states: int,
    controls: Sequence[Control] = (),
    generator: Generator | None = None,
    seeds: Sequence[int] | Tensor | None = None,
    until: Callable[[State], Tensor] | None = None,
) -> Iterator[State]:
    """The states on the way, one a token; what is not written yet is -1 (`live(..., mask_id=-1)` shows it as a block).

    A module is used as it stands: put it into evaluation mode first. It is called for the sequences that are free at
    the next position, and not at all where none is.

    Args:
        model: x (b, l) int64 -> logits (b, l, N) of the token after each, causal; l grows from 1 to L.
        x: (B, L) int64, the given tokens; what it holds at free positions does not matter.
        given: (B, L) bool, the positions that are kept. Those before all free ones are a condition; later ones are not
            looked ahead to.
        start: the token before the first, for all sequences or (B,) int64. A token of the model's own, beyond N, will
            do.
        num_states: N.
        controls: temperature, top-k, top-p, constraints (see `sedd_samplers.controls`), applied in this order to the
            law of each token.
        generator: where the sequences' seeds are drawn from; the global generator when None.
        seeds: B integers instead, one a sequence: its sample then depends on nothing else in the batch, and what is
            drawn at a position is the same whether the tokens before it were drawn or given.
        until: State -> (B,) bool, which sequences are finished. ModelCall after every token. A finished sequence is not
            written any further: what is left of it stays -1. When all are finished the loop ends.

    Yields:
        `State`, L + 1 of them, with t = 1 - step / L; fewer when `until` ends the loop.

    Raises:
        ValueError: for arguments that make no sense, before the first token; for a model that returns the wrong shape,
            NaN, infinity or nothing that can be drawn, at the position where it does, which the message names.
    """
    check_prompt(x, given, num_states, None)
    first = _start(start, len(x)).to(x.device)
    seeds = row_seeds(seeds, generator, len(x)).to(x.device)
    call = ModelCall(model, num_states, "model of the next token", "x")

    total, free = x.shape[1], ~given
    x = x.masked_fill(free, UNWRITTEN)
    yield State(x, 1.0, 0, total)
    for i in range(total):
        row = free[:, i].nonzero()[:, 0]
        if len(row):
            law = _next(call, torch.cat([first[row, None], x[row, :i]], 1), row)
            place = torch.full_like(row, i)
            law = apply_controls(controls, law, row, place, x)
            x = x.clone()
            x[row, i] = draw_categorical(law, uniforms(seeds[row], torch.zeros_like(row), place))
        state = State(x, 1 - (i + 1) / total, i + 1, total)
        yield state
        if until is not None:
            free = free & ~check_finished(until(state), len(x))[:, None]
            if not free[:, i + 1 :].any():
                return


def _next(call: ModelCall, x: Tensor, rows: Tensor) -> Tensor:
    """The law (b, N) of the token after x (b, l), float32 at least; ValueError where it is none."""
    last = torch.zeros_like(x, dtype=torch.bool)
    last[:, -1] = True
    ends = torch.arange(len(x), device=x.device) * x.shape[1] + x.shape[1] - 1
    logits = call(x, None, Positions(last, ends, len(x)), rows).tensor()
    top = logits.amax(-1)
    if not top.isfinite().all():
        b = int((~top.isfinite()).nonzero()[0])
        what = {"nan": "NaN", "inf": "an infinite logit", "-inf": "no logit above -inf"}[str(float(top[b]))]
        raise ValueError(
            f"the model of the next token returned {what} at sequence {int(rows[b])}, position {x.shape[1] - 1}"
        )
    return logits.softmax(-1)


def _start(start: int | Tensor, batch: int) -> Tensor:
    """The first tokens (B,) int64, or ValueError."""
    first = start if isinstance(start, Tensor) else torch.full((batch,), start)
    if first.shape != (batch,) or first.dtype != torch.int64 or bool((first < 0).any()):
        got = f"{first.dtype} {tuple(first.shape)}" if isinstance(start, Tensor) else repr(start)
        raise ValueError(f"start must be one token or int64 of shape ({batch},), none negative, got {got}")
    return first
