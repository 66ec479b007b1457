"""A model's rows, converted when they are read: beside the model's own output only a piece is held.

Adapters, controls and guidance turn the rows of one kind of model into those of another. Were each to return a tensor,
a chain of three would hold four of the size of the model's output. An `Answer` remembers what is to be done and does it
piece by piece, in the precision that the last reader needs, so that nothing is rounded on the way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Answer", "Part", "rows_at_a_time"]

Part = slice | Tensor
"""Which of an answer's M rows: a slice, or int64 indices (m,)."""
Convert = Callable[[Tensor, Part], Tensor]


class Answer:
    """M rows of N numbers.

    Args:
        rows: (R, N), what the model returned, not modified.
        pick: (M,) which of them these are; None when all, as they stand.
        convert: (rows (m, N), the part of 0..M that they are) -> (m, N).
        work: what precision they are converted in; float32 at least.
        width: N, where the conversion changes it.
        shift: (M,) what is added to each row before it is converted, but at its state; None for 0.
        state: (M,) int64, where a shifted row is 0.
    """

    def __init__(
        self,
        rows: Tensor,
        pick: Tensor | None = None,
        convert: Convert | None = None,
        work: torch.dtype | None = None,
        width: int | None = None,
        shift: Tensor | None = None,
        state: Tensor | None = None,
    ) -> None:
        self._rows, self._pick, self._convert, self._shift, self._state = rows, pick, convert, shift, state
        self._width = rows.shape[-1] if width is None else width
        self.work = torch.promote_types(rows.dtype, torch.float32 if work is None else work)

    def __len__(self) -> int:
        return len(self._rows) if self._pick is None else len(self._pick)

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N)."""
        return len(self), self._width

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's output, float32 at least."""
        return torch.promote_types(self._rows.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self._rows.device

    def then(self, convert: Convert, work: torch.dtype | None = None, width: int | None = None) -> Answer:
        """The answer converted once more, all of it in the more precise of both precisions."""
        before = self._convert
        chain = convert if before is None else lambda rows, part: convert(before(rows, part), part)
        work = self.work if work is None else torch.promote_types(self.work, work)
        width = self._width if width is None else width
        return Answer(self._rows, self._pick, chain, work, width, self._shift, self._state)

    def as_returned(self) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
        """What the model returned, which rows of it these are, and their shift; None if they have been converted."""
        return (self._rows, self._pick, self._shift) if self._convert is None else None

    def __getitem__(self, part: Part) -> Tensor:
        """Rows (m, N) in the working precision."""
        with torch.autocast(self.device.type, enabled=False):
            rows = (self._rows[part] if self._pick is None else self._rows[self._pick[part]]).to(self.work)
            if self._shift is not None and self._state is not None:
                rows = (rows + self._shift[part, None].to(rows.dtype)).scatter_(1, self._state[part, None], 0.0)
            return rows if self._convert is None else self._convert(rows, part)

    def parts(self) -> list[slice]:
        """Slices that a cache, or a GPU, holds."""
        return self.pieces(len(self))

    def pieces(self, count: int) -> list[slice]:
        """The same of `count` of the rows, for a reader of some of them."""
        size = rows_at_a_time(self._rows.shape[-1] * self.work.itemsize // 4, self.device)
        return [slice(i, i + size) for i in range(0, count, size)]

    def tensor(self) -> Tensor:
        """All rows (M, N), in the model's precision, float32 at least."""
        if self._rows.requires_grad and torch.is_grad_enabled():
            empty = self._rows.new_empty(0, self._width, dtype=self.dtype)
            return torch.cat([empty, *(self[part].to(self.dtype) for part in self.parts())])
        out = torch.empty(len(self), self._width, dtype=self.dtype, device=self.device)
        for part in self.parts():
            out[part] = self[part]
        return out


def rows_at_a_time(num_states: int, device: torch.device) -> int:
    """How many rows of N float32 numbers a piece holds: 4 MB, which a CPU's cache keeps, or 256 MB for a GPU."""
    return max(1, (2**20 if device.type == "cpu" else 2**26) // num_states)
