"""What the losses and bounds need from a graph, a noise schedule and a score model: no more than this.

Nothing inherits these Protocols; an object with the methods conforms. Shapes: `x, x0` are (...) int64 states and
`sigma` is float with a shape that is a leading part of theirs, (B,) or (B, L) for x of shape (B, L): one noise level
a sequence, or one a position.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Generator, Tensor

__all__ = [
    "Row",
    "Graph",
    "NoisingGraph",
    "PosteriorGraph",
    "LikelihoodGraph",
    "ImplicitGraph",
    "SnapshotGraph",
    "MaskGraph",
    "DiscreteTimeGraph",
    "TimeVaryingGraph",
    "Noise",
    "InvertibleNoise",
    "ScoreModel",
    "PosteriorModel",
    "NextTokenModel",
    "Head",
    "LinearHead",
]


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

    def sample(self, x0: Tensor, sigma: Tensor, /, *, generator: Generator | None = None) -> Tensor:
        """x_t ~ exp(sigma Q)[., x0], (...) int64."""

    def rates_into(self, x: Tensor, /) -> Row:
        """Q[x, .]: the rates of the jumps that lead into x; the diagonal entry is the negative rate of leaving."""

    def ratio(self, x: Tensor, x0: Tensor, sigma: Tensor, /) -> Row:
        """p(y | x0) / p(x | x0) for every state y."""


class NoisingGraph(Protocol):
    """What noises: no more of a graph than its draws."""

    @property
    def num_states(self) -> int:
        """N."""

    def sample(self, x0: Tensor, sigma: Tensor, /, *, generator: Generator | None = None) -> Tensor:
        """x_t ~ exp(sigma Q)[., x0], (...) int64."""


class PosteriorGraph(Graph, Protocol):
    """What models of the clean token need besides: how to go from clean tokens to noised ones."""

    @property
    def mask_id(self) -> int | None:
        """The state that is no token and never occurs in clean data; None when every state is a token."""

    def transition_into(self, x: Tensor, sigma: Tensor, /) -> Row:
        """exp(sigma Q)[x, .]: the probability of x given each state before."""

    def propagate(self, v: Tensor, sigma: Tensor, /) -> Tensor:
        """exp(sigma Q) v for dense vectors v (..., N), sigma (...) of either sign."""


class LikelihoodGraph(PosteriorGraph, Protocol):
    """What the bound needs besides: the end term at t = 1."""

    def prior_kl(self, x0: Tensor, sigma: Tensor, /) -> Tensor:
        """KL(exp(sigma Q)[., x0] || prior), (...) nats."""


class ImplicitGraph(Protocol):
    """What the implicit score entropy needs: the rates of the jumps into a state and out of it."""

    @property
    def num_states(self) -> int:
        """N."""

    def rates_into(self, x: Tensor, /) -> Row:
        """Q[x, .]: the rates of the jumps that lead into x; the diagonal entry is the negative rate of leaving."""

    def rates_out_of(self, x: Tensor, /) -> Row:
        """Q[., x]: the rates of the jumps that lead out of x; the diagonal entry is the negative of their sum."""


class SnapshotGraph(ImplicitGraph, NoisingGraph, Protocol):
    """What losses and bounds by snapshots need: draws of x_t and the rows of Q, and no transition."""

    @property
    def mask_id(self) -> int | None:
        """The state that is no token and never occurs in clean data; None when every state is a token."""

    def prior(self, sigma: Tensor, /) -> Row:
        """The distribution meant at t = 1, for sigma (): what noise sigma makes of random tokens."""


class MaskGraph(Protocol):
    """What the any-order loss needs: no process, only a mask."""

    @property
    def num_states(self) -> int:
        """N."""

    @property
    def mask_id(self) -> int | None:
        """The state that is no token and never occurs in clean data; None when every state is a token."""


class DiscreteTimeGraph(LikelihoodGraph, Protocol):
    """What the bound in T steps needs besides: the step back to an earlier time, told the clean state."""

    def posterior(self, x: Tensor, x0: Tensor, sigma_s: Tensor, sigma_t: Tensor, /) -> Row:
        """p(x_s | x_t = x, x_0 = x0) for sigma_s <= sigma_t, both of one shape."""


class TimeVaryingGraph(Protocol):
    """A forward process on one token whose generator depends on time, other than by a factor: t in [0, 1]."""

    @property
    def num_states(self) -> int:
        """N."""

    @property
    def mask_id(self) -> int | None:
        """The state that is no token and never occurs in clean data; None when every state is a token."""

    def sample(self, x0: Tensor, t: Tensor, /, *, generator: Generator | None = None) -> Tensor:
        """x_t given x0, (...) int64."""

    def rates_into(self, x: Tensor, t: Tensor, /) -> Row:
        """Q_t[x, .]: the rates at t, in units of t, of the jumps that lead into x; at x that of leaving it, < 0."""

    def propagate(self, v: Tensor, t: Tensor, /) -> Tensor:
        """The distribution at t, (..., N), of a token whose distribution at 0 is v (..., N); linear in v."""


class Noise(Protocol):
    """A noise schedule: total noise sigma(t) and its derivative, for t in [0, 1]."""

    def __call__(self, t: Tensor, /) -> tuple[Tensor, Tensor]:
        """(sigma, dsigma) at t, both of t's shape."""


class InvertibleNoise(Noise, Protocol):
    """A schedule that can be asked at which time a noise level is reached."""

    def inverse(self, sigma: Tensor, /) -> Tensor:
        """T with sigma(t) = sigma, for sigma between sigma(0) and sigma(1)."""


class ScoreModel(Protocol):
    """Any callable (x, sigma) -> log_score: log p_t(y) / p_t(x), shape (B, L, N); the entry y = x carries no meaning.

    A score model may also accept `where=`, a (B, L) bool mask with M true positions, and return only those rows,
    (M, N), in row-major order. Losses use it when it is offered and index when it is not.
    """

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Any:
        """Log-score at (B, L) int64 states and (B,) total noise."""


class PosteriorModel(Protocol):
    """Any callable (x, sigma) -> logits of the clean token p(x0 = y | x_t = x), one distribution a position.

    Logits are (B, L, N), normalised or not; entries at states that cannot be the clean one are ignored. A model may
    also accept `where=`, as a score model may.
    """

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Any:
        """Logits at (B, L) int64 states and (B,) total noise."""


class NextTokenModel(Protocol):
    """Any causal callable x -> logits (B, L, N) of the next token: row i may depend on x[:, : i + 1] only."""

    def __call__(self, x: Tensor, /) -> Any:
        """Logits at (B, L) int64 states."""


class Head(Protocol):
    """A network's last step, for any number m >= 0 of rows, each of its own arguments alone."""

    def __call__(self, hidden: Tensor, x: Tensor, sigma: Tensor, /) -> Any:
        """(hidden (m, D), x (m,) int64, sigma (m,)) -> log_score (m, N)."""


class LinearHead(Protocol):
    """A last step that is linear: log_score = hidden W^T + bias + shift. It is not callable.

    The entry at a position's own state carries no meaning, as in any log-score, and so need not be set to 0.
    """

    @property
    def weight(self) -> Tensor:
        """W (N, D), of the hidden states' dtype."""

    @property
    def bias(self) -> Tensor | None:
        """(N,), or None for 0."""

    @property
    def shift(self) -> Tensor | None:
        """(B,) a sequence or (B, L) a position, or None for 0: SEDD's is -log(e^sigma - 1) - log(N - 1)."""
