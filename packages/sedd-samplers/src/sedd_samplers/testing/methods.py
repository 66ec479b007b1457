"""Laws of a method, `(reverse, x, t, s) -> x`, under a graph of a few states and a schedule."""

from __future__ import annotations

import torch

from ..grids import uniform_grid
from ..infilling import clamped
from ..interfaces import Graph, Noise
from ..reverse import Reverse
from ..sampling import infill, sample
from ..steps import Method
from ._enumerated import Pairs, check_frequencies, law_of_chain, marginal

__all__ = [
    "given_positions_stay",
    "samples_depend_on_their_seed_alone",
    "states_are_left_alone",
    "samples_follow_the_chain",
    "chain_has_order",
    "samples_reach_the_law",
]


def given_positions_stay(method: Method, graph: Graph, noise: Noise) -> None:
    """Positions that are given keep their tokens, and the others come to light."""
    pairs = Pairs(graph)
    x = torch.tensor([[y, y] for y in range(graph.num_states) if y != graph.mask_id])
    given = torch.tensor([[True, False]]).expand_as(x)
    out = infill(pairs.score, graph, noise, x=x, given=given, steps=4, t_min=0.05, method=method, conditioning=clamped,
                 seeds=range(len(x)))  # fmt: skip
    assert torch.equal(out[given], x[given]), f"given tokens {x[given].tolist()} became {out[given].tolist()}"
    assert graph.mask_id is None or not (out == graph.mask_id).any(), "a mask is left after the final denoise"


def samples_depend_on_their_seed_alone(method: Method, graph: Graph, noise: Noise) -> None:
    """The same sequence of the same seed, alone and in a batch, and another for other seeds."""
    pairs = Pairs(graph)

    def run(seeds: list[int]) -> torch.Tensor:
        return sample(pairs.score, graph, noise, shape=(len(seeds), 2), steps=4, t_min=0.05, method=method, seeds=seeds)

    together = run(list(range(40)))
    for seeds in ([17], [30, 2]):
        assert torch.equal(together[seeds], run(seeds)), f"the samples of seeds {seeds} depend on the batch"
    assert not torch.equal(together, together[:1].expand_as(together)), "all seeds give one sample"


def states_are_left_alone(method: Method, graph: Graph, noise: Noise) -> None:
    """A method returns new states; those that it was given are as they were."""
    pairs = Pairs(graph)
    free = torch.zeros(50, 2, dtype=torch.bool)
    reverse = Reverse(pairs.score, graph, noise, frozen=free, seeds=torch.arange(50))
    x = reverse.prior()
    before, t = x.clone(), torch.full((50,), 0.9, dtype=torch.float64)
    method(reverse, x, t, t / 3)
    assert torch.equal(x, before), "the method wrote into the states that it was given"


def samples_follow_the_chain(method: Method, graph: Graph, noise: Noise, *, count: int = 20_000) -> None:
    """Three steps: the samples' law is the product of the method's own rows, by a chi-square test (see `ALARM`).

    For methods that draw once or twice a step by `reverse.redraw` and `flip`; the error names those that do not.
    """
    pairs, times = Pairs(graph), uniform_grid(3, 0.1)
    law = law_of_chain(pairs, noise, method, times, pairs.prior())
    x = sample(pairs.score, graph, noise, shape=(count, 2), times=times, method=method, denoise=False,
               generator=torch.Generator().manual_seed(0))  # fmt: skip
    check_frequencies(x, law, "three steps, and the law of their rows")


def chain_has_order(method: Method, graph: Graph, noise: Noise, *, order: float, steps: int = 16) -> None:
    """The distance of the chain's law from the true one falls like steps^-order: enumerated, with no chance in it.

    Total variation at t = .1, from the true law at t = 1, at `steps` and twice and four times as many; a fourth below
    the order is let pass.
    """
    pairs, t_min = Pairs(graph), 0.1
    start, true = (_law_at(pairs, noise, time) for time in (1.0, t_min))
    laws = (law_of_chain(pairs, noise, method, uniform_grid(n, t_min), start) for n in (steps, 2 * steps, 4 * steps))
    errors = [float((law - true).abs().sum()) / 2 for law in laws]
    found = torch.tensor(errors).log2().diff().neg().tolist()
    assert errors[-1] < 1e-9 or min(found) > order - 0.25, (
        f"the error falls with the orders {found[0]:.2f} and {found[1]:.2f} in the number of steps, not {order}: "
        f"{', '.join(f'{error:.3g}' for error in errors)}"
    )


def samples_reach_the_law(
    method: Method, graph: Graph, noise: Noise, *, steps: int = 100, t_min: float = 1e-3, count: int = 4000
) -> None:
    """Pairs of tokens that depend on each other, by many steps, have the law of the data, by a chi-square test.

    Its resolution: a total variation of about .03 at 4000 samples.
    """
    pairs = Pairs(graph)
    x = sample(pairs.score, graph, noise, shape=(count, 2), steps=steps, t_min=t_min, method=method,
               generator=torch.Generator().manual_seed(0))  # fmt: skip
    check_frequencies(x, pairs.p0.flatten(), f"{steps} steps, and the law of the data")


def _law_at(pairs: Pairs, noise: Noise, time: float) -> torch.Tensor:
    """The true law (N^2,) at a time."""
    sigma = noise(torch.tensor([time], dtype=torch.float64))[0]
    return marginal(pairs.p0, pairs.graph, sigma).flatten()
