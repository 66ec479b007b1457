"""Masters and moments in the machine's memory: the same run, and the same checkpoints."""

from __future__ import annotations

import pytest
import torch
from sedd_graphs import Absorbing, LogLinear
from sedd_nets import SEDD
from sedd_train import recipes, zero_shards
from sedd_train.ema import EMA
from sedd_train.engine import Loss, start_engine, train_step
from sedd_train.objectives import ScoreEntropy

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("process")]  # DeepSpeed warns
GRAPH, NOISE = Absorbing(11), LogLinear()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloading_changes_no_number(stage):
    found = []
    for offload in (False, True):
        torch.manual_seed(0)
        net = SEDD(12, width=16, depth=2, heads=2, cond_dim=8, dropout=0.0, length=8, scale_by_sigma=True)
        engine = start_engine(
            Loss(net, ScoreEntropy(GRAPH, NOISE)), batch_size=4, micro_batches=1, stage=stage, offload=offload
        )
        average = EMA(engine, 0.9)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            x0 = torch.randint(11, (4, 8), generator=generator)
            t = torch.full((4,), 0.5)
            train_step(engine, [(x0, GRAPH.sample(x0, NOISE(t)[0], generator=generator), t)], 1e-2)
            average.update()
        found.append((zero_shards.gather(engine), average.gather()))
        pieces = zero_shards.scatter(engine, found[-1][1])
        assert all(torch.equal(one, other) for one, other in zip(pieces, average.pieces, strict=True))
        where = engine.optimizer.offload_optimizer if stage == 3 else engine.optimizer.cpu_offload
        assert where == offload
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_there_is_nothing_to_offload_without_zero():
    with pytest.raises(ValueError, match="offload = True: expected false without ZeRO"):
        recipes.override(recipes.Recipe(), {"offload": True, "zero_stage": 0})
