"""The output head of somebody's network, found and run at some positions only, and the logits in what it returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..interfaces import Graph

__all__ = ["path_of_head", "with_head_at", "logits_of", "without_mask", "fit"]


def path_of_head(model: object) -> str | None:
    """The name, among the model's submodules, of what `get_output_embeddings()` gives; None where there is none."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or not isinstance(model, torch.nn.Module):
        return None
    return next((name for name, part in model.named_modules() if part is head), None)


class _HeadAt(torch.nn.Module):
    """A module that sees some positions of its input (B, L, D) only, as (M, D)."""

    def __init__(self, head: torch.nn.Module, positions: Tensor) -> None:
        super().__init__()
        self.head, self._positions = head, positions

    def forward(self, h: Tensor, *further: Any) -> Tensor:
        """The head's answer, (M, N)."""
        out: Tensor = self.head(h.flatten(0, 1)[self._positions] if h.ndim == 3 else h, *further)
        return out

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("head"), name)


def with_head_at(model: torch.nn.Module, path: str, positions: Tensor) -> torch.nn.Module:
    """The same model with its head, the submodule at `path`, run at some positions only, (M,) indices into (B L).

    The modules on the way to the head are copied, without their parameters; nothing of the model itself is touched, so
    that other threads may be in the middle of a call of it.
    """
    *way, last = path.split(".")
    root = node = _shallow(model)
    for name in way:
        copy = _shallow(node._modules[name])
        node._modules[name] = copy
        node = copy
    head = node._modules[last]
    assert head is not None
    node._modules[last] = _HeadAt(head, positions)
    return root


def _shallow(module: torch.nn.Module | None) -> torch.nn.Module:
    assert module is not None
    copy: torch.nn.Module = object.__new__(type(module))
    copy.__dict__ = {**module.__dict__, "_modules": dict(module._modules)}
    return copy


def logits_of(answer: object) -> Tensor:
    """The logits in what a model of transformers, or of anybody's, returns."""
    logits = getattr(answer, "logits", answer)
    if isinstance(logits, tuple | list) and logits:
        logits = logits[0]
    if not isinstance(logits, Tensor) or logits.ndim not in (2, 3):
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(answer).__name__}"
        raise ValueError(
            f"the masked language model must return logits (B, L, N), alone, as .logits or first, got {got}"
        )
    return logits


def without_mask(graph: Graph) -> tuple[int, ...]:
    """The width of a head without a column for the mask, where the mask stands behind the tokens.

    Where it stands among them, such a head cannot be told from one that has the column under a graph that counts the
    mask twice.
    """
    return (graph.num_states - 1,) if graph.mask_id == graph.num_states - 1 else ()


def fit(logits: Tensor, graph: Graph) -> Tensor:
    """Logits (M, W) over the graph's N states: -inf for a mask that has no column, without columns beyond N."""
    if logits.shape[-1] >= graph.num_states:
        return logits[:, : graph.num_states]
    return torch.nn.functional.pad(logits, (0, 1), value=-torch.inf)
