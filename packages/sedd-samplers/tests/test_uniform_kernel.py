"""The uniform numbers of the kernel are those of the plain rounds, bit for bit."""

from __future__ import annotations

import pytest
import torch
from sedd_samplers import randomness
from sedd_samplers.randomness import uniforms

triton = pytest.importorskip("triton")

from sedd_samplers.fast.uniform_kernel import BLOCK, uniforms_by_kernel  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_interpreter")


@pytest.mark.parametrize("count", [0, 1, 7, BLOCK, 2 * BLOCK + 3])
def test_same_numbers(count):
    generator = torch.Generator().manual_seed(count)
    words = (torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator) for _ in range(2))
    position = torch.randint(2**31, (count,), generator=generator)
    seed, draw = words
    found = uniforms_by_kernel(seed, draw, position)
    assert found.dtype == torch.float64
    assert torch.equal(found, uniforms(seed, draw, position))


@pytest.mark.parametrize("number", [0, 1, -1, 2**32 - 1, 2**32, 2**63 - 1, -(2**63)])
def test_every_bit_of_seed_and_draw_counts_alike(number):
    edge = torch.full((3,), number)
    few = torch.tensor([0, 1, 2**32 - 1])
    for given in ((edge, few, few), (few, edge, few), (edge, edge, few)):
        assert torch.equal(uniforms_by_kernel(*given), uniforms(*given))


def test_strided_arguments_and_shapes():
    seed = torch.arange(24).view(4, 6)[:, ::2]
    found = uniforms_by_kernel(seed, seed + 5, seed.flip(0))
    assert found.shape == (4, 3)
    assert torch.equal(found, uniforms(seed, seed + 5, seed.flip(0)))


def test_where_kernels_run_these_are_taken(monkeypatch):
    taken = []

    def taking(*given):
        taken.append(given)
        return given[0]

    monkeypatch.setattr(randomness, "has_kernels", lambda device: True)
    monkeypatch.setattr("sedd_samplers.fast.uniform_kernel.uniforms_by_kernel", taking)
    seed = torch.arange(3)
    assert uniforms(seed, seed, seed) is seed
    assert len(taken) == 1
