"""The command `sedd`: its words, what it says to a wrong one, and that launchers find it as a module."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sedd_graphs import Absorbing, LogLinear
from sedd_nets import SEDD
from sedd_train import Model, commands, distributed, load_trained
from sedd_train.commands import sample
from sedd_train.text8 import character_tokenizer

SMALL = (
    *("--recipe", "tiny", "--tokenizer", "bpe:300", "--length", "32", "--width", "32", "--depth", "1", "--heads", "2"),
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


def run(*words: object) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-m", "sedd_train", *map(str, words)], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


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


def test_completion_knows_words_and_options(capsys):
    commands.main(["--print-completion", "bash"])
    printed = capsys.readouterr().out
    assert "--zero-stage" in printed
    assert "infill" in printed
    assert exit_code("--print-completion", "dos") == 2


def test_a_launcher_runs_it_as_a_module(text, cache, tmp_path, capsys):
    """Trained by DeepSpeed's launcher on two ranks; then measured, sampled, filled and exported by other words."""
    output = tmp_path / "run"
    launcher = [Path(sys.executable).parent / "deepspeed", "--num_gpus", "2", "--master_port", distributed.free_port()]
    where = ["--corpus", text, "--output", output, "--cache", cache, "--steps", "2"]
    command = [*launcher, "--module", "sedd_train", "train", *SMALL, *where]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert json.loads((output / "summary.json").read_text())["steps"] == 2

    commands.main(["infill", "--checkpoint", str(output), "the ____ of", "--steps", "2", "--num", "1"])
    assert "--- sample 1 of 1" in capsys.readouterr().out
    commands.main(["evaluate", "--checkpoint", str(output), "--corpus", str(text), "--blocks", "2", "--num-times", "2"])
    assert "bits a character" in capsys.readouterr().out
    commands.main(["export", str(output), str(tmp_path / "model")])
    assert load_trained(tmp_path / "model").net.num_states > 0
    assert exit_code("export", str(output), str(tmp_path / "model")) == 2  # it is not written over
    assert "not empty" in capsys.readouterr().err


def test_a_plan_is_made_without_training(text, cache):
    code, printed, _ = run("plan", 2, *SMALL, "--corpus", text, "--cache", cache)
    assert code == 0
    assert "ZeRO 3" in printed


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
