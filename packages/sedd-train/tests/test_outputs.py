"""A place for the result that cannot be written is refused before the work; what is measured unless told otherwise."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
from sedd_train import commands, provenance, recipes, storage, token_cache
from sedd_train.commands import evaluate, export, report, sample

INTEGRATION = Path(__file__).parents[3] / "integration"


def test_a_place_is_asked_for_and_left_as_it_is(tmp_path):
    (tmp_path / "file").write_text("old")
    for path in (tmp_path / "file", tmp_path / "new", tmp_path / "deep" / "new"):
        storage.check_output(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "file"]
    assert (tmp_path / "file").read_text() == "old"
    storage.check_output(tmp_path / "deep", folder=True)
    assert not list((tmp_path / "deep").iterdir())
    for path, folder, told in [
        (tmp_path / "deep", False, "is a folder: give a file"),
        (tmp_path / "file", True, "is a file: give a folder"),
        (tmp_path / "file" / "new", False, "cannot be written"),
        (Path("/proc/none"), False, "cannot be written"),
    ]:
        with pytest.raises(ValueError, match=told):
            storage.check_output(path, folder=folder)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (evaluate, ["--checkpoint", "it", "--levels", "{}/x.png"]),
        (sample, ["--checkpoint", "it", "--page", "{}/x.html"]),
        (export, ["it", "{}/folder"]),
        (report, ["it", "--output", "{}/x.html"]),
    ],
)
def test_commands_refuse_before_they_load(module, words, tmp_path, monkeypatch, capsys):
    def worked(*_, **__):
        raise AssertionError("the work was begun")

    for name in ("load", "load_trained", "page"):
        monkeypatch.setattr(
            getattr(module, "report", module) if name == "page" else module, name, worked, raising=False
        )
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as leaving:
        module.main([word.format(tmp_path / "file") for word in words])
    assert leaving.value.code == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("generation", ["--checkpoint", "it=nowhere"]),
        ("infilling", ["--checkpoint", "it=nowhere"]),
        ("zero_shot", ["--checkpoint", "it=nowhere"]),
    ],
)
def test_scripts_refuse_before_they_load(script, words, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(INTEGRATION)
    (tmp_path / "file").write_text("")
    module = __import__(script)
    with pytest.raises(ValueError, match="cannot be written"):
        module.main([*words, "--output", str(tmp_path / "file" / "x")])
    sys.modules.pop(script)


def test_the_likelihood_table_goes_on_with_a_row_that_ended_early(monkeypatch, tmp_path):
    from sedd_train.commands import tables as script

    run = tmp_path / "run"
    (run / "checkpoints" / "step-00000002").mkdir(parents=True)
    (run / "summary.json").write_text("{}")
    commanded = []

    def ran(command, check):
        commanded.append(command)
        (run / "recipe.toml").write_text((run / "recipe.toml").read_text().replace("steps = 2\n", "steps = 9\n", 1))
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(subprocess, "run", ran)
    glimpse = recipes.override(recipes.read_recipe("text8-mini"), {"steps": 2})
    (run / "recipe.toml").write_text(recipes.to_toml(glimpse))
    arguments = ["text8", "--output", str(tmp_path)]
    for steps, more in [(2, 0), (9, 1), (9, 1), (5, 1)]:
        given = script.parser().parse_args(arguments, argparse.Namespace(training=["--steps", str(steps)]))
        script.train("SEDD absorb", run, script.TABLES["text8"], given)
        assert len(commanded) == more
    (command,) = commanded
    assert command[command.index("--resume") + 1 :][:2] == ["--steps", "9"]


@pytest.mark.filterwarnings("default")  # DeepSpeed warns
def test_a_run_s_own_text_is_what_is_measured(trained, text, cache, capsys, tmp_path, monkeypatch):
    _, folder = provenance.trained_on(trained)
    corpus = token_cache.read(folder)
    assert corpus is not None
    words = ["--blocks", "2", "--num-times", "4", "--json"]
    shown = []
    for name in (trained, trained / "export", next((trained / "checkpoints").glob("step-*"))):
        evaluate.main(["--checkpoint", str(name), *words])
        shown.append(json.loads(capsys.readouterr().out))
    named = ["--corpus", str(text)]
    evaluate.main(["--checkpoint", str(trained), *words, *named])
    shown.append(json.loads(capsys.readouterr().out))
    monkeypatch.setattr(token_cache, "read", lambda folder: None)  # the cache is gone
    evaluate.main(["--checkpoint", str(trained), *words])
    shown.append(json.loads(capsys.readouterr().out))
    assert all(found == shown[0] for found in shown[1:])
    evaluate.main(["--checkpoint", str(trained), *words, "--corpus", "sotu"])
    assert json.loads(capsys.readouterr().out) != shown[0]
    moved = tmp_path / "moved"
    (trained / "export").rename(moved)
    try:
        with pytest.raises(SystemExit):
            commands.main(["evaluate", "--checkpoint", str(moved)])
        assert "does not say what it was trained on: name what to measure by --corpus" in capsys.readouterr().err
    finally:
        moved.rename(trained / "export")


@pytest.mark.filterwarnings("default")
def test_a_change_of_the_text_is_named_before_a_run_goes_on(here, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"the text number {i} of all these texts " * 40)
    run = tmp_path / "run"
    assert here(run, corpus=str(folder), steps=1).step == 1
    known = json.loads((run / "data.json").read_text())
    assert [part["file"] for part in known["parts"]] == sorted(f"{i}.txt" for i in range(30))
    assert here(run, steps=2, resume=True).step == 2
    (folder / "7.txt").write_text("another text " * 100)
    (folder / "8.txt").unlink()
    (folder / "new.md").write_text("a new one " * 100)
    told = r"was trained on other text .*: 8.txt is gone; new.md is new; 7.txt has changed"
    with pytest.raises(ValueError, match=told):
        here(run, steps=3, resume=True)
