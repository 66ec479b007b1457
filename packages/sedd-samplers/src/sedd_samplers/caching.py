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

    What is kept is compared by contents. It is the last answer, as many rows as were asked for. Make one for each run:
    of a network that was trained on in the meantime it would not know.

    Args:
        model: a model of sequences (see `sedd_samplers.model_calls`) that ignores sigma.

    Returns:
        A model with the same answers.

    Raises:
        ValueError: for a score model made by this package, which depends on sigma: the network inside is what to cache;
            when first called, for a model whose answer changes with sigma.
    """
    if isinstance(model, Wrapper):
        raise ValueError(
            "cached takes a network that does not know the time, and this is a score model, which depends on sigma by "
            "the factor of its graph: cache the network inside, as in from_logits(cached(network), graph)"
        )
    offers_where, offers_rows = offers(model, "where"), offers(model, "rows")
    kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # sequence -> x (L,), where (L,) and the answer (m, N)

    def ask(x: Tensor, sigma: Tensor, where: Tensor, rows: Tensor) -> Tensor:
        further = {"rows": rows} if offers_rows else {}
        return model(x, sigma, where=where, **further) if offers_where else model(x, sigma, **further)[where]

    checked: list[bool] = []

    def check(x: Tensor, sigma: Tensor, where: Tensor, rows: Tensor) -> None:
        """Two calls about one sequence at different noise."""
        one, other = (ask(x[:1], level * torch.ones_like(sigma[:1]), where[:1], rows[:1]) for level in (0.5, 1.5))
        if not torch.allclose(one, other, rtol=1e-4, atol=1e-4, equal_nan=True):
            raise ValueError(
                "cached takes a network that does not know the time; this one's answer changes with sigma, by up to "
                f"{float((one - other).abs().max()):.3g} from sigma = 0.5 to 1.5"
            )
        checked.append(True)

    def at(x: Tensor, sigma: Tensor, where: Tensor, rows: Tensor) -> Tensor:
        sequences = rows.tolist()
        if not checked and len(x):
            check(x, sigma, where, rows)
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
                kept[sequences[i]] = (x[i].clone(), where[i].clone(), part)  # x may be edited in place
            if len(changed) == len(sequences):
                return answer
        return kept[sequences[0]][2] if len(sequences) == 1 else torch.cat([kept[b][2] for b in sequences])

    return Wrapper(at, model)
