"""What modulates the blocks, c = silu(embed(sigma) + embed(y)): the noise level, and a class label or a prompt y.

The embeddings of labels and prompts start at zero, so that a network which gains one still computes what it did,
and both have a value that means "no condition": a label of -1, a prompt of zeros. Training on such values now and then
and combining the two scores while sampling is classifier-free guidance (Ho & Salimans, 2022).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sedd_nets.checks import at_least_float32, check_sizes, on_host
from sedd_nets.config import integer

__all__ = [
    "ClassTable",
    "Float32Linear",
    "LabelCondition",
    "PromptCondition",
    "SigmaEmbedding",
    "condition_from_section",
]


class Float32Linear(nn.Linear):
    """A linear map computed in float32 (float64 stays) whatever autocast or the weight's dtype would have it."""

    def forward(self, a: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        with torch.autocast(a.device.type, enabled=False):
            bias = None if self.bias is None else at_least_float32(self.bias)
            weight = at_least_float32(self.weight)
            return F.linear(a.to(weight.dtype), weight, bias)


class SigmaEmbedding(nn.Module):
    """The noise level as a vector: sinusoids of geometrically spaced frequencies through a two-layer MLP, float32."""

    def __init__(self, cond_dim: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(Float32Linear(frequencies, cond_dim), nn.SiLU(), Float32Linear(cond_dim, cond_dim))

    def forward(self, sigma: Tensor) -> Tensor:
        """Total noise (..., 1) to (..., cond_dim)."""
        half = self.frequencies // 2
        frequency = torch.exp(torch.arange(half, device=sigma.device, dtype=sigma.dtype) * (-math.log(10_000) / half))
        angle = sigma * frequency
        out: Tensor = self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))
        return out


class LabelCondition(nn.Module):
    """One vector a class.

    Args:
        classes: the number of classes.
        cond_dim: the network's `cond_dim`.
    """

    def __init__(self, classes: int, cond_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(classes, cond_dim))

    def forward(self, labels: Tensor) -> Tensor:
        """Labels (B,) int64, -1 for none, to (B, 1, cond_dim).

        Raises:
            ValueError: labels has another shape or type.
            IndexError: a label is out of range (CPU); on an accelerator the device's assertion fails.
        """
        check_labels(labels, self.weight.shape[0])
        known = labels >= 0
        return (F.embedding(labels.clamp(min=0), self.weight) * known[:, None])[:, None]

    def section(self) -> dict[str, Any]:
        """What config.json says of it."""
        return {"type": "label", "classes": self.weight.shape[0]}


class ClassTable(nn.Module):
    """One vector a class and one for none, behind the activation; the classes of the published UDLM checkpoints.

    Args:
        classes: the number of classes; the table's last row, one more, stands for none.
        cond_dim: the network's `cond_dim`.
    """

    def __init__(self, classes: int, cond_dim: int) -> None:
        super().__init__()
        check_sizes(classes=classes)
        self.classes = classes
        self.embedding_table = nn.Embedding(classes + 1, cond_dim)

    def forward(self, labels: Tensor) -> Tensor:
        """Labels (B,) int64, -1 for none, to silu of their vectors, (B, 1, cond_dim). Raises as `LabelCondition`."""
        check_labels(labels, self.classes)
        vectors: Tensor = self.embedding_table(torch.where(labels < 0, self.classes, labels))
        return F.silu(at_least_float32(vectors))[:, None]


class PromptCondition(nn.Module):
    """A linear map of an embedding that another network made of a prompt.

    Args:
        prompt_dim: the width of the prompt's embedding.
        cond_dim: the network's `cond_dim`.
    """

    def __init__(self, prompt_dim: int, cond_dim: int) -> None:
        super().__init__()
        self.linear = Float32Linear(prompt_dim, cond_dim, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, prompts: Tensor) -> Tensor:
        """Prompt embeddings (B, prompt_dim) float, zeros for none, to (B, 1, cond_dim).

        Raises:
            ValueError: prompts has another shape.
        """
        if prompts.ndim != 2 or prompts.shape[1] != self.linear.in_features:
            raise ValueError(f"prompts must be (B, {self.linear.in_features}); got {tuple(prompts.shape)}")
        out: Tensor = self.linear(prompts)
        return out[:, None]

    def section(self) -> dict[str, Any]:
        """What config.json says of it."""
        return {"type": "prompt", "prompt_dim": self.linear.in_features}


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise unless labels are (B,) int64 from -1 to `classes` - 1.

    Raises:
        ValueError: labels has another shape or type.
        IndexError: a label is out of range (CPU); on an accelerator the device's assertion fails.
    """
    if labels.ndim != 1 or labels.dtype != torch.int64:
        raise ValueError(f"labels must be (B,) int64; got {labels.dtype} {tuple(labels.shape)}")
    if torch.compiler.is_compiling() or labels.is_meta:
        return
    wrong = (labels < -1) | (labels >= classes)
    if not on_host(labels):
        torch._assert_async(~wrong.any(), f"a label is outside 0..{classes - 1} (-1 means no label)")
    elif bool(wrong.any()):
        raise IndexError(f"label {int(labels[wrong][0])} is outside 0..{classes - 1} (-1 means no label)")


def condition_from_section(section: Mapping[str, Any], cond_dim: int) -> LabelCondition | PromptCondition:
    """The embedding that a config.json describes. Raises ValueError for an unknown type or a wrong size."""
    if section.get("type") == "label":
        return LabelCondition(integer(section, "classes"), cond_dim)
    if section.get("type") == "prompt":
        return PromptCondition(integer(section, "prompt_dim"), cond_dim)
    raise ValueError(f"condition of type {section.get('type')!r:.100} in config.json: expected 'label' or 'prompt'")
