"""The files of a checkpoint, in a folder or in a repository on the Hugging Face hub: found, read as data, written.

Weights are model.safetensors, its shards, or an older pytorch_model.bin. No code of a checkpoint ever runs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import safetensors.torch
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import Tensor

from sedd_nets.config import section

__all__ = ["HubOptions", "Source", "read_json", "read_weights", "write_checkpoint"]

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
OLDER_WEIGHTS = "pytorch_model.bin"
LARGEST_JSON = 1 << 24  # bytes; a config takes some thousand, the index of a hundred thousand tensors some million


class HubOptions(TypedDict, total=False):
    """How a repository on the hub is reached; a folder needs none of them.

    Attributes:
        revision: branch, tag or commit; the main branch unless given.
        token: of an account that may read the repository; the one of `hf auth login` unless given, False for none.
        cache_dir: where downloads are kept; the hub's usual place unless given.
        local_files_only: whether to use what is in that cache and ask nobody.
    """

    revision: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool


class Source(NamedTuple):
    """A folder, or a repository and how to reach it; the options are those of `HubOptions`."""

    name: str | os.PathLike[str]
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False

    def file(self, *names: str) -> Path:
        """The path of the first of these files that is there, downloaded into the cache if need be.

        Raises:
            FileNotFoundError: neither a folder nor a repository with any of them; the message is about the first.
            ConnectionError: no such folder, and the hub cannot be reached.
        """
        first: OSError | None = None
        for name in names:
            try:
                return self._one(name)
            except (FileNotFoundError, ConnectionError) as error:
                first = first or error
        assert first is not None
        raise first

    def pinned(self, path: Path) -> Source:
        """This source at the commit that `path`, one of its files, belongs to; those that follow are of the same."""
        in_cache = not Path(self.name).is_dir() and path.parent.parent.name == "snapshots"
        return self._replace(revision=path.parent.name) if in_cache else self

    def _one(self, file: str) -> Path:
        folder = Path(self.name)
        if folder.is_dir():
            if not (folder / file).is_file():
                raise FileNotFoundError(f"{folder} has no {file}: a checkpoint folder holds config.json and weights")
            return folder / file
        name = os.fspath(self.name)
        try:
            return Path(
                hf_hub_download(
                    name,
                    file,
                    revision=self.revision,
                    token=self.token,
                    cache_dir=self.cache_dir,
                    local_files_only=self.local_files_only,
                )
            )
        except HFValidationError as error:
            raise FileNotFoundError(f"{name!r} is neither a folder nor a name on the Hugging Face hub") from error
        except LocalEntryNotFoundError as error:  # no answer, and the file is not in the cache
            raise _unreachable(name, error) from error
        except EntryNotFoundError as error:
            raise FileNotFoundError(f"{name} on the Hugging Face hub has no {file}") from error
        except RevisionNotFoundError as error:
            raise FileNotFoundError(f"{name} on the Hugging Face hub has no revision {self.revision!r}") from error
        except RepositoryNotFoundError as error:
            raise FileNotFoundError(
                f"{name!r} is neither a folder nor a public repository on the Hugging Face hub "
                "(private ones need `hf auth login`, or token=)"
            ) from error
        except (HfHubHTTPError, OSError) as error:
            raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> ConnectionError:
    return ConnectionError(
        f"{name!r} is no folder here, and the Hugging Face hub cannot be reached ({type(error).__name__}). "
        f"Check the network, HF_HUB_OFFLINE and local_files_only, or run `hf download {name} --local-dir FOLDER` on a "
        "machine that reaches the hub and give that FOLDER"
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file of a checkpoint holds. Raises ValueError where it holds none or is too large."""
    size = path.stat().st_size
    if size > LARGEST_JSON:
        raise ValueError(f"{path} has {size} bytes, and a checkpoint's JSON files have {LARGEST_JSON} at most")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error!s:.300}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}; it must be a JSON object")
    return found


def read_weights(source: Source) -> dict[str, Tensor]:
    """The tensors of model.safetensors, of its shards or of an older pytorch_model.bin, on the CPU.

    Raises:
        FileNotFoundError, ConnectionError: as `read_config`.
        ValueError: a file is damaged, or the index of the shards names a file outside the folder.
    """
    path = source.file(WEIGHTS, INDEX, OLDER_WEIGHTS)
    if path.name == OLDER_WEIGHTS:
        return _read_bin(path)
    if path.name == WEIGHTS:
        return _read_safetensors(path)
    weights: dict[str, Tensor] = {}
    for shard in _shards(path):
        weights |= _read_safetensors(source.file(shard))
    named = section(read_json(path), "weight_map").keys()
    if weights.keys() != named:
        differing = ", ".join(sorted(weights.keys() ^ named)[:5])
        raise ValueError(f"{path} and its shards hold different tensors: {differing}")
    return weights


def _shards(index: Path) -> list[str]:
    """The files that an index names, each a plain name in the index's own folder."""
    names = section(read_json(index), "weight_map").values()
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise ValueError(f"{index} names the shard {name!r:.100}: it must be a .safetensors file beside the index")
    return sorted(set(names))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): copy or download it again") from error


def _read_bin(path: Path) -> dict[str, Tensor]:
    """Tensors of a pickle, which is read as data only; each must be all there in the file."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle that is no such file raises whatever the bytes lead to
        raise ValueError(f"{path} is damaged or holds other things than tensors ({error!s:.300})") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError(f"{path} does not hold tensors by their names")
    for key, tensor in found.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise ValueError(f"{path}: {key} is no dense tensor")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path}: {key} claims shape {tuple(tensor.shape)}, and the file holds less")
    return found


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
        shutil.copymode(temporary[CONFIG], temporary[WEIGHTS])  # safetensors' files are their writer's alone to read
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
