"""The numbers of a run on a board: TensorBoard where it is installed, Weights & Biases where one asks for it.

Both are copies of the log, which remains the record: what goes wrong with a board costs a warning and the board.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["Boards"]

Write = Callable[[int, dict[str, float]], None]


class Boards:
    """Scalars by step, to all boards.

    Args:
        folder: the run's; TensorBoard's files go into its `tensorboard`.
        step: the step the run starts or continues at; what a board holds of later ones is superseded.
        tensorboard: whether to write for TensorBoard, if it is installed.
        wandb: a project of Weights & Biases, or nothing. The login is the one of `wandb login`.
        values: the recipe, for Weights & Biases to show.

    Raises:
        ValueError: a Weights & Biases project is given and the package is not installed.
    """

    def __init__(self, folder: Path, step: int, *, tensorboard: bool, wandb: str, values: dict[str, Any]) -> None:
        self.boards: list[Write] = []
        if tensorboard and (board := _tensorboard(folder / "tensorboard", step)) is not None:
            self.boards.append(board)
        if wandb:
            self.boards.append(_wandb(wandb, folder, values))

    def write(self, kind: str, step: int, **values: object) -> None:
        """Show the numbers among the values, named `kind/name`."""
        scalars = {
            f"{kind}/{name}": float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        for board in list(self.boards):
            try:
                board(step, scalars)
            except Exception as error:  # a full disk, a lost connection: no reason to lose the run
                warnings.warn(f"a board is given up: {error}; training goes on", stacklevel=2)
                self.boards.remove(board)


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


def _wandb(project: str, folder: Path, values: dict[str, Any]) -> Write:
    try:
        import wandb  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise ValueError(f"--wandb {project} needs the package of that name: pip install 'sedd-train[wandb]'") from None
    run = wandb.init(project=project, name=folder.name, dir=str(folder), config=values, resume="allow", id=folder.name)

    def write(step: int, scalars: dict[str, float]) -> None:
        run.log(scalars, step=step)

    return write
