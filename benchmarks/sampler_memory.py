"""What a sampler holds beside the network's answer, for every method, control and guidance: a table.

    python benchmarks/sampler_memory.py [--states 32768] [--batch 4] [--length 256]

Counted are the bytes of the storages that tensors allocate, the most at one time, above those at the start, in units of
one float32 for each state of each position (4 B L N bytes: 13 GB at 64 x 1024 x 50258). The networks allocate the rows
that they are asked for and nothing else, so that one unit is their answer, and two where there are two of them.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from sedd_graphs import Absorbing, LogLinear, Uniform
from sedd_samplers import (
    Ancestral,
    ConfidenceUnmasking,
    EntropyBoundRenoising,
    Euler,
    FirstHitting,
    LeaveOneOut,
    Particles,
    PredictorCorrector,
    Psi,
    Remasking,
    TauLeaping,
    Trapezoidal,
    Tweedie,
    Uniformization,
    Unmasking,
    at_rate,
    confidence,
    entropy_bound,
    infill,
    sample,
)
from sedd_samplers.adapters import from_logits
from sedd_samplers.controls import Control, controlled, min_p, repetition_penalty, temperature, top_k, top_p
from sedd_samplers.guidance import classifier_free, classifier_guided, first_order_ratios, neighbour_ratios
from sedd_samplers.testing.memory import units_held
from torch import Tensor

Row = tuple[str, str, int, Callable[[], object]]
"""Graph, what is measured, how many answers networks give at a time, and the run."""

ANY = {
    "Euler": Euler(),
    "TauLeaping": TauLeaping(),
    "Tweedie": Tweedie(),
    "Ancestral": Ancestral(),
    "Trapezoidal": Trapezoidal(),
    "PredictorCorrector": PredictorCorrector(),
    "Psi": Psi(0.9),
}
MASKS = {
    "Unmasking": Unmasking(),
    "FirstHitting": FirstHitting(),
    "Remasking": Remasking(at_rate(1.0)),
    "ConfidenceUnmasking": ConfidenceUnmasking(),
    "ConfidenceUnmasking, entropy bound": ConfidenceUnmasking(confidence, rule=entropy_bound(0.1)),
    "ConfidenceUnmasking, top-k": ConfidenceUnmasking(controls=(top_k(50),)),
    "ConfidenceUnmasking, hot, top-p": ConfidenceUnmasking(controls=(temperature(2.0), top_p(0.9))),
}
NOISED = {
    "Uniformization": Uniformization(slack=20.0),
    "LeaveOneOut": LeaveOneOut(Tweedie()),
    "EntropyBoundRenoising": EntropyBoundRenoising(),
}
CONTROLS: dict[str, list[Control]] = {
    "temperature": [temperature(0.9)],
    "top-k": [top_k(50)],
    "top-p": [top_p(0.95)],
    "min-p": [min_p(0.05)],
    "repetition": [repetition_penalty(1.2)],
    "temperature, top-p": [temperature(0.9), top_p(0.95)],
}


def rows(batch: int, length: int, states: int) -> Iterator[Row]:
    """Every line of the table."""
    noise = LogLinear()

    def answer(x: Tensor, sigma: Tensor, where: Tensor) -> Tensor:
        return torch.zeros(int(where.sum()), states)

    for name, graph in (("absorbing", Absorbing(states - 1)), ("uniform", Uniform(states))):

        def run(score: Any, method: Any = Tweedie(), graph: Any = graph) -> Callable[[], object]:  # noqa: B008
            return lambda: sample(
                score, graph, noise, shape=(batch, length), steps=2, t_min=0.2, method=method, denoise=False,
                seeds=range(batch),
            )  # fmt: skip

        for told, method in {**ANY, **(MASKS if name == "absorbing" else NOISED)}.items():
            if told in ("FirstHitting", "Uniformization"):
                yield name, told, 1, short(answer, graph, noise, method, batch, length)
            else:
                yield name, told, 1, run(from_logits(answer, graph), method)
        for told, controls in CONTROLS.items():
            yield name, f"Tweedie, {told}", 1, run(from_logits(answer, graph, controls=controls))
        yield name, "Tweedie, controlled(score)", 1, run(controlled(from_logits(answer, graph), graph, top_p(0.9)))
        yield name, "Tweedie, classifier-free", 2, run(classifier_free(answer, answer, 2.0, num_states=states))
        linear = first_order_ratios(lambda tokens, sigma: tokens[..., 0].sum(1), states)
        yield name, "Tweedie, first-order classifier", 2, run(classifier_guided(answer, linear, 1.0, num_states=states))
        x = torch.zeros(2, length, dtype=torch.int64)
        given = torch.arange(length).expand(2, -1) % 2 == 0
        if name == "uniform":
            options: dict[str, Any] = {"x": x, "given": given, "conditioning": Particles(batch // 2)}
            particles = functools.partial(infill, from_logits(answer, graph), graph, noise, **options)
            yield name, "Particles", 1, functools.partial(particles, steps=2, t_min=0.2, seeds=range(2))
    tiny = 64
    exact = neighbour_ratios(lambda x, sigma: x.sum(1).float(), tiny, batch_size=64)
    graph = Absorbing(tiny - 1)
    plain = lambda x, sigma, where: torch.zeros(int(where.sum()), tiny)  # noqa: E731
    wide = batch * length * states // tiny // 16
    yield f"absorbing, {tiny} states", "Tweedie, classifier at every neighbour", 2, lambda: sample(
        classifier_guided(plain, exact, 1.0, num_states=tiny), graph, noise, shape=(wide // 16, 16), steps=1,
        denoise=False, seeds=range(wide // 16),
    )  # fmt: skip


def short(answer: Any, graph: Any, noise: Any, method: Any, batch: int, length: int) -> Callable[[], object]:
    """A run of the exact methods over a little noise, from states of their own: they make a call for every event."""
    start = torch.zeros(batch, length, dtype=torch.int64)
    if graph.mask_id is not None:
        start[:] = graph.mask_id
    times = torch.tensor([0.5, 0.4999], dtype=torch.float64)
    return lambda: infill(
        from_logits(answer, graph), graph, noise, x=start, given=start < 0, start=start, times=times, method=method,
        denoise=False, seeds=range(batch),
    )  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    sizes = parser.parse_args()
    shape = (sizes.batch, sizes.length, sizes.states)
    print(f"B, L, N = {shape}; a unit is {4 * sizes.batch * sizes.length * sizes.states / 2**20:.0f} MB\n")
    print(f"{'graph':22}{'method':44}{'answers':>8}{'held':>8}")
    for graph, told, answers, run in rows(*shape):
        print(f"{graph:22}{told:44}{answers:8}{units_held(run, shape):8.2f}", flush=True)


if __name__ == "__main__":
    main()
