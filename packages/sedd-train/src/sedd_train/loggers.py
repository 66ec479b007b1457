"""Where the numbers of a run go: its log in JSON lines, TensorBoard where it is installed, Weights & Biases on request.

The log is the record. The others are copies: what goes wrong with one costs a warning and that copy.
"""

from __future__ import annotations

import json
import math
import secrets
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["to_json", "Log", "read", "Loggers"]

Write = Callable[[int, dict[str, float]], None]


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


class Loggers:
    """Scalars by step, to TensorBoard and Weights & Biases.

    Args:
        folder: the run's; TensorBoard's files go into its `tensorboard`.
        step: the step the run starts or continues at; what a copy holds of later ones is superseded.
        tensorboard: whether to write for TensorBoard, if it is installed.
        wandb: a project of Weights & Biases, or nothing. The login is the one of `wandb login`.
        values: the recipe, for Weights & Biases to show.

    Raises:
        ValueError: a Weights & Biases project is given and the package is not installed.
    """

    def __init__(self, folder: Path, step: int, *, tensorboard: bool, wandb: str, values: dict[str, Any]) -> None:
        self.copies: list[Write] = []
        if tensorboard and (copy := _tensorboard(folder / "tensorboard", step)) is not None:
            self.copies.append(copy)
        if wandb:
            self.copies.append(_wandb(wandb, folder, step, values))

    def write(self, kind: str, step: int, **values: object) -> None:
        """Show the numbers among the values, named `kind/name`."""
        scalars = {
            f"{kind}/{name}": float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        for copy in list(self.copies):
            try:
                copy(step, scalars)
            except Exception as error:  # a full disk, a lost connection: no reason to lose the run
                warnings.warn(f"a copy of the log is given up: {error}; training goes on", stacklevel=2)
                self.copies.remove(copy)


def _tensorboard(folder: Path, step: int) -> Write | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    writer: Any = SummaryWriter(str(folder), purge_step=step + 1)

    def write(step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write


def _wandb(project: str, folder: Path, step: int, values: dict[str, Any]) -> Write:
    try:
        import wandb  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise ValueError(f"--wandb {project} needs the package of that name: pip install 'sedd-train[wandb]'") from None
    folder.mkdir(parents=True, exist_ok=True)
    told = folder / "wandb-id"  # a run that goes on is the one it was; another in a folder of that name is not
    if not (step and told.exists()):
        told.write_text(secrets.token_hex(8))
    which: dict[str, Any] = {"id": told.read_text().strip(), "resume": "allow"}
    run = wandb.init(project=project, name=folder.name, dir=str(folder), config=values, **which)

    def write(step: int, scalars: dict[str, float]) -> None:
        run.log(scalars, step=step)

    return write
