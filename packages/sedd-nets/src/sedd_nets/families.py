"""A checkpoint of any published family: the keys of its weights say which one it is."""

from __future__ import annotations

import os

from sedd_nets.causal import Causal
from sedd_nets.mdlm import MDLM
from sedd_nets.pretrained import read_config, read_weights
from sedd_nets.radd import RADD
from sedd_nets.sedd import SEDD

__all__ = ["from_pretrained"]


def from_pretrained(
    folder_or_name: str | os.PathLike[str], *, revision: str | None = None
) -> SEDD | RADD | MDLM | Causal:
    """The network of a checkpoint folder or hub repository, of whichever family it is.

    MDLM's keys begin with `backbone.`; SEDD embeds sigma, RADD does not; a `Causal` network has RADD's keys, and its
    config says what it is. The schedule and the graph that belong to the network are in its `sections`.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: as `SEDD.from_pretrained`.
    """
    config = read_config(folder_or_name, revision=revision)
    stored = read_weights(folder_or_name, revision=revision)
    family: type[SEDD | RADD | MDLM | Causal]
    if any(key.startswith(MDLM.key_prefix) for key in stored):
        family = MDLM
    elif any(key.startswith("sigma_map.") for key in stored):
        family = SEDD
    else:
        family = Causal if Causal.describes(config) else RADD
    return family.from_checkpoint(config, stored, source=os.fspath(folder_or_name))
