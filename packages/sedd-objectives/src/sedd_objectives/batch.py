"""What every loss does before its formula: check and noise the batch, and ask the model at the positions that count."""

from __future__ import annotations

import inspect

from torch import Generator, Tensor, nn

from .checks import check_sigma, check_states, expand_leading
from .interfaces import Graph, Noise, ScoreModel
from .times import stratified_times

__all__ = ["check_clean", "noised", "score_rows", "spread"]


def noised(
    graph: Graph,
    noise: Noise,
    x0: Tensor,
    t: Tensor | None,
    xt: Tensor | None,
    *,
    generator: Generator | None,
    t_min: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The noised batch of a loss whose arguments these are, checked.

    Returns:
        x_t (B, L); sigma as the schedule gives it, for the score model; sigma and dsigma (B, L).
    """
    check_clean(x0, graph.num_states)
    if t is None:
        t = stratified_times(len(x0), generator=generator, t_min=t_min, device=x0.device)
    sigma, dsigma = noise(t)
    check_sigma("sigma", sigma)
    per_position, dsigma = expand_leading("sigma", sigma, x0), expand_leading("dsigma", dsigma, x0)
    if xt is None:
        xt = graph.sample(x0, sigma, generator=generator)
    else:
        check_states("xt", xt, graph.num_states, x0.shape)
    return xt, sigma, per_position, dsigma


def check_clean(x0: Tensor, num_states: int) -> None:
    """Raise ValueError unless x0 is a batch (B, L) of states."""
    if x0.ndim != 2:
        raise ValueError(f"x0 must have shape (B, L), got {tuple(x0.shape)}")
    check_states("x0", x0, num_states)


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
    if _offers_where(score):
        log_score, shape, positions = score(x, sigma, where=where), (int(where.sum()), num_states), None  # type: ignore[call-arg]
    else:
        log_score, shape, positions = score(x, sigma), (*x.shape, num_states), where.flatten().nonzero()[:, 0]
    if not isinstance(log_score, Tensor) or log_score.shape != shape:
        got = tuple(log_score.shape) if isinstance(log_score, Tensor) else type(log_score).__name__
        raise ValueError(f"{demand} of shape {shape}, got {got}")
    return log_score, positions


def _offers_where(score: ScoreModel) -> bool:
    return "where" in inspect.signature(score.forward if isinstance(score, nn.Module) else score).parameters


def spread(values: Tensor, where: Tensor) -> Tensor:
    """Values (M,) put at the true positions of `where`, 0 elsewhere."""
    return values.new_zeros(where.shape).masked_scatter(where, values)
