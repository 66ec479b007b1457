"""Checkpoints on disk and on the Hugging Face hub: a folder with config.json and model.safetensors.

config.json is nested as in the published SEDD checkpoints: `model` (hidden_size, cond_dim, length, n_blocks, n_heads,
scale_by_sigma, dropout) beside `tokens`, `graph`, `noise` and whatever else its writer wanted kept. The network reads
and writes `model`; the other sections pass through as plain dicts for whoever builds the graph and the schedule.
Loading is strict: every missing key, extra key and different shape is named.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from torch import Tensor, nn

__all__ = ["load_strictly", "model_section_of", "read_config", "read_weights", "write_checkpoint"]

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
OLDER_WEIGHTS = "pytorch_model.bin"


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


def model_section_of(config: Mapping[str, Any], family: str, needed: tuple[str, ...]) -> dict[str, Any]:
    """The `model` section of a published config.

    Raises:
        ValueError: the config has none, or it lacks what this family needs: another architecture's config.
    """
    model = config.get("model")
    if not isinstance(model, dict):
        kind = config.get("model_type") or config.get("architectures") or sorted(config)
        raise ValueError(f"this config.json is not {family}'s: it has no `model` section, but describes {kind}")
    if lacking := [name for name in needed if name not in model]:
        raise ValueError(f"this config.json is not {family}'s: its `model` section lacks {', '.join(lacking)}")
    return model


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
