"""What of a folder is a model, whose mask and tokenizer it has, and what its samples begin from and are drawn by."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sedd_graphs import Absorbing, Geometric, Hybrid, LogLinear, Uniform
from sedd_nets import MDLM, SEDD
from sedd_samplers import Tweedie, Unmasking, clamped
from sedd_train import Model, loggers, pipelines, plotting, pretrained, prompts, recipes, report, tokenizers
from sedd_train.objectives import D3PM, Autoregressive, ScoreEntropy
from sedd_train.pipelines import Canvas, Pipeline, controls_of
from sedd_train.pretrained import check_states, folder_of, make_graph, make_objective, make_schedule, sections
from sedd_train.text8 import character_tokenizer
from sedd_train.tokens import Tokens, counted, tokenise
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

RECIPE = recipes.Recipe()


def words(size: int, mask: int | None = None) -> Any:
    vocabulary = {"[MASK]" if i == mask else f"w{i}": i for i in range(size)}
    fast: Any = PreTrainedTokenizerFast
    options = {} if mask is None else {"mask_token": "[MASK]"}
    return fast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, next(iter(vocabulary)))), **options)


def test_where_in_a_run_the_model_is(tmp_path):
    """The folder itself, its export, its last checkpoint: the first of these that is one."""
    run = tmp_path / "run"
    assert folder_of(run) == run
    assert folder_of("me/model") == "me/model"
    (run / "checkpoints").mkdir(parents=True)
    assert folder_of(run) == run
    (run / "checkpoints" / "latest").write_text("step-00000007\n")
    assert folder_of(str(run)) == run / "checkpoints" / "step-00000007"
    (run / "export").mkdir()
    assert folder_of(run) == run / "checkpoints" / "step-00000007"  # which is not written yet
    (run / "export" / "config.json").write_text("{}")
    assert folder_of(run) == run / "export"
    (run / "config.json").write_text("{}")
    assert folder_of(run) == run


@pytest.mark.parametrize(
    ("graph", "tokens", "mask", "taken"),
    [
        (Uniform(9), 9, None, True),
        (Uniform(9), 8, None, False),
        (Absorbing(9), 9, None, True),
        (Absorbing(9), 10, None, False),
        (Absorbing(9, mask_id=3), 10, 3, True),  # the tokenizer's own
        (Absorbing(9, mask_id=3), 10, 4, False),
        (Absorbing(9, mask_id=3), 9, 3, False),
        (Absorbing(9, mask_id=3), 9, None, True),
        (Hybrid(9, uniform_rate=1.0, mask_rate=1.0), 9, None, True),
    ],
)
def test_a_graph_has_a_state_for_each_token(graph, tokens, mask, taken):
    if taken:
        check_states(graph, words(tokens, mask))
        return
    with pytest.raises(ValueError, match=f"has {graph.num_states} states, and the tokenizer {tokens} tokens") as caught:
        check_states(graph, words(tokens, mask))
    outside = graph.mask_id is not None and graph.mask_id != mask
    assert (f"none of which is its mask {graph.mask_id}" in str(caught.value)) is outside


@pytest.mark.parametrize(
    ("word", "tokenizer", "states", "mask"),
    [
        ("absorb", 10, 11, 10),
        ("absorb:mask_id=3", 10, 11, 3),
        ("absorb:mask_id=3", words(10, 3), 10, 3),
        ("absorb:mask_id=4", words(10, 3), 11, 4),
        ("absorb", words(10, 9), 11, 10),
        ("uniform", words(10, 3), 10, None),
        ("hybrid:uniform_rate=1,mask_rate=1", 10, 11, 10),
        ("masked:tokens=uniform,rate=1,mask_rate=1", 10, 11, 10),
        ("ordinal", 10, 10, None),
    ],
)
def test_a_graph_of_a_tokenizer(word, tokenizer, states, mask):
    found = make_graph(word, tokenizer)
    assert (found.num_states, found.mask_id) == (states, mask)


def test_what_is_one_s_own_is_to_be_given():
    with pytest.raises(
        ValueError, match=r"the graph Dense\(Q\) cannot be made from a recipe: give it, train\(..., graph="
    ):
        make_graph("own:Dense(Q)", 3)
    own = recipes.override(RECIPE, {"noise": "own:Mine"})
    with pytest.raises(
        ValueError, match=r"the schedule Mine cannot be made from a recipe: give it, train\(..., noise="
    ):
        make_schedule(own)
    with pytest.raises(ValueError, match=r"^noise = 'loglinear:eps=2': eps must"):
        make_schedule(recipes.override(RECIPE, {"noise": "loglinear:eps=2"}))


def test_a_recipe_s_ends_are_those_of_schedules_that_say_none():
    values: dict[str, Any] = {"sigma_min": 0.5, "sigma_max": 3.0}
    found = make_schedule(recipes.override(RECIPE, values | {"noise": "geometric"}))
    assert (type(found), found.sigma_min, found.sigma_max) == (Geometric, 0.5, 3.0)
    found = make_schedule(recipes.override(RECIPE, values | {"noise": "geometric:sigma_max=7"}))
    assert (found.sigma_min, found.sigma_max) == (0.5, 7)
    told = sections(recipes.override(RECIPE, values | {"noise": "geometric:sigma_max=7"}), Uniform(9), found)
    assert told["noise"] == {"type": "geometric", "sigma_min": 0.5, "sigma_max": 7}
    assert (told["tokens"], told["graph"]) == (9, {"type": "uniform"})


def test_an_objective_by_its_section():
    graph, noise = Absorbing(9, mask_id=3), LogLinear()
    assert make_objective({"type": "score-entropy"}, graph, noise) == ScoreEntropy(graph, noise)
    assert make_objective({"type": "d3pm", "steps": 7}, graph, noise) == D3PM(graph, noise, 7)
    assert make_objective({"type": "autoregressive"}, graph, noise) == Autoregressive(start=3)
    with pytest.raises(ValueError, match="objective 'mse': expected 'score-entropy', 'd3pm' or 'autoregressive'"):
        make_objective({"type": "mse"}, graph, noise)


@pytest.mark.parametrize(
    ("states", "graph", "name", "padded"),
    [
        (50258, {"type": "absorb"}, "gpt2", False),
        (50258, {"type": "uniform"}, "gpt2", True),
        (50257, {"type": "uniform"}, "gpt2", False),
        (50259, {"type": "absorb"}, "gpt2", True),
        (30523, {"type": "absorb"}, "bert-base-uncased", False),
        (30522, {"type": "absorb", "mask_id": 103}, "bert-base-uncased", False),
        (28996, {"type": "absorb", "mask_id": 103}, "bert-base-cased", False),
        (28997, {}, "bert-base-cased", False),
    ],
)
def test_a_published_tokenizer_by_the_size_of_its_vocabulary(states, graph, name, padded, monkeypatch):
    added: list[Any] = []
    monkeypatch.setattr(
        tokenizers, "load_tokenizer", lambda name: SimpleNamespace(name=name, add_special_tokens=added.append)
    )
    net: Any = SimpleNamespace(num_states=states, sections={"graph": graph} if graph else {})
    source: Any = SimpleNamespace(name="it")
    assert pretrained._tokenizer_by_size(net, source).name == name
    assert added == ([{"pad_token": "[PAD]"}] if padded else [])
    net.num_states = 777
    with pytest.raises(ValueError, match=r"it has no tokenizer.json and 77[67] tokens, which is none of gpt2's 50257,"):
        pretrained._tokenizer_by_size(net, source)


def test_a_model_s_sections_are_what_load_reads():
    net = SEDD(10, width=16, depth=1, heads=2, cond_dim=8, dropout=0.0, length=8, scale_by_sigma=True)
    told = Model(net, Absorbing(9), LogLinear(), None).sections()
    assert told == {"tokens": 9, "graph": {"type": "absorb", "mask_id": 9}, "noise": {"type": "loglinear", "eps": 1e-3}}
    assert Model(net, Uniform(10), LogLinear(), None).sections()["tokens"] == 10
    with pytest.raises(ValueError, match=r"has 9 states, and the network 10"):
        Model(net, Uniform(9), LogLinear(), None).sections()


def test_a_mask_is_the_tokenizer_s_where_nothing_else_is_said():
    def taken(net: Any, tokenizer: Any) -> Any:
        pretrained._take_mask_of(tokenizer, net)
        return net.mask_id, net.sections["graph"].get("mask_id")

    def net(**graph: int) -> Any:
        made = MDLM(10, width=16, depth=1, heads=2, cond_dim=8, dropout=0.0, length=8)
        made.sections["graph"] = {"type": "absorb"} | graph
        return made

    assert taken(net(), words(10, mask=3)) == (3, 3)
    assert taken(net(mask_id=9), words(10, mask=3)) == (9, 9)
    assert taken(net(), words(9)) == (9, None)
    assert taken(net(), words(9, mask=3)) == (9, None)  # whose states are not all of its tokens


# What samples begin from


SIZES: dict[str, Any] = {"width": 16, "depth": 1, "heads": 2, "cond_dim": 8, "dropout": 0.0, "length": 12}


@pytest.fixture(scope="module")
def write() -> Pipeline:
    torch.manual_seed(0)
    net = SEDD(28, **SIZES, scale_by_sigma=True)
    return pipelines.pipeline(Model(net.train(), Absorbing(27), LogLinear(), character_tokenizer()), device="cpu")


def test_a_canvas_holds_what_is_given(write):
    assert not write.model.net.training
    found = write.canvas(2, prefix="ab", suffix="c", length=6)
    assert found.x.tolist() == [[1, 2, 0, 0, 0, 3]] * 2
    assert found.given.tolist() == [[True, True, False, False, False, True]] * 2
    assert found.lengths == [6, 6]
    assert write.canvas(text="a_c").x.tolist() == [[1, 0, 3]]
    assert write.canvas(1).lengths == [12]
    for length in (1, 12):
        assert write.canvas(length=length).lengths == [length]
    for length in (0, 13):
        with pytest.raises(ValueError, match=f"length must be 1 to 12, what this model takes; got {length}"):
            write.canvas(length=length)
    with pytest.raises(ValueError, match="num must be at least 1, got 0"):
        write.canvas(0)
    with pytest.raises(ValueError, match="a text with blanks is as long as it is: leave out length"):
        write.canvas(text="a_", length=2)


def test_lengths_are_drawn_each_by_its_seed(write, monkeypatch):
    law = [0, 0, 3, 0, 1, 0, 0, 0, 0, 0, 0, 2]
    asked: list[Any] = []
    draw = vars(pipelines)["draw_lengths"]

    def noted(possible: Tensor, seeds: Any) -> Tensor:
        asked.append((possible.tolist(), list(seeds)))
        found: Tensor = draw(possible, seeds)
        return found

    monkeypatch.setattr(pipelines, "draw_lengths", noted)
    monkeypatch.setitem(write.model.net.sections, "lengths", law)
    found = write.canvas(5, 7, prefix="abc")
    assert asked == [([0.0] * 4 + [1.0] + [0.0] * 6 + [2.0], [7, 8, 9, 10, 11])]  # longer than the prompt
    assert set(found.lengths) <= {5, 12}
    width = max(found.lengths)
    assert found.x.shape == (5, width)
    for row, given, length in zip(found.x.tolist(), found.given.tolist(), found.lengths, strict=True):
        assert row == [1, 2, 3, *[0] * (width - 3)]
        assert given == [*[True] * 3, *[False] * (length - 3), *[True] * (width - length)]
    assert write.canvas(2, prefix="abc", length=9).lengths == [9, 9]
    monkeypatch.setitem(write.model.net.sections, "lengths", law[:5])
    assert write.canvas(2, prefix="abcd").lengths == [5, 5]
    with pytest.raises(
        ValueError, match="the prompt has 5 tokens, and no text that this model was trained on is longer"
    ):
        write.canvas(2, prefix="abcde")


def test_states_are_drawn_as_told(write, monkeypatch):
    asked: list[Any] = []

    def trajectory(score, graph, noise, **how):
        asked.append((score, graph, noise, how))
        return iter(())

    monkeypatch.setattr(pipelines, "trajectory", trajectory)
    canvas = write.canvas(3, length=4)
    assert list(write.states(canvas)) == []
    score, graph, noise, how = asked[-1]
    assert (score, graph, noise) == tuple(write.model)[:3]
    assert (how["x"] is canvas.x, how["given"] is canvas.given, how["conditioning"] is clamped) == (True, True, True)
    assert (how["steps"], type(how["method"]), list(how["seeds"])) == (128, Tweedie, [0, 1, 2])
    method = Unmasking()
    list(write.states(canvas, seed=5, steps=7, method=method))
    assert (asked[-1][3]["steps"], asked[-1][3]["method"], list(asked[-1][3]["seeds"])) == (7, method, [5, 6, 7])
    list(write.states(canvas, temperature=0.5))
    assert asked[-1][0] is not write.model.net
    uneven = Canvas(canvas.x, canvas.given, [2, 4, 3])
    list(write.states(uneven))
    assert asked[-1][0] is not write.model.net  # which is told the lengths
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        list(write.states(canvas, steps=0))


def test_controls_are_those_asked_for_and_no_others():
    assert list(controls_of(1.0, None, 1.0)) == []
    assert [
        len(controls_of(*given)) for given in [(0.5, None, 1.0), (1.0, 1, 1.0), (1.0, None, 0.5), (2.0, 3, 0.5)]
    ] == [*(1, 1, 1, 3)]
    with pytest.raises(ValueError, match="0"):
        controls_of(1.0, 0, 1.0)


def test_texts_end_where_their_lengths_say(write):
    assert write.texts(torch.tensor([[1, 2, 3], [4, 5, 6]]), [2, 3]) == ["ab", "def"]
    assert write("", num=2, steps=1, length=3) == write("", num=2, steps=1, length=3)
    with pytest.raises(ValueError, match="zip"):
        write.texts(torch.tensor([[1, 2, 3]]), [2, 3])


def test_blanks_swallow_the_space_that_belongs_to_a_word():
    bytes_alone = tokenizers.load_tokenizer("bytes")
    found = prompts.with_blanks(bytes_alone, "a __ b", 9)
    assert found.given.tolist() == [True, False, False, True, True]
    characters = character_tokenizer()
    assert prompts.with_blanks(characters, "a __ b", 9).given.tolist() == [True, True, False, False, True, True]
    with pytest.raises(
        ValueError, match="the text has 6 tokens, blanks included; the model takes sequences of up to 5"
    ):
        prompts.with_blanks(characters, "a __ b", 5)
    found = prompts.around(characters, 4, prefix="ab", suffix="c")
    assert (found.x.tolist(), found.given.tolist()) == ([1, 2, 0, 3], [True, True, False, True])
    told = r"the prompt has 2 \+ 2 tokens \(prefix \+ suffix\) and the sequence 4: no position is left to fill"
    with pytest.raises(ValueError, match=told):
        prompts.around(characters, 4, prefix="ab", suffix="cd")


# Tokens in memory


def test_parts_of_a_text_are_joined_with_their_ends(monkeypatch):
    monkeypatch.setattr("sedd_train.coding.BATCH", 2)
    found = tokenise(["ab", "c", "", "de"], tokenizers.load_tokenizer("characters:abcde"))
    assert found.flat.tolist() == [0, 1, 5, 2, 5, 5, 3, 4, 5]
    assert (found.ends.tolist(), found.characters, found.documents) == ([3, 5, 6, 9], 5, 4)
    assert found.lengths([3, 2, 0], 2).tolist() == [2, 1, 2]
    assert found.counts(4).tolist() == [1, 1, 1, 1]  # of more tokens than there are states
    assert found.counts(7).tolist() == [1, 1, 1, 1, 1, 4, 0]
    with pytest.raises(ValueError, match="there is no text to tokenise"):
        tokenise([""], tokenizers.load_tokenizer("characters:ab"))


def test_tokens_are_counted_in_parts():
    flat = np.zeros((1 << 24) + 3, np.uint8)
    flat[-2:] = 7
    flat[5] = 3
    assert counted(flat).tolist() == [(1 << 24), 0, 0, 1, 0, 0, 0, 2]
    kept = Tokens(flat, np.array([1]), 1, np.array([9, 9]))
    assert kept.counts(3).tolist() == [9, 9, 0]  # what was counted before is believed


# The log and the page


def test_a_log_begins_again_or_goes_on(tmp_path):
    log = loggers.Log(tmp_path / "log.jsonl")
    for step in (1, 2, 3):
        log.write("train", step=step)
    log.write("note")
    loggers.Log(tmp_path / "log.jsonl", 2)
    kept = loggers.read(tmp_path / "log.jsonl")
    assert [line.get("step") for line in kept] == [1, 2, None]  # what has no step is of all of them
    assert loggers.to_json({"a": (1, math.inf)}, indent=1) == '{\n "a": [\n  1,\n  null\n ]\n}'


def test_a_page_shows_the_first_the_middle_and_the_last_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_image", lambda path, description: f"<img {description}>")
    monkeypatch.setattr(plotting, "loss_curve", lambda *given, **how: None)
    (tmp_path / "recipe.toml").write_text("x = 1\n")
    log = loggers.Log(tmp_path / "log.jsonl")
    facts = {"steps": 10, "parameters": 3, "training_tokens": 10, "unigram_entropy": 3.0, "characters_per_token": 1.0}
    log.write("start", step=0, **facts, environment={"first": 1})
    log.write("start", step=4, **facts, environment={"second": 2})
    bare = report.page(tmp_path)
    assert "Samples" not in bare
    assert "Bound on held-out text" not in bare
    for step in (1, 2, 3, 4, 5):
        log.write(
            "valid", step=step, sample=f"text {step}", nats_per_token=1.0, standard_error=0.1, perplexity=2.0,
            bits_per_character=1.0,
        )  # fmt: skip
    log.write("diagnosis", step=5, text="a < b")
    page = report.page(tmp_path)
    assert [step for step in range(1, 6) if f"<p>Step {step}<pre>text {step}</pre>" in page] == [1, 3, 5]
    assert "second" in page
    assert "first" not in page.split("Environment")[1]
    assert "<p class=bad>Stopped: <pre>a &lt; b</pre>" in page
    assert page.startswith("<!doctype html><html lang=en><meta charset=utf-8>")
    assert f"<title>{tmp_path.resolve().name}</title>" in page
    (tmp_path / "recipe.toml").unlink()
    with pytest.raises(ValueError, match=r"holds no run: expected its recipe.toml and a log.jsonl with a start"):
        report.page(tmp_path)


def test_a_summary_s_numbers_are_the_last_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "page", lambda run: "page")
    drawn: list[Any] = []
    monkeypatch.setattr(plotting, "loss_curve", lambda log, path, **how: drawn.append((log, path, how)))
    log = loggers.Log(tmp_path / "log.jsonl")
    for step, nats in ((1, 3.0), (2, 2.0)):
        log.write("valid", step=step, nats_per_token=nats, perplexity=nats + 1, bits_per_character=nats + 2)
    said = report.write(tmp_path, title="it", unigram_entropy=2 * math.log(2), characters_per_token=4.0, steps=9)
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        **{"steps": 9, "nats_per_token": 2.0, "perplexity": 3.0, "bits_per_character": 4.0},
        "unigram_bits_per_character": 0.5,
    }
    how = {"title": "it", "unigram_entropy": 2 * math.log(2), "characters_per_token": 4.0}
    assert drawn == [(tmp_path / "log.jsonl", tmp_path / "loss.png", how)]
    assert "unigram entropy         0.500 bits a character  (1.386 nats a token)" in said
    assert not (tmp_path / "levels.png").exists()  # of another objective there are none
