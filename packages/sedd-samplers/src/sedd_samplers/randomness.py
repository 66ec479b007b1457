"""Draws: uniform numbers as a pure function of where they are used, and exact draws from a categorical distribution.

Salmon et al., *Parallel random numbers: as easy as 1, 2, 3* (2011): the counter-based generator Philox 4x32-10. A
stateful generator hands out numbers in the order of asking, so that a sequence's sample would depend on what else is in
its batch, on padding, and on which positions were skipped. Here each number is computed from (seed, draw, position), on
any device, with the same result.

A categorical draw is the inverse of the cumulative sum at one uniform number:

    F(y) = sum_{z <= y} p(z),     draw = min { y : F(y) > u F(N - 1) },     u ~ U[0, 1)

The usual race, argmax_y p(y) / E_y with exponential E_y in float32, cannot resolve probabilities below about 6e-8: it
draws rare states too seldom, which is a lower temperature, and it takes N random numbers a draw. Here a draw takes one
float64 uniform, and every probability is met to a relative error of about 1e-7, however small it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from .fast import draw_by_blocks
from .precision import wide
from .waiting import has_kernels, reading_waits

__all__ = ["philox", "uniforms", "draw_categorical", "draw_shared", "row_seeds"]

_WORD = 0xFFFFFFFF
_FACTORS = (0xD2511F53, 0xCD9E8D57)
_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four random 32-bit words from four words of counter and two of key, all (...) int64 holding 32 bits each."""
    even, odd = torch.stack([counter[0], counter[2]]), torch.stack([counter[1], counter[3]])
    which = torch.arange(2, device=even.device).view(2, *[1] * (even.ndim - 1))
    factors, steps = (first + which * (second - first) for first, second in (_FACTORS, _STEPS))
    words = torch.stack(key)
    rounds = torch.arange(10, device=even.device).view(10, *[1] * even.ndim)
    for round_key in (words + rounds * steps).unbind():  # two words at once: of few numbers each operation counts
        product = (even * factors).flip(0)  # 64 bits each; the sign bit is the highest bit
        even = (product >> 32).bitwise_xor_(odd).bitwise_xor_(round_key).bitwise_and_(_WORD)
        odd = product  # its upper half is cut off with what it is made of
    odd = odd & _WORD
    return even[0], odd[0], even[1], odd[1]


def uniforms(seed: Tensor, draw: Tensor, position: Tensor) -> Tensor:
    """Uniforms in [0, 1), one for each (seed, draw, position), all (M,) int64.

    With 53 random bits, in float64; on a device without it 24, in float32.
    """
    if has_kernels(seed.device):
        from .fast.uniform_kernel import uniforms_by_kernel

        return uniforms_by_kernel(seed, draw, position)
    zero = torch.zeros_like(seed)
    counter = (position & _WORD, draw & _WORD, (draw >> 32) & _WORD, zero)
    high, low, _, _ = philox(counter, (seed & _WORD, (seed >> 32) & _WORD))
    if wide(seed.device) == torch.float32:
        return (high >> 8).float() * 2.0**-24
    return ((high << 21) | (low >> 11)).double() * 2.0**-53


def draw_categorical(
    probs: Tensor, uniform: Tensor, *, old: Tensor | None = None, wanted: Tensor | None = None
) -> Tensor:
    """One state a row; a state of probability zero is never drawn.

    Args:
        probs: (M, N) float, non-negative; rows need not sum to 1. Not modified.
        uniform: (M,) float64 in [0, 1): the only source of randomness.
        old: (M,) int64, what to return for rows from which nothing can be drawn, where values are not to be read
            because the host would wait for them; None to read them all the same.
        wanted: (M,) bool, the rows from which something has to be drawn, the others giving `old`; None for all.

    Returns:
        (M,) int64.

    Raises:
        ValueError: if a row's sum is not finite and positive; names the first such row.
    """
    state, total = draw_by_blocks(probs, uniform)
    bad = ~((total > 0) & (total < torch.inf))
    wrong = bad if wanted is None else bad & wanted
    if (old is None or not reading_waits(probs.device)) and wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"row {row} of the probabilities sums to {float(total[row])}; expected a finite, positive sum: "
            "no state to draw is left (0) or an entry is NaN or infinite"
        )
    return state if old is None else torch.where(bad, old, state)


def draw_shared(law: Tensor, uniform: Tensor) -> Tensor:
    """Draws (M,) int64 from one distribution, law (N,) float64, with one uniform (M,) each."""
    cumulative = law.cumsum(0)
    # the largest number below 1 times a sum is below that sum, however it is rounded
    drawn: Tensor = torch.searchsorted(cumulative, uniform * cumulative[-1], right=True)
    return drawn


def row_seeds(seeds: Sequence[int] | Tensor | None, generator: Generator | None, batch: int) -> Tensor:
    """One seed a sequence, (batch,) int64: the caller's, or drawn from a generator; ValueError for anything else."""
    if seeds is None:
        device = "cpu" if generator is None else generator.device
        return torch.randint(2**63 - 1, (batch,), generator=generator, device=device)
    if generator is not None:
        raise ValueError("give either a generator or seeds, not both: with seeds the generator would decide nothing")
    seeds = torch.as_tensor(seeds)
    if seeds.shape != (batch,) or seeds.is_floating_point():
        raise ValueError(f"seeds must be {batch} integers, one a sequence, got {seeds.dtype} {tuple(seeds.shape)}")
    return seeds.long()
