"""One name for the packages of discrete diffusion by score entropy, and what most people want of them.

The packages are sedd_graphs, sedd_objectives, sedd_nets, sedd_samplers and sedd_train.
"""

from __future__ import annotations

from importlib.metadata import version

from sedd_train import evaluate, load, pipeline, train

__all__ = ["train", "load", "pipeline", "evaluate", "__version__"]
__version__ = version("sedd-lm")
