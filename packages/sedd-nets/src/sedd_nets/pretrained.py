"""Checkpoints on disk and on the Hugging Face hub: a folder with config.json and model.safetensors.

config.json is nested as in the published SEDD checkpoints: `model` (hidden_size, cond_dim, length, n_blocks, n_heads,
scale_by_sigma, dropout) beside `tokens`, `graph`, `noise` and whatever else its writer wanted kept; other published
layouts are read as well (`sedd_nets.config`). The network reads and writes `model`, and the mask in `graph`; the other
sections pass through as plain dicts for whoever builds the graph and the schedule.

The files themselves are found, read and written by `sedd_nets.files`. Loading is strict: every missing key, extra key
and different shape is named before anything is allocated.
"""

from __future__ import annotations

import copy
import json
import os
import re
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, Unpack

import torch
from huggingface_hub import HfApi
from torch import Tensor, nn

from sedd_nets.conditioning import LabelCondition, PromptCondition, condition_from_section
from sedd_nets.config import family_of, integer, number, one_layout, section
from sedd_nets.files import CONFIG, HubOptions, Source, read_json, read_weights, write_checkpoint

__all__ = ["Pretrained", "read_checkpoint", "read_config", "sizes_of"]

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Tokenizer(Protocol):
    """What `push_to_hub` asks of a tokenizer."""

    def save_pretrained(self, folder: str, /) -> Any:
        """Write its files into the folder."""


class Pretrained(nn.Module, ABC):
    """A network that is read from a checkpoint and written as one.

    Attributes:
        key_prefix: what stands before every key in the family's files.
        sections: see `Transformer`.
        condition_embed: the same.
        cond_dim: the same.
    """

    key_prefix: ClassVar[str] = ""
    num_states: int
    sections: dict[str, Any]
    condition_embed: LabelCondition | PromptCondition | None
    cond_dim: int | None

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any], num_states: int) -> Self:
        """A fresh network of the sizes in a nested config (`sedd_nets.config`). Raises ValueError for a wrong value."""

    @abstractmethod
    def model_section(self) -> dict[str, Any]:
        """The sizes as the published config.json's `model` section names them."""

    def graph_section(self) -> dict[str, Any] | None:
        """What config.json says of the graph, where the parameterisation allows one kind only; else None."""
        return None

    @classmethod
    def from_pretrained(cls, folder_or_name: str | os.PathLike[str], **hub: Unpack[HubOptions]) -> Self:
        """The network of a checkpoint folder or of a repository on the Hugging Face hub, in evaluation mode.

        Args:
            folder_or_name: a folder with config.json and weights, or a hub name.
            hub: revision, token, cache_dir, local_files_only; see `sedd_nets.files.HubOptions`.

        Raises:
            FileNotFoundError: no such folder or repository, or a file is missing in it.
            ConnectionError: no such folder, and the hub cannot be reached.
            ValueError: the config is another family's or holds a wrong value, or the weights do not match it key by
                key and shape by shape, or are no finite numbers.
        """
        config, stored = read_checkpoint(Source(folder_or_name, **hub))
        return cls.from_checkpoint(config, stored, source=os.fspath(folder_or_name))

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], stored: Mapping[str, Tensor], *, source: str) -> Self:
        """The network of a checkpoint already read; `source` names it in errors (ValueError, as `from_pretrained`)."""
        family = family_of(config, stored)
        if family not in (base.__name__ for base in cls.__mro__):
            raise ValueError(
                f"{source} is not {cls.__name__}'s: its config.json and the names of its weights are {family}'s"
            )
        state = cls.own_keys(stored)
        table = "vocab_embed.embedding"
        if table not in state or state[table].ndim != 2:
            raise ValueError(
                f"{source} holds no {table} of shape (states, width): these are not the weights of {cls.__name__}. "
                "It begins with " + ", ".join(sorted(stored)[:3])
            )
        _check_depth(config, state, source)
        with torch.device("meta"):  # shapes alone, whatever the config asks for
            fresh = cls.from_config(config, len(state[table]))
            condition = section(section(config, "model"), "condition", default={})
            if condition and fresh.cond_dim is not None:
                fresh.condition_embed = condition_from_section(condition, fresh.cond_dim)
        _check_states(config, fresh.num_states, source)
        fill_strictly(fresh, state, source=source)
        fresh.sections |= {name: copy.deepcopy(value) for name, value in config.items() if name != "model"}
        if (graph := fresh.graph_section()) is not None:
            fresh.sections.setdefault("graph", graph)
        return fresh.eval()

    @classmethod
    def own_keys(cls, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors by the names that the network has for them; `backbone.` before them is the publisher's."""
        return {key.removeprefix("backbone."): value for key, value in stored.items()}

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        sections: Mapping[str, Any] | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write config.json and model.safetensors in the published format, each replaced atomically.

        Args:
            folder: created if need be.
            sections: top-level entries of config.json besides `model`, such as
                {"tokens": 50257, "graph": {"type": "absorb"}, "noise": {"type": "loglinear"}}; added to, or in place
                of, `self.sections`. Values must be JSON.
            state_dict: weights to write instead of the network's own: an average, or shards gathered elsewhere.

        Raises:
            ValueError: `sections` brings a `model` or another mask than the network's, or `state_dict` is not this
                network's.
            OSError: the folder cannot be written; what it held before is intact.

        Warns:
            UserWarning: neither `sections` nor `self.sections` says which graph or schedule the network belongs to.
        """
        config = self.config_json(sections)
        own = self.state_dict()
        state = own if state_dict is None else state_dict
        if state.keys() != own.keys():
            raise ValueError(f"state_dict is not this network's; keys that differ: {sorted(state.keys() ^ own.keys())}")
        if unsaid := _unsaid(config):
            warnings.warn(
                f"config.json in {os.fspath(folder)} will not say which {' and '.join(unsaid)} the network was trained "
                f"with: give sections={{{', '.join(f'{name!r}: {{...}}' for name in unsaid)}}}",
                stacklevel=2,
            )
        write_checkpoint(folder, config, {self.key_prefix + key: value for key, value in state.items()})

    def config_json(self, sections: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What `save_pretrained` writes into config.json. Raises ValueError as it does."""
        if sections is not None and "model" in sections:
            raise ValueError("`sections` may not hold `model`: the network writes that one")
        config = {**copy.deepcopy(self.sections), **(sections or {})}
        if (own := self.graph_section()) is not None:
            told, last = config.get("graph", own), self.num_states - 1
            mask = told.get("mask_id", own.get("mask_id", last))
            if told.get("type") != own["type"] or mask != own.get("mask_id", last):
                raise ValueError(f"sections say that the graph is {told}, and this {type(self).__name__} has {own}")
            config["graph"] = told | own
        model = self.model_section()
        if self.condition_embed is not None:
            model["condition"] = self.condition_embed.section()
        return config | {"model": model}

    def push_to_hub(
        self,
        name: str,
        *,
        tokenizer: Tokenizer | None = None,
        sections: Mapping[str, Any] | None = None,
        private: bool | None = None,
        token: str | None = None,
        message: str = "Upload the network",
    ) -> str:
        """Upload a checkpoint to the hub repository `name`, created if need be: config, weights, tokenizer, model card.

        Args:
            name: "owner/repository".
            tokenizer: written beside the network; anything with transformers' `save_pretrained`.
            sections: as for `save_pretrained`.
            private: whether a new repository is private; None leaves it to the owner's default.
            token: a token with write access; the one of `hf auth login` unless given.
            message: of the commit.

        Returns:
            The commit's address.

        Raises:
            ValueError: as `save_pretrained`; or graph or schedule are not said, without which nobody can use it.
            huggingface_hub.errors.HfHubHTTPError: the hub refuses.
        """
        if unsaid := _unsaid(self.config_json(sections)):
            raise ValueError(
                f"nobody could use {name}: its config.json would not say which {' and '.join(unsaid)} the network was "
                "trained with; give sections="
            )
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, sections=sections)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            Path(folder, "README.md").write_text(self.model_card(name, sections), encoding="utf-8")
            api = HfApi(token=token)
            api.create_repo(name, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message=message).commit_url)

    def model_card(self, name: str, sections: Mapping[str, Any] | None = None) -> str:
        """What the hub shows of the repository: what the network is, and how to read it."""
        config = self.config_json(sections)
        parameters = sum(parameter.numel() for parameter in self.parameters())
        return f"""---
library_name: sedd-nets
tags: [discrete-diffusion, score-entropy, {type(self).__name__.lower()}]
---

# {name}

A discrete diffusion model: {type(self).__name__} of {parameters:,} parameters over {self.num_states} states.

| | |
|---|---|
| graph | `{json.dumps(config.get("graph"))[:500]}` |
| noise | `{json.dumps(config.get("noise"))[:500]}` |
| network | `{json.dumps(config["model"])}` |

```python
from sedd_train import load

net, graph, noise, tokenizer = load("{name}")  # or sedd_nets.from_pretrained("{name}"), the network alone
```
"""


def _unsaid(config: Mapping[str, Any]) -> list[str]:
    """Which of the sections that make a score model usable the config lacks."""
    objective = config.get("objective", {})
    if config["model"].get("type") == "causal" or objective.get("type", "score-entropy") != "score-entropy":
        return []  # another model than a score, which its writer has named
    return [name for name in ("graph", "noise") if name not in config]


def sizes_of(config: Mapping[str, Any], *also: str) -> dict[str, Any]:
    """The arguments that every family takes, and `also`, from the `model` section; dropout is 0 where it is not told.

    Raises:
        ValueError: one is missing, no whole number or out of range, named as in config.json.
    """
    model = section(config, "model")
    sizes = {"width": "hidden_size", "depth": "n_blocks", "heads": "n_heads", "length": "length"}
    wanted = sizes | {name: name for name in also}
    found: dict[str, Any] = {argument: integer(model, name) for argument, name in wanted.items()}
    return found | {"dropout": number(model, "dropout", default=0.0, below=1.0)}


def read_checkpoint(source: Source) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config in its one layout and the weights, of one commit. Raises as `Pretrained.from_pretrained`."""
    path = source.file(CONFIG)
    return one_layout(read_json(path)), read_weights(source.pinned(path))


def read_config(folder_or_name: str | os.PathLike[str], **hub: Unpack[HubOptions]) -> dict[str, Any]:
    """The config.json of a folder, or of a repository on the hub, as it is written there.

    Args:
        folder_or_name: a folder with config.json, or a hub name.
        hub: revision, token, cache_dir, local_files_only; see `sedd_nets.files.HubOptions`.

    Raises:
        FileNotFoundError: neither a folder with that file nor a repository on the hub.
        ConnectionError: no such folder, and the hub cannot be reached.
        ValueError: the file holds no JSON object.
    """
    return read_json(Source(folder_or_name, **hub).file(CONFIG))


def _check_depth(config: Mapping[str, Any], state: Mapping[str, Tensor], source: str) -> None:
    """The config's number of blocks is the weights', before that many are built."""
    depth = integer(section(config, "model"), "n_blocks")
    numbers = {found[1] for key in state if (found := re.match(r"blocks\.(\d+)\.", key))}
    if depth > len(numbers):
        raise ValueError(f"{source}: config.json says n_blocks {depth}, and the weights hold {len(numbers)} blocks")


def _check_states(config: Mapping[str, Any], num_states: int, source: str) -> None:
    """`graph`, `noise` and `tokens` are what such sections are, and agree with the number of states."""
    graph = section(config, "graph", default={})
    section(config, "noise", default={})
    if "mask_id" in graph:
        integer(graph, "mask_id", least=0, most=num_states - 1)
    if "tokens" in config and graph.get("type") in ("absorb", "uniform"):
        states = integer(config, "tokens") + (graph["type"] == "absorb")
        if states != num_states:
            raise ValueError(
                f"{source}: config.json says {config['tokens']} tokens and the {graph['type']} graph, which make "
                f"{states} states, and the weights have {num_states}"
            )


def fill_strictly(net: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Give a network built on the meta device copies of `state`; every key and shape must match.

    Raises:
        ValueError: keys are missing or left over, shapes differ, or values are no finite floating-point numbers; all
            are named, with `source`.
    """
    own = net.state_dict()
    missing = sorted(own.keys() - state.keys())
    extra = sorted(state.keys() - own.keys())
    shared = [key for key in own if key in state]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in shared
        if state[key].shape != own[key].shape
    ]
    kinds = [f"{key} ({state[key].dtype})" for key in shared if state[key].dtype not in DTYPES]
    complaints = {"missing keys": missing, "extra keys": extra, "other shapes": shapes, "no floating point": kinds}
    if any(complaints.values()):
        told = "; ".join(f"{what}: {', '.join(found)}" for what, found in complaints.items() if found)
        raise ValueError(f"{source} does not hold the weights of this {type(net).__name__}. {told}")
    if wild := [key for key in own if not state[key].isfinite().all()]:
        raise ValueError(f"{source}: not all numbers are finite in {', '.join(wild)}")
    copies = {key: state[key].to(own[key].dtype, copy=True, memory_format=torch.contiguous_format) for key in own}
    net.load_state_dict(copies, assign=True)
