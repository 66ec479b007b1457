"""Steps whose loss or gradient is not finite: which samples they saw, and where in the network it began.

Such a step changes nothing (`sedd_train.engine`). One is an accident; a row of them means that the weights themselves
give infinities, and then `diagnose` runs the step once more and looks at every module's output and its gradient.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from sedd_train import zero_shards
from sedd_train.engine import Batch, on

__all__ = ["not_finite", "diagnose"]


def not_finite(losses: Tensor, samples: Sequence[int]) -> list[int]:
    """The numbers of those samples, of all ranks, whose loss is NaN or infinite. Collective.

    Args:
        losses: (n,) this rank's, as `Step.losses`.
        samples: this rank's n samples g, in the same order.
    """
    mine = [g for g, loss in zip(samples, losses.tolist(), strict=True) if not math.isfinite(loss)]
    return sorted(g for found in _from_all(mine) for g in found)


def diagnose(engine: Any, batches: Iterable[Batch], samples: Sequence[int]) -> str:
    """Run a step's forward and backward pass once more, and say where numbers stop being finite. Collective.

    The engine is of no further use: gradients are left in it.

    Args:
        engine: the DeepSpeed engine.
        batches: this rank's micro-batches.
        samples: the numbers g of their samples, in order.

    Returns:
        Some lines of text: the weights, the first module with an output that is not finite, or else the first with such
        a gradient, and the noise levels of the samples concerned.
    """
    seen = _Seen()
    handles = [
        module.register_forward_hook(functools.partial(seen.note, name))
        for name, module in engine.module.net.named_modules()
        if name
    ]
    losses, times = [], []
    try:
        for batch in batches:
            mean, loss = engine(*on(engine.device, batch))
            engine.backward(mean)
            losses += loss.tolist()
            times += batch[2].tolist()
    finally:
        for handle in handles:
            handle.remove()
    rows = [(g, t, loss) for g, t, loss in zip(samples, times, losses, strict=True)]
    found = [part for part in _from_all((seen.first(seen.outputs), seen.first(seen.gradients), rows)) if part]
    rows = sorted(row for _, _, part in found for row in part)
    bad = [row for row in rows if not math.isfinite(row[2])]
    lines = [_weights(zero_shards.gather(engine))]
    forward = [f"rank {rank}: {first}" for rank, (first, _, _) in enumerate(found) if first]
    backward = [f"rank {rank}: {first}" for rank, (_, first, _) in enumerate(found) if first]
    if forward:
        lines += [f"forward pass: {line}" for line in forward]
    else:
        lines += ["forward pass: every module's output is finite", *(f"backward pass: {line}" for line in backward)]
    shown = ", ".join(f"{g} (t = {t:.4f})" for g, t, _ in (bad or rows)[:16])
    more = f" and {len(bad or rows) - 16} more" if len(bad or rows) > 16 else ""
    what = "with a loss that is not finite" if bad else "in the step, all with a finite loss"
    lines.append(f"samples: {len(bad) or len(rows)} of {len(rows)} {what}, and their noise levels: {shown}{more}")
    return "\n".join(lines)


@dataclass
class _Seen:
    """What passed through the modules: (name, share that is not finite, root mean square), in order."""

    outputs: list[tuple[str, float, float]] = field(default_factory=list)
    gradients: list[tuple[str, float, float]] = field(default_factory=list)

    def note(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or not output.is_floating_point() or output.numel() == 0:
            return
        self.outputs.append((name, *_statistics(output)))
        if output.requires_grad:
            output.register_hook(lambda slope: self.gradients.append((name, *_statistics(slope))))  # type: ignore[no-untyped-call]

    @staticmethod
    def first(passed: list[tuple[str, float, float]]) -> str | None:
        before = "the input"
        for name, share, size in passed:
            if share:
                return f"{name} is the first that is not finite ({share:.0%} of its numbers), after {before}"
            before = f"{name} with a root mean square of {size:.3g}"
        return None


def _statistics(x: Tensor) -> tuple[float, float]:
    x = x.detach().double()
    finite = x.isfinite()
    return float(1 - finite.double().mean()), float(x.square().mean().sqrt())


def _weights(weights: dict[str, Tensor]) -> str:
    bad = [name for name, weight in weights.items() if not bool(weight.isfinite().all())]
    if bad:
        return f"weights: not finite in {', '.join(bad[:4])}" + (f" and {len(bad) - 4} more" if len(bad) > 4 else "")
    sizes = {name: float(weight.abs().max()) for name, weight in weights.items() if weight.numel()}
    largest = max(sizes, key=lambda name: sizes[name])
    return f"weights: all finite, the largest {sizes[largest]:.3g} in {largest}"


def _from_all(mine: Any) -> list[Any]:
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone
