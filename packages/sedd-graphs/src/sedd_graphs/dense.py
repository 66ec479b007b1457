"""Any generator matrix Q: columns sum to 0, off-diagonal entries are rates >= 0.

The exponential of a generator needs no subtraction. With r the fastest rate of leaving a state, P = I + Q / r is a
matrix of probabilities, and

    exp(sQ) = e^(-rs) sum over k of (rs)^k / k! P^k,

halved to rs <= 1 and squared back. All terms are positive, so that every probability is accurate relative to itself,
and so are ratios of small ones; a general matrix exponential is accurate relative to the largest entry only.

When Q is reversible, Q[y, x] pi[x] = Q[x, y] pi[y], it is symmetric but for a scaling and its eigenvectors give
exp(sQ) v in O(N^2) at any s of either sign.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sedd_graphs._checks import check_integer, check_states, describe, distinct, rate_dtype, readable, spread, widen
from sedd_graphs._constants import Constant
from sedd_graphs.graph import Graph, _flow, _vectors
from sedd_graphs.row import Row

__all__ = ["Dense"]

_TERMS = 20  # of the series at rs <= 1: the rest is below 1 / 21!
_FOREVER = 2.0**60  # in units of 1 / r: what infinite noise is taken for
_AT_ONCE = 2**24  # entries of exp(sQ), over all distinct noise levels, held at a time
_LEAST = 1e-6  # the eigenvectors' exp(sQ) is used where all its entries are at least so large


class Dense(Graph):
    """The chain of any generator matrix, for up to some thousand states; rows name all N of them.

    exp(sigma Q) is computed in float64, once for all positions of equal sigma, and on the CPU kept until other levels
    are asked for, so that a call each of `sample` and `ratio` costs one exponential. On a GPU, where comparing levels
    would wait, every level of a batch costs one: give sigma as (B,) or as a 0-dimensional tensor, not as (B, L).

    Args:
        Q: (N, N), `Q[y, x]` the rate of the jump x -> y. Its diagonal is recomputed from the rates, in float64.
        mask_id: the state that is no token, if there is one.

    Raises:
        ValueError: Q is not square, not finite, has a negative rate, or columns that do not sum to 0.

    Attributes:
        reversible: whether eigenvectors are used.
    """

    def __init__(self, Q: Tensor, mask_id: int | None = None) -> None:
        Q = _generator(Q)
        self.num_states = len(Q)
        self.mask_id = None if mask_id is None else check_integer("mask_id", mask_id, least=0, most=self.num_states - 1)
        self._fastest = float(-Q.diagonal().min())
        self._Q = Constant(Q)
        eigen = _eigen(Q)
        self.reversible = eigen is not None
        self._eigen = tuple(Constant(part) for part in eigen) if eigen else ()
        self._kept: tuple[Tensor, Tensor] | None = None

    def __repr__(self) -> str:
        mask = "" if self.mask_id is None else f", mask_id={self.mask_id}"
        return f"Dense(Q of {self.num_states} states{mask})"

    def rates_into(self, x: Tensor) -> Row:
        """A row of Q."""
        check_states("x", x, self.num_states)
        return Row.full(self._Q.on(x.device)[x].to(rate_dtype()))

    def rates_out_of(self, x: Tensor) -> Row:
        """A column of Q."""
        check_states("x", x, self.num_states)
        return Row.full(self._Q.on(x.device).T[x].to(rate_dtype()))

    def transition_from(self, x: Tensor, sigma: Tensor) -> Row:
        """A column of exp(sigma Q)."""
        return self._rows(x, sigma, transposed=True)

    def transition_into(self, x: Tensor, sigma: Tensor) -> Row:
        """A row of exp(sigma Q)."""
        return self._rows(x, sigma, transposed=False)

    def propagate(self, v: Tensor, sigma: Tensor) -> Tensor:
        """exp(sigma Q) v in float64: by eigenvectors, or by one exponential for each distinct sigma."""
        v, level = _vectors(v, sigma, self.num_states)
        if v.numel() == 0:
            return v
        wide = widen(v)
        if self.reversible:
            left, modes, right = (part.on(v.device) for part in self._eigen)
            decay = (self._finite(widen(level))[..., None] * modes).exp()
            return ((wide @ right.T * decay) @ left.T).to(v.dtype)
        Q = self._Q.on(v.device)
        groups = wide.reshape(level.numel(), -1, self.num_states)  # of equal noise
        levels, which = distinct(self._finite(widen(level.detach())).flatten())
        if len(levels) < len(which):
            moved = torch.empty_like(groups)
            for i in range(len(levels)):
                chosen = which == i
                moved[chosen] = groups[chosen] @ _either_sign(Q, self._fastest, levels[i : i + 1]).mT
        else:
            parts = torch.split(torch.arange(len(which), device=v.device), max(1, _AT_ONCE // self.num_states**2))
            moved = torch.cat([groups[i] @ _either_sign(Q, self._fastest, levels[which[i]]).mT for i in parts])
        return _flow(moved.reshape(v.shape), level, lambda p: p @ Q.T).to(v.dtype)

    def _rows(self, x: Tensor, sigma: Tensor, *, transposed: bool) -> Row:
        """Row x of exp(sigma Q) or of its transpose, for each x."""
        check_states("x", x, self.num_states)
        level = spread(sigma, x.shape)
        levels, which = distinct(self._finite(widen(level.detach())))
        p = torch.zeros(*x.shape, self.num_states, dtype=levels.dtype, device=x.device)
        step = max(1, _AT_ONCE // self.num_states**2)
        for start in range(0, len(levels), step):
            matrices = self._exponentials(levels[start : start + step])
            here = (which >= start) & (which < start + step)
            rows = (matrices.mT if transposed else matrices)[(which - start).clamp(0, len(matrices) - 1), x]
            p = torch.where(here[..., None], rows, p)
        Q = self._Q.on(x.device)
        return Row.full(_flow(p, level, lambda p: p @ (Q.T if transposed else Q)).to(level.dtype))

    def _finite(self, levels: Tensor) -> Tensor:
        """The levels, with a very long time for an infinite one."""
        return levels.clamp(max=_FOREVER / self._fastest) if self._fastest else torch.zeros_like(levels)

    def _exponentials(self, levels: Tensor) -> Tensor:
        """exp(sigma Q) for levels (S,) >= 0, (S, N, N) float64, the last ones kept where levels can be compared."""
        Q = self._Q.on(levels.device)
        if not readable(levels):
            return _exponential(Q, self._fastest, levels)
        kept = self._kept  # read once: another thread may put its own there
        if kept is not None and torch.equal(kept[0], levels):
            return kept[1]
        with torch.inference_mode(False), torch.no_grad():
            levels = levels.clone()
            matrices = self._by_eigenvectors(levels) if self.reversible else _exponential(Q, self._fastest, levels)
        self._kept = (levels, matrices)
        return matrices

    def _by_eigenvectors(self, levels: Tensor) -> Tensor:
        """The same, faster, where eigenvectors have the digits."""
        left, modes, right = (part.on(levels.device) for part in self._eigen)
        matrices: Tensor = (left * (levels[:, None, None] * modes).exp()) @ right
        small = matrices.amin((-2, -1)) < _LEAST
        matrices[small] = _exponential(self._Q.on(levels.device), self._fastest, levels[small])
        return matrices

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_kept": None}


def _generator(Q: Tensor) -> Tensor:
    """Q in float64 with columns that sum to 0 exactly; raise unless it is a generator."""
    if not isinstance(Q, Tensor) or not Q.is_floating_point():
        raise TypeError(f"Q must be a floating-point tensor, got {describe(Q)}")
    if Q.dim() != 2 or Q.shape[0] != Q.shape[1] or len(Q) < 2:
        raise ValueError(f"Q must be a square matrix of at least 2 x 2, got shape {tuple(Q.shape)}")
    if not Q.isfinite().all():
        y, x = (~Q.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"Q must be finite, found Q[{y}, {x}] = {float(Q[y, x])}")
    rates = Q.detach().double().clone()
    rates.fill_diagonal_(0)
    if rates.min() < 0:
        y, x = divmod(int(rates.argmin()), len(Q))
        raise ValueError(f"Q must have off-diagonal rates of at least 0, found Q[{y}, {x}] = {float(rates[y, x])}")
    tolerance = 64 * torch.finfo(Q.dtype).eps * max(float(rates.sum(0).max()), float(rates.max()))
    off = (Q.double().sum(0)).abs()
    if off.max() > tolerance:
        x = int(off.argmax())
        hint = "; its rows do: columns are the sources here, pass Q.T" if Q.sum(1).abs().max() <= tolerance else ""
        raise ValueError(f"Q must have columns that sum to 0, found {float(Q[:, x].sum()):.6g} in column {x}{hint}")
    return rates - rates.sum(0).diag()


def _exponential(Q: Tensor, fastest: float, levels: Tensor) -> Tensor:
    """exp(sigma Q) for levels (S,) >= 0 by the positive series, (S, N, N); `fastest` is the largest rate of leaving."""
    if torch.compiler.is_compiling():
        opaque: Tensor = _opaque_exponential(Q, fastest, levels)
        return opaque
    identity = torch.eye(len(Q), dtype=Q.dtype, device=Q.device)
    if fastest == 0:
        return identity.expand(len(levels), -1, -1)
    jumps = levels * fastest
    halvings = jumps.clamp(min=1).log2().ceil()
    jumps = (jumps / 2**halvings)[:, None, None]
    P = (identity + Q / fastest).clamp(min=0)
    series = identity.expand(len(levels), -1, -1)
    for k in range(_TERMS, 0, -1):
        series = identity + jumps / k * (P @ series)
    matrices: Tensor = (-jumps).exp() * series
    for i in range(_rounds(halvings)):
        squared = matrices @ matrices
        squared = squared / squared.sum(-2, keepdim=True)  # lest rounding add up over 60 squarings
        matrices = torch.where((halvings > i)[:, None, None], squared, matrices)
    return matrices


@torch.library.custom_op("sedd_graphs::exponential", mutates_args=())
def _opaque_exponential(Q: Tensor, fastest: float, levels: Tensor) -> Tensor:
    """The same as one operation of a compiled graph, which would else hold every round of squaring."""
    own: Tensor = _exponential(Q, fastest, levels).clone()
    return own


@_opaque_exponential.register_fake
def _(Q: Tensor, fastest: float, levels: Tensor) -> Tensor:
    return Q.new_empty(len(levels), *Q.shape)


def _rounds(halvings: Tensor) -> int:
    """The most of them; the most there can be, where values cannot be read without waiting."""
    if readable(halvings):
        return int(halvings.max()) if len(halvings) else 0
    return math.ceil(math.log2(_FOREVER))


def _either_sign(Q: Tensor, fastest: float, levels: Tensor) -> Tensor:
    """exp(sigma Q) for levels (S,) of either sign, (S, N, N): by the positive series where they are not negative."""
    if readable(levels) and (levels >= 0).all():
        return _exponential(Q, fastest, levels)
    backwards: Tensor = torch.matrix_exp(levels.clamp(max=0)[:, None, None] * Q)
    if readable(levels) and (levels < 0).all():
        return backwards
    forwards = _exponential(Q, fastest, levels.clamp(min=0))
    return torch.where((levels >= 0)[:, None, None], forwards, backwards)


def _eigen(Q: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """(left, modes, right) with exp(sQ) = left e^(s modes) right, or None when Q is not reversible.

    None too when the stationary probabilities range over more than 1e8, where the scaling loses digits.
    """
    log_stationary = _log_stationary(Q)
    if log_stationary is None or log_stationary.max() - log_stationary.min() > math.log(1e8):
        return None
    root = (log_stationary / 2).exp()
    symmetric = Q * root / root[:, None]
    modes, vectors = torch.linalg.eigh((symmetric + symmetric.T) / 2)
    modes = torch.where(modes > 1e-13 * modes[0], 0, modes)  # the limit's, exactly: infinite noise must keep them
    return root[:, None] * vectors, modes, vectors.T / root


def _log_stationary(Q: Tensor) -> Tensor | None:
    """Log pi with Q[y, x] pi[x] = Q[x, y] pi[y], (N,), up to a constant for each connected part; None if there is none.

    Along a spanning tree detailed balance defines pi; on the other edges it must hold.
    """
    rates = Q.clone().fill_diagonal_(0)
    joined = rates > 0
    if (joined != joined.T).any():
        return None
    log_pi = torch.full_like(Q[0], torch.nan)
    while log_pi.isnan().any():
        frontier = log_pi.isnan().nonzero()[:1, 0]
        log_pi[frontier] = 0
        while len(frontier):
            reached = joined[:, frontier] & log_pi.isnan()[:, None]
            new = reached.any(-1).nonzero()[:, 0]
            parent = frontier[reached[new].int().argmax(-1)]
            log_pi[new] = log_pi[parent] + (rates[new, parent] / rates[parent, new]).log()
            frontier = new
    y, x = joined.nonzero().T
    imbalance = (rates[y, x].log() + log_pi[x]) - (rates[x, y].log() + log_pi[y])
    return log_pi if len(y) == 0 or imbalance.abs().max() < 1e-10 else None
