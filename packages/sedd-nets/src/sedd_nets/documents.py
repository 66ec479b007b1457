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

__all__ = ["Documents"]


class Documents:
    """Where the documents of a batch begin and end.

    Build it once a batch, outside of compiled code (it reads `ids` back to the host), and give it to every forward
    on that batch.

    Args:
        ids: (B, L) int64; neighbours of one id are one document, a negative id is padding.

    Attributes:
        spans: (start, stop) of every document, in positions of the flattened batch (B L).
        longest: the length of the longest document.
        cu_seqlens: (documents + 1,) int32, the cumulated lengths, 0 first, as variable-length kernels take them.
        kept: (tokens,) int64, the flattened positions that belong to documents; None when all do.

    Raises:
        ValueError: ids is not (B, L) int64, or all of it is padding.
    """

    def __init__(self, ids: Tensor) -> None:
        if ids.ndim != 2 or ids.dtype != torch.int64:
            raise ValueError(f"document ids must be (B, L) int64; got {ids.dtype} {tuple(ids.shape)}")
        self.ids = ids
        flat = ids.flatten()
        first = torch.ones_like(ids, dtype=torch.bool)
        first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        starts: list[int] = first.flatten().nonzero()[:, 0].tolist()
        stops = [*starts[1:], flat.numel()]
        real: list[bool] = (flat[first.flatten()] >= 0).tolist()
        self.spans = tuple((a, b) for a, b, is_real in zip(starts, stops, real, strict=True) if is_real)
        if not self.spans:
            raise ValueError("every position is padding (a negative id): there is no document")
        lengths = torch.tensor([stop - start for start, stop in self.spans])
        self.longest = int(lengths.max())
        self.cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(ids.device, torch.int32)
        self.kept = None if all(real) else (flat >= 0).nonzero()[:, 0]

    @classmethod
    def padded(cls, lengths: Sequence[int] | Tensor, longest: int) -> Documents:
        """Row i is one document of lengths[i] tokens, then padding up to `longest`.

        Raises:
            ValueError: a length is not in 1..longest.
        """
        sizes = torch.as_tensor(lengths)
        if sizes.numel() == 0 or int(sizes.min()) < 1 or int(sizes.max()) > longest:
            raise ValueError(f"lengths must be in 1..{longest}; got {sizes.tolist()}")
        inside = torch.arange(longest, device=sizes.device) < sizes[:, None]
        return cls(torch.where(inside, 0, -1))

    @cached_property
    def block_mask(self) -> BlockMask:
        """The same as FlexAttention takes it, in blocks of 128 x 128 positions; empty blocks cost nothing."""
        batch, length = self.ids.shape
        run = torch.zeros_like(self.ids)
        run[:, 1:] = (self.ids[:, 1:] != self.ids[:, :-1]).cumsum(1)
        run = run.masked_fill(self.ids < 0, -1)

        def same(b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (run[b, query] == run[b, key]) & (run[b, query] >= 0)

        return create_block_mask(same, batch, None, length, length, device=self.ids.device)
