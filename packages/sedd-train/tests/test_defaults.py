"""What holds unless somebody says otherwise: each public function's own values, and that each of them is used."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from sedd_graphs import Absorbing, LogLinear
from sedd_objectives import Estimate
from sedd_train import (
    checkpoint,
    coding,
    conditional,
    corpora,
    engine,
    evaluation,
    files,
    finetuning,
    flops,
    folders,
    pipelines,
    plan,
    prompts,
    randomness,
    recipes,
    storage,
    token_cache,
    tokenizers,
    training,
)
from sedd_train.evaluation import bounds, by_noise_level, evaluate
from sedd_train.objectives import ScoreEntropy
from sedd_train.sections import MASKING
from torch import nn

CASES: list[tuple[Any, dict[str, Any]]] = [
    (checkpoint.save, {"keep_every": 0, "bound": None}),
    (checkpoint._prune, {"keep_every": 0}),
    (coding.coded, {"skip": 0, "processes": None}),
    (conditional.conditional, {"device": "cpu", "seed": 0, "chunk": 8, "progress": False}),
    (
        corpora.load_texts,
        {"rows": False, "streaming": False, "column": "", "revision": "", "valid": "", "encoding": "", "index": None}
        | {"label_column": ""},
    ),
    (
        engine.start_engine,
        {"stage": 1, "precision": "fp32", "offload": False, "clip": 1.0, "betas": (0.9, 0.999), "eps": 1e-8}
        | {"weight_decay": 0.0, "options": None},
    ),
    (engine.learning_rate, {"decay_to": 1.0}),
    (
        evaluation.evaluate,
        {"num_times": 16, "seed": 0, "chunk": 8, "progress": False, "estimator": "best"},
    ),
    (
        evaluation.bounds,
        {"num_times": 16, "seed": 0, "chunk": 8, "progress": False, "lengths": None} | {"labels": None},
    ),
    (
        evaluation.by_noise_level,
        {"num_levels": 16, "t_min": 1e-3, "seed": 0, "chunk": 8, "lengths": None} | {"labels": None},
    ),
    (files.recognise, {"lines": False, "encoding": "", "named": False}),
    (finetuning.begin, {"tokenizer": None, "graph": None, "noise": None}),
    (flops.training_flops, {"t_min": 1e-3}),
    (folders.survey, {"column": "", "label_column": "", "encoding": "", "lines": False, "blank": False, "index": None}),
    (folders.chosen, {"end": False}),
    (pipelines.Pipeline.__call__, {"text": "", "num": 1, "seed": 0, "length": None, "label": None}),
    (
        pipelines.Pipeline.states,
        {"seed": 0, "steps": 128, "method": None, "temperature": 1.0, "top_k": None, "top_p": 1.0}
        | {"label": None, "guidance": 1.0},
    ),
    (plan.activations, {"precision": "fp32"}),
    (plan.memory, {"trained": None}),
    (prompts.around, {"prefix": "", "suffix": ""}),
    (randomness.times, {"t_min": 1e-3}),
    (randomness.generator, {"device": "cpu"}),
    (recipes.override, {"source": "command line"}),
    (storage.locked, {"timeout": -1}),
    (storage.check_output, {"folder": False}),
    (token_cache.Corpus.check_length, {"packing": True}),
    (tokenizers.load_tokenizer, {"train": None, "eos": ""}),
    (tokenizers.pieces, {"size": 1 << 20}),
    (
        training.train,
        {"corpus": None, "tokenizer": None, "net": None, "objective": None, "graph": None, "noise": None, "init": None}
        | {"resume": False, "cache": "runs/cache", "tensorboard": True, "wandb": "", "peak_tflops": 0.0},
    ),
]


@pytest.mark.parametrize(("function", "defaults"), CASES, ids=lambda value: getattr(value, "__qualname__", ""))
def test_a_function_s_own_values(function, defaults):
    found = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    assert {name: found[name] for name in defaults} == defaults


def test_a_recipe_s_own_values():
    """All of them, and which of them a run keeps to its end."""
    recipe = recipes.Recipe()
    assert (recipe.corpus, recipe.tokenizer, recipe.length, recipe.packing) == ("sotu", "gpt2", 1024, True)
    assert (recipe.graph, recipe.noise, recipe.sigma_min, recipe.sigma_max) == ("absorb", "loglinear", 1e-4, 20.0)
    assert (recipe.width, recipe.depth, recipe.heads, recipe.cond_dim, recipe.dropout) == (768, 12, 12, 128, 0.1)
    assert (recipe.objective, recipe.network, recipe.d3pm_steps, recipe.lora_alpha) == (
        "score-entropy",
        "sedd",
        1000,
        16.0,
    )
    assert (recipe.scale_by_sigma, recipe.informed_start, recipe.streaming, recipe.crops) == (True, False, False, False)
    assert (recipe.learning_rate, recipe.beta1, recipe.beta2, recipe.eps) == (3e-4, 0.9, 0.999, 1e-8)
    assert (recipe.batch_size, recipe.warmup, recipe.clip, recipe.ema, recipe.t_min) == (512, 2500, 1.0, 0.9999, 1e-3)
    assert (recipe.precision, recipe.attention, recipe.offload, recipe.activation_checkpointing) == (
        *("fp32", "sdpa", False, False),
    )
    assert recipe.deepspeed == {}
    assert recipe.texts == dict.fromkeys(("column", "label_column", "revision", "valid", "encoding", "eos"), "") | {
        "streaming": False
    }
    assert recipe.drop_labels == 0.1
    assert MASKING == ("absorb", "hybrid", "masked")
    assert set(recipes.OF_A_CHECKPOINT) == {
        *("objective", "network", "d3pm_steps", "graph", "noise", "sigma_min", "sigma_max", "width", "depth", "heads"),
        *("cond_dim", "scale_by_sigma"),
    }


# Each of an evaluation's values is used


NET = nn.Linear(1, 1)


def test_times_seeds_and_chunks_are_those_that_are_not_said(monkeypatch):
    """16 times, seed 0, 8 sequences at once."""
    asked: list[Any] = []

    def bound(net, graph, noise, x0, *, num_times, generator):
        asked.append((len(x0), num_times, generator.initial_seed()))
        return Estimate(torch.ones(len(x0)), torch.ones(len(x0)))

    class Asked(ScoreEntropy):
        def bound(self, net, x0, *, num_times, generator, lengths=None):
            asked.append((len(x0), num_times, generator.initial_seed()))
            return torch.ones(len(x0))

        def loss(self, net, x0, t, *, generator, lengths=None):
            asked.append((len(x0), len(asked), generator.initial_seed()))
            return torch.ones(len(x0))

    def seeds(purpose: int, seed: int = 0) -> list[int]:
        return [randomness.derived_seed(seed, purpose, number) for number in range(2)]

    blocks, graph = torch.zeros(11, 4, dtype=torch.int64), Absorbing(5)
    monkeypatch.setitem(evaluation.ESTIMATORS, "masks", bound)
    wanted = [(8, 16, seeds(randomness.EVALUATION)[0]), (3, 16, seeds(randomness.EVALUATION)[1])]
    evaluate(NET, graph, LogLinear(), blocks, characters_per_token=1.0)
    bounds(NET, Asked(graph, LogLinear()), blocks)
    assert asked == wanted * 2
    asked.clear()
    monkeypatch.setattr(evaluation, "ScoreEntropy", Asked)
    found = by_noise_level(NET, graph, LogLinear(), blocks)
    assert [(size, seed) for size, _, seed in asked] == [
        *[(8, seeds(randomness.LEVELS)[0])] * 16,
        *[(3, seeds(randomness.LEVELS)[1])] * 16,
    ]
    assert found.nats_per_token.tolist() == pytest.approx([0.999 / 16 / 4] * 16)
    assert found.standard_error.tolist() == [0.0] * 16
    by_noise_level(NET, graph, LogLinear(), blocks, seed=3)
    assert asked[-1][2] == seeds(randomness.LEVELS, 3)[1]
    assert by_noise_level(NET, graph, LogLinear(), blocks[:1]).standard_error.isnan().all()


def test_the_error_of_a_level_is_that_of_a_mean_over_sequences(monkeypatch):
    monkeypatch.setattr(ScoreEntropy, "loss", lambda self, net, x0, t, *, generator, lengths=None: x0[:, 0].double())
    blocks = torch.tensor([[1, 0], [2, 0], [6, 0]])
    found = by_noise_level(NET, Absorbing(9), LogLinear(), blocks, num_levels=2, t_min=0.5)
    each = torch.tensor([1.0, 2.0, 6.0]).double() * 0.25 / 2
    assert found.nats_per_token.tolist() == pytest.approx([float(each.mean())] * 2)
    assert found.standard_error.tolist() == pytest.approx([float(each.std()) / 3**0.5] * 2)


# A run begins, goes on, or is refused


def test_a_run_s_recipe_is_a_new_one_s_or_its_own(tmp_path):
    new = recipes.for_run(tmp_path, "tiny", {"steps": 7}, resume=False)
    assert new == recipes.override(recipes.read_recipe("tiny"), {"steps": 7})
    assert recipes.for_run(tmp_path, "tiny", {"steps": 7}, resume="auto") == new
    with pytest.raises(ValueError, match=r"there is no run to continue in .* \(no recipe.toml\); start it without"):
        recipes.for_run(tmp_path, "tiny", {}, resume=True)
    (tmp_path / "recipe.toml").write_text(recipes.to_toml(new))
    assert recipes.for_run(tmp_path, "tinny", {"steps": 9}, resume=True).steps == 9
    assert (
        recipes.for_run(tmp_path, "tiny", {}, resume="auto").steps == recipes.read_recipe("tiny").steps
    )  # it has no checkpoint
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert recipes.for_run(tmp_path, "tinny", {}, resume="auto") == new
    with pytest.raises(ValueError, match="holds a run with checkpoints: continue it with --resume, or give another"):
        recipes.for_run(tmp_path, "tiny", {}, resume=False)
    with pytest.raises(ValueError, match=r"width = 64, but the run in .* was started with 128: leave it out"):
        recipes.for_run(tmp_path, "tiny", {"width": 64}, resume=True)


def test_a_run_from_a_checkpoint_is_told_what_it_may_not_say(tmp_path):
    for name, value in {"graph": "uniform", "width": 3, "scale_by_sigma": True, "sigma_max": 2.0}.items():
        option = name.replace("_", "-")
        with pytest.raises(ValueError, match=f"with --init the checkpoint says what --{option} would: leave it out"):
            recipes.for_run(tmp_path, "finetune", {"init": "there", name: value}, resume=False)
    assert recipes.for_run(tmp_path, "finetune", {"init": "there", "dropout": 0.2}, resume=False).dropout == 0.2
    told = "length and tokenizer are those of a checkpoint to begin from: give it, --init NAME_OR_FOLDER"
    for values in ({"length": 0}, {"tokenizer": ""}):
        with pytest.raises(ValueError, match=told):
            recipes.for_run(tmp_path, "tiny", values, resume=False)


def test_every_recipe_of_the_package_is_named():
    assert recipes.recipe_names() == sorted(recipes.recipe_names())
    assert {"tiny", "finetune", "finetune-tiny", "text8-mini", "lm1b-mini", "sedd-small-absorb-owt"} <= set(
        recipes.recipe_names()
    )
    assert recipes.read_recipe(Path(recipes.__file__).parent / "recipes" / "tiny.toml") == recipes.read_recipe("tiny")
