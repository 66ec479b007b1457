"""What DeepSpeed's engine adds to a training step: the step through it over the same step written by hand, in one run.

By hand means the same network and loss, torch's AdamW and clipping, and nothing else. Both take their steps in turns,
on one rank, for each ZeRO stage. Then the training script itself runs, and its log says which share of a step was spent
waiting for data.

    python benchmarks/step.py                                    # 26 M parameters: about 4 minutes on two cores
    python benchmarks/step.py --width 128 --depth 2 --steps 3    # in seconds
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from sedd_graphs import Absorbing, LogLinear
from sedd_nets import SEDD
from sedd_train import launch
from sedd_train.engine import Batch, Loss, start_engine, train_step
from sedd_train.objectives import ScoreEntropy
from torch import nn

STATES = 4097
TRAIN = Path(__file__).parents[1] / "integration" / "train_owt.py"


def main() -> None:
    """Print the ratios of the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 512), ("depth", 6), ("length", 256), ("batch", 4), ("steps", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    waited = waiting(given)  # first: this process is yet in nobody's world
    launch.start()
    parameters = sum(p.numel() for p in network(given).parameters())
    print(
        f"SEDD {given.depth} x {given.width}, {parameters / 1e6:.1f} M parameters, N = {STATES}, B = {given.batch}, "
        f"L = {given.length}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for stage in range(4):
        plain, through = medians(by_hand(given), by_engine(given, stage), given)
        print(f"ZeRO {stage}: by hand {plain:.3f} s, through the engine {through:.3f} s, {through / plain:.3f} x")
    print(f"waiting for data in train_owt.py: {waited:.2%} of a step, median")
    torch.distributed.destroy_process_group()


def network(given: argparse.Namespace) -> SEDD:
    """The same network every time."""
    torch.manual_seed(0)
    sizes = {"width": given.width, "depth": given.depth, "heads": given.width // 64, "length": given.length}
    return SEDD(STATES, dropout=0.0, **sizes)


def batch(given: argparse.Namespace, step: int) -> Batch:
    """x_0, x_t and t of a step."""
    generator = torch.Generator().manual_seed(step)
    x0 = torch.randint(STATES - 1, (given.batch, given.length), generator=generator)
    t = torch.rand(given.batch, generator=generator) * 0.9 + 0.05
    return x0, Absorbing(STATES - 1).sample(x0, LogLinear()(t)[0], generator=generator), t


def by_hand(given: argparse.Namespace) -> Callable[[int], object]:
    """A step without any engine."""
    loss = Loss(network(given), ScoreEntropy(Absorbing(STATES - 1), LogLinear()))
    optimizer = torch.optim.AdamW(loss.parameters(), lr=1e-4, weight_decay=0.0)

    def step(number: int) -> float:
        optimizer.zero_grad()
        mean, _ = loss(*batch(given, number))
        mean.backward()
        nn.utils.clip_grad_norm_(loss.parameters(), 1.0)
        optimizer.step()
        return float(mean.detach())

    return step


def by_engine(given: argparse.Namespace, stage: int) -> Callable[[int], object]:
    """The training script's step."""
    loss = Loss(network(given), ScoreEntropy(Absorbing(STATES - 1), LogLinear()))
    engine = start_engine(loss, batch_size=given.batch, micro_batches=1, stage=stage)
    return lambda number: train_step(engine, [batch(given, number)], 1e-4)


def medians(one: Callable[[int], object], other: Callable[[int], object], given: argparse.Namespace) -> list[float]:
    """Seconds of a step of both, taken in turns, after one to warm up."""
    times: list[list[float]] = [[], []]
    for number in range(given.steps + 1):
        for which, step in enumerate((one, other)):
            start = time.perf_counter()
            step(number)
            times[which].append(time.perf_counter() - start)
    return [statistics.median(found[1:]) for found in times]


def waiting(given: argparse.Namespace) -> float:
    """The share of a step that the training script waits for its next batch, by its own log."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--recipe", "tiny", "--output", f"{folder}/run", "--cache", f"{folder}/cache", "--log-every", "1"]
        sizes = {"width": given.width, "depth": given.depth, "length": given.length, "batch-size": given.batch}
        for name, value in {**sizes, "heads": given.width // 64, "steps": given.steps + 3}.items():
            options += [f"--{name}", str(value)]
        cheap = ["--evaluate-blocks", "2", "--evaluate-times", "2", "--sample-steps", "2", "--no-tensorboard"]
        subprocess.run([sys.executable, str(TRAIN), *options, *cheap], check=True, capture_output=True)
        lines = [json.loads(line) for line in Path(folder, "run", "log.jsonl").read_text().splitlines()]
    return statistics.median([line["waited_for_data"] for line in lines if line["kind"] == "train"][3:])


if __name__ == "__main__":
    main()
