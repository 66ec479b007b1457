"""What the scripts that fill a table share: results kept as they come, numbers with errors, Markdown, a picture."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sedd_train import storage
from sedd_train.loggers import to_json

__all__ = ["Results", "mean_and_error", "with_error", "fingerprint", "markdown", "panels", "save_picture"]


class Results:
    """The cells of a table in a JSON file that is replaced whole at every `save`: a run that was cut off continues.

    Args:
        path: the file; what it holds is read.

    Raises:
        ValueError: the file cannot be written, or is there and holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        storage.check_output(path)
        self.commands: list[str] = []
        self.settings: dict[str, Any] = {}
        self.cells: dict[str, dict[str, Any]] = {}
        if path.exists():
            try:
                held = json.loads(path.read_text(encoding="utf-8"))
                self.settings, self.cells = held["settings"], held["cells"]
                self.commands = held.get("commands", [])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} holds no results of this script; give another --output") from error

    def agree(self, name: str, value: Any) -> None:
        """Note a setting, which must be the same in every run that adds to the file.

        Raises:
            ValueError: it was another one.
        """
        value = json.loads(to_json(value))
        if self.settings.setdefault(name, value) != value:
            raise ValueError(
                f"{self.path} holds results with {name} = {self.settings[name]}, and this run has {value}: they do not "
                "belong into one table; give another --output, or remove the file"
            )

    def made_by(self, script: str, argv: Sequence[str]) -> None:
        """Note a command that adds to the file."""
        command = f"python integration/{script} {shlex.join(argv)}"
        if command not in self.commands:
            self.commands.append(command)

    def save(self) -> None:
        """Write the file anew."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(".tmp")
        lines = ",\n".join(f"{to_json(key)}: {to_json(cell)}" for key, cell in self.cells.items())
        made = f'"commands": {to_json(self.commands, indent=1)},\n"settings": {to_json(self.settings, indent=1)}'
        text = f'{{{made},\n"cells": {{\n{lines}\n}}}}\n'
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(self.path)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error over independent values: NaN for a single one."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def with_error(mean: float, error: float, digits: int | None = None) -> str:
    """A number and its standard error: "12.3 ± 0.4", to two figures of the error unless digits are given."""
    if digits is None:
        digits = max(0, 1 - math.floor(math.log10(error))) if math.isfinite(error) and error > 0 else 2
    return f"{mean:.{digits}f} ± {error:.{digits}f}" if math.isfinite(error) else f"{mean:.{digits}f}"


def fingerprint(x: Tensor) -> str:
    """Of the numbers and the shape of a tensor on the CPU: names the text that was measured."""
    return hashlib.sha256(f"{tuple(x.shape)} {x.dtype}".encode() + x.contiguous().numpy().tobytes()).hexdigest()[:16]


def markdown(names: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the first column is text, the others are aligned to the right."""
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *rows]
    return "".join(f"| {' | '.join(str(cell) for cell in line)} |\n" for line in lines)


def panels(count: int, *, width: float = 5.2, height: float = 4.0) -> tuple[Any, list[Any]]:
    """A figure with so many empty panels side by side, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    every = list(figure.subplots(1, count, squeeze=False)[0])
    for axes in every:
        axes.grid(color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, every


def save_picture(figure: Any, path: Path) -> None:
    """Write the figure as .png, without the date or version that would make equal pictures differ."""
    figure.savefig(path, metadata={"Software": None})
