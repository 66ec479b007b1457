"""Which ranks write a checkpoint: the first alone or, of a large network, all of the first one's machine side by side.

They are of one machine, so that each sees the first one's disk, whatever it is. The first writes the averaged weights,
4 bytes a parameter, as one file in the published format: no more than each rank holds while they are measured. The
other 12, weights and moments, are dealt out to all by weights, so that of P parameters and R ranks the most one has is

    max(4 P, 16 P / R) bytes, and at most a weight more,

and each writes its own to a file,

    training.safetensors    or    training-00001-of-00008.safetensors, ...

Which file a weight is in is nothing that a reader needs to know: together they hold what the one does.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from sedd_train import distributed

__all__ = ["ABOVE", "writers", "shares", "file_names", "files", "lacking"]

ABOVE = 10**9  # parameters of a network that several ranks write
ALONE = "training.safetensors"
SHARD = re.compile(r"training-(\d{5})-of-(\d{5})\.safetensors")


def writers(net: nn.Module, scratch: Path) -> list[int]:
    """The ranks that write a checkpoint of this network. Collective.

    Args:
        net: the network.
        scratch: the folder that they write to, which the first rank has made.
    """
    if sum(_sizes(net).values()) <= ABOVE:
        return [0]
    seen = distributed.tell((socket.gethostname(), scratch.is_dir()))  # machines may share a name
    return [rank for rank, place in enumerate(seen) if place == seen[0]]


def shares(net: nn.Module, among: list[int]) -> dict[int, set[str]]:
    """The names of the weights that each rank writes, without those of none; the same on all, and no word between them.

    A weight that is trained counts three times, for its moments; the averaged weights, which the first rank writes, are
    its own to begin with. The largest goes first to the rank that has least.
    """
    sizes, trained = _sizes(net), {name for name, weight in net.named_parameters() if weight.requires_grad}
    loads = dict.fromkeys(among, 0) | {among[0]: sum(sizes.values())}
    found: dict[int, set[str]] = {rank: set() for rank in among}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = min(among, key=lambda rank: loads[rank])
        loads[least] += sizes[name] * (3 if name in trained else 1)
        found[least].add(name)
    return {rank: names for rank, names in found.items() if names}


def file_names(shared: dict[int, set[str]]) -> dict[int, str]:
    """The name of the file that each rank writes its share to."""
    if len(shared) == 1:
        return dict.fromkeys(shared, ALONE)
    return {rank: f"training-{n:05d}-of-{len(shared):05d}.safetensors" for n, rank in enumerate(shared, 1)}


def files(names: Iterable[str]) -> list[str]:
    """The files that a run continues from, of those that a checkpoint's manifest names: one unless it names shards."""
    return sorted(name for name in names if SHARD.fullmatch(name)) or [ALONE]


def lacking(names: Iterable[str]) -> str:
    """The first shard that others of these names speak of and that is none of them; nothing if there is none."""
    found = set(names)
    counts = {match[2] for name in found if (match := SHARD.fullmatch(name))}
    wanted = (f"training-{n:05d}-of-{count}.safetensors" for count in counts for n in range(1, int(count) + 1))
    return next((name for name in wanted if name not in found), "")


def _sizes(net: nn.Module) -> dict[str, int]:
    """How many numbers each weight has, also where ZeRO 3 holds a part of it here."""
    return {name: getattr(weight, "ds_numel", weight.numel()) for name, weight in net.named_parameters()}
