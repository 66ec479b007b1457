"""Dropout as a function of a seed for each sequence: what is dropped depends on nothing else.

torch's own generator hands out its numbers in the order in which they are asked for, so that a sequence's dropout
depends on the batch it is in. Here the choice for one element is a hash of (the sequence's seed, the place in the
network, the position, the channel), in integer arithmetic, which is the same on every device. However a batch is cut
into parts, each sequence then sees the same network.

A 64-bit key for each sequence and place comes from the seed by SplitMix64's steps (Steele, Lea & Flood, 2014), and from
the key a 32-bit word for each position and for each channel. An element mixes the two words, by the multiplications and
shifts of MurmurHash3's last steps, and is dropped where the result lies below the probability. The full-sized tensor
sees seven cheap passes, less than what the CPU's generator takes; a compiler makes one of them.

Integers overflow on purpose: arithmetic modulo 2^64 and 2^32.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Words", "check_seeds", "dropped", "place_words", "words_of"]

Words = tuple[Tensor, Tensor]
"""What decides for one place of the network: a word for each position, (B, L), and each channel, (B, D), int32."""


def check_seeds(seeds: Tensor, x: Tensor) -> None:
    """Raise ValueError unless `seeds` is (B,) int64 for x (B, L)."""
    if seeds.dtype != torch.int64 or seeds.shape != x.shape[:1]:
        raise ValueError(
            f"dropout_seeds must be int64 of shape {tuple(x.shape[:1])}, one for each sequence; "
            f"got {seeds.dtype} {tuple(seeds.shape)}"
        )


def place_words(seeds: Tensor, places: int, length: int, width: int) -> list[Words]:
    """The words of each place of each sequence, made once for the whole network.

    Args:
        seeds: (B,) int64, any values.
        places: how many places of the network drop something.
        length: L.
        width: D.

    Returns:
        For each place (B, L) and (B, D) int32; a word depends on its seed, place, position or channel alone.
    """
    positions, channels = _all_words(seeds, places, length, width)
    return list(zip(positions.unbind(), channels.unbind(), strict=True))


@torch.library.custom_op("sedd_nets::words", mutates_args=())
def _all_words(seeds: Tensor, places: int, length: int, width: int) -> list[Tensor]:
    """(places, B, L) and (places, B, D); closed to compilers, which would make them again for every element."""
    place = torch.arange(1, places + 1, device=seeds.device)
    return list(words_of(_mixed64(_mixed64(seeds) + _mixed64(place)[:, None]), length, width))


@_all_words.register_fake
def _(seeds: Tensor, places: int, length: int, width: int) -> list[Tensor]:
    return [seeds.new_empty(places, len(seeds), size, dtype=torch.int32) for size in (length, width)]


def words_of(keys: Tensor, length: int, width: int) -> Words:
    """32 bits for each position, (..., length), and channel, (..., width), under keys (...) int64."""
    position = torch.arange(length, device=keys.device)
    channel = torch.arange(-1, -1 - width, -1, device=keys.device)  # numbers that no position has
    a, b = ((_mixed64(keys[..., None] + number) >> 32).to(torch.int32) for number in (position, channel))
    return a, b


def dropped(words: Words, probability: float) -> Tensor:
    """Which elements of (B, L, D) are dropped, each with the given probability.

    An element depends on its position's and its channel's word alone.

    Args:
        words: (B, L) and (B, D) int32.
        probability: in [0, 1), taken to the nearest 2^-32.

    Returns:
        (B, L, D) bool.
    """
    position, channel = words
    bits = position[:, :, None] ^ channel[:, None, :]
    bits *= -0x7A143595
    shifted = bits >> 13
    shifted &= 0x7FFFF  # int32's shift copies the sign
    bits ^= shifted
    bits *= -0x3D4D51CB
    return bits < round(probability * 2**32) - 2**31


def _mixed64(a: Tensor) -> Tensor:
    """SplitMix64's mixing of int64, one to one."""
    a = (a ^ ((a >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    a = (a ^ ((a >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return a ^ ((a >> 31) & 0x1FFFFFFFF)
