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
from .adaptive import adaptive_times
from .ancestral import Ancestral, ancestral_probs
from .asking import RowModel
from .autoregressive import continue_left_to_right, left_to_right, sample_left_to_right
from .categorical import draw_categorical
from .controls import Control, allowed, controlled, temperature, top_k, top_p
from .corrector import PredictorCorrector, correct, corrector_probs
from .first_hitting import FirstHitting
from .grids import level_times, uniform_times
from .guidance import classifier_free, classifier_guided, first_order_ratios, neighbour_ratios
from .interfaces import Graph, Noise, Row, ScoreModel
from .kernels import denoise_probs, euler_probs, tau_leaping_probs, tweedie_probs, tweedie_score
from .masking import mask_probability
from .methods import Euler, Method, TauLeaping, Tweedie
from .ordered import Order, Ordered, chance, confidence, entropy, margin
from .prompts import prompted
from .remasking import Remasking, RemaskSchedule, at_rate, capped, rescaled
from .remembering import remembered
from .reverse import Reverse
from .sampling import State, infill, sample, trajectory
from .trapezoidal import Trapezoidal
from .uniformization import Uniformization
from .unmasking import Unmasking
from .views import live, record

__all__ = [
    "sample",
    "infill",
    "trajectory",
    "State",
    "Method",
    "Euler",
    "TauLeaping",
    "Tweedie",
    "Ancestral",
    "Trapezoidal",
    "FirstHitting",
    "Uniformization",
    "PredictorCorrector",
    "correct",
    "Remasking",
    "RemaskSchedule",
    "capped",
    "rescaled",
    "at_rate",
    "Ordered",
    "Order",
    "confidence",
    "entropy",
    "margin",
    "chance",
    "Unmasking",
    "euler_probs",
    "tau_leaping_probs",
    "tweedie_probs",
    "denoise_probs",
    "ancestral_probs",
    "corrector_probs",
    "tweedie_score",
    "from_posterior",
    "to_posterior",
    "from_logits",
    "from_masked_lm",
    "from_reverse",
    "to_reverse",
    "from_velocity",
    "to_velocity",
    "remembered",
    "Control",
    "controlled",
    "temperature",
    "top_k",
    "top_p",
    "allowed",
    "prompted",
    "left_to_right",
    "sample_left_to_right",
    "continue_left_to_right",
    "live",
    "record",
    "classifier_free",
    "classifier_guided",
    "neighbour_ratios",
    "first_order_ratios",
    "draw_categorical",
    "uniform_times",
    "level_times",
    "mask_probability",
    "adaptive_times",
    "Reverse",
    "Row",
    "Graph",
    "Noise",
    "ScoreModel",
    "RowModel",
]
__version__ = version("sedd-samplers")
