"""Samplers and infilling for any discrete diffusion score model."""

from __future__ import annotations

from importlib.metadata import version

from .adapters import from_posterior
from .categorical import draw_categorical
from .grids import uniform_times
from .interfaces import Graph, Noise, Row, ScoreModel
from .kernels import denoise_probs, euler_probs, tau_leaping_probs, tweedie_probs
from .methods import Euler, Method, TauLeaping, Tweedie
from .reverse import Reverse
from .sampling import State, infill, sample, trajectory

__all__ = [
    "sample",
    "infill",
    "trajectory",
    "State",
    "Method",
    "Euler",
    "TauLeaping",
    "Tweedie",
    "euler_probs",
    "tau_leaping_probs",
    "tweedie_probs",
    "denoise_probs",
    "from_posterior",
    "draw_categorical",
    "uniform_times",
    "Reverse",
    "Row",
    "Graph",
    "Noise",
    "ScoreModel",
]
__version__ = version("sedd-samplers")
