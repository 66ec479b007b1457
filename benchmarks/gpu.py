"""All that a GPU can show, in some four minutes on one card: that CUDA gives the CPU's numbers, then a table.

Checks: losses and gradients of every graph, the draws, the network and whole samples on the device against the CPU;
compiled steps at every ZeRO stage against one as written; a run that is continued against one that was not stopped.
Each part ends when its time is up, so that all of them take less than four minutes (`LIMITS`).
Table: a training step beside the matrix products and attention calls alone that it cannot do without (the floor), head
and loss, memory, sampling, and the training script end to end, stopped and continued. Products and network run in
bfloat16 autocast, everything after the head in float32. What fails is told in its row, and the rest goes on.

    python benchmarks/gpu.py                         # one card; writes gpu.json
    python benchmarks/gpu.py --device cpu --small    # every part at tiny sizes: kernels in Triton's interpreter
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

if "--small" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

import torch
from sedd_graphs import (
    Absorbing,
    Clustered,
    Dense,
    Geometric,
    Hybrid,
    LogLinear,
    Masked,
    Neighbours,
    Ordinal,
    PacedAbsorbing,
    Uniform,
)
from sedd_nets import SEDD, CapturedNetwork
from sedd_objectives import fused_cross_entropy_loss, fused_denoising_loss
from sedd_objectives.fast import fused
from sedd_samplers import Reverse, Tweedie, sample
from sedd_samplers.randomness import uniforms
from sedd_train import distributed, recipes, train
from sedd_train.engine import Batch, Loss, compile_network, launch_step, start_engine
from sedd_train.objectives import ScoreEntropy
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "integration" / "train_owt.py"
LIMITS = {  # seconds, 236 in all
    "losses": 18,
    "network": 8,
    "samples": 6,
    "waiting": 16,
    "zero": 32,
    "floor": 3,
    "training": 8,
    "compiled": 30,
    "head_and_loss": 3,
    "sampling": 24,
    "trainer": 88,
}


BY_HAND = "a whole step by hand: blocks compiled, clipped, AdamW, moving average"


@dataclass
class Run:
    """Sizes of the run, and what it has found."""

    device: torch.device
    small: bool
    checks: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def sizes(self) -> dict[str, Any]:
        """Those of SEDD small, or tiny ones."""
        if self.small:
            return {"num_states": 130, "width": 64, "depth": 2, "heads": 2, "length": 32, "dropout": 0.1}
        return {"num_states": 50_258, "width": 768, "depth": 12, "heads": 12, "length": 1024, "dropout": 0.1}

    @property
    def batch(self) -> int:
        """Sequences of a training step."""
        return 2 if self.small else 32

    @property
    def rounds(self) -> int:
        """Calls in a row that is timed."""
        return 1 if self.small else 6

    def check(self, name: str, error: float, allowed: float) -> None:
        """Tell a difference between the device and the CPU."""
        right = error <= allowed
        self.checks.append({"check": name, "error": error, "allowed": allowed, "right": right})
        print(f"{'ok' if right else 'WRONG':5} {name}: {error:.2g} (at most {allowed:.2g})", flush=True)

    def row(self, name: str, value: float | str, unit: str = "", goal: str = "") -> None:
        """Tell a line of the table."""
        self.rows.append({"row": name, "value": value, "unit": unit, "goal": goal})
        said = value if isinstance(value, str) else f"{value:,.4g}"
        print(f"{name}: {said} {unit}{f'  (goal {goal})' if goal else ''}", flush=True)


def main() -> int:
    """Run all parts; 1 if a check is wrong or a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="(default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), help="(default: %(default)s)")
    parts = (losses, network, samples, waiting, zero, floor, training, compiled, head_and_loss, sampling, trainer)
    names = [part.__name__ for part in parts]
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART", help="(default: all)")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("there is no GPU here; python benchmarks/gpu.py --device cpu --small tries every part without one")
        return 1
    run = Run(torch.device(given.device), given.small)
    print(f"{card(run)}, torch {torch.__version__}, CUDA {torch.version.cuda}\n", flush=True)
    started, failed = time.perf_counter(), []
    distributed.start()  # once: DeepSpeed keeps the group that it first met
    with as_on_a_gpu(run):
        for part in parts:
            if part.__name__ not in given.parts:
                continue
            start = time.perf_counter()
            try:
                with at_most(LIMITS[part.__name__] * (20 if run.small else 1)):
                    part(run)
            except Exception as error:
                failed.append(part.__name__)
                traceback.print_exc()
                run.row(part.__name__, f"failed: {type(error).__name__}: {error}".splitlines()[0])
            print(f"  [{part.__name__}: {time.perf_counter() - start:.0f} s]\n", flush=True)
            if run.device.type == "cuda":
                torch.cuda.empty_cache()
    torch.distributed.destroy_process_group()
    seconds = time.perf_counter() - started
    told = {"card": card(run), "torch": torch.__version__, "cuda": torch.version.cuda, "small": run.small}
    told |= {"seconds": round(seconds), "failed": failed, "checks": run.checks, "rows": run.rows}
    given.output.write_text(json.dumps(told, indent=1) + "\n")
    table(run)
    wrong = [check["check"] for check in run.checks if not check["right"]]
    print(f"{seconds:.0f} s; {len(run.checks)} checks, wrong: {wrong or 'none'}; failed: {failed or 'none'}")
    return 1 if wrong or failed else 0


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """TimeoutError inside when the time is up."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def card(run: Run) -> str:
    """What the numbers are of."""
    if run.device.type == "cuda":
        return torch.cuda.get_device_name()
    return "no GPU: a trial of this script, its times mean nothing"


@contextlib.contextmanager
def as_on_a_gpu(run: Run) -> Iterator[None]:
    """Without a GPU the loss goes a GPU's way all the same."""
    if run.device.type == "cuda":
        yield
        return
    with mock.patch.object(fused, "kernel_serves", lambda hidden, dtype, *_: dtype == torch.float32):
        yield


def table(run: Run) -> None:
    """The rows, as Markdown."""
    print(f"\n| {card(run)} | | goal |\n|---|---:|---:|")
    for row in run.rows:
        value = row["value"] if isinstance(row["value"], str) else f"{row['value']:,.4g} {row['unit']}"
        print(f"| {row['row']} | {value} | {row['goal']} |")
    print()


# Checks


def losses(run: Run) -> None:
    """Head and loss, float32 and under autocast, on the device against float64 on the CPU."""
    n, width, length = (40, 16, 5) if run.small else (3001, 64, 17)
    few = 30 if run.small else 300
    generator = torch.Generator().manual_seed(0)
    q = torch.rand(few, few, generator=generator, dtype=torch.float64).fill_diagonal_(0) / few
    nearest = (torch.arange(few)[:, None] + torch.tensor([1, 2, 5])) % few
    clustered = Clustered(torch.arange(few) % 4, within=2.0, between=0.5)
    graphs = {
        "absorbing": Absorbing(n - 1),
        "absorbing, the mask in the middle": Absorbing(n - 1, mask_id=n // 2),
        "absorbing, each token at its own rate": PacedAbsorbing(torch.linspace(0.5, 2.0, n - 1)),
        "uniform": Uniform(n),
        "hybrid": Hybrid(n - 1, uniform_rate=0.4, mask_rate=0.7),
        "clustered": clustered,
        "clustered and masked": Masked(clustered),
        "neighbours": Neighbours(nearest),
        "ordinal": Ordinal(few),
        "ordinal, 30 states": Ordinal(30),
        "dense": Dense(q - torch.diag(q.sum(0))),
    }
    for name, graph in graphs.items():
        x0 = torch.randint(graph.num_states - 1, (3, length), generator=generator)
        if graph.mask_id is not None:
            x0 += (x0 >= graph.mask_id).long()
        sigma, dsigma = torch.tensor([0.1, 1.0, 3.0]), torch.tensor([1.0, 2.0, 0.5])
        x = graph.sample(x0, sigma, generator=generator)
        leaves = [
            torch.randn(shape, generator=generator).bfloat16().float() / 4
            for shape in ((3, length, width), (graph.num_states, width), (graph.num_states,))
        ]
        expected = loss_and_gradients(leaves, graph, x, x0, sigma, dsigma, torch.device("cpu"), torch.float64)
        for precision, dtype, allowed in (
            ("float32", None, 2e-5),
            ("float16", torch.float16, 4e-3),
            ("bfloat16", torch.bfloat16, 2e-2),
        ):
            if name == "ordinal" and dtype == torch.float16:
                continue  # rates of 9,000: float16 does not hold their slopes
            with torch.autocast(run.device.type, dtype, enabled=dtype is not None):
                found = loss_and_gradients(leaves, graph, x, x0, sigma, dsigma, run.device, torch.float32)
            for what, one, other in zip(("loss", "by hidden", "by weight", "by bias"), found, expected, strict=True):
                run.check(f"{name}, {precision}: {what}", distance(one, other), allowed)
    cross_entropies(run)


def loss_and_gradients(
    leaves: list[Tensor],
    graph: Any,
    x: Tensor,
    x0: Tensor,
    sigma: Tensor,
    dsigma: Tensor,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Each sequence's loss, and the gradients by hidden states, weight and bias."""
    hidden, weight, bias = (leaf.to(device, dtype).requires_grad_() for leaf in leaves)
    sigma, dsigma = sigma.to(device, dtype), dsigma.to(device, dtype)
    head = Linear(weight, bias, -sigma.expm1().log())
    loss = fused_denoising_loss(hidden, head, graph, x.to(device), x0.to(device), sigma, dsigma)
    return [loss.per_sequence, *torch.autograd.grad(loss.total, (hidden, weight, bias))]


def cross_entropies(run: Run) -> None:
    """The same of a network of the clean token, whose loss is a cross-entropy: a second kernel."""
    n, width = (40, 16) if run.small else (3001, 64)
    generator, graph = torch.Generator().manual_seed(0), Absorbing(n - 1)
    x0 = torch.randint(n - 1, (3, 17), generator=generator)
    sigma, dsigma = torch.tensor([0.1, 1.0, 3.0]), torch.tensor([1.0, 2.0, 0.5])
    x = graph.sample(x0, sigma, generator=generator)
    shapes = ((3, 17, width), (n, width), (n,))
    leaves = [torch.randn(shape, generator=generator).bfloat16().float() / 4 for shape in shapes]
    found = []
    for device, dtype in ((torch.device("cpu"), torch.float64), (run.device, torch.float32)):
        hidden, weight, bias = (leaf.to(device, dtype).requires_grad_() for leaf in leaves)
        noise = sigma.to(device, dtype), dsigma.to(device, dtype)
        loss = fused_cross_entropy_loss(hidden, Linear(weight, bias, None), graph, x.to(device), x0.to(device), *noise)
        found.append([loss.per_sequence, *torch.autograd.grad(loss.total, (hidden, weight, bias))])
    for what, expected, one in zip(("loss", "by hidden", "by weight", "by bias"), *found, strict=True):
        run.check(f"cross-entropy, float32: {what}", distance(one, expected), 2e-5)


@dataclass
class Linear:
    """A linear head."""

    weight: Tensor
    bias: Tensor | None
    shift: Tensor | None


def network(run: Run) -> None:
    """The network's log-scores on the device against the CPU's."""
    net, x, sigma = a_network(run, run.sizes | {"dropout": 0.0}), *a_noised_batch(run, 2)
    with torch.no_grad():
        expected = net.cpu()(x.cpu()[:, :128], sigma.cpu())
        net.to(run.device)
        run.check("network, float32", distance(net(x[:, :128], sigma), expected), 1e-4)
        with torch.autocast(run.device.type, torch.bfloat16):
            run.check("network, bfloat16", distance(net(x[:, :128], sigma), expected), 3e-2)
            captured, plain = CapturedNetwork(net), net(x[:, :128], sigma)
            for call in ("first", "second"):
                found = captured(x[:, :128], sigma)
                run.check(f"captured network, bfloat16, {call} call", distance(found, plain), 1e-3)
                captured(x[:, :128].flip(0), sigma.flip(0))  # another batch in between


def samples(run: Run) -> None:
    """Draws by the kernel against plain ones, and the same seeds' samples on both."""
    from sedd_samplers.fast.draw_kernel import draw_moves

    generator = torch.Generator().manual_seed(0)
    n, rows = (200, 8) if run.small else (50_258, 512)
    log_score = (2 * torch.randn(rows, n, generator=generator)).bfloat16()
    x, uniform = torch.full((rows,), n - 1), torch.rand(rows, dtype=torch.float64, generator=generator)
    weight = Absorbing(n - 1).rates_into(x)
    weight = weight.scale(torch.full((rows,), 0.9 / n / 7.4))
    law = log_score.double().exp() * float(weight.base[0])
    law[:, -1] = 0
    law[:, -1] = (1 - law.sum(-1)).clamp_min(0)
    cumulative = F.pad(law.cumsum(1), (1, 0))
    target = uniform * cumulative[:, -1]
    arguments = (log_score.to(run.device), x.to(run.device), weight_on(weight, run.device))
    drawn = draw_moves(*arguments, lambda leaving: (1 - leaving).clamp_min(0), uniform.to(run.device))
    state = drawn.state.cpu()[:, None]
    below, above = cumulative.gather(1, state)[:, 0], cumulative.gather(1, state + 1)[:, 0]
    apart = torch.maximum(below - target, target - above) / cumulative[:, -1]
    between = float(apart.clamp_min(0).max())
    run.check("draws by the kernel: mass between the uniform number and its state", between, 1e-6)
    run.check("draws by the kernel: states without a mass", float((above == below).double().mean()), 0.0)
    words = torch.randint(-(2**63), 2**63 - 1, (3, 10_000), generator=generator)
    ours, theirs = uniforms(*words), uniforms(*words.to(run.device)).cpu()
    run.check("uniform numbers: share that differs", float((ours != theirs).double().mean()), 0.0)

    torch.manual_seed(0)
    graph = Uniform(12)
    net = SEDD(12, width=32, depth=1, heads=2, length=16, dropout=0.0, scale_by_sigma=False).eval()
    nn.init.normal_(net.output_layer.linear.weight, std=0.3)
    seeds = torch.arange(16)
    how = {"shape": (16, 16), "steps": 8, "seeds": seeds}
    with torch.no_grad():
        ours = sample(net, graph, Geometric(), device="cpu", **how)
        theirs = sample(
            net.to(run.device), graph, Geometric(), device=run.device, **(how | {"seeds": seeds.to(run.device)})
        )
    run.check(
        "samples of the same seeds: share of tokens that differ", float((ours != theirs.cpu()).double().mean()), 0.01
    )


def weight_on(row: Any, device: torch.device) -> Any:
    """A row on the device."""
    return type(row)(row.base.to(device), row.index.to(device), row.value.to(device), row.num_states)


# The table


def waiting(run: Run) -> None:
    """How often a step waits for the device: of a run, DeepSpeed's own included, and of a sampler."""
    loss, batch = a_training_step(run)
    for stage in (0, 1):  # of one rank, and of several
        a_step_waits(run, copy.deepcopy(loss), batch, stage)
    step_of_sampler = a_sampling_step(run, 2, half=True)
    step_of_sampler()
    run.row("reads back to the host, a sampling step", reads(run, step_of_sampler), goal="<= 1")


def a_step_waits(run: Run, loss: Loss, batch: Batch, stage: int) -> None:
    """Of one stage."""
    engine, launched = start_engine(loss, batch_size=run.batch, micro_batches=1, stage=stage, precision="bf16"), []

    def step() -> None:
        launched.append(launch_step(engine, [batch], 1e-4))

    step()
    step()
    found = reads(run, step)
    late = found if isinstance(found, str) else found + 1  # its numbers, which are read while the next one computes
    run.row(f"reads back to the host, a training step, ZeRO {stage}", late, goal="<= 1")
    run.check(f"a launched step is not applied, ZeRO {stage}", float(not launched[-1].read().applied), 0.0)
    engine.destroy()


def reads(run: Run, call: Callable[[], object]) -> float | str:
    """The synchronising calls that torch sees."""
    if run.device.type != "cuda":
        call()
        return "not seen without a GPU"
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [str(warning.message) for warning in seen if "synchroniz" in str(warning.message)]
    for where in sorted({f"{Path(w.filename).name}:{w.lineno}" for w in seen if "synchroniz" in str(w.message)}):
        print(f"  waits at {where}")
    return float(len(found))


def zero(run: Run) -> None:
    """Three steps of a small network, compiled, at every ZeRO stage and with activation checkpointing."""
    small = {"num_states": 130, "width": 64, "depth": 2, "heads": 2, "length": 32, "dropout": 0.1}
    sizes = small if run.small else small | {"num_states": 5003, "width": 256, "heads": 4, "length": 256}
    expected = three_steps(run, sizes, 0, compiled=False, checkpointed=False)
    for stage in range(4):
        for checkpointed in (False, True):
            found = three_steps(run, sizes, stage, compiled=True, checkpointed=checkpointed)
            name = f"ZeRO {stage}, compiled{', checkpointed' if checkpointed else ''}: three steps' losses"
            run.check(name, distance(torch.tensor(found), torch.tensor(expected)), 1e-4)


def three_steps(run: Run, sizes: dict[str, Any], stage: int, *, compiled: bool, checkpointed: bool) -> list[float]:
    """The losses."""
    torch.manual_seed(1)
    loss, batch = a_training_step(run, sizes, 8)
    net: Any = loss.net
    net.checkpoint_activations = checkpointed
    if compiled:
        compile_network(net, stage)
    engine = start_engine(loss, batch_size=8, micro_batches=1, stage=stage, precision="bf16")
    found = [launch_step(engine, [batch], 1e-3).read().loss for _ in range(3)]
    engine.destroy()
    return found


def floor(run: Run) -> None:
    """The products and the attention of a training step, one by one."""
    sizes, tokens = run.sizes, run.batch * run.sizes["length"]
    width, depth, heads = sizes["width"], sizes["depth"], sizes["heads"]
    rows, states = tokens // 2, -(-sizes["num_states"] // 64) * 64
    trunk = sum(products(run, tokens, a, b) for a, b in ((width, 3 * width), (width, width), (width, 4 * width)))
    trunk += products(run, tokens, 4 * width, width)
    q, k, v = (random(run, run.batch, heads, sizes["length"], width // heads).requires_grad_() for _ in range(3))
    slope = random(run, run.batch, heads, sizes["length"], width // heads)

    def attend() -> None:
        F.scaled_dot_product_attention(q, k, v).backward(slope)

    trunk = depth * (trunk + seconds(run, attend))
    head = products(run, rows, width, states)
    run.row("floor: products and attention of the trunk alone", 1e3 * trunk, "ms")
    run.row("floor: the head's three products, half of the positions", 1e3 * head, "ms")
    run.row("floor: a training step", tokens / (trunk + head), "tokens/s")


def products(run: Run, rows: int, inputs: int, outputs: int) -> float:
    """Seconds of a linear layer's three products."""
    x, w, y = random(run, rows, inputs), random(run, outputs, inputs), random(run, rows, outputs)
    return seconds(run, lambda: x @ w.T) + seconds(run, lambda: y @ w) + seconds(run, lambda: y.T @ x)


def training(run: Run) -> None:
    """A training step, not compiled."""
    step(run, "training step, eager", *a_training_step(run))


def compiled(run: Run) -> None:
    """A training step with its blocks compiled one by one."""
    loss, batch = a_training_step(run)
    net: Any = loss.net
    net.compile_blocks()
    start = time.perf_counter()
    forward_and_backward(run, loss, batch)
    synchronize(run)
    run.row("start of a compiled run: the first step", time.perf_counter() - start, "s", "<= 60")
    step(run, "training step, blocks compiled", loss, batch, ">= 450,000")
    found = seconds(run, updated_by_hand(run, loss, batch))
    run.row(f"{BY_HAND}, B = {run.batch}", 1e3 * found, "ms")
    run.row(BY_HAND, run.batch * run.sizes["length"] / found, "tokens/s")


def updated_by_hand(run: Run, loss: Loss, batch: Batch) -> Callable[[], None]:
    """A whole step as one writes it: gradient, clipping, fused AdamW and the moving average."""
    weights = list(loss.parameters())
    optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=True)
    averages = [weight.detach().clone() for weight in weights]

    def call() -> None:
        optimizer.zero_grad()
        forward_and_backward(run, loss, batch)
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        torch._foreach_lerp_(averages, [weight.detach() for weight in weights], 1e-4)

    return call


def step(run: Run, name: str, loss: Loss, batch: Batch, goal: str = "") -> None:
    """Forward, loss and backward: tokens a second, and the memory beside the weights."""

    def call() -> None:
        loss.zero_grad()
        forward_and_backward(run, loss, batch)

    call()
    loss.zero_grad()
    before = memory(run)
    found = seconds(run, call)
    run.row(f"{name}, B = {run.batch}", 1e3 * found, "ms")
    run.row(f"{name}, B = {run.batch}", run.batch * run.sizes["length"] / found, "tokens/s", goal)
    run.row(f"{name}: peak memory above weights", (peak(run) - before) / 1e9, "GB", "<= 10")


def head_and_loss(run: Run) -> None:
    """From the hidden states to their gradient and the head's."""
    n, length = run.sizes["num_states"], run.sizes["length"]
    one_head_and_loss(
        run, "absorb, half of the positions", Absorbing(n - 1), (run.batch, length), "<= 16 at 16,384 rows", ""
    )
    one_head_and_loss(run, "uniform", Uniform(n), (max(1, run.batch // 4), length), "", "<= 1.1")


def one_head_and_loss(run: Run, name: str, graph: Any, shape: tuple[int, int], goal: str, goal_a_row: str) -> None:
    """Of one graph."""
    n, width = run.sizes["num_states"], run.sizes["width"]
    hidden = random(run, *shape, width).requires_grad_()
    weight = (random(run, n, width).float() / 30).requires_grad_()
    bias = torch.zeros(n, device=run.device, requires_grad=True)
    x0 = torch.randint(n - 1, shape, device=run.device)
    half = torch.rand(shape, device=run.device).argsort(1) < shape[1] // 2
    x = torch.where(half, n - 1, x0)
    sigma = torch.full(shape[:1], 0.7, device=run.device)
    head = Linear(weight, bias, -sigma.expm1().log() if graph.mask_id is not None else None)

    def call() -> None:
        hidden.grad = weight.grad = bias.grad = None
        with torch.autocast(run.device.type, torch.bfloat16):
            loss = fused_denoising_loss(hidden, head, graph, x, x0, sigma, sigma, refuse_nan=False)
        loss.total.backward()

    call()
    hidden.grad = weight.grad = bias.grad = None
    before, found = memory(run), seconds(run, call)
    rows = int(half.sum()) if graph.mask_id is not None else x.numel()
    run.row(f"head + loss, {name}, {rows:,} rows", 1e3 * found, "ms", goal)
    run.row(f"head + loss, {name}, a row", 1e6 * found / rows, "us", goal_a_row)
    run.row(f"head + loss, {name}: peak memory", (peak(run) - before) / 1e9, "GB")


def sampling(run: Run) -> None:
    """Steps of Tweedie tau-leaping: the network as written, its blocks compiled, its trunk one CUDA graph."""
    many = 4 if run.small else 64
    all_masked, half_masked, one = "B = 8, all masked", f"B = {many}, half masked", "B = 1, all masked"
    ways: list[tuple[str, int, dict[str, bool], str]] = [
        (all_masked, 8, {"half": False}, ""),
        (f"{all_masked}, blocks compiled", 8, {"half": False, "blocks": True}, ""),
        (f"{all_masked}, compiled and captured", 8, {"half": False, "blocks": True, "capture": True}, "<= 8"),
        (f"{half_masked}, compiled and captured", many, {"half": True, "blocks": True, "capture": True}, "<= 45"),
        (f"{one}, compiled and captured", 1, {"half": False, "blocks": True, "capture": True}, "<= 4"),
    ]
    for name, size, how, goal in ways:
        call = a_sampling_step(run, size, **how)
        call()
        before = memory(run)
        run.row(f"Tweedie, {name}, a step", 1e3 * seconds(run, call), "ms", goal)
        run.row(f"Tweedie, {name}: peak memory", (peak(run) - before) / 1e9, "GB")


def a_sampling_step(
    run: Run, size: int, *, half: bool, blocks: bool = False, capture: bool = False
) -> Callable[[], Tensor]:
    """One step from a batch whose positions are all masks, or half of them."""
    net = a_network(run, run.sizes | {"dropout": 0.0})
    if blocks:
        net.compile_blocks()
    model = CapturedNetwork(net) if capture else net
    graph, noise = Absorbing(net.num_states - 1), LogLinear()
    shape = size, run.sizes["length"]
    frozen = (
        torch.rand(shape, device=run.device) < 0.5 if half else torch.zeros(shape, dtype=torch.bool, device=run.device)
    )
    x = torch.where(frozen, torch.randint(net.num_states - 1, shape, device=run.device), net.num_states - 1)

    def score(x: Tensor, sigma: Tensor, positions: Tensor, apart: bool = False) -> Any:
        with torch.autocast(run.device.type, torch.bfloat16):
            return model(x, sigma, positions=positions, apart=apart)

    reverse = Reverse(score, graph, noise, frozen=frozen, seeds=torch.arange(size, device=run.device))
    t = torch.full((size,), 0.6, dtype=torch.float64, device=run.device)

    def call() -> Tensor:
        with torch.no_grad():
            return Tweedie()(reverse, x, t, t - 1 / 1024)

    return call


def trainer(run: Run) -> None:
    """The training script on one rank: its speed; and a run that is stopped and continued."""
    with tempfile.TemporaryDirectory() as name:
        folder, text = Path(name), Path(name, "text.md")  # this project's own: nothing has to be fetched
        text.write_text("\n".join(path.read_text() for path in sorted(ROOT.rglob("*.md")) if ".nox" not in path.parts))
        few: dict[str, Any] = {"evaluate_blocks": 2, "evaluate_times": 2, "sample_steps": 2, "log_every": 1}
        few |= {"corpus": str(text)}
        if run.small:
            few |= {"width": 32, "depth": 1, "heads": 2, "length": 64, "batch_size": 2}
        trainer_s_speed(run, folder, few)
        continued(run, folder, few)


def trainer_s_speed(run: Run, folder: Path, few: dict[str, Any]) -> None:
    """The paper's recipe at this batch, started as it is by its users."""
    full = ["--recipe", "sedd-small-absorb-owt", "--batch-size", str(run.batch), "--micro-batch-size", "0"]
    full = ["--recipe", "tiny", "--tokenizer", "bytes"] if run.small else full  # compiled where there is a GPU
    given = [word for name, value in few.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    out = folder / "full"
    place = ["--cache", str(folder / "cache"), "--output", str(out), "--no-tensorboard"]
    try:
        script(run, *full, *given, *place, "--steps", "24")
    finally:  # also where the time was up while it saved
        told_of_speed(run, out / "log.jsonl")


def told_of_speed(run: Run, log: Path) -> None:
    """What a run's log says of its steps, but for the first eight."""
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    lines = [line for line in lines if line["kind"] == "train"][8:]
    if not lines:
        return
    speed = statistics.median(line["tokens_per_second"] for line in lines)
    run.row(f"train_owt.py, one rank, compiled, B = {run.batch}", speed, "tokens/s")
    by_hand = (row["value"] for row in run.rows if row["row"] == BY_HAND)
    if value := next(by_hand, None):
        run.row("train_owt.py over the same step by hand", value / speed, "x", "<= 1.03")
    waited = statistics.median(line["waited_for_data"] for line in lines)
    run.row("train_owt.py: share of a step spent waiting for data", waited)


def continued(run: Run, folder: Path, few: dict[str, Any]) -> None:
    """Six steps, and six of which the last three are taken by a run that continues."""
    how = few | {"tokenizer": "bytes", "compile": False, "steps": 6, "checkpoint_every": 3, "keep": 2}
    recipe = recipes.override(recipes.read_recipe("tiny"), how)
    whole, resumed, cache = folder / "whole", folder / "resumed", folder / "cache"
    train(recipe, output=whole, cache=cache, tensorboard=False)
    shutil.copytree(whole, resumed)
    shutil.rmtree(max((resumed / "checkpoints").glob("step-*"), key=lambda path: path.name))
    shutil.rmtree(resumed / "export")
    train(recipe, output=resumed, cache=cache, resume=True, tensorboard=False)
    first, second = (output / "export" / "model.safetensors" for output in (whole, resumed))
    same = first.read_bytes() == second.read_bytes()
    run.check("a run continued from its middle ends in other weights", float(not same), 0.0)


def script(run: Run, *options: str) -> None:
    """Run train_owt.py; what it says is told where it fails."""
    own = ("TRITON_INTERPRET", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in own}
    if run.device.type != "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, str(TRAIN), *options]
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as told:
        try:
            subprocess.run(command, stdout=told, stderr=subprocess.STDOUT, env=environment, check=True)
        except (subprocess.CalledProcessError, TimeoutError):
            told.seek(0)
            print(f"{' '.join(command)} after {time.perf_counter() - start:.0f} s:\n{told.read()[-4000:]}")
            raise
    print(f"  {' '.join(command[1:])[-60:]}: {time.perf_counter() - start:.0f} s", flush=True)


# What the parts share


def a_network(run: Run, sizes: dict[str, Any]) -> Any:
    """SEDD with a random head, the same every time."""
    torch.manual_seed(0)
    net = SEDD(**sizes, scale_by_sigma=True)
    nn.init.normal_(net.output_layer.linear.weight, std=0.02)
    return net.to(run.device).train(sizes["dropout"] > 0)


def a_noised_batch(run: Run, size: int) -> tuple[Tensor, Tensor]:
    """States, half of them masks on average, and their noise."""
    n = run.sizes["num_states"]
    x0 = torch.randint(n - 1, (size, run.sizes["length"]), device=run.device)
    sigma = torch.full((size,), 0.7, device=run.device)
    return Absorbing(n - 1).sample(x0, sigma), sigma


def a_training_step(run: Run, sizes: dict[str, Any] | None = None, size: int | None = None) -> tuple[Loss, Batch]:
    """The module that is trained, and a batch; of other sizes than the run's if they are given."""
    sizes, size = sizes or run.sizes, size or run.batch
    n = sizes["num_states"]
    graph, noise = Absorbing(n - 1), LogLinear()
    x0 = torch.randint(n - 1, (size, sizes["length"]), device=run.device)
    t = (torch.arange(size, device=run.device) + 0.5) / size
    xt = graph.sample(x0, noise(t)[0])
    seeds = torch.arange(size, device=run.device)
    objective = ScoreEntropy(graph, noise)
    batch = (x0, xt, t, seeds, None, objective.positions(xt))
    return Loss(a_network(run, sizes), objective), batch


def forward_and_backward(run: Run, loss: Loss, batch: Batch) -> None:
    """One call."""
    with torch.autocast(run.device.type, torch.bfloat16):
        mean, _ = loss(*batch)
    mean.backward()


def random(run: Run, *shape: int) -> Tensor:
    """Normal numbers in bfloat16."""
    return torch.randn(*shape, device=run.device).bfloat16()


def distance(one: Tensor, other: Tensor) -> float:
    """Of two arrays, as a share of the second's length."""
    one, other = one.detach().cpu().double(), other.detach().cpu().double()
    return float((one - other).norm() / other.norm())


def seconds(run: Run, call: Callable[[], object]) -> float:
    """Of one call in a row of them, as a run makes them: the median of three rows, after a call or two."""
    for _ in range(2):
        call()
    synchronize(run)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(run.rounds):
            call()
        synchronize(run)
        times.append((time.perf_counter() - start) / run.rounds)
    return statistics.median(times)


def synchronize(run: Run) -> None:
    """Wait for the device."""
    if run.device.type == "cuda":
        torch.cuda.synchronize()


def memory(run: Run) -> int:
    """Bytes of tensors on the device."""
    return torch.cuda.memory_allocated() if run.device.type == "cuda" else 0


def peak(run: Run) -> int:
    """The most there have been in the calls that were timed last."""
    return torch.cuda.max_memory_allocated() if run.device.type == "cuda" else 0


if __name__ == "__main__":
    sys.exit(main())
