"""Tokens of documents written one after another, and what is cut from them: blocks, crops, or a row a document.

Each document is tokenised and an end-of-text token is put after it. Blocks are cut from the flat sequence when it is
read: block k is tokens [k L, (k + 1) L). That is packing. Padding, the other convention, gives each document a row of
its own: row k is the first L tokens of document k, its end of text included, and where there are fewer the rest is
filled up with end-of-text tokens that count for nothing. Perplexities of the two do not compare.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sedd_train.coding import Coded, coded

__all__ = ["Tokens", "tokenise", "counted", "numbered", "inside", "unigram_entropy"]

LABELS_MOST = 10_000  # different ones


@dataclass(frozen=True)
class Tokens:
    """One split.

    Attributes:
        flat: its tokens, (tokens,), memory-mapped.
        ends: where each document ends, (documents,) int64, memory-mapped: the token after its end of text.
        characters: how many characters of text the tokens stand for.
        frequencies: how often each token occurs, (vocabulary,) int64, where that was counted before.
        size: bytes of that text in UTF-8; as many as characters, as of ASCII, unless given.
        labels: of each document, (documents,) int32, -1 for none; None where documents have none.
    """

    flat: NDArray[Any]
    ends: NDArray[Any]
    characters: int
    frequencies: NDArray[np.int64] | None = None
    size: int | None = None
    labels: NDArray[np.int32] | None = None

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

    def law_of_lengths(self, length: int, which: NDArray[np.bool_] | None = None) -> list[int]:
        """How many rows hold 1, 2, ... up to `length` tokens: what a model of rows does not say of itself.

        Args:
            length: L.
            which: of which documents, (documents,) bool; all, unless given.
        """
        sizes = np.minimum(np.diff(self.ends, prepend=0), length)
        sizes = sizes if which is None else sizes[which]
        counts: list[int] = np.bincount(sizes, minlength=length + 1)[1:].tolist()
        return counts

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

    def first_labels(self, most: int | None) -> Tensor | None:
        """The labels of the first documents, (n,) int64, -1 for none; None where documents have none."""
        return None if self.labels is None else torch.from_numpy(self.labels[:most].astype(np.int64))

    def counts(self, num_states: int) -> Tensor:
        """How often each state occurs, (num_states,) int64."""
        found = counted(self.flat) if self.frequencies is None else self.frequencies
        counts = np.zeros(num_states, np.int64)
        counts[: len(found)] = found[:num_states]
        return torch.from_numpy(counts)

    @property
    def characters_per_token(self) -> float:
        """Characters of text a token; the end-of-text tokens count as tokens of no characters."""
        return self.characters / len(self.flat)

    @property
    def bytes_per_character(self) -> float:
        """Bytes of text a character, 1 to 4: what divides bits a character into bits a byte."""
        return 1.0 if self.size is None else self.size / self.characters


def tokenise(texts: Iterable[str], coder: Any) -> Tokens:
    """The tokens of documents, in memory, an end-of-text token after each."""
    parts: list[Coded] = list(coded(texts, coder, np.dtype(np.uint32)))
    characters = sum(part.characters for part in parts)
    if characters == 0:
        raise ValueError("there is no text to tokenise")
    starts = np.cumsum([0, *(len(part.flat) for part in parts)])
    ends = [start + part.ends for start, part in zip(starts[:-1], parts, strict=True)]
    size = sum(part.size for part in parts)
    return Tokens(np.concatenate([part.flat for part in parts]), np.concatenate(ends), characters, size=size)


def counted(flat: NDArray[Any]) -> NDArray[np.int64]:
    """How often each token occurs, up to the largest that does."""
    counts = np.zeros(0, np.int64)
    for start in range(0, len(flat), 1 << 24):
        found = np.bincount(flat[start : start + (1 << 24)], minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
    return counts


def numbered(labels: Iterable[str], numbers: dict[str, int]) -> NDArray[np.int32]:
    """Documents' labels as int32, -1 for none. New ones are numbered in `numbers`.

    Raises:
        ValueError: there are too many different ones.
    """
    found = np.fromiter((numbers.setdefault(label, len(numbers)) if label else -1 for label in labels), np.int32)
    if len(numbers) > LABELS_MOST:
        raise ValueError(
            f"there are {len(numbers):,} different labels, such as {', '.join([*numbers][:3])}: of labels there may be "
            f"{LABELS_MOST:,}, and this column is something else (--label-column)"
        )
    return found


def inside(lengths: Tensor, length: int) -> Tensor:
    """The weight of each position of rows, (n, length) float32: 1 for the first lengths[i] of them, 0 for padding."""
    return (torch.arange(length, device=lengths.device) < lengths[:, None]).float()


def unigram_entropy(flat: NDArray[Any]) -> float:
    """Entropy of the tokens' frequencies, in nats a token: what a model scores that knows nothing but them."""
    counts = counted(flat)
    p = counts[counts > 0] / len(flat)
    return float(-(p * np.log(p)).sum())
