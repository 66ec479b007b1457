"""How fast the samplers' error falls with the step: the picture of their orders of convergence.

Three positions of three tokens, with a distribution that is known. What a method does to the law over all sequences is
computed, not sampled: for every sequence before the step, the probabilities of every sequence after it. So the error
shown, the total variation from the true law at the end, is free of chance, down to float64.

The data depend on each other gently, so that the second-order method's extrapolated rates stay positive; `--dependence
1.5` shows what happens when they do not.

    python benchmarks/sampler_orders.py                # sampler_orders.png and sampler_orders.json under runs/
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sedd_graphs import Absorbing, Dense, Graph, Hybrid, Linear, Uniform
from sedd_samplers import (
    Ancestral,
    Euler,
    Method,
    PredictorCorrector,
    Remasking,
    Reverse,
    TauLeaping,
    Trapezoidal,
    Tweedie,
    at_rate,
)
from sedd_samplers.positions import Positions
from sedd_samplers.reverse import Kernel, Moves
from torch import Tensor

LENGTH, START, END = 3, 1.0, 0.2
NOISE = Linear(sigma_max=1.5)


def main() -> None:
    """Compute all errors, print the slopes, write the picture and the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dependence", type=float, default=0.3, help="spread of the data's log-probabilities")
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--out", type=Path, default=Path("runs"))
    given = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    results: dict[str, dict[str, list[float]]] = {}
    for name, graph in graphs().items():
        score = ExactScore(data(graph, given.dependence), graph)
        results[name] = {}
        for label, (method, stages) in methods(graph).items():
            errors = [error(score, method, stages, steps) for steps in given.steps]
            results[name][label] = errors
            print(f"{name:10} {label:20} slope {slope(given.steps, errors):5.2f}   total variation {errors[-1]:.2e}")
    given.out.mkdir(parents=True, exist_ok=True)
    report = {
        **{"dependence": given.dependence, "steps": given.steps, "times": [START, END], "total_variation": results},
        "slope": {g: {m: slope(given.steps, e) for m, e in by.items()} for g, by in results.items()},
    }
    (given.out / "sampler_orders.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(given.steps, results).savefig(given.out / "sampler_orders.png", dpi=150)


def graphs() -> dict[str, Graph]:
    """One of each kind, and one that is not reversible."""
    ring = 0.8 * torch.eye(3).roll(1, 0) + 0.3 * torch.eye(3).roll(-1, 0) - 1.1 * torch.eye(3)
    hybrid = Hybrid(3, uniform_rate=0.4, mask_rate=0.6)
    return {"absorbing": Absorbing(3), "uniform": Uniform(3), "hybrid": hybrid, "ring": Dense(ring)}


def methods(graph: Graph) -> dict[str, tuple[Method, int]]:
    """The approximate methods, and in how many draws each makes a step."""
    return {
        **{"Euler": (Euler(), 1), "tau-leaping": (TauLeaping(), 1), "Tweedie": (Tweedie(), 1)},
        **{"ancestral": (Ancestral(), 1), "predictor-corrector": (PredictorCorrector(ratio=0.5), 2)},
        **({"remasking": (Remasking(at_rate(1.0)), 2)} if isinstance(graph, Absorbing) else {}),
        "trapezoidal": (Trapezoidal(), 2),
    }


def data(graph: Graph, dependence: float) -> Tensor:
    """A distribution (N, ..., N) over sequences of tokens, without the mask."""
    tokens = [y for y in range(graph.num_states) if y != graph.mask_id]
    log_p = dependence * torch.randn((len(tokens),) * LENGTH, generator=torch.Generator().manual_seed(0))
    p0 = torch.zeros((graph.num_states,) * LENGTH)
    p0[torch.meshgrid(*[torch.tensor(tokens)] * LENGTH, indexing="ij")] = log_p.flatten().softmax(0).view_as(log_p)
    return p0


class ExactScore:
    """The score of p0 (N, ..., N), by enumeration."""

    def __init__(self, p0: Tensor, graph: Graph) -> None:
        self.p0, self.graph = p0, graph
        self.states = torch.tensor(list(itertools.product(range(graph.num_states), repeat=LENGTH)))

    def law(self, sigma: Tensor) -> Tensor:
        """p_sigma, (N, ..., N), for a 0-dim sigma."""
        p = self.p0
        for axis in range(LENGTH):
            p = self.graph.propagate(p.movedim(axis, -1), sigma).movedim(-1, axis)
        return p.clamp(min=0)

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        """Log-score (B, L, N); all of a batch at one noise level."""
        N = self.graph.num_states
        stride = N ** torch.arange(LENGTH - 1, -1, -1)
        log_p = self.law(sigma[0].double()).flatten().log()
        here = (x * stride).sum(-1)
        there = here[:, None, None] + (torch.arange(N) - x[..., None]) * stride[:, None]
        return log_p[there] - log_p[here][:, None, None]


class Enumerator(Reverse):
    """A reverse process that draws nothing: it keeps each stage's rows (B, L, N) and goes on where it is told."""

    def __init__(self, score: ExactScore, x: Tensor, middle: Tensor) -> None:
        frozen = torch.zeros_like(x, dtype=torch.bool)
        super().__init__(score, score.graph, NOISE, frozen=frozen, seeds=torch.zeros_like(x[:, 0]))
        self.middle, self.kept = middle, list[Tensor]()

    def redraw(
        self,
        x: Tensor,
        sigma: Tensor,
        where: Tensor,
        kernel: Kernel,
        *,
        moves: Moves | None = None,
        among: Positions | None = None,
    ) -> Tensor:
        """The kernel's rows are kept."""
        rows = torch.nn.functional.one_hot(x, self.graph.num_states).double()
        if where.any():
            probs = self.evaluate(x, sigma, where, kernel).clamp(min=0)
            rows[where] = probs / probs.sum(-1, keepdim=True)
        self.kept.append(rows)
        return self.middle

    def flip(self, x: Tensor, where: Tensor, state: int, probability: Tensor) -> Tensor:
        """The chances of both outcomes are kept."""
        rows = torch.nn.functional.one_hot(x, self.graph.num_states).double()
        share = (where * probability[:, None])[..., None]
        rows = rows * (1 - share)
        rows[..., state] += share[..., 0]
        self.kept.append(rows)
        return self.middle


def transition(score: ExactScore, method: Method, stages: int, t: Tensor, s: Tensor) -> Tensor:
    """The probabilities (S, S) of all sequences after a step, for each before it."""
    states, S = score.states, len(score.states)
    x = states if stages == 1 else states.repeat_interleave(S, 0)  # with two draws: every pair (before, between)
    middle = x if stages == 1 else states.repeat(S, 1)
    reverse = Enumerator(score, x, middle)
    method(reverse, x, t.expand(len(x)), s.expand(len(x)))
    position = torch.arange(LENGTH)
    first, *second = (rows[:, position, states].prod(-1) for rows in reverse.kept)
    if not second:
        return first
    return torch.einsum("xm,xmy->xy", first.view(S, S, S)[:, 0], second[0].view(S, S, S))


def error(score: ExactScore, method: Method, stages: int, steps: int) -> float:
    """Total variation from the true law at END, started at the true law at START."""
    times = torch.linspace(START, END, steps + 1)
    law = score.law(NOISE(times[0])[0]).flatten()
    for t, s in itertools.pairwise(times):
        law = law @ transition(score, method, stages, t, s)
    return float((law - score.law(NOISE(times[-1])[0]).flatten()).abs().sum()) / 2


def slope(steps: list[int], errors: list[float]) -> float:
    """Of the last two points, in doubly logarithmic paper."""
    return -math.log(errors[-1] / errors[-2]) / math.log(steps[-1] / steps[-2])


def draw(steps: list[int], results: dict[str, dict[str, list[float]]]) -> Figure:
    """One panel a graph, with lines of slope 1 and 2 to compare with."""
    labels = list(dict.fromkeys(label for errors in results.values() for label in errors))
    figure = Figure(figsize=(4 * len(results), 4.5), layout="constrained")
    axes = figure.subplots(1, len(results), sharey=True)
    for axis, (name, errors) in zip(axes, results.items(), strict=True):
        for label, values in errors.items():
            style = {"color": f"C{labels.index(label)}", "linestyle": "--" if label == "ancestral" else "-"}
            axis.loglog(steps, values, label=f"{label}: {slope(steps, values):.2f}", marker=".", **style)
        for order, values in ((1, errors["tau-leaping"]), (2, errors["trapezoidal"])):
            axis.loglog(steps, [0.7 * values[0] * (steps[0] / n) ** order for n in steps], "k:", linewidth=0.8)
        axis.set_xticks(steps, [str(n) for n in steps], minor=False)
        axis.set_xticks([], minor=True)
        axis.set(title=name, xlabel="steps")
        axis.legend(fontsize=7, title="method: slope", title_fontsize=7, loc="lower left")
    bottom, _ = axes[0].get_ylim()
    axes[0].set(ylabel="total variation from the true law", ylim=(bottom / 10, None))
    figure.suptitle("Error of the samplers, by enumeration; dotted: slope 1 and 2")
    return figure


if __name__ == "__main__":
    main()
