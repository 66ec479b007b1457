"""What two ranks do when something goes wrong on both, on one, or on each: a part of `two_ranks.py`."""

from __future__ import annotations

from typing import Any

import torch
from sedd_graphs import Absorbing, LogLinear
from sedd_nets import SEDD
from sedd_train import SetupError, distributed, nonfinite, recipes, train, zero_shards
from sedd_train.engine import Loss, start_engine, train_step
from sedd_train.objectives import ScoreEntropy

GRAPH, NOISE = Absorbing(11), LogLinear()
rank, _ = distributed.place()


def errors(source: str, folder: str, cache: str) -> list[str]:
    """Of three runs that cannot begin, in the same folder."""
    recipe, said = recipes.read_recipe(source), []
    for values in (
        {"batch_size": 7},
        {"corpus": "no/such/folder"} if rank == 1 else {},
        {"corpus": "no/such/folder"} if rank == 1 else {"tokenizer": "bpe:3"},
    ):
        try:
            train(recipes.override(recipe, values), output=f"{folder}/run", cache=cache, tensorboard=False)
            said.append("nothing")
        except SetupError as error:
            said.append(str(error))
    return said


def steps(stage: int) -> dict[str, Any]:
    """What becomes of four steps of two micro-batches, where the second one's loss on rank 1 is NaN or infinite."""
    torch.manual_seed(0)
    net = SEDD(12, width=16, depth=2, heads=2, cond_dim=8, dropout=0.0, length=8, scale_by_sigma=True)
    engine = start_engine(Loss(net, ScoreEntropy(GRAPH, NOISE)), batch_size=8, micro_batches=4, stage=stage)
    on = {"factor": 1.0}
    embedding = engine.module.net.vocab_embed
    embedding.register_forward_hook(lambda module, inputs, out: out * on["factor"])

    def batch(step):
        generator = torch.Generator().manual_seed(2 * step + rank)
        x0 = torch.randint(11, (2, 8), generator=generator)
        t = torch.full((2,), 0.5)
        return x0, GRAPH.sample(x0, NOISE(t)[0], generator=generator), t

    def step(number, factor=1.0, which=1):
        """Two micro-batches; rank 1's second one is multiplied by `factor`."""

        def batches():
            for i in range(2):
                on["factor"] = factor if rank == 1 and i == which else 1.0
                yield batch(2 * number + i)

        return batches

    samples = list(range(rank, 8, 2))
    applied, bad = [], []
    for number, factor in enumerate([1.0, float("nan"), float("inf"), 1.0]):
        before = zero_shards.gather(engine)
        done = train_step(engine, step(number, factor)(), 1e-2)
        after = zero_shards.gather(engine)
        changed = any(not torch.equal(before[name], after[name]) for name in before)
        assert changed == done.applied, (stage, number)
        applied.append(done.applied)
        bad.append(nonfinite.not_finite(done.losses, samples))
    diagnosis = nonfinite.diagnose(engine, step(4, float("nan"))(), samples)
    return {"stage": stage, "applied": applied, "bad": bad, "diagnosis": diagnosis}
