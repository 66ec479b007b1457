"""`sedd sample`, every option, with networks of a few hundred weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from sedd_nets import MDLM, RADD, SEDD
from sedd_samplers import draw_lengths
from sedd_train import tokenizers
from sedd_train.commands import sample
from torch import Tensor

TEXTS = ["the state of the union is strong and the people of the states are free ", "we the people of the union "] * 9
LENGTH = 16


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return sample


@pytest.fixture(scope="module")
def coder() -> Any:
    return tokenizers.load_tokenizer("bpe:280", lambda: TEXTS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, coder: Any) -> dict[str, Path]:
    """Checkpoints of a network that masks, one whose tokens are noised, and of the two time-free families."""
    sizes: dict[str, Any] = {"width": 16, "depth": 1, "heads": 2, "length": LENGTH, "dropout": 0.0}
    vocabulary = len(coder)
    kinds: dict[str, tuple[Any, int, dict[str, Any]]] = {
        "absorb": (SEDD, vocabulary + 1, {"graph": {"type": "absorb"}, "noise": {"type": "loglinear"}}),
        "uniform": (
            SEDD,
            vocabulary,
            {"graph": {"type": "uniform"}, "noise": {"type": "geometric", "sigma_min": 1e-3, "sigma_max": 10.0}},
        ),
        "radd": (RADD, vocabulary + 1, {"graph": {"type": "absorb"}, "noise": {"type": "loglinear"}}),
        "mdlm": (MDLM, vocabulary + 1, {"graph": {"type": "absorb"}, "noise": {"type": "loglinear"}}),
    }
    folders = {}
    for name, (family, states, sections) in kinds.items():
        torch.manual_seed(0)
        own = {"cond_dim": 8, "scale_by_sigma": name == "absorb"} if family is SEDD else {}
        net: Any = family(states, **sizes, **own)
        torch.nn.init.normal_(net.output_layer.linear.weight, std=0.5)
        folders[name] = tmp_path_factory.mktemp(name)
        net.save_pretrained(folders[name], sections={"tokens": vocabulary, **sections})
        coder.save_pretrained(folders[name])
    return folders


@pytest.fixture
def draw(script: ModuleType, saved: dict[str, Path]) -> Any:
    """The script on a checkpoint, with three steps unless told otherwise."""

    def main(*options: Any, kind: str = "absorb") -> Tensor:
        x: Tensor = script.main(["--checkpoint", str(saved[kind]), "--steps", "3", *map(str, options)])
        return x

    return main


@pytest.mark.parametrize("kind", ["absorb", "uniform", "radd", "mdlm"])
def test_two_samples_of_the_model_s_length_are_printed(draw: Any, coder: Any, capsys: Any, kind: str) -> None:
    x = draw(kind=kind)
    assert x.shape == (2, LENGTH)
    assert x.max() < len(coder)
    printed = capsys.readouterr()
    for i in (1, 2):
        assert f"--- sample {i} of 2 ---" in printed.out
        assert coder.decode(x[i - 1].tolist()) in printed.out
    assert re.search(r"\n32 tokens in \d+\.\d s \(3 steps of tweedie, seed 0\)\n$", printed.out)
    assert "5/5" in printed.err  # the bar


def test_every_method_draws(draw: Any, script: ModuleType, coder: Any) -> None:
    seen = []
    for name in script.METHODS:
        x = draw("--method", name, "--length", 6)
        assert x.max() < len(coder)
        seen.append(tuple(x.flatten().tolist()))
    assert len(set(seen)) == len(seen) - 1  # ancestral is tweedie, where the model's law sums to 1
    for name in ("tweedie", "euler", "tau-leaping", "ancestral", "trapezoidal", "corrected", "uniformization"):
        assert draw("--method", name, "--length", 6, kind="uniform").shape == (2, 6)


def test_prefix_and_suffix_stand_where_they_belong(draw: Any, coder: Any) -> None:
    before, after = "the people", " free"
    x = draw("--prefix", before, "--suffix", after, "--num", 3)
    assert x.shape == (3, LENGTH)
    for row in x.tolist():
        assert coder.decode(row).startswith(before)
        assert coder.decode(row).endswith(after)


def test_blanks_are_filled_and_nothing_else(draw: Any, coder: Any) -> None:
    x = draw("--text", "the ___ of the __.", "--num", 3)
    the, of_the, dot = (coder.encode(part) for part in ("the", " of the", "."))
    assert x.shape == (3, len(the) + 3 + len(of_the) + 2 + len(dot))
    for row in x.tolist():
        assert row[: len(the)] == the
        assert row[len(the) + 3 :][: len(of_the)] == of_the
        assert row[-len(dot) :] == dot


def test_length_and_number(draw: Any) -> None:
    assert draw("--length", 5, "--num", 7).shape == (7, 5)


def test_more_steps_are_more_steps(draw: Any, capsys: Any) -> None:
    draw("--steps", 9)
    assert "11/11" in capsys.readouterr().err


def test_a_seed_belongs_to_a_sample(draw: Any) -> None:
    """Whatever the number of samples; the next one has the next seed."""
    x = draw("--seed", 5, "--num", 3)
    assert torch.equal(draw("--seed", 5, "--num", 3), x)
    assert torch.equal(draw("--seed", 6, "--num", 1), x[1:2])
    assert not torch.equal(draw("--seed", 15, "--num", 3), x)


@pytest.mark.parametrize("options", [("--top-k", 1), ("--top-p", 1e-6), ("--temperature", 1e-3)])
def test_controls_make_it_likely(draw: Any, options: tuple[Any, ...]) -> None:
    """All but the likeliest token are cut off: one position alone does not depend on the seed any more."""
    one = ("--prefix", "the people of the", "--length", 5, "--num", 8)
    free, cut = draw(*one), draw(*one, *options)
    assert len(free.unique(dim=0)) > 1 or free.shape[1] == 1
    assert (free[:, :-1] == cut[:, :-1]).all()
    assert len(cut[:, -1].unique()) == 1


def test_watching_shows_the_first_sample_and_no_bar(draw: Any, coder: Any, capsys: Any) -> None:
    x = draw("--watch")
    err = capsys.readouterr().err
    assert "step 0/4  t = 1.000: " + "░" * LENGTH in err
    last = err.splitlines()[-1].removeprefix("step 4/4  t = 0.000: ")
    assert re.sub("\\W", "", coder.decode(x[0].tolist())) == re.sub("\\W", "", last)  # but for what is not printed
    assert "sampling" not in err


def test_a_page_is_written(draw: Any, tmp_path: Path) -> None:
    x = draw("--page", tmp_path / "sample.html", "--prefix", "we")
    page = (tmp_path / "sample.html").read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found
    held = json.loads(found[1])
    state = held["start"]
    for changes in held["changes"]:
        for b, i, token in zip(*changes, strict=True):
            state[b][i] = token
    assert state == x.tolist()
    assert held["given"][0][0] == 1


def test_a_device_is_where_it_runs(draw: Any) -> None:
    assert draw("--device", "cpu").device.type == "cpu"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--text", "a _", "--prefix", "b"], "--text holds the whole prompt"),
        (["--text", "a _", "--length", "4"], "--text is as long as it is"),
        (["--num", "0"], "--num must be at least 1, got 0"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--length", "-3"], "--length must be at least 1, got -3"),
        (["--length", "17"], "--length 17 is longer than the 16 tokens"),
        (["--prefix", "the people " * 20], "no position is left to fill"),
        (["--text", "no blank"], "has no blank to fill"),
        (["--temperature", "0"], "temperature must be positive and finite, got 0.0"),
        (["--top-k", "0"], "top_k must be a positive integer, got 0"),
        (["--top-p", "1.5"], r"top_p must lie in \(0, 1\], got 1.5"),
        (["--method", "best"], "invalid choice: 'best'"),
        (["--label", "tale"], "labels"),
        (["--guidance", "2"], r"--guidance 2\.0 is the weight of a label: give --label, too"),
        (["--checkpoint", str(Path(__file__).parent)], "has no config.json"),
        (["--page", str(Path(__file__) / "page.html")], "page.html cannot be written .* give another name"),
    ],
)
def test_what_makes_no_sense_is_said_in_a_line(
    draw: Any, capsys: Any, monkeypatch: Any, options: Any, told: Any
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as ended:
        draw(*options)
    assert ended.value.code == 2
    assert re.search(told, capsys.readouterr().err)


@pytest.mark.parametrize("options", [["--top-p", "0.9"], ["--method", "unmasking"], ["--method", "confidence"]])
def test_what_needs_a_mask_is_refused_to_others(draw: Any, capsys: Any, options: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        draw(*options, kind="uniform")
    assert ended.value.code == 2
    assert re.search("need a model that masks|needs an absorbing graph", capsys.readouterr().err)


def test_the_help_explains_every_option_and_method(script: ModuleType) -> None:
    text = script.parser().format_help()
    tested = Path(__file__).read_text(encoding="utf-8")
    for option in re.findall(r"^  (--[a-z-]+)", text, re.M):
        assert option in tested, f"{option} has no test"
    for name in script.METHODS:
        assert re.search(rf"^  {name} {{2,}}\S", script.EPILOG, re.M), name


def test_a_model_of_rows_of_many_lengths_samples_texts_of_their_lengths(
    script: ModuleType, saved: dict[str, Path], coder: Any, tmp_path: Path, capsys: Any
) -> None:
    """Lengths by the law that the checkpoint carries; what is behind a text changes nothing of it."""
    net = SEDD.from_pretrained(saved["absorb"])
    law = [0] * LENGTH
    law[4], law[8] = 3, 1  # rows of 5 and of 9 tokens
    net.save_pretrained(tmp_path, sections={**net.sections, "lengths": law})
    coder.save_pretrained(tmp_path)
    options = ["--checkpoint", str(tmp_path), "--steps", "3"]
    x = script.main([*options, "--num", "40"])
    printed = capsys.readouterr().out
    lengths = [int(n) for n in draw_lengths(torch.tensor(law), range(40))]
    assert x.shape == (40, 9)
    assert set(lengths) == {5, 9}
    assert 20 <= lengths.count(5) < 40
    for b, n in enumerate(lengths):
        assert f"--- sample {b + 1} of 40 {'-' * 50}\n{coder.decode(x[b, :n].tolist())}\n" in printed
    assert f"\n{sum(lengths)} tokens in" in printed
    for b in (lengths.index(5), lengths.index(9)):  # as it is alone
        assert torch.equal(script.main([*options, "--num", "1", "--seed", str(b)])[0], x[b, : lengths[b]])
    assert script.main([*options, "--num", "2", "--length", "7"]).shape == (2, 7)
    prefix = coder.decode(coder.encode(TEXTS[0])[:6])
    shortest = len(coder.encode(prefix))
    assert script.main([*options, "--num", "8", "--prefix", prefix]).shape == (8, 9)
    assert 5 <= shortest < 9
    with pytest.raises(SystemExit):
        script.main([*options, "--prefix", coder.decode(coder.encode(TEXTS[0])[:11])])
    assert "no text that this model was trained on is longer" in capsys.readouterr().err
