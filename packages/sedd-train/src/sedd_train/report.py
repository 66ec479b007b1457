"""What a run says of itself: a log in JSON lines, and the picture of its loss curve."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Log", "read", "picture"]


class Log:
    """One JSON object a line, written at once: `{"kind": "train", "step": 10, ...}`.

    Args:
        path: the file; what it holds of steps after `step` is removed, so that a resumed run's log has no step twice.
        step: the step the run starts or continues at.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        kept = [line for line in read(path) if line.get("step", 0) <= step] if step else []
        scratch = path.with_suffix(".tmp")
        scratch.write_text("".join(json.dumps(line) + "\n" for line in kept))
        scratch.replace(path)
        self.path, self.failing = path, False

    def write(self, kind: str, **values: Any) -> None:
        """Append a line. A full disk costs the run its log and a warning, not its work."""
        try:
            with self.path.open("a") as file:
                file.write(json.dumps({"kind": kind} | values) + "\n")
            self.failing = False
        except OSError as error:
            if not self.failing:
                warnings.warn(f"{self.path} cannot be written: {error.strerror}; training goes on", stacklevel=2)
            self.failing = True


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; one that a dying process left half-written is passed over."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def picture(log: Path, path: Path, *, title: str, unigram_entropy: float, characters_per_token: float) -> None:
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
    train = [(line["step"], line["loss"]) for line in lines if line["kind"] == "train" and math.isfinite(line["loss"])]
    valid = [
        (line["step"], line["nats_per_token"], line["standard_error"]) for line in lines if line["kind"] == "valid"
    ]
    figure = Figure(figsize=(8, 4.8), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    levels = [unigram_entropy]
    axes.axhline(unigram_entropy, color="0.45", linestyle=(0, (5, 4)), linewidth=1)
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
            f"{bounds[-1]:.3f}", (steps[-1], bounds[-1]), xytext=(0, -13), textcoords="offset points", ha="center",
            color="#c8501e", fontsize=9, annotation_clip=False,
        )  # fmt: skip
        levels += [bounds[-1], min(bounds.max(), 1.15 * unigram_entropy)]
    low, high = min(levels), max(levels)
    axes.set_ylim(low - 0.08 * (high - low) - 0.05, high + 0.05 * (high - low) + 0.05)
    axes.margins(x=0.02)
    axes.annotate(
        "unigram entropy of the held-out tokens", (0.99, unigram_entropy), xycoords=("axes fraction", "data"),
        xytext=(0, -3), textcoords="offset points", ha="right", va="top", color="0.35", fontsize=8.5,
    )  # fmt: skip
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
    if train or valid:
        axes.legend(frameon=False, loc="upper right", fontsize=9)
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
