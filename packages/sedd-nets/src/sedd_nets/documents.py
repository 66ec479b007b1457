"""Several texts in one row, or rows of different lengths: attention then stays within each text.

A document is a run of neighbouring positions of one row. Positions of no document are padding: they attend to nothing,
nothing attends to them, and their outputs carry no meaning. Rotary positions depend on distances only, so documents
need no positions of their own; noise levels of their own are a sigma of shape (B, L).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from sedd_nets.checks import on_host

__all__ = ["Documents"]


class Documents:
    """Where the documents of a batch begin and end.

    Build it once a batch, outside of compiled code, and give it to every forward on that batch. What a kernel needs is
    worked out when it is first asked for. `spans`, `longest`, `kept` and `cu_seqlens` read `ids` back to the host,
    `mask` and `block_mask` do not: on a GPU build it of ids on the CPU and move it (`to`), or keep to the latter.

    Args:
        ids: (B, L) int64; neighbours of one id are one document, a negative id is padding.

    Raises:
        ValueError: ids is not (B, L) int64, or all of it is padding (checked where ids is on the CPU).
    """

    def __init__(self, ids: Tensor) -> None:
        if ids.ndim != 2 or ids.dtype != torch.int64:
            raise ValueError(f"document ids must be (B, L) int64; got {ids.dtype} {tuple(ids.shape)}")
        self.ids = ids
        if on_host(ids) and not bool((ids >= 0).any()):
            raise ValueError("every position is padding (a negative id): there is no document")

    @classmethod
    def padded(cls, lengths: Sequence[int] | Tensor, longest: int) -> Documents:
        """Row i is one document of lengths[i] tokens, then padding up to `longest`.

        Raises:
            ValueError: a length is not in 1..longest (checked where lengths are not on a GPU).
        """
        sizes = torch.as_tensor(lengths)
        if sizes.numel() == 0 or (on_host(sizes) and (int(sizes.min()) < 1 or int(sizes.max()) > longest)):
            raise ValueError(f"lengths must be in 1..{longest}; got {sizes.tolist()}")
        inside = torch.arange(longest, device=sizes.device) < sizes[:, None]
        return cls(torch.where(inside, 0, -1))

    def to(self, device: torch.device | str) -> Documents:
        """The same documents for tensors on another device; what is known of them on the host stays known."""
        moved = Documents.__new__(Documents)
        moved.ids = self.ids.to(device, non_blocking=True)
        moved.spans, moved.longest = self.spans, self.longest
        moved.cu_seqlens = self.cu_seqlens.to(device, non_blocking=True)
        moved.kept = None if self.kept is None else self.kept.to(device, non_blocking=True)
        return moved

    @cached_property
    def inside(self) -> Tensor:
        """(B, L) bool: which positions belong to a document."""
        return self.ids >= 0

    @cached_property
    def runs(self) -> Tensor:
        """(B, L) int64: the number of a position's document in its row, -1 for padding."""
        run = torch.zeros_like(self.ids)
        run[:, 1:] = (self.ids[:, 1:] != self.ids[:, :-1]).cumsum(1)
        return run.masked_fill(~self.inside, -1)

    @cached_property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """(start, stop) of every document, in positions of the flattened batch (B L)."""
        flat, first = self.ids.flatten(), torch.ones_like(self.ids, dtype=torch.bool)
        first[:, 1:] = self.ids[:, 1:] != self.ids[:, :-1]
        starts: list[int] = first.flatten().nonzero()[:, 0].tolist()
        real: list[bool] = (flat[first.flatten()] >= 0).tolist()
        stops = [*starts[1:], flat.numel()]
        return tuple((a, b) for a, b, is_real in zip(starts, stops, real, strict=True) if is_real)

    @cached_property
    def longest(self) -> int:
        """The length of the longest document."""
        return max(stop - start for start, stop in self.spans)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """(documents + 1,) int32, the cumulated lengths, 0 first, as variable-length kernels take them."""
        lengths = torch.tensor([0, *(stop - start for start, stop in self.spans)])
        return lengths.cumsum(0).to(self.ids.device, torch.int32)

    @cached_property
    def kept(self) -> Tensor | None:
        """(tokens,) int64, the flattened positions that belong to documents; None when all do."""
        if sum(stop - start for start, stop in self.spans) == self.ids.numel():
            return None
        return self.inside.flatten().nonzero()[:, 0]

    @cached_property
    def mask(self) -> Tensor:
        """(B, L, L) bool: which position (last axis) each may attend to; padding sees padding."""
        _ = self.inside
        return self.runs[:, :, None] == self.runs[:, None, :]

    @cached_property
    def block_mask(self) -> BlockMask:
        """The same as FlexAttention takes it, in blocks of 128 x 128 positions; empty blocks cost nothing."""
        batch, length = self.ids.shape
        run = self.runs

        def same(b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (run[b, query] == run[b, key]) & (run[b, query] >= 0)

        return create_block_mask(same, batch, None, length, length, device=self.ids.device)
