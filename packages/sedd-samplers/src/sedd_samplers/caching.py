"""What a network need not work out twice: its answer about a sequence, and the keys and values of what is finished.

    cached          the last answer about each sequence, for networks that do not know the time
    prefix_cached   keys and values of the positions before the block that is being written

Under an absorbing graph with many steps most steps move nothing in a given sequence. A network that does not take sigma
answers as before; what is kept of its answer is compared sequence by sequence, with equality of the states.

In text that is written in blocks from left to right, or token by token, everything before the block stands. Where no
position of a network sees what is behind its block, keys and values of finished blocks are what they would be at any
later call, and keeping them changes nothing. In a network that looks both ways they would have changed a little with
the text behind them; kept from the beginning of a block to its end they are an approximation, Fast-dLLM's.

Both compare contents, so that they serve under any adapter and any method, whatever it does to the states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .interfaces import KeyValues, RowModel
from .model_calls import Wrapper, offers
from .positions import Positions, true_indices

__all__ = ["cached", "prefix_cached"]


def cached(model: Callable[..., Tensor]) -> RowModel:
    """The same model, called only for sequences that have changed since its last call.

        score = from_logits(cached(network), graph)

    What is kept is compared by contents. It is the last answer, as many rows as were asked for. Make one for each run:
    of a network that was trained on in the meantime it would not know.

    Args:
        model: a model of sequences (see `sedd_samplers.model_calls`) that ignores sigma.

    Returns:
        A model with the same answers.

    Raises:
        ValueError: for a score model made by this package, which depends on sigma: the network inside is what to cache;
            when first called, for a model whose answer changes with sigma.
    """
    if isinstance(model, Wrapper):
        raise ValueError(
            "cached takes a network that does not know the time, and this is a score model, which depends on sigma by "
            "the factor of its graph: cache the network inside, as in from_logits(cached(network), graph)"
        )
    offers_rows, rows_of, kept = offers(model, "rows"), _by_number(model), _Answers()

    def ask(x: Tensor, sigma: Tensor, flat: Tensor, rows: Tensor) -> Tensor:
        return rows_of(x, sigma, flat, {"rows": rows} if offers_rows else {})

    checked: list[bool] = []

    def check(x: Tensor, sigma: Tensor, where: Tensor, rows: Tensor) -> None:
        """Two calls about one sequence at different noise."""
        flat = where[0].nonzero()[:, 0]
        one, other = (ask(x[:1], level * torch.ones_like(sigma[:1]), flat, rows[:1]) for level in (0.5, 1.5))
        if not torch.allclose(one, other, rtol=1e-4, atol=1e-4, equal_nan=True):
            raise ValueError(
                "cached takes a network that does not know the time; this one's answer changes with sigma, by up to "
                f"{float((one - other).abs().max()):.3g} from sigma = 0.5 to 1.5"
            )
        checked.append(True)

    def rows_at(x: Tensor, sigma: Tensor, at: Positions, rows: Tensor) -> Tensor:
        where = at.where
        if not checked and len(x):
            check(x, sigma, where, rows)
        changed, counts = kept.changed(x, where, rows)
        picked = [i for i, own in enumerate(changed.on_host) if own]
        if len(picked) == len(x):
            answer = ask(x, sigma, at.flat, rows)
            kept.keep(x, where, list(torch.split(answer, counts)))
            return answer
        parts = kept.parts
        if picked:
            some, own = true_indices(changed.there, len(picked)), [counts[i] for i in picked]
            answer = ask(x[some], sigma[some], true_indices(where[some].flatten(), sum(own)), rows[some])
            for i, part in zip(picked, torch.split(answer, own), strict=True):
                parts[i] = part
            kept.keep(x, where, parts)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return Wrapper(rows_at, model)


class _Answers:
    """What `cached` keeps: of which sequences, their states and what was asked about them, and the answers (m, N)."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self._rows: list[int] = []
        self._x, self._where = torch.empty(0, 0, dtype=torch.int64), torch.empty(0, 0, dtype=torch.bool)

    def changed(self, x: Tensor, where: Tensor, rows: Tensor) -> tuple[_Changed, list[int]]:
        """Which sequences are not as they are kept, and how many positions of each are asked about: one read."""
        differs = self._differs(x, where) if self._x.shape == x.shape else torch.ones_like(where[:, 0])
        told = torch.cat([rows.to(x.device), where.sum(1), differs]).tolist()
        numbers, counts, changed = (told[i * len(x) : (i + 1) * len(x)] for i in range(3))
        if numbers != self._rows:  # some came or left, and it takes another read
            differs = self._aligned(numbers, x, where)
            changed = differs.tolist()
        return _Changed(differs, changed), counts

    def keep(self, x: Tensor, where: Tensor, parts: list[Tensor]) -> None:
        """These states, which may be edited in place, and the answers about them."""
        self._x, self._where, self.parts = x.clone(), where.clone(), parts

    def _differs(self, x: Tensor, where: Tensor) -> Tensor:
        return ((self._x != x) | (self._where != where)).any(1)

    def _aligned(self, numbers: list[int], x: Tensor, where: Tensor) -> Tensor:
        """Which sequences differ, (b,) bool, once what is kept stands in the order of these numbers."""
        place = {b: i for i, b in enumerate(self._rows)} if self._x.shape[1] == x.shape[1] else {}
        self._rows = numbers
        if not place:
            self.parts = [x.new_empty(0)] * len(numbers)
            return torch.ones_like(where[:, 0])
        old = torch.tensor([place.get(b, -1) for b in numbers], device=x.device)
        self._x, self._where = self._x[old], self._where[old]
        self.parts = [self.parts[place.get(b, -1)] for b in numbers]
        return self._differs(x, where) | (old < 0)


class _Changed(NamedTuple):
    """Which sequences differ."""

    there: Tensor
    """(b,) bool, on the device."""
    on_host: list[int]
    """The same numbers."""


def prefix_cached(
    model: Callable[..., Tensor],
    new_cache: Callable[[], KeyValues],
    *,
    block_size: int,
    origin: int = 0,
    approximate: bool = False,
) -> Callable[..., Tensor]:
    """The same model, which keeps keys and values of the blocks that stand before the one that is asked about.

        network = prefix_cached(BD3LM(...), KeyValueCache, block_size=16)
        generate(network, graph, noise, x=x, given=given, block_size=16, growing=True)

    What is kept is compared by contents with what is asked, whole blocks at a time; the first block that differs goes
    through the network, and all behind it. In K blocks with n calls each, in a canvas that grows, that is a share

        2 (n + 1 - 1/K) / (n (K + 1))

    of the positions that go through it otherwise: the first call of a block goes through the one before it, too, which
    was not finished when it was last seen. A sequence that was left out of a call is a new one when it comes back, so
    that this serves methods that ask about all sequences, `ConfidenceUnmasking` or `Tweedie`. With `static_shapes`
    every call is about all positions, and nothing is kept. How far contents agree is read back from the device, once a
    call, beside the sampler's own read.

    With `approximate`, for a network that looks both ways: the first call about a block is about the whole canvas, and
    until the block is finished what stands before it keeps the keys and values that it had there: the prefix cache of
    Wu et al., *Fast-dLLM: training-free acceleration of diffusion LLM by enabling KV cache and parallel decoding*
    (arXiv 2505.22618, 2025). In a small network of characters that moved its posterior by a total variation of 0.003 on
    average, 99 of 100 by less than 0.04; `benchmarks/block_cache.py` in the source tree measures it.

    Make one for each run: what is kept belongs to the run's sequences, and of a network that was trained on in the
    meantime it would not know.

    Args:
        model: (x (b, l) int64, sigma (b,), cache=) -> (b, l, N) about the positions behind those in the cache, which it
            adds to it; it may offer `where` or `positions`. A model of the next token is called without sigma. For one
            of transformers: `lambda x, sigma, cache: model(x, past_key_values=cache, attention_mask=...).logits`.
        new_cache: an empty one: `sedd_nets.KeyValueCache`, transformers' `DynamicCache`.
        block_size: within what positions may see each other; 1 for a model that reads from left to right.
        origin: where blocks are counted from; what stands before it is a block.
        approximate: whether the model may look both ways.

    Returns:
        A model of sequences, (x, sigma=None, where=None, rows=None, positions=None), with the same answers, or nearly.

    Raises:
        ValueError: for a block_size below 1 or a model that does not offer `cache`; without `approximate`, when first
            something is reused, for a model whose answer changes with what stood behind a finished block.
    """
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size must be a positive integer, got {block_size!r}")
    if not offers(model, "cache"):
        raise ValueError("prefix_cached takes a model with a parameter `cache`, and this one has none")
    rows_of, kept = _by_number(model), _Kept(new_cache, block_size, origin, approximate)

    def ask(x: Tensor, sigma: Tensor | None, flat: Tensor, cache: KeyValues) -> Tensor:
        return rows_of(x, sigma, flat, {"cache": cache})

    def check(x: Tensor, sigma: Tensor | None, flat: Tensor, begin: int) -> None:
        """One sequence as a whole, and behind keys and values that were made beside another text than its own."""
        cache, other = new_cache(), x.clone()
        other[:, begin:] = x[:, begin - 1 : begin]
        ask(other, sigma, flat, cache)
        cache.crop(begin - x.shape[1])
        _check_same(ask(x[:, begin:], sigma, flat - begin, cache), ask(x, sigma, flat, new_cache()))

    def at(
        x: Tensor,
        sigma: Tensor | None = None,
        where: Tensor | None = None,
        rows: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        length, whole = x.shape[1], where is None and positions is None
        if positions is None:
            flat = torch.arange(x.numel(), device=x.device) if where is None else where.flatten().nonzero()[:, 0]
        else:
            flat = positions
        rows = torch.arange(len(x), device=x.device) if rows is None else rows
        begin = kept.begin(x, _true_at(flat, x), rows)
        behind = flat // length * (length - begin) + flat % length - begin
        answer = ask(x[:, begin:], sigma, behind, kept.cache)
        if begin and not approximate and not kept.checked:
            kept.checked = True
            check(x[:1], None if sigma is None else sigma[:1], flat[flat < length], begin)
        return answer.view(*x.shape, -1) if whole else answer

    return at


class _Kept:
    """What `prefix_cached` keeps: of which sequences, their states as they were last seen, keys and values of those."""

    def __init__(self, new_cache: Callable[[], KeyValues], block_size: int, origin: int, approximate: bool) -> None:
        self._new_cache, self._block_size, self._origin, self._approximate = new_cache, block_size, origin, approximate
        self.cache, self.checked = new_cache(), False
        self._rows: list[int] = []
        self._x = torch.empty(0, 0, dtype=torch.int64)
        self._writing = 0

    def begin(self, x: Tensor, asked: Tensor, rows: Tensor) -> int:
        """From which position on the network has to see x; the cache then holds what is before it."""
        changed, first = self._where(x, asked, rows)
        writing = self._floor(first)
        if self._approximate:
            begin = writing if writing == self._writing and writing <= self._floor(changed) else 0
        else:
            begin = min(writing, self._floor(changed))
        if begin == 0:
            self.cache = self._new_cache()
        elif begin < self._x.shape[1]:
            self.cache.crop(begin - self._x.shape[1])
        self._x, self._writing = x.clone(), writing  # x may be edited in place
        return begin

    def _where(self, x: Tensor, asked: Tensor, rows: Tensor) -> tuple[int, int]:
        """The first position that is not as it was, in any sequence, and the first that is asked about: one read."""
        kept = self._x if len(self._x) == len(x) else x[:, :0]
        *numbers, changed, first = torch.cat([rows.to(x.device), _agreement(x, kept, asked)]).tolist()
        if numbers == self._rows:
            return changed, first
        place = {b: i for i, b in enumerate(self._rows)}
        self._rows = numbers
        if not all(b in place for b in numbers):
            self._x = x[:, :0]
        else:  # some were left out, and it takes another read
            index = torch.tensor([place[b] for b in numbers], device=x.device)
            self.cache.batch_select_indices(index)
            self._x = self._x[index]
        changed, first = _agreement(x, self._x, asked).tolist()
        return changed, first

    def _floor(self, position: int) -> int:
        """Where the block that holds the position begins."""
        if position < self._origin:
            return 0
        return position - (position - self._origin) % self._block_size


def _by_number(model: Callable[..., Tensor]) -> Callable[[Tensor, Tensor | None, Tensor, dict[str, Any]], Tensor]:
    """The model's rows (M, N) at positions of x (b, L), as indices into the flattened batch: nothing is read."""
    offers_positions, offers_where = offers(model, "positions"), offers(model, "where")

    def rows_of(x: Tensor, sigma: Tensor | None, flat: Tensor, further: dict[str, Any]) -> Tensor:
        inputs = (x,) if sigma is None else (x, sigma)
        if offers_positions:
            return model(*inputs, positions=flat, **further)
        if offers_where:
            return model(*inputs, where=_true_at(flat, x), **further)
        return model(*inputs, **further).flatten(0, 1)[flat]

    return rows_of


def _true_at(flat: Tensor, x: Tensor) -> Tensor:
    """True at these positions of x (b, L), as indices into the flattened batch: (b, L) bool."""
    return torch.zeros(x.numel(), dtype=torch.bool, device=x.device).index_fill(0, flat, True).view(x.shape)


def _agreement(x: Tensor, kept: Tensor, asked: Tensor) -> Tensor:
    """(2,) int64: where x (b, L) first differs from what is kept of it (b, l), and the first position asked about."""
    width = min(x.shape[1], kept.shape[1])
    same = (x[:, :width] == kept[:, :width]).all(0).long().cumprod(0).sum()
    before = (~asked.any(0)).long().cumprod(0).sum()
    return torch.stack([same, before])


def _check_same(answer: Tensor, whole: Tensor) -> None:
    """ValueError where the answer is not that about the whole sequence, to rounding."""
    here = whole.isfinite()
    off, size = float((answer - whole)[here].abs().max()), float(whole[here].abs().max())
    if not off <= 1e3 * torch.finfo(whole.dtype).eps * max(size, 1.0):
        raise ValueError(
            f"keys and values of finished blocks change with what stands behind them, and what this model says by "
            f"{off:.3g}: it looks beyond its block, or its blocks begin elsewhere (block_size=, origin=). "
            "approximate=True keeps them all the same, which is Fast-dLLM's approximation"
        )
