"""What a run was trained on: kept in its folder, compared when it goes on, told in a few lines, found again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sedd_train import checkpoint, distributed, provenance, recipes, token_cache
from sedd_train.folders import Part


def part(name: str, sha256: str = "00", split: str = "train", **more: Any) -> Part:
    return Part(name, split, "text", sha256=sha256, **more)


def text_of(*parts: Part, fingerprint: str = "abc", folder: Path = Path("cache") / "it") -> Any:
    return SimpleNamespace(fingerprint=fingerprint, folder=folder, parts=parts)


def test_each_kind_of_change_is_named(tmp_path):
    before = [part(name) for name in ("same", "gone", "other", "moved")]
    assert provenance.changes(tmp_path, before) == ""  # nothing is known of before
    provenance.write(tmp_path, text_of(*before))
    assert provenance.changes(tmp_path, before) == ""
    now = [part("same", bytes=9), part("other", "11"), part("moved", split="test"), part("new")]
    assert provenance.changes(tmp_path, now) == "gone is gone; new is new; other has changed; moved is now test"
    many = [part(str(number)) for number in range(7)]
    assert provenance.changes(tmp_path, many).count(";") == 10
    assert provenance.changes(tmp_path, many).endswith("; ...")
    exactly = provenance.changes(tmp_path, many[:6])
    assert (exactly.count(" is new"), exactly.endswith(" is new")) == (6, True)
    for damaged in ("{", "[]", '{"parts": [{}]}', '{"parts": [{"file": "a", "odd": 1}]}'):
        (tmp_path / "data.json").write_text(damaged)
        assert provenance.changes(tmp_path, now) == ""


def test_what_is_kept_of_a_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = [part("ä", documents=3, characters=40)]
    provenance.write(tmp_path, text_of(*parts))
    kept = (tmp_path / "data.json").read_text(encoding="utf-8")
    assert '"file": "ä"' in kept
    assert json.loads(kept) == {
        "fingerprint": "abc",
        "cache": str(tmp_path / "cache" / "it"),
        "parts": [dataclasses.asdict(parts[0])],
    }


def test_a_summary_names_the_first_files_and_where_the_others_stand(tmp_path):
    parts = [part(f"{number}.txt") for number in range(31)]
    lines = provenance.summary(parts, tmp_path).splitlines()
    assert lines[:2] == ["text:", "  0.txt: train, text, documents"]
    assert len(lines) == 32
    assert lines[-1] == f"  and 1 more, in {tmp_path / 'data.json'}"
    assert provenance.summary(parts[:30], tmp_path).splitlines()[-1] == "  29.txt: train, text, documents"


def test_of_many_files_those_to_be_watched_come_first_and_those_left_out_last(tmp_path):
    parts = [part("a.pdf", split="left out"), *(part(f"{n}.txt") for n in range(30)), part("z.txt", split="validation")]
    lines = provenance.summary(parts, tmp_path).splitlines()
    assert lines[1:3] == ["  z.txt: validation, text, documents", "  0.txt: train, text, documents"]
    assert lines[30:] == ["  28.txt: train, text, documents", f"  and 2 more, in {tmp_path / 'data.json'}"]
    assert provenance.summary(parts[:30], tmp_path).splitlines()[1] == "  a.pdf: left out, as text"


def test_a_recipe_keeps_the_one_commit_of_its_data_set():
    recipe = recipes.Recipe()
    one = [part("a", commit="1" * 40), part("b", commit="1" * 40), part("c")]
    assert provenance.pinned(recipe, text_of(*one)).revision == "1" * 40
    assert provenance.pinned(recipe, text_of(*one, part("d", commit="2" * 40))).revision == ""
    assert provenance.pinned(recipe, text_of(part("c"))).revision == ""
    assert provenance.pinned(dataclasses.replace(recipe, revision="main"), text_of(*one)).revision == "main"


def test_a_run_goes_on_with_what_it_was_trained_on_and_says_what_changed(tmp_path, monkeypatch):
    said: list[str] = []
    asked: list[Any] = []

    def last(run, fingerprint):
        asked.append((run, fingerprint))
        if fingerprint != "abc":
            raise checkpoint.CheckpointError(f"trained on other text than {fingerprint}")
        return "the checkpoint"

    monkeypatch.setattr(checkpoint, "last", last)
    monkeypatch.setattr(provenance, "say", said.append)
    provenance.write(tmp_path, text_of(part("a")))
    found: Any = provenance.saved(tmp_path, text_of(part("a")))
    assert found == "the checkpoint"
    assert asked == [(tmp_path / "checkpoints", "abc")]
    assert said == []
    found = provenance.saved(tmp_path, text_of(part("a"), part("b")))
    assert found == "the checkpoint"
    assert said == ["since this run began b is new; what it is trained and watched on is the same"]
    with pytest.raises(checkpoint.CheckpointError, match=r"^trained on other text than xyz: b is new$"):
        provenance.saved(tmp_path, text_of(part("a"), part("b"), fingerprint="xyz"))
    with pytest.raises(checkpoint.CheckpointError, match=r"^trained on other text than xyz$"):
        provenance.saved(tmp_path, text_of(part("a"), fingerprint="xyz"))

    def damaged(run, fingerprint):
        raise checkpoint.CheckpointError("no whole checkpoint")

    monkeypatch.setattr(checkpoint, "last", damaged)
    with pytest.raises(checkpoint.CheckpointError, match=r"^no whole checkpoint$"):
        provenance.saved(tmp_path, text_of(part("b")))


def test_a_run_its_export_and_its_checkpoints_say_what_they_were_trained_on(tmp_path, monkeypatch):
    run = tmp_path / "runs" / "mine"
    for folder in (run / "export", run / "checkpoints" / "step-00000001", run / "checkpoints" / "step-1" / "deep"):
        folder.mkdir(parents=True)
    recipe = recipes.override(recipes.Recipe(), {"corpus": "some texts"})
    (run / "recipe.toml").write_text(recipes.to_toml(recipe))
    assert provenance.trained_on(run) == (recipe, Path())  # of a run that kept no more
    provenance.write(run, text_of(folder=tmp_path / "cache"))
    for folder in (run, run / "export", run / "checkpoints" / "step-00000001"):
        assert provenance.trained_on(folder) == (recipe, tmp_path / "cache")
    monkeypatch.chdir(run)
    assert provenance.trained_on("export") == (recipe, tmp_path / "cache")
    for other in (run / "checkpoints" / "step-1" / "deep", tmp_path, "louaaron/sedd-small"):
        with pytest.raises(ValueError, match="does not say what it was trained on: name what to measure by --corpus"):
            provenance.trained_on(tmp_path / other)
    (run / "data.json").write_text("[]")
    assert provenance.trained_on(run) == (recipe, Path())


def test_a_text_is_made_once_and_read_by_all(tmp_path, monkeypatch):
    asked: list[Any] = []

    def prepare(*given, **how):
        asked.append((given, how))
        return SimpleNamespace(folder=tmp_path / "it")

    def by_leader(work, words):
        asked.append(words)
        return work()

    monkeypatch.setattr(token_cache, "prepare", prepare)
    monkeypatch.setattr(distributed, "by_leader", by_leader)
    found: list[Any] = ["the text"]
    monkeypatch.setattr(token_cache, "read", lambda folder: found[0] if folder == tmp_path / "it" else None)
    recipe = recipes.override(recipes.Recipe(), {"corpus": "here", "eos": "none", "column": "c"})

    def stop():
        return False

    text: Any = provenance.text_of(recipe, None, None, tmp_path, stop=stop)
    assert text == "the text"
    assert asked == [
        "corpus 'here' in tokenizer 'gpt2'",
        (("here", "gpt2", tmp_path, distributed.say), {"stop": stop, **recipe.texts}),
    ]
    provenance.text_of(recipe, "other", "coder", tmp_path, stop=stop)
    assert asked[-1][0][:2] == ("other", "coder")
    found[0] = None
    with pytest.raises(OSError, match="cannot be read by every process of this machine"):
        provenance.text_of(recipe, None, None, tmp_path, stop=stop)
