"""Text in blocks from left to right, each by any method: semi-autoregressive generation.

    p(x) = prod_b p(x^b | x^<b)

Each factor is a run of the reverse process from noise to text in which the blocks before it are given. What stands
behind the block is either there as noise, as in LLaDA (Nie et al., arXiv 2502.09992, 2025): masks, of which a
bidirectional network sees how many there are; or absent, as in block diffusion (BD3LM: Arriola et al., arXiv
2503.09573, 2025), where the canvas grows.

    generate    the finished text and its lengths
    blockwise   the states on the way

An end token ends its sequence: what would follow is padding, and the sequence is not asked about again.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypedDict, Unpack

import torch
from torch import Generator, Tensor
from tqdm import tqdm

from .grids import finite_start, warn_of_text_left
from .infilling import Clamped
from .interfaces import Graph, Noise, ScoreModel
from .model_calls import warn_of_training
from .precision import wide
from .prompts import check_prompt, check_tensors
from .randomness import row_seeds
from .reverse import Reverse
from .sampling import State, batches, check_finished, check_method, check_process, grid_of, named_step, one_step, told
from .steps import Method, Tweedie

__all__ = ["BlockState", "Generated", "generate", "blockwise"]


@dataclass(frozen=True)
class BlockState(State):
    """Where a run stands; t is the time of the block that is being written.

    Attributes:
        lengths: (B,) int64, up to and including the end token; L where there is none yet.
    """

    lengths: Tensor = field(kw_only=True)


class Generated(NamedTuple):
    """What `generate` returns; the text of sequence b is `x[b, : lengths[b]]`."""

    x: Tensor
    """(B, L) int64."""
    lengths: Tensor
    """(B,) int64, up to and including the end token; L where there is none."""
    log_prob: Tensor | None = None
    """(B, L) float64 nats with `log_probs`, as `trajectory` says; behind the end it means nothing."""


class BlockOptions(TypedDict, total=False):
    """What `generate` hands to `blockwise`, where each is explained."""

    origin: int
    growing: bool
    steps: int | None
    method: Method
    generator: Generator | None
    seeds: Sequence[int] | Tensor | None
    times: Tensor | None
    t_min: float | None
    denoise: bool
    end_id: int | None
    pad_id: int | None
    until: Callable[[BlockState], Tensor] | None
    conditioning: Clamped | None
    static_shapes: bool
    log_probs: bool


def generate(
    score: ScoreModel,
    graph: Graph,
    noise: Noise,
    *,
    x: Tensor,
    given: Tensor,
    block_size: int,
    batch_size: int | None = None,
    progress: bool = False,
    **options: Unpack[BlockOptions],
) -> Generated:
    """Text in blocks from left to right, with given tokens; `pad_prompts` makes `x` and `given` of prompts and lengths.

    LLaDA's decoding of 128 tokens behind a prompt of P, in blocks of 32 and greedily, is

        generate(score, graph, noise, x=x, given=given, block_size=32, origin=P, steps=32, end_id=eos,
                 method=ConfidenceUnmasking(confidence, controls=(top_k(1),)))

    Args:
        score: (x (B, L), sigma (B,)) -> log-score (B, L, N), see `ScoreModel`.
        graph: the forward process the model was trained for.
        noise: its schedule.
        x: (B, L) int64, the given tokens; what it holds at free positions does not matter.
        given: (B, L) bool, the positions that keep their tokens.
        block_size: how many positions a block has; the last one has what is left.
        batch_size: how many sequences go through the model at a time, as for `sample`.
        progress: whether to show a bar, one for each batch.
        **options: `origin=0`, `growing=False`, `steps=block_size`, `method=Tweedie()`, `generator`, `seeds`, `times`,
            `t_min=1e-5`, `denoise=True`, `end_id`, `pad_id`, `until`, `conditioning`, `static_shapes`, `log_probs`; and
            the errors: see `blockwise`.

    Returns:
        x (B, L), equal to the given tokens where they are given, and lengths (B,).
    """
    check_tensors(x, given)
    out = []
    for rows, own, seeds in batches(score, graph, len(x), batch_size, options):
        part: BlockOptions = {**options, "seeds": seeds, "generator": None}
        states = blockwise(own, graph, noise, x=x[rows], given=given[rows], block_size=block_size, **part)
        first = next(states)
        shown = tqdm(states, total=first.steps, desc="generating", unit="step", disable=not progress)
        out.append(deque(itertools.chain([first], shown), maxlen=1).pop())
    log_probs = [state.log_prob for state in out if state.log_prob is not None]
    return Generated(
        torch.cat([state.x for state in out]),
        torch.cat([state.lengths for state in out]),
        torch.cat(log_probs) if log_probs else None,
    )


@torch.no_grad()
def blockwise(
    score: ScoreModel,
    graph: Graph,
    noise: Noise,
    *,
    x: Tensor,
    given: Tensor,
    block_size: int,
    origin: int = 0,
    growing: bool = False,
    steps: int | None = None,
    method: Method = Tweedie(),  # noqa: B008, frozen and without state
    generator: Generator | None = None,
    seeds: Sequence[int] | Tensor | None = None,
    times: Tensor | None = None,
    t_min: float | None = None,
    denoise: bool = True,
    end_id: int | None = None,
    pad_id: int | None = None,
    until: Callable[[BlockState], Tensor] | None = None,
    conditioning: Clamped | None = None,
    static_shapes: bool = False,
    log_probs: bool = False,
) -> Iterator[BlockState]:
    """The states on the way, the whole canvas each time.

    Args:
        score: (x (B, L), sigma (B,)) -> log-score (B, L, N), see `ScoreModel`.
        graph: the forward process the model was trained for.
        noise: its schedule, which every block runs through.
        x: (B, L) int64, the given tokens; what it holds at free positions does not matter.
        given: (B, L) bool, the positions that never move.
        block_size: how many positions a block has; the last one has what is left. A block without free positions
            costs nothing.
        origin: where blocks are counted from; what is free before it is a block of its own. The prompt's length for
            LLaDA, 0 for block diffusion, whose network knows where blocks begin.
        growing: whether the canvas ends with the block, so that the model does not see what will be behind it, not even
            that there is something; else noise stands there, masks under absorbing graphs.
        steps: how many a block takes from t = 1 to t_min; `block_size` when None. The final denoise comes on top.
        method: the step.
        generator: where the sequences' seeds are drawn from; the global generator when None.
        seeds: B integers instead, one a sequence: its text then depends on nothing else in the batch.
        times: a grid (steps + 1,) of a block, instead of `steps` and `t_min`; `token_grid` has LLaDA's.
        t_min: the time at which a block's last step ends; 1e-5 when None.
        denoise: whether a block ends with the final denoise; without it a mask may be left.
        end_id: the token that ends a sequence. Looked for in what is written, when its block is finished.
        pad_id: what is put behind the end of a sequence; `end_id` when None.
        until: `BlockState` -> (B,) bool, which sequences are finished as they are. Asked at the start and after every
            block; what is not written of a finished sequence becomes padding.
        conditioning: `clamped` where the graph noises tokens: the model then sees clean tokens beside noised ones. That
            is exact for a network trained so (with sigma = 0 for a clean block), else an approximation.
        static_shapes: whether the model is called with all sequences and for all positions of the canvas, as for
            `trajectory`; a canvas that grows has one shape a block.
        log_probs: whether `BlockState.log_prob` says with what probability each token was drawn; see `trajectory`.

    Yields:
        `BlockState`, one for each step of a block that has something to write, and the start; no mask is left in a
        sequence that is finished.

    Raises:
        ValueError: as for `trajectory`, and for a block_size or an origin that makes no sense, `until` without a
            `pad_id`, or an end or padding token that is none.
    """
    check_method(method)
    check_process(graph, noise)
    warn_of_training(score)
    check_prompt(x, given, graph.num_states, graph.mask_id)
    bounds = _bounds(x.shape[1], block_size, origin)
    pad = _padding(graph, end_id, pad_id, until)
    grid = finite_start(noise, grid_of(block_size if steps is None and times is None else steps, t_min, times))
    warn_of_text_left(graph, noise, given.new_full((), float(grid[0]), dtype=wide(given.device)))
    seeds = row_seeds(seeds, generator, len(x)).to(x.device)
    times = grid.to(x.device, wide(x.device))
    reverse = Reverse(score, graph, noise, frozen=given, seeds=seeds, static_shapes=static_shapes, times=times)
    if conditioning is None and reverse.noises_tokens and (len(bounds) > 1 or bool(given.any())):
        raise ValueError(
            "this graph noises tokens, and finished blocks are clean: say conditioning=clamped, which is exact for a "
            "network that was trained with clean blocks before the noised one, and else an approximation"
        )
    ends = list(itertools.pairwise([*grid.tolist(), *([0.0] if denoise else [])]))  # the host's own numbers
    place, total = torch.arange(x.shape[1], device=x.device), len(bounds) * len(ends)
    endings = _Endings(given, -1 if end_id is None else end_id, pad, until)

    x = torch.where(given, x, reverse.prior())
    log_prob = torch.zeros(x.shape, dtype=wide(x.device), device=x.device) if log_probs else None
    state = BlockState(x, float(grid[0]), 0, total, log_prob, lengths=endings.lengths)
    x = endings.after(state, 0, 0)
    yield replace(state, x=x, lengths=endings.lengths)
    for number, (begin, end) in enumerate(bounds):
        free = ~given & ~endings.done[:, None] & (place >= begin) & (place < end)
        width = end if growing else x.shape[1]
        reverse.frozen, reverse.unfinished = ~free[:, :width], None
        for step, (t, s) in enumerate(ends, 1):
            with named_step(reverse, step, len(ends), t, s, f" of block {number}"):
                before = x[:, :width]
                reverse.log_prob = None if log_prob is None else torch.full_like(log_prob[:, :width], torch.nan)
                after = one_step(reverse, before, method, step, len(grid))
                if reverse.unfinished is None:  # the step had nothing to read
                    reverse.finish()
                    reverse.unfinished = bool(free.any())
                if not reverse.unfinished:
                    break
                if log_prob is not None:
                    log_prob = torch.cat([told(log_prob[:, :width], reverse, before, after), log_prob[:, width:]], 1)
                if end == x.shape[1] and step == len(ends):
                    reverse.finish()
            x, count = torch.cat([after, x[:, width:]], 1), number * len(ends) + step
            state = BlockState(x, s, count, total, log_prob, lengths=endings.lengths)
            x = endings.after(state, begin, end) if step == len(ends) else state.x
            yield replace(state, x=x, lengths=endings.lengths)


class _Endings:
    """Which sequences are finished, done (B,), and their lengths (B,)."""

    def __init__(self, given: Tensor, end_id: int, pad_id: int, until: Callable[[BlockState], Tensor] | None) -> None:
        self._given, self._end_id, self._pad_id, self._until = given, end_id, pad_id, until
        self._place = torch.arange(given.shape[1], device=given.device)
        self.lengths = torch.full_like(given[:, 0], given.shape[1], dtype=torch.int64)
        self.done = torch.zeros_like(given[:, 0])

    def after(self, state: BlockState, begin: int, end: int) -> Tensor:
        """The states once the block from `begin` to `end` is written: ended by its end token, or as `until` says."""
        written = ~self._given & (self._place >= begin) & (self._place < end)
        ends = (state.x == self._end_id) & written
        x = self._finish(state.x, ends.any(1), ends.int().argmax(1) + 1)
        if self._until is not None:
            asked = self._until(replace(state, x=x, lengths=self.lengths))
            x = self._finish(x, check_finished(asked, len(x)), torch.full_like(self.lengths, end))
        return x

    def _finish(self, x: Tensor, now: Tensor, length: Tensor) -> Tensor:
        """X with the sequences that are finished `now` (B,) padded behind their length (B,)."""
        now = now & ~self.done
        self.lengths, self.done = torch.where(now, length, self.lengths), self.done | now
        behind = now[:, None] & (self._place >= length[:, None]) & ~self._given
        return torch.where(behind, self._pad_id, x)


def _bounds(length: int, block_size: int, origin: int) -> list[tuple[int, int]]:
    """Where each block begins and ends."""
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size must be a positive integer, got {block_size!r}")
    if isinstance(origin, bool) or not isinstance(origin, int) or not 0 <= origin <= length:
        raise ValueError(f"origin must be a position of 0..{length}, got {origin!r}")
    edges = [*([0] if origin else []), *range(origin, length, block_size), length]
    return list(itertools.pairwise(edges))


def _padding(graph: Graph, end_id: int | None, pad_id: int | None, until: object) -> int:
    for name, token in (("end_id", end_id), ("pad_id", pad_id)):
        if token is not None and (not 0 <= token < graph.num_states or token == graph.mask_id):
            raise ValueError(f"{name} must be a token of 0..{graph.num_states - 1} and not the mask, got {token}")
    pad_id = end_id if pad_id is None else pad_id
    if until is not None and pad_id is None:
        raise ValueError("until finishes sequences that are not written to their end: say what pads them, pad_id=")
    return -1 if pad_id is None else pad_id
