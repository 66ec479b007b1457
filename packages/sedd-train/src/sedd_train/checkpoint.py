"""Checkpoints that are whole or absent, and a run that continues from one digit for digit.

A checkpoint is a folder `step-00000500` with
- `config.json`, `model.safetensors` and the tokenizer's files: the averaged weights in the published format, which
  `sedd_train.load` and `SEDD.from_pretrained` read;
- `training.safetensors`: the weights and AdamW's two moments, or Muon's one, by name and whole. They depend neither on
  the ZeRO stage nor on the number of ranks, so a run may continue with others. With LoRA, whose matrices are added to
  the others' in `model.safetensors`, the averages of both are here, too. Of a network of more than 10^9 parameters they
  are in several such files, which ranks of one machine write side by side (`sedd_train.sharding`);
- `manifest.json`: the counters, the recipe, and every file's SHA-256.

It is written under another name, synchronised to the disk, and renamed; then `latest` is replaced in the same way. A
process that dies or a disk that fills at any moment leaves the checkpoints before it as they were. Random numbers need
no saving: they are functions of the seed and the step (`sedd_train.randomness`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from sedd_nets.files import read_json, write_checkpoint
from torch import Tensor, nn

from sedd_train import adapters, distributed, moments, sharding, storage, zero_shards
from sedd_train.ema import EMA
from sedd_train.loggers import to_json

__all__ = [
    *("CheckpointError", "Checkpoint", "save", "export", "set_weights"),
    *("exist", "find", "best", "last", "read", "restore", "check_space"),
]

NAME = re.compile(r"step-\d{8,}")


class CheckpointError(Exception):
    """A checkpoint that could not be written or read; the message says which, and what is left."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been read and verified.

    Attributes:
        folder: where it lies.
        manifest: the counters and whatever `save` was given besides.
        weights: the weights, by name.
        moments: AdamW's moments, `exp_avg` and `exp_avg_sq`, each by name; empty before the first step. What Muon
            trains has the first alone.
        average: the averaged weights, by name.
    """

    folder: Path
    manifest: dict[str, Any]
    weights: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    average: dict[str, Tensor]

    @property
    def step(self) -> int:
        """How many steps have been taken."""
        return int(self.manifest["step"])


def save(
    run: Path,
    engine: Any,
    ema: EMA,
    tokenizer: Any,
    *,
    step: int,
    sections: dict[str, Any],
    keep: int,
    keep_every: int = 0,
    bound: float | None = None,
    **more: Any,
) -> Path:
    """Write the checkpoint of a step, and remove all but the last `keep` and the best. Collective.

    Rank 0 writes it or, of a large network, all ranks of its machine.

    Args:
        run: the folder of the run's checkpoints.
        engine: the DeepSpeed engine.
        ema: its moving average.
        tokenizer: saved beside the weights.
        step: how many steps have been taken.
        sections: what config.json says about graph and noise.
        keep: how many of the last checkpoints to keep.
        keep_every: of which multiples of steps to keep the checkpoint for ever; 0 for none.
        bound: what the averaged weights were measured to score on held-out text, less being better; None if they were
            not. The checkpoint that scores best of all is kept besides the last ones.
        more: further JSON values for the manifest.

    Raises:
        CheckpointError: on every rank, if it could not be written; the checkpoints before it are intact.
    """
    rank, net = dist.get_rank(), engine.module.net
    folder = run / f"step-{step:08d}"
    scratch = run / distributed.tell(f".{folder.name}.{os.getpid()}")[0]  # the first rank's
    try:
        with _all_or_none(run, step, scratch):
            if rank == 0:
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.mkdir(parents=True)
        shares = sharding.shares(net, sharding.writers(net, scratch))
        mine, names = shares.get(rank, set()), sharding.file_names(shares)
        tensors = _named("weights", zero_shards.frozen(engine, keep=mine) | zero_shards.gather(engine, keep=mine))
        states, adam_steps = moments.gather(engine, mine)
        for moment, values in states.items():
            tensors |= _named(moment, values)
        thin = adapters.trained(net)
        average = ema.gather(keep=None if rank == 0 else mine & thin)
        tensors |= _named("average", {name: average[name] for name in average if name in mine & thin})
        sums: dict[str, str] = {}
        with _all_or_none(run, step, scratch):
            if rank == 0:
                export(scratch, net, average, tokenizer, sections)
                own = [path for path in scratch.iterdir() if path.name not in names.values()]
                sums = {path.name: _sha256(path) for path in own}
            if rank in shares:
                sums[names[rank]] = _write(scratch / names[rank], tensors)
        files = {name: digest for told in distributed.tell(sums) for name, digest in told.items()}
        with _all_or_none(run, step, scratch):
            if rank == 0:
                counters = {"step": step, "adam_steps": adam_steps, "ema_updates": ema.updates, "bound": bound}
                counters |= {"loss_scale": engine.loss_scale_of_ours.state}
                _publish(scratch, folder, counters | more | {"files": dict(sorted(files.items()))})
                _prune(run, keep, keep_every)
    finally:
        if rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


@contextmanager
def _all_or_none(run: Path, step: int, scratch: Path) -> Iterator[None]:
    """What goes wrong on any rank with its part of a checkpoint ends the writing of it on all. Collective."""
    failure, cause = "", None
    try:
        yield
    except Exception as error:  # of any type, or the other ranks would wait for a word that never comes
        failure, cause = str(error) or repr(error), error
    failure = distributed.agree(failure)  # a large part takes long to write
    if not failure:
        return
    last = None
    if dist.get_rank() == 0:
        shutil.rmtree(scratch, ignore_errors=True)  # before the others go, and a launcher ends this one for it
        with suppress(OSError):
            last = find(run)
    last = distributed.tell(last)[0]
    left = f"The last good one is {last}; make room, and continue from it with --resume" if last else "None is left"
    told = f"the checkpoint of step {step} could not be written to {run}: {failure}. {left}"
    raise CheckpointError(told) from cause


def _named(kind: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{kind}/{name}": value for name, value in values.items()}


def _with_buffers(net: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A whole state of the network: weights by name, and its own buffers, which are constants."""
    kept = net.state_dict()
    return {name: buffer for name, buffer in net.named_buffers() if name in kept} | weights


def export(folder: Path, net: nn.Module, average: dict[str, Tensor], tokenizer: Any, sections: dict[str, Any]) -> None:
    """Write averaged weights in the published format with their tokenizer, for `sedd_train.load`.

    A network without a `save_pretrained` has its weights written by name, and its class in config.json: it is for its
    owner to make again, and to fill by `set_weights`.
    """
    if adapters.has_adapters(net):
        state = adapters.merged(net, _with_buffers(net, average))
        own: Any = net
        write_checkpoint(folder, own.config_json(sections), {own.key_prefix + key: state[key] for key in state})
    elif hasattr(net, "save_pretrained"):
        state = {name: value.cpu() for name, value in _with_buffers(net, average).items()}
        net.save_pretrained(folder, sections=sections, state_dict=state)  # type: ignore[operator]
    else:
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(average, folder / "model.safetensors")
        config = {**sections, "model": {"type": type(net).__qualname__}}
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        shutil.copymode(folder / "config.json", folder / "model.safetensors")
    tokenizer.save_pretrained(folder)


def set_weights(net: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give a network these weights, by name.

    Raises:
        CheckpointError: they are another network's: a name or a shape differs.
    """
    own = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}
    given = {name: tuple(weight.shape) for name, weight in weights.items()}
    if own != given:
        differing = sorted(dict(own.items() ^ given.items()))
        raise CheckpointError(
            f"the weights are another network's: {', '.join(differing[:4])}"
            + (f" and {len(differing) - 4} more" if len(differing) > 4 else "")
            + " differ in name or shape"
        )
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(weights[name])


def _write(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write tensors to a file, on the disk when this returns; its SHA-256."""
    safetensors.torch.save_file(tensors, path)
    with path.open("rb+") as file:
        storage.synchronise(file)
    return _sha256(path)


def _publish(scratch: Path, folder: Path, manifest: dict[str, Any]) -> None:
    """Give a checkpoint that is written its manifest and its name, and `latest` to it."""
    for path in scratch.glob("training*.safetensors"):
        shutil.copymode(scratch / "config.json", path)  # who reads one reads all
    (scratch / "manifest.json").write_text(to_json(manifest, indent=1))
    storage.publish(scratch, folder)  # in place of one of a run that was resumed before it
    storage.write_text(folder.with_name("latest"), folder.name)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folders(run: Path) -> list[Path]:
    """The checkpoints' folders, last step first; whatever else lies there, a copy or a link, is its owner's."""
    found = (path for path in run.glob("step-*") if NAME.fullmatch(path.name) and not path.is_symlink())
    return sorted((path for path in found if path.is_dir()), reverse=True)


def exist(run: Path) -> bool:
    """Whether there is any checkpoint in the folder, whole or not."""
    return bool(_folders(run))


def _prune(run: Path, keep: int, keep_every: int = 0) -> None:
    """Remove old checkpoints but the best and milestones, and what processes killed while they wrote have left."""
    kept = {*_folders(run)[:keep], best(run)}
    for folder in [*_folders(run), *run.glob(".step-*")]:
        milestone = keep_every and not folder.name.startswith(".") and int(folder.name[5:]) % keep_every == 0
        if folder not in kept and not milestone:
            shutil.rmtree(folder, ignore_errors=folder.name.startswith("."))  # one that a dying rank writes to still
    for file in run.glob(".latest.*"):
        file.unlink(missing_ok=True)  # a dying rank removes its own


def best(run: Path) -> Path | None:
    """The checkpoint whose averaged weights scored best on held-out text, the last of equals; None if none has a score.

    Its files are not verified: `read` does that.
    """
    scores = {}
    for folder in _folders(run):
        try:
            score = read_json(folder / "manifest.json").get("bound")
            number = float(score) if isinstance(score, int | float) else math.nan
        except (OSError, ValueError, OverflowError):  # damaged: `find` says so
            continue
        if math.isfinite(number):
            scores[folder] = number
    return min(scores, key=lambda folder: scores[folder], default=None)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None if every file is as it was written."""
    try:
        manifest = read_json(folder / "manifest.json")
        files = manifest.get("files")
        for name in ("step", "adam_steps", "ema_updates"):
            count = manifest.get(name)
            if isinstance(count, bool) or not isinstance(count, int | float) or not 0 <= count < 1 << 53:
                raise ValueError(f"manifest.json: {name} must be a number of at least 0; got {count!r:.100}")
        if not isinstance(files, dict) or not all(re.fullmatch(r"[\w-][\w.-]*", name) for name in files):
            raise ValueError(f"manifest.json: files must name files of the folder and their sums; got {files!r:.200}")
        if lacking := sharding.lacking(files):
            return f"{folder} is incomplete ({lacking} is not in its manifest)"
        for name, digest in files.items():
            if _sha256(folder / name) != digest:
                return f"{folder / name} is not as it was written (its checksum differs)"
    except (OSError, ValueError) as error:
        return f"{folder} is incomplete ({type(error).__name__}: {error})"
    return None


def find(run: Path) -> Path | None:
    """The last checkpoint that is whole; a damaged one is named in a warning and passed over."""
    folders = _folders(run)
    latest = run / "latest"
    if latest.is_file():  # what was published; a folder after it was renamed by a process that died right then
        published = latest.read_bytes().decode(errors="replace").strip()
        folders.sort(key=lambda folder: folder.name != published)
    for folder in folders:
        wrong = damage(folder)
        if wrong is None:
            return folder
        warnings.warn(f"{wrong}; using the checkpoint before it", stacklevel=2)
    return None


def read(folder: Path) -> Checkpoint:
    """The checkpoint of a folder.

    Raises:
        CheckpointError: the folder is damaged.
    """
    wrong = damage(folder)
    if wrong is not None:
        raise CheckpointError(wrong)
    manifest = read_json(folder / "manifest.json")
    tensors: dict[str, Tensor] = {}
    for name in sharding.files(manifest["files"]):
        tensors |= safetensors.torch.load_file(folder / name)

    def part(kind: str) -> dict[str, Tensor]:
        return {name.removeprefix(f"{kind}/"): value for name, value in tensors.items() if name.startswith(f"{kind}/")}

    states = {moment: values for moment in moments.MOMENTS if (values := part(moment))}
    average = safetensors.torch.load_file(folder / "model.safetensors")
    if thin := part("average"):  # of a network with LoRA, the rest of which is frozen
        average = part("weights") | thin
    return Checkpoint(folder, manifest, part("weights"), states, average)


def last(run: Path, fingerprint: str) -> Checkpoint:
    """The checkpoint to continue a run from.

    Raises:
        CheckpointError: there is none that is whole, or it was trained on other text than `fingerprint` names.
    """
    folder = find(run)
    if folder is None:
        raise CheckpointError(f"no whole checkpoint in {run} to continue from; start anew without --resume")
    checkpoint = read(folder)
    before = str(checkpoint.manifest.get("fingerprint"))
    if before != fingerprint and before != fingerprint.rpartition("-")[0]:  # the latter of version 0.1.0
        raise CheckpointError(
            f"{folder} was trained on other text or another vocabulary (its fingerprint is "
            f"{before}, the corpus's now {fingerprint})"
        )
    return checkpoint


def restore(checkpoint: Checkpoint, engine: Any, ema: EMA) -> None:
    """Bring the optimiser and the moving average where they were. The engine was started from `checkpoint.weights`."""
    if checkpoint.moments:
        moments.restore(engine, checkpoint.moments, int(checkpoint.manifest["adam_steps"]))
    engine.loss_scale_of_ours.restore(checkpoint.manifest.get("loss_scale", [1.0, 0]))
    net = engine.module.net
    average = net.own_keys(checkpoint.average) if hasattr(net, "own_keys") else checkpoint.average  # as it is published
    ema.restore(average, int(checkpoint.manifest["ema_updates"]))


def check_space(run: Path, parameters: int, keep: int) -> None:
    """There is room for the checkpoints of a run.

    Raises:
        CheckpointError: the folder cannot be written, or its disk is too small.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        probe = run / f".probe.{os.getpid()}"
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()
    except OSError as error:
        raise CheckpointError(f"checkpoints cannot be written to {run}: {error.strerror}") from error
    needed = 16 * parameters * (keep + 2)  # weights, two moments, average, in float32
    have = sum(path.stat().st_size for folder in _folders(run) for path in folder.iterdir())
    free = shutil.disk_usage(run).free + have
    if free < needed:
        raise CheckpointError(
            f"{run} has room for {free / 1e9:.3g} GB of checkpoints, and the run needs {needed / 1e9:.3g} GB ({keep} "
            "kept, the best, and one being written); make room, give another --output, or a smaller --keep"
        )
