"""Steps that take back what was drawn, so that an error can be mended: beside `PredictorCorrector` and `Remasking`.

    Psi               a step's posterior, mixed with noise anew: any graph
    LeaveOneOut       redraws some positions from their law given all others: graphs that noise tokens
    ByConfidence      ReMDM in which the tokens that were drawn with least confidence go first: absorbing graphs
    PathPlanning      P2: the most plausible positions hold tokens, the others masks: absorbing graphs
    Looped            a schedule that stands still for a while, ReMDM's loop; `when_still` remasks there alone

Psi and `Remasking` leave a single position's law exactly as it is at every level of noise, whatever the number of
steps; several positions that move in the same step do not see each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapters.heads import fit, without_mask
from .controls import Control, apply_controls
from .fast import times_row
from .interfaces import Graph, Noise
from .leave_one_out import carry, concrete_score, without_own
from .masked import RemaskSchedule, mask_probability, rate_of
from .model_calls import ModelCall
from .positions import Positions
from .precision import wide
from .randomness import draw_categorical
from .reverse import Reverse
from .steps import Method, Tweedie, tweedie_posterior
from .waiting import require

__all__ = ["Psi", "psi_probs", "LeaveOneOut", "ByConfidence", "PathPlanning", "Looped", "when_still"]


@dataclass(frozen=True)
class Psi:
    """The superposition of a step back and of noise anew: Psi-samplers, for any graph, one evaluation a step.

        Psi(x_s | x_t) = sum_{x0} p(x0 | x_t) [ kappa q(x_s | x_t, x0) + (1 - kappa) q(x_s | x0) ]

    Deschenaux, Gulcehre and Sahoo, *The diffusion duality, chapter II: Psi-samplers and efficient curriculum* (arXiv
    2602.21185, 2026). Both summands have x_s's right law given x0, so that a single position keeps its own at any
    number of steps. At kappa = 1 it is `Ancestral`; below, every position is noised anew from what the model takes it
    for with the probability 1 - kappa, at every step however short, and what is left of the error does not vanish with
    their length. Under an absorbing graph it is `Remasking` with the probability (1 - kappa) lambda_s. Every free
    position can move, so that all of them reach the network's head.

    Args:
        kappa: the share of the step back, in [0, 1]: a number, or a function of the times t (B,) that gives (B,).

    Raises:
        ValueError: for a number outside [0, 1].
    """

    kappa: float | Callable[[Tensor], Tensor] = 0.98

    def __post_init__(self) -> None:
        if not callable(self.kappa) and not 0 <= self.kappa <= 1:
            raise ValueError(f"kappa must lie in [0, 1], got {self.kappa!r}")

    def __call__(self, reverse: Reverse, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """One step; see `Method`."""
        sigma_t, sigma_s = reverse.noise(t)[0], reverse.noise(s)[0]
        kappa = self.kappa(t) if callable(self.kappa) else torch.full_like(t, self.kappa)

        def kernel(log_score: Tensor, x: Tensor, sequence: Tensor, position: Tensor) -> Tensor:
            return psi_probs(log_score, x, reverse.graph, sigma_s[sequence], sigma_t[sequence], kappa[sequence])

        return reverse.redraw(x, sigma_t, ~reverse.frozen, kernel)


def psi_probs(log_score: Tensor, x: Tensor, graph: Graph, sigma_s: Tensor, sigma_t: Tensor, kappa: Tensor) -> Tensor:
    """sum_{x0} p(x0 | x_t = x) [ kappa q(x_s | x, x0) + (1 - kappa) q(x_s | x0) ].

    Args:
        log_score: (M, N) float; of states that nothing leads into it is ignored.
        x: (M,) int64.
        graph: the forward process.
        sigma_s: (M,) the total noise after the step.
        sigma_t: (M,) the total noise before it, at least sigma_s.
        kappa: (M,) in [0, 1].

    Returns:
        (M, N), each row summing to 1; negative by no more than rounding.
    """
    into = graph.rates_into(x)
    entered = (into.base > 0) | (into.value > 0).any(-1)
    clean = tweedie_posterior(log_score.where(entered[:, None], -torch.inf), x, graph, sigma_t)
    sigma_s, sigma_t, kappa = (a.to(clean.dtype) for a in (sigma_s, sigma_t, kappa[:, None]))
    anew = carry(clean, graph, sigma_s).mul_(1 - kappa)
    earlier = carry(without_own(clean, x, graph, sigma_t), graph, sigma_s)
    return times_row(earlier, graph.transition_into(x, sigma_t - sigma_s)).mul_(kappa).add_(anew)


@dataclass(frozen=True)
class LeaveOneOut:
    """A predictor's step, and then Gibbs steps: some positions redrawn from their law given all the others.

        p_s(x^i = y | other positions) = s_y / sum_z s_z,       s_x = 1

    The concrete score is that law up to its norm, whatever the graph. A position by itself leaves p_s exactly as it is;
    several at once do not see each other, so that a small share at a time is redrawn. Of a token under an absorbing
    graph the score says nothing, and there `Remasking` is the way. How many are redrawn the host reads once a
    correction; where any state can be left it reads nothing else.

    Zhao et al., *Informed correctors for discrete diffusion models* (arXiv 2407.21243, 2024), use the same law.

    Args:
        predictor: the method that makes the step.
        share: the probability with which a position is redrawn.
        corrections: how many times.

    Raises:
        ValueError: for a share outside (0, 1] or corrections < 1; when called, for a graph in which tokens do not turn
            into tokens.
    """

    predictor: Method = Tweedie()  # noqa: RUF009, frozen and without state
    share: float = 0.1
    corrections: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share must lie in (0, 1], got {self.share!r}")
        if isinstance(self.corrections, bool) or not isinstance(self.corrections, int) or self.corrections < 1:
            raise ValueError(f"corrections must be a positive integer, got {self.corrections!r}")

    def __call__(self, reverse: Reverse, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """One step; see `Method`."""
        if not reverse.noises_tokens:
            raise ValueError(
                "LeaveOneOut redraws tokens from their score, and under this graph a token's score says nothing: take "
                "tokens back by Remasking, ByConfidence or Psi"
            )
        with reverse.reading_later():
            x = self.predictor(reverse, x, t, s)
        sigma = reverse.noise(s)[0]
        for _ in range(self.corrections):
            where = reverse.movable(x) & (sigma > 0)[:, None]
            where = where & (reverse.uniforms_at(where) < self.share)
            x = reverse.redraw(x, sigma, where, lambda log_score, x, b, i: concrete_score(log_score, x))
        return x


@dataclass(frozen=True)
class ByConfidence:
    """Remasking of the tokens that were drawn with least confidence, with one evaluation of the score a step.

    Wang et al., *Remasking discrete diffusion models with inference-time scaling* (ReMDM, 2025), section 4.1: the
    probability r of `Remasking`'s schedule is shared out among a sequence's tokens by

        eta_i = exp(-psi_i) / sum over its tokens of exp(-psi_j),        r_i = eta_i r

    psi_i being the probability with which the token was drawn. A mask has eta = 0: it moves as in `Unmasking`. So the
    positions do not keep their law, and more masks are left than the schedule says; the last step unmasks them.

    Args:
        schedule: r; see `Remasking`.

    Raises:
        ValueError: when called, for a graph that is not absorbing, and where the schedule leaves [0, r_max].
    """

    schedule: RemaskSchedule

    def __call__(self, reverse: Reverse, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """One step; see `Method`."""
        graph, rate = reverse.graph, rate_of(reverse, "ByConfidence")
        assert graph.mask_id is not None
        sigma_t, sigma_s = reverse.noise(t)[0], reverse.noise(s)[0]
        lambda_t, lambda_s = mask_probability(sigma_t, rate), mask_probability(sigma_s, rate)
        r_max = (lambda_s / (1 - lambda_t)).clamp(max=1)
        r = self.schedule(sigma_t, sigma_s, r_max)
        require(
            *((r >= 0) & (r <= r_max), "the remasking schedule must stay within [0, r_max]"),
            lambda: f"the remasking schedule must stay within [0, r_max], got {r.tolist()}",
        )
        psi = reverse.once(("psi", x.shape), lambda: torch.ones(x.shape, dtype=wide(x.device), device=x.device))
        tokens = (x != graph.mask_id) & ~reverse.frozen
        eta = (-psi).masked_fill(~tokens, -torch.inf).softmax(1).nan_to_num()
        after = self._unmask(reverse, x, sigma_t, lambda_s / lambda_t, psi)
        return reverse.flip(after, tokens, graph.mask_id, eta * r[:, None])

    def _unmask(self, reverse: Reverse, x: Tensor, sigma: Tensor, stay: Tensor, psi: Tensor) -> Tensor:
        """`Unmasking`'s step, which notes in psi (B, L) with what probability each token was drawn."""
        where = reverse.movable(x)
        where = where & (reverse.uniforms_at(where) >= stay[:, None])
        at = reverse.positions(where)
        if not at.sequences:
            return x
        posteriors = reverse.rows_at(
            x, sigma, at, lambda log_score, x, b, _: tweedie_posterior(log_score, x, reverse.graph, sigma[b]), where
        )
        old, uniform = x.flatten()[at.flat], reverse.uniforms_at(where, at)
        token, drawn = torch.empty_like(old), torch.empty_like(uniform)
        for part in posteriors.parts():
            posterior = posteriors[part]
            token[part] = draw_categorical(posterior, uniform[part], old=old[part], wanted=at.wanted_in(part))
            reverse.tell(at.flat[part], posterior, token[part], old[part])
            drawn[part] = posterior.gather(1, token[part, None])[:, 0].to(drawn.dtype)
        psi.copy_(torch.where(where, psi.flatten().index_put((at.flat,), drawn.to(psi.dtype)).view_as(psi), psi))
        return torch.where(where, x.flatten().index_put((at.flat,), token).view_as(x), x)


@dataclass(frozen=True)
class PathPlanning:
    """P2: a step draws a token for every mask, and then masks the least plausible positions, tokens or not.

    Peng et al., *Path planning for masked diffusion model sampling* (P2, arXiv 2502.03540, 2025). A mask's draft is
    ranked by its log-probability under the model, a token that stands by eta times its log-probability under a planner,
    and of a sequence's F free positions the round(F lambda(s)) lowest are masked:

        eta = 0     tokens stay: `ConfidenceUnmasking` by confidence
        eta = 1     the same measure for both: greedy, with self-correction
        eta > 1     tokens are taken back more readily

    The planner is a network of logits. It may be the sampler's own (self-planning), and with its answer kept that is
    one call a step:

        network = cached(network)
        sample(from_logits(network, graph), graph, noise, shape=(8, 256), method=PathPlanning(network))

    Or another that reads the whole draft, such as a masked language model trained as BERT was.

    Args:
        planner: (x (B, L) int64, sigma (B,)) -> logits (B, L, N) of each position's token, a mask column or none; it
            may offer `where` and `rows`.
        eta: how much a token's own log-probability counts, at least 0.
        reads_draft: whether the planner reads the draft, in which no mask is left, instead of the states.
        controls: applied to what tokens are drawn from, not to what ranks them.

    Raises:
        ValueError: for a negative eta, or a planner that is not callable; when called, for a graph that is not
            absorbing or an answer of another shape.
    """

    planner: Callable[..., Tensor]
    eta: float = 1.0
    reads_draft: bool = False
    controls: tuple[Control, ...] = ()

    def __post_init__(self) -> None:
        if not callable(self.planner):
            raise ValueError(f"the planner must be callable as planner(x, sigma), got {self.planner!r}")
        if not 0 <= self.eta < float("inf"):
            raise ValueError(f"eta must be finite and at least 0, got {self.eta!r}")

    def __call__(self, reverse: Reverse, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """One step; see `Method`."""
        graph, rate = reverse.graph, rate_of(reverse, "PathPlanning")
        assert graph.mask_id is not None
        sigma, free, masked = reverse.noise(t)[0], ~reverse.frozen, reverse.movable(x)
        left = (free.sum(1) * mask_probability(reverse.noise(s)[0], rate)).round()
        free &= (masked.any(1) | (left > 0))[:, None]
        at, masks, tokens = reverse.positions_of(free, free & masked, free & ~masked)
        draft, plausible = x, torch.zeros(x.shape, dtype=wide(x.device), device=x.device)
        if masks.sequences:
            draft, plausible = self._draft(reverse, x, sigma, at, masks, free & masked)
        if self.eta > 0 and tokens.sequences:
            standing = self._planned(reverse, draft if self.reads_draft else x, x, sigma, at, tokens)
            plausible = torch.where(free & ~masked, self.eta * standing, plausible)
        lowest = plausible.masked_fill(~free, torch.inf).argsort(1).argsort(1) < left[:, None]
        return torch.where(free & lowest, graph.mask_id, draft)

    def _draft(
        self, reverse: Reverse, x: Tensor, sigma: Tensor, at: Positions, masks: Positions, where: Tensor
    ) -> tuple[Tensor, Tensor]:
        """X (B, L) with a token for every mask of `where` (B, L) bool, and the log-probability of each, elsewhere 0.

        `at` are the positions that are asked about, and `masks` those of them that hold all of `where`.
        """
        posteriors = reverse.rows_at(
            x, sigma, at, lambda log_score, x, b, _: tweedie_posterior(log_score, x, reverse.graph, sigma[b]), where
        )
        rows, old, uniform = masks.rows_of(at), x.flatten()[masks.flat], reverse.uniforms_at(where, masks)
        token, drawn = torch.empty_like(old), torch.empty_like(uniform)
        for part in posteriors.pieces(len(masks)):
            posterior, wanted = posteriors[rows[part]], masks.wanted_in(part)
            law = posterior
            if self.controls:
                law = apply_controls(
                    self.controls, posterior, masks.sequence[part], masks.position[part], x, wanted=wanted
                )
            token[part] = draw_categorical(law, uniform[part], old=old[part], wanted=wanted)
            reverse.tell(masks.flat[part], law, token[part], old[part])
            drawn[part] = posterior.gather(1, token[part, None])[:, 0].to(drawn.dtype).log()
        draft = torch.where(where, x.flatten().index_put((masks.flat,), token).view_as(x), x)
        return draft, torch.where(where, _spread(drawn, masks), 0.0)

    def _planned(
        self, reverse: Reverse, seen: Tensor, x: Tensor, sigma: Tensor, at: Positions, tokens: Positions
    ) -> Tensor:
        """The planner's log-probability of each of the tokens of x, having seen `seen`; (B, L), elsewhere 0."""
        graph, rows, picked = reverse.graph, torch.arange(len(x), device=x.device), tokens.rows_of(at)
        if not at.whole:
            at, rows = at.in_sequences_that_have_any()
        call = ModelCall(self.planner, graph.num_states, "planner", widths=without_mask(graph))
        logits = call(seen[rows], sigma[rows].to(torch.float32), at, rows)
        plausible = torch.empty(len(tokens), dtype=wide(x.device), device=x.device)
        for part in logits.pieces(len(tokens)):
            token = x.flatten()[tokens.flat[part], None]
            log_p = fit(logits[picked[part]], graph).index_fill(1, _column(graph, x.device), -torch.inf).log_softmax(-1)
            plausible[part] = log_p.gather(1, token)[:, 0].to(plausible.dtype)
        return _spread(plausible, tokens)


def _spread(values: Tensor, at: Positions) -> Tensor:
    """Values (M,) of some positions as (B, L), elsewhere 0."""
    return values.new_zeros(at.where.numel()).index_put((at.flat,), values).view(at.where.shape)


def _column(graph: Graph, device: torch.device) -> Tensor:
    """The mask's."""
    assert graph.mask_id is not None
    return torch.full((1,), graph.mask_id, device=device)


@dataclass(frozen=True)
class Looped:
    """A schedule that falls to the noise of the time `at`, stands there still, and falls on: ReMDM's loop.

        t in [on, 1]     runs through [at, 1] of the schedule
        t in [off, on]   stands at `at`: what `Remasking(when_still(eta))` takes back there, it draws again
        t in [0, off]    runs through [0, at]

    Wang et al. 2025, section 4.2, whose alpha_on is 1 minus the mask probability at `at`.

        sample(score, graph, Looped(noise, at=0.1, on=0.55, off=0.05), method=Remasking(when_still(0.02)), ...)

    Args:
        noise: the schedule.
        at: where it stands still, in (0, 1).
        on: when that begins.
        off: when it ends, 0 < off < on < 1.

    Raises:
        ValueError: for times that do not lie so.
    """

    noise: Noise
    at: float
    on: float
    off: float

    def __post_init__(self) -> None:
        if not (0 < self.off < self.on < 1 and 0 < self.at < 1):
            raise ValueError(
                f"a loop needs 0 < off < on < 1 and at in (0, 1), got off = {self.off!r}, on = {self.on!r}, "
                f"at = {self.at!r}"
            )

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(sigma, dsigma) at t, both of t's shape."""
        early, late = self.at / self.off, (1 - self.at) / (1 - self.on)
        clock = self.at * (t.clamp(max=self.off) / self.off) + late * (t.clamp(min=self.on) - self.on)
        pace = early * (t < self.off) + late * (t > self.on)
        sigma, dsigma = self.noise(clock)
        return sigma, dsigma * pace


def when_still(eta: float) -> RemaskSchedule:
    """R = min(r_max, eta) over steps in which the noise stands still, see `Looped`, and else 0; eta in [0, 1]."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta!r}")
    return lambda sigma_t, sigma_s, r_max: torch.where(sigma_t == sigma_s, r_max.clamp(max=eta), 0.0)
