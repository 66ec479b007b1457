"""Muon: steps along the nearest orthogonal matrix to the momentum, for the matrices of a network's blocks.

    m <- b m + (1 - b) g                                 b = 0.95
    u  = b m + (1 - b) g                                 Nesterov's look ahead
    W <- W - lr 0.2 sqrt(max(rows, columns)) o(u),       o(U S V^T) = U V^T

(Jordan et al. 2024; the factor 0.2 sqrt(max) of Liu et al. 2025, arXiv 2502.16982, gives a step the root mean square of
AdamW's, so that one learning rate serves both.) Where AdamW moves each number by about lr, this moves each singular
direction alike: rare directions of the gradient are learnt as fast as those that most of it points to. o(u) is found
without a decomposition, by five Newton-Schulz steps that leave all singular values between about 0.7 and 1.2,

    X <- X / ||X||,      X <- P X,      P = a + b X X^T + c (X X^T)^2.

All P are polynomials of the first X X^T, so that they are multiplied with each other, in the smaller of the two sizes.

The rest of a network, embeddings, head, modulation, biases and scales, is AdamW's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Muon", "orthogonal", "matrices_of"]

MOMENTUM = 0.95
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of Jordan et al.: the steepest at 0 that keep all within those limits


def orthogonal(u: Tensor, steps: int = 5) -> Tensor:
    """About U V^T of u = U S V^T, for each of a stack of matrices (..., rows, columns), in u's dtype."""
    a, b, c = COEFFICIENTS
    tall = u.shape[-2] > u.shape[-1]
    x: Tensor = u.mT if tall else u
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-20)
    gram = x @ x.mT
    product = one = torch.eye(gram.shape[-1], dtype=u.dtype, device=u.device)
    for _ in range(steps):
        p = a * one + b * gram + c * gram @ gram
        product = p @ product
        gram = p @ gram @ p
    found: Tensor = product @ x
    return found.mT if tall else found


class Muon(torch.optim.AdamW):
    """AdamW, but Muon for the groups that say "parts": of how many stacked matrices each of their weights is made.

    Learning rate and weight decay are the group's. The momentum is kept under AdamW's name for it, `exp_avg`, and there
    is no second moment.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of both, over the weights that have a gradient; none where `found_inf`, if it is set, is not 0."""
        for group in self.param_groups:
            if "parts" in group:
                for weight in group["params"]:
                    if weight.grad is not None:
                        self._orthogonal_step(weight, weight.grad, group)
                        weight.grad = None  # AdamW passes over it
        return super().step(closure)

    def _orthogonal_step(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(weight)
        momentum = state["exp_avg"].lerp(gradient, 1 - MOMENTUM)
        ahead = gradient.lerp(momentum, MOMENTUM).reshape(group["parts"], -1, weight.shape[1])
        scale = group["lr"] * 0.2 * max(ahead.shape[-2:]) ** 0.5
        new = (1 - group["lr"] * group["weight_decay"]) * weight - scale * orthogonal(ahead).flatten(0, 1)
        refused = getattr(self, "found_inf", None)
        if refused is not None:  # on the device, where nothing is read of it
            momentum = torch.where(refused == 0, momentum, state["exp_avg"])
            new = torch.where(refused == 0, new, weight)
        state["exp_avg"].copy_(momentum)
        weight.copy_(new)


def matrices_of(net: nn.Module) -> dict[int, list[nn.Parameter]]:
    """The matrices that Muon trains, by the number of parts that each is made of: those of a network's blocks.

    Queries, keys and values are stacked, a part for each head. What modulates the blocks is left to AdamW.

    Args:
        net: a network of sedd_nets; any other has no such matrices.
    """
    found: dict[int, list[nn.Parameter]] = {}
    for block in getattr(net, "blocks", []):
        for name, weight in block.named_parameters():
            if weight.ndim == 2 and weight.requires_grad and "adaLN" not in name:
                found.setdefault(3 * block.heads if "qkv" in name else 1, []).append(weight)
    return found
