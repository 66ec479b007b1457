"""The step kernels on the graphs of sedd-graphs, against what the published code computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sedd_graphs import Absorbing, Geometric, LogLinear, Uniform
from sedd_samplers.steps import denoise_probs, euler_probs, tweedie_probs

GOLDEN = Path(__file__).parents[1] / "packages/sedd-nets/tests/golden"
CASES = {
    "sedd-tiny-absorb": (Absorbing(40), LogLinear(eps=1e-3)),
    "sedd-tiny-uniform": (Uniform(40), Geometric(sigma_min=1e-4, sigma_max=20.0)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_steps_are_those_of_the_published_code(name):
    """Within 1e-6 for absorbing. Uniform amplifies float32 rounding by exp(sigma): 1e-4 of 1 + |value|."""
    graph, noise = CASES[name]
    golden = load_file(GOLDEN / name / "expected.safetensors")
    length = golden["xt"].shape[1]
    t, sigma, dsigma = (golden[k].repeat_interleave(length) for k in ("t", "sigma", "dsigma"))
    log_score, x = golden["log_score"].flatten(0, 1), golden["xt"].flatten()
    euler = euler_probs(log_score, x, graph, golden["euler_step"] * dsigma)
    tweedie = tweedie_probs(log_score, x, graph, sigma - noise(t - golden["tweedie_dt"])[0])
    denoise = denoise_probs(log_score, x, graph, sigma)[:, :40]
    for got, key in ((euler, "euler_probs"), (tweedie, "tweedie_probs"), (denoise, "denoise_probs")):
        tolerance = 1e-6 if graph.mask_id is not None else 1e-4
        torch.testing.assert_close(got, golden[key].flatten(0, 1), rtol=tolerance, atol=tolerance)
