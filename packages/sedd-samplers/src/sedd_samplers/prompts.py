"""Prompts of different lengths, and sequences of different lengths, as one batch of given and free positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .randomness import draw_shared, uniforms

__all__ = ["pad_prompts", "draw_lengths", "check_prompt", "check_tensors", "check_shape", "check_start"]


def pad_prompts(
    prompts: Sequence[Sequence[int]],
    length: int | Sequence[int],
    *,
    pad_id: int | None = None,
    left: bool = False,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """What `infill` needs to continue prompts.

        x, given = pad_prompts([[5, 7], [5]], [8, 12], pad_id=0)
        x = infill(score, graph, noise, x=x, given=given)

    Padding is given, so that it never moves, and the model sees it as the tokens `pad_id`. To a model that knows
    padding, as that of `from_masked_lm(..., pad_id=)` does, it is nothing: a sequence's sample is the one that it would
    have alone. Where padding is told by an attention mask instead, `from_hf(..., attention_mask=)`, that is 0 at the
    last (or, padded on the left, the first) positions of the shorter ones.

    Args:
        prompts: for each sequence the tokens that it begins with; none is an empty list.
        length: of all sequences, or of each.
        pad_id: the token after a sequence's end; needed where lengths differ.
        left: whether padding comes before a sequence instead of after it.
        device: where the result lives.

    Returns:
        x (B, L) int64 and given (B, L) bool, L being the longest length.

    Raises:
        ValueError: a prompt is longer than its sequence, lengths differ and there is no `pad_id`, or there are not as
            many lengths as prompts.
    """
    lengths = [length] * len(prompts) if isinstance(length, int) else list(length)
    if len(lengths) != len(prompts) or not prompts:
        raise ValueError(f"there must be one length for each prompt, got {len(lengths)} for {len(prompts)} prompts")
    for i, (prompt, own) in enumerate(zip(prompts, lengths, strict=True)):
        if own < 1 or len(prompt) > own:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens, which do not fit into a sequence of length {own}")
    if pad_id is None and len(set(lengths)) > 1:
        raise ValueError(f"lengths differ, from {min(lengths)} to {max(lengths)}: name the token that pads, pad_id=")
    x = torch.full((len(prompts), max(lengths)), 0 if pad_id is None else pad_id, dtype=torch.int64)
    begin = [max(lengths) - own if left else 0 for own in lengths]
    given = torch.ones_like(x, dtype=torch.bool)
    for i, (prompt, own) in enumerate(zip(prompts, lengths, strict=True)):
        x[i, begin[i] : begin[i] + len(prompt)] = torch.as_tensor(prompt, dtype=torch.int64)
        given[i, begin[i] + len(prompt) : begin[i] + own] = False
    return x.to(device), given.to(device)


def draw_lengths(law: Tensor, seeds: Sequence[int] | Tensor) -> Tensor:
    """Lengths to sample sequences of, by the law of the lengths that a model was trained on.

    A model that was trained on rows of many lengths, padding left out, says nothing of lengths: the law has to be
    carried along.

        lengths = draw_lengths(torch.bincount(training_lengths)[1:], seeds)
        x, given = pad_prompts([[]] * len(seeds), lengths.tolist(), pad_id=0)

    Args:
        law: (L,) weights >= 0 of the lengths 1 to L; they need not sum to 1.
        seeds: B integers, one a sequence; those that the sequences are sampled with will do.

    Returns:
        (B,) int64.

    Raises:
        ValueError: the law is no (L,) or has nothing to draw.
    """
    law = torch.as_tensor(law).double()
    if law.ndim != 1 or not len(law) or bool((law < 0).any()) or not 0 < float(law.sum()) < float("inf"):
        raise ValueError(f"the law must be (L,) weights, none negative and not all 0, got {tuple(law.shape)}")
    seeds = torch.as_tensor(seeds).long()
    uniform = uniforms(seeds, torch.full_like(seeds, -1), torch.zeros_like(seeds))  # no run draws that often
    return draw_shared(law.to(seeds.device), uniform) + 1


def check_prompt(x: Tensor, given: Tensor, num_states: int, mask_id: int | None) -> None:
    """ValueError unless x (B, L) int64 holds tokens at the given positions (B, L) bool."""
    check_tensors(x, given)
    if x.ndim != 2 or x.dtype != torch.int64:
        raise ValueError(f"x must be int64 of shape (batch, length), got {x.dtype} {tuple(x.shape)}")
    if given.shape != x.shape or given.dtype != torch.bool:
        raise ValueError(f"given must be bool of x's shape {tuple(x.shape)}, got {given.dtype} {tuple(given.shape)}")
    tokens = x[given]
    wrong = (tokens < 0) | (tokens >= num_states)
    if wrong.any():
        state = int(tokens[wrong][0])
        raise ValueError(f"x holds the state {state} at a given position; states are 0..{num_states - 1}")
    if mask_id is not None and (tokens == mask_id).any():
        raise ValueError(f"x holds the mask ({mask_id}) at a given position, which would stay; leave it free")


def check_tensors(x: object, given: object) -> None:
    """ValueError for a text where its ids should be, and the like."""
    for name, what in (("x", x), ("given", given)):
        if not isinstance(what, Tensor):
            raise ValueError(
                f"{name} must be a tensor (batch, length), got {what!r:.80}: pad_prompts makes x and given"
            )


def check_shape(shape: tuple[int, int]) -> None:
    """ValueError unless it is two positive integers."""
    if not isinstance(shape, Sequence) or len(shape) != 2 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"shape must be (batch, length), two positive integers, got {shape!r}")


def check_start(start: Tensor, x: Tensor, num_states: int) -> Tensor:
    """The states to start from, or ValueError: (B, L) int64 as x, of 0..N - 1."""
    if not isinstance(start, Tensor) or start.shape != x.shape or start.dtype != torch.int64:
        got = f"{start.dtype} {tuple(start.shape)}" if isinstance(start, Tensor) else repr(start)
        raise ValueError(f"start must be int64 of x's shape {tuple(x.shape)}, got {got}")
    if ((start < 0) | (start >= num_states)).any():
        raise ValueError(f"start holds a state outside 0..{num_states - 1}")
    return start.to(x.device)
