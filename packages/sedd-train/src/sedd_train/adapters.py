"""LoRA (Hu et al. 2021, arXiv 2106.09685): two thin matrices beside each of the blocks', trained in its place.

    W + (alpha / r) B A,      A (r, in) random, B (out, r) = 0 at first

They are peft's, which stand in the network's modules. All that is published has them added to W, so that `load` reads a
network like any other; while training they stand beside it, and a run continues with both.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = ["add_adapters", "has_adapters", "trained", "merged"]

THIN = r".*blocks\.\d+\.(attn_qkv|attn_out|mlp\.0)"  # a block's other matrices take their input changed, or modulate
ADAPTER = "sedd"


def add_adapters(net: nn.Module, *, rank: int, alpha: float, seed: int) -> None:
    """Put them beside the matrices of a network of sedd_nets, of which nothing else is trained then, in place.

    Args:
        net: the network.
        rank: r.
        alpha: see above.
        seed: of the random A.

    Raises:
        ValueError: peft is not installed.
    """
    if find_spec("peft") is None:
        raise ValueError(f"lora = {rank}: this needs the package peft: pip install 'sedd-train[lora]'")
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=cast(int, alpha), target_modules=THIN, lora_dropout=0.0, bias="none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, net, adapter_name=ADAPTER)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def has_adapters(net: nn.Module) -> bool:
    """Whether LoRA's matrices stand beside the network's."""
    return any(hasattr(module, "lora_A") for module in net.modules())


def trained(net: nn.Module) -> set[str]:
    """The names of what is trained of a network with LoRA; none of a network without."""
    return {name for name, p in net.named_parameters() if p.requires_grad} if has_adapters(net) else set()


def merged(net: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a network with LoRA, by the names and in the shapes of the network without: W + (alpha / r) B A."""
    found = dict(weights)
    for name, module in net.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        thin = {part: found.pop(f"{name}.lora_{part}.{ADAPTER}.weight") for part in "AB"}
        scaling: Any = module.scaling
        found[f"{name}.base_layer.weight"] = found[f"{name}.base_layer.weight"] + scaling[ADAPTER] * (
            thin["B"] @ thin["A"]
        )
    return {name.replace(".base_layer.", "."): value for name, value in found.items()}
