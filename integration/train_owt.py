"""Train a score-entropy discrete diffusion model on text, with DeepSpeed.

deepspeed integration/train_owt.py                                  the paper's SEDD small, absorbing, on OpenWebText
deepspeed integration/train_owt.py --recipe tiny                    a small model on two CPU cores, in minutes
deepspeed --num_gpus 8 integration/train_owt.py --zero-stage 2      on eight GPUs, with ZeRO 2
torchrun --standalone --nproc_per_node 2 integration/train_owt.py --recipe tiny --steps 500
python integration/train_owt.py --recipe tiny --corpus my-texts/ --output runs/mine
python integration/train_owt.py --recipe tiny --resume              continue from the last checkpoint
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from sedd_nets import SEDD, begin_with_frequencies, look_at_neighbours
from sedd_samplers import sample
from sedd_train import checkpoint, data, evaluate, launch, pretrained, randomness, recipes, report
from sedd_train.ema import EMA
from sedd_train.engine import Loss, learning_rate, start_engine, train_step
from torch import Tensor
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
parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the deepspeed launcher
recipes.add_arguments(parser)
args = parser.parse_args()
output = args.output or Path("runs") / Path(args.recipe).stem
given = {name: value for name, value in vars(args).items() if name in recipes.Recipe.__dataclass_fields__}

# Everything that can be wrong is looked at before the processes meet and work is done

rank, world_size = launch.place()


def say(text: str) -> None:
    """Print above the progress bar, on rank 0 alone."""
    if rank == 0:
        tqdm.write(text)


try:
    recipe = recipes.for_run(output, args.recipe, given, resume=args.resume)
    micro_batches = recipe.micro_batches(world_size)
    corpus = data.prepare(recipe.corpus, recipe.tokenizer, args.cache, say)
    corpus.check_length(recipe.length)
    vocab_size = len(corpus.tokenizer)
    graph = pretrained.make_graph(recipe.graph, vocab_size)
    sections = pretrained.sections(
        recipe.graph, recipe.noise, tokens=vocab_size, sigma_min=recipe.sigma_min, sigma_max=recipe.sigma_max
    )
    noise = pretrained.make_noise(sections["noise"])

    def new_net() -> SEDD:
        """A fresh network of the recipe's sizes."""
        return SEDD(
            graph.num_states,
            width=recipe.width,
            depth=recipe.depth,
            heads=recipe.heads,
            cond_dim=recipe.cond_dim,
            dropout=recipe.dropout,
            scale_by_sigma=recipe.scale_by_sigma,
            length=recipe.length,
        )

    torch.manual_seed(recipe.seed)
    net = new_net()
    if recipe.informed_start and not args.resume:
        begin_with_frequencies(net, corpus.train.counts(graph.num_states))
        look_at_neighbours(net)
    net.checkpoint_activations = recipe.activation_checkpointing
    parameters = sum(p.numel() for p in net.parameters())
    checkpoint.check_space(output / "checkpoints", parameters, recipe.keep)
    saved = checkpoint.last(output / "checkpoints", corpus.fingerprint) if args.resume else None
except (ValueError, OSError, checkpoint.CheckpointError) as error:
    say(f"train_owt.py: error: {error}")
    sys.exit(2)

# The engine, the moving average, and where they were

preemption = launch.Preemption()
device = launch.start()
averaged = new_net().to(device).eval().requires_grad_(False)  # holds the average for evaluation and samples
if saved:
    net.load_state_dict(checkpoint.with_buffers(net, saved.weights))
engine = start_engine(
    Loss(net, graph, noise),
    batch_size=recipe.batch_size,
    micro_batches=micro_batches,
    stage=recipe.zero_stage,
    precision=recipe.precision,
    clip=recipe.clip,
    betas=(recipe.beta1, recipe.beta2),
    eps=recipe.eps,
    weight_decay=recipe.weight_decay,
)
ema = EMA(engine, recipe.ema)
first = 0
if saved:
    checkpoint.restore(saved, engine, ema)
    first = saved.step

blocks = corpus.train.blocks(recipe.length)
held_out = min(recipe.evaluate_blocks, corpus.valid.blocks(recipe.length))
valid = corpus.valid.block(range(held_out), recipe.length)
unigram = data.unigram_entropy(corpus.valid.flat)
tokens_a_step = recipe.batch_size * recipe.length
if rank == 0:
    (output / "recipe.toml").write_text(recipes.to_toml(recipe))
    log = report.Log(output / "log.jsonl", first)
say(
    f"{parameters / 1e6:.1f} M parameters, {len(corpus.train) / 1e6:.1f} M training tokens in {blocks} blocks of "
    f"{recipe.length}, vocabulary of {vocab_size}\n"
    f"{recipe.steps} steps of {tokens_a_step} tokens ({recipe.steps * recipe.batch_size / blocks:.2g} epochs) on "
    f"{world_size} x {device.type}, ZeRO {recipe.zero_stage}, {recipe.precision}"
    + (f"; continuing at step {first}" if saved else "")
)

# Training


def batches(step: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """This rank's micro-batches of a step: x_0, x_t and t."""
    for micro_batch in range(rank, micro_batches, world_size):
        samples = randomness.sample_numbers(recipe.batch_size, micro_batches, micro_batch)
        numbers = data.order(recipe.seed, [step * recipe.batch_size + g for g in samples], blocks)
        x0 = corpus.train.block(numbers, recipe.length)
        t = randomness.times(recipe.seed, step, samples, recipe.batch_size, recipe.t_min)
        xt = randomness.noised(graph, x0, noise(t)[0], recipe.seed, step, samples)
        randomness.seed_dropout(recipe.seed, step, micro_batch)
        yield x0, xt, t


def look(step: int) -> None:
    """Measure the averaged weights on held-out text, and let them write."""
    averaged.load_state_dict(checkpoint.with_buffers(averaged, ema.gather()))
    found = evaluate(
        averaged,
        graph,
        noise,
        valid,
        characters_per_token=corpus.valid.characters_per_token,
        num_times=recipe.evaluate_times,
        seed=recipe.seed,
    )
    if rank != 0:
        return
    random = randomness.generator(recipe.seed, randomness.SAMPLING, step, device=device)
    with torch.inference_mode():
        x = sample(
            averaged, graph, noise, shape=(1, recipe.length), steps=recipe.sample_steps, generator=random, device=device
        )
    text = corpus.tokenizer.decode(x[0].tolist())
    log.write(
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


def save(step: int) -> Path:
    """Write a checkpoint of all that the run needs to continue."""
    return checkpoint.save(
        output / "checkpoints",
        engine,
        ema,
        corpus.tokenizer,
        step=step,
        sections=sections,
        keep=recipe.keep,
        fingerprint=corpus.fingerprint,
        recipe=dataclasses.asdict(recipe),
    )


calm = 0.5 if sys.stderr.isatty() else 30.0  # seconds between redrawings of the bar; a file gets few
bar = tqdm(total=recipe.steps, initial=first, unit="step", disable=rank != 0, smoothing=0.05, mininterval=calm)
smooth, skipped, clock, failure = math.nan, 0, time.perf_counter(), ""
for step in range(first, recipe.steps):
    lr = learning_rate(
        step, peak=recipe.learning_rate, warmup=recipe.warmup, steps=recipe.steps, decay_to=recipe.decay_to
    )
    done = train_step(engine, batches(step), lr, stop=preemption.requested)
    if done.applied:
        ema.update()
    skipped = 0 if done.applied else skipped + 1

    loss = done.loss / recipe.length
    smooth = loss if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss if math.isfinite(loss) else smooth
    now = time.perf_counter()
    speed, clock = tokens_a_step / (now - clock), now
    bar.set_postfix_str(f"loss {smooth:.3f} nats a token, {speed:,.0f} tokens/s", refresh=False)
    bar.update()
    if rank == 0 and (step % recipe.log_every == 0 or not done.applied):
        log.write("train", step=step + 1, loss=loss, grad_norm=done.grad_norm, lr=lr, tokens_per_second=round(speed))
    if not done.applied:
        numbers = data.order(recipe.seed, range(step * recipe.batch_size, (step + 1) * recipe.batch_size), blocks)
        say(f"step {step + 1} skipped: loss {loss:.4g}, gradient norm {done.grad_norm:.4g}; its blocks are in the log")
        if rank == 0:
            log.write("skipped", step=step + 1, loss=loss, grad_norm=done.grad_norm, blocks=numbers)
    if skipped >= recipe.max_skipped:
        failure = (
            f"{skipped} steps in a row had a loss or gradient that is not finite: training stops, and the weights are "
            f"as they were before them. Try a lower --learning-rate than {recipe.learning_rate}, or --precision fp32"
        )
        break

    if (step + 1) % recipe.evaluate_every == 0 or step + 1 == recipe.steps:
        look(step + 1)
    if (step + 1) % recipe.checkpoint_every == 0 or step + 1 == recipe.steps or done.stop:
        try:
            save(step + 1)
        except checkpoint.CheckpointError as error:
            failure = str(error)
            break
    if done.stop:
        say(f"stopped by a signal after step {step + 1}, and saved; --resume continues from there")
        launch.finish()
    clock = time.perf_counter()
bar.close()
if failure:
    say(f"train_owt.py: error: {failure}")
    launch.finish(1)

# Summary

average = ema.gather()
if rank == 0:
    last = [line for line in report.read(output / "log.jsonl") if line["kind"] == "valid"][-1]
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
        report.picture(
            output / "log.jsonl",
            output / "loss.png",
            title=f"{output.name}: {parameters / 1e6:.1f} M parameters, {recipe.graph}",
            unigram_entropy=unigram,
            characters_per_token=corpus.valid.characters_per_token,
        )
        (output / "summary.json").write_text(json.dumps(summary, indent=1))
    except OSError as error:
        say(f"train_owt.py: error: {error}; the model is safe in the last checkpoint in {output / 'checkpoints'}")
        launch.finish(1)
    say(
        f"\nheld-out bound          {last['bits_per_character']:.3f} bits a character  "
        f"({last['nats_per_token']:.3f} nats a token, perplexity {last['perplexity']:.1f})\n"
        f"unigram entropy         {unigram_bits:.3f} bits a character  ({unigram:.3f} nats a token)\n"
        f"loss curve              {output / 'loss.png'}\n"
        f"checkpoints             {output / 'checkpoints'}\n"
        f"trained model           {output / 'export'}\n"
        f"sample from it with     python integration/sample.py --checkpoint {output / 'export'} "
        f"--prefix {shlex.quote(' '.join(corpus.tokenizer.decode(valid[0].tolist()).split()[:3]))}"
    )
launch.finish()
