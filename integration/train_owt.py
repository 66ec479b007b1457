"""Train a score-entropy discrete diffusion model on text, with DeepSpeed.

deepspeed integration/train_owt.py                                  the paper's SEDD small, absorbing, on OpenWebText
deepspeed integration/train_owt.py --recipe tiny                    a small model on two CPU cores, in minutes
deepspeed --num_gpus 8 integration/train_owt.py --zero-stage 2      on eight GPUs, with ZeRO 2
torchrun --standalone --nproc_per_node 2 integration/train_owt.py --recipe tiny --steps 500
python integration/train_owt.py --recipe tiny --corpus my-texts/ --output runs/mine
python integration/train_owt.py --plan 8                            what each of 8 ranks would hold, for each stage
python integration/train_owt.py --recipe tiny --resume              continue from the last checkpoint
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from sedd_nets import init_local_attention, init_unigram_bias
from sedd_train import (
    checkpoint,
    distributed,
    flops,
    loading,
    loggers,
    nonfinite,
    plan,
    plotting,
    pretrained,
    randomness,
    recipes,
    report,
    token_cache,
    tokens,
)
from sedd_train.ema import EMA
from sedd_train.engine import Batch, Loss, learning_rate, start_engine, train_step
from sedd_train.evaluation import by_noise_level, measure
from sedd_train.loggers import Loggers
from tqdm import tqdm

# Arguments

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "--recipe",
    default="sedd-small-absorb-owt",
    metavar="NAME",
    help=f"{', '.join(recipes.recipe_names())}, or the path of a .toml file (default: %(default)s)",
)
parser.add_argument("--output", type=Path, metavar="DIR", help="folder of the run (default: runs/RECIPE)")
parser.add_argument("--resume", action="store_true", help="continue the run in that folder from its last checkpoint")
parser.add_argument(
    "--cache",
    type=Path,
    default=Path("runs/cache"),
    metavar="DIR",
    help="folder of tokenised text, shared by runs (default: %(default)s)",
)
parser.add_argument(
    "--plan",
    type=int,
    nargs="?",
    const=0,
    metavar="RANKS",
    help="say what the run would do and hold, on so many ranks, and stop (default: as many as are started)",
)
parser.add_argument(
    "--tensorboard",
    action=argparse.BooleanOptionalAction,
    default=True,
    help="write the log's numbers for TensorBoard too, if it is installed (default: yes)",
)
parser.add_argument("--wandb", metavar="PROJECT", default="", help="send them to this project of Weights & Biases too")
parser.add_argument(
    "--peak-tflops",
    type=float,
    default=0.0,
    metavar="X",
    help="what one device can do at best, 10^12 operations a second, for the utilisation (MFU); known GPUs need none",
)
parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the deepspeed launcher
recipes.add_arguments(parser)
args = parser.parse_args()
output = args.output or Path("runs") / Path(args.recipe).stem
given = {name: value for name, value in vars(args).items() if name in recipes.Recipe.__dataclass_fields__}

# Everything that can be wrong is looked at before the processes meet and work is done

rank, world_size = distributed.place()


def say(text: str) -> None:
    """Print above the progress bar, on rank 0 alone."""
    if rank == 0:
        tqdm.write(text)


try:
    recipe = recipes.for_run(output, args.recipe, given, resume=args.resume)
    if args.plan is not None:
        say(plan.describe(recipe, args.plan or world_size, args.cache))
        sys.exit(0)
    micro_batches = recipe.micro_batches(world_size)
    corpus = token_cache.prepare(recipe.corpus, recipe.tokenizer, args.cache, say, streaming=recipe.streaming)
    corpus.check_length(recipe.length, packing=recipe.packing)
    vocab_size = len(corpus.tokenizer)
    graph = pretrained.make_graph(recipe.graph, vocab_size)
    sections = pretrained.sections(recipe, tokens=vocab_size)
    noise = pretrained.make_noise(sections["noise"])
    objective = pretrained.make_objective(sections["objective"], graph, noise)

    torch.manual_seed(recipe.seed)
    net = pretrained.make_net(recipe, graph.num_states)
    if recipe.informed_start and not args.resume:
        init_unigram_bias(net, corpus.train.counts(graph.num_states))
        init_local_attention(net)
    net.checkpoint_activations = recipe.activation_checkpointing
    if args.wandb and find_spec("wandb") is None:
        raise ValueError(f"--wandb {args.wandb} needs the package of that name: pip install 'sedd-train[wandb]'")
    if args.peak_tflops < 0:
        raise ValueError(f"--peak-tflops {args.peak_tflops}: expected a positive number")
    parameters = sum(p.numel() for p in net.parameters())
    checkpoint.check_space(output / "checkpoints", parameters, recipe.keep)
    saved = checkpoint.last(output / "checkpoints", corpus.fingerprint) if args.resume else None
except (ValueError, OSError, checkpoint.CheckpointError) as error:
    say(f"train_owt.py: error: {error}")
    sys.exit(2)

# The engine, the moving average, and where they were

preemption = distributed.Preemption()
device = distributed.start()
averaged = (
    pretrained.make_net(recipe, graph.num_states).to(device).eval().requires_grad_(False)
)  # holds the average for evaluation and samples
if saved:
    net.load_state_dict(checkpoint.with_buffers(net, saved.weights))
engine = start_engine(
    Loss(net, objective),
    batch_size=recipe.batch_size,
    micro_batches=micro_batches,
    stage=recipe.zero_stage,
    precision=recipe.precision,
    offload=recipe.offload,
    clip=recipe.clip,
    betas=(recipe.beta1, recipe.beta2),
    eps=recipe.eps,
    weight_decay=recipe.weight_decay,
)
if recipe.compile:
    engine.compile()
ema = EMA(engine, recipe.ema)
first = 0
if saved:
    checkpoint.restore(saved, engine, ema)
    first = saved.step

end = None if recipe.packing else corpus.tokenizer.eos_token_id  # what rows are filled up with
blocks = corpus.train.blocks(recipe.length) if recipe.packing else corpus.train.documents
valid, valid_lengths = corpus.valid.first(recipe.evaluate_blocks, recipe.length, end)
unigram = tokens.unigram_entropy(corpus.valid.flat)
tokens_a_step = recipe.batch_size * recipe.length
flops_a_step = tokens_a_step * flops.training_flops(net, objective, recipe.length, recipe.t_min)
peak = flops.peak_flops(recipe.precision, args.peak_tflops)
if rank == 0:
    (output / "recipe.toml").write_text(recipes.to_toml(recipe))
    log = loggers.Log(output / "log.jsonl", first)
    place = f"{world_size} x {torch.cuda.get_device_name() if device.type == 'cuda' else device.type}"
    log.write(
        "start",
        step=first,
        steps=recipe.steps,
        parameters=parameters,
        training_tokens=len(corpus.train),
        unigram_entropy=unigram,
        characters_per_token=corpus.valid.characters_per_token,
        environment=report.environment(place),
    )
    copies = Loggers(output, first, tensorboard=args.tensorboard, wandb=args.wandb, values=dataclasses.asdict(recipe))
say(
    f"{parameters / 1e6:.1f} M parameters, {len(corpus.train) / 1e6:.1f} M training tokens in {blocks} blocks of "
    f"{recipe.length}, vocabulary of {vocab_size}\n"
    f"{recipe.steps} steps of {tokens_a_step} tokens ({recipe.steps * recipe.batch_size / blocks:.2g} epochs) on "
    f"{world_size} x {device.type}, ZeRO {recipe.zero_stage}, {recipe.precision}"
    + (f"; continuing at step {first}" if saved else "")
)
if recipe.precision == "bf16" and flops.emulates_bf16():
    say("this CPU has no instructions for bfloat16 and takes many times as long in it: --precision fp32 is faster here")

# Training


def where(numbers: Sequence[int]) -> list[int]:
    """Where in the training text these samples of the run begin, in tokens; without packing, which documents."""
    if recipe.crops:
        return loading.crops(recipe.seed, numbers, len(corpus.train), recipe.length)
    order = loading.order(recipe.seed, numbers, blocks)
    return [block * recipe.length for block in order] if recipe.packing else order


def samples(step: int) -> list[int]:
    """The numbers of this rank's samples of the run, in the order of its micro-batches."""
    mine = range(rank, micro_batches, world_size)
    numbers = [g for j in mine for g in randomness.sample_numbers(recipe.batch_size, micro_batches, j)]
    return [step * recipe.batch_size + g for g in numbers]


def text_tokens(step: int) -> int:
    """How many tokens of all ranks in a step are text, not padding."""
    if recipe.packing:
        return tokens_a_step
    every = where(range(step * recipe.batch_size, (step + 1) * recipe.batch_size))
    return int(corpus.train.lengths(every, recipe.length).sum())


def make(step: int) -> list[Batch]:
    """This rank's micro-batches of a step, arguments of `Loss.forward`: a function of the step and nothing else."""
    made: list[Batch] = []
    for micro_batch in range(rank, micro_batches, world_size):
        numbers = randomness.sample_numbers(recipe.batch_size, micro_batches, micro_batch)
        at = where([step * recipe.batch_size + g for g in numbers])
        x0 = corpus.train.at(at, recipe.length) if end is None else corpus.train.rows(at, recipe.length, end)
        t = randomness.times(recipe.seed, step, numbers, recipe.batch_size, recipe.t_min)
        xt, t = objective.noised(x0, t, recipe.seed, step, numbers)
        lengths = [] if recipe.packing else [corpus.train.lengths(at, recipe.length)]
        made.append((x0, xt, t, randomness.dropout_seeds(recipe.seed, step, numbers), *lengths))
    return made


def note(kind: str, **values: Any) -> None:
    """Put something into the log and on the copies. Rank 0 alone."""
    log.write(kind, **values)
    copies.write(kind, **values)


def look(step: int) -> float:
    """Measure the averaged weights on held-out text, and let them write; their bound, nats a token."""
    averaged.load_state_dict(checkpoint.with_buffers(averaged, ema.gather()))
    found = measure(
        averaged,
        objective,
        valid,
        lengths=valid_lengths,
        characters_per_token=corpus.valid.characters_per_token,
        num_times=recipe.evaluate_times,
        seed=recipe.seed,
    )
    levels = None
    if recipe.objective == "score-entropy":
        levels = by_noise_level(
            averaged, graph, noise, valid, lengths=valid_lengths, t_min=recipe.t_min, seed=recipe.seed
        )
    if rank != 0:
        return found.nats_per_token
    if levels is not None:
        log.write("levels", step=step, **{name: value.tolist() for name, value in vars(levels).items()})
    random = randomness.generator(recipe.seed, randomness.SAMPLING, step, device=device)
    with torch.inference_mode():
        x = objective.sample(averaged, (1, recipe.length), steps=recipe.sample_steps, generator=random, device=device)
    text = corpus.tokenizer.decode(x[0].tolist())
    note(
        "valid",
        step=step,
        nats_per_token=found.nats_per_token,
        standard_error=found.standard_error,
        perplexity=found.perplexity,
        bits_per_character=found.bits_per_character,
        sample=text,
    )
    say(
        f"\nstep {step}: held-out bound {found.nats_per_token:.3f} ± {found.standard_error:.3f} nats a token, "
        f"perplexity {found.perplexity:.1f}, {found.bits_per_character:.3f} bits a character\n{text}\n"
    )
    return found.nats_per_token


def save(step: int, bound: float | None) -> Path:
    """Write a checkpoint of all that the run needs to continue, and keep it if its bound is the best so far."""
    return checkpoint.save(
        output / "checkpoints",
        engine,
        ema,
        corpus.tokenizer,
        step=step,
        sections=sections,
        keep=recipe.keep,
        bound=bound,
        fingerprint=corpus.fingerprint,
        recipe=dataclasses.asdict(recipe),
    )


calm = 0.5 if sys.stderr.isatty() else 30.0  # seconds between redrawings of the bar; a file gets few
bar = tqdm(total=recipe.steps, initial=first, unit="step", disable=rank != 0, smoothing=0.05, mininterval=calm)
smooth, average_seconds, skipped, clock, failure = math.nan, math.nan, 0, time.perf_counter(), ""
for step, made in zip(range(first, recipe.steps), loading.ahead(make, range(first, recipe.steps)), strict=True):
    waited = time.perf_counter() - clock
    lr = learning_rate(
        step, peak=recipe.learning_rate, warmup=recipe.warmup, steps=recipe.steps, decay_to=recipe.decay_to
    )
    done = train_step(engine, made, lr, stop=preemption.requested)
    if done.applied:
        ema.update()
    skipped = 0 if done.applied else skipped + 1

    loss = done.loss * recipe.batch_size / text_tokens(step)
    smooth = loss if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss if math.isfinite(loss) else smooth
    now = time.perf_counter()
    seconds = now - clock
    average_seconds = seconds if math.isnan(average_seconds) else 0.95 * average_seconds + 0.05 * seconds
    used = flops_a_step / world_size / seconds / peak if peak else None
    bar.set_postfix_str(
        f"loss {smooth:.3f} nats a token, {tokens_a_step / seconds:,.0f} tokens/s"
        + (f", MFU {used:.0%}" if used is not None else ""),
        refresh=False,
    )
    bar.update()
    if rank == 0 and (step % recipe.log_every == 0 or not done.applied):
        note(
            "train",
            step=step + 1,
            loss=loss,
            grad_norm=done.grad_norm,
            lr=lr,
            tokens_per_second=round(tokens_a_step / seconds),
            mfu=used,
            waited_for_data=waited / seconds,
            memory_gb=flops.memory() / 1e9,
            eta_seconds=round(average_seconds * (recipe.steps - step - 1)),
        )
    if not done.applied:
        bad = nonfinite.not_finite(done.losses, samples(step))
        say(
            f"step {step + 1} skipped, {skipped} in a row: loss {loss:.4g}, gradient norm {done.grad_norm:.4g}; "
            f"{len(bad)} of {recipe.batch_size} samples have a loss that is not finite"
        )
        if rank == 0:
            at_fault = bad or list(range(step * recipe.batch_size, (step + 1) * recipe.batch_size))
            found = {"samples": at_fault, "starts": where(at_fault)}
            log.write("skipped", step=step + 1, loss=loss, grad_norm=done.grad_norm, **found)
    if skipped >= recipe.max_skipped:
        diagnosis = nonfinite.diagnose(engine, made, samples(step))
        if rank == 0:
            log.write("diagnosis", step=step + 1, text=diagnosis)
        failure = (
            f"{skipped} steps in a row had a loss or gradient that is not finite: training stops, and the weights are "
            f"as they were before them. Try a lower --learning-rate than {recipe.learning_rate}, or --precision fp32.\n"
            f"{diagnosis}"
        )
        break

    bound = None
    if (step + 1) % recipe.evaluate_every == 0 or step + 1 == recipe.steps:
        try:
            bound = look(step + 1)
        except ValueError as error:
            failure = f"the averaged weights cannot be measured: {error}"
            break
    if (step + 1) % recipe.checkpoint_every == 0 or step + 1 == recipe.steps or done.stop:
        try:
            save(step + 1, bound)
        except checkpoint.CheckpointError as error:
            failure = str(error)
            break
    if done.stop:
        say(f"stopped by a signal after step {step + 1}, and saved; --resume continues from there")
        distributed.finish()
    clock = time.perf_counter()
bar.close()
if failure:
    say(f"train_owt.py: error: {failure}")
    distributed.finish(1)

# Summary

average = ema.gather()
if rank == 0:
    last = [line for line in loggers.read(output / "log.jsonl") if line["kind"] == "valid"][-1]
    unigram_bits = unigram / math.log(2) / corpus.valid.characters_per_token
    summary = {
        "steps": recipe.steps,
        "nats_per_token": last["nats_per_token"],
        "perplexity": last["perplexity"],
        "bits_per_character": last["bits_per_character"],
        "unigram_bits_per_character": unigram_bits,
    }
    try:
        checkpoint.export(output / "export", net, average, corpus.tokenizer, sections)
        plotting.loss_curve(
            output / "log.jsonl",
            output / "loss.png",
            title=f"{output.name}: {parameters / 1e6:.1f} M parameters, {recipe.graph}",
            unigram_entropy=unigram,
            characters_per_token=corpus.valid.characters_per_token,
        )
        if levels := plotting.levels_of(output / "log.jsonl"):
            plotting.noise_levels(levels, output / "levels.png")
        (output / "summary.json").write_text(loggers.to_json(summary, indent=1))
        (output / "report.html").write_text(report.page(output), encoding="utf-8")
    except OSError as error:
        say(f"train_owt.py: error: {error}; the model is safe in the last checkpoint in {output / 'checkpoints'}")
        distributed.finish(1)
    best = checkpoint.best(output / "checkpoints")
    say(
        f"\nheld-out bound          {last['bits_per_character']:.3f} bits a character  "
        f"({last['nats_per_token']:.3f} nats a token, perplexity {last['perplexity']:.1f})\n"
        f"unigram entropy         {unigram_bits:.3f} bits a character  ({unigram:.3f} nats a token)\n"
        f"loss curve              {output / 'loss.png'}\n"
        f"report                  {output / 'report.html'}\n"
        f"checkpoints             {output / 'checkpoints'}, the best of them {best.name if best else 'unknown'}\n"
        f"trained model           {output / 'export'}"
    )
    if recipe.objective == "score-entropy":
        prefix = " ".join(corpus.tokenizer.decode(valid[0].tolist()).split()[:3])
        say(
            f"sample from it with     python integration/sample.py --checkpoint {output / 'export'} "
            f"--prefix {shlex.quote(prefix)}"
        )
distributed.finish()
