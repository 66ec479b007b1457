"""What a tokenizer and a model say of their ids: the mask, the ends, what is never drawn; and prompts as ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

__all__ = ["mask_of", "ends_of", "pad_of", "banned_of", "prompt_ids"]


def mask_of(model: Any, tokenizer: Any, mask_id: int | None) -> int:
    """The id of the mask: as given, else the tokenizer's, else that of the model's configuration. Never a guess.

    Raises:
        ValueError: nobody names one, or tokenizer and configuration name different ones.
    """
    if mask_id is not None:
        return mask_id
    config = getattr(model, "config", None)
    named = {
        f"the {who}'s mask_token_id": value
        for who, part in (("tokenizer", tokenizer), ("configuration", config))
        if (value := getattr(part, "mask_token_id", None)) is not None
    }
    if not named:
        raise ValueError(
            f"no mask can be found for the {type(model).__name__}: neither its tokenizer nor its configuration has a "
            "mask_token_id. Name the id that it was trained with, mask_id="
        )
    if len(set(named.values())) > 1:
        told = " and ".join(f"{who} is {value}" for who, value in named.items())
        raise ValueError(f"{told}: say which mask the {type(model).__name__} was trained with, mask_id=")
    return int(next(iter(named.values())))


def ends_of(*parts: Any) -> set[int]:
    """The ids that end a text: eos_token_id of a tokenizer, configuration or generation configuration."""
    ends: set[int] = set()
    for part in parts:
        named = getattr(part, "eos_token_id", None)
        ends.update([] if named is None else named if isinstance(named, list | tuple) else [named])
    return ends


def pad_of(model: Any, tokenizer: Any) -> int | None:
    """The id that is padding and nothing else; None where there is none, or where it ends texts as well."""
    config = getattr(model, "config", None)
    pad = next((p for part in (tokenizer, config) if (p := getattr(part, "pad_token_id", None)) is not None), None)
    return None if pad in ends_of(tokenizer, config) else pad


def banned_of(model: Any, tokenizer: Any, num_states: int) -> list[int]:
    """The states that are never drawn: special tokens, and those that the tokenizer cannot decode.

    An end of text is drawn, unless the tokenizer frames every text ([CLS] ... [SEP]): there the frame is given.
    """
    if tokenizer is None:
        return []
    known = set(tokenizer.get_vocab().values())
    special = set(getattr(tokenizer, "all_special_ids", ()))
    if getattr(tokenizer, "cls_token_id", None) is None:
        special -= ends_of(tokenizer, getattr(model, "config", None))
    return sorted({state for state in range(num_states) if state not in known} | {i for i in special if i < num_states})


def prompt_ids(tokenizer: Any, prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
    """The ids of a text to be continued, or of a conversation: with what the tokenizer puts first, without what last.

        x, given = pad_prompts([prompt_ids(tokenizer, "the cat")], 32)

    A tokenizer that frames texts ends "[CLS] the cat [SEP]" where it should go on.

    Args:
        tokenizer: of transformers, or with its `__call__(text, add_special_tokens=)["input_ids"]` and, for a
            conversation, its `apply_chat_template`.
        prompt: a text, or messages {"role": ..., "content": ...}, after which the model is to answer.

    Returns:
        The ids.

    Raises:
        ValueError: the tokenizer writes the text differently with special tokens around it.
    """
    if not isinstance(prompt, str):
        made = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=True)
        return _plain(made["input_ids"] if isinstance(made, Mapping) else made)
    framed = _plain(tokenizer(prompt)["input_ids"])
    text = _plain(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if not text:
        last = {getattr(tokenizer, "sep_token_id", None), getattr(tokenizer, "eos_token_id", None)}
        return framed[:-1] if framed and framed[-1] in last else framed
    for start in range(len(framed) - len(text) + 1):
        if framed[start : start + len(text)] == text:
            return framed[: start + len(text)]
    raise ValueError(
        f"the tokenizer gives {text} for {prompt!r} and, with special tokens, {framed}: say the prompt's ids yourself"
    )


def _plain(ids: Any) -> list[int]:
    ids = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
    return _plain(ids[0]) if ids and isinstance(ids[0], Iterable) else [int(i) for i in ids]
