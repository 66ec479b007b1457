"""What fills a table: numbers and their errors by hand, results kept as they come, rows that are what was asked for."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from sedd_train import recipes
from sedd_train.commands import tables as command
from sedd_train.tables import Results, fingerprint, markdown, mean_and_error, panels, save_picture, with_error


def test_a_mean_has_the_error_of_independent_values():
    mean, error = mean_and_error([1.0, 2.0, 6.0])
    assert mean == 3.0
    assert error == pytest.approx(math.sqrt((4 + 1 + 9) / 2) / math.sqrt(3))
    mean, error = mean_and_error([5.0])
    assert mean == 5.0
    assert math.isnan(error)


@pytest.mark.parametrize(
    ("mean", "error", "digits", "text"),
    [
        (12.345, 0.0456, None, "12.345 ± 0.046"),  # two figures of the error
        (12.345, 0.456, None, "12.35 ± 0.46"),
        (12.345, 1.0, None, "12.3 ± 1.0"),
        (123.4, 45.0, None, "123 ± 45"),
        (123.4, 456.0, None, "123 ± 456"),
        (1.5, 0.0, None, "1.50 ± 0.00"),
        (1.5, math.nan, None, "1.50"),
        (1.5, math.inf, None, "1.50"),
        (1.23456, 0.001, 1, "1.2 ± 0.0"),
        (1.23456, math.nan, 3, "1.235"),
    ],
)
def test_a_number_is_shown_to_two_figures_of_its_error(mean, error, digits, text):
    assert with_error(mean, error, digits) == text


def test_a_fingerprint_is_of_numbers_shape_and_type():
    x = torch.arange(6)
    others = [x.reshape(2, 3), x.reshape(3, 2), x.int(), x + 1, x]
    assert len({fingerprint(other) for other in others}) == 5
    assert fingerprint(torch.arange(6).reshape(2, 3).T) == fingerprint(torch.tensor([[0, 3], [1, 4], [2, 5]]))
    assert fingerprint(x) == "83e7d4479ccae02d"


def test_a_table_s_first_column_is_text_and_the_others_are_numbers():
    assert markdown(["", "a", "b"], [["x", 1, 2.5]]) == "|  | a | b |\n| --- | ---: | ---: |\n| x | 1 | 2.5 |\n"


def test_results_are_kept_as_they_come_and_agree_on_their_settings(tmp_path):
    path = tmp_path / "deep" / "table.json"
    results = Results(path)
    assert (results.settings, results.cells, results.commands) == ({}, {}, [])
    results.agree("blocks", {"count": 3, "error": math.nan})
    results.made_by("it.py", ["--a", "b c"])
    results.made_by("it.py", ["--a", "b c"])
    results.made_by("it.py", [])
    results.cells["one"] = {"nats": [1.0, math.inf]}
    assert not path.exists()
    results.save()
    assert [file.name for file in path.parent.iterdir()] == ["table.json"]
    again = Results(path)
    assert again.cells == {"one": {"nats": [1.0, None]}}
    assert again.settings == {"blocks": {"count": 3, "error": None}}
    assert again.commands == ["python integration/it.py --a 'b c'", "python integration/it.py "]
    again.agree("blocks", {"count": 3, "error": math.nan})
    with pytest.raises(ValueError, match=r"holds results with blocks = .*'count': 3.* and this run has .*'count': 4"):
        again.agree("blocks", {"count": 4, "error": math.nan})
    path.write_text('{"settings": {}, "cells": {}}')  # of a version that kept no commands
    assert Results(path).commands == []
    for other in ("[]", "{", '{"settings": {}}'):
        path.write_text(other)
        with pytest.raises(ValueError, match="holds no results of this script; give another --output"):
            Results(path)


def test_equal_pictures_are_equal_files(tmp_path):
    for name in ("one", "other"):
        figure, every = panels(3, width=2.0, height=1.5)
        assert len(every) == 3
        assert figure.get_size_inches().tolist() == [6.0, 1.5]
        every[0].plot([1, 2])
        save_picture(figure, tmp_path / f"{name}.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "other.png").read_bytes()
    assert panels(1)[0].get_size_inches().tolist() == [5.2, 4.0]


# The command


def options(*words: str, training: tuple[str, ...] = ()) -> argparse.Namespace:
    return command.parser().parse_args(list(words), argparse.Namespace(training=list(training)))


def test_options_unless_told_otherwise():
    found = vars(options("text8"))
    assert found.pop("device") in ("cpu", "cuda")
    assert found == {
        **{"table": "text8", "scale": "mini", "padded": False, "rows": list(command.ROWS), "output": None},
        **{"launch": "", "corpus": None, "blocks": 512, "num_times": 64, "seed": 0, "cache": Path("runs/cache")},
        "training": [],
    }


def test_nats_of_rows_are_bits_of_all_their_tokens():
    """Rows of 1 and 3 tokens with 2 and 4 nats: 6 / 4 a token, not the mean of 2 and 4 / 3; its error by hand."""
    lengths = torch.tensor([1, 3])
    mean, error = command.bits_a_token([2.0, 4.0], lengths)
    assert mean == pytest.approx(1.5 / math.log(2))
    residuals = torch.tensor([2 - 1.5 * 1, 4 - 1.5 * 3]).double() / 2 / math.log(2)
    assert error == pytest.approx(float(residuals.std()) / math.sqrt(2))
    mean, error = command.bits_a_token([2.0, 4.0], lengths, [1.0, 3.0])
    assert mean == pytest.approx(0.5 / math.log(2))
    assert error == pytest.approx(float(torch.tensor([0.25, -0.25]).double().std()) / math.log(2) / math.sqrt(2))


def test_a_table_of_perplexities_shows_them_with_their_errors():
    lengths, nats = torch.tensor([2, 2]), [2 * math.log(8), 2 * math.log(2)]
    bits, error = command.bits_a_token(nats, lengths)
    assert command.number(nats, lengths, command.TABLES["text8"]) == (bits, error)
    assert (bits, error) == pytest.approx((2.0, 1.0))
    perplexity, error = command.number(nats, lengths, command.TABLES["lm1b"])
    assert perplexity == pytest.approx(4.0)
    assert error == pytest.approx(4 * math.log(2))  # the slope of 2^bits


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("SEDD absorb", {"graph": "absorb", "objective": "score-entropy", "network": "sedd", "t_min": 1e-3}),
        ("SEDD uniform", {"graph": "uniform", "objective": "score-entropy", "network": "sedd"}),
        ("D3PM absorb", {"graph": "absorb", "objective": "d3pm", "t_min": 1e-6}),
        ("D3PM uniform", {"graph": "uniform", "objective": "d3pm", "t_min": 1e-6}),
        ("Masked cross-entropy", {"graph": "absorb", "objective": "score-entropy", "network": "mdlm"}),
        ("Autoregressive", {"graph": "absorb", "objective": "autoregressive", "network": "causal"}),
    ],
)
@pytest.mark.parametrize("table", ["text8", "lm1b"])
def test_rows_differ_in_what_they_are_named_for(name, values, table):
    args = options(table, "--seed", "3", training=("--steps", "7"))
    recipe = command.recipe_of(name, command.TABLES[table], args)
    assert {value: getattr(recipe, value) for value in values} == values
    assert (recipe.seed, recipe.steps, recipe.packing) == (3, 7, True)
    mini = recipes.read_recipe(command.TABLES[table].recipes["mini"][0])
    same = (
        "corpus",
        "tokenizer",
        "length",
        "width",
        "depth",
        "heads",
        "batch_size",
        "warmup",
        "crops",
    )
    assert all(getattr(recipe, value) == getattr(mini, value) for value in same)
    if table == "lm1b":
        padded = command.recipe_of(name, command.TABLES[table], options(table, "--padded", "--corpus", "other"))
        assert (padded.packing, padded.corpus) == (False, "other")


def test_published_numbers_are_the_paper_s():
    """Tables 2 (bits a character) and 4 (perplexity) of Lou, Meng and Ermon 2024."""
    text8, lm1b = (command.TABLES[name] for name in ("text8", "lm1b"))
    assert text8.published == {
        **{"SEDD absorb": 1.39, "SEDD uniform": 1.47, "D3PM absorb": 1.45, "D3PM uniform": 1.61},
        **{"Masked cross-entropy": 1.40, "Autoregressive": 1.23},
    }
    assert lm1b.published == {
        **{"SEDD absorb": 32.79, "SEDD uniform": 40.25, "D3PM absorb": 77.50, "Autoregressive": 31.98}
    }
    assert (text8.perplexity, lm1b.perplexity) == (False, True)


def test_a_row_that_was_trained_otherwise_is_refused(tmp_path):
    table, args = command.TABLES["text8"], options("text8", training=("--steps", "9"))
    command.check_row("SEDD absorb", tmp_path / "none", table, args)
    recipe = command.recipe_of("SEDD absorb", table, args)

    def done(**values: Any) -> None:
        (tmp_path / "recipe.toml").write_text(recipes.to_toml(recipes.override(recipe, values)))
        command.check_row("SEDD absorb", tmp_path, table, args)

    done()
    done(steps=5, revision="learnt", learning_rate=1e-5)  # its beginning, and what a run may learn or change
    for value, other in (("steps", 10), ("seed", 1), ("width", 2 * recipe.width)):
        wanted = getattr(recipe, value)
        told = f"was trained with {value} = {other}, and SEDD absorb is asked for with {wanted}: choose another"
        with pytest.raises(ValueError, match=told):
            done(**{value: other})


def test_a_row_is_trained_by_the_command_and_what_it_was_trained_with_is_kept(tmp_path, monkeypatch, capsys):
    commanded: list[list[str]] = []
    table, run = command.TABLES["text8"], tmp_path / "run"
    args = options("text8", "--cache", "there", training=("--steps", "9"))
    recipe = command.recipe_of("D3PM uniform", table, args)

    def ran(words, check):
        commanded.append(words)
        run.mkdir(exist_ok=True)
        (run / "recipe.toml").write_text(recipes.to_toml(recipe))
        return argparse.Namespace(returncode=code)

    monkeypatch.setattr(subprocess, "run", ran)
    code = 0
    found = command.train("D3PM uniform", run, table, args)
    names = ("objective", "network", "graph", "noise", "steps", "batch_size", "length", "width", "depth", "seed")
    assert found == {name: getattr(recipe, name) for name in names}
    ends = ["--output", str(run), "--cache", "there"]
    given = command.options_of("D3PM uniform", table, args)
    assert given[:2] == ["--recipe", "text8-mini-uniform"]
    assert commanded[-1][1:] == ["-m", "sedd_train", "train", *given, *ends]
    assert "D3PM uniform: " in capsys.readouterr().out
    args.launch, code = "some/deepspeed --num_gpus 8", 3
    with pytest.raises(RuntimeError, match=r"D3PM uniform was not trained to its end \(it ended with 3\)"):
        command.train("D3PM uniform", run, table, args)
    assert commanded[-1][:5] == ["some/deepspeed", "--num_gpus", "8", "--module", "sedd_train"]


@pytest.mark.parametrize("name", ["text8", "lm1b"])
def test_rows_of_a_table_in_miniature_begin_and_learn_alike(name):
    args = options(name)
    rows = [command.recipe_of(row, command.TABLES[name], args) for row in command.ROWS]
    for row in rows:
        assert (row.optimizer, row.learning_rate, row.zero_stage, row.informed_start) == ("adamw", 1.5e-3, 1, False)
    args.training = ("--optimizer", "muon", "--zero-stage", "0")  # what is asked for comes last
    assert command.recipe_of("SEDD uniform", command.TABLES[name], args).optimizer == "muon"


def test_the_table_is_written_with_what_it_was_made_of(tmp_path):
    table, args = command.TABLES["text8"], options("text8", "--blocks", "2")
    results = Results(tmp_path / "table.json")
    trained = {"steps": 10, "batch_size": 4, "length": 2}
    for name, nats in (("SEDD uniform", [3.0, 5.0]), ("SEDD absorb", [2.0, 4.0])):
        results.cells[name] = {"trained": trained, "nats": [value * math.log(2) for value in nats]}
    blocks = {"count": 2, "length": 2, "fingerprint": "abc"}
    for key, value in {"blocks": blocks, "corpus": "it", "seed": 0, "tokens": 4, "num_times": 64}.items():
        results.agree(key, value)
    command.write_table(tmp_path, results, table, torch.tensor([2, 2]), args)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0] == "|  | bits a character | bits a token above SEDD absorb | published, text8 |"
    assert lines[2] == "| SEDD absorb | 1.50 ± 0.50 |  | 1.39 |"
    assert lines[3] == "| SEDD uniform | 2.00 ± 0.50 | 0.50 ± 0.00 | 1.47 |"
    assert "| MD4 (quoted) | – | – | 1.37 |" in lines
    assert "- trained on 80 tokens of it, seed 0, packed" in lines
    assert "- a character of text8 is a byte: bits a byte are the same" in lines
    measured = "- measured on 2 blocks of 2 (4 tokens of text, fingerprint abc), 64 noise levels each"
    assert measured in lines
    assert (tmp_path / "table.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["text8", "--num-times", "3"], "--num-times 3: expected an even number"),
        (["text8", "--num-times", "0"], "--num-times 0: expected an even number"),
        (["text8", "--padded"], "--padded: text8 is cut into crops of one text, and has no documents"),
        (["lm1b", "--blocks", "7"], "--blocks 7: lm1b:{} has 4 to measure; 0 for all of them"),
        (["lm1b", "--blocks", "-1"], "--blocks -1: lm1b:{} has 4 to measure; 0 for all of them"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_trained(words, told, tmp_path, capsys, monkeypatch):
    texts = tmp_path / "texts"
    texts.mkdir()
    for split in ("train", "test"):
        (texts / f"{split}.jsonl").write_text(
            "".join(json.dumps({"text": f"{split} {i} " * 60}) + "\n" for i in range(4))
        )
    monkeypatch.setattr(command, "train", None)
    recipe = recipes.override(recipes.read_recipe("lm1b-mini"), {"tokenizer": "bytes", "length": 64})
    read = recipes.read_recipe
    monkeypatch.setattr(recipes, "read_recipe", lambda name: recipe if name == "lm1b-mini" else read(name))
    more = ["--corpus", f"lm1b:{texts}", "--padded"] if words[0] == "lm1b" else []
    with pytest.raises(SystemExit) as ended:
        command.main([*words, *more, "--output", str(tmp_path / "table"), "--cache", str(tmp_path / "cache")])
    assert ended.value.code == 2
    assert told.format(texts) in capsys.readouterr().err
    assert not (tmp_path / "table").exists()


def test_the_picture_s_points_are_the_rows_and_the_published_numbers(tmp_path, monkeypatch):
    drawn: list[Any] = []
    monkeypatch.setattr(command, "save_picture", lambda figure, path: drawn.append(figure))
    nats = {"SEDD absorb": [2.0, 4.0], "D3PM absorb": [6.0, 6.0], "Other": [1.0, 2.0]}
    lengths = torch.tensor([2, 2])
    command.picture(tmp_path / "a.png", nats, lengths, command.TABLES["text8"], "bits")
    ours, theirs = drawn[0].axes
    found = {name: command.number(values, lengths, command.TABLES["text8"]) for name, values in nats.items()}
    names = ["D3PM absorb", "SEDD absorb", "Other"]  # the largest first, at the bottom
    assert [text.get_text() for text in ours.get_yticklabels()] == names
    assert [text.get_text() for text in theirs.get_yticklabels()] == [""] * 3
    points = [container.lines[0] for container in ours.containers]
    assert [(*point.get_xdata(), *point.get_ydata()) for point in points] == [
        (found[name][0], y) for y, name in enumerate(names)
    ]
    assert [point.get_color() for point in points] == ["#1f4e8c", "#c8501e", "#1f4e8c"]
    (spread,) = ours.containers[1].lines[2]
    ends = [x for x, _ in spread.get_segments()[0]]
    mean, error = found["SEDD absorb"]
    assert ends == pytest.approx([mean - 2 * error, mean + 2 * error])
    assert [(*line.get_xdata(), *line.get_ydata()) for line in theirs.lines] == [(1.45, 0), (1.39, 1)]
    assert (ours.get_xlabel(), ours.get_ylim()) == ("bits", (-0.6, 2.6))
