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

from sedd_graphs._checks import check_integer, check_states, describe, spread, widen
from sedd_graphs._constants import Constant
from sedd_graphs.graph import Graph, _vectors
from sedd_graphs.row import Row

__all__ = ["Dense"]

_TERMS = 20  # of the series at rs <= 1: the rest is below 1 / 21!
_FOREVER = 2.0**60  # in units of 1 / r: what infinite noise is taken for
_AT_ONCE = 2**24  # entries of exp(sQ), over all distinct noise levels, held at a time
_LEAST = 1e-6  # the eigenvectors' exp(sQ) is used where all its entries are at least so large


class Dense(Graph):
    """The chain of any generator matrix, for up to some thousand states; rows name all N of them.

    exp(sigma Q) is computed in float64, once for all positions of equal sigma, and kept until other levels are asked
    for, so that a call each of `sample` and `ratio` costs one exponential.

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
        return Row.full(self._Q.on(x.device)[x].to(torch.get_default_dtype()))

    def rates_out_of(self, x: Tensor) -> Row:
        """A column of Q."""
        check_states("x", x, self.num_states)
        return Row.full(self._Q.on(x.device).T[x].to(torch.get_default_dtype()))

    def transition_from(self, x: Tensor, sigma: Tensor) -> Row:
        """A column of exp(sigma Q)."""
        return self._rows(x, sigma, transposed=True)

    def transition_into(self, x: Tensor, sigma: Tensor) -> Row:
        """A row of exp(sigma Q)."""
        return self._rows(x, sigma, transposed=False)

    def propagate(self, v: Tensor, sigma: Tensor) -> Tensor:
        """exp(sigma Q) v in float64: by eigenvectors, or by one exponential for each distinct sigma."""
        v, level = _vectors(v, sigma, self.num_states)
        wide = widen(v)
        if self.reversible:
            left, modes, right = (part.on(v.device) for part in self._eigen)
            decay = (self._finite(widen(level))[..., None] * modes).exp()
            return ((wide @ right.T * decay) @ left.T).to(v.dtype)
        levels, which = torch.unique(self._finite(widen(level.detach())), return_inverse=True)
        which = which.expand(v.shape[:-1])
        moved = torch.empty_like(wide)
        for i in range(len(levels)):
            chosen, one = which == i, levels[i : i + 1]
            matrix = self._exponentials(one) if one >= 0 else torch.matrix_exp(one * self._Q.on(v.device))[None]
            moved[chosen] = wide[chosen] @ matrix[0].T
        if sigma.requires_grad:  # d/dsigma = Q
            moved = moved + (level - level.detach())[..., None] * (moved @ self._Q.on(v.device).T)
        return moved.to(v.dtype)

    def _rows(self, x: Tensor, sigma: Tensor, *, transposed: bool) -> Row:
        """Row x of exp(sigma Q) or of its transpose, for each x."""
        check_states("x", x, self.num_states)
        level = spread(sigma, x.shape)
        levels, which = torch.unique(self._finite(widen(level.detach())), return_inverse=True)
        which = which.expand(x.shape)
        p = torch.empty(*x.shape, self.num_states, dtype=levels.dtype, device=x.device)
        step = max(1, _AT_ONCE // self.num_states**2)
        for start in range(0, len(levels), step):
            matrices = self._exponentials(levels[start : start + step])
            chosen = (which >= start) & (which < start + step)
            p[chosen] = (matrices.mT if transposed else matrices)[which[chosen] - start, x[chosen]]
        if sigma.requires_grad:  # d/dsigma exp(sigma Q) = Q exp(sigma Q) = exp(sigma Q) Q
            Q = self._Q.on(x.device)
            p = p + (level - level.detach())[..., None] * (p @ (Q.T if transposed else Q))
        return Row.full(p.to(level.dtype))

    def _finite(self, levels: Tensor) -> Tensor:
        """The levels, with a very long time for an infinite one."""
        return levels.clamp(max=_FOREVER / self._fastest) if self._fastest else torch.zeros_like(levels)

    def _exponentials(self, levels: Tensor) -> Tensor:
        """exp(sigma Q) for levels (S,) >= 0, (S, N, N) float64, the last ones kept."""
        if self._kept is not None and self._kept[0].device == levels.device and torch.equal(self._kept[0], levels):
            return self._kept[1]
        Q = self._Q.on(levels.device)
        if self.reversible:
            left, modes, right = (part.on(levels.device) for part in self._eigen)
            matrices = (left * (levels[:, None, None] * modes).exp()) @ right
            small = matrices.amin((-2, -1)) < _LEAST
            matrices[small] = _exponential(Q, levels[small])
        else:
            matrices = _exponential(Q, levels)
        self._kept = (levels, matrices)
        return matrices


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


def _exponential(Q: Tensor, levels: Tensor) -> Tensor:
    """exp(sigma Q) for levels (S,) >= 0 by the positive series, (S, N, N)."""
    fastest = float(-Q.diagonal().min())
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
    matrices = (-jumps).exp() * series
    for i in range(int(halvings.max()) if len(levels) else 0):
        again = halvings > i
        squared = matrices[again] @ matrices[again]
        matrices[again] = squared / squared.sum(-2, keepdim=True)  # lest rounding add up over 60 squarings
    return matrices


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
