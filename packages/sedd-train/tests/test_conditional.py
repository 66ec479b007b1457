"""Likelihoods of what follows a text: against enumerated conditionals, by hand, and as the command prints them."""

from __future__ import annotations

import functools
import itertools
import json
import math
from typing import Any

import pytest
import torch
from sedd_graphs import Absorbing, Geometric, LogLinear, Uniform
from sedd_nets import SEDD
from sedd_objectives import Estimate
from sedd_train import commands, tokenizers
from sedd_train.conditional import (
    Conditional,
    Pair,
    Question,
    answers,
    conditional,
    last_word,
    questions_pairs,
    read_questions,
    score_bound,
    token_pairs,
)
from sedd_train.corpora import load_texts
from sedd_train.evaluation import choose_estimator, evaluate
from torch.nn.functional import one_hot

WORDS = torch.rand(3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 3
JOINT = WORDS / WORDS.sum()
"""Of three tokens; of two, the first two of them."""


def joint_of(length: int) -> torch.Tensor:
    return JOINT if length == 3 else JOINT.sum(2)


def truth(context: list[int], rest: list[int]) -> float:
    """-log p(rest | context)."""
    joint = joint_of(len(context) + len(rest))
    given = joint[tuple(context)].sum()
    return -math.log(joint[(*context, *rest)] / given)


@functools.cache
def posteriors(length: int) -> torch.Tensor:
    """p(token | the unmasked tokens) at every position of every sequence, the mask being 3, (4, .., 4, length, 3)."""
    full = torch.zeros(*[4] * length, length, 3, dtype=torch.float64)
    for x in itertools.product(range(4), repeat=length):
        for i in range(length):
            weight = joint_of(length)
            for j, token in enumerate(x):
                if token < 3 and j != i:
                    weight = weight * one_hot(torch.tensor(token), 3).reshape(
                        [3 if k == j else 1 for k in range(length)]
                    )
            full[(*x, i)] = weight.sum([k for k in range(length) if k != i]) if length > 1 else weight
    return full / full.sum(-1, keepdim=True)


def masked_score(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The exact one under absorption, p(token | the unmasked tokens) / (e^sigma - 1)."""
    p = posteriors(x.shape[1])[tuple(x.T)]
    return torch.cat([p.log() - sigma.double().expm1().log()[:, None, None], torch.zeros(*x.shape, 1)], -1)


@pytest.mark.parametrize(("estimator", "repeats"), [("masks", 1), ("times", 1000)])
def test_under_absorption_it_is_the_conditional(estimator: str, repeats: int) -> None:
    """Within 4 stated standard errors, and the 1e-3 of the tokens that the schedule leaves as they are at its ends.

    By random times the error of one sequence is itself known badly: there that of a pair's repeats is the one to hold.
    """
    pairs = [([a], [b]) for a, b in itertools.product(range(3), repeat=2)]
    pairs += [([a], [b, c]) for a, b, c in itertools.product(range(3), repeat=3)]
    pairs += [([a, b], [c]) for a, b, c in itertools.product(range(3), repeat=3)] + [([], [0, 1, 2])]
    bound = score_bound(
        masked_score, Absorbing(3), LogLinear(), num_times=8 if repeats > 1 else 64, estimator=estimator
    )
    found = conditional(bound, pairs * repeats, length=3, chunk=9000)
    assert found.tokens.tolist() == [len(rest) for _, rest in pairs] * repeats
    want = torch.tensor([truth(*pair) for pair in pairs], dtype=torch.float64)
    value, error = found.value.reshape(repeats, -1), found.standard_error.reshape(repeats, -1)
    off = (value.mean(0) - want).abs() - 4 * error.square().sum(0).sqrt() / repeats
    assert (off <= 2e-3 * (2 + want)).all()
    total, error_of_total = found.per(float(found.tokens.sum()))
    assert abs(total - float(want.sum() * repeats / found.tokens.sum())) <= 4 * error_of_total + 4e-3
    assert error_of_total < (2e-3 if estimator == "masks" else 1e-2)


def test_under_token_noise_it_bounds_the_conditional_of_the_process_that_leaves_the_context_alone() -> None:
    """The exact score of the second token: over p(second | first) the mean is its entropy and what the prior costs."""
    graph, noise, p = Uniform(3), Geometric(), JOINT.sum(2)[1] / JOINT.sum(2)[1].sum()

    def score(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        assert (x[:, 0] == 1).all()
        level = sigma.double()[:, None]
        marginal = (-level).exp() * p - (-level).expm1() / 3
        own = marginal.log() - marginal.log().gather(-1, x[:, 1:])
        return torch.stack([torch.zeros_like(own), own], 1)

    seconds = torch.multinomial(p, 3000, replacement=True, generator=torch.Generator().manual_seed(0)).tolist()
    bound = score_bound(score, graph, noise, num_times=8, estimator="times")
    found = conditional(bound, [([1], [second]) for second in seconds], length=2, chunk=1000)
    want = float(-(p * p.log()).sum())  # at sigma = 20 nothing is left to cost
    assert abs(float(found.value.mean()) - want) < 4 * found.spread


def test_rows_are_measured_with_those_of_their_length_and_cut_at_their_beginning() -> None:
    seen: list[tuple[list[list[int]], list[list[bool]]]] = []

    def bound(x0: torch.Tensor, given: torch.Tensor, random: torch.Generator) -> Estimate:
        seen.append((x0.tolist(), given.tolist()))
        return Estimate((x0 * ~given).sum(-1).float(), given.sum(-1).float())

    pairs = [([1, 2], [3]), ([4], [5, 6]), ([9, 9, 9, 7], [8]), ([1], [2]), ([5, 5], [6])]
    found = conditional(bound, pairs, length=4, chunk=2)
    assert found.value.tolist() == [3, 11, 8, 2, 6]
    assert found.standard_error.tolist() == [2, 1, 3, 1, 2]
    rows = [row for part, _ in seen for row in part]
    assert sorted(rows) == [[1, 2], [1, 2, 3], [4, 5, 6], [5, 5, 6], [9, 9, 7, 8]]
    assert sorted(len(part) for part, _ in seen) == [1, 1, 1, 2]
    wrongs: list[tuple[list[Pair], str]] = [([], "no pairs"), ([([1], [])], "0 to 0"), ([([], [1] * 5)], "5 to 5")]
    for wrong, said in wrongs:
        with pytest.raises(ValueError, match=f"continuations of 1 to 4 tokens .*, got {said}"):
            conditional(bound, wrong, length=4)


def test_corpus_numbers_by_hand() -> None:
    measured = Conditional(torch.tensor([1.0, 3.0]), torch.tensor([0.3, 0.4]), torch.tensor([1, 3]))
    assert measured.per(2) == pytest.approx((2.0, 0.25))
    assert measured.per(4) == pytest.approx((1.0, 0.125))
    assert measured.spread == pytest.approx(1.0)


def test_words_and_questions() -> None:
    assert last_word("a b,  c\n") == ("a b, ", " c")
    with pytest.raises(ValueError, match="two words at least"):
        last_word(" one")
    question = Question("It was ", (" cold", "hot"), 1)
    assert questions_pairs([question]) == [("It was", " cold"), ("It was", " hot")]


def test_the_likeliest_choice_is_taken_whole_by_token_and_by_character() -> None:
    """Nats 2, 3 | 4, 1: wrong, right; a token 2, 1.5 | 0.8, 1: right, wrong; a character 1, 0.3 | 1.3, 0.3: both."""
    questions = [Question("q", ("ab", "abcdefghi"), 1), Question("q", ("abc", "xyz "), 1)]
    nats, tokens = torch.tensor([2.0, 3.0, 4.0, 1.0]), torch.tensor([1, 2, 5, 1])
    sure = Conditional(nats, torch.zeros(4), tokens)
    found = answers(sure, questions)
    assert (found.accuracy, found.per_token, found.per_character, found.undecided) == (0.5, 0.5, 1.0, 0.0)
    assert found.error(found.accuracy) == pytest.approx(math.sqrt(0.25 / 2))
    noisy = Conditional(nats, torch.tensor([0.3, 0.4, 0.3, 0.4]), tokens)  # 1 is 2 x 0.5
    assert answers(noisy, questions).undecided == 0.5


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: no question with context, choices and answer"),
        ('{"context": "a", "choices": ["b"], "answer": 0}', "line 2: a context and two choices at least must be texts"),
        ('{"context": "a", "choices": ["b", 3], "answer": 0}', "line 2: a context and two choices at least"),
        ('{"context": "a", "choices": ["b", "c"], "answer": 2}', "line 2: answer must be 0 to 1, got 2"),
        ('{"context": "a", "choices": ["b", "c"], "answer": true}', "line 2: answer must be 0 to 1, got True"),
    ],
)
def test_what_is_no_question_is_named(line: str, said: str, tmp_path: Any) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"context": "a", "choices": ["b", "c"], "answer": 1}\n' + line)
    with pytest.raises(ValueError, match=said):
        read_questions(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no question"):
        read_questions(path)


def test_the_better_estimator_is_chosen_and_both_measure_one_number() -> None:
    tokens = torch.arange(3)
    assert choose_estimator("best", Absorbing(3), tokens) == "masks"
    assert choose_estimator("best", Uniform(3), tokens) == choose_estimator("times", Absorbing(3), tokens) == "times"
    with pytest.raises(ValueError, match="estimator must be best, times or masks, got 'mask'"):
        choose_estimator("mask", Absorbing(3), tokens)

    class Net(torch.nn.Linear):
        def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return masked_score(x, sigma)

    blocks = torch.multinomial(JOINT.flatten(), 60, replacement=True, generator=torch.Generator().manual_seed(0))
    blocks = torch.stack([blocks // 9, blocks // 3 % 3, blocks % 3], -1)
    how: dict[str, Any] = {"characters_per_token": 1.0, "num_times": 32, "chunk": 60}
    masks, times = (
        evaluate(Net(1, 1), Absorbing(3), LogLinear(), blocks, estimator=name, **how) for name in ("best", "times")
    )
    assert (masks.estimator, times.estimator) == ("masks", "times")
    assert masks.measurement_error < times.measurement_error / 4
    assert abs(masks.nats_per_token - times.nats_per_token) < 4 * times.measurement_error
    exact = -JOINT[tuple(blocks.T)].log().mean() / 3
    assert abs(masks.nats_per_token - float(exact)) < 4 * masks.measurement_error + 4e-3
    with pytest.raises(ValueError, match="use likelihood_bound"):
        evaluate(Net(1, 1), Uniform(4), LogLinear(), blocks, estimator="masks", **how)


def test_the_command_measures_last_words_and_choices(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["we the people of the state", "the state of the union is strong", "free and equal people"] * 3
    coder = tokenizers.load_tokenizer("bpe:280", lambda: texts)
    net = SEDD(len(coder) + 1, width=16, depth=1, heads=2, cond_dim=8, length=16, dropout=0.0, scale_by_sigma=True)
    sections = {"tokens": len(coder), "graph": {"type": "absorb"}, "noise": {"type": "loglinear"}}
    net.save_pretrained(tmp_path / "model", sections=sections)
    coder.save_pretrained(tmp_path / "model")
    for number, text in enumerate(texts[:3]):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    asked = [{"context": texts[0], "choices": ["of", "union"], "answer": 1}] * 3
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, asked)))
    model = ["evaluate", "--checkpoint", str(tmp_path / "model"), "--num-times", "4", "--device", "cpu"]
    corpus = ["--corpus", str(tmp_path / "texts"), "--split", "train"]

    commands.main([*model, *corpus, "--last-word", "--json"])
    found = json.loads(capsys.readouterr().out)
    words = token_pairs([last_word(text) for text in load_texts(str(tmp_path / "texts")).train()], coder)
    assert found["words"] == len(words)
    nats = len(words) * found["nats_per_word"]
    assert found["nats_per_token"] * sum(len(rest) for _, rest in words) == pytest.approx(nats)
    assert found["estimator"] == "masks"
    assert 0 < found["nats_per_token"] <= found["nats_per_word"]
    assert found["perplexity"] == pytest.approx(math.exp(found["nats_per_word"]))
    commands.main([*model, *corpus, "--last-word"])
    assert "nats a word (standard error of the measurement" in capsys.readouterr().out

    commands.main([*model, "--choices", str(tmp_path / "questions.jsonl"), "--blocks", "2", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["number"] == 2
    assert found["accuracy"] in (0.0, 1.0)  # the same question twice
    commands.main([*model, "--choices", str(tmp_path / "questions.jsonl"), "--estimator", "times"])
    assert "3 questions of" in capsys.readouterr().out

    for wrong, said in [
        (["--choices", str(tmp_path / "questions.jsonl"), "--blocks", "4"], "--blocks 4: there are 3 questions"),
        (["--choices", str(tmp_path / "none.jsonl")], "none.jsonl"),
        ([*corpus, "--num-times", "3"], "--num-times must be even and at least 2, got 3"),
    ]:
        with pytest.raises(SystemExit):
            commands.main([*model, *wrong])
        assert said in capsys.readouterr().err
