"""What ZeRO splits over the ranks, made whole, and the reverse.

Under ZeRO each rank owns a piece of the float32 master weights: one flat tensor a parameter group (stages 1 and 2) or
sub-group (stage 3); without ZeRO (stage 0) every rank owns all of them. AdamW's moments and the moving average have
the same pieces. `owned` lists this rank's; `gather` turns pieces of any such quantity into named tensors of the
parameters' shapes; `scatter` is its inverse. Named tensors do not depend on the stage or the number of ranks. Weights
that are not trained have no masters: `frozen` gives them.

DeepSpeed maps between pieces and parameters for the master weights alone. So the other quantities are put in the
masters' place for a moment; the masters come back before anything else can see it.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["owned", "gather", "frozen", "scatter"]


def owned(engine: Any) -> list[Tensor]:
    """The master weights that this rank updates, float32, flat under ZeRO."""
    if engine.zero_optimization_stage() == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [p for group in engine.basic_optimizer.param_groups for p in group["params"]]


def _trained(engine: Any, wanted: bool = True) -> dict[str, nn.Parameter]:
    """The parameters that are trained, or those that are not, by their names in the network."""
    return {name: p for name, p in engine.module.net.named_parameters() if p.requires_grad == wanted}


def gather(engine: Any, pieces: list[Tensor] | None = None, *, keep: Container[str] | None = None) -> dict[str, Tensor]:
    """Named whole tensors of what is trained, on the CPU, from every rank's pieces (by default of the master weights).

    Collective. Of names that a rank does not `keep`, all unless given, it helps the others to theirs, and gets none.
    """
    found = {}
    with _in_place_of_masters(engine, pieces):
        for name, parameter in _trained(engine).items():
            whole = _whole(engine, parameter)
            if keep is None or name in keep:
                found[name] = whole.detach().to("cpu", copy=True)
    return found


def frozen(engine: Any, *, keep: Container[str] | None = None) -> dict[str, Tensor]:
    """The weights that are not trained, whole, on the CPU. Collective; `keep` as for `gather`."""
    found = {}
    for name, parameter in _trained(engine, False).items():
        kept = keep is None or name in keep
        if engine.zero_optimization_stage() < 3:
            if kept:
                found[name] = parameter.detach().to("cpu", copy=True)
            continue
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            if kept:
                found[name] = parameter.detach().to("cpu", copy=True)
    return found


def scatter(engine: Any, tensors: dict[str, Tensor]) -> list[Tensor]:
    """This rank's pieces of named whole tensors."""
    pieces = [torch.zeros_like(master) for master in owned(engine)]
    with _in_place_of_masters(engine, pieces):
        for name, parameter in _trained(engine).items():
            _set_whole(engine, parameter, tensors[name].to(parameter.device, torch.float32))
    return pieces


@contextmanager
def _in_place_of_masters(engine: Any, pieces: list[Tensor] | None) -> Iterator[None]:
    """Exchange the contents of the masters and of `pieces`, and exchange them back at the end."""

    def exchange() -> None:
        for master, piece in zip(owned(engine), pieces or [], strict=pieces is not None):
            kept = master.detach().clone()
            master.data.copy_(piece)
            piece.copy_(kept)

    exchange()
    try:
        yield
    finally:
        exchange()


def _whole(engine: Any, parameter: nn.Parameter) -> Tensor:
    if engine.zero_optimization_stage() == 0:
        return parameter
    from deepspeed.utils import safe_get_full_fp32_param

    whole: Tensor = safe_get_full_fp32_param(parameter)
    return whole


def _set_whole(engine: Any, parameter: nn.Parameter, value: Tensor) -> None:
    stage = engine.zero_optimization_stage()
    if stage == 0:
        parameter.data.copy_(value)
    elif stage == 3:
        from deepspeed.utils import safe_set_local_fp32_param

        # Every rank owns an equal part of each parameter, the last one padded.
        ranks, flat = dist.get_world_size(), value.flatten()
        part = -(-flat.numel() // ranks)
        padded = torch.nn.functional.pad(flat, (0, part * ranks - flat.numel()))
        safe_set_local_fp32_param(parameter, padded[dist.get_rank() * part : (dist.get_rank() + 1) * part])
    else:
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, value)
