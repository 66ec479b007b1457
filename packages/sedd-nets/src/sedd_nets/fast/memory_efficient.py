"""The formulas of `sedd_nets.functional` in ways that keep little for the backward pass.

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
from torch.utils.checkpoint import checkpoint

from sedd_nets import functional
from sedd_nets.checks import on_host
from sedd_nets.fast.dropout import Words, dropped, words_of
from sedd_nets.functional import EPS

__all__ = ["add_gated", "gelu_linear", "modulated_norm", "rotated"]


def modulated_norm(h: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """`functional.modulated_norm`, keeping h, gain and shift."""
    if torch.compiler.is_compiling():
        return functional.modulated_norm(h, gain, shift)
    out: Tensor = _ModulatedNorm.apply(h, gain, shift)  # type: ignore[no-untyped-call]
    return out


class _ModulatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(h, gain)
        return functional.modulated_norm(h, gain, shift)

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
    """`functional.gelu_linear`, keeping a and the weight; a linear map by itself would keep gelu(a) as well.

    Autocast does not reach the inside of a function of autograd: a, weight and bias have the dtype to compute in.
    """
    if torch.compiler.is_compiling():  # a compiler keeps gelu(a) unless it is told to work it out again
        out: Tensor = checkpoint(functional.gelu_linear, a, weight, bias, use_reentrant=False)
        return out
    out = _GeluLinear.apply(a, weight, bias)  # type: ignore[no-untyped-call]
    return out


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(a, weight)
        return functional.gelu_linear(a, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        a, weight = ctx.saved_tensors
        rows, by_weight = grad.flatten(0, -2), None
        if ctx.needs_input_grad[1]:  # not where the weight is frozen
            by_weight = rows.mT @ F.gelu(a, approximate="tanh").flatten(0, -2)
        by_a = torch.ops.aten.gelu_backward(grad @ weight, a, approximate="tanh")
        return by_a, by_weight, rows.sum(0)


def add_gated(h: Tensor, branch: Tensor, gate: Tensor | None, dropout: float, words: Words | None = None) -> Tensor:
    """`functional.add_gated` with dropout's choices, keeping them (a byte an element), the gate and the branch.

    Args:
        h: (B, L, D).
        branch: (B, L, D), kept in its own dtype.
        gate: (B, 1, D) or (B, L, D), or None for 1.
        dropout: the probability of an element of the branch to count 0; the others are divided by the rest.
        words: what chooses the elements of each row (`sedd_nets.fast.dropout`); None: torch's generator.

    Returns:
        (B, L, D) in h's dtype.
    """
    kept = None if dropout == 0 else _kept(branch, dropout, words)
    if gate is None or torch.compiler.is_compiling():
        return functional.add_gated(h, branch, gate, kept, dropout)
    out: Tensor = _AddGated.apply(h, branch, gate, kept, dropout)  # type: ignore[no-untyped-call]
    return out


class _AddGated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, branch: Tensor, gate: Tensor, kept: Tensor | None, dropout: float) -> Tensor:
        ctx.save_for_backward(branch, gate, kept)
        ctx.dropout = dropout
        return functional.add_gated(h, branch, gate, kept, dropout)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        branch, gate, kept = ctx.saved_tensors
        gate = gate.to(grad.dtype) / (1 - ctx.dropout)
        by_gate = grad * (branch if kept is None else branch * kept)
        by_branch = grad * gate if kept is None else (grad * gate) * kept
        return grad, by_branch.to(branch.dtype), by_gate.sum_to_size(gate.shape) / (1 - ctx.dropout), None, None


def _kept(branch: Tensor, dropout: float, words: Words | None) -> Tensor:
    """What dropout keeps, in branch's shape: bool, on CPUs uint8, whose product is faster than masked_fill."""
    if words is None and on_host(branch):  # whose generator takes longer than a hash of one draw
        words = words_of(torch.randint(-(2**63), 2**63 - 1, branch.shape[:1]), branch.shape[1], branch.shape[2])
    if words is not None:
        kept = dropped(words, dropout).logical_not_()
    else:  # bfloat16 knows too few numbers between 0 and 1 for probabilities
        kept = torch.rand(branch.shape, dtype=torch.float32, device=branch.device) >= dropout
    return kept.view(torch.uint8) if on_host(branch) and not torch.compiler.is_compiling() else kept


def rotated(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys of a packed projection, turned by `functional.rotate`, and its values as they are.

    Keeps the angles alone: turning back by them is the backward pass, where autograd would add up six gradients.

    Args:
        qkv: (B, L, 3, H, d).
        cos: (L, 3, 1, d) float32, from `Rotary`.
        sin: the same.

    Returns:
        q, k and v, (B, L, H, d) each in qkv's dtype. None is a view of qkv, whose memory attention would keep.
    """
    q, k, v = _Rotated.apply(qkv, cos, sin)  # type: ignore[no-untyped-call]
    return q, k, v


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        if torch.compiler.is_compiling():  # values are turned by nothing, not copied: a compiler makes one sweep of it
            out = functional.rotate(qkv, cos, sin)
        else:
            out = qkv.clone()
            _turn(out[:, :, :2], cos, sin)
        q, k, v = out.unbind(2)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, by_q: Tensor, by_k: Tensor, by_v: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        if torch.compiler.is_compiling() or torch.is_grad_enabled():  # for a compiler; for second derivatives
            by_q, by_k = (functional.rotate(grad, cos[:, 0], -sin[:, 0]) for grad in (by_q, by_k))
            return torch.stack([by_q, by_k, by_v], dim=2), None, None
        grad = torch.stack([by_q, by_k, by_v], dim=2)
        _turn(grad[:, :, :2], cos, -sin)
        return grad, None, None


def _turn(qk: Tensor, cos: Tensor, sin: Tensor) -> None:
    """`functional.rotate` of queries and keys (B, L, 2, H, d), in place: half the passes of joining new halves."""
    dtype = torch.promote_types(qk.dtype, cos.dtype)
    work = qk if dtype == qk.dtype else qk.to(dtype)
    u, v = work.chunk(2, dim=-1)
    cos, sin = cos[:, :1, :, : u.shape[-1]], sin[:, :1, :, u.shape[-1] :]
    u_sin = u * sin
    u.mul_(cos).addcmul_(v, sin, value=-1)
    v.mul_(cos).add_(u_sin)
    if work is not qk:
        qk.copy_(work)
