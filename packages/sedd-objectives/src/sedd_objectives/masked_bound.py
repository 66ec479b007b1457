"""The bound on -log p(x0) of a score model under absorption, measured at each number of masks in turn.

The masks of an absorbing process that masks at rate r are independent given the mask probability lambda = 1 -
e^-(r sigma), and given their number k they are any k of the L free positions with equal probability, while lambda has
the distribution Beta(k, L + 1 - k). Written in lambda and sorted by k the diffusion term (eq. 10) is

    integral over sigma of E sum_masked DSE  =  sum_{k=1}^{L} P_k E_{lambda | k} E_{k masks} [ 1/k sum_masked g ],
    g = lambda / (1 - lambda) / r * DSE(x, x0)   per masked position,

where lambda is kept within its range, lambda_0 at t_min to lambda_1 at t = 1, and P_k is the probability of that range,
P( Bin(L, lambda_1) >= k ) - P( Bin(L, lambda_0) >= k ).

For s_y = c_y / (e^sigma - 1), c a distribution over tokens, g is -log c_{x0}, whatever lambda, where the integrand over
t is of the order of 1 / t with probability t. So the sum over k, drawn in equal parts of 1..L, deviates less.

What is left comes from which positions are masked, and next to which others. Some calls go ahead (pilots) and guess g:
with masks far from each other, with pairs of them, and with nothing but masks. The other calls need but correct

    b(M) = (1 - k/L) sum_{i in M} ( alone_i + [i + 1 in M] right_i + [i - 1 in M] left_i ) + k/L sum_{i in M} all_i,

whose mean over the sets M of k masks is known, so that for any guess, made without the calls that follow, neither the
mean nor the standard error is biased:

    E 1/k b(M) = 1/L sum_i ( (1 - k/L) (alone_i + (k - 1) / (L - 1) (right_i + left_i)) + k/L all_i ).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from . import fast
from .batch import check_clean, score_rows, spread
from .bound import Bound, reconstruction_loss
from .checks import arithmetic_dtype, check_evaluations, check_not_nan, sum_dtype
from .denoising import denoising_jumps
from .interfaces import LikelihoodGraph, Noise, ScoreModel
from .jumps import RatesInto, value_at

__all__ = ["masked_likelihood_bound", "masks_evenly"]

ROUNDING = 1e-4
"""Relative difference of rates that is put down to float32."""


@torch.no_grad()
def masked_likelihood_bound(
    score: ScoreModel,
    graph: LikelihoodGraph,
    noise: Noise,
    x0: Tensor,
    *,
    num_times: int = 108,
    num_parts: int = 8,
    num_reconstructions: int = 3,
    given: Tensor | None = None,
    weight: Tensor | None = None,
    generator: Generator | None = None,
    t_min: float = 1e-3,
) -> Bound:
    """Estimate the bound of `likelihood_bound` under an absorbing process, stratified over the number of masks.

    The same number for the same model, from fewer calls: see the README. A model of p(x0 | unmasked tokens) that does
    not ask for the noise has `any_order_loss`, which needs no schedule.

    Args:
        score: the score model; called num_times + (2 num_parts + 1) + num_reconstructions times with all of x0.
        graph: the forward process: every token of x0 must go to the mask at one rate and nowhere else, and the mask
            must stay. This is read off its rows.
        noise: the schedule.
        x0: (B, L) int64, tokens.
        num_times: evaluations of the diffusion loss a sequence, two in each of num_times / 2 equal parts of 1..L; even.
        num_parts: into which the positions are cut by the pilots; 0 for no pilots.
        num_reconstructions: evaluations of the reconstruction term a sequence; at least 2.
        given: (B, L) bool, positions that stay clean, are seen and not counted: the bound is on -log p(rest | given).
        weight: (B,) or (B, L) factor >= 0 of each position in all three terms; 0 for padding, which is noised along.
        generator: for noise.
        t_min: the lower end of the integral, where the reconstruction term takes over.

    Returns:
        The bound, every field (B,); 0 for a sequence that is given altogether.

    Raises:
        ValueError: a process that is not absorbing, the mask among the clean states, shapes that do not fit, states
            out of range, a NaN score, an odd or too small number of evaluations, t_min not in (0, 1).
    """
    _check_numbers(num_times, num_parts, num_reconstructions, t_min)
    factor = check_clean(x0, graph, weight, given, noise)
    rate, mask_id = _masking(graph, x0)
    free = torch.ones_like(x0, dtype=torch.bool) if given is None else ~given
    dtype, batch = sum_dtype(x0.device), len(x0)
    ends = torch.tensor([t_min, 1.0], device=x0.device)
    sigma = noise(ends)[0].to(dtype)
    low, high = -torch.expm1(-rate * sigma)
    problem = _Problem(score, graph, x0, free, factor, rate, mask_id, generator)
    levels = _Levels(free.sum(-1), x0.shape[1], low, high)

    guess = problem.guess(num_parts, dtype) if num_parts else None
    diffusion = x0.new_zeros(batch, dtype=dtype) if guess is None else guess.total(levels.probabilities())
    variance = torch.zeros_like(diffusion)
    length = free.sum(-1)
    strata = num_times // 2
    for stratum in range(strata):
        unit = torch.rand(2, batch, generator=generator, device=x0.device, dtype=dtype)
        pair = []
        for place in (stratum + unit) / strata:
            count = (place * length).long().clamp_max(length - 1) + 1
            masked, (level, probability) = problem.mask(count), levels.draw(count, generator)
            loss = problem.losses(masked, level).sum(-1)
            excess = loss if guess is None else loss - guess.at(masked)
            pair.append(probability * length / count.clamp_min(1) * excess)
        diffusion = diffusion + (pair[0] + pair[1]) / num_times
        variance = variance + ((pair[0] - pair[1]) / num_times) ** 2

    draws = torch.stack([problem.reconstruction(noise, low, t_min) for _ in range(num_reconstructions)])
    reconstruction = draws.mean(0)
    variance = variance + draws.var(0) / num_reconstructions
    kl = graph.prior_kl(x0, sigma[1].expand(batch)).to(dtype) * free
    prior = (kl if factor is None else kl * factor).sum(-1)
    return Bound(diffusion + prior + reconstruction, variance.sqrt(), diffusion, prior, reconstruction)


class _Problem(NamedTuple):
    """The sequences, the model and the process whose draws are asked for."""

    score: ScoreModel
    graph: LikelihoodGraph
    x0: Tensor
    free: Tensor
    factor: Tensor | None
    rate: float
    mask_id: int
    generator: Generator | None

    def mask(self, count: Tensor) -> Tensor:
        """`count` (B,) of the free positions at random, (B, L) bool."""
        return (self._uniform().masked_fill(~self.free, torch.inf).argsort(-1).argsort(-1) < count[:, None]) & self.free

    def losses(self, masked: Tensor, level: Tensor) -> Tensor:
        """The loss g of every position (B, L) with the masks (B, L) bool at the mask probability (B,); 0 elsewhere."""
        counted = masked if self.factor is None else masked & (self.factor > 0)
        x = self.x0.masked_fill(masked, self.mask_id)
        sigma = (-torch.log1p(-level) / self.rate).to(torch.get_default_dtype())
        log_score, positions = score_rows(self.score, x, sigma, counted, self.graph.num_states)
        rows, dtype = log_score.reshape(-1, self.graph.num_states), arithmetic_dtype(log_score)
        jumps_at = denoising_jumps(self.graph, RatesInto.of(self.graph, x), x[counted], self.x0[counted], dtype)
        levels = sigma[:, None].expand(x.shape)[counted].to(level.dtype)
        loss = fast.score_entropy_rows(rows, positions, jumps_at, levels, dtype=dtype).to(level.dtype)
        check_not_nan(loss, log_score)
        odds = level / (1 - level) / self.rate
        factor = odds[:, None] if self.factor is None else odds[:, None] * self.factor
        return spread(loss, counted) * factor

    def guess(self, parts: int, dtype: torch.dtype) -> _Guess:
        """The guess of the losses, from 2 parts + 1 calls."""
        part = torch.arange(self.x0.shape[1], device=self.x0.device) % parts
        alone, right, left = torch.zeros(3, *self.x0.shape, dtype=dtype, device=self.x0.device)
        for i in range(parts):
            following = (i + 1) % parts
            alone = alone + self._pilot(part == i)
            pairs = self._pilot((part == i) | (part == following))
            right, left = torch.where(part == i, pairs, right), torch.where(part == following, pairs, left)
        neighbours = nn.functional.pad(self.free, (1, 1))
        right = torch.where(self.free & neighbours[:, 2:], right - alone, 0)
        left = torch.where(self.free & neighbours[:, :-2], left - alone, 0)
        return _Guess(self.free, alone, right, left, self._pilot(self.free))

    def _pilot(self, masked: Tensor) -> Tensor:
        """The losses (B, L) with the free ones among these masks, at the mean of the lambdas that go with them."""
        masked = masked & self.free
        level = masked.sum(-1).clamp_min(1) / (self.free.sum(-1).clamp_min(1) + 1).to(sum_dtype(masked.device))
        return self.losses(masked, level)

    def reconstruction(self, noise: Noise, level: Tensor, t_min: float) -> Tensor:
        """One draw of the reconstruction term, (B,): with one mask at least, times the probability that there is one.

        Of L uniform numbers the least is drawn first, below lambda, and then the others above it.
        """
        u, length = self._uniform(), self.free.sum(-1)
        some = -torch.expm1(length * torch.log1p(-level))
        least = -torch.expm1(torch.log1p(-some * u[:, 0]) / length.clamp_min(1))[:, None]
        masked = (least + (1 - least) * self._uniform() < level) & self.free
        first = self._uniform().masked_fill(~self.free, torch.inf).argmin(-1, keepdim=True)
        masked = masked.scatter(-1, first, True) & self.free
        t = torch.full_like(level, t_min, dtype=torch.get_default_dtype()).expand(len(u))
        loss = reconstruction_loss(
            *(self.score, self.graph, noise, self.x0, t),
            xt=self.x0.masked_fill(masked, self.mask_id),
            weight=self.factor,
        )
        return some * loss

    def _uniform(self) -> Tensor:
        """(B, L) uniform numbers, fine enough for the least of many."""
        x0 = self.x0
        return torch.rand(x0.shape, generator=self.generator, device=x0.device, dtype=sum_dtype(x0.device))


class _Guess(NamedTuple):
    """What the pilots say of the losses of the free positions; every field (B, L), 0 elsewhere."""

    free: Tensor
    alone: Tensor
    """With no other mask near."""
    right: Tensor
    """What it adds that the next position is masked, too."""
    left: Tensor
    """The same of the one before."""
    all: Tensor
    """With masks alone."""

    def at(self, masked: Tensor) -> Tensor:
        """b(M), (B,), of the masks (B, L) bool."""
        neighbours = nn.functional.pad(masked, (1, 1))
        before, after = neighbours[:, :-2], neighbours[:, 2:]
        few = self.alone + self.right * after + self.left * before
        share = masked.sum(-1).to(self.all.dtype) / self.free.sum(-1).clamp_min(1)
        return ((1 - share) * (few * masked).sum(-1)) + share * (self.all * masked).sum(-1)

    def total(self, probability: Tensor) -> Tensor:
        """sum_k P_k E 1/k b(M), (B,), given the P_k (B, L), k = 1 .. L."""
        length = self.free.sum(-1, keepdim=True)
        count = torch.arange(1, probability.shape[1] + 1, dtype=probability.dtype, device=length.device)
        share = count / length.clamp_min(1)
        alone, right, left, of_all = (part.sum(-1, keepdim=True) for part in self[1:])
        few = alone + (count - 1) / (length - 1).clamp_min(1) * (right + left)
        return (probability * ((1 - share) * few + share * of_all)).sum(-1) / length[:, 0].clamp_min(1)


class _Levels:
    """The law of the mask probability lambda given the number of masks, Beta(k, L + 1 - k) within [low, high]."""

    def __init__(self, length: Tensor, longest: int, low: Tensor, high: Tensor) -> None:
        self.low, self.high = low, high
        self.count = torch.arange(longest + 1, device=length.device)
        total = length[:, None].to(low.dtype)
        self.others = total - self.count
        chosen = self.count.to(low.dtype)
        self.log_ways = torch.lgamma(total + 1) - torch.lgamma(chosen + 1) - torch.lgamma(self.others + 1)
        self.log_ways = self.log_ways.masked_fill(self.others < 0, -torch.inf)
        self.others = self.others.clamp_min(0)

    def draw(self, count: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
        """Lambda given `count` (B,), and the probability P_k of its range: (B,) each."""
        below, above = (self.at_least(count, end.expand(count.shape)) for end in (self.low, self.high))
        unit = torch.rand(count.shape, generator=generator, device=count.device, dtype=below.dtype)
        wanted = below + unit * (above - below)
        least, most = self.low.expand(count.shape), self.high.expand(count.shape)
        for _ in range(50):
            middle = (least + most) / 2
            too_low = self.at_least(count, middle) < wanted
            least, most = torch.where(too_low, middle, least), torch.where(too_low, most, middle)
        return (least + most) / 2, above - below

    def probabilities(self) -> Tensor:
        """P_k for k = 1 .. L, (B, L); 0 beyond a sequence's length."""
        low, high = (
            self._log_probability(end.expand(len(self.others))).exp().flip(-1).cumsum(-1).flip(-1)[:, 1:]
            for end in (self.low, self.high)
        )
        return high - low

    def at_least(self, count: Tensor, level: Tensor) -> Tensor:
        """P( Bin(L, level) >= count ), (B,): the distribution function of lambda given k = count."""
        return torch.where(self.count >= count[:, None], self._log_probability(level).exp(), 0).sum(-1)

    def _log_probability(self, level: Tensor) -> Tensor:
        """Log P( Bin(L, level) = k ), k = 0 .. L, (B, L + 1)."""
        level = level[:, None]
        log_p: Tensor = self.log_ways + torch.xlogy(self.count, level) + torch.special.xlog1py(self.others, -level)
        return log_p


def masks_evenly(graph: LikelihoodGraph, x0: Tensor) -> bool:
    """Whether every token of x0 becomes the mask, all at one rate, and nothing else, as `masked_likelihood_bound` asks.

    Given their number, masks are then anywhere with equal probability. It is read off the graph's rows.

    Args:
        graph: the forward process.
        x0: (...) int64, tokens; the mask among them does not count.
    """
    return _masking_rate(graph, x0) is not None


def _masking(graph: LikelihoodGraph, x0: Tensor) -> tuple[float, int]:
    """The rate at which tokens are masked, and the mask; raises unless the tokens of x0 go there alone, at one rate."""
    mask_id = graph.mask_id
    if mask_id is None:
        raise ValueError("graph must have a mask, got mask_id None; use likelihood_bound")
    rate = _masking_rate(graph, x0)
    if rate is None:
        raise ValueError(
            "graph must be one that turns every token of x0 into the mask, at one rate, and does nothing else: given "
            "their number, masks are then anywhere with equal probability. This one is not; use likelihood_bound"
        )
    return rate, mask_id


def _masking_rate(graph: LikelihoodGraph, x0: Tensor) -> float | None:
    """The rate at which the tokens of x0 are masked; None if they do anything else, or not all at one rate."""
    if graph.mask_id is None:
        return None
    tokens = torch.unique(x0[x0 != graph.mask_id])  # padding may hold it
    if not len(tokens):
        return 1.0
    into_mask = graph.rates_into(torch.full_like(tokens[:1], graph.mask_id))
    rates = value_at(into_mask, tokens[None])[0].double()
    rate = float(rates.mean())
    if not bool((rates > 0).all()) or not bool(((rates - rate).abs() <= ROUNDING * rate).all()):
        return None
    return rate if _absorbs(graph, tokens, torch.full_like(tokens, graph.mask_id), rate) else None


def _absorbs(graph: LikelihoodGraph, tokens: Tensor, masks: Tensor, rate: float) -> bool:
    """Whether a token becomes nothing but the mask and the mask stays: p(y|x0) / p(mask|x0) tells after sigma = 1/rate.

    It is 1 / (e - 1) at y = x0 and 0 at the other tokens.
    """
    sigma = torch.full(tokens.shape, 1 / rate, dtype=sum_dtype(tokens.device), device=tokens.device)
    ratio = graph.ratio(masks, tokens, sigma)
    stays = value_at(ratio, tokens[:, None])[:, 0]
    expected = 1 / torch.expm1(rate * sigma)
    elsewhere = ratio.value.masked_fill((ratio.index == tokens[:, None]) | (ratio.index == masks[:, None]), 0)
    unlisted = ratio.base if ratio.index.shape[-1] < graph.num_states else torch.zeros_like(ratio.base)
    leak = torch.cat([unlisted[:, None], elsewhere], -1).abs().amax()
    return bool(((stays - expected).abs() <= ROUNDING * expected).all()) and bool(leak <= ROUNDING * expected.amax())


def _check_numbers(num_times: int, num_parts: int, num_reconstructions: int, t_min: float) -> None:
    check_evaluations(num_times, num_reconstructions, t_min)
    if num_parts < 0:
        raise ValueError(f"num_parts must be at least 0, got {num_parts}")
