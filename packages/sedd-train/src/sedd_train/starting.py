"""What a run is made of, from what it was given: its recipe, network and objective, each checked before it begins."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from sedd_nets import init_local_attention, init_unigram_bias
from sedd_nets.fast.attention import attention_named
from sedd_nets.transformer import Transformer
from torch import Tensor, nn

from sedd_train import labels, pretrained, recipes
from sedd_train.loading import Batches
from sedd_train.objectives import Autoregressive, Objective, has_head
from sedd_train.pretrained import Trained
from sedd_train.recipes import Recipe
from sedd_train.sections import graph_section, in_a_word, noise_section
from sedd_train.token_cache import Corpus
from sedd_train.tokenizers import identity

__all__ = [
    *("recipe_of", "objective_of", "new_net", "compiles", "choose_attention"),
    *("check_own", "check_loggers", "check_net"),
]


def recipe_of(given: Recipe | str | Path, corpus: Any, tokenizer: Any, graph: Any, noise: Any, init: Any) -> Recipe:
    """The recipe of the run; what it does not name itself is put into it by its content."""
    recipe = given.check() if isinstance(given, Recipe) else recipes.read_recipe(given)
    if corpus is not None:
        recipe = dataclasses.replace(recipe, corpus=corpus if isinstance(corpus, str) else corpus.identity)
    if tokenizer is not None:
        name = tokenizer if isinstance(tokenizer, str) else identity(tokenizer)
        recipe = dataclasses.replace(recipe, tokenizer=name)
    if init is not None:
        recipe = recipes.override(recipe, {"init": str(init)})
    if graph is not None and not recipe.init:
        word, masks = in_a_word(graph_section(graph)), graph.mask_id is not None
        recipe = recipes.override(recipe, {"scale_by_sigma": masks, "graph": word})
    if noise is not None and not recipe.init:
        recipe = recipes.override(recipe, {"noise": in_a_word(noise_section(noise))})
    return recipe


def objective_of(recipe: Recipe, graph: Any, noise: Any, start: Trained | None) -> tuple[Objective, dict[str, Any]]:
    """What a run trains for, and what config.json says of it."""
    if start is None:
        sections = pretrained.sections(recipe, graph, noise)
        return pretrained.make_objective(sections["objective"], graph, noise), sections
    objective, sections = start.objective, start.net.sections | {"init": recipe.init}
    if not isinstance(objective, Autoregressive):
        sections |= pretrained.sections(recipe, objective.graph, objective.noise)
    return objective, sections


def check_loggers(wandb: str, peak_tflops: float) -> None:
    """ValueError where a logger is asked for that is not installed, or a peak that is none."""
    if wandb and find_spec("wandb") is None:
        raise ValueError(f"--wandb {wandb} needs the package of that name: pip install 'sedd-train[wandb]'")
    if peak_tflops < 0:
        raise ValueError(f"--peak-tflops {peak_tflops}: expected a positive number")


def new_net(recipe: Recipe, num_states: int, text: Corpus, *, fresh: bool) -> nn.Module:
    """A network of the recipe's kind and sizes, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        net = pretrained.make_net(recipe, num_states)
    if recipe.informed_start and fresh:
        init_unigram_bias(net, text.train.counts(num_states))
        init_local_attention(net)
    net.checkpoint_activations = recipe.activation_checkpointing
    return net


def compiles(recipe: Recipe, device: torch.device, *, own: bool) -> bool:
    """Whether the network is compiled: as the recipe says, else on a GPU for its own networks and one length."""
    if recipe.compile is not None:
        return recipe.compile
    return device.type == "cuda" and recipe.packing and not own


def choose_attention(net: Any, recipe: Recipe, *, own: bool) -> None:
    """The attention that the recipe names, for training alone: what measures and samples works in float32, too."""
    if recipe.attention == "sdpa":
        return
    if own:
        raise ValueError(f"attention = {recipe.attention!r}: a network of your own attends as it does; leave it out")
    if not torch.cuda.is_available():
        raise ValueError(f"attention = {recipe.attention!r}: it has no backward pass but on a GPU; use sdpa")
    try:
        net.attention = attention_named(recipe.attention)
    except ImportError as error:
        raise ValueError(str(error)) from error


def check_own(net: nn.Module | None, recipe: Recipe) -> None:
    """ValueError where a network of one's own cannot take the rows of a run without packing, or has no use for Muon."""
    if net is not None and not has_head(net) and not recipe.packing:
        raise ValueError(
            "packing = False: rows that are filled up need a network that attends within documents, with `hidden` and "
            f"`head` as those of sedd_nets; {type(net).__name__} has none: train it with packing"
        )
    if net is not None and recipe.optimizer == "muon" and not isinstance(net, Transformer):
        raise ValueError(
            "optimizer = 'muon': it is for the matrices of the blocks of a network of sedd_nets, and which of those of "
            f"{type(net).__name__} are like them is not known: train it by adamw (--optimizer adamw)"
        )


def check_net(net: nn.Module, objective: Objective, batches: Batches) -> None:
    """A network of one's own takes the first sample of a run and gives what the objective asks for.

    Raises:
        ValueError: it does not.
    """
    (x0, xt, t, seeds, *rest), *_ = batches.make(0)
    lengths, _, told = (*rest, None, None, None)[:3]
    device = next(net.parameters()).device
    given: list[Tensor] = [tensor[:1].to(device) for tensor in (x0, xt, t)]
    more = {} if lengths is None else {"lengths": lengths[:1].to(device)}
    conditioned = labels.given(net, None if told is None else told[:1].to(device))
    with torch.no_grad(), torch.random.fork_rng():
        objective.losses(conditioned, *given, dropout_seeds=seeds[:1].to(device), **more)
