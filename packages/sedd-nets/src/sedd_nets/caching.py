"""Keys and values of positions that are finished, so that only those behind them go through the trunk.

    net(x, sigma, cache=cache)     x are the positions behind those in the cache, and are added to it

A network that reads from left to right, position by position or block by block (`Causal`, `BD3LM`), answers as it does
about the whole sequence: what a position knows does not depend on what stands behind its block. In a network that looks
both ways the keys and values of the finished positions were made beside others than stand there now, and the answer is
approximate.

The methods are named as those of transformers' caches are, so that whoever drives one can drive the other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sedd_nets.documents import Documents

__all__ = ["KeyValueCache", "CachedAttention"]


class KeyValueCache:
    """Keys and values (B, L, H, d) of every block of a trunk, rotary angles included."""

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Tensor]] = []

    def get_seq_length(self) -> int:
        """How many positions there are."""
        return self._kept[0][0].shape[1] if self._kept else 0

    def crop(self, count: int) -> None:
        """Forget the last `-count` positions; ValueError for a positive count or more than there are."""
        there = self.get_seq_length()
        end = there + count
        if not 0 <= end <= there:
            raise ValueError(f"crop takes minus the number of positions to forget, at most {there}; got {count}")
        self._kept = [(k[:, :end], v[:, :end]) for k, v in self._kept]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices` (b,) int64, in that order."""
        self._kept = [(k[indices], v[indices]) for k, v in self._kept]

    def update(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Those of a block, (B, l, H, d) each, added behind what is there; returns all of them."""
        if layer == len(self._kept):
            self._kept.append((k, v))
        else:
            before = self._kept[layer]
            self._kept[layer] = torch.cat([before[0], k], 1), torch.cat([before[1], v], 1)
        return self._kept[layer]


class CachedAttention:
    """Attention of new positions to those in a cache and to each other, for one pass through the blocks.

    Args:
        cache: what is known, and is added to.
        mask: (l, L) bool, which of all L positions each of the l new ones sees; None: all.
    """

    def __init__(self, cache: KeyValueCache, mask: Tensor | None) -> None:
        self._cache, self._mask, self._layer = cache, mask, 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        """(B, l, H, d) each, and so is the output."""
        k, v = self._cache.update(k, v, self._layer)
        self._layer += 1
        q, k, v = (a.transpose(1, 2) for a in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask).transpose(1, 2)
