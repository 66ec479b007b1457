"""What the sampler costs beside the network's own time: 8 sequences of 256 tokens, 64 steps, the tiny recipe's sizes.

The network is a fresh one of those sizes with a random head. Its own time is taken around each of its calls; all the
rest of the run is the sampler's. Both are parts of the same run, so the ratio does not depend on the machine's speed.

    python benchmarks/sampler.py
    python benchmarks/sampler.py --states 50258 --width 768 --depth 12 --heads 12 --length 1024 --batch 1 --steps 8
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from sedd_graphs import Absorbing, LogLinear
from sedd_nets import SEDD
from sedd_samplers import Euler, Tweedie, sample
from torch import Tensor

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name, default in {
    **{"states": 258, "width": 128, "depth": 4, "heads": 4, "cond-dim": 64},
    **{"batch": 8, "length": 256, "steps": 64, "runs": 5},
}.items():
    parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
args = parser.parse_args()

torch.manual_seed(0)
graph, noise = Absorbing(args.states - 1), LogLinear()
net = SEDD(
    args.states,
    width=args.width,
    depth=args.depth,
    heads=args.heads,
    cond_dim=args.cond_dim,
    dropout=0.0,
    length=args.length,
).eval()
torch.nn.init.normal_(net.output_layer.linear.weight, std=0.1)
calls: list[float] = []


def score(x: Tensor, sigma: Tensor, where: Tensor) -> Tensor:
    """The network, with its time taken."""
    start = time.perf_counter()
    log_score: Tensor = net(x, sigma, where=where)
    calls.append(time.perf_counter() - start)
    return log_score


with torch.inference_mode():
    for method in (Tweedie(), Euler()):
        sample(score, graph, noise, shape=(args.batch, args.length), steps=2, method=method)
        ratios, totals = [], []
        for _ in range(args.runs):
            calls.clear()
            start = time.perf_counter()
            sample(score, graph, noise, shape=(args.batch, args.length), steps=args.steps, method=method)
            totals.append(time.perf_counter() - start)
            ratios.append((totals[-1] - sum(calls)) / sum(calls))
        print(
            f"{type(method).__name__:8} sampler / network: median {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f}); whole run: median {statistics.median(totals):.2f} s, "
            f"{args.batch} x {args.length} tokens x {args.steps} steps"
        )
