"""The loop as a function: one's own documents, tokenizer, network and objective, in this process."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import safetensors.torch
import torch
from sedd_graphs import Absorbing, LogLinear
from sedd_nets import FlexAttention, sdpa
from sedd_train import SetupError, checkpoint, loggers, recipes, train
from sedd_train.corpora import Texts
from sedd_train.objectives import ScoreEntropy
from sedd_train.pretrained import make_net
from sedd_train.recipes import read_recipe, recipe_names
from sedd_train.starting import choose_attention, compiles
from sedd_train.text8 import character_tokenizer, to_text8
from torch import nn

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("process")]  # DeepSpeed warns
SIZES = {"length": 16, "batch_size": 8, "steps": 40, "warmup": 2, "learning_rate": 1e-2, "log_every": 1}
SIZES |= {"evaluate_blocks": 4, "evaluate_times": 2, "sample_steps": 2, "checkpoint_every": 20, "evaluate_every": 40}
SIZES |= {"packing": True, "informed_start": False}
SMALL = recipes.override(recipes.Recipe(), SIZES)


class Network(nn.Module):
    """Embeds, mixes neighbours, drops, and gives 28 log-scores with the true factor of an absorbing graph."""

    def __init__(self, states: int = 28) -> None:
        super().__init__()
        self.embed, self.drop = nn.Embedding(states, 32), nn.Dropout(0.1)
        self.mix, self.out = nn.Conv1d(32, 32, 5, padding=2), nn.Linear(32, states)

    def forward(self, x, sigma):
        hidden = self.embed(x)
        hidden = hidden + self.drop(torch.relu(self.mix(hidden.mT).mT))
        return self.out(hidden) - torch.log(27 * torch.expm1(sigma))[:, None, None]


@pytest.fixture(scope="module")
def prose(text):
    """Two speeches in letters and spaces, the first to train on."""
    first, second = (to_text8(path.read_text()) for path in sorted(text.iterdir())[:2])
    return Texts("two speeches", lambda: [first], lambda: [second], lambda: [second])


def weights(run, step):
    return safetensors.torch.load_file(run / "checkpoints" / f"step-{step:08d}" / "training.safetensors")


def test_one_s_own_corpus_tokenizer_network_and_objective(prose, cache, tmp_path):
    """The loss falls, the run resumes to the same digits, its dropout included, and leaves what is needed to go on."""

    class Doubled(ScoreEntropy):
        """Twice the loss, of which every number of the log must know."""

        def losses(self, net, x0, xt, t, **given):
            total, each = super().losses(net, x0, xt, t, **given)
            return 2 * total, 2 * each

    graph, noise = Absorbing(27), LogLinear()
    given = {"corpus": prose, "tokenizer": character_tokenizer(), "cache": cache, "tensorboard": False}

    def run(folder, recipe=SMALL, objective=None, **more):
        torch.manual_seed(0)
        net = Network()
        return train(recipe, output=tmp_path / folder, net=net, objective=objective, **given, **more), net

    once, _ = run("once", objective=ScoreEntropy(graph, noise))
    assert (once.step, once.stopped) == (40, False)
    assert once.measured.nats_per_token < math.log(27)
    lines = [line for line in loggers.read(tmp_path / "once" / "log.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, 41))
    averaged = Network()
    checkpoint.set_weights(averaged, safetensors.torch.load_file(tmp_path / "once" / "export" / "model.safetensors"))
    config = json.loads((tmp_path / "once" / "export" / "config.json").read_text())
    assert config["model"] == {"type": "Network"}
    stored = recipes.read_recipe(tmp_path / "once" / "recipe.toml")
    assert stored.corpus == "two speeches"
    assert stored.tokenizer.startswith("tokenizer:")

    run("parts", objective=ScoreEntropy(graph, noise), recipe=dataclasses.replace(SMALL, steps=20, evaluate_every=20))
    resumed, _ = run("parts", objective=ScoreEntropy(graph, noise), resume=True)
    assert resumed.step == 40
    one, other = (weights(tmp_path / name, 40) for name in ("once", "parts"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)

    run("doubled", objective=Doubled(graph, noise))
    doubled = [line for line in loggers.read(tmp_path / "doubled" / "log.jsonl") if line["kind"] == "train"]
    assert doubled[0]["loss"] == pytest.approx(2 * lines[0]["loss"], rel=1e-5)
    assert doubled[0]["grad_norm"] == pytest.approx(2 * lines[0]["grad_norm"], rel=1e-4)


def test_what_does_not_fit_is_said_before_anything_is_written(prose, cache, tmp_path):
    given = {"corpus": prose, "tokenizer": character_tokenizer(), "cache": cache, "tensorboard": False}
    run = tmp_path / "run"
    with pytest.raises(SetupError, match="batch_size = 0: expected a positive number"):
        train(dataclasses.replace(SMALL, batch_size=0), output=run, **given)
    with pytest.raises(SetupError, match="28"):
        train(SMALL, output=run, net=Network(30), **given)
    with pytest.raises(SetupError, match="attends within documents"):
        train(dataclasses.replace(SMALL, packing=False), output=run, net=Network(), **given)
    with pytest.raises(SetupError, match="no run to continue"):
        train(SMALL, output=run, resume=True, **given)
    with pytest.raises(SetupError, match="unknown recipe 'tinny'"):
        train("tinny", output=run)
    with pytest.raises(SetupError, match="fewer than one block"):
        train(dataclasses.replace(SMALL, length=10**6), output=run, **given)
    assert not run.exists()


def test_the_optimiser_s_numbers_are_the_recipe_s(prose, cache, tmp_path, monkeypatch):
    """Each has a value that nothing has by default."""
    told: dict[str, Any] = {}

    def stopped(loss, **given):
        told.update(given)
        raise InterruptedError

    monkeypatch.setattr("sedd_train.training.start_engine", stopped)
    numbers: dict[str, Any] = {
        "clip": 0.5,
        "eps": 1e-6,
        "weight_decay": 0.02,
        "precision": "bf16",
        "offload": True,
        "batch_size": 6,
    }
    options = {"wall_clock_breakdown": True}
    more: dict[str, Any] = {"beta1": 0.8, "beta2": 0.95, "zero_stage": 2, "micro_batch_size": 2, "deepspeed": options}
    recipe = dataclasses.replace(SMALL, **numbers, **more)
    given = {"corpus": prose, "tokenizer": character_tokenizer(), "cache": cache, "tensorboard": False}
    with pytest.raises(InterruptedError):
        train(recipe, output=tmp_path, net=Network(), **given)
    told_of = {"betas": (0.8, 0.95), "stage": 2, "micro_batches": 3, "optimizer": "adamw", "options": options}
    assert told == numbers | told_of


def test_what_is_compiled_without_a_word():
    """On a GPU the package's own networks, in every published recipe; elsewhere, and one's own, when asked."""
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for name in recipe_names():
        recipe = read_recipe(name)
        assert [compiles(recipe, cuda, own=own) for own in (False, True)] == [True, False]
        assert not compiles(recipe, cpu, own=False)
    assert not compiles(dataclasses.replace(SMALL, packing=False), cuda, own=False)
    for said in (False, True):
        assert compiles(dataclasses.replace(SMALL, compile=said), cpu, own=True) is said
        assert compiles(dataclasses.replace(SMALL, compile=said), cuda, own=False) is said


def test_attention_is_the_recipe_s_where_it_can_be(monkeypatch):
    net = make_net(SMALL, 12)
    choose_attention(net, SMALL, own=True)
    assert net.attention is sdpa
    flex, flash = (dataclasses.replace(SMALL, attention=name, precision="bf16") for name in ("flex", "flash"))
    with pytest.raises(ValueError, match="no backward pass but on a GPU"):
        choose_attention(net, flex, own=False)
    with pytest.raises(ValueError, match="a network of your own attends as it does"):
        choose_attention(net, flex, own=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    choose_attention(net, flex, own=False)
    assert isinstance(net.attention, FlexAttention)
    with pytest.raises(ValueError, match=r"flash-attn is not installed .*pip install"):
        choose_attention(net, flash, own=False)
