"""A checkpoint of whichever family, from a folder or the Hugging Face hub."""

from __future__ import annotations

import os
from typing import Unpack

from sedd_nets.block_diffusion import BD3LM
from sedd_nets.causal import Causal
from sedd_nets.config import family_of
from sedd_nets.families import MDLM, RADD, SEDD
from sedd_nets.files import HubOptions, Source
from sedd_nets.pretrained import read_checkpoint
from sedd_nets.uniform import UDLM

__all__ = ["Network", "from_pretrained"]

Network = SEDD | RADD | MDLM | UDLM | BD3LM | Causal
FAMILIES: tuple[type[Network], ...] = (SEDD, RADD, MDLM, UDLM, BD3LM, Causal)


def from_pretrained(folder_or_name: str | os.PathLike[str], **hub: Unpack[HubOptions]) -> Network:
    """The network of a checkpoint folder or hub repository, of whichever family it is, in evaluation mode.

    Which one, config.json says in any of the published layouts (`sedd_nets.config`), or else the names of the weights.
    The schedule and the graph that belong to the network are in its `sections`.

    Args:
        folder_or_name: a folder with config.json and weights, or a hub name.
        hub: revision, token, cache_dir, local_files_only; see `sedd_nets.files.HubOptions`.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: as `SEDD.from_pretrained`.
    """
    config, stored = read_checkpoint(Source(folder_or_name, **hub))
    family = {each.__name__: each for each in FAMILIES}[family_of(config, stored)]
    return family.from_checkpoint(config, stored, source=os.fspath(folder_or_name))
