"""Samplers and infilling for any discrete diffusion score model.

sample, infill, trajectory              here, with the methods and the time grids
generate, blockwise                     text in blocks from left to right
adapters, controls, guidance            other models, temperature and constraints, classifiers
autoregressive, views                   left to right; the terminal and a page
steps, masked                           the equations behind the methods
"""

from __future__ import annotations

from importlib.metadata import version

from . import adapters, autoregressive, blocks, controls, correctors, guidance, masked, multistage, steps, views
from .blocks import BlockState, Generated, blockwise, generate
from .caching import cached, prefix_cached
from .correctors import ByConfidence, LeaveOneOut, Looped, PathPlanning, Psi, when_still
from .exact import FirstHitting, Uniformization
from .grids import adaptive_grid, noise_grid, token_grid, uniform_grid
from .infilling import Particles, clamped
from .interfaces import Graph, KeyValues, Noise, Row, RowModel, ScoreModel
from .masked import (
    ConfidenceUnmasking,
    Remasking,
    Unmasking,
    at_rate,
    capped,
    confidence,
    entropy,
    entropy_bound,
    margin,
    mask_probability,
    random_order,
    rescaled,
    threshold,
)
from .multistage import PredictorCorrector, Trapezoidal
from .prompts import draw_lengths, pad_prompts
from .randomness import draw_categorical
from .renoising import EntropyBoundRenoising
from .reverse import Reverse
from .sampling import State, infill, sample, trajectory
from .steps import Ancestral, Euler, Method, TauLeaping, Tweedie
from .token_ids import prompt_ids

__all__ = [
    "sample",
    "infill",
    "trajectory",
    "State",
    "generate",
    "blockwise",
    "BlockState",
    "Generated",
    "pad_prompts",
    "draw_lengths",
    "prompt_ids",
    "Particles",
    "clamped",
    "Method",
    "Euler",
    "TauLeaping",
    "Tweedie",
    "Ancestral",
    "Trapezoidal",
    "PredictorCorrector",
    "FirstHitting",
    "Uniformization",
    "Unmasking",
    "Remasking",
    "capped",
    "rescaled",
    "at_rate",
    "ByConfidence",
    "Looped",
    "when_still",
    "Psi",
    "LeaveOneOut",
    "PathPlanning",
    "ConfidenceUnmasking",
    "EntropyBoundRenoising",
    "confidence",
    "entropy",
    "margin",
    "random_order",
    "threshold",
    "entropy_bound",
    "uniform_grid",
    "noise_grid",
    "token_grid",
    "adaptive_grid",
    "mask_probability",
    "cached",
    "prefix_cached",
    "draw_categorical",
    "Reverse",
    "Row",
    "Graph",
    "Noise",
    "ScoreModel",
    "RowModel",
    "KeyValues",
    "adapters",
    "controls",
    "guidance",
    "autoregressive",
    "blocks",
    "views",
    "correctors",
    "masked",
    "multistage",
    "steps",
]
__version__ = version("sedd-samplers")
