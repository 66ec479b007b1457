"""What a run is made of: its recipe by what is given, its network by the seed, what it takes from a checkpoint."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sedd_graphs import Absorbing, Cosine, Dense, Geometric, Hybrid, LogLinear, Ordinal, Polynomial, Uniform
from sedd_nets import MDLM, RADD, SEDD, UDLM, Causal
from sedd_train import adapters, finetuning, pretrained, recipes, starting
from sedd_train.objectives import D3PM, Autoregressive, ScoreEntropy
from sedd_train.pretrained import Trained
from sedd_train.text8 import character_tokenizer
from sedd_train.tokenizers import identity
from sedd_train.tokens import Tokens
from torch import nn

RECIPE = recipes.Recipe()
SIZES: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2, "length": 24, "dropout": 0.0}
SMALL = recipes.override(RECIPE, SIZES | {"cond_dim": 8, "dropout": 0.25})


# The recipe


def recipe_of(given: Any = RECIPE, **what: Any) -> recipes.Recipe:
    return starting.recipe_of(given, *(what.get(name) for name in ("corpus", "tokenizer", "graph", "noise", "init")))


def test_what_is_given_stands_in_the_recipe_by_its_name_or_its_content():
    assert recipe_of() is RECIPE
    assert recipe_of("tiny") == recipes.read_recipe("tiny")
    assert recipe_of(corpus="here").corpus == "here"
    assert recipe_of(corpus=SimpleNamespace(identity="content")).corpus == "content"
    tokenizer = character_tokenizer()
    assert recipe_of(tokenizer="dna").tokenizer == "dna"
    assert recipe_of(tokenizer=tokenizer).tokenizer == identity(tokenizer)
    assert recipe_of(corpus="", tokenizer="") == dataclasses.replace(RECIPE, corpus="", tokenizer="")
    begun = recipe_of(init="runs/other")
    assert (begun.init, begun.tokenizer) == ("runs/other", "")  # whose tokenizer it is
    with pytest.raises(ValueError, match="width = 0"):
        recipe_of(dataclasses.replace(RECIPE, width=0))


@pytest.mark.parametrize(
    ("graph", "word", "scaled"),
    [
        (Absorbing(9, mask_id=3), "absorb:mask_id=3", True),
        (Uniform(9), "uniform", False),
        (Hybrid(9, uniform_rate=0.5, mask_rate=2.0), "hybrid:uniform_rate=0.5,mask_rate=2.0,mask_id=9", True),
        (Ordinal(9), "ordinal", False),
        (Dense(torch.zeros(3, 3)), "own:Dense(Q of 3 states)", False),
    ],
    ids=repr,
)
def test_a_graph_given_decides_the_scaling(graph, word, scaled):
    found = recipe_of(graph=graph)
    assert (found.graph, found.scale_by_sigma) == (word, scaled)
    assert recipe_of(graph=graph, init="runs/other").graph == "absorb"  # where it says what the checkpoint cannot


def test_a_schedule_given_stands_in_the_recipe():
    assert recipe_of(noise=Polynomial(3.0, 1e-4)).noise == "polynomial:power=3.0,eps=0.0001"
    assert recipe_of(noise=Geometric(1e-3, 7.0)).noise == "geometric:sigma_min=0.001,sigma_max=7.0"
    assert recipe_of(noise=Cosine(), init="runs/other").noise == "loglinear"


def test_loggers_that_are_not_there_are_refused(monkeypatch):
    monkeypatch.setattr(starting, "find_spec", lambda name: None)
    starting.check_loggers("", 0.0)
    starting.check_loggers("", 2.5)
    with pytest.raises(
        ValueError, match=r"--wandb mine needs the package of that name: pip install 'sedd-train\[wandb\]'"
    ):
        starting.check_loggers("mine", 0.0)
    with pytest.raises(ValueError, match=r"--peak-tflops -1.0: expected a positive number"):
        starting.check_loggers("", -1.0)
    monkeypatch.setattr(starting, "find_spec", lambda name: name == "wandb")
    starting.check_loggers("mine", 0.0)


def test_rows_that_are_filled_up_need_a_network_that_knows_documents():
    padded = dataclasses.replace(RECIPE, packing=False)
    for net in (None, SEDD(9, cond_dim=8, scale_by_sigma=True, **SIZES)):
        starting.check_own(net, padded)
    starting.check_own(nn.Linear(1, 1), RECIPE)
    with pytest.raises(ValueError, match=r"packing = False: .*; Linear has none: train it with packing"):
        starting.check_own(nn.Linear(1, 1), padded)
    muon = dataclasses.replace(RECIPE, optimizer="muon", zero_stage=0)
    for net in (None, SEDD(9, cond_dim=8, scale_by_sigma=True, **SIZES)):
        starting.check_own(net, muon)
    with pytest.raises(ValueError, match=r"of Linear are like them is not known: train it by adamw"):
        starting.check_own(nn.Linear(1, 1), muon)


# The network


@pytest.mark.parametrize(
    ("name", "kind", "more"),
    [
        ("sedd", SEDD, {"scale_by_sigma": True, "cond_dim": 8}),
        ("radd", RADD, {}),
        ("mdlm", MDLM, {"cond_dim": 8}),
        ("udlm", UDLM, {"cond_dim": 8}),
        ("causal", Causal, {}),
    ],
)
def test_a_network_of_the_recipe_s_kind_and_sizes(name, kind, more):
    values: dict[str, Any] = {"network": name}
    values |= {"graph": "uniform", "scale_by_sigma": False} if name == "udlm" else {}
    values |= {"objective": "autoregressive"} if name == "causal" else {}
    net: Any = pretrained.make_net(recipes.override(SMALL, values), 12)
    assert type(net) is kind
    sizes = {"num_states": 12, "width": 16, "depth": 2, "heads": 2, "length": 24, "dropout": 0.25}
    assert {size: getattr(net, size) for size in sizes | more} == sizes | more
    assert not pretrained.make_net(dataclasses.replace(SMALL, scale_by_sigma=False), 12).scale_by_sigma  # type: ignore[union-attr]


def test_a_fresh_network_is_its_seed_s_and_disturbs_no_other_random_numbers():
    recipe = dataclasses.replace(SMALL, activation_checkpointing=True)
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    one, same = (starting.new_net(recipe, 12, None, fresh=True) for _ in range(2))  # type: ignore[arg-type]
    assert torch.equal(torch.rand(3), wanted)
    other = starting.new_net(dataclasses.replace(SMALL, seed=1), 12, None, fresh=True)  # type: ignore[arg-type]
    weights, again, others = (net.state_dict() for net in (one, same, other))
    assert all(torch.equal(again[name], value) for name, value in weights.items())
    assert not torch.equal(others["vocab_embed.embedding"], weights["vocab_embed.embedding"])
    assert [vars(net)["checkpoint_activations"] for net in (one, other)] == [True, False]


def test_a_network_begins_with_the_text_s_frequencies_where_that_is_asked_and_it_is_new():
    recipe = dataclasses.replace(SMALL, informed_start=True)
    tokens = Tokens(np.array([0, 0, 0, 1, 5, 5], np.uint16), np.array([6]), 6)
    text: Any = SimpleNamespace(train=tokens)
    told, going_on = (starting.new_net(recipe, 12, text, fresh=fresh) for fresh in (True, False))
    plain = starting.new_net(SMALL, 12, text, fresh=True)
    bias, without, later = (net.state_dict()["output_layer.linear.bias"] for net in (told, plain, going_on))
    assert torch.equal(without, later)
    assert torch.equal(without, torch.zeros(12))
    assert float(bias[0] - bias[5]) == pytest.approx(np.log(3.5 / 2.5))  # half a time more each
    assert float(bias[0]) > float(bias[5]) > float(bias[1]) > float(bias[2])
    attention = [net.state_dict()["blocks.0.attn_qkv.weight"] for net in (told, plain)]
    assert not torch.equal(*attention)


def test_an_objective_is_the_recipe_s_or_the_checkpoint_s():
    graph, noise = Absorbing(11), LogLinear()
    objective, sections = starting.objective_of(RECIPE, graph, noise, None)
    assert objective == ScoreEntropy(graph, noise)
    assert sections["objective"] == {"type": "score-entropy"}
    assert sections["tokens"] == 11
    assert sections["noise"] == {"type": "loglinear", "eps": 1e-3, "sigma_min": 1e-4, "sigma_max": 20.0}
    d3pm = dataclasses.replace(RECIPE, objective="d3pm", d3pm_steps=7)
    objective, sections = starting.objective_of(d3pm, graph, noise, None)
    assert objective == D3PM(graph, noise, 7)
    assert sections["objective"] == {"type": "d3pm", "steps": 7}
    assert starting.objective_of(
        dataclasses.replace(RECIPE, objective="autoregressive", network="causal"), graph, noise, None
    )[0] == Autoregressive(start=11)

    theirs = Uniform(12)
    net: Any = SimpleNamespace(sections={"kept": 1, "graph": "old"})
    start = Trained(net, ScoreEntropy(theirs, noise), None)
    objective, sections = starting.objective_of(dataclasses.replace(RECIPE, init="there"), graph, noise, start)
    assert objective is start.objective
    assert (sections["kept"], sections["init"], sections["graph"]) == (1, "there", {"type": "uniform"})
    start = Trained(net, Autoregressive(start=3), None)
    _, sections = starting.objective_of(dataclasses.replace(RECIPE, init="there"), graph, noise, start)
    assert sections == {"kept": 1, "graph": "old", "init": "there"}


def test_a_network_of_one_s_own_is_tried_on_the_first_sample():
    asked: list[Any] = []

    class Asked:
        def losses(self, net, x0, xt, t, **more):
            asked.append((x0.tolist(), xt.tolist(), t.tolist(), {name: value.tolist() for name, value in more.items()}))
            assert not torch.is_grad_enabled()
            torch.rand(1)

    batch = torch.arange(6).reshape(2, 3), torch.ones(2, 3), torch.tensor([0.5, 1.0]), torch.tensor([8, 9])
    net: Any = nn.Linear(1, 1)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    starting.check_net(net, Asked(), SimpleNamespace(make=lambda step: [batch, None]))  # type: ignore[arg-type]
    starting.check_net(net, Asked(), SimpleNamespace(make=lambda step: [(*batch, torch.tensor([2, 3]))]))  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), before)
    plain = ([[0, 1, 2]], [[1.0] * 3], [0.5], {"dropout_seeds": [8]})
    assert asked == [plain, (*plain[:3], {"dropout_seeds": [8], "lengths": [2]})]


# From a checkpoint


def test_a_name_on_the_hub_may_say_its_revision(tmp_path):
    assert finetuning._where("me/model") == ("me/model", {})
    assert finetuning._where("me/model@v1") == ("me/model", {"revision": "v1"})
    (tmp_path / "run@home").mkdir()
    assert finetuning._where(str(tmp_path / "run@home")) == (str(tmp_path / "run@home"), {})


@pytest.mark.parametrize(
    ("net", "objective", "values"),
    [
        (
            SEDD(28, **SIZES, cond_dim=8, scale_by_sigma=True),
            ScoreEntropy(Absorbing(27), Cosine(1e-4)),
            {"network": "sedd", "graph": "absorb:mask_id=27", "noise": "cosine:eps=0.0001", "cond_dim": 8},
        ),
        (
            SEDD(27, **SIZES, cond_dim=8, scale_by_sigma=False),
            D3PM(Uniform(27), LogLinear(), 50),
            {"network": "sedd", "graph": "uniform", "objective": "d3pm", "d3pm_steps": 50, "scale_by_sigma": False},
        ),
        (
            RADD(28, **SIZES),
            ScoreEntropy(Absorbing(27), LogLinear()),
            {"network": "radd", "cond_dim": 128, "scale_by_sigma": False},  # it has none: the recipe's stays
        ),
        (MDLM(28, **SIZES, cond_dim=8), ScoreEntropy(Absorbing(27), LogLinear()), {"network": "mdlm"}),
        (
            UDLM(27, **SIZES, cond_dim=8),
            ScoreEntropy(Uniform(27), LogLinear()),
            {"network": "udlm", "graph": "uniform"},
        ),
        (
            Causal(28, **SIZES),
            Autoregressive(27),
            {"network": "causal", "objective": "autoregressive", "graph": "absorb"},
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_recipe_adopts_what_the_checkpoint_says(net, objective, values):
    asked = dataclasses.replace(
        RECIPE, init="there", tokenizer="", length=0, informed_start=True, width=7, graph="uniform"
    )
    coder = character_tokenizer()
    found = finetuning.adopted(asked, Trained(net, objective, coder))
    sizes = {"width": 16, "depth": 2, "heads": 2, "length": 24, "tokenizer": identity(coder)}
    sizes |= {"informed_start": isinstance(objective, ScoreEntropy) and isinstance(objective.graph, Absorbing)}
    kinds = {"objective": "score-entropy"} | values
    assert {name: getattr(found, name) for name in sizes | kinds} == sizes | kinds
    told = dataclasses.replace(asked, tokenizer="dna", length=40)
    found = finetuning.adopted(told, Trained(net, objective, coder))
    assert (found.tokenizer, found.length, found.init, found.steps) == ("dna", 40, "there", RECIPE.steps)


def test_a_network_is_prepared_as_the_recipe_says():
    net: Any = SEDD(28, **SIZES, cond_dim=8, scale_by_sigma=True).eval()
    recipe = dataclasses.replace(SMALL, length=9, dropout=0.5, activation_checkpointing=True)
    assert finetuning.prepared(net, recipe) is net
    assert (net.training, net.length, net.dropout, net.checkpoint_activations) == (True, 9, 0.5, True)
    assert [block.dropout for block in net.blocks] == [0.5, 0.5]
    assert all(p.requires_grad for p in net.parameters())
    finetuning.prepared(net, dataclasses.replace(recipe, train_layers=" blocks.1.* ,output_layer.linear.bias"))
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    wanted = {name for name, _ in net.named_parameters() if name.startswith("blocks.1.")}
    assert trained == wanted | {"output_layer.linear.bias"}
    with pytest.raises(
        ValueError, match=r"train_layers: 'nothing' fits no weight; they begin with blocks\.0, blocks\.1,"
    ):
        finetuning.prepared(net, dataclasses.replace(recipe, train_layers="blocks.*,nothing"))


def test_adapters_are_two_thin_matrices_of_which_one_is_0():
    pytest.importorskip("peft")

    def net() -> Any:
        torch.manual_seed(0)
        return SEDD(28, **SIZES, cond_dim=8, scale_by_sigma=True)

    one, same, other = net(), net(), net()
    assert not adapters.has_adapters(one)
    before = torch.get_rng_state()
    for each, seed in ((one, 0), (same, 0), (other, 1)):
        adapters.add_adapters(each, rank=3, alpha=6.0, seed=seed)
    assert torch.equal(torch.get_rng_state(), before)
    assert adapters.has_adapters(one)
    weights, again, others = (dict(each.named_parameters()) for each in (one, same, other))
    thin = {name for name, p in weights.items() if p.requires_grad}
    kinds = [f"blocks.{block}.{kind}" for block in (0, 1) for kind in ("attn_qkv", "attn_out", "mlp.0")]
    assert thin == {f"{kind}.lora_{part}.sedd.weight" for kind in kinds for part in "AB"}
    for kind in kinds:
        a, b = (weights[f"{kind}.lora_{part}.sedd.weight"] for part in "AB")
        assert (a.shape, b.shape) == ((3, 16), (weights[f"{kind}.base_layer.weight"].shape[0], 3))
        assert not b.any()
        assert torch.equal(a, again[f"{kind}.lora_A.sedd.weight"])
        assert not torch.equal(a, others[f"{kind}.lora_A.sedd.weight"])
    state = {name: torch.full_like(value, 2.0) for name, value in one.state_dict().items()}
    whole = adapters.merged(one, state)
    assert whole.keys() == net().state_dict().keys()
    assert all(
        (value == (2 + 2 * 3 * 4 if name.removesuffix(".weight") in kinds else 2)).all()
        for name, value in whole.items()
    )
    assert len(state) == len(one.state_dict())  # what was given is as it was


def test_lora_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"lora = 4: this needs the package peft: pip install 'sedd-train\[lora\]'"):
        adapters.add_adapters(nn.Linear(1, 1), rank=4, alpha=1.0, seed=0)
