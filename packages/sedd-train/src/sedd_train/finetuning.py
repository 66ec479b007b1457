"""A run that begins from a checkpoint: what it takes from there, and which of its weights are trained.

The network, graph, schedule, objective and tokenizer are the checkpoint's; the recipe says the rest, and of the network
the length and dropout. All weights are trained, or those whose names fit a pattern, or LoRA's beside
them (`sedd_train.adapters`).

Another author's words are more or less frequent by factors of hundreds, and a bias of the head moves by a learning rate
a step. Where the recipe says `informed_start` the biases begin where they fit. Let p(v | x_t) be the network's
prediction at a masked position, q_v its mean over masked positions of the new text, and f_v how frequent v is there.
The derivative of the cross-entropy by the bias b_v is q_v - f_v, which a round of proportional fitting takes near zero:

    b_v <- b_v + log f_v - log q_v,      f_v = (count_v + M q_v) / (count + M)

M, the number of different tokens in the text, is how often one came that had not come before, and as much is left to
what the network expects (Witten and Bell 1991).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from fnmatch import fnmatch
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from sedd_nets import BD3LM
from sedd_nets.files import HubOptions, Source
from sedd_nets.layers import Block
from sedd_nets.transformer import Transformer
from torch import Tensor

from sedd_train import checkpoint, pretrained, tokenizers
from sedd_train.adapters import add_adapters
from sedd_train.loading import Batches
from sedd_train.objectives import D3PM, Autoregressive, ScoreEntropy
from sedd_train.pretrained import Trained
from sedd_train.recipes import Recipe
from sedd_train.sections import described, graph_section, in_a_word, noise_section
from sedd_train.tokens import inside

__all__ = ["begin", "adopted", "prepared", "fit_frequencies"]

SEQUENCES = 96  # that the mean prediction is taken over
FARTHEST = 3.0  # nats that a bias is raised by: of tokens that were rare the mean is known roughly
NETWORKS = {"SEDD": "sedd", "RADD": "radd", "MDLM": "mdlm", "Causal": "causal", "UDLM": "udlm"}


def begin(
    recipe: Recipe, output: Path, *, tokenizer: Any = None, graph: Any = None, noise: Any = None, resume: bool
) -> Trained:
    """What the run begins from: the checkpoint of `--init`, or of a run that goes on its own last one.

    Args:
        recipe: its `init`, and the tokenizer it names, if any.
        output: the folder of the run.
        tokenizer: for a checkpoint that has none, or the same that it has.
        graph: for one that config.json cannot describe.
        noise: the same of the schedule.
        resume: whether the run goes on.

    Raises:
        ValueError: the tokenizer is another than the checkpoint's, or its network is none that this trainer trains; or
            as `sedd_train.load_trained`.
        FileNotFoundError, ConnectionError: there is no such checkpoint.
    """
    last = checkpoint.find(output / "checkpoints") if resume else None
    name, hub = (str(last), HubOptions()) if last else _where(recipe.init)
    if tokenizer is None and recipe.tokenizer and not recipe.tokenizer.startswith("tokenizer:"):
        tokenizer = recipe.tokenizer
    if isinstance(tokenizer, str):
        tokenizer = tokenizers.load_tokenizer(tokenizer, eos=recipe.eos)
    found = pretrained.load_trained(name, tokenizer=tokenizer, graph=graph, noise=noise, **hub)
    own = tokenizers.read_tokenizer(Source(pretrained.folder_of(name), **hub))
    if own is not None and own.get_vocab() != found.tokenizer.get_vocab():
        raise ValueError(f"{recipe.init} has a tokenizer of its own, and the one given is another: leave it out")
    if isinstance(found.net, BD3LM):
        raise ValueError(
            f"{recipe.init} is a BD3LM, whose blocks are trained beside a clean copy of the text: this trainer does not"
        )
    return found


def adopted(recipe: Recipe, start: Trained) -> Recipe:
    """The recipe with what the checkpoint says in it."""
    net, objective = start.net, start.objective
    values: dict[str, Any] = {
        "tokenizer": recipe.tokenizer or tokenizers.identity(start.tokenizer),
        "length": recipe.length or net.length,
        "network": NETWORKS[type(net).__name__],
        "objective": "score-entropy",
        "width": net.width,
        "depth": net.depth,
        "heads": net.heads,
        "cond_dim": net.cond_dim or recipe.cond_dim,
        "scale_by_sigma": getattr(net, "scale_by_sigma", False),
        "informed_start": False,
    }
    if isinstance(objective, Autoregressive):
        return dataclasses.replace(recipe, **values | {"objective": "autoregressive", "graph": "absorb"}).check()
    if isinstance(objective, D3PM):
        values |= {"objective": "d3pm", "d3pm_steps": objective.num_steps}
    words = {"graph": in_a_word(graph_section(objective.graph)), "noise": in_a_word(noise_section(objective.noise))}
    if isinstance(objective, ScoreEntropy) and described("graph", words["graph"])["type"] == "absorb":
        values["informed_start"] = recipe.informed_start  # whose scores at a mask are a prediction of the token there
    return dataclasses.replace(recipe, **values | words).check()


def prepared(net: Transformer, recipe: Recipe) -> Transformer:
    """The network itself, of the recipe's length and dropout, with the weights to train told from the others.

    Raises:
        ValueError: the pattern fits no weight; or peft, which LoRA needs, is not installed.
    """
    net.train()
    net.length, net.dropout = recipe.length, recipe.dropout
    net.checkpoint_activations = recipe.activation_checkpointing
    for block in net.blocks:
        assert isinstance(block, Block)
        block.dropout = recipe.dropout
    if recipe.lora:
        add_adapters(net, rank=recipe.lora, alpha=recipe.lora_alpha, seed=recipe.seed)
    if recipe.train_layers:
        _freeze_all_but(net, recipe.train_layers)
    return net


@torch.no_grad()
def fit_frequencies(net: Any, objective: Any, batches: Batches) -> None:
    """Move the head's bias, in place, so that the network expects the text's tokens as often as they come.

    Nothing where the recipe has no `informed_start`, or the bias is not trained.

    Args:
        net: a network of sedd_nets, of an absorbing process.
        objective: how text is noised: score entropy.
        batches: of the text; of the first steps so many sequences are looked at, the same on every rank.
    """
    bias = net.output_layer.linear.bias
    if not (batches.recipe.informed_start and bias.requires_grad):
        return
    device, mask, training = bias.device, objective.graph.mask_id, net.training
    counts = batches.tokens.counts(net.num_states).to(device, torch.float64)
    alone = dataclasses.replace(batches, rank=0, world_size=1)
    net.eval()
    total = torch.zeros(net.num_states, dtype=torch.float64, device=device)
    for xt, t, inside_text in islice(_sequences(alone), SEQUENCES):
        x = xt.to(device)
        weight = (x == mask) & inside_text.to(device)
        log_score = net(x, objective.noise(t.to(device))[0])[weight]
        log_score[:, mask] = -torch.inf
        total += log_score.double().softmax(-1).sum(0)
    net.train(training)
    different = (counts > 0).sum()
    shift = ((counts / (total / total.sum()).clamp_min(1e-12) + different) / (counts.sum() + different)).log()
    shift[mask] = 0
    bias.add_(shift.clamp(max=FARTHEST))


def _sequences(batches: Batches) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The noised samples of a run, one by one: x_t (1, L), t (1,), and which positions are text (1, L) bool."""
    for step in count():
        for _, xt, t, _, *more in batches.make(step):
            lengths = more[0] if more else None
            text = torch.ones_like(xt, dtype=torch.bool) if lengths is None else inside(lengths, xt.shape[1]) > 0
            for i in range(len(xt)):
                yield xt[i : i + 1], t[i : i + 1], text[i : i + 1]


def _where(init: str) -> tuple[str, HubOptions]:
    """A folder, or a name on the hub and its revision."""
    if Path(init).exists():
        return init, HubOptions()
    name, _, revision = init.partition("@")
    return name, HubOptions(revision=revision) if revision else HubOptions()


def _freeze_all_but(net: Transformer, patterns: str) -> None:
    wanted = [pattern.strip() for pattern in patterns.split(",")]
    names = [name for name, _ in net.named_parameters()]
    for pattern in wanted:
        if not any(fnmatch(name, pattern) for name in names):
            tops = sorted({".".join(name.split(".")[:2]) for name in names})
            raise ValueError(f"train_layers: {pattern!r} fits no weight; they begin with {', '.join(tops)}")
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(any(fnmatch(name, pattern) for pattern in wanted))
