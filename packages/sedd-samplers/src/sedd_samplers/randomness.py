"""Uniform numbers as a pure function of (seed, draw, position): the counter-based generator Philox 4x32-10.

Salmon et al., *Parallel random numbers: as easy as 1, 2, 3* (2011). A stateful generator hands out numbers in the order
of asking, so that a sequence's sample would depend on what else is in its batch, on padding, and on which positions
were skipped. Here each number is computed from where it is used, on any device, with the same result.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["philox", "uniforms"]

_WORD = 0xFFFFFFFF


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four random 32-bit words from four words of counter and two of key, all (...) int64 holding 32 bits each."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 64 bits each; the sign bit is the highest bit
        c0, c1 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, p1 & _WORD
        c2, c3 = ((p0 >> 32) & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def uniforms(seed: Tensor, draw: Tensor, position: Tensor) -> Tensor:
    """Float64 uniforms in [0, 1) with 53 random bits, one for each (seed, draw, position); all (M,) int64."""
    zero = torch.zeros_like(seed)
    counter = (position & _WORD, draw & _WORD, (draw >> 32) & _WORD, zero)
    high, low, _, _ = philox(counter, (seed & _WORD, (seed >> 32) & _WORD))
    return ((high << 21) | (low >> 11)).double() * 2.0**-53
