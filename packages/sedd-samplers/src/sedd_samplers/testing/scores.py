"""Laws of a score model, (x (B, L), sigma (B,)) -> log p_t(y) / p_t(x), (B, L, N)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..interfaces import Graph, ScoreModel
from ..model_calls import offers
from ..steps import tweedie_probs
from ._enumerated import dense, score_of_law

__all__ = [
    "sequences_are_answered_one_by_one",
    "rows_are_those_of_the_whole",
    "score_is_consistent",
    "posterior_is_a_distribution",
    "score_is_that_of",
]

LEVELS = (0.05, 0.7, 3.0)


def sequences_are_answered_one_by_one(
    score: ScoreModel, graph: Graph, *, length: int = 6, tolerance: float = 1e-4
) -> None:
    """(B, L, N) numbers, no NaN where a jump leads, the same for a sequence alone; x is not written to."""
    x, sigma = _states(graph, 4, length), torch.tensor([*LEVELS, 0.3])
    before = x.clone()
    with torch.no_grad():
        out = score(x, sigma)
        assert out.shape == (*x.shape, graph.num_states), f"expected (4, {length}, N), got {tuple(out.shape)}"
        assert out.is_floating_point(), f"a log-score is floating point, got {out.dtype}"
        assert torch.equal(x, before), "the model wrote into its input x"
        led = _led_into(graph, x)[..., None].expand_as(out) & _others(x, graph)
        assert not out[led].isnan().any(), "NaN where the reverse process can move"
        assert (out[led] < torch.inf).all(), "an infinite log-score where the reverse process can move"
        for b in range(len(x)):
            alone = score(x[b : b + 1], sigma[b : b + 1])[0]
            _close(alone[led[b]], out[b][led[b]], tolerance, f"sequence {b} alone and in its batch")


def rows_are_those_of_the_whole(score: ScoreModel, graph: Graph, *, length: int = 6, tolerance: float = 1e-4) -> None:
    """With `where`, if the model offers it: the rows at its true positions, in row-major order."""
    if not offers(score, "where"):
        return
    x, sigma = _states(graph, 4, length), torch.tensor([*LEVELS, 0.3])
    where = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    with torch.no_grad():
        whole, rows = score(x, sigma)[where], score(x, sigma, where=where)  # type: ignore[call-arg]
    assert rows.shape == whole.shape, f"expected {tuple(whole.shape)} rows at where, got {tuple(rows.shape)}"
    led = _led_into(graph, x)[where][:, None].expand_as(whole) & _others(x, graph)[where]
    _close(rows[led], whole[led], tolerance, "the rows at where, and those of the whole")


def score_is_consistent(score: ScoreModel, graph: Graph, *, length: int = 4, tolerance: float = 1e-3) -> None:
    """Ratios of one law: two changes in either order are the same ratio, and a change and its undoing are none.

        log s(x)_{i: a} + log s(x with a at i)_{j: b} = log s(x)_{j: b} + log s(x with b at j)_{i: a}

    Of jumps that the reverse process makes. A trained network is not consistent to many digits: set the tolerance, in
    nats, to what is to be caught.
    """
    generator, N = torch.Generator().manual_seed(2), graph.num_states
    tokens = torch.tensor([y for y in range(N) if y != graph.mask_id])
    x = _states(graph, 24, length)
    i, j = torch.rand(len(x), length, generator=generator).argsort(1)[:, :2].T
    if graph.mask_id is not None:
        x[torch.arange(12), i[:12]], x[torch.arange(12), j[:12]] = graph.mask_id, graph.mask_id
    a, b = tokens[torch.randint(len(tokens), (2, len(x)), generator=generator)]
    row = torch.arange(len(x))

    def jumps(x: Tensor, at: Tensor, to: Tensor) -> Tensor:
        return (dense(graph.rates_into(x[row, at]), N)[row, to] > 0) | (to == x[row, at])

    for level in LEVELS:
        sigma = torch.full((len(x),), level)

        def ratio(x: Tensor, at: Tensor, to: Tensor, sigma: Tensor = sigma) -> Tensor:
            out = score(x, sigma)[row, at, to].double()
            return torch.where(to == x[row, at], 0.0, out)

        with torch.no_grad():
            y, z = x.index_put((row, i), a), x.index_put((row, j), b)
            one, other = ratio(x, i, a) + ratio(y, j, b), ratio(x, j, b) + ratio(z, i, a)
            back = ratio(x, i, a) + ratio(y, i, x[row, i])
        both = jumps(x, i, a) & jumps(y, j, b) & jumps(x, j, b) & jumps(z, i, a)
        _close(one[both], other[both], tolerance, f"two changes in either order, at sigma = {level},")
        undone = jumps(x, i, a) & jumps(y, i, x[row, i])
        _close(
            back[undone], torch.zeros_like(back[undone]), tolerance, f"a change and its undoing, at sigma = {level},"
        )


def posterior_is_a_distribution(score: ScoreModel, graph: Graph, *, length: int = 6, tolerance: float = 1e-3) -> None:
    """p(x0 | x_t) by Tweedie (18) is non-negative, and under a graph with a mask leaves nothing to the mask.

    Under absorption that is: the score sums to 1 / (e^sigma - 1) over tokens. Up to the tolerance, a probability.
    """
    x = _states(graph, 4, length)
    led = _led_into(graph, x)
    for level in LEVELS:
        with torch.no_grad():
            out = score(x, torch.full((4,), level))[led].double()
        p = tweedie_probs(out, x[led], graph, torch.full((len(out),), level, dtype=torch.float64))
        if graph.mask_id is not None:
            worst = float(p[:, graph.mask_id].abs().max())
            assert worst <= tolerance, (
                f"at sigma = {level} the posterior gives the mask {worst:.3g}, more than {tolerance:g}"
            )
        assert float(p.min()) >= -tolerance, f"at sigma = {level} the posterior has an entry of {float(p.min()):.3g}"


def score_is_that_of(p0: Tensor, score: ScoreModel, graph: Graph, *, tolerance: float = 1e-3) -> None:
    """Every ratio, in nats, is that of the law p0 (N, ..., N) of sequences, at three noise levels.

    p0 has one axis a position, and nothing at the mask. It is enumerated: N^L states at most 4096.
    """
    N, L = p0.shape[0], p0.ndim
    assert p0.shape == (graph.num_states,) * L, (
        f"p0 must have {graph.num_states} entries an axis, got {tuple(p0.shape)}"
    )
    assert N**L <= 4096, f"p0 has {N**L} states, more than the 4096 that are enumerated"
    x = torch.cartesian_prod(*[torch.arange(N)] * L).view(-1, L)
    exact = score_of_law(p0 / p0.sum(), graph)
    for level in LEVELS:
        sigma = torch.full((len(x),), level)
        with torch.no_grad():
            out, true = score(x, sigma).double(), exact(x, sigma.double())
        counts = _led_into(graph, x)[..., None].expand_as(true) & _others(x, graph) & true.isfinite()
        _close(out[counts], true[counts], tolerance, f"the log-score at sigma = {level} and that of p0")


def _states(graph: Graph, batch: int, length: int) -> Tensor:
    """Random states, the mask among them."""
    return torch.randint(graph.num_states, (batch, length), generator=torch.Generator().manual_seed(0))


def _led_into(graph: Graph, x: Tensor) -> Tensor:
    """Whether a jump leads into the state, so that the reverse process can leave it."""
    return (dense(graph.rates_into(x), graph.num_states) > 0).any(-1)


def _others(x: Tensor, graph: Graph) -> Tensor:
    """The entries of a log-score that mean something where they are asked for: (B, L, N) bool."""
    states = torch.arange(graph.num_states)
    Q = dense(graph.rates_into(x), graph.num_states)
    return (states != x[..., None]) & (Q > 0)


def _close(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    same = (found == expected) | ((found - expected).abs() <= tolerance)
    worst = float((found - expected)[~same].abs().max()) if not same.all() else 0.0
    assert same.all(), f"{what}: they differ by up to {worst:.3g} nats, more than {tolerance:g}"
