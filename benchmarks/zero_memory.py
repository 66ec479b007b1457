"""What each rank holds by ZeRO stage, on a network of 100 M parameters, beside the formula of `--plan`.

All tensors of the process are counted after a step, when gradients are gone in stages 0 to 2 and DeepSpeed's bucket is
free: the formula without these two. Weights, masters, moments, the moving average and the averaged network are left.

    python benchmarks/zero_memory.py                    # one rank and two: about 5 minutes on two cores, 8 GB
    python benchmarks/zero_memory.py --width 64         # in seconds
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys

import torch
import torch.distributed as dist
from sedd_graphs import Absorbing, LogLinear
from sedd_nets import SEDD
from sedd_train import distributed, plan
from sedd_train.ema import EMA
from sedd_train.engine import Loss, start_engine, train_step
from sedd_train.objectives import ScoreEntropy

STATES = 20_001


def main() -> None:
    """Start the ranks, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--depth", type=int, default=9)
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stage is not None:
        measure(given)
        return
    print("| ranks | ZeRO | parameters | held by a rank | formula | ratio |\n|---:|---:|---:|---:|---:|---:|")
    for ranks in (1, 2):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        for stage in plan.STAGES:  # each in processes of its own, where nothing is left of the one before
            subprocess.run([*launcher, *sys.argv, "--stage", str(stage)], check=True, stderr=subprocess.DEVNULL)


def measure(given: argparse.Namespace) -> None:
    """Take a step, count, and print a row of the table on rank 0."""
    distributed.start()
    ranks, stage, before = dist.get_world_size(), given.stage, live()
    graph, noise = Absorbing(STATES - 1), LogLinear()
    sizes = {"width": given.width, "depth": given.depth, "heads": given.width // 64, "length": 8, "dropout": 0.0}
    net = SEDD(STATES, **sizes, scale_by_sigma=True)
    averaged = SEDD(STATES, **sizes, scale_by_sigma=True)  # what is measured while training
    parameters = sum(p.numel() for p in averaged.parameters())
    engine = start_engine(Loss(net, ScoreEntropy(graph, noise)), batch_size=ranks, micro_batches=ranks, stage=stage)
    average = EMA(engine, 0.9)
    x0 = torch.zeros(1, 8, dtype=torch.int64)
    train_step(engine, [(x0, torch.full((1, 8), STATES - 1), torch.full((1,), 0.5))], 1e-3)
    average.update()
    held = live() - before
    formula = plan.memory(parameters, stage, ranks)
    expected = sum(formula.values()) - (formula["gradients"] + formula["bucket"] if stage < 3 else 0.0)
    if dist.get_rank() == 0:
        columns = [f"{parameters / 1e6:.1f} M", f"{held / 1e9:.3f} GB", f"{expected / 1e9:.3f} GB"]
        print(f"| {ranks} | {stage} | {' | '.join(columns)} | {held / expected:.3f} |", flush=True)
    distributed.finish()


def live() -> int:
    """Bytes of all tensors of this process."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    tensors += [x.grad for x in tensors if x.is_leaf and x.grad is not None]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


if __name__ == "__main__":
    main()
