"""Prompts: which positions of a sequence are given and which are free (equations 21 and 22).

A prompt is a row of tokens and a mask of the positions that do not move. It is all that infilling needs: a prefix, a
suffix, both, or a text with blanks anywhere.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Prompt", "around", "with_blanks"]


class Prompt(NamedTuple):
    """Tokens `x` (L,) int64 and `given` (L,) bool; x is 0 where it is not given."""

    x: Tensor
    given: Tensor


def around(tokenizer: Any, length: int, *, prefix: str = "", suffix: str = "") -> Prompt:
    """A prompt of `length` tokens that begins with `prefix` and ends with `suffix`.

    Raises:
        ValueError: the two together leave no free position.
    """
    before, after = _encode(tokenizer, prefix), _encode(tokenizer, suffix)
    free = length - len(before) - len(after)
    if free <= 0:
        raise ValueError(
            f"the prompt has {len(before)} + {len(after)} tokens (prefix + suffix) and the sequence {length}: "
            "no position is left to fill; shorten the prompt or use a longer sequence"
        )
    return _prompt([*before, *([None] * free), *after])


def with_blanks(tokenizer: Any, text: str, length: int) -> Prompt:
    r"""A prompt from a text in which each underscore is one free token: "The ____ of the Union".

    An underscore that is meant has a backslash before it: "my\_variable = ____". The sequence is as long as the text;
    `length` is the most the model takes.

    Raises:
        ValueError: the text has no blank, or more than `length` tokens.
    """
    tokens: list[int | None] = []
    for piece in re.findall(r"_+|(?:[^_\\]|\\_?)+", text):
        if piece[0] == "_":
            tokens += [None] * len(piece)
            continue
        written = piece.replace("\\_", "_")
        # Where the space before a word belongs to the word's token, a blank swallows the spaces before it.
        tokens += _encode(tokenizer, written.rstrip(" ") if _joins_spaces(tokenizer) else written)
    if None not in tokens:
        raise ValueError(f"the text {text!r} has no blank to fill: write one underscore for each free token")
    if len(tokens) > length:
        raise ValueError(
            f"the text has {len(tokens)} tokens, blanks included; the model takes sequences of up to {length}"
        )
    return _prompt(tokens)


def _encode(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, as those of text to train on: what spells a special token is text."""
    if not text:
        return []
    return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))


def _joins_spaces(tokenizer: Any) -> bool:
    """Whether a space and the word behind it are one piece, as in byte-level vocabularies; not so with characters."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.pre_tokenizer is None:
        return True
    *_, (last, _) = backend.pre_tokenizer.pre_tokenize_str("a b")
    return bool(last != "b")


def _prompt(tokens: list[int | None]) -> Prompt:
    given = torch.tensor([token is not None for token in tokens])
    return Prompt(torch.tensor([0 if token is None else token for token in tokens]), given)
