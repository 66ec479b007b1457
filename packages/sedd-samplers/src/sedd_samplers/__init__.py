"""Samplers and infilling for any discrete diffusion score model."""

from __future__ import annotations

from importlib.metadata import version

from .adapters import (
    from_logits,
    from_masked_lm,
    from_posterior,
    from_reverse,
    from_velocity,
    to_posterior,
    to_reverse,
    to_velocity,
)
from .categorical import draw_categorical
from .grids import uniform_times
from .interfaces import Graph, Noise, Row, ScoreModel
from .kernels import denoise_probs, euler_probs, tau_leaping_probs, tweedie_probs, tweedie_score
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
    "tweedie_score",
    "from_posterior",
    "to_posterior",
    "from_logits",
    "from_masked_lm",
    "from_reverse",
    "to_reverse",
    "from_velocity",
    "to_velocity",
    "draw_categorical",
    "uniform_times",
    "Reverse",
    "Row",
    "Graph",
    "Noise",
    "ScoreModel",
]
__version__ = version("sedd-samplers")
