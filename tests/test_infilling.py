"""integration/infilling.py in miniature: the prompts, that they are kept, MAUVE of the right features, and refusals."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from sedd_nets import SEDD, Causal
from sedd_train import tokenizers

INTEGRATION = Path(__file__).parents[1] / "integration"
TEXTS = ["the state of the union is strong and the people of the states are free ", "we the people of the union "] * 9
LENGTH = 12


@pytest.fixture(scope="module")
def script() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(INTEGRATION)
        yield importlib.import_module("infilling")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, save_causal: Any) -> dict[str, Path]:
    """A score model, an autoregressive one, one of other tokens, two causal models of transformers, and a corpus."""
    root = tmp_path_factory.mktemp("made")
    coder, other = (tokenizers.load_tokenizer(name, lambda: TEXTS) for name in ("bpe:280", "bpe:270"))
    sizes: dict[str, Any] = {"width": 16, "depth": 1, "heads": 2, "length": 16, "dropout": 0.0}
    absorb = {"graph": {"type": "absorb"}, "noise": {"type": "loglinear"}}
    causal = {**absorb, "objective": {"type": "autoregressive"}}
    torch.manual_seed(0)
    for name, net, words, sections in [
        ("absorb", SEDD(len(coder) + 1, cond_dim=8, **sizes, scale_by_sigma=True), coder, absorb),
        ("causal", Causal(len(coder) + 1, **sizes), coder, causal),
        ("other", SEDD(len(other) + 1, cond_dim=8, **sizes, scale_by_sigma=True), other, absorb),
    ]:
        for weights in net.parameters():  # of which many begin at zero, so that no position sees another
            torch.nn.init.normal_(weights, std=0.5)
        net.save_pretrained(root / name, sections={"tokens": len(words), **sections})
        words.save_pretrained(root / name)
    for name, words in [("judge", coder), ("other judge", other)]:
        save_causal(root / name, words)
    (root / "corpus.txt").write_text("".join(TEXTS) * 120)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def run(script: ModuleType, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script on both networks; in place of MAUVE the share of equal features, which a test can foretell."""

    def equal(*, p_features: Any, q_features: Any, **_: Any) -> Any:
        return SimpleNamespace(mauve=float((abs(p_features - q_features).max(1) < 1e-4).mean()))

    monkeypatch.setattr(script, "load_mauve", lambda: equal)

    def main(*options: Any, of: tuple[str, ...] = ("absorb", "causal"), judge: str = "judge") -> Any:
        checkpoints = [f"{name}={made[name]}" for name in of]
        options = ("--judge", made[judge], "--corpus", made["corpus.txt"], "--output", tmp_path / "out", *options)
        small = ("--num", 20, "--sets", 2, "--steps", 3, "--length", LENGTH, "--device", "cpu")
        return script.main(["--checkpoint", *checkpoints, *map(str, (*small, *options))])

    return main


def test_half_of_the_tokens_are_given_where_the_name_says(script: ModuleType) -> None:
    def given(name: str, length: int) -> torch.Tensor:
        given: torch.Tensor = script.PROMPTS[name](500, length, torch.Generator().manual_seed(0))
        return given

    ones, zeros = torch.ones(500, 50, dtype=torch.bool), torch.zeros(500, 50, dtype=torch.bool)
    assert torch.equal(given("prefix", 100), torch.cat([ones, zeros], 1))
    assert torch.equal(given("suffix", 100), torch.cat([zeros, ones], 1))
    assert torch.equal(given("middle", 100), torch.cat([ones[:, :25], zeros, ones[:, 25:]], 1))
    scattered = given("scattered", 100)
    assert torch.equal(scattered.sum(1), torch.full((500,), 50))
    # each position is given in half of the windows: 100 binomials (500, 1/2) within 5.5 deviations, false alarm 4e-6
    assert (scattered.float().mean(0) - 0.5).abs().max() < 5.5 * 0.5 / 500**0.5


def test_every_system_fills_every_prompt_and_keeps_it(run: Any, tmp_path: Path) -> None:
    results = run()
    systems = ["absorb", "causal", "causal, nucleus 0.95", "tokens at their frequencies"]
    prompts = ["prefix", "suffix", "middle", "scattered"]
    assert set(results.cells) == {f"{s} | {p}" for s in systems for p in prompts} | {"other held-out windows"}
    for cell in results.cells.values():
        if cell["prompt"]:
            assert len(cell["mauve"]) == 2
            assert cell["given"] == cell["kept"] == 2 * 20 * LENGTH // 2
    table = (tmp_path / "out.md").read_text()
    row = next(line for line in table.splitlines() if line.startswith("| causal, nucleus 0.95 |"))
    assert row.endswith(f"| {4 * 240} of {4 * 240} |")
    assert "| SEDD, infill | middle | 0.942 |" in table
    assert (tmp_path / "out.png").stat().st_size > 10_000
    assert "=== absorb | middle" in (tmp_path / "out-samples.txt").read_text()


def test_a_system_that_returns_the_text_itself_is_perfect_and_one_that_changes_the_prompt_is_found(
    run: Any, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut, kept = script.cut, {}

    def remembered(*args: Any) -> Any:
        kept["windows"], others = cut(*args)
        return kept["windows"], others

    def systems(checkpoint: Any, args: Any) -> Any:
        def perfect(x: Any, given: Any, seeds: Any) -> Any:
            windows = kept["windows"]
            assert torch.equal(x, windows.masked_fill(~given, 0))
            return windows

        def careless(x: Any, given: Any, seeds: Any) -> Any:
            return kept["windows"].index_fill(1, torch.tensor([0]), 1)

        return {"perfect": perfect, "careless": careless}

    monkeypatch.setattr(script, "cut", remembered)
    monkeypatch.setattr(script, "systems_of", systems)
    cells = run("--sets", 1, "--prompts", "prefix", of=("absorb",)).cells
    assert cells["perfect | prefix"]["mauve"] == [1.0]
    assert cells["perfect | prefix"]["kept"] == 20 * LENGTH // 2
    assert cells["careless | prefix"]["kept"] < cells["careless | prefix"]["given"]
    assert cells["careless | prefix"]["mauve"][0] < 1


def test_features_are_the_last_hidden_state_at_the_text_s_end(script: ModuleType, made: dict[str, Path]) -> None:
    judge = script.load_judge(str(made["judge"]))
    texts = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    found = judge.features(texts)
    for text, feature in zip(texts, found, strict=True):
        with torch.no_grad():
            hidden = judge.model(torch.tensor([text]), output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(feature, hidden[0, -1])


def test_a_run_that_was_cut_off_goes_on_with_the_same_samples(
    run: Any, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--prompts", "middle", "--nucleus", 1)
    whole = run(*options, "--sets", 3, "--output", tmp_path / "whole").cells
    run(*options, "--sets", 1)
    read, calls = script.features, list[int]()

    def counted(judge: Any, coder: Any, x: Any) -> Any:
        calls.append(len(x))
        return read(judge, coder, x)

    monkeypatch.setattr(script, "features", counted)
    cells = run(*options, "--sets", 3).cells
    assert calls == [20] * (1 + 2 * 3)  # the original windows, and two more sets of three systems
    assert cells == whole
    with pytest.raises(ValueError, match="with steps = 3, and this run has 4"):
        run(*options, "--steps", 4)


def test_left_to_right_and_diffusion_see_what_they_should(script: ModuleType, made: dict[str, Path]) -> None:
    """Of two prompts that differ after the gap only, diffusion's filling depends on it and left to right's does not."""
    x = torch.randint(0, 280, (64, LENGTH), generator=torch.Generator().manual_seed(0))
    given = script.middle(64, LENGTH, None)
    y = x.clone()
    y[:, -3:] = (y[:, -3:] + 17) % 280
    for name, depends in [("absorb", True), ("causal", False)]:
        checkpoint = script.read_checkpoint(name, str(made[name]))
        fill = checkpoint.filler("cpu", "tweedie", 4)
        first, second = (fill(prompt, given, range(64)) for prompt in (x, y))
        assert torch.equal(first[given], x[given])
        assert torch.equal(second[given], y[given])
        assert bool((first[~given] != second[~given]).any()) is depends


def test_another_causal_model_s_rows_are_there_and_tokens_must_be_shared(run: Any, made: dict[str, Path]) -> None:
    cells = run("--causal", f"gpt={made['judge']}", "--prompts", "prefix", of=("absorb",)).cells
    assert {"gpt | prefix", "gpt, nucleus 0.95 | prefix"} < set(cells)
    assert cells["gpt | prefix"]["kept"] == 240
    with pytest.raises(ValueError, match="other has other tokens than absorb"):
        run(of=("absorb", "other"))


def test_what_cannot_be_is_refused(
    run: Any, script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any, made: dict[str, Path]
) -> None:
    with pytest.raises(ValueError, match=r"--num 100000: the held-out part of .* windows of 12 tokens"):
        run("--num", 100000)
    with pytest.raises(ValueError, match="--length 17: absorb takes at most 16 tokens"):
        run("--length", 17)
    with pytest.raises(SystemExit):
        run("--nucleus", 1.5)
    assert "--nucleus takes masses in (0, 1]" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(ValueError, match=r"pip install mauve-text==0\.4\.0 faiss-cpu"):
        script.main(["--checkpoint", str(made["absorb"]), "--judge", str(made["judge"])])


@pytest.mark.skipif(find_spec("mauve") is None or find_spec("faiss") is None, reason="needs mauve-text and faiss-cpu")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_mauve_of_equal_features_is_high_and_of_others_low(script: ModuleType) -> None:
    mauve = script.load_mauve()
    random = torch.Generator().manual_seed(0)
    first, second, far = (torch.randn(100, 4, generator=random).numpy() for _ in range(3))
    assert mauve(p_features=first, q_features=second, seed=0).mauve > 0.6
    assert mauve(p_features=first, q_features=far + 5, seed=0).mauve < 0.1
