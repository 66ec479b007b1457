"""DeepSpeed's config: what follows from a recipe's own values, and what its [deepspeed] section adds.

    [deepspeed]
    wall_clock_breakdown = true
    zero_optimization = { reduce_bucket_size = 200_000_000, overlap_comm = false }

Any option of DeepSpeed's goes there, but for those that a value of the recipe decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

__all__ = ["check_options", "zero_options", "with_options"]

DECIDED = {
    "train_batch_size": "batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "micro_batch_size",
    "gradient_clipping": "clip",
    "optimizer": "optimizer, learning_rate, beta1, beta2, eps and weight_decay",
    "scheduler": "learning_rate, warmup and decay_to",
    "torch_autocast": "precision",
    "bf16": "precision",
    "fp16": "precision",
    "amp": "precision",
    "activation_checkpointing": "activation_checkpointing",
    "steps_per_print": "log_every",
    "zero_optimization.stage": "zero_stage",
    "zero_optimization.offload_optimizer": "offload",
    "zero_optimization.offload_param": "offload",
}
NEEDED = ("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer")


def check_options(options: Mapping[str, Any]) -> None:
    """ValueError where a [deepspeed] section says what another value of the recipe says, or must stay as it is."""
    for name, value in _named(options):
        for decided, by in DECIDED.items():
            if name == decided or name.startswith(f"{decided}."):
                raise ValueError(f"[deepspeed] {name} = {value!r}: a recipe says that by {by}; leave it out here")
        if name in NEEDED:
            raise ValueError(
                f"[deepspeed] {name} = {value!r}: the trainer needs it as it is, for torch's own AdamW and for Muon"
            )


def zero_options(stage: int, size: int, *, offload: bool, ranks: int = 1) -> dict[str, Any]:
    """The `zero_optimization` of a stage, for `size` parameters.

    Several GPUs reduce gradients while the backward pass goes on (`overlap_comm`), at the end of which DeepSpeed waits
    for them; one has nothing to reduce, and does not wait. Buckets hold 64 million numbers at
    most: DeepSpeed's own half a billion are allocated up front.
    """
    bucket = max(1 << 16, min(size, 1 << 26))
    options: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket + bucket % 2,  # it must be even
    }
    if torch.cuda.is_available():
        options["overlap_comm"] = ranks > 1
    in_memory = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if offload:
        options["offload_optimizer"] = in_memory
    if offload and stage == 3:
        options["offload_param"] = in_memory
    if stage == 3:
        options |= {
            "stage3_prefetch_bucket_size": max(1 << 16, min(size // 4, 1 << 25)),
            "stage3_param_persistence_threshold": 1 << 14,
            "stage3_max_live_parameters": 1 << 30,
        }
    return options


def with_options(config: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The config with more options, or others, section by section; neither is changed."""
    both = dict(config)
    for name, value in options.items():
        inner = both.get(name)
        both[name] = with_options(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return both


def _named(options: Mapping[str, Any], inside: str = "") -> Iterator[tuple[str, Any]]:
    """Every option by its whole name, section.option, sections themselves included."""
    for name, value in options.items():
        yield f"{inside}{name}", value
        if isinstance(value, dict):
            yield from _named(value, f"{inside}{name}.")
