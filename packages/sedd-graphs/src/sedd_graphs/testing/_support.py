"""What the laws share: small graphs spelt out as matrices in float64, and comparisons that say what is wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = [
    "SIGMAS",
    "SAMPLES",
    "RowFields",
    "law",
    "states_of",
    "has_mask",
    "tokens_of",
    "uniform_tokens",
    "dense",
    "generator_of",
    "exponential",
    "reference_error",
    "assert_close",
    "assert_single_precision",
    "assert_frequencies",
    "assert_refused",
]

SIGMAS = (0.0, 1e-6, 1e-3, 0.1, 0.29, 0.31, 1.0, 4.0, 20.0)
SAMPLES = 20_000


class RowFields(Protocol):
    @property
    def base(self) -> Tensor: ...
    @property
    def index(self) -> Tensor: ...
    @property
    def value(self) -> Tensor: ...


def law(check: Callable[[Any], None]) -> Callable[[Any], None]:
    """The check, run with float64 as torch's default dtype."""

    @functools.wraps(check)
    def run(subject: Any) -> None:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            check(subject)
        finally:
            torch.set_default_dtype(before)

    return run


def states_of(graph: Any) -> Tensor:
    assert graph.num_states <= 64, f"this law needs a graph of at most 64 states, got {graph.num_states}"
    return torch.arange(graph.num_states)


def has_mask(graph: Any) -> bool:
    return graph.mask_id is not None


def tokens_of(graph: Any) -> Tensor:
    states = states_of(graph)
    return states[states != graph.mask_id] if has_mask(graph) else states


def uniform_tokens(graph: Any) -> Tensor:
    """Uniform over tokens, (N,)."""
    p = torch.zeros(graph.num_states)
    p[tokens_of(graph)] = 1 / len(tokens_of(graph))
    return p


def dense(row: RowFields, graph: Any) -> Tensor:
    """All values of rows, (..., N), from their fields alone."""
    full = row.base[..., None].expand(*row.base.shape, graph.num_states).clone()
    return full.scatter(-1, row.index, row.value)


def generator_of(graph: Any) -> Tensor:
    """Q, (N, N) float64."""
    return dense(graph.rates_out_of(states_of(graph)), graph).T.double()


def exponential(Q: Tensor, s: float) -> Tensor:
    exponential: Tensor = torch.matrix_exp(s * Q)
    return exponential


def reference_error(s: float) -> float:
    """What matrix_exp may itself be wrong by, in total, at noise s."""
    return min(1e-8 * s, 1e-9) + 1e-14


def assert_close(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert found.shape == expected.shape, f"{what}: expected shape {tuple(expected.shape)}, got {tuple(found.shape)}"
    error = (found - expected).abs().max()
    assert error <= tolerance, f"{what}: off by {float(error):.3e}, more than {tolerance:.1e}"


def assert_single_precision(single: Tensor, double: Tensor, what: str) -> None:
    """float32 within 1e-5 of float64, where the latter is a number."""
    assert single.dtype == torch.float32, f"{what} must come in sigma's float32, got {single.dtype}"
    exists = double.isfinite()
    assert single[exists].isfinite().all(), f"{what} is not finite in float32"
    error = ((single.double() - double).abs() - 1e-37)[exists] / double[exists].abs().clamp(min=1e-37)
    worst = float(error.max()) if len(error) else 0.0
    assert worst <= 1e-5, f"{what} in float32 is off by {worst:.2e} of its float64 value"


def assert_frequencies(drawn: Tensor, p: Tensor, what: str) -> None:
    """Every state's count within 6 standard deviations (and 12 draws, for rare states) of its expectation."""
    count, expected = drawn.bincount(minlength=len(p)), p * len(drawn)
    assert len(count) == len(p), f"{what}: state {int(drawn.max())} is out of range"
    excess = (count - expected).abs() - 6 * (expected * (1 - p)).clamp(min=0).sqrt() - 12 * (p > 0)
    y = int(excess.argmax())
    assert excess[y] <= 1e-6, f"{what}: state {y} came {int(count[y])} times, {float(expected[y]):.1f} were due"


def assert_refused(call: Callable[[Any], Any], argument: Tensor, name: str) -> None:
    message = None
    try:
        call(argument)
    except (ValueError, TypeError) as error:
        message = str(error)
    assert message is not None, f"{name} = {argument.tolist()} must be refused"
    assert name in message, f"the error must name {name}: {message}"
