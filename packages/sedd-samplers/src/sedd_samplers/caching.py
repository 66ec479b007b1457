"""Models that do not know the time need not be asked twice about a sequence that has not changed.

Under an absorbing graph with many steps most steps move nothing in a given sequence. A network that does not take sigma
answers as before; what is kept of its answer is compared sequence by sequence, with equality of the states.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .interfaces import RowModel
from .model_calls import Wrapper, offers

__all__ = ["cached"]


def cached(model: Callable[..., Tensor]) -> RowModel:
    """The same model, called only for sequences that have changed since its last call.

        score = from_logits(cached(network), graph)

    It keeps the last answer, as many rows as were asked for. Make one for each run: of a network that was trained on
    in the meantime it would not know.

    Args:
        model: a model of sequences (see `sedd_samplers.model_calls`) that ignores sigma.

    Returns:
        A model with the same answers.
    """
    offers_where, offers_rows = offers(model, "where"), offers(model, "rows")
    kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # sequence -> x (L,), where (L,) and the answer (m, N)

    def ask(x: Tensor, sigma: Tensor, where: Tensor, rows: Tensor) -> Tensor:
        further = {"rows": rows} if offers_rows else {}
        return model(x, sigma, where=where, **further) if offers_where else model(x, sigma, **further)[where]

    def at(x: Tensor, sigma: Tensor, where: Tensor, rows: Tensor) -> Tensor:
        sequences = rows.tolist()
        changed = [
            i
            for i, b in enumerate(sequences)
            if b not in kept or not (torch.equal(kept[b][0], x[i]) and torch.equal(kept[b][1], where[i]))
        ]
        for finished in kept.keys() - set(sequences):
            del kept[finished]
        if changed:
            answer = ask(x[changed], sigma[changed], where[changed], rows[changed])
            for i, part in zip(changed, torch.split(answer, where[changed].sum(1).tolist()), strict=True):
                kept[sequences[i]] = (x[i], where[i], part)
            if len(changed) == len(sequences):
                return answer
        return kept[sequences[0]][2] if len(sequences) == 1 else torch.cat([kept[b][2] for b in sequences])

    return Wrapper(at)
