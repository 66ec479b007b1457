"""The DeepSpeed engine: ZeRO 0 to 3, AdamW or Muon, clipping, accumulation, the precision, and one step of it.

The loss and the network meet inside one module's forward, because ZeRO 3 gathers a module's weights when its forward
runs and at no other time. Head and score entropy are one operation, which makes the gradients of the head's weights on
its way forward: ZeRO 3 is told that these weights are that module's, too. bfloat16 is autocast over float32 weights;
the loss switches autocast off for everything after the network's head. Of float16 see `sedd_train.half`.

Nothing of a step is read back before the optimiser's update is on its way: whether it changes the weights is decided on
the device, by the flag that torch's fused AdamW takes, and its numbers come to the host when they are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from sedd_nets.layers import Block
from sedd_nets.transformer import Transformer
from torch import Tensor, nn

from sedd_train import zero_shards
from sedd_train.deepspeed_options import with_options, zero_options
from sedd_train.half import LossScale, in_half
from sedd_train.labels import given
from sedd_train.muon import Muon, matrices_of
from sedd_train.objectives import Objective, has_head

__all__ = [
    *("Batch", "Loss", "compile_network", "start_engine", "learning_rate"),
    *("Step", "Launched", "launch_step", "train_step", "on"),
]

LINEAR = nn.functional.linear  # torch's own
Batch = tuple[Any, ...]
"""A micro-batch: the arguments of `Loss.forward`, tensors, or None for what there is not."""


class Loss(nn.Module):
    """A network and what it is trained for, as the one module that DeepSpeed sees.

    Args:
        net: a score model, or what else the objective takes.
        objective: see `sedd_train.objectives`.
    """

    def __init__(self, net: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.net, self.objective, self.in_float16 = net, objective, False

    def forward(
        self,
        x0: Tensor,
        xt: Tensor,
        t: Tensor,
        dropout_seeds: Tensor | None = None,
        lengths: Tensor | None = None,
        positions: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The objective's loss, nats a sequence; x0, xt (B, L), positions (M,) or None, the others (B,).

        Returns:
            The mean over the batch, (), and, without a gradient, the loss of each sequence, (B,).
        """
        net = in_half(self.net) if self.in_float16 else self.net
        net = given(net, labels)
        more = {} if positions is None else {"positions": positions}
        total, each = self.objective.losses(net, x0, xt, t, lengths=lengths, dropout_seeds=dropout_seeds, **more)
        # ZeRO skips a step by its gradient: this factor is 1, or NaN where the loss is infinite.
        finite = 1 + 0 * total.detach()
        return total * finite / len(x0), each


def start_engine(
    loss: Loss,
    *,
    batch_size: int,
    micro_batches: int,
    stage: int = 1,
    precision: str = "fp32",
    offload: bool = False,
    clip: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    optimizer: str = "adamw",
    options: Mapping[str, Any] | None = None,
) -> Any:
    """A DeepSpeed engine over the loss's network, every rank's with the weights of rank 0.

    Args:
        loss: the module to train.
        batch_size: sequences a step, over all ranks.
        micro_batches: into how many parts all ranks together cut a step.
        stage: ZeRO stage.
        precision: fp32, bf16 or fp16. The gradients that ranks average are float32 in all of them.
        offload: whether the machine's memory holds master weights and AdamW's moments in place of the GPU's, in stage 3
            the weights, too. Needs a stage of 1 or more.
        clip: largest norm of the gradient, 0 for none.
        betas: AdamW's decay rates.
        eps: AdamW's epsilon.
        weight_decay: decoupled weight decay, of matrices; biases and the scales of normalisations do not decay.
        optimizer: "adamw", or "muon" for the matrices of the blocks and AdamW for the rest. Muon needs whole matrices,
            which ZeRO does not give: stage 0.
        options: more of DeepSpeed's config, which replace what is there; see `sedd_train.deepspeed_options`.
    """
    import deepspeed

    if stage != 3:  # whose engine replaces this function for the rest of the process, and with it the last digit
        nn.functional.linear = LINEAR
    # torch's own AdamW: DeepSpeed's compiles itself at first use. Fused, because ZeRO hands it one flat tensor of all
    # weights, and each operation on that makes another of its size. The learning rate is set before every step.
    kind = Muon if optimizer == "muon" else torch.optim.AdamW
    groups = _groups(loss, weight_decay, muon=optimizer == "muon")
    made = kind(groups, lr=0.0, betas=betas, eps=eps, fused=True)
    size = sum(p.numel() for p in loss.parameters() if p.requires_grad)
    config: dict[str, Any] = {
        "train_batch_size": batch_size,
        "train_micro_batch_size_per_gpu": batch_size // micro_batches,
        "gradient_clipping": clip if stage else 0.0,  # without ZeRO it does not tell the norm: see _update
        "steps_per_print": 1 << 62,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its own AdamW for offloaded masters compiles itself, too
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a step
        "zero_optimization": zero_options(stage, size, offload=offload, ranks=dist.get_world_size()),
    }
    if stage == 3:
        net: Any = loss.net
        head = net.output_layer.linear if has_head(net) else nn.Identity()
        for parameter in head.parameters():
            deepspeed.zero.register_external_parameter(loss, parameter)
    if precision == "bf16":
        # No module's gradients are averaged in bfloat16, which those of nn.Linear are unless DeepSpeed is told so.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    loss.in_float16 = precision == "fp16"
    engine, *_ = deepspeed.initialize(model=loss, optimizer=made, config=with_options(config, options or {}))
    if stage == 3 and _is_compiled(loss.net):
        # Traced by torch 2.11's compiler on a GPU, DeepSpeed's linear layer left the modulations without a gradient.
        nn.functional.linear = LINEAR
    engine.clip_without_zero = clip
    if stage == 0 and dist.get_world_size() == 1:
        engine.enable_backward_allreduce = False  # it copies all gradients twice, to average them over one rank
    engine.loss_scale_of_ours = LossScale(loss.net if loss.in_float16 else None, engine.device)
    return engine


def _groups(loss: Any, weight_decay: float, *, muon: bool) -> list[dict[str, Any]]:
    """The parameters that are trained in groups: Muon's matrices, what else decays, and what does not."""
    parts = matrices_of(loss.net) if muon else {}
    groups: list[dict[str, Any]] = [
        {"params": matrices, "parts": count, "weight_decay": weight_decay} for count, matrices in parts.items()
    ]
    taken = {id(p) for matrices in parts.values() for p in matrices}
    rest = [p for p in loss.parameters() if p.requires_grad and id(p) not in taken]
    matrices = [p for p in rest if p.ndim > 1]
    others = [p for p in rest if p.ndim <= 1]
    if weight_decay == 0 or not matrices or not others:
        one = {"params": rest, "weight_decay": weight_decay if matrices else 0.0}
        return [*groups, one] if rest else groups
    return [*groups, {"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _is_compiled(net: nn.Module) -> bool:
    return any(module._compiled_call_impl is not None or getattr(module, "compiled", None) for module in net.modules())


def compile_network(net: nn.Module, stage: int) -> None:
    """Compile the blocks of a network of sedd_nets one by one, any other network as a whole; before the engine starts.

    In stage 3 a block's weights are gathered together, before it runs, so that what is compiled has no hook inside.

    Args:
        net: the network; its weights and keys stay.
        stage: ZeRO stage.
    """
    if not isinstance(net, Transformer):
        net.compile()
        return
    net.compile_blocks()
    if stage == 3:
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(net, [Block])


def learning_rate(step: int, *, peak: float, warmup: int, steps: int, decay_to: float = 1.0) -> float:
    """The learning rate of a step: linear warm-up to `peak`, then constant, or a cosine to `decay_to * peak`."""
    rise = min(1.0, (step + 1) / max(1, warmup))
    progress = min(1.0, max(0.0, (step - warmup) / max(1, steps - warmup)))
    return peak * rise * (decay_to + (1 - decay_to) * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class Step:
    """What one step came to, the same on every rank but for `losses`.

    Attributes:
        loss: mean over the global batch, nats a sequence.
        grad_norm: norm of the mean gradient before clipping; nan where DeepSpeed does not tell.
        applied: whether the weights changed; False when the loss or the gradient was not finite.
        stop: whether any rank was asked to stop.
        scale: of the loss in float16, which was too large for a step that was not applied if `forgiven`.
        forgiven: whether that was why.
        losses: (n,) nats, those of this rank's samples, in the order of the batches: each rank has its own.
    """

    loss: float
    grad_norm: float
    applied: bool
    stop: bool
    losses: Tensor
    scale: float = 1.0
    forgiven: bool = False


def on(device: torch.device, batch: Batch) -> Batch:
    """A micro-batch on a device."""
    return tuple(None if tensor is None else tensor.to(device, non_blocking=True) for tensor in batch)


class Launched:
    """A step on its way.

    Args:
        numbers: (6,) float64 on the device: those of a `Step`, from `loss` to `forgiven`.
        losses: as `Step.losses`.

    Attributes:
        late: whether to read it at once would wait for the device.
    """

    def __init__(self, numbers: Tensor, losses: Tensor) -> None:
        self.losses, self.late = losses, reading_waits(numbers)
        self._numbers, self._there = numbers, None
        if numbers.is_cuda:  # on its way to the host behind this step, and before what is launched after it
            self._numbers = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._there = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._there.record()

    def read(self) -> Step:
        """What it came to; waits for this step, and for nothing that was launched since."""
        if self._there is not None:
            self._there.synchronize()
        loss, norm, applied, stop, scale, forgiven = self._numbers.tolist()
        return Step(loss, norm, bool(applied), bool(stop), self.losses, scale, bool(forgiven))


def reading_waits(tensor: Tensor) -> bool:
    """Whether to read a tensor's values is to wait for what was launched before."""
    return tensor.device.type != "cpu"


def train_step(engine: Any, batches: Iterable[Batch], lr: float, stop: bool = False) -> Step:
    """`launch_step`, and what it came to. Collective."""
    return launch_step(engine, batches, lr, stop).read()


def launch_step(
    engine: Any,
    batches: Iterable[Batch],
    lr: float,
    stop: bool = False,
    before_update: Callable[[], None] = lambda: None,
) -> Launched:
    """One optimiser step over this rank's micro-batches. Collective.

    A step whose loss or gradient is not finite leaves the weights and AdamW's moments as they were.

    Args:
        engine: as `start_engine` gives it.
        batches: the micro-batches.
        lr: the learning rate.
        stop: whether this rank was asked to stop.
        before_update: called when the gradient is on its way and the weights are still those of the step before, which
            may be read there while the device has work.
    """
    for group in engine.basic_optimizer.param_groups:
        group["lr"] = lr
    mine, scale = [], engine.loss_scale_of_ours
    for batch in batches:
        mean, losses = engine(*on(engine.device, batch))
        engine.backward(scale.times(mean))
        mine.append(losses.double())
        if not engine.is_gradient_accumulation_boundary():
            engine.step()
    each = torch.cat(mine)
    sums = [each.sum(), *(torch.full_like(each[0], number) for number in (len(each), float(stop)))]
    total = torch.stack(sums)
    dist.all_reduce(total)
    before_update()
    loss, used = total[0] / total[1], scale.value
    norm = _update(engine, loss)
    applied = norm.isfinite() & loss.isfinite()
    forgiven = scale.step(overflowed=loss.isfinite() & ~applied)
    return Launched(torch.stack([loss, norm, applied, total[2] > 0, used, forgiven]).double(), each)


def _update(engine: Any, loss: Tensor) -> Tensor:
    """Take the optimiser's step, which changes nothing where loss or gradient are not finite; the gradient's norm.

    No value is read: AdamW looks at `found_inf` on the device.
    """
    optimizer = engine.basic_optimizer
    optimizer.found_inf = (~loss.isfinite()).to(zero_shards.owned(engine)[0].device, torch.float32)
    noted: list[Tensor] = []

    def note(norm: Tensor) -> None:
        noted.append(norm)
        refused = (~norm.isfinite() | (norm < 0)).to(optimizer.found_inf)
        optimizer.found_inf = torch.maximum(optimizer.found_inf, refused)

    if engine.zero_optimization_stage() == 0:  # alone in neither reporting the norm nor refusing a gradient of nan
        parameters = [p for p in engine.module.parameters() if p.requires_grad]
        for parameter in parameters:  # what the loss does not depend on moves by its momentum, as on several ranks
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = nn.utils.clip_grad_norm_(parameters, engine.clip_without_zero or math.inf)
        note(norm)
        engine.step()
        return norm
    with _norms_judged_by(note):
        engine.step()
    if not noted:  # nothing would have kept a gradient of nan out of the weights
        raise RuntimeError(
            f"DeepSpeed {version('deepspeed')} does not show the norm of its gradients at ZeRO stage "
            f"{engine.zero_optimization_stage()}, as 0.19.8 does: install that version"
        )
    told = engine.get_global_grad_norm() if engine.was_step_applied() else math.inf
    return told if isinstance(told, Tensor) else torch.full_like(loss, math.nan if told is None else told)


@contextmanager
def _norms_judged_by(note: Callable[[Tensor], None]) -> Iterator[None]:
    """Inside, DeepSpeed hands every norm of gradients to `note`, and reads none itself.

    It has no option for that: two of its functions, which look whether a norm is finite and wait for the answer, are
    replaced for as long as its step takes.
    """
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    def left(norm: Any, *_: object, **__: object) -> bool:
        note(torch.as_tensor(norm))
        return False

    names = ("is_invalid_grad_norm", "mask_nan_or_inf_with_val_inplace")
    before = [(module, name, getattr(module, name, None)) for module in (stage_1_and_2, stage3) for name in names]
    known = [(module, name, function) for module, name, function in before if function is not None]
    for module, name, _ in known:
        setattr(module, name, left)
    try:
        yield
    finally:
        for module, name, function in known:
            setattr(module, name, function)
