"""A program for two ranks: the loss is NaN or infinite on one of them, in every ZeRO stage. Prints JSON on rank 0."""

from __future__ import annotations

import json

import torch
import torch.distributed as dist
from sedd_graphs import Absorbing, LogLinear
from sedd_nets import SEDD
from sedd_train import distributed, nonfinite, zero_shards
from sedd_train.engine import Loss, start_engine, train_step
from sedd_train.objectives import ScoreEntropy

GRAPH, NOISE = Absorbing(11), LogLinear()
distributed.start()
rank = dist.get_rank()
found = []
for stage in range(4):
    torch.manual_seed(0)
    net = SEDD(12, width=16, depth=2, heads=2, cond_dim=8, dropout=0.0, length=8, scale_by_sigma=True)
    engine = start_engine(Loss(net, ScoreEntropy(GRAPH, NOISE)), batch_size=8, micro_batches=4, stage=stage)
    on = {"factor": 1.0}
    embedding = engine.module.net.vocab_embed
    embedding.register_forward_hook(lambda module, inputs, out, on=on: out * on["factor"])

    def batch(step):
        generator = torch.Generator().manual_seed(2 * step + rank)
        x0 = torch.randint(11, (2, 8), generator=generator)
        t = torch.full((2,), 0.5)
        return x0, GRAPH.sample(x0, NOISE(t)[0], generator=generator), t

    def step(number, factor=1.0, which=1, engine=engine, on=on, batch=batch):
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
    found.append({"stage": stage, "applied": applied, "bad": bad, "diagnosis": diagnosis})
if rank == 0:
    print(json.dumps(found))
distributed.finish()
