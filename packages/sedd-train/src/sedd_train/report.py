"""What a run says of itself: one page with all there is to see."""

from __future__ import annotations

import base64
import math
import os
import platform
import shlex
import sys
import tempfile
import time
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sedd_train import plotting, storage
from sedd_train.loggers import read, to_json

__all__ = ["write", "page", "environment"]


STYLE = """:root{color-scheme:light dark;font:15px/1.5 system-ui,sans-serif}
body{max-width:860px;margin:2em auto;padding:0 1em;overflow-wrap:anywhere}
h1{font-size:1.6em}h2{margin-top:2em;font-size:1.15em;border-bottom:1px solid #8886}
figure{margin:0;overflow-x:auto}img{width:100%;min-width:30rem;background:#fff;border-radius:4px}
div{overflow-x:auto}table{border-collapse:collapse;font-size:13px}
td,th{padding:.15em 1em .15em 0;text-align:left;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
pre{white-space:pre-wrap;background:#8881;padding:1em;font-size:13px}.bad{color:light-dark(#a11,#f88)}"""


def write(run: Path, *, title: str, unigram_entropy: float, characters_per_token: float, steps: int) -> str:
    """Write what a finished run shows: `loss.png`, `levels.png`, `summary.json` and `report.html`.

    Args:
        run: the run's folder, with its log.
        title: above the loss curve.
        unigram_entropy: of the held-out tokens, nats a token.
        characters_per_token: of the held-out text.
        steps: how many were taken.

    Returns:
        The numbers, and where the pictures are, in some lines of text.

    Raises:
        OSError: the folder cannot be written.
    """
    log = run / "log.jsonl"
    last = [line for line in read(log) if line["kind"] == "valid"][-1]
    unigram_bits = unigram_entropy / math.log(2) / characters_per_token
    plotting.loss_curve(
        log,
        run / "loss.png",
        title=title,
        unigram_entropy=unigram_entropy,
        characters_per_token=characters_per_token,
    )
    if levels := plotting.levels_of(log):
        plotting.noise_levels(levels, run / "levels.png")
    names = ("nats_per_token", "perplexity", "bits_per_character", "bits_per_byte")
    measured = {name: last[name] for name in names if name in last}
    summary = {"steps": steps, **measured, "unigram_bits_per_character": unigram_bits}
    storage.write_text(run / "summary.json", to_json(summary, indent=1))
    (run / "report.html").write_text(page(run), encoding="utf-8")
    return (
        f"\nheld-out bound          {last['bits_per_character']:.3f} bits a character  "
        f"({last['nats_per_token']:.3f} nats a token, perplexity {last['perplexity']:.1f})\n"
        f"unigram entropy         {unigram_bits:.3f} bits a character  ({unigram_entropy:.3f} nats a token)\n"
        f"loss curve              {run / 'loss.png'}\n"
        f"report                  {run / 'report.html'}"
    )


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
    levels = plotting.levels_of(run / "log.jsonl")
    trained = [line for line in lines if line["kind"] == "train"]
    skipped = [line for line in lines if line["kind"] == "skipped"]
    step = max((line["step"] for line in trained + measured), default=0)  # the log does not tell of every step
    parts = [f"<h1>{escape(run.resolve().name)}</h1>", _facts(start, step, trained, skipped)]
    parts += [
        f"<p class=bad>Stopped: <pre>{escape(line['text'])}</pre>" for line in lines if line["kind"] == "diagnosis"
    ]
    if measured:
        names = ["step", "nats_per_token", "standard_error", "perplexity", "bits_per_character", "bits_per_byte"]
        parts += [
            "<h2>Bound on held-out text</h2>",
            _table(
                [name.replace("_", " ") for name in names], [[line.get(name) for name in names] for line in measured]
            ),
        ]
    with tempfile.TemporaryDirectory() as folder:
        curve, where = Path(folder) / "loss.png", Path(folder) / "levels.png"
        how = {name: start[name] for name in ("unigram_entropy", "characters_per_token")}
        plotting.loss_curve(run / "log.jsonl", curve, title="Loss", **how)
        parts += ["<h2>Loss</h2>", _image(curve, "loss by step")]
        if levels:
            plotting.noise_levels(levels, where)
            parts += ["<h2>Loss by noise level</h2>", _image(where, "held-out loss by time")]
    if measured:
        parts += ["<h2>Samples</h2>"]
        shown = dict.fromkeys([0, len(measured) // 2, len(measured) - 1])
        parts += [f"<p>Step {measured[i]['step']}<pre>{escape(measured[i]['sample'])}</pre>" for i in shown]
    parts += ["<h2>Recipe</h2>", f"<pre>{escape((run / 'recipe.toml').read_text())}</pre>"]
    environment = [[name, str(value)] for name, value in start["environment"].items()]
    parts += ["<h2>Environment</h2>", _table(["", ""], environment)]
    head = "<!doctype html><html lang=en><meta charset=utf-8>"
    head += '<meta name=viewport content="width=device-width,initial-scale=1">'
    head += f"<title>{escape(run.resolve().name)}</title><style>{STYLE}</style>"
    return f"{head}<body>{''.join(parts)}</body></html>\n"


def _facts(start: dict[str, Any], step: int, trained: list[dict[str, Any]], skipped: list[dict[str, Any]]) -> str:
    """What the run is and how far it has come, as a table."""
    facts = [["parameters", f"{start['parameters']:,}"], ["training tokens", f"{start['training_tokens']:,}"]]
    if trained:
        last = trained[-1]
        facts += [["step", f"{step:,} of {start['steps']:,}"]]
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

    number = [all(isinstance(row[i], int | float | None) for row in rows) for i in range(len(names))]
    heads = [f"<th{' class=n' * right}>{escape(name)}" for name, right in zip(names, number, strict=True)]
    head = f"<tr>{''.join(heads)}" if any(names) else ""
    body = "".join("<tr>" + "".join(map(cell, row)) for row in rows)
    return f"<div><table>{head}{body}</table></div>" if any(names) else f"<table>{body}</table>"


def _image(path: Path, description: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img alt="{escape(description)}" src="data:image/png;base64,{data}"></figure>'


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
