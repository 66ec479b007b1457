"""Score entropy and its variants, and likelihood bounds, for discrete diffusion."""

from __future__ import annotations

from importlib.metadata import version

from .bound import Bound, likelihood_bound, reconstruction_loss
from .denoising import denoising_loss, denoising_score_entropy
from .fused import FusedLoss, fused_denoising_loss
from .score_entropy import score_entropy
from .times import low_discrepancy_times, stratified_times, uniform_times

__all__ = [
    "score_entropy",
    "denoising_score_entropy",
    "denoising_loss",
    "fused_denoising_loss",
    "FusedLoss",
    "likelihood_bound",
    "reconstruction_loss",
    "Bound",
    "uniform_times",
    "stratified_times",
    "low_discrepancy_times",
]
__version__ = version("sedd-objectives")
