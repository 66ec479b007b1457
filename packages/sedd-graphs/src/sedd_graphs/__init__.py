"""Continuous-time Markov chains over tokens for discrete diffusion: generators, exp kernels, noise schedules."""

from __future__ import annotations

from importlib.metadata import version

from sedd_graphs.absorbing import Absorbing
from sedd_graphs.graph import Graph
from sedd_graphs.masked import Hybrid, Masked
from sedd_graphs.noise import Geometric, LogLinear, Noise
from sedd_graphs.row import Row
from sedd_graphs.uniform import Uniform

__all__ = [
    "Graph",
    "Row",
    "Absorbing",
    "Uniform",
    "Hybrid",
    "Masked",
    "Noise",
    "LogLinear",
    "Geometric",
]
__version__ = version("sedd-graphs")
