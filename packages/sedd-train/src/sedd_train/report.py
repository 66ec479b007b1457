"""What a run says of itself: a log in JSON lines, pictures of its loss, and a page with all there is to see."""

from __future__ import annotations

import base64
import json
import math
import os
import platform
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["to_json", "Log", "read", "picture", "levels_of", "levels_picture", "page", "environment"]


def to_json(value: Any, **how: Any) -> str:
    """Strict JSON: a number that is not finite, which JSON cannot write, is null."""

    def strict(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, dict):
            return {key: strict(item) for key, item in value.items()}
        return [strict(item) for item in value] if isinstance(value, list | tuple) else value

    return json.dumps(strict(value), allow_nan=False, **how)


class Log:
    """One JSON object a line, written at once: `{"kind": "train", "step": 10, ...}`; what is not finite is null.

    Args:
        path: the file; what it holds of steps after `step` is removed, so that a resumed run's log has no step twice.
        step: the step the run starts or continues at.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        kept = [line for line in read(path) if line.get("step", 0) <= step] if step else []
        scratch = path.with_suffix(".tmp")
        scratch.write_text("".join(to_json(line) + "\n" for line in kept))
        scratch.replace(path)
        self.path, self.failing = path, False

    def write(self, kind: str, **values: Any) -> None:
        """Append a line. A full disk costs the run its log and a warning, not its work."""
        try:
            with self.path.open("a") as file:
                file.write(to_json({"kind": kind} | values) + "\n")
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
    train = [(line["step"], line["loss"]) for line in lines if line["kind"] == "train" and line["loss"] is not None]
    valid = [
        (line["step"], line["nats_per_token"], line["standard_error"] or 0.0)
        for line in lines
        if line["kind"] == "valid" and line["nats_per_token"] is not None
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


def levels_of(log: Path) -> dict[str, dict[str, Any]]:
    """The measurements by noise level in a log, named by their step, for `levels_picture`."""
    return {f"step {line['step']}": line for line in read(log) if line["kind"] == "levels"}


def levels_picture(levels: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw where in time the held-out loss comes from, at the first, the middle and the last measurement.

    Args:
        levels: measurements by name, each with lists `t`, `nats_per_token` and `standard_error` over the intervals.
        path: the picture, .png or .svg.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.8), layout="constrained", dpi=150)
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
    axes.set_title(f"Where the held-out loss comes from: {sum(final):.3f} nats a token in all", loc="left", fontsize=11)
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)


STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:860px;margin:2em auto;padding:0 1em;color:#222}
img{width:100%}table{border-collapse:collapse;font-size:13px}td,th{padding:.15em 1em .15em 0;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}pre{white-space:pre-wrap;background:#f6f6f4;padding:1em}
h2{margin-top:2em;font-size:1.15em;border-bottom:1px solid #ddd}.bad{color:#a11}"""


def page(run: Path) -> str:
    """A run in one HTML text that needs no other file: results, pictures, samples, recipe and environment.

    Args:
        run: the run's folder, of a run that has ended or is under way.

    Raises:
        ValueError: the folder holds no run.
    """
    lines = read(run / "log.jsonl")
    starts = [line for line in lines if line["kind"] == "start"]
    if not starts or not (run / "recipe.toml").is_file():
        raise ValueError(f"{run} holds no run: expected its recipe.toml and a log.jsonl with a start")
    start = starts[-1]
    measured = [line for line in lines if line["kind"] == "valid"]
    levels = levels_of(run / "log.jsonl")
    trained = [line for line in lines if line["kind"] == "train"]
    skipped = [line for line in lines if line["kind"] == "skipped"]
    parts = [f"<h1>{escape(run.resolve().name)}</h1>", _facts(start, trained, skipped)]
    parts += [
        f"<p class=bad>Stopped: <pre>{escape(line['text'])}</pre>" for line in lines if line["kind"] == "diagnosis"
    ]
    if measured:
        names = ["step", "nats_per_token", "standard_error", "perplexity", "bits_per_character"]
        parts += [
            "<h2>Bound on held-out text</h2>",
            _table(names, [[line[name] for name in names] for line in measured]),
        ]
    with tempfile.TemporaryDirectory() as folder:
        curve, where = Path(folder) / "loss.png", Path(folder) / "levels.png"
        how = {name: start[name] for name in ("unigram_entropy", "characters_per_token")}
        picture(run / "log.jsonl", curve, title="Loss", **how)
        parts += ["<h2>Loss</h2>", _image(curve, "loss by step")]
        if levels:
            levels_picture(levels, where)
            parts += ["<h2>Loss by noise level</h2>", _image(where, "held-out loss by time")]
    if measured:
        parts += ["<h2>Samples</h2>"]
        shown = dict.fromkeys([0, len(measured) // 2, len(measured) - 1])
        parts += [f"<p>Step {measured[i]['step']}<pre>{escape(measured[i]['sample'])}</pre>" for i in shown]
    parts += ["<h2>Recipe</h2>", f"<pre>{escape((run / 'recipe.toml').read_text())}</pre>"]
    environment = [[name, str(value)] for name, value in start["environment"].items()]
    parts += ["<h2>Environment</h2>", _table(["", ""], environment)]
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(run.resolve().name)}</title>"
    return f"{head}<style>{STYLE}</style><body>{''.join(parts)}</body></html>\n"


def _facts(start: dict[str, Any], trained: list[dict[str, Any]], skipped: list[dict[str, Any]]) -> str:
    """What the run is and how far it has come, as a table."""
    facts = [["parameters", f"{start['parameters']:,}"], ["training tokens", f"{start['training_tokens']:,}"]]
    if trained:
        last = trained[-1]
        facts += [["step", f"{last['step']:,} of {start['steps']:,}"]]
        facts += [["tokens a second", f"{last['tokens_per_second']:,}"]]
        facts += [["memory of a rank", f"{last['memory_gb']:.2f} GB at most"]]
        if last.get("mfu") is not None:
            facts += [["share of peak arithmetic (MFU)", f"{last['mfu']:.1%}"]]
    facts += [["steps skipped", str(len(skipped))]]
    return _table(["", ""], facts)


def _table(names: list[str], rows: list[list[Any]]) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"<td class=n>{value:.4f}"
        return f"<td class=n>{value}" if isinstance(value, int) else f"<td>{'–' if value is None else escape(value)}"

    head = f"<tr>{''.join(f'<th>{escape(name)}' for name in names)}" if any(names) else ""
    body = "".join("<tr>" + "".join(map(cell, row)) for row in rows)
    return f"<table>{head}{body}</table>"


def _image(path: Path, description: str) -> str:
    return (
        f'<img alt="{escape(description)}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
    )


def environment(device: str) -> dict[str, str]:
    """What a run runs on: versions, machine, device, and when it began."""
    names = ["sedd-train", "torch", "deepspeed", "transformers", "datasets", "numpy"]
    versions = {name: version(name) for name in names}
    return {
        "began": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(sys.argv),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        "device": device,
        "python": platform.python_version(),
        **versions,
    }


def _smoothed(values: np.ndarray[Any, np.dtype[Any]], share: float = 0.02) -> np.ndarray[Any, np.dtype[Any]]:
    """Exponential moving average over about this share of the curve, without the bias of its start."""
    weight = 1 / max(1.0, share * len(values))
    mean, total, out = 0.0, 0.0, np.empty(len(values))
    for i, value in enumerate(values):
        mean += weight * (value - mean)
        total += weight * (1 - total)
        out[i] = mean / total
    return out
