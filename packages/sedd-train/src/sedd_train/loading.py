"""The order in which a run sees its text, and a step's data made while the step before it is computed.

The order is a pure function: sample n of a run (n = step * B + g) is block `permutation(seed, n // K)[n mod K]` of the
K blocks, or rows. Ranks never overlap because their n never do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sedd_train import labels, randomness
from sedd_train.engine import Batch
from sedd_train.objectives import Objective
from sedd_train.recipes import Recipe
from sedd_train.tokens import Tokens

__all__ = ["order", "crops", "Batches", "ahead"]

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


@dataclass(frozen=True)
class Batches:
    """The data of a run's steps, as one rank sees them: functions of the step and nothing else.

    Attributes:
        tokens: what is trained on.
        recipe: its numbers.
        objective: how a batch is noised.
        rank: whose part of a step it is.
        world_size: of so many ranks.
        end: the token that rows are filled up with; None where blocks are packed.
    """

    tokens: Tokens
    recipe: Recipe
    objective: Objective
    rank: int
    world_size: int
    end: int | None

    @property
    def micro_batches(self) -> int:
        """How many micro-batches all ranks together run in a step."""
        return self.recipe.micro_batches(self.world_size)

    @property
    def available(self) -> int:
        """How many blocks there are to train on, or rows of one document."""
        return self.tokens.blocks(self.recipe.length) if self.end is None else self.tokens.documents

    def where(self, numbers: Sequence[int]) -> list[int]:
        """Where in the text these samples of the run begin, in tokens; of rows, which documents they are."""
        if self.recipe.crops:
            return crops(self.recipe.seed, numbers, len(self.tokens), self.recipe.length)
        blocks = order(self.recipe.seed, numbers, self.available)
        return blocks if self.end is not None else [block * self.recipe.length for block in blocks]

    def samples(self, step: int) -> list[int]:
        """The numbers of this rank's samples of the run in a step, in the order of its micro-batches."""
        mine = range(self.rank, self.micro_batches, self.world_size)
        numbers = [g for j in mine for g in randomness.sample_numbers(self.recipe.batch_size, self.micro_batches, j)]
        return [step * self.recipe.batch_size + g for g in numbers]

    def text_tokens(self, step: int) -> int:
        """How many tokens of all ranks in a step are text, not padding."""
        if self.end is None:
            return self.recipe.batch_size * self.recipe.length
        every = self.where(range(step * self.recipe.batch_size, (step + 1) * self.recipe.batch_size))
        return int(self.tokens.lengths(every, self.recipe.length).sum())

    def make(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step: arguments of `Loss.forward`."""
        made = [self._micro_batch(step, j) for j in range(self.rank, self.micro_batches, self.world_size)]
        return [pinned(self.with_positions(batch)) for batch in made] if torch.cuda.is_available() else made

    def with_positions(self, batch: Batch) -> Batch:
        """The same, and which of its positions count, if the objective can say that: a GPU would be waited for."""
        find = getattr(self.objective, "positions", None)
        if find is None:
            return batch
        x0, xt, t, seeds, *more = batch
        lengths = more[0] if more else None
        return x0, xt, t, seeds, lengths, find(xt, *more[:1]), *more[2:]

    def _micro_batch(self, step: int, number: int) -> Batch:
        recipe, tokens = self.recipe, self.tokens
        numbers = randomness.sample_numbers(recipe.batch_size, self.micro_batches, number)
        at = self.where([step * recipe.batch_size + g for g in numbers])
        x0 = tokens.at(at, recipe.length) if self.end is None else tokens.rows(at, recipe.length, self.end)
        t = randomness.times(recipe.seed, step, numbers, recipe.batch_size, recipe.t_min)
        xt, t = self.objective.noised(x0, t, recipe.seed, step, numbers)
        more: list[Tensor | None] = [] if self.end is None else [tokens.lengths(at, recipe.length)]
        if tokens.labels is not None:
            own = torch.from_numpy(tokens.labels[at].astype(np.int64))
            more += [None, labels.dropped(own, recipe.drop_labels, recipe.seed, step, numbers)]
        return (x0, xt, t, randomness.dropout_seeds(recipe.seed, step, numbers), *more)


def pinned(batch: Batch) -> Batch:
    """A micro-batch in memory that a GPU can copy from while the host goes on."""
    return tuple(None if tensor is None else tensor.pin_memory() for tensor in batch)


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
