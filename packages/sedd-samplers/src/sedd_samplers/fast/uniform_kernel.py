"""Uniform numbers of (seed, draw, position) on a GPU: `sedd_samplers.randomness.uniforms` in one kernel.

Written with tensor operations, the ten rounds of Philox 4x32-10 are some 170 launches, more than a network's block has.
Triton's own `philox` is the same generator, and makes of the same counter and key the same words.

Importing this module takes triton, which comes with torch's CUDA builds. With TRITON_INTERPRET=1 in the environment
before triton's first import the same code runs, slowly, on CPU tensors.
"""

# Triton has no types: what its decorator makes of a function is unknown.
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False, disallow-any-unimported=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["uniforms_by_kernel"]

BLOCK = 512


def uniforms_by_kernel(seed: Tensor, draw: Tensor, position: Tensor) -> Tensor:
    """Uniforms in [0, 1), float64 with 53 random bits, one for each (seed, draw, position), int64 of one shape."""
    counter = [part.contiguous() for part in (seed, draw, position)]
    out = torch.empty(seed.shape, dtype=torch.float64, device=seed.device)
    if out.numel():
        with torch.cuda.device_of(seed):  # a kernel is launched on the current device
            _uniforms[(triton.cdiv(out.numel(), BLOCK),)](*counter, out, out.numel(), BLOCK=BLOCK)
    return out


@triton.jit
def _uniforms(
    seed: tl.tensor, draw: tl.tensor, position: tl.tensor, out: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr
) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    key = tl.load(seed + at, mask=there, other=0)
    drawn = tl.load(draw + at, mask=there, other=0)
    place = tl.load(position + at, mask=there, other=0).to(tl.uint32)
    high, low, _, _ = tl.philox(key, place, drawn.to(tl.uint32), (drawn >> 32).to(tl.uint32), tl.zeros_like(place))
    bits = (high.to(tl.int64) << 21) | (low.to(tl.int64) >> 11)
    tl.store(out + at, bits.to(tl.float64) * 1.1102230246251565e-16, mask=there)  # 2^-53
