"""Parts of a block that keep little for the backward pass and work the rest out again there.

What a training step keeps between forward and backward is most of its memory. Written with PyTorch's own operations a
block keeps, besides the inputs of its linear maps, each norm's output before modulation, the MLP before and after
GELU, and dropout's factors in float32. The functions below compute the same and keep only their arguments (dropout's
choices as bits); what they work out again is element-wise and costs one or two per cent of a step.

Their backward passes are made of differentiable operations on the arguments alone, so second derivatives are right.
Under `torch.compile` the plain formulas are traced instead: the compiler fuses them and itself decides what to keep.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sedd_nets.fast.dropout import dropped

__all__ = ["add_gated", "gelu_linear", "modulated_norm"]

EPS = 1e-5


def modulated_norm(h: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """norm(h) gain + shift, with norm(h) = (h - mean) / sqrt(variance + 1e-5) over the last axis.

    Keeps h, gain and shift.

    Args:
        h: (B, L, D).
        gain: (B, 1, D) or (B, L, D) in h's dtype.
        shift: the same.

    Returns:
        (B, L, D) in h's dtype.
    """
    if torch.compiler.is_compiling():
        return torch.addcmul(shift, F.layer_norm(h, h.shape[-1:], eps=EPS), gain)
    out: Tensor = _ModulatedNorm.apply(h, gain, shift)  # type: ignore[no-untyped-call]
    return out


class _ModulatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(h, gain)
        return torch.addcmul(shift, F.layer_norm(h, h.shape[-1:], eps=EPS), gain)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, gain = ctx.saved_tensors
        axis = h.shape[-1:]
        normed, mean, scale = torch.native_layer_norm(h, axis, None, None, EPS)
        by_h = torch.ops.aten.native_layer_norm_backward(
            grad * gain, h, axis, mean, scale, None, None, [True, False, False]
        )[0]
        return by_h, (grad * normed).sum_to_size(gain.shape), grad.sum_to_size(gain.shape)


def gelu_linear(a: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """linear(gelu(a)), GELU in its tanh form.

    Keeps a and the weight; a linear map by itself would keep gelu(a) as well.

    Args:
        a: (..., in).
        weight: (out, in), in a's dtype: autocast does not reach the inside of a function of autograd.
        bias: (out,), in a's dtype.

    Returns:
        (..., out).
    """
    if torch.compiler.is_compiling():
        return F.linear(F.gelu(a, approximate="tanh"), weight, bias)
    out: Tensor = _GeluLinear.apply(a, weight, bias)  # type: ignore[no-untyped-call]
    return out


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(a, weight)
        return F.linear(F.gelu(a, approximate="tanh"), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        a, weight = ctx.saved_tensors
        rows, by_weight = grad.flatten(0, -2), None
        if ctx.needs_input_grad[1]:  # not where the weight is frozen
            by_weight = rows.mT @ F.gelu(a, approximate="tanh").flatten(0, -2)
        by_a = torch.ops.aten.gelu_backward(grad @ weight, a, approximate="tanh")
        return by_a, by_weight, rows.sum(0)


def add_gated(h: Tensor, branch: Tensor, gate: Tensor | None, dropout: float, keys: Tensor | None = None) -> Tensor:
    """H + gate dropout(branch).

    Keeps the gate, the branch in its own dtype, and a byte an element of what dropout chose.

    Args:
        h: (B, L, D).
        branch: (B, L, D).
        gate: (B, 1, D) or (B, L, D), or None for 1.
        dropout: the probability of an element of the branch to count 0; the others are divided by the rest.
        keys: (B,) int64, what chooses the elements of each row (`sedd_nets.fast.dropout`); None: torch's generator.

    Returns:
        (B, L, D) in h's dtype.
    """
    kept = None if dropout == 0 else _kept(branch, dropout, keys)
    if gate is None:
        return torch.add(h, _times(branch, kept).to(h.dtype), alpha=1 / (1 - dropout))
    gate = gate.to(h.dtype) / (1 - dropout)
    if torch.compiler.is_compiling():
        return torch.addcmul(h, gate, _times(branch, kept).to(h.dtype))
    out: Tensor = _AddGated.apply(h, branch, gate, kept)  # type: ignore[no-untyped-call]
    return out


class _AddGated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, branch: Tensor, gate: Tensor, kept: Tensor | None) -> Tensor:
        ctx.save_for_backward(branch, gate, kept)
        return torch.addcmul(h, gate, _times(branch, kept).to(h.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        branch, gate, kept = ctx.saved_tensors
        by_branch = _times(grad * gate, kept).to(branch.dtype)
        return grad, by_branch, (grad * _times(branch, kept)).sum_to_size(gate.shape), None


def _kept(branch: Tensor, dropout: float, keys: Tensor | None) -> Tensor:
    """What dropout keeps, as uint8 in branch's shape: on CPUs a product with it is faster than masked_fill."""
    if keys is None and branch.device.type == "cpu":  # whose generator takes longer than a hash of one draw
        keys = torch.randint(-(2**63), 2**63 - 1, branch.shape[:1])
    if keys is not None:
        chosen = dropped(keys, branch.shape[1], branch.shape[2], dropout)
    else:  # bfloat16 knows too few numbers between 0 and 1 for probabilities
        chosen = torch.rand(branch.shape, dtype=torch.float32, device=branch.device) < dropout
    return chosen.logical_not_().view(torch.uint8)


def _times(a: Tensor, kept: Tensor | None) -> Tensor:
    return a if kept is None else a * kept
