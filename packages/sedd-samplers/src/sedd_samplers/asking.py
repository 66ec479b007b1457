"""How a model of sequences is asked for rows: at the positions that matter, in the way it offers, and checked.

A model is a callable (x (B, L), sigma (B,)) -> (B, L, N). It may have two parameters more, by name:

    where   (B, L) bool: return only the M rows at its true positions, (M, N), in row-major order
    rows    (B,) int64: which sequences of the run x holds; a sequence that is finished is not asked about again, so
            that a model with a condition for each sequence (a label, a constraint) needs to be told

The wrappers of this package (adapters, controls, guidance) offer both and hand them on.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .interfaces import Graph

__all__ = [
    "RowModel",
    "Asked",
    "offers",
    "row_model",
    "convert_rows",
    "rows_at_a_time",
    "widened",
    "check_recoverable",
]


class RowModel(Protocol):
    """A model of sequences that offers `where` and `rows`; every `RowModel` is a `ScoreModel` by its shape."""

    def __call__(self, x: Tensor, sigma: Tensor, /, where: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """(B, L, N), or (M, N) for the M true positions of `where`."""


class Asked:
    """A model as it is asked, whatever it offers.

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

    def __call__(self, x: Tensor, sigma: Tensor | None, where: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """The answer as rows (R, N), and which of them belong to `where`, in order; None when all do, as they stand.

        A model that does not take sigma is asked with None.

        Raises:
            ValueError: the answer has another shape or is no float tensor.
        """
        inputs = (x,) if sigma is None else (x, sigma)
        further = {"rows": rows} if self._offers_rows else {}
        if self._offers_where:
            answer = self._model(*inputs, where=where, **further)
            return self._checked(answer, (int(where.sum()), self._num_states)), None
        answer = self._checked(self._model(*inputs, **further), (*x.shape, self._num_states))
        return answer.flatten(0, 1), where.flatten().nonzero()[:, 0]

    def _checked(self, answer: object, expected: tuple[int, ...]) -> Tensor:
        if not isinstance(answer, Tensor) or tuple(answer.shape) != expected or not answer.is_floating_point():
            got = (
                f"{answer.dtype} {tuple(answer.shape)}" if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
            )
            raise ValueError(f"the {self._name} must return a float tensor of shape {expected}, got {got}")
        return answer


def offers(model: Any, parameter: str) -> bool:
    """Whether a model has a parameter of that name; a module is asked about its forward."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    function = model.forward if isinstance(model, torch.nn.Module) else model
    try:
        return parameter in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def row_model(at: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> RowModel:
    """The model of a function (x, sigma, where, rows) -> (M, N) that knows only rows."""

    def model(x: Tensor, sigma: Tensor, /, where: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        everywhere = torch.ones_like(x, dtype=torch.bool) if where is None else where
        out = at(x, sigma, everywhere, torch.arange(len(x), device=x.device) if rows is None else rows)
        return out.reshape(*x.shape, -1) if where is None else out

    return model


def convert_rows(answer: Tensor, pick: Tensor | None, convert: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """Rows (M, N) made from a model's answer in pieces: one new tensor and one piece's temporaries.

    Args:
        answer: (R, N), not modified.
        pick: which rows of it to take, as `Asked` returns it.
        convert: (rows (m, N) float32 or float64, the slice of 0..M that they are) -> (m, N).
    """
    count = len(answer) if pick is None else len(pick)
    dtype = torch.promote_types(answer.dtype, torch.float32)
    out = torch.empty(count, answer.shape[-1], dtype=dtype, device=answer.device)
    size = rows_at_a_time(answer.shape[-1], answer.device)
    with torch.autocast(answer.device.type, enabled=False):
        for i in range(0, count, size):
            part = slice(i, i + size)
            out[part] = convert(widened(answer[part] if pick is None else answer[pick[part]]), part)
    return out


def rows_at_a_time(num_states: int, device: torch.device) -> int:
    """How many rows of N numbers a piece holds: 4 MB, which a CPU's cache keeps, or 256 MB, which fill a GPU."""
    return max(1, (2**20 if device.type == "cpu" else 2**26) // num_states)


def widened(rows: Tensor) -> Tensor:
    """The same in float32 at least."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def check_recoverable(graph: Graph, sigma: Tensor, dtype: torch.dtype) -> None:
    """That a posterior can be told from a score at sigma: ValueError where tokens are noised and e^sigma eps > 1e-3.

    Where a jump leads into some state other than the mask, all that the score knows of x0 is of the size e^-sigma, and
    what a network computes is rounded more coarsely than that.
    """
    limit = math.log(1e-3 / torch.finfo(dtype).eps)
    if not len(sigma) or float(sigma.max()) <= limit:
        return
    states = torch.arange(graph.num_states, device=sigma.device)
    into = graph.rates_into(states)
    entered = (into.base > 0) | (into.value > 0).any(-1)
    if entered.sum() > (graph.mask_id is not None and entered[graph.mask_id]):
        raise ValueError(
            f"the posterior p(x0 | x_t) cannot be told from a {dtype} score at sigma = {float(sigma.max()):.6g}: what "
            f"it knows of x0 is lost in rounding beyond {limit:.3g}. Adapt and control a model of the posterior "
            "instead (from_posterior, from_logits and their controls), or use float64"
        )
