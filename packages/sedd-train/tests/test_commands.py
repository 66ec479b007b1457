"""The command `sedd`: its words, what it says to a wrong one, and that launchers find it as a module."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from sedd_graphs import Absorbing, LogLinear
from sedd_nets import SEDD
from sedd_samplers import clamped
from sedd_train import Model, commands, pipelines
from sedd_train.commands import evaluate, export, infill, plan, report, sample, train
from sedd_train.text8 import character_tokenizer

SMALL = (
    *("--recipe", "tiny", "--network", "sedd", "--optimizer", "adamw", "--zero-stage", "1"),
    *("--tokenizer", "bpe:300", "--length", "32", "--width", "32", "--depth", "1", "--heads", "2"),
    *(
        "--cond-dim",
        "16",
        "--batch-size",
        "8",
        "--evaluate-blocks",
        "2",
        "--evaluate-times",
        "2",
        "--sample-steps",
        "2",
    ),
    "--no-tensorboard",
)


def exit_code(*words: str) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        commands.main(words)
    return ended.value.code


def test_without_a_word_it_lists_its_words(capsys):
    commands.main([])
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in commands.COMMANDS)


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_word_explains_itself(name, capsys):
    assert exit_code(name, "--help") == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: sedd {name} ")
    assert f"\nsedd {name} " in printed  # an example to copy


def test_a_wrong_word_is_told_the_nearest(capsys):
    assert exit_code("trian") == 2
    assert "no command 'trian'; did you mean `sedd train`?" in capsys.readouterr().err
    assert exit_code("eval") == 2
    assert "did you mean `sedd evaluate`?" in capsys.readouterr().err


def test_completion_knows_words_and_options(capsys):
    commands.main(["--print-completion", "bash"])
    printed = capsys.readouterr().out
    assert "--zero-stage" in printed
    assert "infill" in printed
    assert exit_code("--print-completion", "dos") == 2


def test_a_plan_is_made_without_training(text, cache, capsys):
    assert exit_code("plan", "2", *SMALL, "--corpus", str(text), "--cache", str(cache)) == 0
    assert "ZeRO 3" in capsys.readouterr().out


def test_a_sample_is_of_its_seed_however_many_are_drawn(monkeypatch, capsys):
    """And `--seed` is the first one's."""
    graph = Absorbing(27)
    net = SEDD(28, width=16, depth=1, heads=2, cond_dim=8, dropout=0.0, length=12, scale_by_sigma=True).eval()
    monkeypatch.setattr(sample, "load", lambda name: Model(net, graph, LogLinear(), character_tokenizer()))

    def drawn(*options: str) -> list[list[int]]:
        rows: list[list[int]] = sample.main(["--checkpoint", "none", "--steps", "4", *options]).tolist()
        return rows

    three = drawn("--num", "3", "--seed", "5")
    assert len({tuple(row) for row in three}) == 3
    assert [drawn("--num", "1", "--seed", seed)[0] for seed in ("5", "6", "7")] == three
    assert "seed 7" in capsys.readouterr().out


def test_options_unless_told_otherwise():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    drawing: dict[str, Any] = {
        "num": 2,
        "method": "tweedie",
        "steps": 128,
        "label": None,
        "guidance": 1.0,
        "temperature": 1.0,
        "top_k": None,
        "top_p": 1.0,
        "seed": 0,
    }
    views: dict[str, Any] = {"device": device, "watch": False, "page": None, "checkpoint": "it"}
    prompt: dict[str, Any] = {"prefix": "", "suffix": "", "text": None, "length": None}
    assert vars(sample.parser().parse_args(["--checkpoint", "it"])) == drawing | views | prompt
    assert vars(infill.parser().parse_args(["--checkpoint", "it", "a ___"])) == drawing | views | prompt | {
        "text": "a ___"
    }
    measured: dict[str, Any] = {
        "corpus": None,
        "column": "",
        "label_column": "",
        "revision": "",
        "encoding": "",
        "split": "valid",
        "length": None,
        "blocks": None,
        "num_times": 128,
        "batch_size": 8,
    }
    measured |= {"estimator": "best", "last_word": False, "choices": None}
    measured |= {"seed": 0, "device": device, "levels": None, "json": False, "checkpoint": "it"}
    assert vars(evaluate.parser().parse_args(["--checkpoint", "it"])) == measured
    trained: dict[str, Any] = {
        "recipe": "sedd-small-absorb-owt",
        "output": None,
        "resume": None,
        "cache": Path("runs/cache"),
    }
    trained |= {"plan": None, "tensorboard": True, "wandb": "", "peak_tflops": 0.0, "local_rank": None}
    assert vars(train.parser().parse_args([])) == trained
    assert vars(plan.parser().parse_args([])) == trained | {"ranks": 1}
    assert vars(report.parser().parse_args(["it"])) == {"run": Path("it"), "output": None}
    assert vars(export.parser().parse_args(["it", "there"])) == {"checkpoint": "it", "output": Path("there")}
    assert train.parser().parse_args(["--resume"]).resume == "always"
    assert train.parser().parse_args(["--plan"]).plan == 0


def test_what_a_sample_is_drawn_by(monkeypatch, capsys):
    """Every method by its word, seeds one after another, and the controls asked for in their order."""
    graph = Absorbing(27)
    net = SEDD(28, width=16, depth=1, heads=2, cond_dim=8, dropout=0.0, length=12, scale_by_sigma=True).train()
    monkeypatch.setattr(sample, "load", lambda name: Model(net, graph, LogLinear(), character_tokenizer()))
    seen: list[dict[str, Any]] = []
    trajectory = vars(pipelines)["trajectory"]

    def noted(*given, **how):
        seen.append(how)
        return trajectory(*given, **how)

    monkeypatch.setattr(pipelines, "trajectory", noted)
    for method in sample.METHODS:
        x = sample.main(
            ["--checkpoint", "it", "--method", method, "--num", "3", "--steps", "2", "--seed", "7", "--length", "5"]
        )
        assert x.shape == (3, 5)
        assert (x != 27).all()
        assert type(seen[-1]["method"]) is type(sample.METHODS[method])
        assert (list(seen[-1]["seeds"]), seen[-1]["steps"], seen[-1]["conditioning"]) == ([7, 8, 9], 2, clamped)
    assert not net.training
    assert {word: type(method).__name__ for word, method in sample.METHODS.items()} == {
        **{"tweedie": "Tweedie", "euler": "Euler", "tau-leaping": "TauLeaping", "ancestral": "Ancestral"},
        **{"trapezoidal": "Trapezoidal", "corrected": "PredictorCorrector", "uniformization": "Uniformization"},
        **{"unmasking": "Unmasking", "first-hitting": "FirstHitting", "remasking": "Remasking"},
        "confidence": "ConfidenceUnmasking",
    }
    printed = capsys.readouterr().out
    assert "--- sample 3 of 3 " in printed
    assert "15 tokens in " in printed
    assert "(2 steps of confidence, seed 7)" in printed
    top = sample.main(["--checkpoint", "it", "--steps", "2", "--top-k", "1", "--prefix", "ab", "--suffix", "c"])
    tokens = character_tokenizer()
    assert all(tokens.decode(row).startswith("ab") and tokens.decode(row).endswith("c") for row in top.tolist())
    filled = sample.main(["--checkpoint", "it", "--steps", "2", "--text", "a__d", "--num", "1"])
    assert filled.shape == (1, 4)
    assert (tokens.decode(filled[0])[0], tokens.decode(filled[0])[3]) == ("a", "d")


def test_controls_come_in_their_order():
    def of(*words):
        args = sample.parser().parse_args(["--checkpoint", "it", *words])
        return pipelines.controls_of(args.temperature, args.top_k, args.top_p)

    assert of() == []
    p, zero = torch.tensor([[0.5, 0.3, 0.15, 0.05]]), torch.zeros(1, dtype=torch.int64)
    (cold,) = of("--temperature", "0.5")
    torch.testing.assert_close(cold(p, zero, zero), p**2 / (p**2).sum())
    (three,) = of("--top-k", "3")
    assert torch.equal(three(p, zero, zero), torch.tensor([[0.5, 0.3, 0.15, 0.0]]))
    (most,) = of("--top-p", "0.6")
    assert torch.equal(most(p, zero, zero), torch.tensor([[0.5, 0.3, 0.0, 0.0]]))
    assert [
        len(of(*words)) for words in (["--temperature", "2", "--top-p", "0.9"], ["--top-k", "2", "--top-p", "0.9"])
    ] == [2, 2]
    first, second, third = of("--top-p", "0.6", "--top-k", "3", "--temperature", "0.5")
    torch.testing.assert_close(first(p, zero, zero), cold(p, zero, zero))
    assert torch.equal(second(p, zero, zero), three(p, zero, zero))
    assert torch.equal(third(p, zero, zero), most(p, zero, zero))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--text", "a_", "--prefix", "b"], "--text holds the whole prompt"),
        (["--text", "a_", "--suffix", "b"], "--text holds the whole prompt"),
        (["--text", "a_", "--length", "3"], "--text is as long as it is"),
        *((["--" + name, "0"], f"--{name} must be at least 1, got 0") for name in ("num", "steps", "length")),
    ],
)
def test_options_that_contradict_each_other(words, told):
    with pytest.raises(ValueError, match=told):
        sample.check(sample.parser().parse_args(["--checkpoint", "it", *words]))


def test_text_is_measured_in_the_units_told(monkeypatch, capsys, tmp_path):
    """A network that knows nothing: log 27 nats a character of an alphabet of 27, with a bound by its first blocks."""
    graph = Absorbing(27)
    net = SEDD(28, width=16, depth=1, heads=2, cond_dim=8, dropout=0.0, length=8, scale_by_sigma=True)
    monkeypatch.setattr(evaluate, "load", lambda name: Model(net.eval(), graph, LogLinear(), character_tokenizer()))
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog " * 50)
    words = ["--checkpoint", "it", "--corpus", str(file), "--blocks", "3", "--num-times", "64", "--batch-size", "2"]
    evaluate.main([*words, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {
        *("nats_per_token", "standard_error", "perplexity", "bits_per_character", "unigram_bits_per_character"),
        *("bits_per_byte", "blocks", "length", "num_times", "estimator", "measurement_error"),
    }
    assert (found["blocks"], found["length"], found["num_times"]) == (3, 8, 64)
    assert found["nats_per_token"] == pytest.approx(math.log(27), rel=0.1)
    assert found["perplexity"] == pytest.approx(math.exp(found["nats_per_token"]), rel=1e-9)
    assert found["bits_per_character"] == pytest.approx(found["nats_per_token"] / math.log(2), rel=1e-9)
    assert found["bits_per_byte"] == found["bits_per_character"]  # of ASCII
    assert 3.5 < found["unigram_bits_per_character"] < 4.5
    evaluate.main([*words, "--length", "4"])
    printed = capsys.readouterr().out
    assert f"3 blocks of 4 tokens of {file}, 64 noise levels each" in printed
    assert "nats a token (standard error of " in printed
    for more, told in [
        (["--length", "9"], "--length 9: the model takes 1 to 8 tokens"),
        (["--length", "-1"], "--length -1: the model takes 1 to 8 tokens"),
        (["--blocks", "0"], "--blocks 0: there are 13 blocks of 8 in the valid part of"),
        (["--blocks", "1000"], "--blocks 1000: there are 13 blocks of 8 in the valid part of"),
    ]:
        with pytest.raises(SystemExit):
            evaluate.main([*words, *more])
        assert told in capsys.readouterr().err


def test_a_text_of_one_s_own_is_measured_whole_if_asked(monkeypatch, capsys, tmp_path):
    net = SEDD(28, width=16, depth=1, heads=2, cond_dim=8, dropout=0.0, length=8, scale_by_sigma=True)
    model = Model(net.eval(), Absorbing(27), LogLinear(), character_tokenizer())
    monkeypatch.setattr(evaluate, "load", lambda name: model)
    for name in ("text.txt", "more.txt"):
        (tmp_path / name).write_text(name[0] + " quick brown fox jumps over the lazy dog" * 8)
    words = ["--checkpoint", "it", "--num-times", "2", "--json", "--corpus", str(tmp_path)]
    sizes = {}
    for split in ("train", "valid", "all"):
        evaluate.main([*words, "--split", split])
        printed = capsys.readouterr()
        sizes[split] = json.loads(printed.out)["blocks"]
        assert ("is not divided; valid is the 5 % of it that training would hold out" in printed.err) == (
            split == "valid"
        )
    characters = sum(len(file.read_text()) for file in tmp_path.iterdir())
    assert sizes["all"] * 8 <= characters + 8  # an end after each document
    assert sizes["all"] * 8 > characters - 8
    assert sizes["valid"] < sizes["train"] < sizes["all"]

    (tmp_path / "more.txt").rename(tmp_path / "test.txt")
    for more, told in [
        (["--split", "all"], "has parts of its own; name one, train, valid or test"),
        (
            ["--split", "all", "--label-column", "kind"],
            "--split all is for a --corpus that the model was not trained on",
        ),
    ]:
        with pytest.raises(SystemExit):
            evaluate.main([*words, *more])
        assert told in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate.main([*words[:-2], "--split", "all"])
    assert "--split all is for a --corpus that the model was not trained on" in capsys.readouterr().err
