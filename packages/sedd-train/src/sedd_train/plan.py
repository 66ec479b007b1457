"""What a run would hold and do, worked out without training: parameters, memory of a rank, tokens, steps, arithmetic.

With P parameters on n ranks, in bytes of float32 (bf16 and fp16 are autocast over the same):

    stage   weights   gradients   masters   AdamW's moments   moving average
      0       4 P        4 P         -            8 P               4 P
      1       4 P        4 P       4 P / n       8 P / n           4 P / n
      2       4 P       4 P / n    4 P / n       8 P / n           4 P / n
      3      4 P / n    4 P / n    4 P / n       8 P / n           4 P / n

and on every rank 4 P for the averaged network that is measured while training, under ZeRO a bucket of at most 2^26
gradients on their way to other ranks, and what the forward pass keeps for the backward pass, which grows with the
micro-batch. What Muon trains, in stage 0 alone, has one moment in place of two. While a checkpoint is saved, the first
rank holds 16 P more in the memory of its machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sedd_train import finetuning, flops, pretrained, token_cache, tokenizers
from sedd_train.muon import matrices_of
from sedd_train.pretrained import make_schedule
from sedd_train.recipes import Recipe

__all__ = ["memory", "activations", "describe", "STAGES"]

STAGES = (0, 1, 2, 3)
COLUMNS = {
    "weights": 9,
    "gradients": 11,
    "masters": 9,
    "moments": 9,
    "averages": 10,
    "bucket": 8,
    "for backward": 14,
    "in all": 8,
}


def memory(parameters: int, stage: int, ranks: int, *, trained: int | None = None, muon: int = 0) -> dict[str, float]:
    """Bytes that one rank holds at the end of a backward pass, by what they are for.

    Args:
        parameters: P.
        stage: ZeRO stage.
        ranks: n.
        trained: how many of them are trained; all unless given. The others are weights and nothing else.
        muon: how many of these Muon trains, which it does in stage 0 alone.

    Raises:
        ValueError: no such stage, or no rank.
    """
    if stage not in STAGES or ranks < 1:
        raise ValueError(f"stage = {stage}, ranks = {ranks}: expected a stage of 0 to 3 and at least one rank")
    weights = 4.0 * parameters
    trained = parameters if trained is None else trained
    whole, part = 4.0 * trained, 4.0 * trained / ranks
    return {
        "weights": weights / ranks if stage == 3 else weights,
        "gradients": part if stage >= 2 else whole,
        "masters": part if stage else 0.0,
        "moments": 2 * (part if stage else whole) - (0.0 if stage else 4.0 * muon),
        "average": part if stage else whole,
        "averaged network": weights,
        "bucket": 4.0 * min(trained, 1 << 26) if stage else 0.0,
    }


def activations(new_net: Callable[[int], Any], depth: int, length: int, *, precision: str = "fp32") -> float:
    """Bytes that a forward pass of the trunk keeps for the backward pass, for one sequence.

    Counted in the forward pass of a network of one block and one of two, from which the rest follows. The head and the
    loss keep one gradient of the hidden states beside them, however large the vocabulary.

    Args:
        new_net: a network of so many blocks, on the CPU, as it is trained.
        depth: blocks.
        length: tokens of the sequence.
        precision: fp32, bf16 or fp16.
    """
    one, two = (  # a second sequence's share: what is kept once for all sequences, such as weights in bfloat16, is not
        _kept(net, 2, length, precision) - _kept(net, 1, length, precision) for net in (new_net(1), new_net(2))
    )
    return one + (depth - 1) * (two - one)


def _kept(net: Any, batch: int, length: int, precision: str) -> float:
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept: dict[int, Tensor] = {}  # the tensors themselves, or their memory would be given to others

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    x, sigma = torch.zeros(batch, length, dtype=torch.int64), torch.ones(batch)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32")  # float16 has as many bytes
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), autocast:
        hidden = net.train().hidden(x, sigma)
    return float(sum(x.untyped_storage().nbytes() for x in kept.values()) + hidden.untyped_storage().nbytes())


def describe(recipe: Recipe, ranks: int, cache: Path) -> str:
    """What a run of a recipe on so many ranks would be, as text.

    Args:
        recipe: its numbers.
        ranks: n.
        cache: the folder of tokenised text; nothing is tokenised or downloaded for a plan, but for the tokenizer.

    Raises:
        ValueError: the ranks cannot divide the batch.
        ConnectionError: the tokenizer is on the hub, and that cannot be reached.
    """
    micro_batches = recipe.micro_batches(ranks)
    micro_batch = recipe.batch_size // micro_batches
    if recipe.init:
        start = finetuning.begin(recipe, Path(), resume=False)
        recipe, tokenizer, objective = finetuning.adopted(recipe, start), start.tokenizer, start.objective
        net: Any = finetuning.prepared(start.net, recipe)
    else:
        tokenizer = recipe.tokenizer
        tokens = tokenizers.vocab_size(tokenizer, eos=recipe.eos)
        graph, noise = pretrained.make_graph(recipe.graph, tokens), make_schedule(recipe)
        objective = pretrained.make_objective(pretrained.sections(recipe, graph, noise)["objective"], graph, noise)
        with torch.device("meta"):
            net = pretrained.make_net(recipe, graph.num_states)
    counts = net.parameter_counts()
    parameters, trained = sum(counts.values()), sum(p.numel() for p in net.parameters() if p.requires_grad)

    def shallow(depth: int) -> Any:
        net = pretrained.make_net(dataclasses.replace(recipe, depth=depth), 2)
        net.checkpoint_activations = recipe.activation_checkpointing
        return net

    kept = micro_batch * activations(shallow, recipe.depth, recipe.length, precision=recipe.precision)
    step_tokens = recipe.batch_size * recipe.length
    arithmetic = flops.training_flops(net, objective, recipe.length, recipe.t_min)
    corpus = token_cache.cached(recipe.corpus, tokenizer, cache, **recipe.texts)
    epochs = "not tokenised yet"
    if corpus is not None:
        blocks = corpus.train.blocks(recipe.length)
        epochs = f"{len(corpus.train):,} tokens, seen {recipe.steps * recipe.batch_size / blocks:.3g} times"
    matrices = matrices_of(net) if recipe.optimizer == "muon" else {}
    muon = sum(p.numel() for weights in matrices.values() for p in weights)
    parts = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in counts.items())
    lines = [
        f"network      {parameters:,} parameters ({parts}), {net.num_states:,} states"
        + (f", {trained:,} of them trained" if trained < parameters else ""),
        f"text         {recipe.corpus} in {recipe.tokenizer}: {epochs}",
        f"step         {recipe.batch_size} sequences of {recipe.length} = {ranks} ranks x {micro_batches // ranks} "
        f"micro-batches x {micro_batch}; {step_tokens:,} tokens",
        f"run          {recipe.steps:,} steps, {recipe.steps * step_tokens:,} tokens",
        f"arithmetic   {arithmetic / 1e9:.3g} GFLOP a token, {arithmetic * step_tokens / 1e12:.3g} TFLOP a step, "
        f"{arithmetic * step_tokens * recipe.steps / 1e18:.3g} EFLOP in all",
        f"checkpoints  {16 * parameters / 1e9:.2f} GB each, every {recipe.checkpoint_every} steps; "
        f"the last {recipe.keep} and the best are kept",
        "",
        "GB a rank    " + "".join(f"{name:>{width}}" for name, width in COLUMNS.items()),
    ]
    for stage in STAGES:
        held = memory(parameters, stage, ranks, trained=trained, muon=muon)
        averages = held["average"] + held["averaged network"]
        columns = [held["weights"], held["gradients"], held["masters"], held["moments"], averages, held["bucket"], kept]
        values = zip([*columns, sum(columns)], COLUMNS.values(), strict=True)
        row = "".join(f"{value / 1e9:>{width}.2f}" for value, width in values)
        mark = "  <- this run" if stage == recipe.stage(ranks) else ""
        lines.append(f"  ZeRO {stage}     {row}{mark}")
    if recipe.offload:
        what = "weights, masters and moments" if recipe.zero_stage == 3 else "masters and moments"
        lines.append(f"  offloaded: {what} lie in the machine's memory in place of the GPU's")
    return "\n".join(lines)
