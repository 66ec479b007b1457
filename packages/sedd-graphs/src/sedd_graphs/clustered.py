"""States in clusters: fast mixing within a cluster, slow mixing between all states.

With M the averaging within clusters and J/N the averaging over all N states,

    Q       = within (M - I) + between (J/N - I)
    exp(sQ) = (1 - e^(-between s)) J/N + e^(-between s) (1 - e^(-within s)) M + e^(-(within + between) s) I

because the two averagings commute and M J = J. A row is one number outside x's cluster, and so costs as much as the
largest cluster has states. Tokens whose embeddings lie close, amino acids of one class, and nucleotides with a
transition/transversion ratio (Kimura's model of 1980 is two clusters of two) are of this kind.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sedd_graphs._checks import check_rate, check_states, rate_dtype, spread, times
from sedd_graphs._constants import Constant
from sedd_graphs.graph import Graph, _uniform_prior, _vectors
from sedd_graphs.row import Row

__all__ = ["Clustered"]


class Clustered(Graph):
    """Tokens that drift within their cluster and, more rarely, anywhere.

    Args:
        labels: the cluster of each state, N integers (any values), at least two different ones.
        within: rate of jumping to a uniformly random state of the own cluster.
        between: rate of jumping to a uniformly random state of all.

    Raises:
        ValueError: fewer than two clusters, or a rate that is negative or not finite.
    """

    def __init__(self, labels: Tensor | Sequence[int], *, within: float, between: float) -> None:
        labels = torch.as_tensor(labels)
        if labels.dim() != 1 or labels.is_floating_point():
            raise ValueError(f"labels must be one integer a state, got shape {tuple(labels.shape)} of {labels.dtype}")
        names, cluster, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
        if len(names) < 2:
            raise ValueError(
                f"labels must name at least two clusters, got {len(names)}; one cluster is the uniform graph"
            )
        self.num_states = len(labels)
        self.num_clusters = len(names)
        self.within = check_rate("within", within)
        self.between = check_rate("between", between)
        self._kappa: float | None = None
        self._cluster = Constant(cluster)
        self._sizes = Constant(sizes)
        self._members = Constant(_members(cluster, sizes))

    @classmethod
    def kimura(cls, kappa: float) -> Clustered:
        """Nucleotides A, C, G, T = 0, 1, 2, 3 at one substitution a unit of noise.

        An unknown base, N, is none of the four: give its position weight 0 in the loss, whatever letter stands there.
        As a fifth letter that the model writes, too, it is a cluster of its own, `Clustered([0, 1, 0, 1, 2], ...)`.

        Args:
            kappa: rate of the transitions A-G and C-T over the rate of each transversion, at least 1.
        """
        if not 1 <= kappa < float("inf"):
            raise ValueError(f"kappa must be at least 1 and finite, got {kappa}")
        transversion = 1 / (kappa + 2)
        graph = cls([0, 1, 0, 1], within=2 * (kappa - 1) * transversion, between=4 * transversion)
        graph._kappa = float(kappa)
        return graph

    def __repr__(self) -> str:
        if self._kappa is not None:
            return f"Clustered.kimura(kappa={self._kappa:.6g})"
        rates = f"within={self.within:.6g}, between={self.between:.6g}"
        return f"Clustered({self.num_states} states in {self.num_clusters} clusters, {rates})"

    def rates_into(self, x: Tensor) -> Row:
        """between/N from every state, within/size more from those of x's cluster."""
        check_states("x", x, self.num_states)
        one = torch.ones((), dtype=rate_dtype(), device=x.device)
        return self._row(x, self.between * one, self.within * one, -(self.within + self.between) * one)

    def rates_out_of(self, x: Tensor) -> Row:
        """Q is symmetric."""
        return self.rates_into(x)

    def transition_from(self, x: Tensor, sigma: Tensor) -> Row:
        """Somewhere at all, somewhere in the cluster, or still at x."""
        check_states("x", x, self.num_states)
        level = spread(sigma, x.shape)
        return self._row(x, *self._shares(level))

    def transition_into(self, x: Tensor, sigma: Tensor) -> Row:
        """exp(sigma Q) is symmetric."""
        return self.transition_from(x, sigma)

    def propagate(self, v: Tensor, sigma: Tensor) -> Tensor:
        """A mixture of v, its averages over clusters and its average."""
        v, level = _vectors(v, sigma, self.num_states)
        everywhere, in_cluster, still = self._shares(level)
        cluster, sizes = self._cluster.on(v.device), self._sizes.on(v.device)
        totals = v.new_zeros(*v.shape[:-1], len(sizes)).index_add(-1, cluster, v)
        mixed = in_cluster[..., None] * totals / sizes + (everywhere * v.sum(-1) / self.num_states)[..., None]
        return torch.addcmul(mixed[..., cluster], still[..., None].to(v.dtype), v)

    def prior(self, sigma: Tensor) -> Row:
        """1/N, at every sigma."""
        return _uniform_prior(sigma, self.num_states)

    def _shares(self, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The probabilities of a jump to anywhere, of jumps within the cluster alone, and of none."""
        no_far, no_near = (-times(self.between, level)).exp(), (-times(self.within, level)).exp()
        near = -(-times(self.within, level)).expm1()
        return -(-times(self.between, level)).expm1(), no_far * near, no_far * no_near

    def _row(self, x: Tensor, everywhere: Tensor, in_cluster: Tensor, still: Tensor) -> Row:
        """`everywhere` shared by all states, `in_cluster` by its cluster, `still` at x; each spreads over x."""
        cluster = self._cluster.on(x.device)[x]
        index, size = self._members.on(x.device)[cluster], self._sizes.on(x.device)[cluster]
        base = (everywhere / self.num_states).expand(x.shape)
        inside = torch.arange(index.shape[-1], device=x.device) < size[..., None]
        value = base[..., None] + torch.where(inside, (in_cluster / size)[..., None], 0)
        value = value + torch.where(index == x[..., None], still.expand(x.shape)[..., None], 0)
        return Row(base, index, value, self.num_states)


def _members(cluster: Tensor, sizes: Tensor) -> Tensor:
    """The states of each cluster, (clusters, largest size); short clusters are filled up with states of others.

    In the order of clusters, the states after a cluster's own are others', and no state comes twice within one round.
    """
    by_cluster = cluster.argsort(stable=True)
    start = sizes.cumsum(0) - sizes
    step = torch.arange(int(sizes.max()), device=cluster.device)
    return by_cluster[(start[:, None] + step) % len(cluster)]
