"""The exponential moving average of the weights, which is what one samples from.

After update n (counted from 0) the average moves by `1 - decay_n` of the way to the weights, with `decay_n =
min(decay, (1 + n) / (10 + n))`, so that a young average forgets its random start. Each rank averages the piece of the
float32 master weights that it owns: no communication, and no more memory than its share.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor

from sedd_train import zero_shards

__all__ = ["EMA"]


class EMA:
    """The moving average of an engine's weights.

    Args:
        engine: a DeepSpeed engine, of any ZeRO stage.
        decay: the decay after the warm-up.
    """

    def __init__(self, engine: Any, decay: float) -> None:
        self.engine = engine
        self.decay = decay
        self.updates = 0
        self.pieces = [master.detach().clone() for master in zero_shards.owned(engine)]

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the weights; call it after each step that the engine applied, and after no other."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        masters = [master.detach() for master in zero_shards.owned(self.engine)]
        torch._foreach_lerp_(self.pieces, masters, 1 - decay)
        self.updates += 1

    def gather(self, *, keep: Container[str] | None = None) -> dict[str, Tensor]:
        """The averaged weights by name, whole, and those that are not trained, on the CPU.

        Collective. A rank gets those that it is to `keep`: all unless given.
        """
        return zero_shards.frozen(self.engine, keep=keep) | zero_shards.gather(self.engine, self.pieces, keep=keep)

    def restore(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Continue from averaged weights as `gather` gave them, after so many updates."""
        self.pieces = zero_shards.scatter(self.engine, tensors)
        self.updates = updates
