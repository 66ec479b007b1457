"""A network for sampling whose trunk is one CUDA graph: a launch where the host makes some hundreds.

A sampler asks the same network for the same batch shape step after step. Small batches are then bound by the host: one
block is many launches, and a GPU is done with each before the next arrives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sedd_nets.transformer import Transformer, check_which, picked

__all__ = ["CapturedNetwork"]

Trunk = Callable[[Tensor, Tensor], Tensor]


class CapturedNetwork:
    """`net` as a score model whose trunk is captured at the first batch of a shape and replayed from then on.

    Weights may change in place; where they are moved, the network has to be wrapped anew. Without a GPU, where
    gradients are recorded, and where more than states and noise is given, the network is called as it is. The numbers
    are the same.

    Args:
        net: the network, in evaluation mode. `net.compile_blocks()` beforehand is worth it.
    """

    def __init__(self, net: Transformer) -> None:
        self.net = net
        self._weights = list(net.parameters())
        self._places = self._where_weights_are()
        self._trunks: dict[object, Trunk] = {}

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        where: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        apart: bool = False,
        **given: Any,
    ) -> Tensor:
        """The log-score, as `net(x, sigma, ...)` gives it.

        Raises:
            ValueError: the network is in training mode or its weights have been moved; what `net` raises.
        """
        if not self.serves(x) or any(value is not None for value in given.values()):
            return self.net(x, sigma, where, positions=positions, apart=apart, **given)  # type: ignore[no-any-return]
        check_which(x, where, positions)
        return self.net.scores(picked(self.hidden(x, sigma), x, sigma, where, positions), apart)

    def serves(self, x: Tensor) -> bool:
        """Whether the trunk is replayed."""
        return x.device.type == "cuda" and not torch.is_grad_enabled()

    def hidden(self, x: Tensor, sigma: Tensor) -> Tensor:
        """What enters the head, (B, L, D): a tensor that the next call writes over."""
        if self.net.training or self._where_weights_are() != self._places:
            raise ValueError(
                "a captured network computes with the weights it was made with, in evaluation mode: "
                "call net.eval(), move it where it shall be, and then make CapturedNetwork(net)"
            )
        kind = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key = x.shape, sigma.shape, sigma.dtype, kind, self.net.attention
        if key not in self._trunks:
            self._trunks[key] = _captured(self.net, x, sigma, kind)
        return self._trunks[key](x, sigma)

    def _where_weights_are(self) -> list[int]:
        """From where a graph reads them."""
        return [weight.data_ptr() for weight in self._weights]


def _captured(net: Transformer, x: Tensor, sigma: Tensor, kind: torch.dtype | None) -> Trunk:
    """The trunk for batches of this shape."""
    states, noise = x.clone(), sigma.clone()

    def trunk() -> Tensor:
        # Weights are cast inside of the graph: autocast's own copies would be gone when it is replayed.
        with torch.autocast("cuda", kind, enabled=kind is not None, cache_enabled=False):
            return net.hidden(states, noise)

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # what is compiled or allocated at first
            trunk()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = trunk()

    def replay(x: Tensor, sigma: Tensor) -> Tensor:
        states.copy_(x)
        noise.copy_(sigma)
        graph.replay()
        return out

    return replay
