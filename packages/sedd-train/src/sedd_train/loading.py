"""The order in which a run sees its text, and a step's data made while the step before it is computed.

The order is a pure function: sample n of a run (n = step * B + g) is block `permutation(seed, n // K)[n mod K]` of the
K blocks, or rows. Ranks never overlap because their n never do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["order", "crops", "ahead"]

Made = TypeVar("Made")


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, blocks: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(blocks)


def order(seed: int, numbers: Iterable[int], blocks: int) -> list[int]:
    """Which block each sample of the run sees; every block once before any comes again."""
    return [int(_permutation(seed, n // blocks, blocks)[n % blocks]) for n in numbers]


def crops(seed: int, numbers: Iterable[int], tokens: int, length: int) -> list[int]:
    """Where the crop that each sample of the run sees begins: anywhere in so many tokens, independently."""
    return [int(np.random.default_rng([seed, n]).integers(tokens - length + 1)) for n in numbers]


def ahead(make: Callable[[int], Made], steps: Iterable[int]) -> Iterator[Made]:
    """What `make` gives for each of the steps in turn, the next one made by a thread while this one is in use."""
    with ThreadPoolExecutor(1, thread_name_prefix="data") as thread:
        coming = None
        for step in steps:
            following = thread.submit(make, step)
            if coming is not None:
                yield coming.result()
            coming = following
        if coming is not None:
            yield coming.result()
