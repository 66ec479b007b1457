"""A network with what belongs to the sequences of one batch, as a score model of their states alone.

Samplers call `score(x, sigma, where=, rows=)`, where `rows` says which sequences of the run those of x are: finished
ones leave the batch. What a network is told besides, the length or condition of each sequence, must leave with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sedd_nets.documents import Documents
from sedd_nets.transformer import Transformer

__all__ = ["bind"]

ScoreModel = Callable[..., Tensor]


def bind(
    net: Transformer,
    *,
    lengths: Sequence[int] | Tensor | None = None,
    condition: Sequence[int] | Tensor | None = None,
) -> ScoreModel:
    """A score model of one run's sequences, each of a length and under a condition of its own.

        x, given = pad_prompts(prompts, lengths, pad_id=0)
        x = infill(bind(net, lengths=lengths), graph, noise, x=x, given=given)

    What stands behind a sequence's length is seen by nothing, whatever its tokens: a sequence's sample is the one that
    it would have alone.

    Args:
        net: a network of this package.
        lengths: (B,) of the run's sequences, which are padded at their ends; None: no padding.
        condition: (B,) labels or (B, P) prompt embeddings; None: none.

    Returns:
        `score(x, sigma, where=None, rows=None, positions=None)`, the log-score as the network gives it; rows (b,) int64
        says which of the B sequences the b rows of x are, all of them in order unless given. Its attribute `sequences`
        is B, by which samplers refuse a run of another number.

    Raises:
        ValueError: lengths and condition are of different numbers of sequences, or one number alone; when called, x has
            not as many rows as there are sequences, and no `rows`, or is shorter than a length.
    """
    sizes, told = (None if a is None else torch.as_tensor(a) for a in (lengths, condition))
    for name, a in (("lengths", sizes), ("condition", told)):
        if a is not None and a.ndim == 0:
            raise ValueError(f"{name} must have one entry for each sequence, got {a.item()!r} alone")
    numbers = {len(a) for a in (sizes, told) if a is not None}
    if len(numbers) > 1:
        raise ValueError(f"lengths and condition are of different numbers of sequences: {sorted(numbers)}")

    there: dict[torch.device, list[Tensor | None]] = {}

    def score(
        x: Tensor,
        sigma: Tensor,
        where: Tensor | None = None,
        rows: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        if rows is None and numbers and len(x) not in numbers:
            raise ValueError(f"x has {len(x)} rows, and {max(numbers)} sequences were bound: say which they are, rows=")
        if x.device not in there:  # a copy at every step would wait
            there[x.device] = [None if a is None else a.to(x.device) for a in (sizes, told)]
        of_rows = there[x.device]
        if rows is not None:
            of_rows = [None if a is None else a[rows] for a in of_rows]
        documents = None if of_rows[0] is None else Documents.padded(of_rows[0], x.shape[1])
        log_score: Tensor = net(x, sigma, where, positions=positions, condition=of_rows[1], documents=documents)
        return log_score

    if numbers:
        setattr(score, "sequences", max(numbers))  # noqa: B010, a function has no such attribute of its own
    return score
