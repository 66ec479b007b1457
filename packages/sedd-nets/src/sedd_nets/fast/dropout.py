"""Dropout as a function of a seed for each sequence: what is dropped depends on nothing else.

torch's own generator hands out its numbers in the order in which they are asked for, so that a sequence's dropout
depends on the batch it is in. Here the choice for one element is a hash of (the sequence's seed, the place in the
network, the position, the channel), in integer arithmetic, which is the same on every device. However a batch is cut
into parts, each sequence then sees the same network.

A 64-bit key for each sequence and place comes from the seed by SplitMix64's steps (Steele, Lea & Flood, 2014), and from
the key a 32-bit word for each position and for each channel. An element mixes the two words, by the multiplications and
shifts of MurmurHash3's last steps, and is dropped where the result lies below the probability. The full-sized tensor
sees seven cheap passes, less than what the CPU's generator takes.

Integers overflow on purpose: arithmetic modulo 2^64 and 2^32.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_seeds", "dropped", "place_keys"]


def check_seeds(seeds: Tensor, x: Tensor) -> None:
    """Raise ValueError unless `seeds` is (B,) int64 for x (B, L)."""
    if seeds.dtype != torch.int64 or seeds.shape != x.shape[:1]:
        raise ValueError(
            f"dropout_seeds must be int64 of shape {tuple(x.shape[:1])}, one for each sequence; "
            f"got {seeds.dtype} {tuple(seeds.shape)}"
        )


def place_keys(seeds: Tensor, places: int) -> Tensor:
    """A key for each place of each sequence.

    Args:
        seeds: (B,) int64, any values.
        places: how many places of the network drop something.

    Returns:
        (B, places) int64.
    """
    place = torch.arange(1, places + 1, device=seeds.device)
    return _mixed64(_mixed64(seeds)[:, None] + _mixed64(place))


def dropped(keys: Tensor, length: int, width: int, probability: float) -> Tensor:
    """Which elements of (B, length, width) are dropped, each with the given probability.

    Row b depends on keys[b] alone; an element on the key, its position and its channel, not on length or width.

    Args:
        keys: (B,) int64, a column of `place_keys`.
        length: L.
        width: D.
        probability: in [0, 1), taken to the nearest 2^-32.

    Returns:
        (B, L, D) bool.
    """
    position = torch.arange(length, device=keys.device)
    channel = torch.arange(-1, -1 - width, -1, device=keys.device)  # words that no position has
    bits = _word(keys, position)[:, :, None] ^ _word(keys, channel)[:, None, :]
    bits *= -0x7A143595
    shifted = bits >> 13
    shifted &= 0x7FFFF  # int32's shift copies the sign
    bits ^= shifted
    bits *= -0x3D4D51CB
    return bits < round(probability * 2**32) - 2**31


def _word(keys: Tensor, number: Tensor) -> Tensor:
    """32 bits for each of the numbers (n,) under each of the keys (B,): (B, n) int32."""
    return (_mixed64(keys[:, None] + number) >> 32).to(torch.int32)


def _mixed64(a: Tensor) -> Tensor:
    """SplitMix64's mixing of int64, one to one."""
    a = (a ^ ((a >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    a = (a ^ ((a >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return a ^ ((a >> 31) & 0x1FFFFFFFF)
