"""What follows from the numbers of a training step, once they can be read.

On a CPU they are there with the step. On an accelerator to read them is to wait for it, so that they are read one step
late: when the next step's gradient is on its way, and the weights are still those that the step left. All that follows
is then the same as at once: the moving average, the log, what is said of a step that is not finite, and the end of a
run of which there were too many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from sedd_train import nonfinite
from sedd_train.ema import EMA
from sedd_train.engine import Batch, Launched
from sedd_train.loading import Batches
from sedd_train.progress import Progress, tell_scale, tell_skipped
from sedd_train.recipes import Recipe

__all__ = ["TrainingError", "Open", "Account"]


class TrainingError(RuntimeError):
    """A run ended before its last step; the message says why, and what is left."""


class Open(NamedTuple):
    """A step that was launched, and what it was launched with."""

    step: int
    launched: Launched
    micro_batches: list[Batch]
    lr: float


@dataclass
class Account:
    """The steps of a run, each settled once its numbers are read.

    Args:
        engine: what takes them.
        ema: its moving average.
        progress: where they are told.
        recipe: the run's numbers.
        batches: where their data come from.

    Attributes:
        open: the step that is not settled yet.
        skipped: how many in a row were not applied.
        stop: whether any rank was asked to stop, by what is settled.
    """

    engine: Any
    ema: EMA
    progress: Progress
    recipe: Recipe
    batches: Batches
    open: Open | None = None
    skipped: int = 0
    stop: bool = False

    def settle(self) -> None:
        """Read the open step, if there is one, and draw the consequences. Collective.

        Raises:
            TrainingError: it is one of too many that are not finite.
        """
        if self.open is None:
            return
        (step, launched, micro_batches, lr), self.open = self.open, None
        recipe, batches, done = self.recipe, self.batches, launched.read()
        if done.applied:
            self.ema.update()
        self.progress.step_taken(step, done, lr, done.loss * recipe.batch_size / batches.text_tokens(step))
        self.stop = done.stop
        self.skipped = 0 if done.applied or done.forgiven else self.skipped + 1
        if done.forgiven:
            tell_scale(self.progress, step, done)
        elif not done.applied:
            tell_skipped(self.progress, step, done, batches, self.skipped)
        if self.skipped >= recipe.max_skipped:
            diagnosis = nonfinite.diagnose(self.engine, micro_batches, batches.samples(step))
            self.progress.write("diagnosis", copy=False, step=step + 1, text=diagnosis)
            raise TrainingError(
                f"{self.skipped} steps in a row had a loss or gradient that is not finite: training stops, and the "
                "weights are as they were before them. Try a lower --learning-rate than "
                f"{recipe.learning_rate}, or --precision fp32.\n{diagnosis}"
            )
