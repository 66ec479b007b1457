"""The recipes that come with the package, and what a plan says of them."""

from __future__ import annotations

import gc
import tomllib
from importlib import resources

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
    assert recipes.to_toml(recipe).count("=") == len(recipes.Recipe.__dataclass_fields__)
    assert (recipe.graph, recipe.noise, recipe.scale_by_sigma) in [
        ("absorb", "loglinear", True),
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
    """Bytes of all tensors there are."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    tensors += [x.grad for x in tensors if x.is_leaf and x.grad is not None]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


@pytest.mark.filterwarnings("default")  # DeepSpeed's own
def test_memory_is_what_tensors_hold(process):
    """On one rank, in every stage, between steps: all but gradients and bucket, which only stage 3 keeps."""
    graph, noise = Absorbing(1000), LogLinear()
    x0 = torch.zeros(1, 8, dtype=torch.int64)
    batch = x0, torch.full((1, 8), 1000), torch.full((1,), 0.5)
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
