"""What DeepSpeed's engine adds to a training step: the step through it over the same step written by hand, in one run.

By hand means the same network and loss, torch's fused AdamW and clipping, and nothing else. It and the engine of each
ZeRO stage take their steps in turns, on one rank, the order changing from round to round; a ratio is the median over
rounds. The engine's own work (flat copies of gradients and weights, buckets, norms) grows with the parameters, the
network's with parameters and tokens: so the ratio falls with the batch. What each moves is counted beside its time:
on a GPU the update is bound by that. (A run on one rank is at stage 0, whatever its recipe says.)

The training loop's whole step, with its data, moving average and log, is taken in turns with the same whole step by
hand. The training script itself runs, too, and its log says which share of a step was spent waiting for data.

    python benchmarks/step.py                                    # 26 M parameters: about 8 minutes on two cores
    python benchmarks/step.py --width 128 --depth 2 --rounds 3   # in seconds
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from sedd_graphs import Absorbing, LogLinear
from sedd_nets import SEDD
from sedd_train import distributed, recipes, training
from sedd_train.engine import Batch, Loss, launch_step, start_engine, train_step
from sedd_train.objectives import ScoreEntropy
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

STATES = 4097
TRAIN = Path(__file__).parents[1] / "integration" / "train_owt.py"


def main() -> None:
    """Print the ratios of the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 512), ("depth", 6), ("length", 256), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 32], metavar="B", help="sequences a step")
    given = parser.parse_args()
    waited = waiting(given)  # first: this process is yet in nobody's world
    distributed.start()
    parameters = sum(p.numel() for p in network(given).parameters())
    print(
        f"SEDD {given.depth} x {given.width}, {parameters / 1e6:.1f} M parameters, N = {STATES}, L = {given.length}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    wall, processor = the_loop(given)
    print(f"the loop's whole step over the same by hand: {wall:.3f} x, by processor time {processor:.3f} x")
    steps = {"by hand": by_hand(a_loss(given))} | {f"ZeRO {stage}": by_engine(given, stage) for stage in range(4)}
    for size in given.batches:
        times = in_turns(steps, size, given)
        for name, found in times.items():
            ratios = [a / b for a, b in zip(found, times["by hand"], strict=True)]
            with Moved() as moved:
                steps[name](draw(given, size, 0))
            print(
                f"B = {size}, {name}: {statistics.median(found):.3f} s, {statistics.median(ratios):.3f} x; "
                f"{moved.bytes / 1e9:.2f} GB given to and by {moved.operations} operations"
            )
    print(f"waiting for data in train_owt.py: {waited:.2%} of a step, median")
    torch.distributed.destroy_process_group()


class Moved(TorchDispatchMode):
    """Operations that compute or copy, and the bytes of the tensors that they are given and give."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.bytes = 0, 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operation(*args, **(kwargs or {}))
        if not operation.is_view and "empty" not in operation.overloadpacket.__name__:
            self.operations += 1
            self.bytes += sum(t.nbytes for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor))
        return out


def network(given: argparse.Namespace) -> SEDD:
    """The same network every time."""
    torch.manual_seed(0)
    sizes = {"width": given.width, "depth": given.depth, "heads": given.width // 64, "length": given.length}
    return SEDD(STATES, dropout=0.0, **sizes, scale_by_sigma=True)


def draw(given: argparse.Namespace, size: int, seed: int) -> Batch:
    """x_0, x_t and t of a step."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randint(STATES - 1, (size, given.length), generator=generator)
    t = torch.rand(size, generator=generator) * 0.9 + 0.05
    return x0, Absorbing(STATES - 1).sample(x0, LogLinear()(t)[0], generator=generator), t


def a_loss(given: argparse.Namespace) -> Loss:
    """The module that is trained."""
    return Loss(network(given), ScoreEntropy(Absorbing(STATES - 1), LogLinear()))


def by_hand(loss: Loss, *, averaged: bool = False) -> Callable[[Batch], object]:
    """A step without any engine; with the moving average of the weights, if asked."""
    weights = list(loss.parameters())
    averages = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.0, fused=True)

    def step(batch: Batch) -> float:
        optimizer.zero_grad()
        mean, _ = loss(*batch)
        mean.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if averaged:
            torch._foreach_lerp_(averages, [weight.detach() for weight in weights], 1e-4)
        return float(mean.detach())

    return step


def by_engine(given: argparse.Namespace, stage: int) -> Callable[[Batch], object]:
    """The training script's step."""
    loss = a_loss(given)
    # The engine counts samples by its batch size, which changes nothing in a step of one micro-batch.
    engine = start_engine(loss, batch_size=1, micro_batches=1, stage=stage)
    return lambda batch: train_step(engine, [batch], 1e-4)


def in_turns(
    steps: dict[str, Callable[[Batch], object]], size: int, given: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds of each step in each round, after one to warm up; every round begins with another."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(given.rounds + 1):
        batch = draw(given, size, number)
        names = list(steps)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.perf_counter()
            steps[name](batch)
            times[name].append(time.perf_counter() - start)
    return {name: found[1:] for name, found in times.items()}


def the_loop(given: argparse.Namespace) -> tuple[float, float]:
    """A whole step of `train` over the same by hand, which is taken before it: medians, by the clock and the processor.

    Each is of the time from a step's launch to the next one's, over that of the step by hand before it.
    """
    values: dict[str, Any] = {"network": "sedd", "noise": "loglinear", "optimizer": "adamw", "zero_stage": 1}
    values |= {"width": given.width, "depth": given.depth, "heads": given.width // 64, "length": given.length}
    values |= {"steps": 3 * given.rounds + 4, "batch_size": given.batches[0], "log_every": 1}
    values |= {"evaluate_blocks": 2, "evaluate_times": 2, "sample_steps": 2}
    stamps, hand = list[Any](), None

    def after_one_by_hand(engine: Any, micro_batches: list[Batch], *args: Any, **how: Any) -> Any:
        nonlocal hand
        if hand is None:
            hand = by_hand(Loss(copy.deepcopy(engine.module.net), engine.module.objective), averaged=True)
        begun = now()
        hand(micro_batches[0])
        stamps.append((begun, now()))
        return launch_step(engine, micro_batches, *args, **how)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(training, "launch_step", after_one_by_hand):
        recipe = recipes.override(recipes.read_recipe("tiny"), values)
        training.train(recipe, output=f"{folder}/run", cache=f"{folder}/cache", tensorboard=False)
    begun, ended = np.array(stamps).swapaxes(0, 1)
    ratios = (begun[1:] - ended[:-1]) / (ended - begun)[:-1]
    wall, processor = np.median(ratios[3:], 0)
    return float(wall), float(processor)


def now() -> Any:
    """The clock's seconds and the processor's."""
    return np.array([time.perf_counter(), time.process_time()])


def waiting(given: argparse.Namespace) -> float:
    """The share of a step that the training script waits for its next batch, by its own log."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--recipe", "tiny", "--output", f"{folder}/run", "--cache", f"{folder}/cache", "--log-every", "1"]
        sizes = {"width": given.width, "depth": given.depth, "length": given.length, "batch-size": given.batches[0]}
        for name, value in {**sizes, "heads": given.width // 64, "steps": given.rounds + 3}.items():
            options += [f"--{name}", str(value)]
        cheap = ["--evaluate-blocks", "2", "--evaluate-times", "2", "--sample-steps", "2", "--no-tensorboard"]
        subprocess.run([sys.executable, str(TRAIN), *options, *cheap], check=True, capture_output=True)
        lines = [json.loads(line) for line in Path(folder, "run", "log.jsonl").read_text().splitlines()]
    return statistics.median([line["waited_for_data"] for line in lines if line["kind"] == "train"][3:])


if __name__ == "__main__":
    main()
