"""float16 for cards without bfloat16 (T4, V100): the network in half precision, its gradients scaled on their way.

float16 ends at 65504 and loses what is below 6e-8. So the loss is multiplied by a scale S before the backward pass, and
each weight's gradient, which is float32, divided by it as soon as it is there:

    g = (1 / S) d(S loss) / d w

Whoever averages, clips and applies gradients sees them as they are, in every ZeRO stage. Where one is not finite though
the loss is, S was too large: the step is left out and S halved. After `GROWTH` steps that were not, S doubles.

Only the trunk runs in float16. Head and loss are one operation (`fused_denoising_loss`) that makes the head's gradients
on its way forward, before any scale is known: they, and all sums of losses, stay in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sedd_train.objectives import has_head

__all__ = ["in_half", "LossScale"]

FIRST = 1024.0
LARGEST = 2.0**24
GROWTH = 1000  # steps


class LossScale:
    """The scale of the loss, and of when it changes.

    Args:
        net: the network whose weights' gradients are divided by it; None for a scale of 1 that stays.
        device: where it lives: steps adapt it without a word to the host.
    """

    def __init__(self, net: nn.Module | None = None, device: torch.device | str | None = None) -> None:
        self.fixed = net is None
        self.value = torch.full((), 1.0 if net is None else FIRST, device=device)
        self.good = torch.zeros((), dtype=torch.int64, device=device)
        for parameter in () if net is None else net.parameters():
            hooked: Any = parameter
            hooked.register_hook(self._unscaled)

    def times(self, loss: Tensor) -> Tensor:
        """The loss whose gradients are to be taken."""
        return loss if self.fixed else loss * self.value

    def _unscaled(self, gradient: Tensor) -> Tensor:
        return gradient / self.value

    @property
    def state(self) -> list[float]:
        """What `restore` takes."""
        return [float(self.value), int(self.good)]

    def restore(self, state: Any) -> None:
        """Go on as another one did.

        Raises:
            ValueError: this is no such state.
        """
        numbers = isinstance(state, list) and len(state) == 2 and all(isinstance(each, int | float) for each in state)
        if not numbers or not 1 <= state[0] <= LARGEST or not 0 <= state[1] < GROWTH:
            raise ValueError(f"loss_scale must be a scale and a number of steps, got {state!r:.100}")
        if not self.fixed:
            self.value, self.good = torch.full_like(self.value, state[0]), torch.full_like(self.good, int(state[1]))

    def step(self, *, overflowed: Tensor) -> Tensor:
        """Note a step, and adapt: whether it is to be forgiven, as the scale was at fault and can be less.

        Nothing is read: `overflowed` and the answer are () bool on the device.
        """
        if self.fixed:
            return torch.zeros_like(overflowed)
        forgiven, good = overflowed & (self.value > 1), torch.where(overflowed, self.good, self.good + 1)
        grown = good == GROWTH
        doubled = torch.where(grown, (2 * self.value).clamp(max=LARGEST), self.value)
        self.value = torch.where(forgiven, self.value / 2, doubled)
        self.good = good.masked_fill(forgiven | grown, 0)
        return forgiven


def in_half(net: Any) -> Any:
    """A network of float32 weights that computes in float16: `hidden` of one of sedd_nets, or all of another.

    What it gives is float32 again.
    """
    return _HalfTrunk(net) if has_head(net) else _Half(net)


class _Half:
    def __init__(self, net: Any) -> None:
        self.net = net

    def __getattr__(self, name: str) -> Any:
        return getattr(self.net, name)

    def __call__(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        with torch.autocast(x.device.type, torch.float16):
            out: Tensor = self.net(x, *args, **options)
        return out.float()


class _HalfTrunk(_Half):
    def hidden(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        with torch.autocast(x.device.type, torch.float16):
            out: Tensor = self.net.hidden(x, *args, **options)
        return out.float()
