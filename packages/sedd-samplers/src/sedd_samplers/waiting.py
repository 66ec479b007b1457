"""Checks of values without waiting for the device, and which way a device goes.

On the CPU values are read at once and the error names the one that is wrong. On an accelerator a read back makes the
host wait until everything before it is done, so that nothing is read inside a step but one small tensor (see
`sedd_samplers.reverse`): what is wrong is noticed with the next step's read, and is then looked for once more.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["NoticedLate", "Unread", "has_kernels", "reading_waits", "at_once", "look_again", "require"]

_at_once = ContextVar("at_once", default=False)


class NoticedLate(ValueError):
    """What was wrong in a step, found when the next one read back how it ended.

    Attributes:
        where: the step.
    """

    def __init__(self, error: ValueError, where: str) -> None:
        super().__init__(str(error))
        self.where = where


@dataclass(frozen=True)
class Unread:
    """Something that may have gone wrong: () bool on the device, how to look for it once more, and the step."""

    wrong: Tensor
    again: Callable[[], object]
    where: str


def reading_waits(device: torch.device) -> bool:
    """Whether values are not to be read."""
    return device.type != "cpu" and not _at_once.get()


def has_kernels(device: torch.device) -> bool:
    """Whether Triton's kernels run there: on CUDA, where triton is."""
    return device.type == "cuda" and _triton_is_there()


@functools.cache
def _triton_is_there() -> bool:
    return importlib.util.find_spec("triton") is not None


@contextmanager
def at_once() -> Iterator[None]:
    """Inside, values are read on every device: to say what is wrong once it is known that something is."""
    token = _at_once.set(True)
    try:
        yield
    finally:
        _at_once.reset(token)


def look_again(unread: list[Unread]) -> None:
    """Look once more for what was wrong in one of these.

    Raises:
        NoticedLate: something was.
    """
    with at_once():
        for one in unread:
            if one.wrong:
                try:
                    one.again()
                except ValueError as error:
                    raise NoticedLate(error, one.where) from error
                raise NoticedLate(ValueError("the score model returned NaN or infinity, or left no state to draw, "
                                             "and did not when it was asked again"), one.where)  # fmt: skip


def require(right: Tensor, expected: str, told: Callable[[], str]) -> None:
    """ValueError unless `right` (...) bool holds everywhere; where reading waits, an assertion of the device's.

    Args:
        right: what must hold.
        expected: the sentence that says so without values, for the device.
        told: the sentence with the values that were found.
    """
    if reading_waits(right.device):
        torch._assert_async(right.all(), expected)
    elif not right.all():
        raise ValueError(told())
