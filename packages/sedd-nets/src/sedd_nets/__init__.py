"""Score transformers for discrete diffusion that load the published checkpoints.

A network is a score model, `net(x, sigma) -> log_score`: for states x (B, L) and total noise sigma (B,) it gives
log p_t(y) / p_t(x) for every state y at every position, (B, L, N).
"""

from importlib.metadata import version

from sedd_nets.attention import Attention, sdpa
from sedd_nets.pretrained import read_config
from sedd_nets.sedd import SEDD

__all__ = ["SEDD", "Attention", "sdpa", "read_config", "__version__"]

__version__ = version("sedd-nets")
