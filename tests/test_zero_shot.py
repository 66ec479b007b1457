"""integration/zero_shot.py in miniature: what it measures, how it goes on where it was cut off, what it passes over."""

from __future__ import annotations

import importlib
import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from sedd_nets import SEDD
from sedd_train import conditional, detokenizers, evaluate, load, tokenizers
from sedd_train.tokens import tokenise
from transformers import GPT2LMHeadModel

INTEGRATION = Path(__file__).parents[1] / "integration"
SENTENCES = [
    "the state of the union is n't weak",
    "we the people 's house , free and equal .",
    "N men and N states",
] * 9
LINES = [" = The Union = \n", "\n", " The state , he said , is free . \n", " = = People = = \n", " They are . \n"] * 6
LENGTH = 16


@pytest.fixture(scope="module")
def script() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(INTEGRATION)
        yield importlib.import_module("zero_shot")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, save_causal: Any) -> dict[str, Path]:
    """A score model and a causal one with the same tokens, and two sets."""
    root = tmp_path_factory.mktemp("made")
    coder = tokenizers.load_tokenizer("bpe:280", lambda: [*SENTENCES, *LINES])
    torch.manual_seed(0)
    net = SEDD(len(coder) + 1, width=16, depth=1, heads=2, cond_dim=8, length=LENGTH, dropout=0.0, scale_by_sigma=True)
    torch.nn.init.normal_(net.output_layer.linear.weight, std=0.5)
    sections = {"tokens": len(coder), "graph": {"type": "absorb"}, "noise": {"type": "loglinear"}}
    net.save_pretrained(root / "ours", sections=sections)
    coder.save_pretrained(root / "ours")
    save_causal(root / "causal", coder, context=LENGTH)
    (root / "ptb.jsonl").write_text("\n".join(json.dumps({"sentence": text}) for text in SENTENCES))
    (root / "wiki").mkdir()
    for part, lines in [("train", LINES), ("validation", LINES[:5])]:
        (root / "wiki" / f"{part}.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return {"ours": root / "ours", "causal": root / "causal", "ptb": root / "ptb.jsonl", "wikitext2": root / "wiki"}


@pytest.fixture
def run(script: ModuleType, made: dict[str, Path], tmp_path: Path) -> Callable[..., Any]:
    """The script on both models and both sets, with few times."""

    def _run(*options: str, output: str = "table") -> Any:
        models = ["--checkpoint", f"ours={made['ours']}", "--causal", f"causal={made['causal']}"]
        sets = ["--sets", "ptb", "wikitext2", "--data", *(f"{name}={made[name]}" for name in ("ptb", "wikitext2"))]
        few = ["--num-times", "4", "--batch-size", "4", "--blocks", "10", "--output", str(tmp_path / output)]
        return script.main([*models, *sets, *few, *options])

    return _run


def test_what_is_measured(run: Any, made: dict[str, Path], tmp_path: Path) -> None:
    results = run()
    net, graph, noise, coder = load(made["ours"])
    texts = {
        "ptb": [detokenizers.ptb(text) for text in SENTENCES],  # a file is the whole set
        "wikitext2": [detokenizers.wikitext(line) for line in LINES],  # of a folder the train part, by rows
    }
    causal = GPT2LMHeadModel.from_pretrained(made["causal"]).eval()
    for name, documents in texts.items():
        text = tokenise(documents, coder)
        count = min(10, text.blocks(LENGTH))
        blocks = text.block(range(count), LENGTH)
        cell = results.cells[f"ours | {name}"]
        bound = evaluate(net, graph, noise, blocks, characters_per_token=1.0, num_times=4, chunk=4)
        assert len(cell["nats"]) == cell["blocks"] == count
        assert sum(cell["nats"]) / count == pytest.approx(bound.nats_per_token, abs=1e-5)
        assert cell["fingerprint"] == results.cells[f"causal | {name}"]["fingerprint"]

        ids = torch.cat([torch.full((count, 1), coder.eos_token_id), blocks], 1)
        with torch.no_grad():
            logits = causal(input_ids=ids[:, :-1]).logits
        nats = torch.nn.functional.cross_entropy(logits.mT, blocks, reduction="none").mean(1)
        assert results.cells[f"causal | {name}"]["nats"] == pytest.approx(nats.tolist(), abs=1e-5)
    assert results.cells["ours | ptb"]["part"] == "all of ptb.jsonl"
    assert results.cells["ours | wikitext2"]["part"] == "train"

    written = (tmp_path / "table.md").read_text()
    cell = results.cells["ours | ptb"]["nats"]
    mean, error = statistics.fmean(cell), statistics.stdev(cell) / math.sqrt(len(cell))
    (row,) = (line for line in written.splitlines() if line.startswith("| ours |"))
    shown = re.findall(r"≤ ([\d.]+) ± ([\d.]+)", row)[1]  # after WikiText2
    assert [float(number) for number in shown] == pytest.approx([math.exp(mean), math.exp(mean) * error], rel=0.06)
    assert "Not in GPT-2's tokens, and not to be compared with the others: ours, causal." in written
    assert "| SEDD absorb small | 50.92 | 41.84 | 114.24 | 40.62 | 79.29 |" in written
    assert (tmp_path / "table.png").stat().st_size > 10_000


def test_what_follows_a_text(run: Any, made: dict[str, Path], tmp_path: Path) -> None:
    """The last words and the choices of both models, whose numbers are those of `conditional`; a causal one's exact."""
    passages, asked = tmp_path / "lambada.test.jsonl", tmp_path / "asked.jsonl"
    passages.write_text("\n".join(json.dumps({"text": text.strip(" .")}) for text in SENTENCES[:3]))
    question = {"context": "the state of the", "choices": ["union", "people"], "answer": 0}
    asked.write_text("\n".join([json.dumps(question)] * 2))
    options = ["--sets", "--last-word", "--choices", f"asked={asked}", "--data", f"lambada={passages}"]
    results = run(*options)

    net, graph, noise, coder = load(made["ours"])
    texts = [conditional.last_word(detokenizers.lambada(text.strip(" ."))) for text in SENTENCES[:3]]
    pairs = conditional.token_pairs(texts, coder)
    bound = conditional.score_bound(net, graph, noise, num_times=4, estimator="masks")
    found = conditional.conditional(bound, pairs, length=LENGTH, chunk=4)
    cell = results.cells["ours | last word"]
    assert cell["nats"] == pytest.approx(float(found.value.mean()), abs=1e-5)
    assert cell["words"] == 3

    causal, nats = GPT2LMHeadModel.from_pretrained(made["causal"]).eval(), 0.0
    for context, rest in pairs:
        ids = torch.tensor([[coder.eos_token_id, *context[max(0, len(context) + len(rest) - LENGTH) :], *rest]])
        with torch.no_grad():
            logits = causal(input_ids=ids[:, :-1]).logits
        nats += float(torch.nn.functional.cross_entropy(logits[0, -len(rest) :], ids[0, -len(rest) :], reduction="sum"))
    assert results.cells["causal | last word"]["nats"] == pytest.approx(nats / 3, abs=1e-5)
    assert results.cells["causal | last word"]["measurement_error"] == 0
    assert results.cells["causal | choices asked"]["number"] == 2
    written = (tmp_path / "table.md").read_text()
    assert "LAMBADA's last word, given what comes before it" in written
    assert "| ours, asked |" in written
    assert run(*options).cells == results.cells  # what is there is not measured again
    asked.write_text(json.dumps(question | {"answer": 1}))
    with pytest.raises(OSError, match="none of the sets"):
        run("--sets", "--choices", f"asked={asked}")


def test_articles_are_another_text_than_rows(run: Any) -> None:
    rows = run(output="rows").cells["ours | wikitext2"]
    articles = run("--documents", "articles", output="articles").cells["ours | wikitext2"]
    assert rows["fingerprint"] != articles["fingerprint"]
    with pytest.raises(ValueError, match="holds results with documents = rows, and this run has articles"):
        run("--documents", "articles", output="rows")


def test_a_run_that_was_cut_off_goes_on(run: Any, script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(output="whole").cells
    calls = []

    def interrupted(*given: Any, **options: Any) -> Any:
        calls.append(given)
        if len(calls) == 6:  # in the middle of a set
            raise KeyboardInterrupt
        return generator(*given, **options)

    generator = script.randomness.generator
    with monkeypatch.context() as patch:
        patch.setattr(script.randomness, "generator", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert run().cells == whole

    def gone(*_: Any, **__: Any) -> Any:
        raise ConnectionError("offline")

    monkeypatch.setattr(script.corpora, "load_texts", gone)
    assert run().cells == whole  # what is there is not asked for again


def test_sets_that_cannot_be_had_are_passed_over(
    run: Any,
    made: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import datasets

    def offline(path: str, *given: Any, **options: Any) -> Any:
        if "/" in path:
            raise OSError("no route to host")
        return load_dataset(path, *given, **options)

    load_dataset = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", offline)
    results = run("--sets", "lambada", "ptb", "lm1b", "--data", f"lm1b={tmp_path / 'nowhere'}", f"ptb={made['ptb']}")
    assert list(results.cells) == ["ours | ptb", "causal | ptb"]
    said = capsys.readouterr().err
    assert "LAMBADA is not measured: the data set 'EleutherAI/lambada_openai' could not be had" in said
    assert "1BW is not measured" in said
    assert "LAMBADA was not measured: the data set" in (tmp_path / "table.md").read_text()
    with pytest.raises(OSError, match="none of the sets could be measured"):
        run("--sets", "lambada", "wikitext103", output="none")


def test_another_text_under_the_same_name_is_refused(run: Any, script: ModuleType, tmp_path: Path) -> None:
    for words in ("the state of the union", "we the people"):
        (tmp_path / "set.txt").write_text("\n".join([words] * 99))
        options = ("--sets", "ptb", "--data", f"ptb={tmp_path / 'set.txt'}", "--blocks", "4")
        if words.startswith("the"):
            path = tmp_path / "table.json"
            run(*options)
            kept = json.loads(path.read_text())
            kept["cells"]["ours | ptb"]["nats"].pop()  # as if cut off
            path.write_text(json.dumps(kept))
    with pytest.raises(OSError, match="none of the sets"):
        run(*options)


def test_a_model_that_fails_leaves_no_empty_cell(run: Any, script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ValueError("the log-scores are NaN")

    monkeypatch.setattr(script.randomness, "generator", fail)
    with pytest.raises(OSError, match="none of the sets"):
        run()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--num-times", "3"], "must be even"),
        (["--data", "pbt=x"], "expected NAME=VALUE with NAME one of lambada"),
        (["--part", "ptb=all"], "expected NAME=VALUE"),
        (["--blocks", "0"], "at least 1"),
    ],
)
def test_options_that_make_no_sense(
    run: Any, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(*options)
    assert said in capsys.readouterr().err


def test_a_length_that_the_model_does_not_take(run: Any) -> None:
    with pytest.raises(ValueError, match=f"--length 99: ours takes 1 to {LENGTH} tokens"):
        run("--length", "99")
