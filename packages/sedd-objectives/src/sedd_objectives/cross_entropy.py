"""Cross-entropy: the diffusion loss of a model that outputs p(x0 | x_t), under an absorbing process.

There a masked position has the score s(x)_y = c_y / (e^sigma - 1), where c_y = p(x0 = y | the unmasked tokens) sums to
one (Ou et al. 2024, arXiv 2406.03736). Put into the denoising score entropy, all but one term cancels:

    DSE(x, x0) = -log c_{x0} / (e^sigma - 1)  at masked positions, 0 elsewhere

In three coordinates the integral of eq. 10 is then

    t        integral over t of  dsigma / (e^sigma - 1)  E sum_masked -log c_{x0}
    lambda   integral over lambda = 1 - e^-sigma in [0, 1] of  1 / lambda  E sum_masked -log c_{x0}
    order    E_k  L / k  E sum_masked -log c_{x0},  k ~ U{1..L} positions masked at random

The last two are bounds on -log p(x0) with nothing to add: lambda = 1 is all masks, lambda = 0 clean data. The last is
that of any-order autoregressive models. It says nothing of noise; to a model that asks for it, it gives a lambda drawn
from its law given k, Beta(k, L + 1 - k), so that both are the same number for any model.

That the process is absorbing is read off its rows: the clean state must be the only one that a position can go back to.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from . import fast
from .batch import check_clean, check_logits, check_possible, logit_rows, noised, spread
from .checks import arithmetic_dtype, check_sigma, check_states, expand_leading, require
from .interfaces import Graph, MaskGraph, Noise, PosteriorModel
from .jumps import can_move, merge
from .times import stratified_times

__all__ = ["denoising_cross_entropy", "cross_entropy_loss", "lambda_cross_entropy_loss", "any_order_loss"]

ROUNDING = 1e-4
"""Relative difference of rates that is put down to float32."""


def denoising_cross_entropy(logits: Tensor, graph: Graph, x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """-log p(x0 | x) / (e^sigma - 1) where x is absorbed: denoising score entropy, per unit of total noise.

    Equal to `denoising_score_entropy` of log_score = log p(x0 = y | x) - log(e^sigma - 1).

    Args:
        logits: (..., N) float, of the clean state; normalised here, over all states but x.
        graph: the forward process, absorbing; the weight is its Q[x, x0] p(x0|x0) / p(x|x0).
        x: (...) int64, the noised states.
        x0: (...) int64, the clean states.
        sigma: total noise, of a shape that is a leading part of x's.

    Returns:
        (...) nats a position, to be multiplied by dsigma; 0 where no jump leads into x.

    Raises:
        ValueError: shapes that do not fit, states out of range, negative sigma, NaN logits, an x that cannot have come
            from its x0, or a process that is not absorbing.
    """
    num_states = graph.num_states
    if logits.shape != (*x.shape, num_states):
        raise ValueError(f"logits must have shape {(*x.shape, num_states)}, x's and N, got {tuple(logits.shape)}")
    check_logits(logits.reshape(-1, num_states))
    check_states("x", x, num_states)
    check_states("x0", x0, num_states, x.shape)
    check_sigma("sigma", sigma)
    sigma = expand_leading("sigma", sigma, x)
    live = can_move(graph.rates_into(x), x, num_states)
    positions = None if bool(live.all()) else live.flatten().nonzero()[:, 0]
    surprise = _surprise(logits, positions, x[live], x0[live])
    return spread(surprise * rate_back(graph, x[live], x0[live], sigma[live]).to(surprise.dtype), live)


def cross_entropy_loss(
    model: PosteriorModel,
    graph: Graph,
    noise: Noise,
    x0: Tensor,
    t: Tensor | None = None,
    *,
    xt: Tensor | None = None,
    weight: Tensor | None = None,
    given: Tensor | None = None,
    generator: Generator | None = None,
    t_min: float = 1e-3,
) -> Tensor:
    """The integrand of eq. 10 at t, dsigma / (e^sigma - 1) sum_masked -log p(x0 | x_t), in nats a sequence.

    Equal to `denoising_loss` of the matching score; its mean over t ~ U[t_min, 1] times (1 - t_min) is the integral.

    Args:
        model: the model of the clean tokens; called exactly once. Its `where` is used if it has one.
        graph: the forward process, absorbing.
        noise: the schedule t -> (sigma, dsigma).
        x0: (B, L) int64, clean sequences.
        t: (B,) float times, or (B, L) for a time per position; stratified over [t_min, 1) if None.
        xt: (B, L) int64, states already noised; drawn from the forward process if None.
        weight: (B,) or (B, L) factor >= 0 of each position's loss, bool or float; 0 for padding, which then never
            reaches the head.
        given: (B, L) bool, positions that stay clean, are seen by the model and do not count: the loss is that of the
            others given them.
        generator: for the times and the noising.
        t_min: the smallest time drawn.

    Returns:
        (B,) float32, or float64 if the logits are.

    Raises:
        ValueError: as `denoising_cross_entropy`; a weight that is negative somewhere or 0 everywhere.
    """
    weight = check_clean(x0, graph, weight, given, noise)
    drawn = xt is None
    xt, sigma, per_position, dsigma = noised(graph, noise, x0, t, xt, given=given, generator=generator, t_min=t_min)
    factor, live = dsigma, can_move(graph.rates_into(xt), xt, graph.num_states)
    if not drawn:
        check_possible(xt, x0, live, weight)
    if weight is not None:
        factor, live = dsigma * weight, live & (weight > 0)
    logits, positions = logit_rows(model, xt, sigma, live, graph.num_states)
    surprise = _surprise(logits.reshape(-1, graph.num_states), positions, xt[live], x0[live])
    rate = factor[live] * rate_back(graph, xt[live], x0[live], per_position[live])
    return spread(surprise * rate.to(surprise.dtype), live).sum(-1)


def lambda_cross_entropy_loss(
    model: PosteriorModel,
    graph: Graph,
    x0: Tensor,
    mask_probability: Tensor | None = None,
    *,
    xt: Tensor | None = None,
    weight: Tensor | None = None,
    given: Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """1 / lambda sum over masked positions of -log p(x0 | x), in nats a sequence (Ou et al. 2024).

    It is `cross_entropy_loss` with lambda, the mask probability of a graph that masks at rate 1, as time: sigma =
    -log(1 - lambda). Its mean over lambda ~ U[0, 1] is a bound on -log p(x0), with no further terms.

    Args:
        model: the model of the clean tokens; called once.
        graph: the forward process, absorbing.
        x0: (B, L) int64, clean sequences.
        mask_probability: lambda in [0, 1), (B,) or (B, L); stratified over [0, 1) if None.
        xt: (B, L) int64, states already noised; drawn if None.
        weight: (B,) or (B, L) factor >= 0 of each position's loss; 0 for padding.
        given: (B, L) bool, positions that stay clean, are seen by the model and do not count: the loss is that of the
            others given them.
        generator: for lambda and the noising.

    Returns:
        (B,) float32, or float64 if the logits are.

    Raises:
        ValueError: as `cross_entropy_loss`; a lambda outside [0, 1).
    """
    check_clean(x0, graph, weight, given)
    if mask_probability is None:
        mask_probability = stratified_times(len(x0), generator=generator, t_min=0.0, device=x0.device)
    if not bool(((mask_probability >= 0) & (mask_probability < 1)).all()):
        low, high = (float(extreme) for extreme in mask_probability.aminmax())
        raise ValueError(f"mask_probability must lie in [0, 1), got values in [{low}, {high}]")
    return cross_entropy_loss(
        model, graph, _mask_probability, x0, mask_probability, xt=xt, weight=weight, given=given, generator=generator
    )


def any_order_loss(
    model: PosteriorModel,
    graph: MaskGraph,
    x0: Tensor,
    *,
    num_masked: Tensor | None = None,
    weight: Tensor | None = None,
    given: Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """L / k sum over k masked positions of -log p(x0 | the others), k ~ U{1..L}, in nats a sequence.

    Its mean is a bound on -log p(x0): the average over all orders of an autoregressive likelihood (Ou et al. 2024),
    equal to the integral of `lambda_cross_entropy_loss`.

    Args:
        model: the model of the clean tokens; called once.
        graph: the mask's state and the number of states; there is no process.
        x0: (B, L) int64, clean sequences.
        num_masked: k in 1..L, (B,) int64; uniform, and spread evenly over a batch, if None.
        weight: (B,) or (B, L) factor >= 0 of each position's loss, bool or float; 0 for padding, which is masked like
            the rest and never reaches the head.
        given: (B, L) bool, positions that are never masked and do not count in L: the bound is on the rest given them.
        generator: for k, the positions and the noise level that goes with them.

    Returns:
        (B,) float32, or float64 if the logits are.

    Raises:
        ValueError: a graph without a mask, shapes that do not fit, states out of range, the mask among the clean
            states, a k that is not in 1..L, NaN logits, a weight that is negative somewhere or 0 everywhere.
    """
    factor = check_clean(x0, graph, weight, given)
    if graph.mask_id is None:
        raise ValueError("graph must have a mask, got mask_id None: orders are those in which masks are taken off")
    counted = torch.ones_like(x0, dtype=torch.bool) if given is None else ~given
    length = counted.sum(-1)
    if num_masked is None:
        unit = stratified_times(len(x0), generator=generator, t_min=0.0, device=x0.device)
        num_masked = (unit * length).long() + (length > 0)
    else:
        _check_num_masked(num_masked, length)
    # The k smallest of L uniform numbers are at random places, and the largest of them is the lambda that masks those.
    u, order = torch.rand(x0.shape, generator=generator, device=x0.device).masked_fill(~counted, torch.inf).sort(-1)
    first = torch.arange(x0.shape[1], device=x0.device) < num_masked[:, None]
    masked = torch.zeros_like(counted).scatter_(-1, order, first)
    level = u.gather(-1, (num_masked - 1).clamp_min(0)[:, None])[:, 0].clamp_max(1 - torch.finfo(u.dtype).eps / 2)
    xt = x0.masked_fill(masked, graph.mask_id)
    asked = masked if factor is None else masked & (factor > 0)
    logits, positions = logit_rows(model, xt, -torch.log1p(-level), asked, graph.num_states)
    surprise = _surprise(logits.reshape(-1, graph.num_states), positions, xt[asked], x0[asked])
    per_position = (length.to(surprise.dtype) / num_masked.clamp_min(1))[:, None].expand(x0.shape)
    if factor is not None:
        per_position = per_position * factor
    return spread(surprise * per_position[asked].to(surprise.dtype), asked).sum(-1)


def _mask_probability(level: Tensor) -> tuple[Tensor, Tensor]:
    """The schedule whose time is the mask probability: sigma = -log(1 - lambda) and its derivative."""
    return -torch.log1p(-level), 1 / (1 - level)


def _surprise(logits: Tensor, positions: Tensor | None, x: Tensor, x0: Tensor) -> Tensor:
    """-log p(x0) (M,) of the rows `positions` of the logits (R, N), normalised over all states but x (M,)."""
    rows = logits.reshape(-1, logits.shape[-1])
    surprise = fast.each_row(_negative_log, rows, positions, x, x0, dtype=arithmetic_dtype(logits))
    if bool(surprise.isnan().any()):
        raise ValueError(f"logits are NaN, or all -inf, at {int(surprise.isnan().sum())} of {len(surprise)} positions")
    return surprise


def _negative_log(logits: Tensor, x: Tensor, x0: Tensor) -> Tensor:
    logits = logits.scatter(-1, x[:, None], -torch.inf)
    return logits.logsumexp(-1) - logits.gather(-1, x0[:, None])[:, 0]


def rate_back(graph: Graph, x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """Q[x, x0] p(x0|x0) / p(x|x0), (M,): the reverse rate given x0. Raises if there is one to another state."""
    with torch.autocast(x.device.type, enabled=False):
        ratio = graph.ratio(x, x0, sigma)
        jumps = merge(graph.rates_into(x), ratio, x, arithmetic_dtype(ratio.value))
    clean = jumps.index == x0[:, None]
    forward = jumps.weight.masked_fill(~clean, 0).sum(-1, keepdim=True)
    back = jumps.weight * jumps.ratio
    rate = back.masked_fill(~clean, 0).sum(-1, keepdim=True)
    weight = torch.cat([jumps.base_weight[:, None], jumps.weight], -1)
    elsewhere = torch.cat([(jumps.base_weight * jumps.base_ratio)[:, None], back.masked_fill(clean, 0)], -1)
    even = (weight == 0) | ((weight - forward).abs() <= ROUNDING * forward)
    absorbing = (even & ((weight == 0) | (elsewhere <= ROUNDING * rate))).all(-1) & (rate[:, 0] > 0)
    require(
        absorbing.all(),
        "cross-entropy is the diffusion loss of absorbing processes only (use denoising_loss for others): the graph is "
        "not one that absorbs every token at one rate, or x cannot have come from its x0, for in the reverse process x "
        "may become a state other than x0",
        lambda: f"at {int((~absorbing).sum())} of {len(x)} positions",
    )
    return rate[:, 0]


def _check_num_masked(num_masked: Tensor, length: Tensor) -> None:
    if num_masked.is_floating_point() or num_masked.shape != length.shape:
        got = f"{num_masked.dtype} of shape {tuple(num_masked.shape)}"
        raise ValueError(f"num_masked must be integers of shape (B,), {tuple(length.shape)}, got {got}")
    if bool(((num_masked < 1) & (length > 0) | (num_masked > length)).any()):
        counts = f"{length.tolist()} that are not given"
        raise ValueError(f"num_masked must lie in 1..L, of which there are {counts}, got {num_masked.tolist()}")
