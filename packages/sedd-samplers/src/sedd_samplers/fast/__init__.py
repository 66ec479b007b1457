"""What is here for speed and memory alone: the same results as the plain equations give, which are tested so."""

from __future__ import annotations

from .caching import cached
from .categorical import draw_by_blocks
from .rows import convert_rows, rows_at_a_time, spread, times_row, widened

__all__ = ["cached", "convert_rows", "draw_by_blocks", "rows_at_a_time", "spread", "times_row", "widened"]
