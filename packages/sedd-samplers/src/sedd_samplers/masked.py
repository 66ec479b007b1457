"""Steps for graphs in which tokens turn into the mask and nothing else happens to them.

When every token turns into the mask at the same rate b, a token is masked at total noise sigma with probability

    lambda(sigma) = 1 - exp(-b sigma)          (called 1 - alpha in the literature of masked diffusion)

and given that it is masked, what it was does not depend on sigma: the noise says when, the posterior what. A masked
position stays so over a step from t to s with probability lambda_s / lambda_t, and else holds a token from p(x0 | x_t):

    Unmasking             Tweedie's step (19), which decides first who moves and asks the model about those only
    Remasking             the same with tokens taken back, ReMDM
    ConfidenceUnmasking   as many tokens as the schedule says, the best first: MaskGIT, LLaDA
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .controls import Control, apply_controls
from .interfaces import Graph
from .positions import Positions
from .precision import wide
from .randomness import draw_categorical
from .reverse import Reverse
from .steps import Stay, Weights, tweedie_posterior, unmasking_weights
from .waiting import require

__all__ = [
    *("Unmasking", "Remasking", "RemaskSchedule", "capped", "rescaled", "at_rate"),
    *("ConfidenceUnmasking", "Order", "confidence", "entropy", "margin", "random_order"),
    *("Rule", "threshold", "entropy_bound", "absorption_rate", "mask_probability"),
]


@dataclass(frozen=True)
class Unmasking:
    """Tweedie's step for absorbing graphs and normalised posteriors, at the price of the positions that move.

        p(x_s = mask | x_t = mask) = lambda_s / lambda_t
        p(x_s = y    | x_t = mask) = (1 - lambda_s / lambda_t) p(x0 = y | x_t)

    Whether a position moves can be drawn before the network is called. This is Tweedie's step (19) in another order,
    equal in law, and it costs far less: the head runs at the positions that move, L rows in a whole run instead of
    L steps / 2; and a sequence in which none moves is left out of the call, which leaves of N steps of equal chance

        N (1 - (1 - 1/N)^L)

    calls a sequence of L tokens: 0.63 of them for N = L = 1024. Sahoo et al. 2024 (arXiv 2406.07524) save the calls by
    keeping the last answer, for networks that do not know the time; decided in this order there is nothing to keep, and
    the network may know it.

    First order in the step. A score whose posterior does not sum to 1 is taken as its normalised posterior.

    Raises:
        ValueError: when called, for a graph that is not absorbing.
    """

    def __call__(self, reverse: Reverse, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """One step; see `Method`."""
        rate = rate_of(reverse, "Unmasking")
        sigma = reverse.noise(t)[0]
        before, after = mask_probability(sigma, rate), mask_probability(reverse.noise(s)[0], rate)
        masked = reverse.movable(x)
        where = masked & (reverse.uniforms_at(masked) >= (after / before)[:, None])
        return redraw_clean(reverse, x, sigma, where)


RemaskSchedule = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(sigma_t (B,), sigma_s (B,), r_max (B,)) -> r (B,) in [0, r_max]."""


@dataclass(frozen=True)
class Remasking:
    """The absorbing reverse process in which tokens can be taken back, with one evaluation of the score a step.

    Wang et al., *Remasking discrete diffusion models with inference-time scaling* (ReMDM, 2025). With lambda the mask
    probability and alpha = 1 - lambda, a step from t to s remasks every token with a probability r, and unmasks every
    mask with so much more that each position's law stays what it was (their equation 5):

        a token:   mask with r
        a mask:    token y with p(x0 = y | x_t) (alpha_s - (1 - r) alpha_t) / lambda_t
                   mask with (lambda_s - r alpha_t) / lambda_t

        0 <= r <= min(1, lambda_s / alpha_t)

    At r = 0 this is Tweedie's step. How r depends on the step is a schedule, a callable (sigma_t, sigma_s, r_max) -> r:

        capped(eta)      min(r_max, eta)                          section 4.1
        rescaled(eta)    eta r_max                                section 4.1
        at_rate(gamma)   min(r_max, gamma (sigma_t - sigma_s))    the forward process at gamma times its rate, and as
                                                                  much more of the reverse: predictor and corrector

    One position by itself keeps its exact law under any of them, at any number of steps. Several positions that move in
    the same step do not see each other. Under `at_rate` the number of moves does not grow with the number of steps and
    the law converges to the true one, at first order; under the two others tokens are taken back at every step, however
    short, and what is left of the error does not vanish. With a model that is itself in error that can be a good
    bargain.

    Args:
        schedule: the probability with which a step remasks a token.

    Raises:
        ValueError: when called, for a graph that is not absorbing, and where the schedule leaves [0, r_max].
    """

    schedule: RemaskSchedule

    def __call__(self, reverse: Reverse, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """One step; see `Method`."""
        graph = reverse.graph
        rate = rate_of(reverse, "Remasking")
        assert graph.mask_id is not None
        sigma_t, sigma_s = reverse.noise(t)[0], reverse.noise(s)[0]
        lambda_t, lambda_s = mask_probability(sigma_t, rate), mask_probability(sigma_s, rate)
        alpha_t = 1 - lambda_t
        r_max = (lambda_s / alpha_t).clamp(max=1)
        r = self.schedule(sigma_t, sigma_s, r_max)
        require(
            *((r >= 0) & (r <= r_max), "the remasking schedule must stay within [0, r_max]"),
            lambda: f"the remasking schedule must stay within [0, r_max], got {r.tolist()} of {r_max.tolist()}",
        )
        stay = (lambda_s - r * alpha_t) / lambda_t

        def unmask(log_score: Tensor, x: Tensor, sequence: Tensor, position: Tensor) -> Tensor:
            clean = tweedie_posterior(log_score, x, graph, sigma_t[sequence])
            kept = stay[sequence].to(clean.dtype)
            clean.mul_(1 - kept[:, None])
            clean[:, graph.mask_id] = kept
            return clean

        tokens = (x != graph.mask_id) & ~reverse.frozen
        return reverse.flip(reverse.redraw(x, sigma_t, reverse.movable(x), unmask), tokens, graph.mask_id, r)


def capped(eta: float) -> RemaskSchedule:
    """R = min(r_max, eta) with eta in [0, 1]."""
    _check("eta", eta, most=1)
    return lambda sigma_t, sigma_s, r_max: r_max.clamp(max=eta)


def rescaled(eta: float) -> RemaskSchedule:
    """R = eta r_max with eta in [0, 1]."""
    _check("eta", eta, most=1)
    return lambda sigma_t, sigma_s, r_max: eta * r_max


def at_rate(gamma: float) -> RemaskSchedule:
    """R = min(r_max, gamma (sigma_t - sigma_s)) with gamma >= 0."""
    _check("gamma", gamma, most=float("inf"))
    return lambda sigma_t, sigma_s, r_max: torch.minimum(r_max, gamma * (sigma_t - sigma_s))


def _check(name: str, value: float, most: float) -> None:
    if not 0 <= value <= most or value == float("inf"):
        raise ValueError(f"{name} must be finite and lie in [0, {most:g}], got {value!r}")


Order = Callable[[Tensor, Tensor], Tensor]
"""(posterior (M, N), drawn token (M,) int64) -> (M,): the highest first."""


def confidence(posterior: Tensor, token: Tensor) -> Tensor:
    """Log-probability of the drawn token, in nats."""
    return posterior.gather(1, token[:, None]).log()[:, 0]


def entropy(posterior: Tensor, token: Tensor) -> Tensor:
    """Minus the entropy of the posterior, in nats."""
    return torch.xlogy(posterior, posterior).sum(-1)


def margin(posterior: Tensor, token: Tensor) -> Tensor:
    """The highest probability minus the second highest."""
    top = posterior.topk(2).values
    return top[:, 0] - top[:, 1]


def random_order(posterior: Tensor, token: Tensor) -> Tensor:
    """The same for all."""
    return torch.zeros_like(posterior[:, 0])


@dataclass(frozen=True)
class Rule:
    """How many of the ranked positions of a sequence may be unmasked at once.

    Attributes:
        statistic: what is read off each position's posterior and drawn token.
        within: its values (B, K), a sequence's best position first and NaN behind its last -> (B, K) bool.
    """

    statistic: Order
    within: Callable[[Tensor], Tensor]


def threshold(probability: float) -> Rule:
    """Every token of at least this probability: parallel decoding by confidence.

    Wu et al., *Fast-dLLM* (arXiv 2505.22618, 2025), who prove that greedy parallel decoding of n tokens is greedy
    sequential decoding where each has a probability above 1 - 1 / (n + 1). ValueError unless 0 < probability <= 1.
    """
    if not 0 < probability <= 1:
        raise ValueError(f"threshold must lie in (0, 1], got {probability!r}")
    return Rule(confidence, lambda log_p: log_p >= math.log(probability))


def entropy_bound(gamma: float) -> Rule:
    """The longest row U of the best positions with sum of H - max of H over U at most gamma, in nats.

    Ben-Hamu et al., *Accelerated sampling from masked diffusion models via entropy bounded unmasking* (arXiv
    2505.24857, 2025): what is given up by drawing the positions of U as if they were independent is at most that. At
    gamma = 0 one position at a time, and what is certain beside it. ValueError unless finite and at least 0.
    """
    if not 0 <= gamma < float("inf"):
        raise ValueError(f"gamma must be finite and at least 0, got {gamma!r}")
    return Rule(
        lambda posterior, token: -entropy(posterior, token),
        lambda H: H.cumsum(1) - H.cummax(1).values <= gamma,
    )


@dataclass(frozen=True)
class ConfidenceUnmasking:
    """Unmasks the first positions by some order, for absorbing graphs; one evaluation of the score a step.

    Chang et al., *MaskGIT: masked generative image transformer* (2022); Nie et al., *Large language diffusion models*
    (LLaDA, 2025). A step draws a token for every masked position, ranks the positions, and keeps the tokens of the
    first few. How many is read off the grid: at time s, round(F lambda(s)) of a sequence's F free positions are masked,
    so that a log-linear schedule unmasks equally many a step and a cosine schedule MaskGIT's numbers. The orders are
    callables (posterior (M, N), drawn token (M,)) -> (M,), the highest first:

        confidence      log p of the drawn token              MaskGIT, LLaDA
        entropy         minus the posterior's entropy         Ye et al., Dream 7B (2025)
        margin          first minus second probability        Kim et al., Train for the worst, plan for the best (2025)
        random_order    0: any order                          Hoogeboom et al., Autoregressive diffusion models (2022)

    With a rule, the number is the rule's or the grid's, whichever is greater, and at least one: with as many steps as
    there are positions the rule decides alone, and the steps that are left when all is done cost nothing.

        threshold(p)            every token of at least probability p             Wu et al., Fast-dLLM (2025)
        entropy_bound(gamma)    while sum of H - max of H is at most gamma nats   Ben-Hamu et al., EB-Sampler (2025)

    Equal positions come in random order. Ranks are read off the model's own posterior, while `controls` change what
    tokens are drawn from: `ConfidenceUnmasking(confidence, controls=(top_k(1),))` is greedy decoding. (A score whose
    posterior has but one token left would be equally confident everywhere.)

    These are heuristics: they choose what is likely, and the samples do not follow the model's distribution. One
    position a step, they do for every order that does not look at the drawn token: that is the chain rule of
    probability, in an order that depends on what is known.

    Args:
        order: what ranks the masked positions.
        randomness: how much Gumbel noise, times the mask probability, is added to the rank; MaskGIT's temperature.
        controls: temperature, top-k and the like, applied in this order to what tokens are drawn from, not to what
            ranks them; what a grid leaves to the final denoise is drawn without them.
        rule: how many more than the grid says may be unmasked in a step; None: none.

    Raises:
        ValueError: for a negative randomness; when called, for a graph that is not absorbing.
    """

    order: Order = confidence
    randomness: float = 0.0
    controls: tuple[Control, ...] = ()
    rule: Rule | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.randomness < float("inf"):
            raise ValueError(f"randomness must be finite and at least 0, got {self.randomness!r}")

    def __call__(self, reverse: Reverse, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """One step; see `Method`."""
        rate = rate_of(reverse, "ConfidenceUnmasking")
        sigma = reverse.noise(t)[0]
        masked = reverse.movable(x)
        left = ((~reverse.frozen).sum(1) * mask_probability(reverse.noise(s)[0], rate)).round()
        due = (masked.sum(1) - left).clamp(min=0)
        if self.rule is None:
            masked = masked & (due > 0)[:, None]
        at = reverse.positions(masked)
        if not at.sequences:
            return x
        posteriors = reverse.rows_at(
            x, sigma, at, lambda log_score, x, b, _: tweedie_posterior(log_score, x, reverse.graph, sigma[b]), masked
        )
        uniform, u = reverse.uniforms_at(masked, at), reverse.uniforms_at(masked, at)
        token, rank, value = torch.empty_like(at.flat), torch.empty_like(u), torch.empty_like(u)
        for part in posteriors.parts():
            law = posterior = posteriors[part]
            old, wanted = x.flatten()[at.flat[part]], at.wanted_in(part)
            if self.controls:
                law = apply_controls(self.controls, posterior, at.sequence[part], at.position[part], x, wanted=wanted)
            token[part] = draw_categorical(law, uniform[part], old=old, wanted=wanted)
            reverse.tell(at.flat[part], law, token[part], old)
            rank[part] = self.order(posterior, token[part]).to(wide(x.device))
            if self.rule is not None:
                value[part] = self.rule.statistic(posterior, token[part]).to(wide(x.device))
        if self.randomness:
            gumbel = -torch.log(-torch.log1p(-u))
            rank += self.randomness * mask_probability(sigma, rate)[at.sequence] * gumbel
        place = _first(masked, at, rank, u)
        chosen = place < due[:, None]
        if self.rule is not None:
            by_place = torch.full_like(place, torch.nan, dtype=wide(x.device)).scatter(
                1, place, _over(masked, at, value)
            )
            chosen |= (place == 0) | self.rule.within(by_place).gather(1, place)
        return torch.where(chosen & masked, x.flatten().index_put((at.flat,), token).view_as(x), x)


def redraw_clean(
    reverse: Reverse, x: Tensor, sigma: Tensor, where: Tensor, *, among: Positions | None = None
) -> Tensor:
    """X (B, L) with the masks at `where` (B, L) bool replaced by tokens of the posterior at noise sigma (B,)."""

    def kernel(log_score: Tensor, x: Tensor, sequence: Tensor, position: Tensor) -> Tensor:
        return tweedie_posterior(log_score, x, reverse.graph, sigma[sequence])

    def moves(x: Tensor, sequence: Tensor) -> tuple[Weights, Stay]:
        return unmasking_weights(reverse.graph, x, sigma[sequence]), torch.zeros_like

    return reverse.redraw(x, sigma, where, kernel, moves=moves, among=among)


def _first(where: Tensor, at: Positions, rank: Tensor, tie: Tensor) -> Tensor:
    """The place (B, L) of each true position of `where` in its sequence: highest rank (M,) first, then highest tie."""
    # all that are due before any that is not
    of_tie, of_rank = (_over(where, at, key.to(wide(key.device)).nan_to_num(), -torch.inf) for key in (tie, rank))
    by_tie = of_tie.argsort(1, descending=True)
    by_rank = of_rank.gather(1, by_tie).argsort(dim=1, descending=True, stable=True)
    return by_tie.gather(1, by_rank).argsort(1)


def _over(where: Tensor, at: Positions, values: Tensor, elsewhere: float = torch.nan) -> Tensor:
    """Values (M,) float64 of the positions `at` as (B, L), with another number where `where` (B, L) is false."""
    spread = torch.full((where.numel(),), elsewhere, dtype=wide(where.device), device=where.device)
    return spread.index_put((at.flat,), values).view_as(where).masked_fill(~where, elsewhere)


def rate_of(reverse: Reverse, wanted_by: str) -> float:
    """The rate of absorption, looked up once a run; ValueError for a graph that is not absorbing."""
    return reverse.once("absorption", lambda: absorption_rate(reverse.graph, reverse.frozen.device, wanted_by))


def absorption_rate(graph: Graph, device: torch.device, wanted_by: str) -> float:
    """The rate b at which every token turns into the mask.

    Args:
        graph: the forward process.
        device: where its rows are asked for.
        wanted_by: who needs to know, for the error.

    Raises:
        ValueError: if the graph is not absorbing: it has no mask, or something else can happen to a token than to turn
            into the mask, or not every token does so at the same rate.
    """
    states = torch.arange(graph.num_states, device=device)
    if graph.mask_id is None:
        raise ValueError(f"{wanted_by} needs an absorbing graph; this one has no mask (mask_id is None)")
    into = graph.rates_into(states)
    entered = (into.base > 0) | (into.value > 0).any(-1)
    if bool(entered[states != graph.mask_id].any()):
        state = int((entered & (states != graph.mask_id)).nonzero()[0])
        raise ValueError(f"{wanted_by} needs an absorbing graph; under this one a jump leads into the token {state}")
    mask = graph.rates_into(states[graph.mask_id])
    rates = (
        mask.base.to(wide(device))
        .expand(len(states))
        .scatter(0, mask.index, mask.value.to(wide(device)))[states != graph.mask_id]
    )
    slowest, fastest = float(rates.min()), float(rates.max())
    if slowest <= 0 or fastest - slowest > 1e-6 * fastest:
        raise ValueError(
            f"{wanted_by} needs an absorbing graph with one rate for all tokens; under this one they turn into the "
            f"mask at rates from {slowest:.6g} to {fastest:.6g}"
        )
    return fastest


def mask_probability(sigma: Tensor, rate: float = 1.0) -> Tensor:
    """1 - exp(-rate sigma), of sigma's shape."""
    return -torch.expm1(-rate * sigma)
