"""Labels as conditions: a column of the text's rows says what each document is, and the network is told.

    log s(x_t | c),    c the label of the document, or for a share of the samples none

A network so trained has both scores of classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598; for discrete
diffusion Nisonoff et al. 2024, arXiv 2406.01572, and Schiff et al. 2024, arXiv 2412.10193), which
`sedd_samplers.guidance` combines. A row is one document, for a block of several has no one label.

The network holds a vector a label, zeros at first; no label, -1, adds nothing. What the labels are called stands in
config.json, as `labels`, and how long documents of each of them are, as `lengths_of_labels`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sedd_nets import LabelCondition
from sedd_nets.conditioning import ClassTable
from torch import Tensor

from sedd_train import randomness
from sedd_train.recipes import Recipe
from sedd_train.token_cache import Corpus
from sedd_train.tokens import Tokens

__all__ = ["conditioned", "names_of", "number_of", "law_of_lengths", "given", "dropped", "NONE"]

NONE = -1


def conditioned(net: Any, text: Corpus, recipe: Recipe) -> tuple[Corpus, dict[str, Any]]:
    """Let a network be conditioned on a text's labels, in place.

    A network that has labels keeps them, and the text's have to be among them. The vectors of labels are trained,
    whatever else is.

    Args:
        net: one of sedd_nets that is modulated.
        text: of labelled documents.
        recipe: of the run.

    Returns:
        The text, its labels numbered as the network has them; and what config.json says of them.

    Raises:
        ValueError: the text has no labels, or others than the network; or this takes no condition.
    """
    if not text.labels:
        raise ValueError(f"label_column = {recipe.label_column!r}: the corpus that was given has no labels")
    if recipe.packing:
        raise ValueError("the corpus has labels, and a block of several documents has no one label: packing = false")
    if getattr(net, "sigma_map", None) is None:
        raise ValueError(f"{type(net).__name__} takes no condition, and labels are one: leave out --label-column")
    if not _classes(net):
        net.condition_embed = LabelCondition(len(text.labels), net.cond_dim)
        net.sections["labels"] = list(text.labels)
    own = names_of(net)
    for name in text.labels:
        if name not in own:
            raise ValueError(f"the text has the label {name!r}, and the network has learnt {_listed(own)}")
    _table(net).requires_grad_(True)
    numbers = np.array([*(own.index(name) for name in text.labels), -1], np.int32)  # -1 is the last
    train, valid, test = (_renumbered(tokens, numbers) for tokens in (text.train, text.valid, text.test))
    laws = [_law(train, number, recipe.length) for number in range(len(own))]
    return dataclasses.replace(text, train=train, valid=valid, test=test), {"labels": own, "lengths_of_labels": laws}


def _renumbered(tokens: Tokens, numbers: NDArray[np.int32]) -> Tokens:
    assert tokens.labels is not None
    return dataclasses.replace(tokens, labels=numbers[tokens.labels])


def _law(tokens: Tokens, label: int, length: int) -> list[int]:
    """How many rows of a label hold 1, 2, ... tokens, up to the longest."""
    assert tokens.labels is not None
    counts = tokens.law_of_lengths(length, tokens.labels == label)
    return counts[: max((size for size, count in enumerate(counts, 1) if count), default=0)]


def _table(net: Any) -> Any:
    """What holds the vectors of labels; None where nothing does."""
    own = getattr(net, "cond_map", None)
    table = getattr(net, "condition_embed", None) if own is None else own
    return table if isinstance(table, LabelCondition | ClassTable) else None


def _classes(net: Any) -> int:
    """How many labels a network tells apart; 0 for one without."""
    table = _table(net)
    if isinstance(table, LabelCondition):
        return len(table.weight)
    return 0 if table is None else int(table.classes)


def names_of(net: Any) -> list[str]:
    """The labels of a network, in the order of their numbers: words, or the numbers where they have no names.

    Raises:
        ValueError: config.json has others than the network.
    """
    if (count := _classes(net)) == 0:
        return []
    names = net.sections.get("labels", [str(number) for number in range(count)])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) != count:
        raise ValueError(f"config.json: labels must be the names of the network's {count}; got {names!r:.200}")
    return list(names)


def number_of(net: Any, name: str) -> int:
    """The number of a label.

    Raises:
        ValueError: the network does not know it, or no label at all.
    """
    own = names_of(net)
    if not own:
        raise ValueError(f"label {name!r}: this model was trained without labels")
    if name not in own:
        raise ValueError(f"label {name!r}: this model knows {_listed(own)}")
    return own.index(name)


def law_of_lengths(net: Any, name: str | None) -> list[int] | None:
    """How many rows of 1, 2, ... tokens a model was trained on, of a label or in all; None where it does not say.

    Raises:
        ValueError: the network does not know the label; or config.json makes no sense.
    """
    if name is None:
        return net.sections.get("lengths")  # type: ignore[no-any-return]
    number, laws = number_of(net, name), net.sections.get("lengths_of_labels")
    if laws is None:
        return net.sections.get("lengths")  # type: ignore[no-any-return]
    if not isinstance(laws, list) or len(laws) != _classes(net) or not all(isinstance(law, list) for law in laws):
        raise ValueError(f"config.json: lengths_of_labels must be a list for each label; got {laws!r:.200}")
    return list(laws[number])


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def dropped(labels: Tensor, share: float, seed: int, step: int, samples: Sequence[int]) -> Tensor:
    """Labels (n,) of samples g of a step, none (-1) for this share of all, a function of the seed, the step and g."""
    random = [torch.rand((), generator=randomness.generator(seed, randomness.LABELS, step, g)) for g in samples]
    return torch.where(torch.stack(random) < share, NONE, labels)


class _Given:
    """A network under a condition, which offers what the network does."""

    def __init__(self, net: Any, labels: Tensor) -> None:
        self.net, self.labels = net, labels

    def __getattr__(self, name: str) -> Any:
        return getattr(self.net, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.net(*args, condition=self.labels, **options)

    def hidden(self, *args: Any, **options: Any) -> Any:
        return self.net.hidden(*args, condition=self.labels, **options)


def given(net: Any, labels: Tensor | None) -> Any:
    """The network with the label of each sequence of its batch, (B,) int64, -1 for none; None: as it is."""
    return net if labels is None else _Given(net, labels)
