"""What a run tells while it trains: the bar, the log and its copies. Rank 0 speaks; the other ranks keep silent."""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
import time
import warnings
from collections import deque
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from sedd_train import distributed, flops, nonfinite, provenance, randomness, report
from sedd_train.checkpoint import Checkpoint
from sedd_train.distributed import say
from sedd_train.engine import Step
from sedd_train.evaluation import Evaluation, by_noise_level, measure
from sedd_train.loading import Batches
from sedd_train.loggers import Log, Loggers
from sedd_train.objectives import Objective, ScoreEntropy
from sedd_train.recipes import Recipe
from sedd_train.token_cache import Corpus
from sedd_train.tokenizers import num_tokens
from sedd_train.tokens import unigram_entropy

__all__ = ["Progress", "introduce", "tell_scale", "tell_skipped", "measure_and_sample"]


class Progress:
    """The bar and the log of a run.

    Args:
        output: the run's folder.
        recipe: its numbers.
        first: the step it starts or continues at.
        flops_a_token: floating-point operations that a token costs in training, 0 where that is not known.
        peak: FLOP/s that one device can do at best, None where that is not known.
        tensorboard: see `Loggers`.
        wandb: see `Loggers`.
    """

    def __init__(
        self,
        output: Path,
        recipe: Recipe,
        *,
        first: int,
        flops_a_token: float,
        peak: float | None,
        tensorboard: bool,
        wandb: str,
    ) -> None:
        rank, world_size = distributed.place()
        self.output, self.steps, self.log_every = output, recipe.steps, recipe.log_every
        self.tokens_a_step = recipe.batch_size * recipe.length
        self.peak_share = self.tokens_a_step * flops_a_token / world_size / peak if peak else 0.0  # seconds at the peak
        self.log = self.copies = None
        if rank == 0:
            self.log = Log(output / "log.jsonl", first)
            values = dataclasses.asdict(recipe)
            self.copies = Loggers(output, first, tensorboard=tensorboard, wandb=wandb, values=values)
        calm = 0.5 if sys.stderr.isatty() else 30.0  # seconds between redrawings of the bar; a file gets few
        self.bar = tqdm(
            total=recipe.steps, initial=first, unit="step", disable=rank != 0, smoothing=0.05, mininterval=calm
        )
        self.seconds = math.nan  # smoothed
        self.recent: deque[float] = deque(maxlen=20)  # what the last steps took
        self.restart_clock()

    def write(self, kind: str, *, copy: bool = True, **values: Any) -> None:
        """Put something into the log and, unless told otherwise, its copies."""
        if self.log is not None and self.copies is not None:
            self.log.write(kind, **values)
            if copy:
                self.copies.write(kind, **values)

    def restart_clock(self) -> None:
        """A step begins now: what came before it, such as measuring and saving, is not counted."""
        self.clock = self.asked = time.perf_counter()
        self.waited = 0.0

    def data_asked(self) -> None:
        """All that can be done without the next step's data is done."""
        self.asked = time.perf_counter()

    def data_arrived(self) -> None:
        """They are there: what passed since they were asked for was spent waiting for them."""
        self.waited += time.perf_counter() - self.asked

    def step_taken(self, step: int, done: Step, lr: float, loss: float) -> None:
        """Move the bar by a step, whose loss is in nats a token of text, and log it if its turn has come.

        It is told when its numbers are there: from one step's to the next one's is what a step takes. On a GPU, whose
        host runs ahead, one alone may seem to have taken next to nothing: the speed is that of the median of twenty.
        """
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        waited, self.waited = self.waited, 0.0
        self.seconds = seconds if math.isnan(self.seconds) else 0.95 * self.seconds + 0.05 * seconds
        self.recent.append(seconds)
        typical = statistics.median(self.recent)
        used = self.peak_share / typical if self.peak_share else None
        self.bar.set_postfix_str(
            f"loss {loss:.3f} nats a token, {self.tokens_a_step / typical:,.0f} tokens/s"
            + (f", MFU {used:.0%}" if used is not None else ""),
            refresh=False,
        )
        self.bar.update()
        if step % self.log_every == 0 or not done.applied:
            self.write(
                "train",
                step=step + 1,
                loss=loss,
                grad_norm=done.grad_norm,
                lr=lr,
                tokens_per_second=round(self.tokens_a_step / typical),
                mfu=used,
                waited_for_data=waited / seconds,
                memory_gb=flops.memory() / 1e9,
                eta_seconds=round(self.seconds * (self.steps - step - 1)),
            )

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()


def introduce(
    progress: Progress,
    recipe: Recipe,
    batches: Batches,
    text: Corpus,
    parameters: int,
    saved: Checkpoint | None,
    device: torch.device,
) -> None:
    """Say what is trained on what."""
    on_gpu = device.type == "cuda"
    progress.write(
        "start",
        copy=False,
        step=saved.step if saved else 0,
        steps=recipe.steps,
        parameters=parameters,
        training_tokens=len(text.train),
        unigram_entropy=unigram_entropy(text.valid.flat),
        characters_per_token=text.valid.characters_per_token,
        environment=report.environment(
            f"{batches.world_size} x {torch.cuda.get_device_name() if on_gpu else device.type}"
        ),
    )
    if text.parts:
        say(provenance.summary(text.parts, progress.output))
    epochs = recipe.steps * recipe.batch_size / batches.available
    say(
        f"{parameters / 1e6:.1f} M parameters, {len(text.train) / 1e6:.1f} M training tokens in {batches.available} "
        f"blocks of {recipe.length}, {_held_out(text)}, vocabulary of {num_tokens(text.tokenizer)}\n"
        f"{recipe.steps} steps of {recipe.batch_size * recipe.length} tokens ({epochs:.2g} epochs) on "
        f"{batches.world_size} x {device.type}, {_sharing(recipe, batches.world_size)}, {recipe.precision}"
        + (f"; continuing at step {saved.step}" if saved else "")
    )
    if recipe.precision == "bf16" and flops.emulates_bf16():
        say(
            "this CPU has no instructions for bfloat16 and takes many times as long in it: --precision fp32 is faster "
            "here"
        )


def _sharing(recipe: Recipe, world_size: int) -> str:
    """The ZeRO stage, and why it is not the recipe's."""
    stage = recipe.stage(world_size)
    return f"ZeRO {stage}" if stage == recipe.zero_stage else "without ZeRO (one rank has nobody to share with)"


def _held_out(text: Corpus) -> str:
    """How much text is watched, and where it comes from."""
    watched, trained = len(text.valid), len(text.train)
    own = any(part.split in ("validation", "test") for part in text.parts)
    whence = "" if own or not text.parts else ", a part of the files to train on: --valid names others"
    return f"{watched:,} tokens held out ({watched / (watched + trained):.1%} of all{whence})"


def tell_scale(progress: Progress, step: int, done: Step) -> None:
    """Say that float16 could not hold a step's gradient."""
    say(f"step {step + 1} left out: float16 does not hold its gradient; the loss's scale is {done.scale / 2:g} now")
    progress.write("scale", copy=False, step=step + 1, scale=done.scale / 2)


def tell_skipped(progress: Progress, step: int, done: Step, batches: Batches, in_a_row: int) -> None:
    """Say which samples spoilt a step. Collective."""
    size = batches.recipe.batch_size
    bad = nonfinite.not_finite(done.losses, batches.samples(step))
    say(
        f"step {step + 1} skipped, {in_a_row} in a row: loss {done.loss * size / batches.text_tokens(step):.4g}, "
        f"gradient norm {done.grad_norm:.4g}; {len(bad)} of {size} samples have a loss that is not finite"
    )
    at_fault = bad or list(range(step * size, (step + 1) * size))
    progress.write(
        "skipped",
        copy=False,
        step=step + 1,
        loss=done.loss * size / batches.text_tokens(step),
        grad_norm=done.grad_norm,
        samples=at_fault,
        starts=batches.where(at_fault),
    )


def measure_and_sample(
    averaged: nn.Module,
    objective: Objective,
    text: Corpus,
    recipe: Recipe,
    step: int,
    progress: Progress,
    device: torch.device,
) -> Evaluation:
    """The bound of averaged weights on held-out text, where in time it comes from, and a sample. Collective.

    Raises:
        ValueError: on every rank, if the bound is NaN on one of them.
    """
    end = None if recipe.packing else text.tokenizer.eos_token_id
    valid, lengths = text.valid.first(recipe.evaluate_blocks, recipe.length, end)
    told, levels = text.valid.first_labels(recipe.evaluate_blocks), None
    found = measure(
        averaged,
        objective,
        valid,
        lengths=lengths,
        labels=told,
        characters_per_token=text.valid.characters_per_token,
        num_times=recipe.evaluate_times,
        seed=recipe.seed,
    )
    if isinstance(objective, ScoreEntropy):
        levels = by_noise_level(
            *(averaged, objective.graph, objective.noise, valid),
            lengths=lengths,
            labels=told,
            t_min=recipe.t_min,
            seed=recipe.seed,
        )
    if distributed.place()[0] != 0:
        return found
    if levels is not None:
        values = {name: value.tolist() for name, value in vars(levels).items()}
        progress.write("levels", copy=False, step=step, **values)
    random = randomness.generator(recipe.seed, randomness.SAMPLING, step, device=device)
    length = recipe.length if lengths is None else int(lengths[step % len(lengths)])  # of some held-out row
    how = dict[str, Any](steps=recipe.sample_steps, generator=random, device=device)
    try:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "at sigma = ")  # of a young network: its scores fit no data yet
            sample = text.tokenizer.decode(objective.sample(averaged, (1, length), **how)[0].tolist())
    except ValueError as error:  # of a young network, on a graph on which steps may overflow: no reason to stop
        sample = f"(no sample: {error})"
    bits_per_byte = found.bits_per_character / text.valid.bytes_per_character
    progress.write(
        "valid",
        step=step,
        nats_per_token=found.nats_per_token,
        standard_error=found.standard_error,
        perplexity=found.perplexity,
        bits_per_character=found.bits_per_character,
        bits_per_byte=bits_per_byte,
        sample=sample,
    )
    say(
        f"\nstep {step}: held-out bound {found.nats_per_token:.3f} ± {found.standard_error:.3f} nats a token, "
        f"perplexity {found.perplexity:.1f}, {found.bits_per_character:.3f} bits a character, "
        f"{bits_per_byte:.3f} a byte\n{sample}\n"
    )
    return found
