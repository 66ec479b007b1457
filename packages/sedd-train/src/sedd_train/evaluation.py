"""The likelihood bound on held-out text, with fixed times and noise, so that its curve is smooth and comparable."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from sedd_objectives import likelihood_bound
from torch import Tensor
from tqdm import tqdm

from sedd_train.randomness import EVALUATION, generator

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """The bound on -log p of held-out text.

    Attributes:
        nats_per_token: its mean over the sequences.
        standard_error: of that mean, over the sequences and the random times and noise, nats a token.
        characters_per_token: of the text.
    """

    nats_per_token: float
    standard_error: float
    characters_per_token: float

    @property
    def perplexity(self) -> float:
        """Exp of the mean nats a token: an upper bound on the model's."""
        return math.exp(min(self.nats_per_token, 700.0))

    @property
    def bits_per_character(self) -> float:
        """The bound in bits a character of text, an end-of-text token being no character."""
        return self.nats_per_token / math.log(2) / self.characters_per_token


@torch.no_grad()
def evaluate(
    net: Any,
    graph: Any,
    noise: Any,
    blocks: Tensor,
    *,
    characters_per_token: float,
    num_times: int = 16,
    seed: int = 0,
    chunk: int = 8,
    progress: bool = False,
) -> Evaluation:
    """The bound of eq. 9 on blocks of tokens, prior and reconstruction terms included.

    Times and noise are the same at every call with the same seed, blocks and chunk. Where several ranks run, each takes
    some of the chunks and all get the result: the network must be whole on every rank.

    Args:
        net: the score model, in evaluation mode, on the device to use.
        graph: the forward process.
        noise: its schedule.
        blocks: (n, L) int64.
        characters_per_token: to report bits a character.
        num_times: noise levels a sequence.
        seed: of times and noise.
        chunk: sequences at once.
        progress: whether to show a bar.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = next(net.parameters()).device
    values = torch.zeros(len(blocks), dtype=torch.float64)
    starts = tqdm(range(0, len(blocks), chunk), desc="evaluating", unit="batch", disable=not progress, leave=False)
    for number, start in enumerate(starts):
        if number % world == rank:
            x0 = blocks[start : start + chunk].to(device)
            random = generator(seed, EVALUATION, number, device=device)
            bound = likelihood_bound(net, graph, noise, x0, num_times=num_times, generator=random)
            values[start : start + chunk] = bound.value.double().cpu()
    if world > 1:
        values = values.to(device)
        dist.all_reduce(values)
        values = values.cpu()
    values = values / blocks.shape[1]
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else float("nan")
    return Evaluation(float(values.mean()), error, characters_per_token)
