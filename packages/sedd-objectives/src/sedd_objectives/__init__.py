"""Score entropy and its variants, and likelihood bounds, for discrete diffusion."""

from __future__ import annotations

from importlib.metadata import version

from .autoregressive import autoregressive_loss
from .bound import Bound, likelihood_bound, reconstruction_loss
from .corpus import CorpusLikelihood, corpus_likelihood
from .cross_entropy import any_order_loss, cross_entropy_loss, denoising_cross_entropy, lambda_cross_entropy_loss
from .d3pm import d3pm_bound, d3pm_loss
from .denoising import (
    denoising_loss,
    denoising_score_entropy,
    denoising_score_entropy_without_constant,
    score_entropy_constant,
)
from .elbo import elbo_loss
from .estimate import Estimate, monte_carlo
from .fast.fused import FusedLoss, fused_cross_entropy_loss, fused_denoising_loss
from .implicit import enumerated_implicit_score_entropy_loss, implicit_score_entropy_loss
from .masked_bound import masked_likelihood_bound, masks_evenly
from .score_entropy import (
    concrete_score_matching,
    plain_concrete_score_matching,
    plain_score_entropy,
    score_entropy,
)
from .snapshots import snapshot_bound, snapshot_loss
from .times import ImportanceTimes, low_discrepancy_times, of_time, stratified_times, uniform_times
from .x0_prediction import (
    leave_one_out_loss,
    leave_one_out_score_entropy,
    posterior_loss,
    posterior_score_entropy,
    time_varying_loss,
)

__all__ = [
    "score_entropy",
    "plain_score_entropy",
    "denoising_score_entropy",
    "denoising_score_entropy_without_constant",
    "score_entropy_constant",
    "concrete_score_matching",
    "plain_concrete_score_matching",
    "implicit_score_entropy_loss",
    "enumerated_implicit_score_entropy_loss",
    "snapshot_loss",
    "snapshot_bound",
    "denoising_loss",
    "fused_denoising_loss",
    "fused_cross_entropy_loss",
    "FusedLoss",
    "likelihood_bound",
    "masked_likelihood_bound",
    "masks_evenly",
    "elbo_loss",
    "reconstruction_loss",
    "Bound",
    "corpus_likelihood",
    "CorpusLikelihood",
    "denoising_cross_entropy",
    "cross_entropy_loss",
    "lambda_cross_entropy_loss",
    "any_order_loss",
    "posterior_score_entropy",
    "posterior_loss",
    "leave_one_out_score_entropy",
    "leave_one_out_loss",
    "time_varying_loss",
    "d3pm_loss",
    "d3pm_bound",
    "autoregressive_loss",
    "monte_carlo",
    "Estimate",
    "uniform_times",
    "stratified_times",
    "low_discrepancy_times",
    "ImportanceTimes",
    "of_time",
]
__version__ = version("sedd-objectives")
