"""What exists for speed or memory alone; the equations are in the modules outside, which know nothing of it.

    sum_over_jumps      score entropy of rows of log-scores: `score_entropy.plain_score_entropy`, accurate near its
                        minimum, and nothing of the log-scores' size made but one chunk (rows.py, divergence.py)
    sum_over_chunks     the same, of jumps that are themselves made a chunk at a time and pass on gradients
    squares_over_jumps  concrete score matching of rows: `score_entropy.plain_concrete_score_matching`
    each_row            any formula of a row, a chunk at a time

`fused.py` joins the network's head to score entropy, so that not even the log-scores of a batch exist.
"""

from __future__ import annotations

from .rows import JumpsAt, RowFunction, chunks_of, each_row, squares_over_jumps, sum_over_chunks, sum_over_jumps

__all__ = [
    "sum_over_jumps",
    "sum_over_chunks",
    "squares_over_jumps",
    "each_row",
    "chunks_of",
    "JumpsAt",
    "RowFunction",
]
