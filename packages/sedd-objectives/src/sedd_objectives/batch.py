"""What every loss does before its formula: check and noise the batch, and ask the model at the positions that count."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Generator, Tensor, nn

from .checks import (
    check_given,
    check_sigma,
    check_states,
    check_weight,
    expand_leading,
    reading_waits,
    require,
)
from .interfaces import Graph, MaskGraph, Noise, NoisingGraph, PosteriorModel, ScoreModel
from .times import stratified_times

__all__ = [
    "check_clean",
    "check_kept",
    "check_possible",
    "check_process",
    "check_times",
    "check_logits",
    "counted",
    "keep_given",
    "logit_rows",
    "noised",
    "over_tokens",
    "score_rows",
    "spread",
]


def noised(
    graph: NoisingGraph,
    noise: Noise,
    x0: Tensor,
    t: Tensor | None,
    xt: Tensor | None,
    *,
    given: Tensor | None = None,
    generator: Generator | None,
    t_min: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The noised batch of a loss whose arguments these are, checked; given positions stay clean.

    Returns:
        x_t (B, L); sigma as the schedule gives it, for the score model; sigma and dsigma (B, L).
    """
    if t is None:
        t = stratified_times(len(x0), generator=generator, t_min=t_min, device=x0.device)
    t = check_times(t, x0)
    sigma, dsigma = noise(t)
    check_sigma("sigma", sigma)
    per_position, dsigma = expand_leading("sigma", sigma, x0), expand_leading("dsigma", dsigma, x0)
    if xt is None:
        xt = keep_given(graph.sample(x0, sigma, generator=generator), x0, given)
    else:
        check_states("xt", xt, graph.num_states, x0.shape)
        check_kept(xt, x0, given)
    return xt, sigma, per_position, dsigma


def check_clean(
    x0: Tensor,
    graph: Graph | MaskGraph,
    weight: Tensor | None = None,
    given: Tensor | None = None,
    noise: Noise | None = None,
) -> Tensor | None:
    """Check a clean batch, and what is to count of it: one rule for every loss and bound.

    Graph and schedule are objects, not their classes. x0 is (B, L) with at least one sequence and position, holds
    states, and no mask but where a weight of 0 says that the position is padding. Given positions are clean, too.

    Returns:
        The factor (B, L) of each position's loss: its weight, or 0 where it is given; None if all count alike.

    Raises:
        ValueError: anything else.
    """
    check_process(graph, noise)
    if not isinstance(x0, Tensor):
        raise ValueError(f"x0 must be a tensor (B, L) of token ids, got a {type(x0).__name__}: is the order right?")
    if x0.ndim != 2 or x0.numel() == 0:
        raise ValueError(f"x0 must have shape (B, L) with B and L at least 1, got {tuple(x0.shape)}")
    check_states("x0", x0, graph.num_states)
    weight = None if weight is None else check_weight(weight, x0)
    given = None if given is None else check_given(given, x0)
    mask_id: int | None = getattr(graph, "mask_id", None)
    if mask_id is not None:
        masks = x0 == mask_id
        if weight is not None:
            masks = masks & ((weight > 0) if given is None else (weight > 0) | given)
        expected = f"x0 must hold clean tokens, and no mask (mask_id {mask_id}) where it counts or is given"
        require(~masks.any(), expected, lambda: f"got it at {int(masks.sum())} of {masks.numel()} positions")
    return counted(weight, given)


def check_process(graph: object, noise: object) -> None:
    """Raise unless they are a graph and a schedule (None where there is none): the usual slip is the class."""
    for name, part, example in (("graph", graph, "Absorbing(50257)"), ("noise", noise, "LogLinear()")):
        if isinstance(part, type):
            raise ValueError(f"the {name} must be an object such as {example}, got the class {part.__name__}")
    if not hasattr(graph, "num_states"):
        raise ValueError(f"the graph must have num_states and its rates, got a {type(graph).__name__}")
    if noise is not None and not callable(noise):
        raise ValueError(f"the noise must be callable as noise(t) -> (sigma, dsigma), got a {type(noise).__name__}")


def counted(weight: Tensor | None, given: Tensor | None) -> Tensor | None:
    """The factor (B, L) of each position's loss, of checked arguments: its weight, or 0 where it is given."""
    if given is None:
        return weight
    if weight is None:
        return (~given).to(torch.float32)
    expected = "every position is given or has a weight of 0: nothing is left to count"
    require((weight * ~given).any(), expected, lambda: "drop such batches")
    return weight * ~given


def check_times(t: Tensor, x0: Tensor) -> Tensor:
    """Times (B,) or (B, L), one number () spread over the batch: a network is given one a sequence at least.

    Raises:
        ValueError: another shape or dtype.
    """
    if not t.is_floating_point() or t.shape not in ((), x0.shape[:1], x0.shape):
        expected = f"{tuple(x0.shape[:1])} or {tuple(x0.shape)}"
        raise ValueError(f"t must be floating, of shape (B,) or (B, L), {expected}, got {t.dtype} of {tuple(t.shape)}")
    return t if t.ndim else t.expand(len(x0))


def keep_given(xt: Tensor, x0: Tensor, given: Tensor | None) -> Tensor:
    """X_t with the given positions clean."""
    return xt if given is None else torch.where(given, x0, xt)


def check_kept(xt: Tensor, x0: Tensor, given: Tensor | None) -> None:
    """Raise unless the noised states that a caller brings are clean where they are given."""
    if given is not None:
        noisy = given & (xt != x0)
        expected = "xt must be x0 where it is given"
        require(~noisy.any(), expected, lambda: f"it differs at {int(noisy.sum())} of these positions")


def check_possible(x: Tensor, x0: Tensor, live: Tensor, weight: Tensor | None = None) -> None:
    """Raise unless a state into which no jump leads is the clean one: it can have come from no other.

    Where jumps lead into x, an impossible x0 shows as a ratio that is no number.
    """
    impossible = ~live & (x != x0)
    if weight is not None:
        impossible = impossible & (weight > 0)
    expected = "every x must be able to have come from its x0; no jump leads into it, and it is another state"
    require(~impossible.any(), expected, lambda: f"got such pairs at {int(impossible.sum())} of {x.numel()} positions")


def score_rows(
    score: ScoreModel,
    x: Tensor,
    sigma: Tensor,
    where: Tensor,
    num_states: int,
    *,
    demand: str = "the score model must return log_score",
) -> tuple[Tensor, Tensor | None]:
    """The score model's output at the true positions of `where`, from one call, computing no more rows than it offers.

    Args:
        score: the score model.
        x: (B, L) int64.
        sigma: total noise, as the score model takes it.
        where: (B, L) bool, M true positions.
        num_states: N.
        demand: how an error about the output begins.

    Returns:
        log_score and positions: either rows (M, N) and None, or all rows (B, L, N) and the (M,) int64 flat positions.
    """
    try:
        if _offers_where(score):
            log_score, shape, positions = score(x, sigma, where=where), (int(where.sum()), num_states), None  # type: ignore[call-arg]
        else:
            log_score, shape, positions = score(x, sigma), (*x.shape, num_states), where.flatten().nonzero()[:, 0]
    except TypeError as error:
        if _takes_tokens_alone(score):
            raise ValueError(
                f"the model is called as model(x, sigma), and this {type(score).__name__} takes the tokens alone: hand "
                "in lambda x, sigma: network(x)"
            ) from error
        raise
    if not isinstance(log_score, Tensor) or log_score.shape != shape:
        raise ValueError(f"{demand} of shape {shape}, got {_shape_told(log_score, shape)}")
    return log_score, positions


def _shape_told(answer: object, shape: tuple[int, ...]) -> str:
    """What a model returned in the place of this shape, and what to do about a head over the tokens alone."""
    if not isinstance(answer, Tensor):
        return type(answer).__name__
    told = str(tuple(answer.shape))
    if answer.shape == (*shape[:-1], shape[-1] - 1):
        told += (
            ": if it is the mask's column that is missing, add one of -inf, F.pad(out, (0, 1), value=-math.inf); if V "
            "counts the mask, as the size of a tokenizer with a mask does, the graph is Absorbing(V - 1, mask_id=m)"
        )
    return told


def logit_rows(
    model: PosteriorModel, x: Tensor, sigma: Tensor, where: Tensor, num_states: int
) -> tuple[Tensor, Tensor | None]:
    """`score_rows` of a model of the clean token, whose output must be logits."""
    logits, positions = score_rows(model, x, sigma, where, num_states, demand="the model must return logits")
    check_logits(logits.reshape(-1, num_states))
    return logits, positions


def check_logits(logits: Tensor) -> None:
    """Raise if the first of the rows (M, N) are all probabilities: >= 0 with sum 1, as logits of a network never are.

    Only a few rows are looked at, and only where reading values makes nobody wait.
    """
    rows = logits[:8].detach().to(torch.float32)
    if rows.numel() == 0 or reading_waits(rows.device):
        return
    near_one = ((rows.sum(-1) - 1).abs() < 1e-3).all()
    require(
        ~(near_one & (rows >= 0).all()),
        "the model must return logits of the clean token, of which a softmax is taken here",
        lambda: "got rows that are >= 0 and sum to 1: these are probabilities, pass their logarithm",
    )


def _offers_where(score: ScoreModel) -> bool:
    return "where" in _parameters(score)


def _takes_tokens_alone(score: ScoreModel) -> bool:
    kinds = [parameter.kind for parameter in _parameters(score).values()]
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(kind in by_place for kind in kinds) == 1 and inspect.Parameter.VAR_POSITIONAL not in kinds


def _parameters(score: ScoreModel) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(score.forward if isinstance(score, nn.Module) else score).parameters
    except (TypeError, ValueError):  # traced and scripted modules have none
        return {}


def over_tokens(logits: Tensor, mask_id: int | None) -> Tensor:
    """The logits (..., N) with the mask, if there is one, ruled out."""
    if mask_id is None:
        return logits
    return logits.index_fill(-1, torch.tensor([mask_id], device=logits.device), -torch.inf)


def spread(values: Tensor, where: Tensor) -> Tensor:
    """Values (M,) put at the true positions of `where`, 0 elsewhere."""
    return values.new_zeros(where.shape).masked_scatter(where, values)
