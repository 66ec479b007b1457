"""What the sampler costs beside the network's own time, and what it spares the network. Three measurements:

1. Whole runs, 8 sequences of 256 tokens, 64 steps: the time outside the network's calls over the time inside.
2. One step with half of the positions masked: its time beside the network's own at the positions needed (at most 5 %),
   and the whole step over the network's full forward, all positions (at most 0.92 at the published sizes).
3. A time-free network over 1024 and 4096 steps: its calls beside N (1 - (1 - 1/N)^L), and the rows its head sees.

The networks are fresh ones with a random head. All ratios are within one run, so that they do not depend on the
machine's speed; in 2 the kinds of call alternate.

    python benchmarks/sampler.py
    python benchmarks/sampler.py --states 50258 --width 768 --depth 12 --heads 12 --length 1024 --batch 1 --steps 8
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from sedd_graphs import Absorbing, LogLinear
from sedd_nets import RADD, SEDD
from sedd_samplers import Euler, Method, Tweedie, Unmasking, infill, sample, trajectory
from torch import Tensor

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name, default in {
    **{"states": 2049, "width": 128, "depth": 4, "heads": 4, "cond-dim": 64},
    **{"batch": 8, "length": 256, "steps": 64, "runs": 5},
}.items():
    parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
parser.add_argument(
    "--time-free-steps",
    type=int,
    nargs="*",
    default=[1024, 4096],
    help="step counts of the third measurement, on sequences of 1024 (default: %(default)s)",
)
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
    scale_by_sigma=True,
).eval()
torch.nn.init.normal_(net.output_layer.linear.weight, std=0.1)
calls: list[float] = []


def score(x: Tensor, sigma: Tensor, where: Tensor) -> Tensor:
    """The network, with its time taken."""
    start = time.perf_counter()
    log_score: Tensor = net(x, sigma, where=where)
    calls.append(time.perf_counter() - start)
    return log_score


def told(values: list[float]) -> str:
    """The median, and the range."""
    return f"median {statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def whole_runs(method: Method) -> None:
    """The first measurement."""
    sample(score, graph, noise, shape=(args.batch, args.length), steps=2, method=method)
    ratios, totals = [], []
    for _ in range(args.runs):
        calls.clear()
        start = time.perf_counter()
        sample(score, graph, noise, shape=(args.batch, args.length), steps=args.steps, method=method)
        totals.append(time.perf_counter() - start)
        ratios.append((totals[-1] - sum(calls)) / sum(calls))
    print(
        f"{type(method).__name__:9} sampler / network: {told(ratios)}; whole run: median "
        f"{statistics.median(totals):.2f} s, {args.batch} x {args.length} tokens x {args.steps} steps"
    )


def one_step(method: Method) -> None:
    """The second measurement, with half of the positions given and half of them masked."""
    half = torch.arange(args.length).expand(args.batch, -1) % 2 == 0
    tokens = torch.randint(args.states - 1, half.shape)
    masked = torch.where(half, tokens, graph.mask_id)
    sigma = noise(torch.full((args.batch,), 0.5))[0]
    beside, whole = [], []
    for _ in range(args.runs + 1):
        start = time.perf_counter()
        net(masked, sigma)
        full = time.perf_counter() - start
        states = trajectory(score, graph, noise, x=tokens, given=half, steps=1, method=method, denoise=False)
        next(states)
        calls.clear()
        start = time.perf_counter()
        next(states)
        step = time.perf_counter() - start
        beside.append(step / calls[0] - 1)
        whole.append(step / full)
    print(
        f"{type(method).__name__:9} one step, half masked: sampler / network at the masks: {told(beside[1:])}; ", end=""
    )
    print(f"step / full forward: {told(whole[1:])}")


def time_free(steps: int, length: int = 1024) -> None:
    """The third measurement."""
    radd = RADD(28, width=32, depth=1, heads=2, length=length, dropout=0.0).eval()
    sequences, rows = [], []

    def counted(x: Tensor, sigma: Tensor, where: Tensor) -> Tensor:
        sequences.append(len(x))
        rows.append(int(where.sum()))
        log_score: Tensor = radd(x, sigma, where=where)
        return log_score

    x = torch.zeros(1, length, dtype=torch.int64)
    infill(counted, Absorbing(27), noise, x=x, given=x.bool(), steps=steps, method=Unmasking(), seeds=[0])
    expected = steps * (1 - (1 - 1 / steps) ** length)
    print(
        f"RADD, {length} tokens, {steps} steps: {sum(sequences)} calls, {sum(sequences) / expected:.3f} of the "
        f"expected {expected:.0f}; the head saw {sum(rows)} rows, of {length * steps // 2} with a call at every step"
    )


with torch.inference_mode():
    for method in (Tweedie(), Euler()):
        whole_runs(method)
    for method in (Tweedie(), Euler()):
        one_step(method)
    for steps in args.time_free_steps:
        time_free(steps)
