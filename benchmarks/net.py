"""How near the transformer is to the machine's limit: its time over the *floor*, in the same run.

The floor is the sum of the matrix products and attention calls of one pass, each timed alone at its own shape; no
implementation that computes them one by one can be faster. The head counts at all positions, so a training step whose
loss needs half of them can come out below 1. Times are medians of runs taken in turns with what they are compared to,
in a process that keeps the memory it frees, as the training script's do. In bfloat16 the floor itself says what there
is to gain: the machine's products, and torch's attention.

Memory is the peak of one training step above what the process held before it, weights and gradients included, in a
process of its own for each batch size; what counts is the growth from one sequence to the next. `tensors` is what the
step needs: there, memory goes back to the system as soon as a tensor is freed. `process` is with the allocator left as
it is: glibc's keeps what is freed in pieces that later tensors do not always fit. It reads /proc: Linux.

    python benchmarks/net.py                       # SEDD-small, 1024 tokens: about 5 minutes on two cores, 5 GB
    python benchmarks/net.py --width 256 --depth 4 --heads 4 --length 256 --states 4096      # in seconds
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from sedd_graphs import Absorbing, LogLinear
from sedd_nets import SEDD
from sedd_objectives import denoising_loss, fused_denoising_loss
from sedd_train.distributed import keep_memory
from torch import Tensor

Call = Callable[[], object]
Weighted = tuple[int, Call]
"""How many times a pass makes a call, and the call."""

START = time.perf_counter()


def main() -> None:
    """Time everything, print it as ratios and keep it as JSON; `--memory-of B` is how the script calls itself."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 768), ("depth", 12), ("heads", 12), ("states", 50258), ("length", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="the median of so many runs counts")
    parser.add_argument("--dropout", type=float, default=0.1, help="in the training step")
    parser.add_argument("--compile-depth", type=int, default=3, help="blocks of the network that is compiled")
    parser.add_argument("--loss", choices=("fused", "where"), default="fused", help="see sedd_objectives")
    parser.add_argument("--parts", default="forward,training,bf16,memory,compile", help="which figures, by comma")
    parser.add_argument("--json", type=Path, default=Path("runs/bench/net.json"))
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--checkpointed", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory_of is not None:
        print(peak_of_a_step(given))
        return
    say(
        f"SEDD {given.depth} x {given.width}, {given.heads} heads, N = {given.states}, L = {given.length}, "
        f"B = {given.batch}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    keep_memory()
    figures: dict[str, float] = {}
    for part in given.parts.split(","):
        figures |= PARTS[part](given)
        given.json.parent.mkdir(parents=True, exist_ok=True)
        sizes = {name: value for name, value in vars(given).items() if isinstance(value, int | float | str)}
        given.json.write_text(json.dumps({"sizes": sizes, "figures": figures}, indent=1))
    say(f"written to {given.json}")


def forward_figures(given: argparse.Namespace) -> dict[str, float]:
    """The float32 forward over its floor."""
    floor, ours = medians(floor_forward(given), [(1, forward(build(given), given))], repeats=given.repeats)
    say(f"forward, fp32: floor {floor:.3f} s, ours {ours:.3f} s, {ours / floor:.3f} x")
    return {"forward_floor_s": floor, "forward_s": ours, "forward_over_floor": ours / floor}


def training_figures(given: argparse.Namespace) -> dict[str, float]:
    """The float32 forward, loss and backward over their floor."""
    floor, ours = medians(floor_training(given), [(1, training(build(given), given))], repeats=given.repeats)
    say(
        f"forward + loss ({given.loss}) + backward, fp32, dropout {given.dropout}: "
        f"floor {floor:.3f} s, ours {ours:.3f} s, {ours / floor:.3f} x"
    )
    return {"training_floor_s": floor, "training_s": ours, "training_over_floor": ours / floor}


def bf16_figures(given: argparse.Namespace) -> dict[str, float]:
    """How much faster bfloat16 autocast is than float32, and how much faster its floor is."""
    net, repeats = build(given), max(1, given.repeats - 2)
    found: dict[str, float] = {}
    for what, make, floor in (("forward", forward, floor_forward), ("training", training, floor_training)):
        fp32, bf16 = medians([(1, make(net, given))], [(1, make(net, given, torch.bfloat16))], repeats=repeats)
        floors = medians(floor(given), floor(given, torch.bfloat16), repeats=repeats)
        say(
            f"{what}, bf16 autocast: {bf16:.3f} s, {fp32 / bf16:.2f} x faster than fp32's {fp32:.3f} s; "
            f"the floor: {floors[1]:.3f} s, {floors[0] / floors[1]:.2f} x faster than fp32's {floors[0]:.3f} s"
        )
        found |= {f"{what}_bf16_s": bf16, f"{what}_bf16_gain": fp32 / bf16}
        found |= {f"{what}_bf16_floor_s": floors[1], f"{what}_bf16_floor_gain": floors[0] / floors[1]}
    return found


def compile_figures(given: argparse.Namespace) -> dict[str, float]:
    """Compiled over eager, of a network of fewer blocks: compilation, unlike the ratio, grows with their number."""
    given = argparse.Namespace(**{**vars(given), "depth": min(given.depth, given.compile_depth)})
    found = {}
    for what, make in (("forward", forward), ("training", training)):
        net, other = build(given), build(given)
        other.hidden = torch.compile(other.hidden, fullgraph=True)  # type: ignore[method-assign]
        eager, ours = medians([(1, make(net, given))], [(1, make(other, given))], repeats=given.repeats)
        say(f"{what}, {given.depth} blocks compiled: {ours:.3f} s, {ours / eager:.3f} x eager's {eager:.3f} s")
        found[f"{what}_compiled_over_eager"] = ours / eager
    return found


def memory_figures(given: argparse.Namespace) -> dict[str, float]:
    """Gigabytes of a training step for each added sequence: of its tensors, and of the process as it usually runs."""
    found = {}
    for checkpointed in (False, True):
        how = "with" if checkpointed else "without"
        for what, allocator in (("tensors", {"MALLOC_MMAP_THRESHOLD_": "1000000"}), ("process", {})):
            one, two = (memory_in_a_process(batch, checkpointed, allocator) for batch in (1, 2))
            say(
                f"memory of a training step {how} activation checkpointing, {what}: "
                f"{(two - one) / 1e9:.3f} GB for each added sequence (1: {one / 1e9:.3f}, 2: {two / 1e9:.3f} GB)"
            )
            found[f"gigabytes_per_sequence_{how}_checkpointing_{what}"] = (two - one) / 1e9
    return found


PARTS = {
    "forward": forward_figures,
    "training": training_figures,
    "bf16": bf16_figures,
    "memory": memory_figures,
    "compile": compile_figures,
}


def build(given: argparse.Namespace) -> SEDD:
    """The network, its zero-initialised parts randomised so that no gradient is trivially zero."""
    torch.manual_seed(0)
    net = SEDD(
        given.states,
        width=given.width,
        depth=given.depth,
        heads=given.heads,
        length=given.length,
        dropout=given.dropout,
        scale_by_sigma=True,
    )
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return net


def forward(net: SEDD, given: argparse.Namespace, dtype: torch.dtype = torch.float32) -> Call:
    """One evaluation of the log-score at all positions, under autocast to `dtype`."""
    x = torch.randint(given.states, (given.batch, given.length))
    sigma = torch.full((given.batch,), 0.7)

    def run() -> None:
        net.eval()
        with torch.no_grad(), autocast(dtype):
            net(x, sigma)

    return run


def training(net: SEDD, given: argparse.Namespace, dtype: torch.dtype = torch.float32) -> Call:
    """The network, the loss where half of the positions are masked, and the gradients of both."""
    loss = loss_of(net, given, dtype)

    def run() -> None:
        net.train()
        net.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]

    return run


def loss_of(net: SEDD, given: argparse.Namespace, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    """The summed loss of a batch of which exactly half of the positions are masked, under autocast to `dtype`."""
    graph, noise = Absorbing(given.states - 1), LogLinear()
    x0 = torch.randint(given.states - 1, (given.batch, given.length))
    masked = torch.rand(given.batch, given.length).argsort(1) < given.length // 2
    xt = x0.masked_fill(masked, graph.mask_id)
    t = torch.full((given.batch,), 0.5)
    sigma, dsigma = noise(t)

    def loss() -> Tensor:
        with autocast(dtype):
            if given.loss == "where":
                return denoising_loss(net, graph, noise, x0, t, xt=xt).sum()
            hidden = net.hidden(xt, sigma)
            return fused_denoising_loss(hidden, net.linear_head(xt, sigma), graph, xt, x0, sigma, dsigma).total

    return loss


def autocast(dtype: torch.dtype) -> torch.autocast:
    """Autocast to bfloat16, or none for float32."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


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


def floor_forward(given: argparse.Namespace, dtype: torch.dtype = torch.float32) -> list[Weighted]:
    """(how many, the call) for every product and attention call of a forward."""
    tokens = given.batch * given.length
    calls: list[Weighted] = []
    for count, size_in, size_out in shapes(given):
        a, w = torch.randn(tokens, size_in).to(dtype), torch.randn(size_out, size_in).to(dtype)
        calls.append((count, partial(torch.mm, a, w.T)))
    q, k, v = torch.randn(3, given.batch, given.heads, given.length, given.width // given.heads).to(dtype)
    calls.append((given.depth, lambda: F.scaled_dot_product_attention(q, k, v)))
    return calls


def floor_training(given: argparse.Namespace, dtype: torch.dtype = torch.float32) -> list[Weighted]:
    """The same for a forward and a backward: three products a linear map, attention with its own backward."""
    tokens = given.batch * given.length
    calls: list[Weighted] = []
    for count, size_in, size_out in shapes(given):
        a, w = torch.randn(tokens, size_in).to(dtype), torch.randn(size_out, size_in).to(dtype)
        g = torch.randn(tokens, size_out).to(dtype)
        calls.append((count, partial(torch.mm, a, w.T)))
        calls.append((count, partial(torch.mm, g, w)))
        calls.append((count, partial(torch.mm, g.T, a)))
    q, k, v = torch.randn(3, given.batch, given.heads, given.length, given.width // given.heads).to(dtype)
    out_gradient = torch.randn_like(q)

    def attend() -> None:
        inputs = [part.detach().requires_grad_() for part in (q, k, v)]
        torch.autograd.grad(F.scaled_dot_product_attention(*inputs), inputs, out_gradient)

    calls.append((given.depth, attend))
    return calls


def medians(first: Sequence[Weighted], second: Sequence[Weighted], *, repeats: int) -> tuple[float, float]:
    """Seconds of the two: of every call the median of `repeats` runs taken in turns, weighted and summed."""
    calls = [*first, *second]
    for _, call in calls:
        call()
    times = [[seconds(call) for _, call in calls] for _ in range(repeats)]
    found = [
        count * statistics.median(column) for (count, _), column in zip(calls, zip(*times, strict=True), strict=True)
    ]
    return sum(found[: len(first)]), sum(found[len(first) :])


def seconds(call: Call) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def say(line: str) -> None:
    """Print at once, with the time since the start."""
    print(f"{time.perf_counter() - START:5.0f} s  {line}", flush=True)


def peak_of_a_step(given: argparse.Namespace) -> int:
    """Bytes that one training step on `memory_of` sequences holds at most, above weights and gradients."""
    net = build(given)
    net.checkpoint_activations = given.checkpointed
    given.batch = given.memory_of
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    loss = loss_of(net.train(), given)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from here on
    loss().backward()  # type: ignore[no-untyped-call]
    return status("VmHWM") - before


def status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def memory_in_a_process(batch: int, checkpointed: bool, allocator: Mapping[str, str]) -> int:
    """`peak_of_a_step` in a process of its own, with this one's sizes and glibc's allocator set as told."""
    command = [sys.executable, *sys.argv, "--memory-of", str(batch), *(["--checkpointed"] if checkpointed else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | allocator)
    return int(done.stdout)


if __name__ == "__main__":
    main()
