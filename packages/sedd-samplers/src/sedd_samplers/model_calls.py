"""Calls of a model of sequences: at the positions that matter, in the way it offers, and checked.

A model is a callable (x (B, L), sigma (B,)) -> (B, L, N). It may have two parameters more, by name:

    where   (B, L) bool: return only the M rows at its true positions, (M, N), in row-major order
    rows    (B,) int64: which sequences of the run x holds; a sequence that is finished is not asked about again, so
            that a model with a condition for each sequence (a label, a constraint) needs to be told

The wrappers of this package (adapters, controls, guidance) offer both and hand them on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .fast import Answer

__all__ = ["ModelCall", "offers", "Wrapper", "device_of"]


class ModelCall:
    """A model as it is called, whatever it offers.

    Args:
        model: the callable; a module is asked about its forward.
        num_states: N, the width its answers must have.
        name: what errors call it.
        takes: what it is called with.

    Raises:
        ValueError: the model is not callable.
    """

    def __init__(self, model: Any, num_states: int, name: str, takes: str = "x, sigma") -> None:
        if not callable(model):
            raise ValueError(f"the {name} must be callable as {name.split()[0]}({takes}), got a {type(model).__name__}")
        self._model, self._num_states, self._name = model, num_states, name
        self._offers_where, self._offers_rows = offers(model, "where"), offers(model, "rows")

    def __call__(self, x: Tensor, sigma: Tensor | None, where: Tensor, rows: Tensor) -> Answer:
        """The rows at the true positions of `where` (B, L), in row-major order.

        A model that does not take sigma is called with None.

        Raises:
            ValueError: the answer has another shape or is no float tensor.
        """
        if isinstance(self._model, Wrapper) and sigma is not None:
            made = self._model.answer(x, sigma, where, rows)
            self._check(made.shape, made.dtype, (len(made), self._num_states))
            return made
        inputs = (x,) if sigma is None else (x, sigma)
        further = {"rows": rows} if self._offers_rows else {}
        if self._offers_where:
            answer = self._model(*inputs, where=where, **further)
            return Answer(self._checked(answer, (int(where.sum()), self._num_states)))
        answer = self._checked(self._model(*inputs, **further), (*x.shape, self._num_states))
        return Answer(answer.flatten(0, 1), where.flatten().nonzero()[:, 0])

    def _checked(self, answer: object, expected: tuple[int, ...]) -> Tensor:
        if not isinstance(answer, Tensor):
            raise ValueError(self._told(expected, f"a {type(answer).__name__}"))
        self._check(tuple(answer.shape), answer.dtype, expected)
        return answer

    def _check(self, shape: tuple[int, ...], dtype: torch.dtype, expected: tuple[int, ...]) -> None:
        if shape != expected or not dtype.is_floating_point:
            raise ValueError(self._told(expected, f"{dtype} {shape}"))

    def _told(self, expected: tuple[int, ...], got: str) -> str:
        return f"the {self._name} must return a float tensor of shape {expected}, got {got}"


def offers(model: Any, parameter: str) -> bool:
    """Whether a model has a parameter of that name; a module is asked about its forward."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    function = model.forward if isinstance(model, torch.nn.Module) else model
    try:
        return parameter in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


class Wrapper:
    """A model made of others, as a `RowModel`; inside the package its answer is taken in pieces.

    Args:
        at: (x, sigma, where, rows) -> the rows (M, N) at the true positions of `where`, or an `Answer`.
    """

    def __init__(self, at: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor | Answer]) -> None:
        self._at = at

    def answer(self, x: Tensor, sigma: Tensor, where: Tensor, rows: Tensor) -> Answer:
        """The rows at the true positions of `where` (B, L)."""
        out = self._at(x, sigma, where, rows)
        return out if isinstance(out, Answer) else Answer(out)

    def __call__(self, x: Tensor, sigma: Tensor, /, where: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """(B, L, N), or (M, N) for the M true positions of `where`."""
        everywhere = torch.ones_like(x, dtype=torch.bool) if where is None else where
        rows = torch.arange(len(x), device=x.device) if rows is None else rows
        out = self.answer(x, sigma, everywhere, rows).tensor()
        return out.reshape(*x.shape, -1) if where is None else out


def device_of(model: object, device: torch.device | str | None) -> torch.device:
    """The device that was asked for, else that of a module's first parameter, else the CPU."""
    if device is None and isinstance(model, torch.nn.Module):
        device = next((p.device for p in model.parameters()), None)
    return torch.device("cpu" if device is None else device)
