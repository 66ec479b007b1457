"""An objective's parts: what its losses and bounds are handed, with which numbers, and what is not finite passed on."""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sedd_graphs import Absorbing, LogLinear, Uniform
from sedd_nets import SEDD, Causal
from sedd_nets.layers import Block
from sedd_objectives import autoregressive_loss, denoising_loss
from sedd_samplers import Ancestral
from sedd_train import TrainingError, checkpoint, engine, objectives, randomness, recipes, report, starting, training
from sedd_train.loading import Batches
from sedd_train.objectives import D3PM, Autoregressive, ScoreEntropy, has_head
from sedd_train.text8 import character_tokenizer
from sedd_train.tokens import Tokens, inside
from torch import Tensor, nn

GRAPH, NOISE = Absorbing(5), LogLinear()
SIZES: dict[str, Any] = {"width": 8, "depth": 1, "heads": 2, "dropout": 0.0, "length": 4}
X0 = torch.tensor([[0, 1, 2, 3], [4, 3, 2, 1]])
T = torch.tensor([0.4, 0.8])


class Scores(nn.Module):
    """A score model of which nothing else is known; what it gives is not finite where told."""

    def __init__(self, states: int = 6, worth: float = 0.0) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.linspace(-1, 1, states * states).reshape(states, states))
        self.worth = worth

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        out = self.table[x] - sigma[:, None, None]
        return out + torch.where(torch.arange(len(x))[:, None, None] == 1, self.worth, 0.0)


def test_a_score_model_s_loss_is_the_plain_one():
    xt, t = ScoreEntropy(GRAPH, NOISE).noised(X0, T, 0, 0, range(2))
    net = Scores()
    total, each = ScoreEntropy(GRAPH, NOISE).losses(net, X0, xt, t)
    wanted = denoising_loss(net, GRAPH, NOISE, X0, T, xt=xt)
    torch.testing.assert_close(each, wanted.detach())
    torch.testing.assert_close(total, wanted.sum())
    assert not each.requires_grad
    assert total.requires_grad


@pytest.mark.parametrize("kind", ["score entropy", "d3pm", "autoregressive"])
def test_a_loss_that_is_nan_is_handed_on_and_the_others_are_as_they_were(kind):
    """It must not raise: on one of several ranks the others would wait. What is measured raises."""
    objective: Any = {
        "score entropy": ScoreEntropy(GRAPH, NOISE),
        "d3pm": D3PM(GRAPH, NOISE, 10),
        "autoregressive": Autoregressive(5),
    }[kind]
    xt = torch.full_like(X0, 5)
    made: Any = Scores()
    spoilt: Any = Scores(worth=math.nan)
    if kind == "autoregressive":
        made.num_states = spoilt.num_states = 6
        made.forward = lambda x, **_: made.table[x]
        spoilt.forward = lambda x, **_: spoilt.table[x] + torch.tensor([0.0, math.nan])[:, None, None]
    _, whole = objective.losses(made, X0, xt, T)
    total, each = objective.losses(spoilt, X0, xt, T)
    torch.testing.assert_close(each[0], whole[0])
    assert each[1].isnan()
    assert total.isnan()
    with pytest.raises(ValueError, match="NaN"):
        objective.bound(spoilt, X0, num_times=2, generator=torch.Generator().manual_seed(0))


def test_who_has_a_head_is_told_of_documents_and_dropout():
    net = SEDD(6, **SIZES, cond_dim=4, scale_by_sigma=True)
    assert has_head(net)
    assert not has_head(Scores())
    assert not has_head(SimpleNamespace(hidden=1))
    assert not has_head(SimpleNamespace(head=1))
    assert objectives._within(net, None, X0) is net
    assert objectives._within(Scores(), torch.tensor([1, 2]), X0, dropout_seeds=T).__class__ is Scores
    lengths = torch.tensor([2, 4])
    told = objectives._within(net, lengths, X0, dropout_seeds=T)
    assert (told.func, set(told.keywords)) == (net, {"documents", "dropout_seeds"})
    assert told.keywords["dropout_seeds"] is T
    assert set(objectives._within(net, lengths, X0, dropout_seeds=None).keywords) == {"documents"}
    assert set(objectives._within(net, None, X0, dropout_seeds=T).keywords) == {"dropout_seeds"}
    assert objectives._documents(None, X0) is None
    assert objectives._inside(None, X0) is None
    weight = objectives._inside(lengths, X0)
    assert weight is not None
    assert weight.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("lengths", [None, torch.tensor([2, 4])])
def test_bounds_are_of_the_process_the_times_and_the_weights_told(lengths, monkeypatch):
    asked: dict[str, Any] = {}

    def noted(name):
        def bound(net, graph, noise, x0, **how):
            asked[name] = (net, graph, noise, x0, how)
            return SimpleNamespace(value=torch.ones(2))

        return bound

    monkeypatch.setattr(objectives, "likelihood_bound", noted("likelihood"))
    monkeypatch.setattr(objectives, "d3pm_bound", noted("d3pm"))
    net, generator = Scores(), torch.Generator()
    for name, objective in (("likelihood", ScoreEntropy(GRAPH, NOISE)), ("d3pm", D3PM(GRAPH, NOISE, 7))):
        assert objective.bound(net, X0, num_times=3, generator=generator, lengths=lengths).tolist() == [1, 1]
        *given, how = asked[name]
        assert all(one is other for one, other in zip(given, (net, GRAPH, NOISE, X0), strict=True))
        weight = how.pop("weight")
        assert (weight is None) if lengths is None else torch.equal(weight, inside(lengths, 4))
        assert how == {"num_times": 3, "generator": generator} | ({"num_steps": 7} if name == "d3pm" else {})
    causal = Causal(6, **SIZES).eval()
    found = Autoregressive(5).bound(causal, X0, num_times=1, generator=generator, lengths=lengths)
    weight = None if lengths is None else inside(lengths, 4)
    torch.testing.assert_close(found, autoregressive_loss(causal, X0, start=5, weight=weight))


def test_samples_are_drawn_as_told(monkeypatch):
    asked: list[Any] = []

    def sample(net, graph, noise, **how):
        asked.append((net, graph, noise, how))
        return torch.zeros(how["shape"])

    monkeypatch.setattr(objectives, "sample", sample)
    monkeypatch.setattr(objectives, "from_logits", lambda net, graph: ("logits", net, graph))
    net, generator = Scores(), torch.Generator()
    how: dict[str, Any] = {"steps": 3, "generator": generator, "device": "cpu"}
    assert ScoreEntropy(GRAPH, NOISE).sample(net, (2, 3), **how).shape == (2, 3)
    assert asked[-1] == (net, GRAPH, NOISE, how | {"shape": (2, 3)})
    D3PM(GRAPH, NOISE).sample(net, (2, 3), **how)
    *given, told = asked[-1]
    assert given == [("logits", net, GRAPH), GRAPH, NOISE]
    assert isinstance(told.pop("method"), Ancestral)
    assert told == how | {"shape": (2, 3)}
    assert D3PM(GRAPH, NOISE).num_steps == 1000


def test_d3pm_s_loss_is_of_the_step_that_its_time_names(monkeypatch):
    asked: list[Any] = []

    def loss(model, graph, noise, x0, number, **how):
        asked.append((number.tolist(), how))
        return torch.tensor([1.0, 2.0], requires_grad=True)

    monkeypatch.setattr(objectives, "d3pm_loss", loss)
    xt = torch.full_like(X0, 5)
    total, each = D3PM(GRAPH, NOISE, 10).losses(Scores(), X0, xt, torch.tensor([0.1, 1.0]))
    assert (float(total.detach()), each.tolist(), each.requires_grad) == (3.0, [1.0, 2.0], False)
    assert asked == [([1, 10], {"num_steps": 10, "xt": xt, "weight": None, "refuse_nan": False})]


def test_where_a_loss_can_be_anything_but_0():
    xt = torch.tensor([[5, 1, 5, 3], [5, 5, 2, 5]])
    found = ScoreEntropy(GRAPH, NOISE)
    assert found.positions(xt).tolist() == [0, 2, 4, 5, 7]
    assert found.positions(xt, torch.tensor([1, 2])).tolist() == [0, 4, 5]
    assert ScoreEntropy(Uniform(6), NOISE).positions(xt).tolist() == list(range(8))


def test_no_token_is_the_state_before_the_first_one():
    control = Autoregressive(start=2).only_tokens(4, 3)
    p = torch.full((2, 3, 4), 0.25)
    zero = torch.zeros(2, 3, dtype=torch.int64)
    found = control(p.flatten(0, 1), zero.flatten(), torch.arange(3).repeat(2))
    assert (found[:, 2] == 0).all()
    assert (found[:, [0, 1, 3]] > 0).all()


# The run's end


def test_a_finished_run_leaves_its_model_and_its_numbers(tmp_path, monkeypatch):
    done: dict[str, Any] = {}
    said: list[str] = []
    monkeypatch.setattr(checkpoint, "export", lambda *given: done.update(export=given))
    monkeypatch.setattr(checkpoint, "best", lambda folder: folder / "step-00000003")

    def write(output, **how):
        done["report"] = (output, how)
        return "lines"

    monkeypatch.setattr(report, "write", write)
    monkeypatch.setattr(training, "say", said.append)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    text: Any = SimpleNamespace(valid=Tokens(np.array([0, 1]), np.array([2]), 6), tokenizer="tokenizer")
    recipe = recipes.override(recipes.Recipe(), {"steps": 7})
    ema: Any = SimpleNamespace(gather=lambda keep: "average" if keep is None else "")
    given: Any = (tmp_path, "net", ema, text, recipe, {"a": 1}, 1_250_000)
    training._finish(*given)
    assert done["export"] == (tmp_path / "export", "net", "average", "tokenizer", {"a": 1})
    how = {"unigram_entropy": pytest.approx(math.log(2)), "characters_per_token": 3.0, "steps": 7}
    assert done["report"] == (tmp_path, {"title": f"{tmp_path.name}: 1.2 M parameters, absorb"} | how)
    assert said == [
        f"lines\ncheckpoints             {tmp_path / 'checkpoints'}, the best of them step-00000003\n"
        f"trained model           {tmp_path / 'export'}"
    ]
    monkeypatch.setenv("RANK", "1")
    done.clear()
    training._finish(*given)
    assert done == {}
    monkeypatch.setenv("RANK", "0")

    def full(*given):
        raise OSError("the disk is full")

    monkeypatch.setattr(checkpoint, "export", full)
    told = r"the disk is full; the model is safe in the last checkpoint in .*checkpoints"
    with pytest.raises(TrainingError, match=told):
        training._finish(*given)


def test_a_checkpoint_is_asked_for_with_all_that_a_run_needs(tmp_path, monkeypatch):
    asked: list[Any] = []

    def save(*given, **how):
        asked.append((given, how))
        if len(asked) > 1:
            raise checkpoint.CheckpointError("full")

    monkeypatch.setattr(checkpoint, "save", save)
    recipe = recipes.override(recipes.Recipe(), {"keep": 3, "keep_every": 5})
    text: Any = SimpleNamespace(tokenizer="tokenizer", fingerprint="abc")
    given: Any = (tmp_path, "engine", "ema", text, recipe, {"a": 1}, 9, 1.5)
    training._save(*given)
    assert asked == [
        (
            (tmp_path / "checkpoints", "engine", "ema", "tokenizer"),
            {"step": 9, "sections": {"a": 1}, "keep": 3, "bound": 1.5, "keep_every": 5, "fingerprint": "abc"}
            | {"recipe": dataclasses.asdict(recipe)},
        )
    ]
    with pytest.raises(TrainingError, match=r"^full$"):
        training._save(*given)


def test_a_batch_s_parts_are_of_one_and_the_same_samples():
    tokens = Tokens(np.arange(40, dtype=np.uint16) % 5, np.array([13, 40]), 40)
    recipe = recipes.override(recipes.Recipe(), {"length": 4, "batch_size": 6, "micro_batch_size": 3, "seed": 5})
    made = Batches(tokens, recipe, ScoreEntropy(GRAPH, NOISE), 0, 2, None)
    ((x0, xt, t, seeds, *_),) = made.make(2)
    numbers = made.samples(2)
    assert numbers == [12, 14, 16]
    at = made.where(numbers)
    assert torch.equal(x0, tokens.at(at, 4))
    assert torch.equal(t, randomness.times(5, 2, [0, 2, 4], 6))
    assert torch.equal(seeds, randomness.dropout_seeds(5, 2, [0, 2, 4]))
    assert torch.equal(xt, randomness.noised(GRAPH, x0, NOISE(t)[0], 5, 2, [0, 2, 4]))


def test_what_is_compiled_is_each_block_or_the_whole(monkeypatch):
    done: list[Any] = []
    plain: Any = SimpleNamespace(compile=lambda: done.append("whole"))
    engine.compile_network(plain, 3)
    net = SEDD(6, **SIZES, cond_dim=4, scale_by_sigma=True)
    monkeypatch.setattr(SEDD, "compile_blocks", lambda self: done.append("blocks"))
    monkeypatch.setattr("deepspeed.utils.set_z3_leaf_modules", lambda model, kinds: done.append(kinds))
    for stage in (1, 3):
        engine.compile_network(net, stage)
    assert done == ["whole", "blocks", "blocks", [Block]]


def test_config_json_is_what_is_read_back(tmp_path):
    objective, sections = starting.objective_of(recipes.Recipe(), GRAPH, NOISE, None)
    net = SEDD(6, **SIZES, cond_dim=4, scale_by_sigma=True)
    net.save_pretrained(tmp_path, sections=sections)
    kept = json.loads((tmp_path / "config.json").read_text())
    assert {name: kept[name] for name in sections} == sections
    assert objective == ScoreEntropy(GRAPH, NOISE)
    assert len(character_tokenizer()) == 27
