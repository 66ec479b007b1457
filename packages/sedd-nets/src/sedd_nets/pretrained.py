"""Checkpoints on disk and on the Hugging Face hub: a folder with config.json and model.safetensors.

config.json is nested as in the published SEDD checkpoints: `model` (hidden_size, cond_dim, length, n_blocks, n_heads,
scale_by_sigma, dropout) beside `tokens`, `graph`, `noise` and whatever else its writer wanted kept. The network reads
and writes `model`; the other sections pass through as plain dicts for whoever builds the graph and the schedule.
Loading is strict: every missing key, extra key and different shape is named.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import safetensors.torch
import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from torch import Tensor, nn

from sedd_nets.conditioning import LabelCondition, PromptCondition, condition_from_section

__all__ = ["Pretrained", "model_section_of", "read_config", "read_weights", "write_checkpoint"]

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
OLDER_WEIGHTS = "pytorch_model.bin"
SIZES = {"width": "hidden_size", "depth": "n_blocks", "heads": "n_heads", "length": "length"}


class Pretrained(nn.Module, ABC):
    """A network that is read from a checkpoint and written as one.

    Attributes:
        key_prefix: what stands before every key in the family's files.
        sections: see `Transformer`.
        condition_embed: the same.
        cond_dim: the same.
    """

    key_prefix: ClassVar[str] = ""
    sections: dict[str, Any]
    condition_embed: LabelCondition | PromptCondition | None
    cond_dim: int | None

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any], num_states: int) -> Self:
        """A fresh network of the sizes that a checkpoint's config gives. Raises ValueError for another family's."""

    @abstractmethod
    def model_section(self) -> dict[str, Any]:
        """The sizes as the published config.json's `model` section names them."""

    @classmethod
    def from_pretrained(cls, folder_or_name: str | os.PathLike[str], *, revision: str | None = None) -> Self:
        """The network of a checkpoint folder or of a repository on the Hugging Face hub, in evaluation mode.

        Args:
            folder_or_name: a folder with config.json and model.safetensors, or a hub name.
            revision: branch, tag or commit on the hub.

        Raises:
            FileNotFoundError: no such folder or repository, or a file is missing in it.
            ConnectionError: no such folder, and the hub cannot be reached.
            ValueError: the config is another family's, or the weights do not match it key by key and shape by shape.
        """
        config = read_config(folder_or_name, revision=revision)
        return cls.from_checkpoint(
            config, read_weights(folder_or_name, revision=revision), source=os.fspath(folder_or_name)
        )

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], stored: Mapping[str, Tensor], *, source: str) -> Self:
        """The network of a checkpoint already read; `source` names it in errors (ValueError, as `from_pretrained`)."""
        table = cls.key_prefix + "vocab_embed.embedding"
        fresh = cls.from_config(config, len(stored[table]) if table in stored else 1)
        if table not in stored:
            raise ValueError(
                f"{source} holds no {table}: these are not the weights of {cls.__name__}. It begins with "
                + ", ".join(sorted(stored)[:3])
            )
        condition = config.get("model", {}).get("condition")
        if condition is not None and fresh.cond_dim is not None:
            fresh.condition_embed = condition_from_section(condition, fresh.cond_dim)
        load_strictly(fresh, {key.removeprefix(cls.key_prefix): value for key, value in stored.items()}, source=source)
        fresh.sections |= {name: copy.deepcopy(value) for name, value in config.items() if name != "model"}
        return fresh.eval()

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
            ValueError: `sections` brings a `model`, or `state_dict` is not this network's.
            OSError: the folder cannot be written; what it held before is intact.
        """
        if sections is not None and "model" in sections:
            raise ValueError("`sections` may not hold `model`: the network writes that one")
        own = self.state_dict()
        state = own if state_dict is None else state_dict
        if state.keys() != own.keys():
            raise ValueError(f"state_dict is not this network's; keys that differ: {sorted(state.keys() ^ own.keys())}")
        model = self.model_section()
        if self.condition_embed is not None:
            model["condition"] = self.condition_embed.section()
        config = {**self.sections, **(sections or {}), "model": model}
        write_checkpoint(folder, config, {self.key_prefix + key: value for key, value in state.items()})

    def push_to_hub(
        self,
        name: str,
        *,
        sections: Mapping[str, Any] | None = None,
        private: bool | None = None,
        token: str | None = None,
        message: str = "Upload the network",
    ) -> str:
        """Upload what `save_pretrained` writes to the hub repository `name`, created if need be.

        Args:
            name: "owner/repository".
            sections: as for `save_pretrained`.
            private: whether a new repository is private; None leaves it to the owner's default.
            token: a token with write access; the one of `hf auth login` unless given.
            message: of the commit.

        Returns:
            The commit's address.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: the hub refuses.
        """
        api = HfApi(token=token)
        api.create_repo(name, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, sections=sections)
            return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message=message).commit_url)


def read_config(folder_or_name: str | os.PathLike[str], *, revision: str | None = None) -> dict[str, Any]:
    """The config.json of a folder, or of a repository on the hub, as it is written there.

    Raises:
        FileNotFoundError: neither a folder with that file nor a repository on the hub.
        ConnectionError: no such folder, and the hub cannot be reached.
        ValueError: the file holds no JSON object.
    """
    path = fetch(folder_or_name, CONFIG, revision)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}; a checkpoint's config is a JSON object")
    return config


def read_weights(folder_or_name: str | os.PathLike[str], *, revision: str | None = None) -> dict[str, Tensor]:
    """The tensors of model.safetensors (or, where there is none, of an older pytorch_model.bin), on the CPU.

    Raises:
        FileNotFoundError, ConnectionError: as `read_config`.
        ValueError: the file is damaged.
    """
    try:
        path = fetch(folder_or_name, WEIGHTS, revision)
    except FileNotFoundError:
        try:
            older = fetch(folder_or_name, OLDER_WEIGHTS, revision)
        except FileNotFoundError:
            older = None
        if older is None:
            raise
        weights: dict[str, Tensor] = torch.load(older, map_location="cpu", weights_only=True)
        return weights
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): copy or download it again") from error


def fetch(folder_or_name: str | os.PathLike[str], file: str, revision: str | None) -> Path:
    """The path of one file of a folder, or of a hub repository (downloaded into the hub's cache)."""
    folder = Path(folder_or_name)
    if folder.is_dir():
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} has no {file}: a checkpoint folder holds {CONFIG} and {WEIGHTS}")
        return folder / file
    name = os.fspath(folder_or_name)
    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except HFValidationError as error:
        raise FileNotFoundError(f"{name!r} is neither a folder nor a name on the Hugging Face hub") from error
    except LocalEntryNotFoundError as error:  # no answer, and the file is not in the cache
        raise unreachable(name, error) from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"{name} on the Hugging Face hub has no {file}") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{name!r} is neither a folder nor a public repository on the Hugging Face hub "
            "(private ones need `hf auth login`)"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise unreachable(name, error) from error


def unreachable(name: str, error: Exception) -> ConnectionError:
    """The error of a hub that does not answer, saying what to do."""
    return ConnectionError(
        f"{name!r} is no folder here, and the Hugging Face hub cannot be reached ({type(error).__name__}). "
        f"Check the network and HF_HUB_OFFLINE, or run `hf download {name} --local-dir FOLDER` on a machine that "
        "reaches the hub and give that FOLDER"
    )


def model_section_of(config: Mapping[str, Any], family: str, also: tuple[str, ...] = ()) -> dict[str, Any]:
    """The `model` section of a published config, with the sizes that every family has and what this one has `also`.

    Raises:
        ValueError: the config has none, or it lacks what this family needs: another architecture's config.
    """
    model = config.get("model")
    if not isinstance(model, dict):
        kind = config.get("model_type") or config.get("architectures") or sorted(config)
        raise ValueError(f"this config.json is not {family}'s: it has no `model` section, but describes {kind}")
    if lacking := [name for name in (*SIZES.values(), *also) if name not in model]:
        raise ValueError(f"this config.json is not {family}'s: its `model` section lacks {', '.join(lacking)}")
    return model


def sizes_of(model: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that every family takes, from a `model` section; dropout is 0 where it is not told."""
    return {argument: model[name] for argument, name in SIZES.items()} | {"dropout": model.get("dropout", 0.0)}


def load_strictly(net: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Copy `state` into the network; every key and shape must match.

    Raises:
        ValueError: keys are missing or left over, or shapes differ; all are named, with `source`.
    """
    own = net.state_dict()
    missing = sorted(own.keys() - state.keys())
    extra = sorted(state.keys() - own.keys())
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    complaints = [("missing keys: ", missing), ("extra keys: ", extra), ("other shapes: ", shapes)]
    if any(found for _, found in complaints):
        told = "; ".join(what + ", ".join(found) for what, found in complaints if found)
        raise ValueError(f"{source} does not hold the weights of this {type(net).__name__}. {told}")
    net.load_state_dict(dict(state))


def write_checkpoint(folder: str | os.PathLike[str], config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write config.json and model.safetensors so that a crash or a full disk leaves what was there before.

    Both are written beside their places and synchronised to disk before either is moved there.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=1)
    tensors = {key: tensor.detach().contiguous().cpu() for key, tensor in state.items()}
    temporary = {name: folder / f".{name}.{os.getpid()}.tmp" for name in (WEIGHTS, CONFIG)}
    try:
        try:
            safetensors.torch.save_file(tensors, temporary[WEIGHTS], metadata={"format": "pt"})
        except safetensors.SafetensorError as error:
            raise OSError(f"cannot write {folder / WEIGHTS}: {error}") from error
        temporary[CONFIG].write_text(text, encoding="utf-8")
        for path in temporary.values():
            synchronise(path)
        for name, path in temporary.items():
            path.replace(folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def synchronise(path: Path) -> None:
    """Wait until the file's content is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
