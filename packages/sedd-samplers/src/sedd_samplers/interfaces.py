"""What the samplers need from a graph, a noise schedule and a score model: no more than this.

Nothing inherits these Protocols; an object with the methods conforms. Shapes: `x` is (...) int64 states and `sigma`
is float with a shape that is a leading part of x's, (B,) or (B, L) for x of shape (B, L).
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

__all__ = ["Row", "Graph", "Noise", "ScoreModel", "RowModel", "KeyValues", "check_graph"]


class Row(Protocol):
    """Vectors over N states: `value[..., k]` at the distinct states `index[..., k]`, `base` at all the others."""

    @property
    def base(self) -> Tensor:
        """(...) float."""

    @property
    def index(self) -> Tensor:
        """(..., K) int64, distinct along the last axis."""

    @property
    def value(self) -> Tensor:
        """(..., K) float."""


class Graph(Protocol):
    """A forward process on one token, with generator Q: `Q[y, x]` is the rate of the jump x -> y."""

    @property
    def num_states(self) -> int:
        """N."""

    @property
    def mask_id(self) -> int | None:
        """The state that is no token and may not be left in a finished sample; None when every state is a token."""

    def prior(self, sigma: Tensor, /) -> Row:
        """The law of a position at total noise sigma (...), whatever the token; asked at infinity, for the limit."""

    def rates_into(self, x: Tensor, /) -> Row:
        """Q[x, .]: the rates of the jumps that lead into x; the diagonal entry is the negative rate of leaving."""

    def transition_into(self, x: Tensor, sigma: Tensor, /) -> Row:
        """exp(sigma Q)[x, .]: the probability of x given each state before."""

    def propagate(self, v: Tensor, sigma: Tensor, /) -> Tensor:
        """exp(sigma Q) v for dense vectors v (..., N), sigma (...) of either sign."""


class Noise(Protocol):
    """A noise schedule: total noise sigma(t) and its derivative, for t in [0, 1]."""

    def __call__(self, t: Tensor, /) -> tuple[Tensor, Tensor]:
        """(sigma, dsigma) at t, both of t's shape."""


class ScoreModel(Protocol):
    """Any callable (x, sigma) -> log_score: log p_t(y) / p_t(x), shape (B, L, N); the entry y = x carries no meaning.

    A score model may also accept `where=`, a (B, L) bool mask with M true positions, and return only those rows,
    (M, N), in row-major order. The samplers use it when it is offered and index when it is not.

    It may also accept `rows=`, (B,) int64: which sequences of the run those of x are. Sequences with nothing left to
    move are left out of the call, so that a model with a condition for each sequence has to be told.
    """

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        """Log-score at (B, L) int64 states and (B,) total noise."""


class RowModel(Protocol):
    """A model of sequences that offers `where` and `rows`; every `RowModel` is a `ScoreModel` by its shape."""

    def __call__(self, x: Tensor, sigma: Tensor, /, where: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """(B, L, N), or (M, N) for the M true positions of `where`."""


class KeyValues(Protocol):
    """Keys and values of leading positions, as a network with a parameter `cache` takes and adds to them.

    transformers' `DynamicCache` and `sedd_nets.KeyValueCache` are such.
    """

    def crop(self, count: int, /) -> None:
        """Forget the last `-count` positions, count < 0."""

    def batch_select_indices(self, indices: Tensor, /) -> None:
        """Keep the sequences `indices` (b,) int64, in that order."""


def check_graph(graph: object) -> None:
    """ValueError unless it has what is asked of a graph here: the usual slip is the class for its object."""
    if isinstance(graph, type):
        raise ValueError(f"the graph must be an object such as Absorbing(50257), got the class {graph.__name__}")
    missing = [name for name in ("num_states", "mask_id", "rates_into", "propagate") if not hasattr(graph, name)]
    if missing:
        raise ValueError(f"the graph, a {type(graph).__name__}, has no {missing[0]}: see sedd_samplers.Graph")
