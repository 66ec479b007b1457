"""The likelihood of a corpus: what bounds of its sequences add up to, a token, a character, as a perplexity.

Sequences' bounds are added, and so are the squares of their standard errors, for each is an independent estimate:

    nats = sum_b value_b,    error^2 = sum_b error_b^2,    perplexity = exp(nats / tokens)

A mean of sequences' perplexities is another number, and an interval of one sequence, estimated from few times, covers
less than it says; that of their sum is right. The error is that of the measurement: how well the bound of these very
sequences is known, not how well they stand for others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

__all__ = ["CorpusLikelihood", "corpus_likelihood"]


class Estimated(Protocol):
    """A value and its standard error, one a sequence: a `Bound` or an `Estimate`."""

    @property
    def value(self) -> Tensor:
        """(B,) nats a sequence."""

    @property
    def standard_error(self) -> Tensor:
        """(B,) nats."""


@dataclass(frozen=True)
class CorpusLikelihood:
    """-log p of a corpus, or a bound on it, with the standard error of its measurement."""

    nats: float
    """Of the whole corpus."""
    standard_error: float
    """Of `nats`."""
    num_tokens: float
    """How many tokens the nats are those of."""
    num_sequences: int

    @property
    def nats_per_token(self) -> float:
        """Its standard error is `standard_error / num_tokens`."""
        return self.nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        """e^(nats a token); its standard error is `perplexity_error`."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 709 else math.inf

    @property
    def perplexity_error(self) -> float:
        """Perplexity times the standard error of the nats a token: to first order."""
        return self.perplexity * self.standard_error / self.num_tokens

    def bits_per(self, count: float) -> tuple[float, float]:
        """Bits a character or byte, of which the corpus has `count`, and their standard error.

        Raises:
            ValueError: a count that is not positive.
        """
        if not count > 0:
            raise ValueError(f"count must be positive, the characters or bytes of the corpus, got {count}")
        return self.nats / math.log(2) / count, self.standard_error / math.log(2) / count

    def __repr__(self) -> str:
        error = self.standard_error / self.num_tokens
        size = f"{self.num_sequences} sequences, {self.num_tokens:g} tokens"
        nats = f"{self.nats_per_token:.4f} +- {error:.4f} nats a token"
        return f"CorpusLikelihood({size}: {nats}, perplexity {self.perplexity:.4g} +- {self.perplexity_error:.2g})"


def corpus_likelihood(measured: Estimated | Iterable[Estimated], num_tokens: float) -> CorpusLikelihood:
    """The likelihood of a corpus from bounds or estimates of its sequences.

    Args:
        measured: of all of the corpus, or of one batch after another: what `likelihood_bound`,
            `masked_likelihood_bound`, `d3pm_bound` or `monte_carlo` return.
        num_tokens: the tokens that were counted: those that are neither given nor padding.

    Raises:
        ValueError: no sequence, a number of tokens that is not positive, or shapes that are not (B,).
    """
    batches = list(measured) if isinstance(measured, Iterable) else [measured]
    for batch in batches:
        if batch.value.ndim != 1 or batch.value.shape != batch.standard_error.shape:
            shapes = f"{tuple(batch.value.shape)} and {tuple(batch.standard_error.shape)}"
            raise ValueError(f"measured must hold a value and an error a sequence, (B,) each, got {shapes}")
    sequences = sum(len(batch.value) for batch in batches)
    if not sequences:
        raise ValueError("measured must hold a sequence at least, got none")
    if not num_tokens > 0:
        raise ValueError(f"num_tokens must be positive, the tokens that the bounds count, got {num_tokens}")
    nats = math.fsum(float(batch.value.double().sum()) for batch in batches)
    variance = math.fsum(float(batch.standard_error.double().square().sum()) for batch in batches)
    return CorpusLikelihood(nats, math.sqrt(variance), num_tokens, sequences)
