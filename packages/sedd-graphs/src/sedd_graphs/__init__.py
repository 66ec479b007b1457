"""Continuous-time Markov chains over tokens for discrete diffusion: generators, exp kernels, noise schedules."""

from __future__ import annotations

from importlib.metadata import version

from sedd_graphs.absorbing import Absorbing
from sedd_graphs.clustered import Clustered
from sedd_graphs.dense import Dense
from sedd_graphs.graph import Graph
from sedd_graphs.learned import Learned
from sedd_graphs.masked import Hybrid, Masked
from sedd_graphs.neighbours import Neighbours
from sedd_graphs.noise import (
    Cosine,
    Geometric,
    Linear,
    LogLinear,
    MaskProbability,
    Noise,
    Polynomial,
)
from sedd_graphs.ordinal import Ordinal
from sedd_graphs.paced import PacedAbsorbing
from sedd_graphs.row import Row
from sedd_graphs.uniform import Uniform

__all__ = [
    "Graph",
    "Row",
    "Absorbing",
    "PacedAbsorbing",
    "Uniform",
    "Hybrid",
    "Masked",
    "Dense",
    "Ordinal",
    "Clustered",
    "Neighbours",
    "Noise",
    "LogLinear",
    "Cosine",
    "Polynomial",
    "Geometric",
    "Linear",
    "MaskProbability",
    "Learned",
]
__version__ = version("sedd-graphs")
