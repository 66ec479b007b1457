"""How near the transformer is to the machine's limit: its time over the *floor*, in the same run.

The floor is the sum of the matrix products and attention calls of one pass, each timed alone at its own shape; no
implementation that computes them one by one can be faster. The head counts at all positions, so a training step whose
loss needs half of them can come out below 1.

    python benchmarks/net.py                       # SEDD-small, 1024 tokens
    python benchmarks/net.py --width 256 --depth 4 --heads 4 --length 256 --states 4096      # in seconds
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from sedd_graphs import Absorbing, LogLinear
from sedd_nets import SEDD
from sedd_objectives import denoising_loss
from torch import Tensor


def main() -> None:
    """Time everything and print it as ratios; `--memory-of B` is how the script calls itself for the memory figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 768), ("depth", 12), ("heads", 12), ("states", 50258), ("length", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="the fastest of so many runs counts")
    parser.add_argument("--dropout", type=float, default=0.1, help="in the training step")
    parser.add_argument("--parts", default="forward,training,bf16,compile,memory", help="which figures, by comma")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--checkpointed", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory_of is not None:
        print(peak_of_a_step(given))
        return
    parts = given.parts.split(",")
    print(
        f"SEDD {given.depth} x {given.width}, {given.heads} heads, N = {given.states}, L = {given.length}, "
        f"B = {given.batch}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    net = build(given)
    if "forward" in parts:
        floor, ours = fastest(floor_forward(given, torch.float32), forward(net, given), repeats=given.repeats)
        report("forward, fp32", floor, ours)
    if "training" in parts:
        for dropout in (given.dropout, 0.0):
            for block in net.blocks:
                block.dropout = dropout
            floor, ours = fastest(floor_training(given, torch.float32), training(net, given), repeats=given.repeats)
            report(f"forward + loss + backward, fp32, dropout {dropout}", floor, ours)
    if "bf16" in parts:
        fp32, bf16 = fastest(forward(net, given), autocast(forward(net, given)), repeats=given.repeats)
        print(f"forward, bf16 autocast: {bf16:.3f} s, {fp32 / bf16:.2f} x faster than fp32")
        fp32, bf16 = fastest(training(net, given), autocast(training(net, given)), repeats=given.repeats)
        print(f"forward + loss + backward, bf16 autocast: {bf16:.3f} s, {fp32 / bf16:.2f} x faster than fp32")
    if "compile" in parts:
        compiled = torch.compile(net, fullgraph=True)
        eager, ours = fastest(forward(net, given), forward(compiled, given), repeats=given.repeats)
        print(f"forward, compiled: {ours:.3f} s, {ours / eager:.3f} x eager's {eager:.3f} s")
        eager, ours = fastest(whole_training(net, given), whole_training(compiled, given), repeats=given.repeats)
        print(f"forward + backward, compiled: {ours:.3f} s, {ours / eager:.3f} x eager's {eager:.3f} s")
    if "memory" in parts:
        for checkpointed in (False, True):
            one, three = (memory_in_a_process(batch, checkpointed) for batch in (1, 3))
            how = "with activation checkpointing" if checkpointed else "without activation checkpointing"
            print(f"peak memory of a training step, {how}: {(three - one) / 2 / 1e9:.3f} GB for each added sequence")


def build(given: argparse.Namespace) -> SEDD:
    """The network, its zero-initialised parts randomised so that no gradient is trivially zero."""
    torch.manual_seed(0)
    net = SEDD(given.states, width=given.width, depth=given.depth, heads=given.heads, length=given.length)
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return net


def noised(given: argparse.Namespace, batch: int) -> tuple[Absorbing, Tensor, Tensor, Tensor]:
    """Graph, x0, x_t with exactly half of the positions masked, and the t (B,) at which that is expected."""
    graph = Absorbing(given.states - 1)
    x0 = torch.randint(given.states - 1, (batch, given.length))
    masked = torch.rand(batch, given.length).argsort(1) < given.length // 2
    return graph, x0, x0.masked_fill(masked, graph.mask_id), torch.full((batch,), 0.5)


def forward(net: torch.nn.Module, given: argparse.Namespace) -> Callable[[], object]:
    """One evaluation of the log-score at all positions."""
    x = torch.randint(given.states, (given.batch, given.length))
    sigma = torch.full((given.batch,), 0.7)

    def run() -> None:
        net.eval()
        with torch.no_grad():
            net(x, sigma)

    return run


def training(net: SEDD, given: argparse.Namespace) -> Callable[[], object]:
    """The network, the loss where half of the positions are masked, and the gradients of both."""
    graph, x0, xt, t = noised(given, given.batch)
    noise = LogLinear()

    def run() -> None:
        net.train()
        net.zero_grad()
        denoising_loss(net, graph, noise, x0, t, xt=xt).mean().backward()

    return run


def whole_training(net: torch.nn.Module, given: argparse.Namespace) -> Callable[[], object]:
    """Forward and backward through all positions, with a sum for a loss: a graph of fixed shapes."""
    x = torch.randint(given.states, (given.batch, given.length))
    sigma = torch.full((given.batch,), 0.7)

    def run() -> None:
        net.train()
        net.zero_grad()
        net(x, sigma).mean().backward()

    return run


def autocast(run: Callable[[], object]) -> Callable[[], object]:
    """The same under bfloat16 autocast."""

    def inside() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            run()

    return inside


def shapes(given: argparse.Namespace) -> list[tuple[int, int, int]]:
    """(how many, in, out) of the linear maps of one pass."""
    d = given.width
    return [
        (given.depth, d, 3 * d),
        (given.depth, d, d),
        (given.depth, d, 4 * d),
        (given.depth, 4 * d, d),
        (1, d, given.states),
    ]


def floor_forward(given: argparse.Namespace, dtype: torch.dtype) -> list[tuple[int, Callable[[], object]]]:
    """(how many, the call) for every product and attention call of a forward."""
    tokens = given.batch * given.length
    calls: list[tuple[int, Callable[[], object]]] = []
    for count, size_in, size_out in shapes(given):
        a, w = torch.randn(tokens, size_in, dtype=dtype), torch.randn(size_out, size_in, dtype=dtype)
        calls.append((count, lambda a=a, w=w: a @ w.T))
    q, k, v = torch.randn(3, given.batch, given.heads, given.length, given.width // given.heads, dtype=dtype)
    calls.append((given.depth, lambda: F.scaled_dot_product_attention(q, k, v)))
    return calls


def floor_training(given: argparse.Namespace, dtype: torch.dtype) -> list[tuple[int, Callable[[], object]]]:
    """The same for a forward and a backward: three products a linear map, attention with its own backward."""
    tokens = given.batch * given.length
    calls: list[tuple[int, Callable[[], object]]] = []
    for count, size_in, size_out in shapes(given):
        a, w = torch.randn(tokens, size_in, dtype=dtype), torch.randn(size_out, size_in, dtype=dtype)
        g = torch.randn(tokens, size_out, dtype=dtype)
        calls.append((count, lambda a=a, w=w: a @ w.T))
        calls.append((count, lambda g=g, w=w: g @ w))
        calls.append((count, lambda g=g, a=a: g.T @ a))
    q, k, v = torch.randn(3, given.batch, given.heads, given.length, given.width // given.heads, dtype=dtype)
    out_gradient = torch.randn_like(q)

    def attend() -> None:
        inputs = [part.detach().requires_grad_() for part in (q, k, v)]
        torch.autograd.grad(F.scaled_dot_product_attention(*inputs), inputs, out_gradient)

    calls.append((given.depth, attend))
    return calls


def fastest(
    first: Callable[[], object] | list[tuple[int, Callable[[], object]]], second: Callable[[], object], *, repeats: int
) -> tuple[float, float]:
    """Seconds of the two, each the fastest of `repeats` runs taken in turns; of a list, the weighted sum."""
    calls = first if isinstance(first, list) else [(1, first)]
    times = [[float("inf")] * (len(calls) + 1)]
    for call in (*(call for _, call in calls), second):
        call()
    for _ in range(repeats):
        times.append([seconds(call) for call in (*(call for _, call in calls), second)])
    best = [min(column) for column in zip(*times, strict=True)]
    return sum(count * t for (count, _), t in zip(calls, best, strict=False)), best[-1]


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def report(what: str, floor: float, ours: float) -> None:
    """One line: the floor, ours, the ratio."""
    print(f"{what}: floor {floor:.3f} s, ours {ours:.3f} s, {ours / floor:.3f} x")


def peak_of_a_step(given: argparse.Namespace) -> int:
    """Bytes that this process has held at most, after one training step on `memory_of` sequences."""
    net = build(given)
    net.checkpoint_activations = given.checkpointed
    given.batch = given.memory_of
    training(net, given)()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_in_a_process(batch: int, checkpointed: bool) -> int:
    """`peak_of_a_step` in a process of its own, with this one's sizes."""
    command = [sys.executable, *sys.argv, "--memory-of", str(batch), *(["--checkpointed"] if checkpointed else [])]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    main()
