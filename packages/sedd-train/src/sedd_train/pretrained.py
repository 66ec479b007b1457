"""A trained model as a whole: network, graph, noise schedule and tokenizer, from one folder or published name.

`load` gives score models, the paper's and those whose score is known. `load_trained` gives whatever the training script
made, baselines included, as a network and its objective.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from sedd_graphs import Absorbing, Geometric, LogLinear, Uniform
from sedd_nets import MDLM, RADD, SEDD, Causal, from_pretrained
from sedd_nets.loading import Network

from sedd_train import tokenizers
from sedd_train.objectives import D3PM, Autoregressive, ScoreEntropy
from sedd_train.recipes import Recipe

__all__ = [
    *("Model", "load", "Trained", "load_trained"),
    *("make_graph", "make_net", "make_noise", "make_objective", "sections"),
]

GPT2_SIZE = 50257


class Model(NamedTuple):
    """What `load` gives: the network in evaluation mode, and what it was trained with."""

    net: Network
    graph: Any
    noise: Any
    tokenizer: Any


class Trained(NamedTuple):
    """What `load_trained` gives: a network in evaluation mode, what it was trained for, and its tokenizer."""

    net: Network
    objective: ScoreEntropy | D3PM | Autoregressive
    tokenizer: Any


def load(folder_or_name: str | Path, *, tokenizer: Any = None) -> Model:
    """Read a checkpoint: a folder of this package, a folder in the published format, or a name on the hub.

    A run's folder stands for its `export`, or for its last checkpoint while it has none.

    Args:
        folder_or_name: for instance "runs/tiny/export" or "louaaron/sedd-small", or a RADD or MDLM one.
        tokenizer: to use in place of the folder's. A published folder has none, and GPT-2's is taken where the
            vocabulary has GPT-2's size.

    Raises:
        FileNotFoundError, ConnectionError: no such folder, and no such name on the hub or no hub.
        ValueError: the config, the weights and the tokenizer do not fit each other, or the network is no score model.
    """
    net, objective, tokenizer = load_trained(folder_or_name, tokenizer=tokenizer)
    if isinstance(net, Causal) or not isinstance(objective, ScoreEntropy):
        raise ValueError(
            f"{folder_or_name} was trained for {net.sections['objective']['type']}, and is no score model: read it by "
            "sedd_train.load_trained"
        )
    return Model(net, objective.graph, objective.noise, tokenizer)


def load_trained(folder_or_name: str | Path, *, tokenizer: Any = None) -> Trained:
    """Read any checkpoint: those that `load` reads, and those of other objectives that the training script wrote.

    Args and errors are those of `load`.
    """
    source = _folder(Path(folder_or_name)) if Path(folder_or_name).is_dir() else folder_or_name
    net = from_pretrained(source)
    config = net.sections
    for name in ("graph", "noise"):
        if not isinstance(config.get(name), dict) or "type" not in config[name]:
            raise ValueError(f"{source}: config.json does not say which {name} the network was trained with")
    graph = make_graph(config["graph"]["type"], int(config.get("tokens", 0)) or net.num_states)
    if graph.num_states != net.num_states:
        raise ValueError(
            f"{source}: config.json names {config.get('tokens')} tokens and the {config['graph']['type']} graph, which "
            f"makes {graph.num_states} states, but the weights have {net.num_states}"
        )
    objective = make_objective(config.get("objective", {"type": "score-entropy"}), graph, make_noise(config["noise"]))
    vocabulary = graph.num_states - (graph.mask_id is not None)
    if tokenizer is None:
        if isinstance(source, Path) and (source / "tokenizer.json").exists():
            tokenizer = tokenizers.load_tokenizer(str(source))
        elif vocabulary == GPT2_SIZE:
            tokenizer = tokenizers.load_tokenizer("gpt2")
        else:
            raise ValueError(
                f"{source} has no tokenizer.json and {vocabulary} tokens, which is not GPT-2's {GPT2_SIZE}: give the "
                "tokenizer it was trained with, load(..., tokenizer=...)"
            )
    if len(tokenizer) != vocabulary:
        raise ValueError(
            f"{source} was trained on a vocabulary of {vocabulary} tokens, and the tokenizer has {len(tokenizer)}: it "
            "is another model's; give the one it was trained with"
        )
    return Trained(net, objective, tokenizer)


def _folder(folder: Path) -> Path:
    """Where in a run's folder the model is; any other folder itself."""
    if (folder / "config.json").exists():
        return folder
    if (folder / "export" / "config.json").exists():
        return folder / "export"
    latest = folder / "checkpoints" / "latest"
    return latest.parent / latest.read_text().strip() if latest.exists() else folder


def make_graph(kind: str, vocab_size: int) -> Absorbing | Uniform:
    """The graph that a published config calls `absorb` or `uniform`.

    Raises:
        ValueError: another kind.
    """
    if kind == "absorb":
        return Absorbing(vocab_size)
    if kind == "uniform":
        return Uniform(vocab_size)
    raise ValueError(f"graph type {kind!r}: expected 'absorb' or 'uniform'")


def make_net(recipe: Recipe, num_states: int) -> SEDD | RADD | MDLM | Causal:
    """A fresh network of a recipe's kind and sizes."""
    sizes: dict[str, Any] = {name: getattr(recipe, name) for name in ("width", "depth", "heads", "dropout", "length")}
    if recipe.network == "radd":
        return RADD(num_states, **sizes)
    if recipe.network == "mdlm":
        return MDLM(num_states, cond_dim=recipe.cond_dim, **sizes)
    if recipe.network == "causal":
        return Causal(num_states, **sizes)
    return SEDD(num_states, cond_dim=recipe.cond_dim, scale_by_sigma=recipe.scale_by_sigma, **sizes)


def make_objective(section: dict[str, Any], graph: Any, noise: Any) -> ScoreEntropy | D3PM | Autoregressive:
    """The objective that a config's `objective` section describes.

    Raises:
        ValueError: another kind.
    """
    if section["type"] == "score-entropy":
        return ScoreEntropy(graph, noise)
    if section["type"] == "d3pm":
        return D3PM(graph, noise, int(section["steps"]))
    if section["type"] == "autoregressive":
        return Autoregressive(start=graph.mask_id)
    raise ValueError(f"objective {section['type']!r}: expected 'score-entropy', 'd3pm' or 'autoregressive'")


def make_noise(section: dict[str, Any]) -> LogLinear | Geometric:
    """The schedule that a published config's `noise` section describes.

    Raises:
        ValueError: another kind.
    """
    if section["type"] == "loglinear":
        return LogLinear(eps=float(section.get("eps", 1e-3)))
    if section["type"] == "geometric":
        return Geometric(sigma_min=float(section["sigma_min"]), sigma_max=float(section["sigma_max"]))
    raise ValueError(f"noise type {section['type']!r}: expected 'loglinear' or 'geometric'")


def sections(recipe: Recipe, *, tokens: int) -> dict[str, Any]:
    """What a published config.json says beside the network's sizes; `load` reads it back."""
    objective: dict[str, Any] = {"type": recipe.objective}
    if recipe.objective == "d3pm":
        objective["steps"] = recipe.d3pm_steps
    return {
        "tokens": tokens,
        "objective": objective,
        "graph": {"type": recipe.graph},
        "noise": {"type": recipe.noise, "sigma_min": recipe.sigma_min, "sigma_max": recipe.sigma_max},
    }
