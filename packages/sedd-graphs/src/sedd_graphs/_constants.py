"""Tables that belong to a graph and must lie where its states lie."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Constant"]


class Constant:
    """A tensor that never changes, copied once to every device on which it is asked for."""

    def __init__(self, values: Tensor) -> None:
        self._copies = {values.device: values}
        self._home = values.device

    def on(self, device: torch.device) -> Tensor:
        """The tensor on the given device."""
        if device not in self._copies:
            self._copies[device] = self._copies[self._home].to(device)
        return self._copies[device]
