"""What a step costs and what the hardware gives: arithmetic a token, peak FLOP/s (for the MFU), and memory.

The utilisation counts the arithmetic that the model needs, three times a forward pass (one forward, two backward), not
what is computed again to save memory. Only positions into which a jump may lead reach the head: under an absorbing
graph these are the masked ones, on average the share `1 - e^-sigma(t)` of them.
"""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch

from sedd_train.objectives import D3PM, Objective, ScoreEntropy

__all__ = ["training_flops", "peak_flops", "emulates_bf16", "memory"]

PEAKS = {  # dense, of one device, as their makers state: (bfloat16, float32) in FLOP/s
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "A10G": (70e12, 35e12),
    "RTX 4090": (165e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12),
}


def training_flops(net: Any, objective: Objective, length: int, t_min: float = 1e-3) -> float:
    """Floating-point operations that one token costs in training, on average over times; 0 where it is not known.

    Args:
        net: the network; its `flops` counts a forward pass, if it has one.
        objective: what it is trained for.
        length: tokens a block.
        t_min: least time.
    """
    if not hasattr(net, "flops"):
        return 0.0
    share = 1.0
    if isinstance(objective, ScoreEntropy | D3PM) and objective.graph.mask_id is not None:
        t = t_min + (1 - t_min) * (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
        share = float(-torch.expm1(-objective.noise(t)[0]).mean())
    return 3 * float(net.flops(length, rows=round(share * length))) / length


def peak_flops(precision: str, tflops: float = 0.0) -> float | None:
    """FLOP/s that this process's device can do at best: as given, or of a known GPU; None for any other device.

    Args:
        precision: fp32, bf16 or fp16.
        tflops: 10^12 FLOP/s, 0 for what is known.
    """
    if tflops:
        return tflops * 1e12
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        known = next((peaks for part, peaks in PEAKS.items() if part in name), None)
        if known:
            return known[0 if precision != "fp32" else 1]
    return None


def emulates_bf16() -> bool:
    """Whether this process computes on a CPU without fast bfloat16, by oneDNN, where float32 is faster by far."""
    return not (torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported())


def memory() -> float:
    """The most memory that this process has held so far, in bytes: on its GPU, or else of the machine."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(most if sys.platform == "darwin" else most * 1024)
