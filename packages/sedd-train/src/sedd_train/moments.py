"""What the optimiser remembers of the weights, by name: AdamW's two moments, or Muon's one.

    exp_avg        m = beta1 m + (1 - beta1) g          of what Muon trains its momentum
    exp_avg_sq     v = beta2 v + (1 - beta2) g^2        AdamW's alone

Whole, as `zero_shards` gathers and scatters them.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor, nn

from sedd_train import zero_shards

__all__ = ["MOMENTS", "gather", "restore"]

MOMENTS = ("exp_avg", "exp_avg_sq")


def gather(engine: Any, keep: AbstractSet[str]) -> tuple[dict[str, dict[str, Tensor]], int]:
    """The moments of the weights with these names, each by name, and how many steps AdamW has made. Collective.

    There are none before the first step.
    """
    states = engine.basic_optimizer.state
    pieces = [states.get(master, {}) for master in zero_shards.owned(engine)]
    if not all("exp_avg" in piece for piece in pieces):
        return {}, 0
    first, second = MOMENTS
    squares = [piece.get(second, torch.zeros_like(piece[first])) for piece in pieces]
    found = {
        first: zero_shards.gather(engine, [piece[first] for piece in pieces], keep=keep),
        second: zero_shards.gather(engine, squares, keep=keep - _of_muon(engine).keys()),
    }
    return found, max((int(piece.get("step", 0)) for piece in pieces), default=0)


def restore(engine: Any, moments: dict[str, dict[str, Tensor]], steps: int) -> None:
    """Bring the optimiser where it was, from moments as `gather` gave them, after so many steps."""
    lacking = _of_muon(engine)
    no_second = {name: torch.zeros_like(weight) for name, weight in lacking.items()}
    pieces = {moment: zero_shards.scatter(engine, no_second | values) for moment, values in moments.items()}
    without = {id(weight) for weight in lacking.values()}
    for i, master in enumerate(zero_shards.owned(engine)):
        kept = MOMENTS[:1] if id(master) in without else MOMENTS
        state = {moment: pieces[moment][i] for moment in kept}
        step = torch.tensor(float(steps), device=master.device)
        engine.basic_optimizer.state[master] = {"step": step, **state}


def _of_muon(engine: Any) -> dict[str, nn.Parameter]:
    """The weights that Muon trains, by name: whole, for it is without ZeRO, and without a second moment."""
    groups = engine.basic_optimizer.param_groups
    taken = {id(weight) for group in groups if "parts" in group for weight in group["params"]}
    named = engine.module.net.named_parameters() if taken else ()
    return {name: weight for name, weight in named if id(weight) in taken}
