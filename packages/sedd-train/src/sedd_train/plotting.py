"""Pictures of a run: its loss curve, and where in time the held-out loss comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sedd_train.loggers import read

__all__ = ["loss_curve", "levels_of", "noise_levels"]


def loss_curve(log: Path, path: Path, *, title: str, unigram_entropy: float, characters_per_token: float) -> None:
    """Draw the loss curve of a log.

    Args:
        log: the JSON lines.
        path: the picture, .png or .svg.
        title: above it.
        unigram_entropy: of the held-out tokens, nats a token; the line a model has to fall below.
        characters_per_token: for the axis in bits a character.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read(log)
    train = [(line["step"], line["loss"]) for line in lines if line["kind"] == "train" and line["loss"] is not None]
    valid = [
        (line["step"], line["nats_per_token"], line["standard_error"] or 0.0)
        for line in lines
        if line["kind"] == "valid" and line["nats_per_token"] is not None
    ]
    figure = Figure(figsize=(7, 4.8), layout="constrained", dpi=170)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    levels = [unigram_entropy]
    dashes: dict[str, Any] = {"color": "0.45", "linestyle": (0, (5, 4)), "linewidth": 1}
    axes.axhline(unigram_entropy, label="unigram entropy of held-out tokens", **dashes)
    if train:
        steps, losses = np.array(train).T
        smooth = _smoothed(losses)
        axes.plot(steps, losses, color="#9db7d5", linewidth=0.7, label="training loss of a step")
        axes.plot(steps, smooth, color="#1f4e8c", linewidth=1.8, label="training loss, smoothed")
        levels += [*np.percentile(losses, [0, 98]), smooth[-1]]
    if valid:
        steps, bounds, errors = np.array(valid).T
        style: dict[str, Any] = {
            "color": "#c8501e",
            "marker": "o",
            "markersize": 4.5,
            "linewidth": 1.4,
            "capsize": 2.5,
            "zorder": 5,
        }
        axes.errorbar(steps, bounds, yerr=errors, label="held-out bound, averaged weights", **style)
        axes.annotate(
            f"{bounds[-1]:.3f}", (steps[-1], bounds[-1]), xytext=(0, -15), textcoords="offset points", ha="right",
            color="#c8501e", fontsize=9, annotation_clip=False,
        )  # fmt: skip
        levels += [bounds[-1], min(bounds.max(), 1.15 * unigram_entropy)]
    low, high = min(levels), max(levels)
    axes.set_ylim(low - 0.08 * (high - low) - 0.05, high + 0.05 * (high - low) + 0.05)
    axes.margins(x=0.02)
    axes.set(xlabel="step", ylabel="nats a token")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    scale = 1 / math.log(2) / characters_per_token

    def scaled(y: Any) -> Any:
        return y * scale

    def unscaled(y: Any) -> Any:
        return y / scale

    bits = axes.secondary_yaxis("right", functions=(scaled, unscaled))
    bits.set_ylabel("bits a character")
    bits.spines["right"].set_color("0.7")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)  # where it can cover nothing
    figure.savefig(path)


def levels_of(log: Path) -> dict[str, dict[str, Any]]:
    """The measurements by noise level in a log, named by their step, for `noise_levels`."""
    return {f"step {line['step']}": line for line in read(log) if line["kind"] == "levels"}


def noise_levels(levels: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw where in time the held-out loss comes from, at the first, the middle and the last measurement.

    Args:
        levels: measurements by name, each with lists `t`, `nats_per_token` and `standard_error` over the intervals.
        path: the picture, .png or .svg.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.8), layout="constrained", dpi=170)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names, last = list(levels), len(levels) - 1
    chosen = sorted({0, last // 2, last})
    colors = ["#b9c9dd", "#6d93c1", "#c8501e"][-len(chosen) :]
    for index, color in zip(chosen, colors, strict=True):
        line = levels[names[index]]
        axes.errorbar(
            line["t"], line["nats_per_token"], yerr=[error or 0.0 for error in line["standard_error"]], color=color,
            marker="o", markersize=3.5, linewidth=1.4, capsize=2.5, label=names[index], zorder=3 + index,
        )  # fmt: skip
    final = levels[names[last]]["nats_per_token"]
    axes.set(xlabel="time t, from clean to noise", ylabel=f"nats a token in each of {len(final)} intervals")
    axes.set_title(f"Where the held-out loss comes from: {sum(final):.3f} nats a token in all", loc="left", fontsize=10)
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path)


def _smoothed(values: np.ndarray[Any, np.dtype[Any]], share: float = 0.02) -> np.ndarray[Any, np.dtype[Any]]:
    """Exponential moving average over about this share of the curve, without the bias of its start."""
    weight = 1 / max(1.0, share * len(values))
    mean, total, out = 0.0, 0.0, np.empty(len(values))
    for i, value in enumerate(values):
        mean += weight * (value - mean)
        total += weight * (1 - total)
        out[i] = mean / total
    return out
