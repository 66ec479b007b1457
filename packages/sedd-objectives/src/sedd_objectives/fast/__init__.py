"""What exists for speed or memory alone; the equations are in the modules outside, which know nothing of it.

    score_entropy_rows  score entropy of rows of log-scores: the number of `score_entropy.plain_score_entropy`, accurate
                        near its minimum, and no more than a chunk of rows worked on at a time (rows.py, divergence.py)
    sum_over_jumps      the same for jumps that are there already
    squares_over_jumps  concrete score matching of rows: the number of `score_entropy.plain_concrete_score_matching`
    each_row            any formula of a row, a chunk at a time

`fused.py` joins the network's head to score entropy, so that not even the log-scores of a batch exist: a linear head by
its products (linear_head.py, where a kernel for a device takes a chunk's place), any other by autograd (any_head.py).
"""

from __future__ import annotations

from .rows import JumpsAt, RowFunction, chunks_of, each_row, score_entropy_rows, squares_over_jumps, sum_over_jumps

__all__ = [
    "sum_over_jumps",
    "score_entropy_rows",
    "squares_over_jumps",
    "each_row",
    "chunks_of",
    "JumpsAt",
    "RowFunction",
]
