from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sedd_nets import SEDD

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def golden():
    """Folder of one of the published formats, and what the published code computes from it."""
    return lambda name: (GOLDEN / name, load_file(GOLDEN / name / "expected.safetensors"))


@pytest.fixture
def make_sedd():
    """A small network whose every parameter is random, so that no gate or head hides what lies behind it."""

    def make(num_states=11, *, seed=0, **options):
        sizes: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2, "cond_dim": 8, "length": 12, "dropout": 0.0}
        sizes |= {"scale_by_sigma": True} | options
        net = SEDD(num_states, **sizes)
        net.sections = {"graph": {"type": "absorb"}, "noise": {"type": "loglinear"}}
        randomise(net, seed)
        return net

    return make


@pytest.fixture
def randomise_():
    return randomise


def randomise(net, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=0.2)


@pytest.fixture
def wide(batch):
    """The batch for a network in float64, where calls laid out differently agree to rounding."""
    x, sigma = batch
    return x, sigma.double()


@pytest.fixture
def batch():
    """x (3, 7) over 11 states and sigma (3,): three sizes that no transposed axis can confuse."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(11, (3, 7), generator=generator), torch.tensor([0.05, 0.7, 3.0])
