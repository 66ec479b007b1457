"""transformers' AutoModel reads the published checkpoints of MDLM, UDLM, Duo and BD3LM, once this module is imported.

    import sedd_nets.auto
    net = AutoModelForMaskedLM.from_pretrained("kuleshov-group/mdlm-owt")

What comes is this package's network, a score model `(x, sigma) -> log_score`, as from `sedd_nets.from_pretrained`; no
code of the repository runs, whatever `trust_remote_code` is. The files of SEDD and RADD have no `model_type`, by which
transformers finds a class: they are for `sedd_nets.from_pretrained` alone. Needs transformers, which this package does
not ask for otherwise.
"""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PretrainedConfig

from sedd_nets.loading import Network, from_pretrained

__all__ = ["MODEL_TYPES"]

MODEL_TYPES = ("mdlm", "udlm", "duo", "DUO", "bd3lm")
HUB = ("revision", "token", "cache_dir", "local_files_only")
NOT_HERE = ("dtype", "torch_dtype", "device_map", "quantization_config", "attn_implementation")


class _Reader:
    """What transformers finds for a model type: something with a `from_pretrained`."""

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], *_: Any, **given: Any) -> Network:
        """The network. Raises ValueError for an option of transformers that it does not take."""
        if unknown := [option for option in NOT_HERE if given.get(option) is not None]:
            raise ValueError(f"{unknown[0]} is not for sedd_nets' networks: cast or move the network when it is loaded")
        hub: Any = {option: given[option] for option in HUB if given.get(option) is not None}
        return from_pretrained(name, **hub)


for _kind in MODEL_TYPES:
    _config: Any = type(f"{_kind}Config", (PretrainedConfig,), {"model_type": _kind})
    _reader: Any = type(_kind, (_Reader,), {"config_class": _config})
    AutoConfig.register(_kind, _config, exist_ok=True)
    for _auto in (AutoModel, AutoModelForMaskedLM):
        _auto.register(_config, _reader, exist_ok=True)
