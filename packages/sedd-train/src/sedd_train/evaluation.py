"""The likelihood bound on held-out text, whole and by noise level, with fixed times and noise: its curve is smooth.

Two estimators have the same mean (eq. 9), and one is chosen by name:

    times   `likelihood_bound`: random times, for every process
    masks   `masked_likelihood_bound`: random numbers of masks, where noise is masks alone; deviates less
    best    masks where it applies, else times
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from sedd_objectives import Bound, Estimate, corpus_likelihood, likelihood_bound, masked_likelihood_bound, masks_evenly
from torch import Generator, Tensor
from tqdm import tqdm

from sedd_train.labels import given
from sedd_train.objectives import Objective, ScoreEntropy
from sedd_train.randomness import EVALUATION, LEVELS, generator

__all__ = [
    *("Evaluation", "evaluate", "measure", "bounds", "ESTIMATORS", "choose_estimator", "bound_by", "mean_of"),
    *("Levels", "by_noise_level"),
]

ESTIMATORS: dict[str, Callable[..., Bound]] = {"times": likelihood_bound, "masks": masked_likelihood_bound}


@dataclass(frozen=True)
class Evaluation:
    """The bound on -log p of held-out text.

    Attributes:
        nats_per_token: its mean over the sequences.
        standard_error: of that mean, over the sequences and the random times and noise, nats a token: how well these
            sequences stand for others like them.
        characters_per_token: of the text.
        measurement_error: of that mean, over the random times and noise alone: how well the bound of these very
            sequences is known. NaN where it was not estimated.
        estimator: by which name the bound was estimated, "times" or "masks"; empty where there is nothing to choose.
    """

    nats_per_token: float
    standard_error: float
    characters_per_token: float
    measurement_error: float = math.nan
    estimator: str = ""

    @property
    def perplexity(self) -> float:
        """Exp of the mean nats a token: an upper bound on the model's."""
        return math.exp(min(self.nats_per_token, 700.0))

    @property
    def bits_per_character(self) -> float:
        """The bound in bits a character of text, an end-of-text token being no character."""
        return self.nats_per_token / math.log(2) / self.characters_per_token


def choose_estimator(name: str, graph: Any, x0: Tensor) -> str:
    """The estimator of this name; "best" is the one that deviates least on these tokens.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in ("best", *ESTIMATORS):
        raise ValueError(f"estimator must be best, {' or '.join(ESTIMATORS)}, got {name!r}")
    if name != "best":
        return name
    return "masks" if masks_evenly(graph, x0) else "times"


def bound_by(
    estimator: str, net: Any, graph: Any, noise: Any, x0: Tensor, *, num_times: int, generator: Generator, **how: Any
) -> Bound:
    """The bound on -log p(x0), (B,) nats a sequence, by one of `ESTIMATORS`, at so many random times.

    `how` may be given= and weight=, of those. "masks" makes 20 calls of the network more than times, "times" 16.
    """
    return ESTIMATORS[estimator](*(net, graph, noise, x0), num_times=num_times, generator=generator, **how)


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
    estimator: str = "best",
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
        estimator: "times", "masks", or "best" of the two for this graph.

    Raises:
        ValueError: on every rank, if the bound is NaN on one of them, or the blocks are not this graph's; an estimator
            that there is not, or "masks" where noise is something else.
    """
    chosen = choose_estimator(estimator, graph, blocks)

    @torch.no_grad()
    def of_chunk(net: Any, number: int, x0: Tensor, _: Tensor | None) -> Tensor:
        random = generator(seed, EVALUATION, number, device=x0.device)
        found = bound_by(chosen, net, graph, noise, x0, num_times=num_times, generator=random)
        return torch.stack([found.value, found.standard_error], -1)

    values, errors = _of_chunks(of_chunk, net, blocks, None, chunk, progress, columns=(2,)).T
    corpus = corpus_likelihood(Estimate(values, errors), blocks.numel())
    spread = mean_of(values / blocks.shape[1], characters_per_token).standard_error
    error = corpus.standard_error / corpus.num_tokens
    return Evaluation(corpus.nats_per_token, spread, characters_per_token, error, chosen)


def measure(
    net: Any,
    objective: Objective,
    blocks: Tensor,
    *,
    characters_per_token: float,
    lengths: Tensor | None = None,
    **options: Any,
) -> Evaluation:
    """As `evaluate`, of what any objective reports: D3PM's bound, an autoregressive model's likelihood, eq. 9 by times.

    The options are those of `bounds`. With `lengths` it is a ratio, all nats over all tokens that are text.
    """
    values = bounds(net, objective, blocks, lengths=lengths, **options)
    return mean_of(values, characters_per_token, None if lengths is None else lengths / blocks.shape[1])


@torch.no_grad()
def bounds(
    net: Any,
    objective: Objective,
    blocks: Tensor,
    *,
    num_times: int = 16,
    seed: int = 0,
    chunk: int = 8,
    progress: bool = False,
    lengths: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """One number a block, to compare models in pairs: (n,) float64 nats on the CPU, divided by the blocks' length L.

    The arguments are those of `evaluate`, which averages these numbers if it takes the same estimator; `lengths`, (n,)
    int64, says how many tokens of each block are text, all unless given; `labels`, (n,) int64, under which the network
    is told to see it, -1 for none.
    """

    def of_chunk(net: Any, number: int, x0: Tensor, lengths: Tensor | None) -> Tensor:
        random = generator(seed, EVALUATION, number, device=x0.device)
        return objective.bound(net, x0, num_times=num_times, generator=random, lengths=lengths)

    return _of_chunks(of_chunk, net, blocks, lengths, chunk, progress, labels=labels) / blocks.shape[1]


def mean_of(values: Tensor, characters_per_token: float, share: Tensor | None = None) -> Evaluation:
    """Mean and error of n values a token; a ratio's, if only this share (n,) of each block's tokens is text."""
    share = torch.ones_like(values) if share is None else share
    mean = float(values.sum() / share.sum())
    errors = (values - mean * share) / share.mean()
    error = float(errors.std() / math.sqrt(len(values))) if len(values) > 1 else float("nan")
    return Evaluation(mean, error, characters_per_token)


def _of_chunks(
    measure: Callable[[Any, int, Tensor, Tensor | None], Tensor],
    net: Any,
    blocks: Tensor,
    lengths: Tensor | None,
    chunk: int,
    progress: bool = False,
    columns: tuple[int, ...] = (),
    labels: Tensor | None = None,
) -> Tensor:
    """What `measure(net, number, x0, lengths)` gives for each chunk, (n, *columns) float64 on the CPU. Collective.

    Each rank takes some of the chunks. If one of them raises ValueError, all do, after all have come to the end.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = next(net.parameters()).device
    values = torch.zeros(len(blocks), *columns, dtype=torch.float64)
    failure = ""
    starts = tqdm(range(0, len(blocks), chunk), desc="evaluating", unit="batch", disable=not progress, leave=False)
    for number, start in enumerate(starts):
        if number % world == rank and not failure:
            try:
                part = slice(start, start + chunk)
                own, told = (None if rows is None else rows[part].to(device) for rows in (lengths, labels))
                values[part] = measure(given(net, told), number, blocks[part].to(device), own).double().cpu()
            except ValueError as raised:  # kept until all ranks know of it: the others would wait for this one
                failure = str(raised)
    _raise_together(failure)
    if world > 1:
        values = values.to(device)
        dist.all_reduce(values)
        values = values.cpu()
    return values


def _raise_together(failure: str) -> None:
    """Raise on every rank if one of them has failed. Collective."""
    failures = [failure]
    if dist.is_initialized():
        failures = [""] * dist.get_world_size()
        dist.all_gather_object(failures, failure)
    for failure in failures:
        if failure:
            raise ValueError(failure)


@dataclass(frozen=True)
class Levels:
    """The diffusion loss on held-out text, cut into equal intervals of time. All are (K,) float64 on the CPU.

    Attributes:
        t: the intervals' middles.
        nats_per_token: what each interval adds to the integral of eq. 10; their sum is the bound without its end terms.
        standard_error: of each, over the sequences and their random times and noise.
    """

    t: Tensor
    nats_per_token: Tensor
    standard_error: Tensor


@torch.no_grad()
def by_noise_level(
    net: Any,
    graph: Any,
    noise: Any,
    blocks: Tensor,
    *,
    num_levels: int = 16,
    t_min: float = 1e-3,
    seed: int = 0,
    chunk: int = 8,
    lengths: Tensor | None = None,
    labels: Tensor | None = None,
) -> Levels:
    """Where in time the loss on held-out text comes from: eq. 10's integral over K equal parts of [t_min, 1].

    Every sequence gets one random time in each interval, the same at every call with the same seed, blocks and chunk.
    Several ranks share the work as in `evaluate`.

    Args:
        net: the score model, in evaluation mode, on the device to use.
        graph: the forward process.
        noise: its schedule.
        blocks: (n, L) int64.
        num_levels: K.
        t_min: where the integral begins.
        seed: of times and noise.
        chunk: sequences at once.
        lengths: (n,) int64, how many tokens of each block are text; all, unless given.
        labels: (n,) int64, under which the network is told to see each; -1 for none.

    Raises:
        ValueError: on every rank, if the loss is NaN on one of them.
    """
    objective = ScoreEntropy(graph, noise)
    tokens = blocks.shape[1] if lengths is None else float(lengths.double().mean())

    def measure(net: Any, number: int, x0: Tensor, lengths: Tensor | None) -> Tensor:
        random = generator(seed, LEVELS, number, device=x0.device)
        losses = []
        for level in range(num_levels):
            u = torch.rand(len(x0), generator=random, device=x0.device)
            t = (t_min + (1 - t_min) * (level + u) / num_levels).clamp_max(1)
            losses.append(objective.loss(net, x0, t, generator=random, lengths=lengths))
        return torch.stack(losses, 1)

    values = _of_chunks(measure, net, blocks, lengths, chunk, columns=(num_levels,), labels=labels)
    values *= (1 - t_min) / num_levels / tokens
    error = values.std(0) / math.sqrt(len(values)) if len(values) > 1 else torch.full((num_levels,), math.nan).double()
    middles = t_min + (1 - t_min) * (torch.arange(num_levels, dtype=torch.float64) + 0.5) / num_levels
    return Levels(middles, values.mean(0), error)
