"""A run that begins from a checkpoint: what it takes from there, and which of its weights are trained.

The network, graph, schedule, objective and tokenizer are the checkpoint's; the recipe says the rest, and of the network
the length and dropout. All weights are trained, or those whose names fit a pattern, or LoRA's beside
them (`sedd_train.adapters`).
"""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from sedd_nets import BD3LM
from sedd_nets.files import HubOptions, Source
from sedd_nets.layers import Block
from sedd_nets.transformer import Transformer

from sedd_train import checkpoint, pretrained, tokenizers
from sedd_train.adapters import add_adapters
from sedd_train.objectives import D3PM, Autoregressive
from sedd_train.pretrained import Trained
from sedd_train.recipes import Recipe
from sedd_train.sections import graph_section, in_a_word, noise_section

__all__ = ["begin", "adopted", "prepared"]

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
