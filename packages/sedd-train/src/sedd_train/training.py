"""The training loop: from a recipe to a trained model, on this process or on as many as a launcher started.

    for each step:  x0, t, x_t -> loss -> gradient -> AdamW or Muon -> moving average
    now and then:   the bound of the averaged weights on held-out text, a sample, a checkpoint

Corpus, tokenizer, network and objective are those that the recipe names, or one's own.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sedd_train import (
    checkpoint,
    distributed,
    finetuning,
    flops,
    labels,
    pretrained,
    provenance,
    randomness,
    recipes,
    report,
    starting,
    storage,
)
from sedd_train.checkpoint import CheckpointError
from sedd_train.corpora import Texts
from sedd_train.distributed import say
from sedd_train.ema import EMA
from sedd_train.engine import Loss, compile_network, launch_step, learning_rate, start_engine
from sedd_train.evaluation import Evaluation
from sedd_train.launchers import Preemption
from sedd_train.loading import Batches, ahead
from sedd_train.objectives import Objective, has_head
from sedd_train.progress import Progress, introduce, measure_and_sample
from sedd_train.recipes import Recipe
from sedd_train.settling import Account, Open, TrainingError
from sedd_train.token_cache import Corpus
from sedd_train.tokenizers import num_tokens
from sedd_train.tokens import unigram_entropy

__all__ = ["train", "Result", "SetupError"]


class SetupError(ValueError):
    """Something about the run is wrong, and the message says what to do; nothing has been trained or overwritten."""


@dataclass(frozen=True)
class Result:
    """What came of a run.

    Attributes:
        output: its folder.
        step: how many steps have been taken.
        stopped: whether a signal asked it to save and leave before the last one.
        measured: the averaged weights on held-out text as they were measured last; None if they were not.
    """

    output: Path
    step: int
    stopped: bool
    measured: Evaluation | None


def train(
    recipe: Recipe | str | Path,
    *,
    output: str | Path,
    corpus: Texts | str | None = None,
    tokenizer: Any = None,
    net: nn.Module | None = None,
    objective: Objective | None = None,
    graph: Any = None,
    noise: Any = None,
    init: str | Path | None = None,
    resume: bool | Literal["auto"] = False,
    cache: str | Path = "runs/cache",
    tensorboard: bool = True,
    wandb: str = "",
    peak_tflops: float = 0.0,
) -> Result:
    """Train a model and leave it, its checkpoints, log and report in a folder.

    Where a launcher started several processes each of them calls this, with the same arguments.

    Args:
        recipe: the numbers of the run, by a name of the package, the path of a TOML file, or as they are.
        output: the folder of the run.
        corpus: what to train on, in place of the recipe's: a name, or documents of your own.
        tokenizer: one of transformers' fast tokenizers, or a name, in place of the recipe's.
        net: the network to train, in place of a fresh one of the recipe's sizes: any module that, called with states
            (B, L) int64 and total noise (B,), gives log-scores (B, L, N); or whatever the objective asks for.
        objective: what to train for, in place of the recipe's; see `sedd_train.objectives.Objective`.
        graph: the forward process, in place of the recipe's: any of sedd_graphs, or one's own.
        noise: its schedule, the same.
        init: the checkpoint to begin from, in place of the recipe's `init`: a run, a folder, or a name on the hub. The
            network, its sizes, graph, schedule and tokenizer are the checkpoint's, whatever the recipe says.
        resume: whether to continue the run in the folder from its last checkpoint; "auto": if it has one.
        cache: the folder of tokenised text, which runs share.
        tensorboard: whether to write the log's numbers for TensorBoard, too, if it is installed.
        wandb: a project of Weights & Biases to send them to, or nothing.
        peak_tflops: what one device can do at best, 10^12 operations a second; 0 for what is known of GPUs.

    Raises:
        SetupError: before anything is trained or written: a value makes no sense, the text cannot be had, the network
            does not fit, the disk is too small, there is no run to continue or one that would be overwritten.
        TrainingError: the run cannot go on: step after step is not finite, or a checkpoint could not be written.
    """
    output = Path(output)
    with ExitStack() as held, Preemption() as preemption:
        with _setup_errors():
            rank, world_size = distributed.place()
            goes_on = checkpoint.exist(output / "checkpoints") if resume == "auto" else resume
            recipe = starting.recipe_of(recipe, corpus, tokenizer, graph, noise, init)
            start = None
            if recipe.init:
                given = {"tokenizer": tokenizer, "graph": graph, "noise": noise}
                start = finetuning.begin(recipe, output, **given, resume=goes_on)
                recipe, tokenizer = finetuning.adopted(recipe, start), start.tokenizer
            recipes.check_run(recipe, output, resume=goes_on)
            recipe.micro_batches(world_size)
            starting.check_own(net, recipe)
            starting.check_loggers(wandb, peak_tflops)
            text = provenance.text_of(recipe, corpus, tokenizer, Path(cache), stop=lambda: preemption.heard)
            recipe = provenance.pinned(recipe, text)
            text.check_length(recipe.length, packing=recipe.packing)
            own_net = net is not None
            if start is None:
                graph = graph or pretrained.make_graph(recipe.graph, text.tokenizer)
                noise = noise or pretrained.make_schedule(recipe)
                pretrained.check_states(graph, text.tokenizer)
            if objective is None:
                objective, sections = starting.objective_of(recipe, graph, noise, start)
            else:
                sections = {"tokens": num_tokens(text.tokenizer), "objective": {"type": type(objective).__qualname__}}
            if not recipe.packing:
                sections["lengths"] = text.train.law_of_lengths(recipe.length)
            if net is None and start is not None:
                net = finetuning.prepared(start.net, recipe)
            elif net is None:
                net = starting.new_net(recipe, graph.num_states, text, fresh=not goes_on)
            if text.labels or recipe.label_column:
                text, labelled = labels.conditioned(net, text, recipe)
                sections |= labelled
            end = None if recipe.packing else text.tokenizer.eos_token_id  # what rows are filled up with
            batches = Batches(text.train, recipe, objective, rank, world_size, end)
            if start is not None and not goes_on:
                finetuning.fit_frequencies(net, objective, batches)
            if own_net:
                starting.check_net(net, objective, batches)
            parameters = sum(p.numel() for p in net.parameters())
            checkpoint.check_space(output / "checkpoints", parameters, recipe.keep)
            if rank == 0:
                held.enter_context(storage.owned(output))
            saved = provenance.saved(output, text) if goes_on else None
            averaged = copy.deepcopy(net).eval().requires_grad_(False)  # holds the average, to measure and to sample
            starting.choose_attention(net, recipe, own=own_net)
            if saved:
                checkpoint.set_weights(net, saved.weights)
            first = saved.step if saved else 0
            if first > recipe.steps:
                raise ValueError(f"steps = {recipe.steps}, but the run in {output} has taken {first} already")

        device = distributed.start()
        averaged.to(device)
        if starting.compiles(recipe, device, own=own_net):
            compile_network(net, recipe.stage(world_size))
        engine = start_engine(
            Loss(net, objective),
            batch_size=recipe.batch_size,
            micro_batches=batches.micro_batches,
            stage=recipe.stage(world_size),
            precision=recipe.precision,
            offload=recipe.offload,
            clip=recipe.clip,
            betas=(recipe.beta1, recipe.beta2),
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            optimizer=recipe.optimizer,
            options=recipe.deepspeed,
        )
        ema = EMA(engine, recipe.ema)
        if saved:
            checkpoint.restore(saved, engine, ema)
        if rank == 0:
            storage.write_text(output / "recipe.toml", recipes.to_toml(recipe))
            provenance.write(output, text)
        progress = Progress(
            output,
            recipe,
            first=first,
            flops_a_token=flops.training_flops(net, objective, recipe.length, recipe.t_min),
            peak=flops.peak_flops(recipe.precision, peak_tflops),
            tensorboard=tensorboard,
            wandb=wandb,
        )
        introduce(progress, recipe, batches, text, parameters, saved, device)

        measured, steps = None, range(first, recipe.steps)
        account = Account(engine, ema, progress, recipe, batches)
        for step, micro_batches in zip(steps, ahead(batches.make, steps), strict=True):
            progress.data_arrived()
            lr = learning_rate(
                step, peak=recipe.learning_rate, warmup=recipe.warmup, steps=recipe.steps, decay_to=recipe.decay_to
            )
            if not has_head(net):  # what it drops is torch's to draw: of the step and the rank alone
                torch.manual_seed(randomness.derived_seed(recipe.seed, randomness.DROPOUT, step, rank))
            launched = launch_step(engine, micro_batches, lr, preemption.requested, before_update=account.settle)
            account.open = Open(step, launched, micro_batches, lr)
            last = step + 1 == recipe.steps
            evaluates = (step + 1) % recipe.evaluate_every == 0 or last
            saves = (step + 1) % recipe.checkpoint_every == 0 or last
            if evaluates or saves or account.stop or not launched.late:
                account.settle()
            if not (evaluates or saves or account.stop):
                progress.data_asked()
                continue

            bound = None
            if evaluates:
                checkpoint.set_weights(averaged, ema.gather())
                try:
                    measured = measure_and_sample(averaged, objective, text, recipe, step + 1, progress, device)
                except ValueError as error:
                    raise TrainingError(f"the averaged weights cannot be measured: {error}") from error
                bound = measured.nats_per_token
            if saves or account.stop:
                _save(output, engine, ema, text, recipe, sections, step + 1, bound)
            if account.stop and not last:
                say(f"stopped by a signal after step {step + 1}, and saved; --resume continues from there")
                progress.close()
                return Result(output, step + 1, True, measured)
            progress.restart_clock()
        progress.close()
        _finish(output, net, ema, text, recipe, sections, parameters)
    return Result(output, recipe.steps, False, measured)


# Before


@contextmanager
def _setup_errors() -> Iterator[None]:
    """Errors of the one kind that stands for all that can be wrong before a run, on all ranks together. Collective."""
    failure, cause = "", None
    try:
        if distributed.place()[1] > 1:
            distributed.start()  # now, when all come: the work before the run may take some of them long
        yield
    except (ValueError, OSError, CheckpointError) as error:
        failure, cause = str(error), error
    failure = distributed.agree(failure)
    if failure:
        raise SetupError(failure) from cause


# On the way


def _save(
    output: Path,
    engine: Any,
    ema: EMA,
    text: Corpus,
    recipe: Recipe,
    sections: dict[str, Any],
    step: int,
    bound: float | None,
) -> None:
    """Write a checkpoint of all that the run needs to continue. Collective.

    Raises:
        TrainingError: on every rank, if it could not be written.
    """
    try:
        checkpoint.save(
            output / "checkpoints",
            engine,
            ema,
            text.tokenizer,
            step=step,
            sections=sections,
            keep=recipe.keep,
            bound=bound,
            keep_every=recipe.keep_every,
            fingerprint=text.fingerprint,
            recipe=dataclasses.asdict(recipe),
        )
    except CheckpointError as error:
        raise TrainingError(str(error)) from error


# After


def _finish(
    output: Path,
    net: nn.Module,
    ema: EMA,
    text: Corpus,
    recipe: Recipe,
    sections: dict[str, Any],
    parameters: int,
) -> None:
    """Write the trained model, its pictures, page and summary, and say where they are. Collective."""
    first = distributed.place()[0] == 0
    average = ema.gather(keep=None if first else ())
    if not first:
        return
    try:
        checkpoint.export(output / "export", net, average, text.tokenizer, sections)
        lines = report.write(
            output,
            title=f"{output.name}: {parameters / 1e6:.1f} M parameters, {recipe.graph}",
            unigram_entropy=unigram_entropy(text.valid.flat),
            characters_per_token=text.valid.characters_per_token,
            steps=recipe.steps,
        )
    except OSError as error:
        raise TrainingError(f"{error}; the model is safe in the last checkpoint in {output / 'checkpoints'}") from error
    best = checkpoint.best(output / "checkpoints")
    say(
        f"{lines}\n"
        f"checkpoints             {output / 'checkpoints'}, the best of them {best.name if best else 'unknown'}\n"
        f"trained model           {output / 'export'}"
    )
