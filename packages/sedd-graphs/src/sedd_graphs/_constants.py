"""Tables that belong to a graph and must lie where its states lie.

A copy on a device is made on first use and kept; nobody can tell but by the clock. Two threads that make the same
copy keep either of two equal ones; a copy made under `torch.inference_mode` is an ordinary tensor; pickles and deep
copies carry the original alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Constant"]


class Constant:
    """A tensor that never changes, copied once to every device on which it is asked for."""

    def __init__(self, values: Tensor) -> None:
        self._home = values
        self._copies: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """The tensor on the given device."""
        if device == self._home.device:
            return self._home
        copy = self._copies.get(device)
        if copy is None:
            with torch.inference_mode(False):
                copy = self._home.to(device)
            if type(copy) is Tensor:  # and none of a mode that only traces
                self._copies[device] = copy
        return copy

    def __getstate__(self) -> Tensor:
        return self._home

    def __setstate__(self, home: Tensor) -> None:
        self.__init__(home)  # type: ignore[misc]
