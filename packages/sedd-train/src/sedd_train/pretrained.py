"""A trained model as a whole: network, graph, noise schedule and tokenizer, from one folder or published name.

`load` gives score models, the paper's and those whose score is known. `load_trained` gives whatever the training script
made, baselines included, as a network and its objective.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple, Unpack

from sedd_nets import MDLM, RADD, SEDD, UDLM, Causal, from_pretrained
from sedd_nets.config import integer, section, text
from sedd_nets.families import ConditionalTransformer
from sedd_nets.files import HubOptions, Source
from sedd_nets.loading import Network

from sedd_train import tokenizers
from sedd_train.objectives import D3PM, Autoregressive, ScoreEntropy
from sedd_train.recipes import Recipe
from sedd_train.sections import MASKING, described, graph_section, make_noise, noise_section, read_graph

__all__ = [
    *("Model", "load", "Trained", "load_trained"),
    *("make_graph", "make_net", "make_objective", "make_schedule", "check_states", "sections", "folder_of"),
]

GPT2_PADDED = 50258  # with the [PAD] that Duo's trainer adds
BY_SIZE = {50257: "gpt2", GPT2_PADDED: "gpt2", 30522: "bert-base-uncased", 28996: "bert-base-cased"}


class Model(NamedTuple):
    """A network and what it was trained with: what `load` gives, and what can be written for it to read."""

    net: Network
    graph: Any
    noise: Any
    tokenizer: Any

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `load` reads: config.json with graph and schedule, weights, and the tokenizer.

        Raises:
            ValueError: the graph has another number of states than the network, or another mask.
            OSError: the folder cannot be written.
        """
        self.net.save_pretrained(folder, sections=self.sections())
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(str(folder))

    def push_to_hub(self, name: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload that folder with a model card to the hub repository "owner/name", created if need be.

        Args:
            name: of the repository.
            private: whether a new repository is private; None leaves it to the owner's default.
            token: a token with write access; the one of `hf auth login` unless given.

        Returns:
            The commit's address.

        Raises:
            ValueError: as `save_pretrained`.
            huggingface_hub.errors.HfHubHTTPError: the hub refuses.
        """
        given: dict[str, Any] = {"private": private, "token": token}
        return self.net.push_to_hub(name, tokenizer=self.tokenizer, sections=self.sections(), **given)

    def sections(self) -> dict[str, Any]:
        """What config.json says beside the network's sizes. Raises ValueError where graph and network do not fit."""
        if self.graph.num_states != self.net.num_states:
            raise ValueError(f"{self.graph} has {self.graph.num_states} states, and the network {self.net.num_states}")
        tokens = self.graph.num_states - (self.graph.mask_id is not None)
        return {"tokens": tokens, "graph": graph_section(self.graph), "noise": noise_section(self.noise)}


class Trained(NamedTuple):
    """What `load_trained` gives: a network in evaluation mode, what it was trained for, and its tokenizer."""

    net: Network
    objective: ScoreEntropy | D3PM | Autoregressive
    tokenizer: Any


def load(
    folder_or_name: str | Path,
    *,
    tokenizer: Any = None,
    graph: Any = None,
    noise: Any = None,
    **hub: Unpack[HubOptions],
) -> Model:
    """Read a checkpoint: a folder of this package, a folder in a published layout, or a name on the hub.

    A run's folder stands for its `export`, or for its last checkpoint while it has none. No code of a checkpoint runs.

    Args:
        folder_or_name: for instance "runs/tiny/export" or "louaaron/sedd-small", or a RADD, MDLM, UDLM, Duo or BD3LM
            one.
        tokenizer: to use in place of the checkpoint's. Where it has none, GPT-2's or BERT's is taken by the size of the
            vocabulary.
        graph: for a checkpoint that was made with a graph that config.json cannot describe.
        noise: the same of its schedule.
        hub: revision, token, cache_dir, local_files_only; see `sedd_nets.files.HubOptions`.

    Raises:
        FileNotFoundError, ConnectionError: no such folder, and no such name on the hub or no hub.
        ValueError: config.json holds a wrong value; config, weights and tokenizer do not fit each other; or the network
            is no score model.
    """
    net, objective, tokenizer = load_trained(folder_or_name, tokenizer=tokenizer, graph=graph, noise=noise, **hub)
    if isinstance(net, Causal) or not isinstance(objective, ScoreEntropy):
        raise ValueError(
            f"{folder_or_name} was trained for {type(objective).__name__}, and is no score model: read it by "
            "sedd_train.load_trained"
        )
    return Model(net, objective.graph, objective.noise, tokenizer)


def load_trained(
    folder_or_name: str | Path,
    *,
    tokenizer: Any = None,
    graph: Any = None,
    noise: Any = None,
    **hub: Unpack[HubOptions],
) -> Trained:
    """Read any checkpoint: those that `load` reads, and those of other objectives that the training script wrote.

    Args and errors are those of `load`.
    """
    source = Source(folder_of(folder_or_name), **hub)
    net = from_pretrained(source.name, **hub)
    if tokenizer is None:
        tokenizer = tokenizers.read_tokenizer(source) or _tokenizer_by_size(net, source)
    _take_mask_of(tokenizer, net)
    config = net.sections
    for name, given in (("graph", graph), ("noise", noise)):
        if given is None and name not in config:
            raise ValueError(
                f"{source.name}: config.json does not say which {name} the network was trained with; give it: "
                f"load(..., {name}=...)"
            )
    graph = read_graph(section(config, "graph"), net.num_states) if graph is None else graph
    noise = make_noise(section(config, "noise")) if noise is None else noise
    if graph.num_states != net.num_states:
        raise ValueError(f"{graph} has {graph.num_states} states, and the network of {source.name} {net.num_states}")
    own_mask = getattr(net, "mask_id", graph.mask_id)
    if own_mask != graph.mask_id:
        raise ValueError(f"{graph} has its mask at {graph.mask_id}, and the network of {source.name} at {own_mask}")
    objective = make_objective(section(config, "objective", default={"type": "score-entropy"}), graph, noise)
    _check_vocabulary(tokenizer, graph, source)
    return Trained(net, objective, tokenizer)


def folder_of(name: str | Path) -> str | Path:
    """Where in a run's folder the model is; any other folder, or a name on the hub, itself."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    if (folder / "config.json").exists():
        return folder
    if (folder / "export" / "config.json").exists():
        return folder / "export"
    latest = folder / "checkpoints" / "latest"
    if not latest.exists():
        return folder
    name = latest.read_bytes()[:100].decode(errors="replace").strip()
    if not re.fullmatch(r"step-[\w.-]+", name):
        raise ValueError(f"{latest} names {name!r}, and a run's checkpoints are folders step-... beside it")
    return latest.parent / name


def _tokenizer_by_size(net: Network, source: Source) -> Any:
    """The tokenizer that a published checkpoint without one was trained with, by the size of its vocabulary."""
    graph, last = net.sections.get("graph", {}), net.num_states - 1
    all_tokens = graph.get("type") == "uniform" or graph.get("mask_id", last) != last
    size = net.num_states if all_tokens else last
    if size not in BY_SIZE:
        sizes = ", ".join(f"{name}'s {size}" for size, name in BY_SIZE.items())
        raise ValueError(
            f"{source.name} has no tokenizer.json and {size} tokens, which is none of {sizes}: give the tokenizer it "
            "was trained with, load(..., tokenizer=...)"
        )
    if size == GPT2_PADDED:
        padded = tokenizers.load_tokenizer("gpt2")
        padded.add_special_tokens({"pad_token": "[PAD]"})
        return padded
    return tokenizers.load_tokenizer(BY_SIZE[size])


def _take_mask_of(tokenizer: Any, net: Network) -> None:
    """The mask is the tokenizer's own where the states are its tokens and config.json says nothing else."""
    mask = getattr(tokenizer, "mask_token_id", None)
    tokens = tokenizers.num_tokens(tokenizer)
    if isinstance(net, ConditionalTransformer) and mask is not None and tokens == net.num_states:
        net.mask_id = net.sections["graph"].setdefault("mask_id", mask)


def _check_vocabulary(tokenizer: Any, graph: Any, source: Source) -> None:
    """A tokenizer has a token for each state: for the mask, too, where that is none of its last."""
    vocabulary = graph.num_states - (graph.mask_id is not None)
    tokens = tokenizers.num_tokens(tokenizer)
    inside = tokens == graph.num_states and getattr(tokenizer, "mask_token_id", None) == graph.mask_id
    if tokens != vocabulary and not (inside and graph.mask_id is not None):
        raise ValueError(
            f"{source.name} was trained on a vocabulary of {vocabulary} tokens, and the tokenizer has "
            f"{tokens}: it is another model's; give the one it was trained with"
        )
    middle = graph.mask_id is not None and graph.mask_id < vocabulary
    if middle and tokens == vocabulary and graph.mask_id in tokenizer.get_vocab().values():
        raise ValueError(
            f"the mask of {source.name} is state {graph.mask_id}, and the tokenizer has a token there: it is another "
            "model's, or the mask is; give graph= or tokenizer="
        )


def make_graph(word: str, tokenizer: Any) -> Any:
    """The graph that a recipe names, over a tokenizer's tokens and, where it masks, a mask.

    Args:
        word: see `sedd_train.sections`.
        tokenizer: where its own mask is the graph's there is no state besides; or the number of tokens.

    Raises:
        ValueError: another kind, or a value that makes no such graph.
    """
    told = described("graph", word)
    if told["type"] == "own":
        raise ValueError(f"the graph {told['is']} cannot be made from a recipe: give it, train(..., graph=...)")
    tokens = tokenizer if isinstance(tokenizer, int) else tokenizers.num_tokens(tokenizer)
    inside = told.get("mask_id") is not None and told["mask_id"] == getattr(tokenizer, "mask_token_id", None)
    try:
        return read_graph(told, tokens + (told["type"] in MASKING and not inside))
    except ValueError as error:
        raise ValueError(f"graph = {word!r}: {str(error).removeprefix('config.json: ')}") from None


def check_states(graph: Any, tokenizer: Any) -> None:
    """A graph has a state for each token of a tokenizer, and a mask besides or among them, or none. Else ValueError."""
    states, masks = tokenizers.num_tokens(tokenizer), graph.mask_id is not None
    inside = masks and graph.mask_id == getattr(tokenizer, "mask_token_id", None)
    if graph.num_states not in ([states] if inside or not masks else [states + 1]):
        raise ValueError(
            f"{graph} has {graph.num_states} states, and the tokenizer {states} tokens"
            + (f", none of which is its mask {graph.mask_id}" if masks and not inside else "")
        )


def make_schedule(recipe: Recipe) -> Any:
    """The noise schedule that a recipe names.

    Raises:
        ValueError: another kind, or a value that makes no such schedule.
    """
    ends = {"sigma_min": recipe.sigma_min, "sigma_max": recipe.sigma_max}
    told = ends | described("noise", recipe.noise)
    if told["type"] == "own":
        raise ValueError(f"the schedule {told['is']} cannot be made from a recipe: give it, train(..., noise=...)")
    try:
        return make_noise(told)
    except ValueError as error:
        raise ValueError(f"noise = {recipe.noise!r}: {str(error).removeprefix('config.json: ')}") from None


def make_net(recipe: Recipe, num_states: int) -> SEDD | RADD | MDLM | UDLM | Causal:
    """A fresh network of a recipe's kind and sizes."""
    sizes: dict[str, Any] = {name: getattr(recipe, name) for name in ("width", "depth", "heads", "dropout", "length")}
    if recipe.network == "radd":
        return RADD(num_states, **sizes)
    if recipe.network == "mdlm":
        return MDLM(num_states, cond_dim=recipe.cond_dim, **sizes)
    if recipe.network == "udlm":
        return UDLM(num_states, cond_dim=recipe.cond_dim, **sizes)
    if recipe.network == "causal":
        return Causal(num_states, **sizes)
    return SEDD(num_states, cond_dim=recipe.cond_dim, scale_by_sigma=recipe.scale_by_sigma, **sizes)


def make_objective(described: dict[str, Any], graph: Any, noise: Any) -> ScoreEntropy | D3PM | Autoregressive:
    """The objective that a config's `objective` section describes.

    Raises:
        ValueError: another kind, or a wrong value.
    """
    kind = text(described, "type")
    if kind == "score-entropy":
        return ScoreEntropy(graph, noise)
    if kind == "d3pm":
        return D3PM(graph, noise, integer(described, "steps"))
    if kind == "autoregressive":
        return Autoregressive(start=graph.mask_id)
    raise ValueError(f"objective {kind!r:.100}: expected 'score-entropy', 'd3pm' or 'autoregressive'")


def sections(recipe: Recipe, graph: Any, noise: Any) -> dict[str, Any]:
    """What a published config.json says beside the network's sizes; `load` reads it back."""
    objective: dict[str, Any] = {"type": recipe.objective}
    if recipe.objective == "d3pm":
        objective["steps"] = recipe.d3pm_steps
    return {
        "tokens": graph.num_states - (graph.mask_id is not None),
        "objective": objective,
        "graph": graph_section(graph),
        "noise": {"sigma_min": recipe.sigma_min, "sigma_max": recipe.sigma_max} | noise_section(noise),
    }
