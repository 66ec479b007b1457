"""The recipes that come with the package, and what a plan says of them."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
import re
import tomllib
from importlib import resources
from typing import Any

import pytest
import torch
from sedd_graphs import Absorbing, LogLinear
from sedd_nets import SEDD
from sedd_train import plan, recipes
from sedd_train.ema import EMA
from sedd_train.engine import Loss, start_engine, train_step
from sedd_train.objectives import ScoreEntropy

PUBLISHED = [name for name in recipes.recipe_names() if name.startswith("sedd-")]


@pytest.mark.parametrize("name", recipes.recipe_names())
def test_every_recipe_is_whole(name):
    recipe = recipes.read_recipe(name)
    text = resources.files("sedd_train").joinpath("recipes", f"{name}.toml").read_text()
    assert set(tomllib.loads(text)) == {"data", "model", "training", "watch"}
    assert recipe.compile is None  # to be decided by the device
    assert recipes.to_toml(recipe).count("\n") == len(recipes.Recipe.__dataclass_fields__) - 1
    assert (recipe.graph, recipe.noise, recipe.scale_by_sigma) in [
        ("absorb", "loglinear", True),
        ("absorb", "polynomial:power=2", True),
        ("uniform", "geometric", False),
    ]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_ones_have_the_published_values(name):
    _, size, graph, corpus = name.split("-")
    recipe = recipes.read_recipe(name)
    assert (recipe.depth, recipe.width, recipe.heads) == {"small": (12, 768, 12), "medium": (24, 1024, 16)}[size]
    assert recipe.graph == graph
    data = {
        "owt": ("openwebtext", "gpt2", 1024),
        "text8": ("text8", "characters", 256),
        "lm1b": ("lm1b", "bert-base-uncased", 128),
    }
    assert (recipe.corpus, recipe.tokenizer, recipe.length) == data[corpus]
    assert recipe.crops == (corpus == "text8")
    values = (recipe.learning_rate, recipe.beta1, recipe.beta2, recipe.eps, recipe.clip, recipe.ema, recipe.warmup)
    assert values == (3e-4, 0.9, 0.999, 1e-8, 1.0, 0.9999, 2500)
    assert (recipe.batch_size, recipe.dropout, recipe.cond_dim, recipe.t_min) == (512, 0.1, 128, 1e-3)
    assert recipe.micro_batches(8) == (16 if size == "medium" else 8)
    if graph == "uniform":
        assert (recipe.sigma_min, recipe.sigma_max) == (1e-4, 20.0)


def test_a_plan(script, small, tmp_path, text, cache):
    options = [*small, "--corpus", text, "--output", tmp_path / "run", "--cache", cache]
    code, printed = script("train_owt.py", *options, "--plan", "2", "--zero-stage", "2")
    assert code == 0
    assert "56,621 parameters" in printed
    assert "step         8 sequences of 32 = 2 ranks x 1 micro-batches x 4; 256 tokens" in printed
    assert "ZeRO 2" in next(line for line in printed.splitlines() if line.endswith("<- this run"))
    assert not (tmp_path / "run").exists()
    code, wrong = script("train_owt.py", *options, "--plan", "3")
    assert code == 2
    assert "cannot be divided over 3 ranks" in wrong


def test_what_is_kept_for_the_backward_pass_grows_with_depth_and_length():
    def new(depth, checkpointed=False):
        net = SEDD(9, width=32, depth=depth, heads=2, cond_dim=8, length=64, dropout=0.0, scale_by_sigma=True)
        net.checkpoint_activations = checkpointed
        return net

    kept = plan.activations(new, 4, 64)
    direct = plan._kept(new(4), 2, 64, "fp32") - plan._kept(new(4), 1, 64, "fp32")
    assert kept == pytest.approx(direct, rel=1e-6)
    assert plan.activations(new, 4, 32) == pytest.approx(kept / 2, rel=0.05)
    assert plan.activations(lambda depth: new(depth, True), 4, 64) < 0.3 * kept
    assert plan.activations(new, 4, 64, precision="bf16") < kept


def live() -> int:
    """Bytes of all tensors there are but those that are frozen."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    tensors += [x.grad for x in tensors if x.is_leaf and x.grad is not None]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


@pytest.mark.filterwarnings("default")  # DeepSpeed's own
def test_memory_is_what_tensors_hold(process, request):
    """On one rank, in every stage, between steps: all but gradients and bucket, which only stage 3 keeps."""
    graph, noise = Absorbing(1000), LogLinear()
    x0 = torch.zeros(1, 8, dtype=torch.int64)
    batch = x0, torch.full((1, 8), 1000), torch.full((1,), 0.5)
    gc.collect()
    gc.freeze()  # a million objects of what is imported are not looked through again and again
    request.addfinalizer(gc.unfreeze)
    for stage in plan.STAGES:
        before = live()
        net, averaged = (
            SEDD(1001, width=128, depth=2, heads=2, cond_dim=16, length=8, dropout=0.0, scale_by_sigma=True)
            for _ in range(2)
        )
        parameters = sum(p.numel() for p in net.parameters())
        engine = start_engine(Loss(net, ScoreEntropy(graph, noise)), batch_size=1, micro_batches=1, stage=stage)
        average = EMA(engine, 0.9)
        train_step(engine, [batch], 1e-3)
        average.update()
        held = plan.memory(parameters, stage, 1)
        expected = sum(held.values()) - (held["gradients"] + held["bucket"] if stage < 3 else 0)
        assert live() - before == pytest.approx(expected, rel=0.05), stage
        del net, averaged, engine, average


def test_ranks_share_what_the_stage_says():
    one, four = (plan.memory(1000, 3, ranks) for ranks in (1, 4))
    shared = {"weights", "gradients", "masters", "moments", "average"}
    assert {name for name in one if four[name] != one[name]} == shared
    assert all(four[name] == one[name] / 4 for name in shared)
    with pytest.raises(ValueError, match="expected a stage of 0 to 3"):
        plan.memory(1, 4, 1)


def test_memory_is_that_of_the_table():
    """1000 parameters on 4 ranks: bytes of weights, gradients, masters, moments, average, averaged network, bucket."""
    assert [list(plan.memory(1000, stage, 4).values()) for stage in plan.STAGES] == [
        [4000, 4000, 0, 8000, 4000, 4000, 0],
        [4000, 4000, 1000, 2000, 1000, 4000, 4000],
        [4000, 1000, 1000, 2000, 1000, 4000, 4000],
        [1000, 1000, 1000, 2000, 1000, 4000, 4000],
    ]
    assert plan.memory(1 << 30, 1, 4)["bucket"] == 4 << 26


@pytest.mark.parametrize("name", ["dropout", "ema", "beta1", "beta2"])
def test_a_decay_or_a_probability_of_dropping_is_below_1(name):
    assert getattr(recipes.override(recipes.Recipe(), {name: 0.0}), name) == 0
    for value in (1.0, -0.1):
        with pytest.raises(ValueError, match=rf"{name} = {value}: expected a number in \[0, 1\)"):
            recipes.override(recipes.Recipe(), {name: value})


# Every value of a recipe, at and beyond its ends

UNIFORM: dict[str, Any] = {"graph": "uniform", "scale_by_sigma": False}
COUNTED = (
    *("width", "depth", "heads", "cond_dim", "steps", "batch_size", "max_skipped", "log_every"),
    *("evaluate_every", "evaluate_blocks", "evaluate_times", "checkpoint_every", "keep", "sample_steps", "d3pm_steps"),
)
REFUSED: list[Any] = [
    *(({name: 0}, f"{name} = 0: expected a positive number") for name in COUNTED),
    *(({name: 0.0}, f"{name} = 0.0: expected a positive number") for name in ("learning_rate", "eps")),
    *(
        ({name: -1}, f"{name} = -1: expected 0 or more")
        for name in ("micro_batch_size", "keep_every", "warmup", "seed")
    ),
    *(({name: -0.5}, f"{name} = -0.5: expected 0 or more") for name in ("clip", "weight_decay")),
    *(({"t_min": value}, f"t_min = {value}: expected a time in (0, 1)") for value in (0.0, 1.0)),
    *(({"decay_to": value}, f"decay_to = {value}: expected a fraction in [0, 1]") for value in (-0.1, 1.1)),
    ({"length": -1}, "length = -1: expected 0 or more"),
    ({"sigma_min": 0.0}, "sigma_min = 0.0: expected in (0, sigma_max = 20.0)"),
    ({"sigma_min": 20.0}, "sigma_min = 20.0: expected in (0, sigma_max = 20.0)"),
    *(({name: math.nan}, f"{name} = nan: expected a finite number") for name in ("learning_rate", "ema", "sigma_max")),
    ({"clip": math.inf}, "clip = inf: expected a finite number"),
    ({"graph": "absorbing"}, "graph = 'absorbing': expected absorb, uniform, ordinal, hybrid, masked"),
    ({"noise": "sine"}, "noise = 'sine': expected loglinear, cosine, polynomial, geometric, linear"),
    ({"precision": "fp8"}, "precision = 'fp8': expected fp32, bf16 or fp16"),
    *(({"zero_stage": stage}, f"zero_stage = {stage}: expected 0, 1, 2 or 3") for stage in (-1, 4)),
    ({"offload": True, "zero_stage": 0}, "offload = True: expected false without ZeRO (zero_stage = 0)"),
    ({"crops": True, "packing": False}, "crops = True: expected false without packing"),
    ({"compile": True, "packing": False}, "compile = True: expected false without packing"),
    ({"attention": "fast"}, "attention = 'fast': expected sdpa, flex, flash, flash-4"),
    ({"attention": "flash"}, "attention = 'flash': expected sdpa or flex with fp32"),
    (
        {"attention": "flex", "network": "causal", "objective": "autoregressive"},
        "attention = 'flex': expected sdpa for causal",
    ),
    ({"deepspeed": {"train_batch_size": 8}}, "[deepspeed] train_batch_size = 8: a recipe says that by batch_size"),
    (
        {"deepspeed": {"optimizer": {"type": "Lamb"}}},
        "says that by optimizer, learning_rate, beta1, beta2, eps and weight_decay",
    ),
    (
        {"deepspeed": {"bf16": {"enabled": True}}},
        "[deepspeed] bf16 = {'enabled': True}: a recipe says that by precision",
    ),
    (
        {"deepspeed": {"zero_optimization": {"overlap_comm": True, "stage": 3}}},
        "[deepspeed] zero_optimization.stage = 3: a recipe says that by zero_stage",
    ),
    (
        {"deepspeed": {"zero_optimization": {"offload_param": {"device": "nvme"}}}},
        "[deepspeed] zero_optimization.offload_param = {'device': 'nvme'}: a recipe says that by offload",
    ),
    ({"deepspeed": {"zero_allow_untested_optimizer": False}}, "the trainer needs it as it is"),
    ({"objective": "mse"}, "objective = 'mse': expected score-entropy, d3pm, autoregressive"),
    ({"network": "gpt"}, "network = 'gpt': expected sedd, radd, mdlm, udlm, causal"),
    ({"network": "causal"}, "network = 'causal': expected causal if and only if autoregressive"),
    ({"objective": "autoregressive"}, "network = 'sedd': expected causal if and only if autoregressive"),
    *((UNIFORM | {"network": net}, f"graph = 'uniform': expected absorb for {net}") for net in ("radd", "mdlm")),
    (UNIFORM | {"informed_start": True}, "informed_start = True: expected false for another graph than absorb"),
    (UNIFORM | {"scale_by_sigma": True}, "scale_by_sigma = True: expected false for the graph uniform"),
    ({"heads": 7}, "width = 768: expected a multiple of heads = 7"),
]
TAKEN: list[Any] = [
    *({name: 1} for name in COUNTED if name not in ("width", "heads")),
    *({name: 0} for name in ("micro_batch_size", "keep_every", "warmup", "seed", "zero_stage")),
    *({name: 0.0} for name in ("clip", "weight_decay", "decay_to", "dropout", "ema", "beta1", "beta2")),
    *({"decay_to": 1.0}, {"zero_stage": 3, "offload": True}, {"packing": False}, {"crops": True}, {"compile": True}),
    *({"network": "radd"}, {"network": "mdlm"}, {"network": "causal", "objective": "autoregressive"}, UNIFORM),
    *({"objective": "d3pm"}, {"informed_start": True}, {"precision": "bf16"}, {"noise": "geometric"}),
    *({"attention": "flex"}, {"attention": "flash-4", "precision": "bf16"}, {"compile": False}),
    *({"deepspeed": {"zero_optimization": {"reduce_bucket_size": 9}}}, {"deepspeed": {"wall_clock_breakdown": True}}),
]


@pytest.mark.parametrize(("values", "told"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_a_value_that_makes_no_sense_is_named_with_what_would(values, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        dataclasses.replace(recipes.Recipe(), **values).check()


def test_a_section_of_deepspeed_is_read_kept_and_written(tmp_path):
    text = """
[training]
compile = true
[deepspeed]
wall_clock_breakdown = true
comms_logger = { enabled = true, prof_ops = ["all_reduce"] }
[deepspeed.zero_optimization]
reduce_bucket_size = 1000
"a b" = 1e-5
"""
    (tmp_path / "mine.toml").write_text(text)
    recipe = recipes.read_recipe(tmp_path / "mine.toml")
    assert recipe.compile is True
    assert recipe.deepspeed == {
        "wall_clock_breakdown": True,
        "comms_logger": {"enabled": True, "prof_ops": ["all_reduce"]},
        "zero_optimization": {"reduce_bucket_size": 1000, "a b": 1e-5},
    }
    (tmp_path / "again.toml").write_text(recipes.to_toml(recipe))
    assert recipes.read_recipe(tmp_path / "again.toml") == recipe
    plain = recipes.to_toml(recipes.Recipe())
    assert "compile" not in plain
    (tmp_path / "plain.toml").write_text(plain)
    assert recipes.read_recipe(tmp_path / "plain.toml") == recipes.Recipe()
    (tmp_path / "mine.toml").write_text("deepspeed = 3")
    with pytest.raises(ValueError, match="deepspeed = 3 should be of type dict"):
        recipes.read_recipe(tmp_path / "mine.toml")


@pytest.mark.parametrize("values", TAKEN, ids=str)
def test_a_value_that_makes_sense_is_taken(values):
    recipe = dataclasses.replace(recipes.Recipe(), **values)
    assert recipe.check() is recipe


def test_a_recipe_that_says_nothing_is_the_papers():
    told = dataclasses.asdict(recipes.Recipe())
    paper = dataclasses.asdict(recipes.read_recipe("sedd-small-absorb-owt"))
    differing = {name for name in told if told[name] != paper[name]}
    assert differing <= {"precision", "corpus", "tokenizer", "length", "crops", "steps", "micro_batch_size"}
    assert told["steps"] == 400_000
    watched = (
        "log_every",
        "evaluate_every",
        "evaluate_blocks",
        "evaluate_times",
        "checkpoint_every",
        "keep",
        "keep_every",
    )
    assert [told[name] for name in watched] == [10, 5000, 256, 16, 5000, 2, 0]
    assert (told["sample_steps"], told["max_skipped"], told["zero_stage"], told["seed"]) == (128, 10, 1, 0)
    assert (told["weight_decay"], told["decay_to"], told["d3pm_steps"], told["micro_batch_size"]) == (0.0, 1.0, 1000, 0)


def test_every_value_is_an_option_of_its_type():
    parser = argparse.ArgumentParser()
    recipes.add_arguments(parser)
    assert vars(parser.parse_args([])) == {}
    for field in dataclasses.fields(recipes.Recipe):
        value, option = field.default, f"--{field.name.replace('_', '-')}"
        if field.name == "deepspeed":  # a section of a file
            with pytest.raises(SystemExit):
                parser.parse_args([option, "x"])
        elif isinstance(value, bool) or field.name == "compile":  # None unless told
            assert vars(parser.parse_args([option])) == {field.name: True}
            assert vars(parser.parse_args([f"--no-{option[2:]}"])) == {field.name: False}
        else:
            found = vars(parser.parse_args([option, str(value)]))
            assert found == {field.name: value}
            assert type(found[field.name]) is type(value)


def test_values_are_replaced_by_their_names_and_types():
    recipe = recipes.override(recipes.Recipe(), {"learning_rate": 1, "steps": 5})
    assert (recipe.learning_rate, type(recipe.learning_rate), recipe.steps) == (1.0, float, 5)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"step": 5}, "here: unknown value 'step'; did you mean 'steps'?"),
        ({"steps": 5.0}, "here: steps = 5.0 should be of type int"),
        ({"steps": True}, "here: steps = True should be of type int"),
        ({"crops": 1}, "here: crops = 1 should be of type bool"),
        ({"corpus": 3}, "here: corpus = 3 should be of type str"),
    ]
    for values, told in wrong:
        with pytest.raises(ValueError, match=re.escape(told)):
            recipes.override(recipes.Recipe(), values, source="here")


def test_a_recipe_is_read_from_sections_and_without(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("steps = 7\n[model]\nwidth = 64\nheads = 2\n")
    recipe = recipes.read_recipe(file)
    assert (recipe.steps, recipe.width, recipe.heads) == (7, 64, 2)
    for text, told in [("steps = ", "is not TOML"), ("stepz = 7", "unknown value 'stepz'; did you mean 'steps'?")]:
        file.write_text(text)
        with pytest.raises(ValueError, match=re.escape(told)):
            recipes.read_recipe(file)
    with pytest.raises(ValueError, match=r"no recipe file .*other\.toml; the package has the recipes .*tiny"):
        recipes.read_recipe(tmp_path / "other.toml")
    with pytest.raises(ValueError, match=r"unknown recipe 'tyni': the package has .*tiny"):
        recipes.read_recipe("tyni")


def test_micro_batches_are_those_of_all_ranks():
    recipe = dataclasses.replace(recipes.Recipe(), batch_size=24)
    assert [recipe.micro_batches(n) for n in (1, 2, 3)] == [1, 2, 3]
    recipe = dataclasses.replace(recipe, micro_batch_size=4)
    assert [recipe.micro_batches(n) for n in (1, 2, 3)] == [6, 6, 6]
    with pytest.raises(ValueError, match="batch_size = 24 cannot be divided over 5 ranks in micro-batches of 4"):
        recipe.micro_batches(5)


def test_memory_is_asked_for_what_there_can_be():
    for stage, ranks in ((4, 1), (-1, 1), (1, 0)):
        with pytest.raises(ValueError, match=f"stage = {stage}, ranks = {ranks}: expected a stage of 0 to 3"):
            plan.memory(1000, stage, ranks)
