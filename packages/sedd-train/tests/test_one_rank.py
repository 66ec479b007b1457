"""A run on one rank: without ZeRO, whose copies it has no use for, its step moves what the same step by hand moves."""

from __future__ import annotations

import copy
import dataclasses
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from sedd_graphs import Absorbing, LogLinear
from sedd_nets import SEDD
from sedd_train import engine, recipes, training, zero_shards
from sedd_train.engine import Loss, start_engine, train_step
from sedd_train.objectives import ScoreEntropy
from torch import Tensor, nn

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("process")]  # DeepSpeed warns
STEP = runpy.run_path(str(Path(__file__).parents[3] / "benchmarks" / "step.py"))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_only_ranks_that_are_several_share_and_one_that_offloads(stage):
    recipe = dataclasses.replace(recipes.Recipe(), zero_stage=stage)
    assert [recipe.stage(ranks) for ranks in (1, 2, 64)] == [0, stage, stage]
    if stage:
        assert dataclasses.replace(recipe, offload=True).stage(1) == stage


def steps_of_a_run(here, folder, monkeypatch, **values) -> list[tuple[Any, Any, Any]]:
    """What each step moves, the average that follows the one before included, with its batches and engine."""
    found: list[tuple[Any, Any, Any]] = []
    launch = engine.launch_step

    def counted(used, micro_batches, *args, **how):
        with STEP["Moved"]() as moved:
            launched = launch(used, micro_batches, *args, **how)
        found.append((moved, micro_batches, used))
        return launched

    with monkeypatch.context() as patch:
        patch.setattr(training, "launch_step", counted)
        patch.setattr(engine, "reading_waits", lambda tensor: True)  # so that a step is settled within the next one
        here(folder, steps=4, checkpoint_every=4, zero_stage=1, width=128, batch_size=2, **values)
    return found


def test_its_step_moves_what_the_step_by_hand_moves(here, tmp_path, monkeypatch):
    moved, (batch,), used = steps_of_a_run(here, tmp_path, monkeypatch)[2]
    assert used.zero_optimization_stage() == 0
    by_hand = STEP["by_hand"](Loss(copy.deepcopy(used.module.net), used.module.objective), averaged=True)
    by_hand(batch)  # which makes the moments
    with STEP["Moved"]() as hand:
        by_hand(batch)
    assert moved.bytes == pytest.approx(hand.bytes, rel=0.01)
    assert moved.operations <= hand.operations + 60


def test_under_zero_it_would_move_more(here, tmp_path, monkeypatch, request):
    """So that what the test before counts is there to be counted."""
    without, _, _ = steps_of_a_run(here, tmp_path / "without", monkeypatch)[2]
    request.getfixturevalue("zero_on_one_rank")
    under_zero, _, used = steps_of_a_run(here, tmp_path / "under zero", monkeypatch)[2]
    assert used.zero_optimization_stage() == 1
    assert under_zero.bytes > 2 * without.bytes
    assert under_zero.operations > 1.2 * without.operations


class Half(nn.Module):
    """A network with a weight that its answer depends on in every second call."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.extra, self.calls = net, nn.Parameter(torch.ones(3)), 0

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.net(x, sigma)
        return out * self.extra.prod() if self.calls % 2 else out


def test_a_weight_that_has_no_gradient_moves_by_its_momentum_whatever_the_stage():
    graph, noise = Absorbing(11), LogLinear()
    generator = torch.Generator().manual_seed(0)
    x0, t = torch.randint(11, (4, 8), generator=generator), torch.full((4,), 0.5)
    batch = x0, graph.sample(x0, noise(t)[0], generator=generator), t
    found = []
    for stage in (0, 1):
        torch.manual_seed(0)
        net = Half(SEDD(12, width=16, depth=1, heads=2, cond_dim=8, dropout=0.0, length=8, scale_by_sigma=True))
        nn.init.normal_(net.net.output_layer.linear.weight, std=0.1)  # type: ignore[union-attr, arg-type]
        ours = start_engine(Loss(net, ScoreEntropy(graph, noise)), batch_size=4, micro_batches=1, stage=stage)
        seen = []
        for _ in range(4):
            train_step(ours, [batch], 1e-2)
            seen.append(zero_shards.gather(ours)["extra"])
        found.append(torch.stack(seen))
    without, under_zero = found
    assert (without.diff(dim=0) != 0).all()
    torch.testing.assert_close(without, under_zero, rtol=0, atol=1e-6)
