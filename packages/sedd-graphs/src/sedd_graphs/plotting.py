"""Pictures of what noise does: to a sentence, to a distribution, and the schedules side by side.

Needs matplotlib (`pip install sedd-graphs[plotting]`). Every function returns a matplotlib `Figure`, which belongs
to no window and to no global state: `figure.savefig("noise.png")`.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Generator, Tensor

from sedd_graphs.graph import Graph
from sedd_graphs.learned import Learned
from sedd_graphs.noise import Noise

__all__ = ["draw_sentence", "draw_distribution", "draw_schedules"]


def draw_sentence(
    graph: Graph,
    noise: Noise | Learned,
    x0: Tensor,
    words: Sequence[str],
    *,
    steps: int = 8,
    generator: Generator | None = None,
) -> Figure:
    """One path of the forward process: the sentence at t = 0 (clean), 1 / steps, ..., 1, from top to bottom.

    Unchanged words are black, replaced ones red, and masks grey boxes. The lines are states of one chain, not separate
    draws: a masked word stays masked.

    Args:
        graph: how tokens move.
        noise: how fast.
        x0: (L,) int64, the sentence.
        words: how each of the graph's N states is written.
        steps: lines below the clean one.
        generator: source of randomness.

    Raises:
        ValueError: x0 has not one axis, or there is not one word a state.
    """
    if x0.dim() != 1:
        raise ValueError(f"x0 must be one sentence of shape (L,), got {tuple(x0.shape)}")
    if len(words) != graph.num_states:
        raise ValueError(f"words must name each of the graph's {graph.num_states} states, got {len(words)}")
    t, path = _path(graph, noise, x0, steps, generator)
    widths = torch.tensor([max(len(words[y]) for y in at.tolist()) + 1.5 for at in path.T])
    left = torch.cat([torch.zeros(1), widths.cumsum(0)])
    figure = Figure(figsize=(0.11 * float(left[-1]) + 1, 0.3 * len(path) + 0.4), layout="constrained")
    axes = figure.add_subplot(xlim=(0, float(left[-1])), ylim=(len(path) - 0.5, -0.5), ylabel="t")
    axes.set_xticks([])
    axes.set_yticks(range(len(path)), [f"{time:.2f}" for time in t.tolist()])
    for line, states in enumerate(path.tolist()):
        for position, state in enumerate(states):
            color = "black" if state == int(x0[position]) else "tab:red"
            box = None
            if state == graph.mask_id:
                color, box = "tab:gray", {"facecolor": "0.9", "edgecolor": "none", "pad": 1.5}
            where = float(left[position]) + 0.75, line
            axes.text(*where, words[state], color=color, bbox=box, va="center", family="monospace", size=8)
    return figure


def draw_distribution(graph: Graph, noise: Noise | Learned, p0: Tensor, *, steps: int = 200) -> Figure:
    """The distribution over states as time goes on: exp(sigma(t) Q) p0, states upwards, time to the right.

    Colours are logarithmic, from 1 down to a hundredth of what each state would have if all were equal: one sees both
    where a token is sure and where it may be anything.

    Args:
        graph: how states move.
        noise: how fast.
        p0: (N,) float, the distribution of clean tokens.
        steps: columns of the picture.

    Raises:
        ValueError: p0 has not one entry a state.
    """
    t = torch.linspace(0, 1, steps, dtype=torch.float64)
    sigma = noise(t)[0].detach()
    p = graph.propagate(p0.double().expand(steps, -1), sigma)
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="t", ylabel="state", title=textwrap.fill(repr(graph), 60))
    dark = matplotlib.colormaps["viridis"].with_extremes(bad=matplotlib.colormaps["viridis"](0))  # no log of 0
    image = axes.imshow(
        p.T.numpy(force=True),
        cmap=dark,
        norm=LogNorm(vmin=0.01 / graph.num_states, vmax=1),
        origin="lower",
        aspect="auto",
        extent=(0, 1, -0.5, graph.num_states - 0.5),
    )
    figure.colorbar(image, label="probability", extend="min")
    return figure


def draw_schedules(schedules: Mapping[str, Noise | Learned], *, steps: int = 400) -> Figure:
    """Schedules side by side: total noise, its rate, and the share 1 - e^-sigma of tokens that absorbing noise masks.

    Args:
        schedules: the schedules by the names that the legend gives them.
        steps: times at which they are evaluated, from 1 / steps to 1.

    Raises:
        ValueError: there is none.
    """
    if not schedules:
        raise ValueError("schedules must name at least one schedule, got none")
    t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    total = figure.add_subplot(131, xlabel="t", yscale="log", title="total noise sigma")
    rate = figure.add_subplot(132, xlabel="t", yscale="log", title="rate dsigma/dt")
    masked = figure.add_subplot(133, xlabel="t", title="1 - exp(-sigma)")
    styles = itertools.cycle(("-", "--", ":", "-."))  # so that one sees curves that lie on each other
    for (name, noise), style in zip(schedules.items(), styles, strict=False):
        sigma, dsigma = (values.detach() for values in noise(t))
        for axes, values in [(total, sigma), (rate, dsigma), (masked, -(-sigma).expm1())]:
            axes.plot(t.numpy(), values.numpy(), style, label=name)
    figure.legend(*masked.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _path(
    graph: Graph, noise: Noise | Learned, x0: Tensor, steps: int, generator: Generator | None
) -> tuple[Tensor, Tensor]:
    """Times (steps + 1,) and the states of one chain at them, (steps + 1, L); the first is x0 itself."""
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    sigma = noise(t)[0].detach()
    path, before = [x0], torch.zeros_like(sigma[0])
    for level in sigma[1:]:  # the noise sigma(0) of schedules that begin with some is part of the first step
        path.append(graph.sample(path[-1], level - before, generator=generator))
        before = level
    return t, torch.stack(path)
