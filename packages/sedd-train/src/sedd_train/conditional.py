"""Likelihoods of what follows a text: LAMBADA's last word, and questions with several answers.

    nats = -log p(continuation | context), or a bound on it: the context's positions are given

They are clean, seen by the model, and do not count (`given=` of sedd_objectives). Under absorption the bound is that of
the model's own conditional; for other noise, of the process in which given positions never move. An autoregressive
model's is exact. A context that is too long is cut at its beginning.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from sedd_objectives import corpus_likelihood
from torch import Generator, Tensor
from tqdm import tqdm

from sedd_train.evaluation import bound_by
from sedd_train.randomness import EVALUATION, generator

__all__ = [
    *("Pair", "Conditional", "conditional", "score_bound", "token_pairs", "last_word"),
    *("Question", "read_questions", "questions_pairs", "Answers", "answers"),
]

UNDECIDED = 2.0
"""Standard errors of their difference by which the two likeliest answers must differ to count as decided."""

Pair = tuple[list[int], list[int]]
"""The tokens of a context, and of what follows it."""


class Estimated(Protocol):
    """Nats and their standard error, one a sequence: a `Bound` or an `Estimate`."""

    @property
    def value(self) -> Tensor:
        """(B,)."""

    @property
    def standard_error(self) -> Tensor:
        """(B,)."""


BoundOfRest = Callable[[Tensor, Tensor, Generator], Estimated]
"""(x0 (B, L) int64, given (B, L) bool, a generator) -> -log p(rest | given), (B,) nats."""


@dataclass(frozen=True)
class Conditional:
    """-log p(continuation | context) of n pairs, or bounds on it, and what they add up to.

    Attributes:
        value: (n,) float64 nats.
        standard_error: (n,) of the random times and noise; 0 where the likelihood is exact.
        tokens: (n,) int64, of the continuations.
    """

    value: Tensor
    standard_error: Tensor
    tokens: Tensor

    def per(self, count: float) -> tuple[float, float]:
        """All nats over a count of words, tokens or characters, and the standard error of the measurement."""
        corpus = corpus_likelihood(self, count)
        return corpus.nats_per_token, corpus.standard_error / count

    @property
    def spread(self) -> float:
        """Standard error of the mean over the pairs: how well these stand for others. NaN of a single one."""
        return float(self.value.std() / math.sqrt(len(self.value))) if len(self.value) > 1 else math.nan


def score_bound(net: Any, graph: Any, noise: Any, *, num_times: int, estimator: str) -> BoundOfRest:
    """Eq. 9 of a score model as a bound of the rest, by an estimator of `sedd_train.evaluation`: "times" or "masks"."""

    def bound(x0: Tensor, given: Tensor, random: Generator) -> Estimated:
        return bound_by(estimator, net, graph, noise, x0, num_times=num_times, generator=random, given=given)

    return bound


@torch.no_grad()
def conditional(
    bound: BoundOfRest,
    pairs: Sequence[Pair],
    *,
    length: int,
    device: torch.device | str = "cpu",
    seed: int = 0,
    chunk: int = 8,
    progress: bool = False,
) -> Conditional:
    """-log p(continuation | context) of pairs, those of one length together: there is no padding.

    Args:
        bound: what measures, such as `score_bound(net, graph, noise, num_times=16, estimator="masks")`.
        pairs: of tokens.
        length: the longest sequence that the model takes.
        device: where to measure.
        seed: of times and noise, which are the same at every call with the same pairs and chunk.
        chunk: sequences at once.
        progress: whether to show a bar.

    Raises:
        ValueError: no pairs, a continuation without tokens or longer than `length`, or as the bound.
    """
    sizes = torch.tensor([len(rest) for _, rest in pairs], dtype=torch.int64)
    if not len(sizes) or int(sizes.min()) < 1 or int(sizes.max()) > length:
        found = f"{int(sizes.min())} to {int(sizes.max())}" if len(sizes) else "no pairs"
        raise ValueError(f"pairs must have continuations of 1 to {length} tokens (the model's length), got {found}")
    rows = [[*context[max(0, len(context) - length + len(rest)) :], *rest] for context, rest in pairs]
    by_length: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(number)
    parts = [numbers[i : i + chunk] for numbers in by_length.values() for i in range(0, len(numbers), chunk)]
    values, errors = torch.zeros(2, len(rows), dtype=torch.float64)
    for part in tqdm(parts, desc="evaluating", unit="batch", disable=not progress, leave=False):
        x0 = torch.tensor([rows[number] for number in part], device=device)
        given = torch.arange(x0.shape[1]) < x0.shape[1] - sizes[part][:, None]
        measured = bound(x0, given.to(device), generator(seed, EVALUATION, part[0], device=device))
        values[part], errors[part] = measured.value.double().cpu(), measured.standard_error.double().cpu()
    return Conditional(values, errors, sizes)


def token_pairs(texts: Iterable[tuple[str, str]], coder: Any) -> list[Pair]:
    """The tokens of contexts and of what follows them, each tokenised by itself."""
    flat = [part for text in texts for part in text]
    if not flat:
        return []
    try:
        coded = coder(flat, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    except Exception as error:  # tokenizers raises no other type
        raise ValueError(f"the text has what the tokenizer cannot write ({error})") from error
    return list(zip(coded[::2], coded[1::2], strict=True))


def last_word(text: str) -> tuple[str, str]:
    """A text up to its last word, and that word with the space before it.

    Raises:
        ValueError: there are not two words.
    """
    context, space, word = text.rstrip().rpartition(" ")
    if not context.strip():
        raise ValueError(f"a text must have two words at least, for the last one to follow something, got {text!r:.60}")
    return context, space + word


@dataclass(frozen=True)
class Question:
    """A text and what may follow it, of which one is right."""

    context: str
    choices: tuple[str, ...]
    answer: int


def read_questions(path: Path) -> list[Question]:
    """Questions from JSON lines with the keys "context", "choices" (two texts or more) and "answer" (from 0 on).

    Raises:
        ValueError: a line that is no such question, by its number; or none.
        OSError: the file cannot be read.
    """
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            held = json.loads(line)
            question = Question(held["context"], tuple(held["choices"]), held["answer"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: no question with context, choices and answer ({error})") from None
        texts = (question.context, *question.choices)
        if len(question.choices) < 2 or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"{path}, line {number}: a context and two choices at least must be texts, got {line:.80}")
        if type(question.answer) is not int or not 0 <= question.answer < len(question.choices):
            raise ValueError(
                f"{path}, line {number}: answer must be 0 to {len(question.choices) - 1}, got {question.answer!r}"
            )
        questions.append(question)
    if not questions:
        raise ValueError(f"{path} holds no question")
    return questions


def questions_pairs(questions: Iterable[Question]) -> list[tuple[str, str]]:
    """Each question's context with each of its choices, a space between them, for `token_pairs`."""
    return [(question.context.rstrip(), " " + text.lstrip()) for question in questions for text in question.choices]


@dataclass(frozen=True)
class Answers:
    """How often the likeliest choice is the right one.

    Attributes:
        accuracy: by the likelihood of the whole choice.
        per_token: by the likelihood a token.
        per_character: by the likelihood a character.
        undecided: the share of questions whose two likeliest whole choices differ by less than 2 standard errors.
        number: of questions.
    """

    accuracy: float
    per_token: float
    per_character: float
    undecided: float
    number: int

    def error(self, accuracy: float) -> float:
        """Standard error of one of the accuracies over the questions."""
        return math.sqrt(accuracy * (1 - accuracy) / self.number)


def answers(measured: Conditional, questions: Sequence[Question]) -> Answers:
    """Which choices a model takes, of what `conditional` gives for the questions' pairs in their order."""
    counts = [len(question.choices) for question in questions]
    characters = torch.tensor([len(text.strip()) for question in questions for text in question.choices])
    right = torch.tensor([question.answer for question in questions])

    def accuracy(nats: Tensor) -> float:
        taken = torch.stack([part.argmin() for part in torch.split(nats, counts)])
        return float((taken == right).double().mean())

    open_ones = 0
    parts = torch.split(measured.value, counts), torch.split(measured.standard_error, counts)
    for nats, error in zip(*parts, strict=True):
        first, second = nats.argsort()[:2]
        apart, noise = nats[second] - nats[first], torch.hypot(error[first], error[second])
        open_ones += bool(apart <= UNDECIDED * noise)
    return Answers(
        accuracy(measured.value),
        accuracy(measured.value / measured.tokens),
        accuracy(measured.value / characters),
        open_ones / len(questions),
        len(questions),
    )
