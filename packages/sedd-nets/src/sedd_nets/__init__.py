"""Score transformers for discrete diffusion that load the published checkpoints.

A network is a score model, `net(x, sigma) -> log_score`: for states x (B, L) and total noise sigma (B,) it gives
log p_t(y) / p_t(x) for every state y at every position, (B, L, N).
"""

from importlib.metadata import version

from sedd_nets.attention import Attention, sdpa
from sedd_nets.binding import bind
from sedd_nets.block_diffusion import BD3LM
from sedd_nets.caching import KeyValueCache
from sedd_nets.causal import Causal
from sedd_nets.conditioning import LabelCondition, PromptCondition
from sedd_nets.documents import Documents
from sedd_nets.families import MDLM, RADD, SEDD
from sedd_nets.fast.attention import FlashAttention, FlexAttention, attention_named
from sedd_nets.fast.cuda_graph import CapturedNetwork
from sedd_nets.initialisation import init_local_attention, init_unigram_bias
from sedd_nets.loading import from_pretrained
from sedd_nets.pretrained import read_config
from sedd_nets.uniform import UDLM

__all__ = [
    "SEDD",
    "RADD",
    "MDLM",
    "UDLM",
    "BD3LM",
    "Causal",
    "from_pretrained",
    "read_config",
    "init_unigram_bias",
    "init_local_attention",
    "Attention",
    "sdpa",
    "FlexAttention",
    "FlashAttention",
    "attention_named",
    "Documents",
    "KeyValueCache",
    "bind",
    "CapturedNetwork",
    "LabelCondition",
    "PromptCondition",
    "__version__",
]

__version__ = version("sedd-nets")
