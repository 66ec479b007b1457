"""Every random number of a training run as a function of (seed, purpose, step, sample), and of nothing else.

A step trains on B samples numbered g = 0 .. B-1 over all ranks. Sample g's block, time and noise depend on the seed,
the step and g alone: neither on the number of ranks nor on what was drawn before. A run that is cut and resumed, or
spread over other ranks, therefore sees the same data, times and noise.

The times of a step are stratified over the *global* batch with one offset u ~ U[0, 1):
`t_g = t_min + (1 - t_min) (g + u) / B`, each uniform on [t_min, 1] by itself. The estimate of eq. 10 stays unbiased and
loses the variance between strata. Micro-batches take samples g = j, j + J, j + 2J, ... of the J a step has, so that
each of them spans all times and the ranks share the work evenly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Generator, Tensor

__all__ = ["derived_seed", "generator", "sample_numbers", "times", "noised", "dropout_seeds"]

TIMES, NOISE, DROPOUT, EVALUATION, SAMPLING, LEVELS, LABELS = range(7)  # what a stream of random numbers is for


class _Graph(Protocol):
    def sample(self, x0: Tensor, sigma: Tensor, /, *, generator: Generator | None = None) -> Tensor:
        """x_t ~ exp(sigma Q)[., x0]."""


def derived_seed(*key: int) -> int:
    """A 64-bit seed from a tuple of non-negative integers; different tuples give unrelated seeds."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def generator(*key: int, device: torch.device | str = "cpu") -> Generator:
    """A generator for the stream named by `key`, for instance (seed, NOISE, step, g)."""
    return Generator(device).manual_seed(derived_seed(*key))


def sample_numbers(batch_size: int, micro_batches: int, micro_batch: int) -> range:
    """The numbers g of the samples that one of the step's micro-batches trains on: strided over the global batch."""
    return range(micro_batch, batch_size, micro_batches)


def times(seed: int, step: int, samples: Sequence[int], batch_size: int, t_min: float = 1e-3) -> Tensor:
    """The times of samples `g` of a step, (len(samples),) float32 in [t_min, 1]."""
    u = torch.rand((), dtype=torch.float64, generator=generator(seed, TIMES, step))
    t = t_min + (1 - t_min) * (torch.tensor(list(samples), dtype=torch.float64) + u) / batch_size
    return t.float()


def noised(graph: _Graph, x0: Tensor, sigma: Tensor, seed: int, step: int, samples: Sequence[int]) -> Tensor:
    """x_t ~ p(. | x0) with each sample's own random numbers; x0 (B, L), sigma (B,), result (B, L), all on the CPU."""
    rows = [
        graph.sample(x0[i : i + 1], sigma[i : i + 1], generator=generator(seed, NOISE, step, g))
        for i, g in enumerate(samples)
    ]
    return torch.cat(rows)


def dropout_seeds(seed: int, step: int, samples: Sequence[int]) -> Tensor:
    """What the dropout of samples g of a step depends on, (len(samples),) int64, whichever rank runs them."""
    return torch.tensor([derived_seed(seed, DROPOUT, step, g) for g in samples], dtype=torch.uint64).view(torch.int64)
