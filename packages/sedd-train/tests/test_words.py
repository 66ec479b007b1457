"""The command's words: what is passed on, what is said and where, and with which code a process ends."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sedd_train
import torch
from sedd_graphs import Absorbing, LogLinear
from sedd_nets import SEDD
from sedd_train import (
    Model,
    commands,
    conditional,
    corpora,
    distributed,
    evaluation,
    plotting,
    provenance,
    recipes,
    token_cache,
)
from sedd_train import plan as planning
from sedd_train import report as pages
from sedd_train.commands import evaluate, export, finetune, infill, lm_eval, plan, report, sample, train
from sedd_train.text8 import character_tokenizer
from sedd_train.tokens import Tokens, unigram_entropy


def model(length: int = 8) -> Model:
    net = SEDD(28, width=16, depth=1, heads=2, cond_dim=8, dropout=0.0, length=length, scale_by_sigma=True)
    net.sections.update({"graph": {"type": "absorb"}, "noise": {"type": "loglinear"}})
    return Model(net.eval(), Absorbing(27), LogLinear(), character_tokenizer())


def ended(call: Any, *given: Any) -> Any:
    with pytest.raises(SystemExit) as end:
        call(*given)
    return end.value.code


# The first word


def test_each_word_gets_the_words_behind_it(monkeypatch):
    told: list[Any] = []
    monkeypatch.setattr(
        commands, "_command", lambda name: SimpleNamespace(main=lambda words: told.append((name, words)))
    )
    commands.main(["train", "--steps", "3"])
    commands.main(("--local_rank=1", "plan", "8"))  # what the deepspeed launcher puts first
    monkeypatch.setattr(sys, "argv", ["sedd", "lm-eval", "--tasks", "x"])
    commands.main()
    assert told == [("train", ["--steps", "3"]), ("plan", ["8"]), ("lm-eval", ["--tasks", "x"])]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            "train --checkpoint x",
            "--checkpoint is called --init here: begin from this checkpoint (--resume goes on with",
        ),
        ("finetune --model=x", "--model is called --init here"),
        ("train --epochs 3 --lr 2", "--epochs is called --steps here: optimiser steps; --lr is called --learning-rate"),
        ("evaluate --checkpoint x --dataset y", "--dataset is called --corpus here: any corpus that training takes"),
        ("sample --checkpoint x --prompt a", "--prompt is called --prefix here: text that every sample begins with"),
        ("infill --checkpoint x a --text b", "text stands without --text here"),
        ("export --checkpoint x y z", "checkpoint stands without --checkpoint here"),
        ("report --run x", "run stands without --run here"),
        ("train --corups x", "did you mean --corpus?"),
        ("train --xyzzy x", "unrecognized arguments: --xyzzy x\n"),
    ],
)
def test_the_option_that_was_meant_is_named(words, told, capsys):
    assert ended(commands.main, words.split()) == 2
    assert told in capsys.readouterr().err


def test_help_version_and_wrong_words(capsys):
    for words in ([], ["-h"], ["--help"], ["help"]):
        commands.main(words)
        said = capsys.readouterr()
        assert said.out.startswith("usage: sedd COMMAND [options]\n")
        assert said.out.count("\n  ") == len(commands.COMMANDS) == 10
        assert said.err == ""
    commands.main(["--version"])
    assert capsys.readouterr().out == f"{sedd_train.__version__}\n"
    assert ended(commands.main, ["xyzzy"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("sedd: error: there is no command 'xyzzy'\n\nusage: sedd COMMAND")
    assert said.out == ""
    for shells in ([], ["bash", "zsh"], ["dos"]):
        assert ended(commands.main, ["--print-completion", *shells]) == 2
    assert "--print-completion takes one of bash, zsh" in capsys.readouterr().err


# Training


@pytest.fixture
def trained(monkeypatch):
    """What `train` and `describe` are asked, and how they and the process end."""
    state = SimpleNamespace(asked=[], planned=[], said=[], ends=[], error=None, stopped=False)

    def run(recipe, **how):
        state.asked.append((recipe, how))
        if state.error:
            raise state.error
        return SimpleNamespace(stopped=state.stopped)

    def describe(recipe, ranks, cache):
        state.planned.append((recipe, ranks, cache))
        return "the plan"

    def finish(code=0):
        state.ends.append(code)
        raise SystemExit(code)

    monkeypatch.setattr(train, "train", run)
    monkeypatch.setattr(planning, "describe", describe)
    monkeypatch.setattr(train, "say", state.said.append)
    monkeypatch.setattr(distributed, "finish", finish)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return state


def test_a_run_is_asked_for_with_what_was_told(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ended(train.main, ["--recipe", "tiny", "--steps", "7", "--cache", "there", "--wandb", "mine"]) == 0
    recipe, how = trained.asked[-1]
    assert recipe == recipes.override(recipes.read_recipe("tiny"), {"steps": 7})
    assert how == {
        **{"output": Path("runs/tiny"), "resume": False, "cache": Path("there"), "tensorboard": True},
        **{"wandb": "mine", "peak_tflops": 0.0},
    }
    assert trained.said == ["sample from it with     sedd sample --checkpoint runs/tiny/export"]
    assert trained.ends == [0]
    output = tmp_path / "my run"
    words = [
        "--recipe",
        "tiny",
        "--output",
        str(output),
        "--resume",
        "auto",
        "--no-tensorboard",
        "--peak-tflops",
        "2.5",
    ]
    assert ended(train.main, words) == 0
    assert trained.asked[-1][1] == {
        **{"output": output, "resume": "auto", "cache": Path("runs/cache"), "tensorboard": False},
        **{"wandb": "", "peak_tflops": 2.5},
    }
    assert trained.said[-1].endswith(f"sedd sample --checkpoint '{output}/export'")
    (output).mkdir()
    (output / "recipe.toml").write_text(recipes.to_toml(recipes.read_recipe("tiny")))
    assert ended(train.main, ["--output", str(output), "--resume"]) == 0
    assert (trained.asked[-1][0], trained.asked[-1][1]["resume"]) == (recipes.read_recipe("tiny"), True)


def test_what_is_no_score_model_or_has_not_ended_is_not_sampled_from(trained, tmp_path):
    trained.stopped = True
    assert ended(train.main, ["--recipe", "tiny", "--output", str(tmp_path)]) == 0
    trained.stopped = False
    words = ["--objective", "autoregressive", "--network", "causal"]
    assert ended(train.main, ["--recipe", "tiny", "--output", str(tmp_path), *words]) == 0
    assert trained.said == []


def test_what_is_wrong_ends_with_2_before_and_with_1_after(trained, tmp_path):
    where = ["--recipe", "tiny", "--output", str(tmp_path)]
    trained.error = sedd_train.SetupError("no text")
    assert ended(train.main, where) == 2
    trained.error = sedd_train.TrainingError("no disk")
    assert ended(train.main, where) == 1
    assert ended(train.main, [*where, "--steps", "0"]) == 2
    assert trained.said[:2] == ["sedd train: error: no text", "sedd train: error: no disk"]
    assert trained.said[2].startswith("sedd train: error: steps = 0: expected a positive number")
    assert trained.ends == [1]


def test_among_several_ranks_all_end_with_2(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "place", lambda: (1, 4))
    monkeypatch.setattr(distributed, "agree", lambda failure: f"rank 1: {failure}")
    assert ended(train.main, ["--recipe", "tiny", "--output", str(tmp_path), "--steps", "0"]) == 2
    assert trained.said[0].startswith("sedd train: error: rank 1: steps = 0")
    assert trained.ends == [2]


def test_a_plan_is_of_so_many_ranks(trained, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distributed, "place", lambda: (0, 4))
    tiny = recipes.read_recipe("tiny")
    for words, ranks in ((["--plan"], 4), (["--plan", "6"], 6)):
        assert ended(train.main, ["--recipe", "tiny", *words]) == 0
        assert trained.planned[-1] == (tiny, ranks, Path("runs/cache"))
    for words, ranks in (([], 1), (["64"], 64)):
        assert ended(plan.main, [*words, "--recipe", "tiny", "--cache", "there"]) == 0
        assert trained.planned[-1] == (tiny, ranks, Path("there"))
    assert trained.said == ["the plan"] * 4
    assert trained.asked == []


def test_finetuning_is_training_by_another_recipe(trained, tmp_path):
    words = ["--init", "runs/other", "--corpus", "texts", "--output", str(tmp_path)]
    assert ended(finetune.main, words) == 0
    recipe, _ = trained.asked[-1]
    assert recipe == recipes.override(recipes.read_recipe("finetune"), {"init": "runs/other", "corpus": "texts"})
    assert (recipe.tokenizer, recipe.length) == ("", 0)
    assert vars(finetune.parser().parse_args([])) == vars(train.parser().parse_args([])) | {"recipe": "finetune"}
    assert ended(finetune.main, [*words, "--graph", "uniform"]) == 2
    assert trained.said[-1].startswith("sedd finetune: error: with --init the checkpoint says what --graph would")


# Measuring


def text_of(count: int, characters: int) -> Tokens:
    return Tokens(np.arange(count, dtype=np.uint16) % 27, np.array([count]), characters, size=2 * characters)


@pytest.fixture
def measured(monkeypatch):
    """What is measured of 30 tokens of 60 characters, of a network of 8 tokens."""
    asked: list[Any] = []
    monkeypatch.setattr(evaluate, "load", lambda name: model())
    monkeypatch.setattr(evaluate, "_tokens", lambda args, tokenizer: text_of(30, 60))

    def bound(net, graph, noise, blocks, **how):
        asked.append((blocks, how))
        return evaluation.Evaluation(math.log(16), 0.25, how["characters_per_token"], 0.125, "masks")

    monkeypatch.setattr(evaluate, "evaluate", bound)
    return asked


def test_a_text_is_measured_block_by_block_as_told(measured, capsys):
    words = ["--checkpoint", "it", "--corpus", "a text", "--device", "cpu"]
    evaluate.main(words)
    blocks, how = measured[0]
    assert torch.equal(blocks, text_of(30, 60).block(range(3), 8))
    assert how == {
        **{"characters_per_token": 2.0, "num_times": 128, "seed": 0, "chunk": 8, "progress": True, "estimator": "best"}
    }
    unigram = unigram_entropy(text_of(30, 60).flat) / math.log(2) / 2
    assert capsys.readouterr().out == (
        "3 blocks of 8 tokens of a text, 128 noise levels each, by masks\n"
        "bound            2.7726 ± 0.1250 nats a token (standard error of the measurement; over such blocks 0.2500)\n"
        "perplexity       16.00 ± 2.00\n"
        f"bits a character 2.0000 ± {0.125 / math.log(2) / 2:.4f}  (unigram entropy of the text: {unigram:.4f})\n"
        f"bits a byte      1.0000 ± {0.125 / math.log(2) / 4:.4f}  (of UTF-8)\n"
    )
    more = ["--length", "5", "--blocks", "2", "--num-times", "6", "--seed", "4", "--batch-size", "3"]
    evaluate.main([*words, *more, "--estimator", "times", "--json"])
    blocks, how = measured[1]
    assert torch.equal(blocks, text_of(30, 60).block(range(2), 5))
    assert (how["num_times"], how["seed"], how["chunk"], how["estimator"]) == (6, 4, 3, "times")
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "nats_per_token": math.log(16), "standard_error": 0.25, "measurement_error": 0.125,
        "perplexity": pytest.approx(16.0), "bits_per_character": pytest.approx(2.0),
        "bits_per_byte": pytest.approx(1.0),
        "unigram_bits_per_character": pytest.approx(unigram), "blocks": 2, "length": 5, "num_times": 6,
        "estimator": "masks",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--num-times", "0"], "--num-times must be even and at least 2, got 0"),
        (["--num-times", "5"], "--num-times must be even and at least 2, got 5"),
        (["--blocks", "4"], "--blocks 4: there are 3 blocks of 8 in the test part of a text"),
        (["--length", "9"], "--length 9: the model takes 1 to 8 tokens"),
        (["--length", "0"], None),  # as none
    ],
)
def test_numbers_at_their_edges(more, told, measured, capsys):
    words = ["--checkpoint", "it", "--corpus", "a text", "--split", "test", "--device", "cpu", *more]
    if told is None:
        evaluate.main(words)
        assert measured[0][0].shape == (3, 8)
        return
    assert ended(evaluate.main, words) == 2
    assert capsys.readouterr().err == f"sedd evaluate: error: {told}\n"
    assert measured == []


def test_a_text_of_less_than_one_block(measured, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "_tokens", lambda args, tokenizer: text_of(7, 7))
    assert ended(evaluate.main, ["--checkpoint", "it", "--corpus", "a text", "--device", "cpu"]) == 2
    assert "the valid part of a text has 7 tokens, less than one block of 8" in capsys.readouterr().err


def test_where_in_time_a_loss_comes_from_is_drawn(measured, monkeypatch, tmp_path, capsys):
    seen: list[Any] = []

    def levels(net, graph, noise, blocks, **how):
        seen.append((blocks.shape, how))
        return evaluation.Levels(torch.tensor([0.5]), torch.tensor([2.0]), torch.tensor([0.125]))

    monkeypatch.setattr(evaluate, "by_noise_level", levels)
    monkeypatch.setattr(plotting, "noise_levels", lambda lines, path: seen.append((lines, path)))
    words = ["--checkpoint", "it", "--corpus", "a text", "--device", "cpu", "--seed", "3", "--batch-size", "2"]
    evaluate.main([*words, "--levels", str(tmp_path / "a.png")])
    line = {"t": [0.5], "nats_per_token": [2.0], "standard_error": [0.125]}
    assert seen == [((3, 8), {"seed": 3, "chunk": 2}), ({"it": line}, tmp_path / "a.png")]


def test_the_text_of_the_checkpoint_s_own_run_is_read_as_that_read_it(monkeypatch, tmp_path):
    recipe = recipes.override(recipes.Recipe(), {"corpus": "its own", "column": "words", "valid": "watched"})
    monkeypatch.setattr(provenance, "trained_on", lambda name: (recipe, tmp_path / name))
    coder, asked = character_tokenizer(), []
    kept = SimpleNamespace(tokenizer=coder, train="train", valid="valid", test="test")
    found: list[Any] = [kept]
    monkeypatch.setattr(token_cache, "read", lambda folder: found[0] if folder == tmp_path / "it" else None)

    def load_texts(corpus, **options):
        asked.append((corpus, options))
        return SimpleNamespace(documents=lambda split, tokenizer: ["abc"])

    monkeypatch.setattr(corpora, "load_texts", load_texts)

    def args(**values: Any) -> argparse.Namespace:
        return argparse.Namespace(
            **{"corpus": None, "checkpoint": "it", "split": "test", "column": "", "label_column": ""}
            | {"revision": "", "encoding": ""}
            | values
        )

    for split in ("train", "valid", "test"):
        given = args(split=split)
        taken: Any = evaluate._tokens(given, coder)
        assert taken == split
        assert given.corpus == "its own"
    kept.tokenizer = character_tokenizer("abc")  # another: what is measured is tokenised anew
    assert evaluate._tokens(args(), coder).flat.tolist() == [1, 2, 3]
    options = {name: value for name, value in recipe.texts.items() if name != "eos"}
    assert asked[-1] == ("its own", options)
    assert evaluate._tokens(args(corpus="other", column="c", revision="r", encoding="e"), coder).characters == 3
    assert asked[-1] == ("other", {"column": "c", "label_column": "", "revision": "r", "encoding": "e"})


def test_as_many_are_measured_as_there_are_unless_told():
    def number(blocks: int | None, have: int) -> int:
        return evaluate._check_number(argparse.Namespace(blocks=blocks), have, "things")

    assert [number(None, 5), number(5, 5), number(1, 5)] == [5, 5, 1]
    for blocks in (0, 6, -1):
        with pytest.raises(ValueError, match=f"--blocks {blocks}: there are 5 things"):
            number(blocks, 5)


# Writing


def test_an_export_is_of_the_averaged_weights_into_an_empty_folder(tmp_path, capsys, monkeypatch):
    its = model()
    monkeypatch.setattr(export, "load_trained", lambda name: (its.net, None, its.tokenizer))
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    for name in ("file", "full"):
        assert ended(export.main, ["it", str(tmp_path / name)]) == 2
        told = f"sedd export: error: {tmp_path / name} exists and is not empty: choose another folder\n"
        assert capsys.readouterr().err == told
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new"):
        export.main(["it", str(tmp_path / name)])
        assert capsys.readouterr().out == f"{tmp_path / name}\n"
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (tmp_path / name).iterdir()}


def test_a_page_is_written_beside_the_run_unless_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pages, "page", lambda run: f"of {run.name} – ü")
    for words, path in (([], tmp_path / "report.html"), (["--output", str(tmp_path / "a.html")], tmp_path / "a.html")):
        report.main([str(tmp_path), *words])
        assert capsys.readouterr().out == f"{path}\n"
        assert path.read_text(encoding="utf-8") == f"of {tmp_path.name} – ü"

    def none(run):
        raise ValueError("holds no run")

    monkeypatch.setattr(pages, "page", none)
    assert ended(report.main, [str(tmp_path)]) == 2
    assert capsys.readouterr().err == "sedd report: error: holds no run\n"


def test_samples_are_longer_than_nothing_and_no_longer_than_the_model(monkeypatch, capsys):
    monkeypatch.setattr(sample, "load", lambda name: model())
    words = ["--checkpoint", "it", "--device", "cpu", "--steps", "1", "--num", "1"]
    assert sample.main([*words, "--length", "8"]).shape == (1, 8)
    assert sample.main([*words, "--length", "1"]).shape == (1, 1)
    assert infill.main([*words, "a__"]).shape == (1, 3)
    capsys.readouterr()
    assert ended(sample.main, [*words, "--length", "9"]) == 2
    told = "sedd sample: --length 9 is longer than the 8 tokens that this model was trained with\n"
    assert capsys.readouterr().err.endswith(told)
    assert ended(infill.main, [*words, "abc"]) == 2
    assert "sedd infill: the text 'abc' has no blank to fill" in capsys.readouterr().err


def test_the_first_sample_can_be_watched_and_all_of_them_paged(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sample, "load", lambda name: model())
    seen: list[Any] = []

    def live(states, text, *, mask_id):
        seen.append(("live", text(1), mask_id))
        yield from states

    def record(states, path, text, *, mask_id, given):
        seen.append(("record", path, text(2), mask_id, given.tolist()))
        yield from states

    monkeypatch.setattr(sample, "live", live)
    monkeypatch.setattr(sample, "record", record)
    page = str(tmp_path / "a.html")
    sample.main(["--checkpoint", "it", "--device", "cpu", "--steps", "1", "--length", "2", "--watch", "--page", page])
    assert sorted(seen) == [("live", "a", 27), ("record", page, "b", 27, [[False, False]] * 2)]


def test_options_of_the_harness():
    found = vars(lm_eval.parser().parse_args(["--checkpoint", "it", "--tasks", "a", "b"]))
    assert found == {
        **{"checkpoint": "it", "tasks": ["a", "b"], "include_path": None, "num_fewshot": None, "limit": None},
        **{"num_times": 128, "batch_size": 8, "seed": 0, "device": None, "output": None},
    }


def test_without_the_harness_it_is_said_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(lm_eval, "find_spec", lambda name: None)
    assert ended(lm_eval.main, ["--checkpoint", "it", "--tasks", "a"]) == 2
    told = "sedd lm-eval: error: this needs lm-evaluation-harness: pip install 'sedd-train[eval]'\n"
    assert capsys.readouterr().err == told


def test_the_harness_is_asked_as_told_and_its_errors_are_told(monkeypatch, tmp_path, capsys):
    """Over a harness made up."""
    asked: dict[str, Any] = {}
    model_made = SimpleNamespace(stated_error=lambda: "the error")

    def made(checkpoint, **how):
        asked["model"] = (checkpoint, how)
        return model_made

    def simple_evaluate(**how):
        asked["evaluate"] = how
        return {"results": {"acc": math.nan}, "n-samples": 3, "other": 4}

    class TaskManager:
        def __init__(self, include_path):
            asked["include"] = include_path

        def match_tasks(self, names):
            return [name for name in names if name != "unknown"]

    modules: dict[str, Any] = {
        "lm_eval": SimpleNamespace(simple_evaluate=simple_evaluate),
        "lm_eval.tasks": SimpleNamespace(TaskManager=TaskManager),
        "lm_eval.utils": SimpleNamespace(make_table=lambda found: f"table of {found['n-samples']}"),
        "sedd_train.harness": SimpleNamespace(SeddLM=made),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(lm_eval, "find_spec", lambda name: True)
    output = tmp_path / "found.json"
    words = ["--checkpoint", "it", "--tasks", "a", "b", "--include-path", "here", "--num-times", "6", "--seed", "2"]
    more = ["--batch-size", "3", "--device", "cpu", "--num-fewshot", "1", "--limit", "9", "--output", str(output)]
    lm_eval.main([*words, *more])
    assert asked["model"] == ("it", {"num_times": 6, "batch_size": 3, "seed": 2, "device": "cpu"})
    managed = asked["evaluate"].pop("task_manager")
    assert isinstance(managed, TaskManager)
    assert asked["include"] == "here"
    assert asked["evaluate"] == {
        **{"model": model_made, "tasks": ["a", "b"], "num_fewshot": 1, "limit": 9.0, "log_samples": False}
    }
    assert json.loads(output.read_text()) == {"results": {"acc": None}, "n-samples": 3}
    assert capsys.readouterr().out == "table of 3\nthe error\n\n"
    assert ended(lm_eval.main, ["--checkpoint", "it", "--tasks", "a", "unknown"]) == 2
    assert "there is no task unknown; those of your own are found by --include-path" in capsys.readouterr().err
    assert ended(lm_eval.main, [*words, "--output", str(tmp_path / "none" / "x.json")]) == 2


def test_what_follows_a_text_is_measured_as_told(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(evaluate, "load", lambda name: model(16))
    monkeypatch.setattr(evaluate, "_documents", lambda args, tokenizer: ["a bc", "  ", "de f", "g hi"])
    asked: list[Any] = []

    def bound(net, graph, noise, *, num_times, estimator):
        asked.append((num_times, estimator))
        return "the bound"

    def measured(bound, pairs, **how):
        asked.append((bound, pairs, how))
        tokens = torch.tensor([len(rest) for _, rest in pairs])
        return conditional.Conditional(2.0 * tokens, torch.full((len(pairs),), 0.5), tokens)

    monkeypatch.setattr(conditional, "score_bound", bound)
    monkeypatch.setattr(conditional, "conditional", measured)
    words = ["--checkpoint", "it", "--corpus", "texts", "--device", "cpu", "--num-times", "4", "--batch-size", "2"]
    evaluate.main([*words, "--last-word", "--seed", "3", "--length", "9", "--json"])
    assert asked[0] == (4, "masks")
    given, pairs, how = asked[1]
    assert given == "the bound"
    assert pairs == [([1], [0, 2, 3]), ([4, 5], [0, 6]), ([7], [0, 8, 9])]
    assert how == {"length": 9, "device": "cpu", "seed": 3, "chunk": 2, "progress": True}
    found = json.loads(capsys.readouterr().out)
    assert found["nats_per_word"] == pytest.approx(16 / 3)
    assert found["nats_per_token"] == pytest.approx(2.0)
    assert found["measurement_error"] == pytest.approx(0.5 * math.sqrt(3) / 3)
    assert found["standard_error"] == pytest.approx(torch.tensor([6.0, 4.0, 6.0]).std().item() / math.sqrt(3))
    assert (found["words"], found["num_times"], found["estimator"]) == (3, 4, "masks")
    evaluate.main([*words, "--last-word", "--blocks", "2", "--estimator", "times"])
    assert asked[2] == (4, "times")
    printed = capsys.readouterr().out
    assert printed.startswith(
        "the last words of 2 documents of texts, given what comes before them, 4 noise levels each"
    )
    assert f"perplexity {math.exp(5.0):.2f} ± {math.exp(5.0) * 0.5 * math.sqrt(2) / 2:.2f} a word" in printed
    questions = [{"context": "a", "choices": ["b", "cd"], "answer": answer} for answer in (0, 1)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    evaluate.main([*words, "--choices", str(tmp_path / "q.jsonl"), "--json"])
    assert asked[-1][1] == [([1], [0, 2]), ([1], [0, 3, 4])] * 2
    found = json.loads(capsys.readouterr().out)
    assert (found["accuracy"], found["number"], found["num_times"], found["estimator"]) == (0.5, 2, 4, "masks")
