"""The fused head and loss against the matrix products it cannot do without, in one run, and the memory it takes.

The floor is the three products of a linear head on the positions that can move: log-scores, gradient by the hidden
states, gradient by the weight. Memory is the process's peak above inputs and gradients, in a process of its own.

    python benchmarks/head_loss.py                                           # SEDD-small's head, half masked
    python benchmarks/head_loss.py --batch 1 --length 128 --states 5000      # in seconds
"""

from __future__ import annotations

import argparse
import ctypes
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from sedd_graphs import Absorbing
from sedd_nets import SEDD
from sedd_objectives import fused_denoising_loss


def main() -> None:
    """Print the ratio of the medians and the memory; `--memory` is how the script calls itself for the latter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 4), ("length", 1024), ("width", 768), ("states", 50258), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    if given.memory:
        print(peak(given))
        return
    ours, products = head_and_loss(given)
    calls = [*products, ours]
    for call in calls:
        call()
    times = [[seconds(call) for call in calls] for _ in range(given.repeats)]
    *floor, fused = (statistics.median(column) for column in zip(*times, strict=True))
    print(
        f"B = {given.batch}, L = {given.length}, width {given.width}, N = {given.states}, half masked, fp32, ", end=""
    )
    print(f"{given.threads} threads, torch {torch.__version__}")
    print("three products: " + " + ".join(f"{t:.3f}" for t in floor) + f" = {sum(floor):.3f} s")
    print(f"head + loss, forward + backward: {fused:.3f} s, {fused / sum(floor):.3f} x the products")
    command = [sys.executable, *sys.argv, "--memory"]
    memory = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    plain = given.batch * given.length * given.states * 4
    print(
        f"peak memory above inputs and gradients: {memory / 1e6:.0f} MB; all log-scores once are {plain / 1e6:.0f} MB"
    )


def head_and_loss(given: argparse.Namespace) -> tuple[Callable[[], None], list[Callable[[], object]]]:
    """The fused loss, forward and backward; and the three products of the masked half."""
    net = SEDD(given.states, width=given.width, depth=1, heads=max(1, given.width // 64), scale_by_sigma=True)
    linear = net.output_layer.linear
    torch.nn.init.normal_(linear.weight, std=0.02)
    graph = Absorbing(given.states - 1)
    x0 = torch.randint(given.states - 1, (given.batch, given.length))
    masked = torch.rand(given.batch, given.length).argsort(1) < given.length // 2
    x = x0.masked_fill(masked, graph.mask_id)
    sigma, dsigma = torch.full((given.batch,), 0.7), torch.ones(given.batch)
    hidden = torch.randn(given.batch, given.length, given.width, requires_grad=True)

    def ours() -> None:
        hidden.grad = None
        net.zero_grad()
        fused_denoising_loss(hidden, net.linear_head(x, sigma), graph, x, x0, sigma, dsigma).total.backward()

    if given.memory:
        return ours, []
    rows, weight = hidden.detach()[masked], linear.weight.detach()
    slopes = torch.randn(len(rows), given.states)
    return ours, [lambda: rows @ weight.T, lambda: slopes @ weight, lambda: slopes.T @ rows]


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak(given: argparse.Namespace) -> int:
    """Bytes at the peak of a call, above what is there when the gradients are but nothing else of the call."""
    ours, _ = head_and_loss(given)
    ours()  # leaves the gradients; the next call frees them and makes them again
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    ours()
    return status("VmHWM") - before


def status(field: str) -> int:
    """A figure of this process from the kernel, in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


if __name__ == "__main__":
    main()
