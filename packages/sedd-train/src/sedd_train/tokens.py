"""Tokens of documents written one after another, and what is cut from them: blocks, crops, or a row a document.

Each document is tokenised and an end-of-text token is put after it. Blocks are cut from the flat sequence when it is
read: block k is tokens [k L, (k + 1) L). That is packing. Padding, the other convention, gives each document a row of
its own: row k is the first L tokens of document k, its end of text included, and where there are fewer the rest is
filled up with end-of-text tokens that count for nothing. Perplexities of the two do not compare.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sedd_train.tokenizers import pieces

__all__ = ["Tokens", "tokenise", "coded", "inside", "unigram_entropy"]


@dataclass(frozen=True)
class Tokens:
    """One split.

    Attributes:
        flat: its tokens, (tokens,), memory-mapped.
        ends: where each document ends, (documents,) int64, memory-mapped: the token after its end of text.
        characters: how many characters of text the tokens stand for.
    """

    flat: NDArray[Any]
    ends: NDArray[Any]
    characters: int

    def __len__(self) -> int:
        return len(self.flat)

    def blocks(self, length: int) -> int:
        """How many blocks of this length there are; the tokens after the last whole block are left out."""
        return len(self.flat) // length

    def block(self, numbers: NDArray[Any] | Sequence[int], length: int) -> Tensor:
        """The blocks of these numbers, (len(numbers), length) int64."""
        return self.at([n * length for n in numbers], length)

    def at(self, starts: NDArray[Any] | Sequence[int], length: int) -> Tensor:
        """The `length` tokens from each start on, (len(starts), length) int64."""
        return torch.from_numpy(np.stack([self.flat[start : start + length] for start in starts]).astype(np.int64))

    @property
    def documents(self) -> int:
        """How many rows there are where each document has one of its own."""
        return len(self.ends)

    def lengths(self, numbers: NDArray[Any] | Sequence[int], length: int) -> Tensor:
        """How many tokens the rows of these documents hold, the padding left out: (len(numbers),) int64 in 1..length.

        The tokens themselves are not read: every rank can count those of a whole step.
        """
        stops = np.asarray([self.ends[n] for n in numbers], np.int64)
        starts = np.asarray([self.ends[n - 1] if n else 0 for n in numbers], np.int64)
        return torch.from_numpy(np.minimum(stops - starts, length))

    def rows(self, numbers: NDArray[Any] | Sequence[int], length: int, end: int) -> Tensor:
        """The rows of these documents, (len(numbers), length) int64: cut, or filled up with the token `end`."""
        rows = torch.full((len(numbers), length), end)
        for row, n, size in zip(rows, numbers, self.lengths(numbers, length).tolist(), strict=True):
            start = int(self.ends[n - 1]) if n else 0
            row[:size] = torch.from_numpy(self.flat[start : start + size].astype(np.int64))
        return rows

    def first(self, most: int | None, length: int, end: int | None = None) -> tuple[Tensor, Tensor | None]:
        """The first blocks, or where `end` is given the first documents as rows, to measure on.

        Args:
            most: how many, at most; None: all.
            length: L.
            end: the token that rows are filled up with.

        Returns:
            (n, L) int64, and for rows how many tokens of each are text, (n,) int64.
        """
        have = self.blocks(length) if end is None else self.documents
        numbers = range(have if most is None else min(most, have))
        if end is None:
            return self.block(numbers, length), None
        return self.rows(numbers, length, end), self.lengths(numbers, length)

    def counts(self, num_states: int) -> Tensor:
        """How often each state occurs, (num_states,) int64."""
        counts = np.zeros(num_states, np.int64)
        for start in range(0, len(self.flat), 1 << 24):
            counts += np.bincount(self.flat[start : start + (1 << 24)], minlength=num_states)
        return torch.from_numpy(counts)

    @property
    def characters_per_token(self) -> float:
        """Characters of text a token; the end-of-text tokens count as tokens of no characters."""
        return self.characters / len(self.flat)


def tokenise(texts: Iterable[str], coder: Any) -> Tokens:
    """The tokens of documents, in memory, an end-of-text token after each."""
    parts, sizes, characters = [], [], 0
    for flat, of_documents, seen in coded(texts, coder, np.dtype(np.uint32)):
        parts.append(flat)
        sizes.append(of_documents)
        characters += seen
    if characters == 0:
        raise ValueError("there is no text to tokenise")
    return Tokens(np.concatenate(parts), np.concatenate(sizes).cumsum(), characters)


def coded(
    texts: Iterable[str], coder: Any, dtype: np.dtype[Any]
) -> Iterator[tuple[NDArray[Any], NDArray[np.int64], int]]:
    """Tokens, how many of them each document has, and the number of characters, a thousand documents at a time.

    The tokenizer is parallel over them inside.
    """
    iterator = iter(texts)
    while batch := list(islice(iterator, 1000)):
        parts = [list(pieces(text)) for text in batch]
        flat_parts = [part for text in parts for part in text]
        # Split: what a document's text spells like a special token is text, and no document's end.
        try:
            coded = coder(flat_parts, add_special_tokens=False, split_special_tokens=True, verbose=False)
        except Exception as error:  # tokenizers raises no other type
            raise ValueError(f"the text has what the tokenizer cannot write ({error})") from error
        ids_of = iter(coded["input_ids"])
        end = [] if coder.eos_token_id is None else [coder.eos_token_id]
        whole = [[*islice(ids_of, len(text)), end] for text in parts]
        flat = [t for document in whole for ids in document for t in ids]
        sizes = [sum(map(len, document)) for document in whole]
        yield np.asarray(flat, dtype=dtype), np.asarray(sizes, np.int64), sum(map(len, batch))


def inside(lengths: Tensor, length: int) -> Tensor:
    """The weight of each position of rows, (n, length) float32: 1 for the first lengths[i] of them, 0 for padding."""
    return (torch.arange(length, device=lengths.device) < lengths[:, None]).float()


def unigram_entropy(flat: NDArray[Any]) -> float:
    """Entropy of the tokens' frequencies, in nats a token: what a model scores that knows nothing but them."""
    counts = np.bincount(flat[:])
    p = counts[counts > 0] / len(flat)
    return float(-(p * np.log(p)).sum())
