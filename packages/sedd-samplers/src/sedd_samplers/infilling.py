"""Given tokens where tokens are noised: weighted particles, exact as their number grows.

By Bayes' rule the score of the free positions given the others is the unconditional score with the given tokens filled
in (21, 22). Under absorbing graphs that is all: a given token is a set position that never moves. Where tokens are
noised, a network of sequences that are noised throughout never saw clean tokens among noised ones, and a position that
is held (`clamped`) has the law of no process: .02 to .27 in total variation from the conditional on small problems,
however many steps are made.

Here the given positions are noised like all others. Given its clean token c, the path of one of them is the bridge

    q(x_s | x_t, c) = exp(D Q)[x_t, x_s] exp(sigma_s Q)[x_s, c] / exp(sigma_t Q)[x_t, c]

whatever the others do. K particles make the sampler's own steps at the free positions and bridges at the given ones;
what the model would have done there instead is a weight,

    w = product over given positions of p(x_s | x_t) / q(x_s | x_t, c),       at the end p(x0 = c | x_t)

with Tweedie's p (19). The weights to come are foreseen as the product of p(x0 = c | x_t), exactly for one given token.
Particles are drawn anew by weight and outlook where those have become unequal, and one of them is drawn at the end:
twisted sequential Monte Carlo (Wu et al. 2023, arXiv 2306.17775, for diffusions of numbers), with the law of the
sampler's chain given the tokens as K grows, for any number of given tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from .fast import Answer, rows_at_a_time, times_row
from .interfaces import Graph, Noise, ScoreModel
from .model_calls import ScoreCall, Wrapper
from .positions import Positions
from .precision import limit_law, wide
from .randomness import draw_categorical, philox
from .reverse import Reverse
from .steps import Method, final_denoise, tweedie_posterior, tweedie_probs

__all__ = ["Clamped", "clamped", "Particles"]


class Clamped:
    """Given positions hold their tokens and never move; see `clamped`."""

    def __repr__(self) -> str:
        return "clamped"


clamped: Final = Clamped()
"""Given positions hold their tokens: exact under absorbing graphs, where it is the default, and for padding that the
model does not look at. **Approximate** where tokens are noised."""


@dataclass(frozen=True)
class Particles:
    """Infilling by weighted particles: for every graph, exact as `count` and the number of steps grow.

    A step costs two evaluations of the score for `count` sequences to each that is asked for. Two errors are left, both
    measured in total variation from the conditional, two positions of four tokens, one of them given
    (tests/test_infilling.py). That of the steps, by enumeration: .008 to .021 at 64 steps, .002 to .005 at 256, the
    largest under clustered and ordinal graphs. That of the particles, clustered: .024 for 16, .005 for 256. 256
    particles and 256 steps together: .005 to .008, under every graph, with .002 to .003 of it the measurement's; 64
    particles and 256 steps were at .014 under clustered graphs, with .0045 the measurement's. More given tokens, and
    tokens that are less likely, take more of both.

    Args:
        count: K, at least 2.
        threshold: particles are drawn anew where the effective number of equal ones falls below this share of K.

    Raises:
        ValueError: for another count or threshold.
    """

    count: int = 64
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 2:
            raise ValueError(f"count must be an integer of at least 2, got {self.count!r}")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must lie in [0, 1], got {self.threshold!r}")

    def run(
        self,
        score: ScoreModel,
        graph: Graph,
        noise: Noise,
        *,
        x: Tensor,
        given: Tensor,
        seeds: Tensor,
        ends: Sequence[tuple[Tensor, Tensor]],
        method: Method,
        denoise: bool,
    ) -> Iterator[Tensor]:
        """The states (B, L) after every step of `ends`, given positions shown as the tokens that they will have."""
        lots = Reverse(score, graph, noise, frozen=given, seeds=_mixed(seeds, torch.full_like(seeds, self.count)))
        row = torch.arange(len(x), device=x.device)
        population = self.population(
            score, graph, noise, x=x, given=given, seeds=seeds, ends=ends, method=method, denoise=denoise
        )
        for step, (states, weight) in enumerate(population):
            u = lots.uniforms(row, torch.zeros_like(row))
            chosen = torch.zeros_like(row)
            if step == len(ends):
                chosen = draw_categorical(weight.exp(), u, old=chosen)
            yield torch.where(given, x, states[row, chosen])

    def population(
        self,
        score: ScoreModel,
        graph: Graph,
        noise: Noise,
        *,
        x: Tensor,
        given: Tensor,
        seeds: Tensor,
        ends: Sequence[tuple[Tensor, Tensor]],
        method: Method,
        denoise: bool,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """All particles (B, K, L) and their log-weights (B, K), at the start and after every step."""
        K, B = self.count, len(x)
        own, which = seeds.repeat_interleave(K), torch.arange(K, device=x.device).repeat(B)
        reverse = Reverse(
            _by_sequence(score, graph, K), graph, noise, frozen=given.repeat_interleave(K, 0), seeds=_mixed(own, which)
        )
        tokens, weight = x.repeat_interleave(K, 0), torch.zeros(B, K, dtype=wide(x.device), device=x.device)
        states, gain = _start(reverse, tokens, ends[0][0])
        weight = (weight + gain.view(B, K)).log_softmax(1)
        yield states.view(B, K, -1), weight
        for step, (t, s) in enumerate(ends, 1):
            last = denoise and step == len(ends)
            times, to = t.expand(len(states)), s.expand(len(states))
            model = _given_rows(reverse, states, tokens, times, None if last else to)
            u = reverse.uniforms(K * torch.arange(B, device=x.device), torch.zeros_like(seeds))
            parent, weight = self._resample(weight, model.ahead.view(B, K), u)
            states = states[parent]
            moved, gain = _bridge(reverse, states, tokens, model, parent, times, None if last else to)
            free = final_denoise(reverse, states, times) if last else method(reverse, states, times, to)
            states = torch.where(reverse.frozen, moved, free)
            weight = weight + gain.view(B, K)
            if step == len(ends):
                reverse.finish()
            yield states.view(B, K, -1), weight.log_softmax(1)

    def _resample(self, weight: Tensor, ahead: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Systematic resampling, by weight and what is to come, of the sequences in which they are too unequal.

        Returns:
            (B K,) which particle each one goes on from; (B, K) the weights that they have then.
        """
        B, K = weight.shape
        share = (weight + ahead).softmax(1)
        uneven = (1 / share.square().sum(1) < self.threshold * K)[:, None]
        comb = (torch.arange(K, device=u.device) + u[:, None]) / K
        drawn = torch.searchsorted(share.cumsum(1), comb).clamp(max=K - 1)
        stay = torch.arange(K, device=u.device).expand(B, K)
        parent = torch.where(uneven, drawn, stay)
        weight = torch.where(uneven, -ahead.gather(1, parent), weight)
        return (parent + K * torch.arange(B, device=u.device)[:, None]).flatten(), weight


@dataclass(frozen=True)
class _GivenRows:
    """What the model says of given positions: its step's rows (M, N), which is whose (R, L), and the outlook (R,).

    The rows are made when they are read, so that beside the network's answer nothing of their size is held.
    """

    rows: Answer
    slot: Tensor
    ahead: Tensor


def _given_rows(reverse: Reverse, x: Tensor, tokens: Tensor, t: Tensor, s: Tensor | None) -> _GivenRows:
    """The model's step from t to s (None: home) at the given positions, and sum of log p(x0 = c | x_t) over them."""
    graph, (at, slot) = reverse.graph, _given(reverse)
    ahead = torch.zeros(len(x), dtype=wide(x.device), device=x.device)
    if not at.sequences:
        return _GivenRows(Answer(ahead.new_empty(0, graph.num_states)), slot, ahead)
    sigma = reverse.noise(t)[0]
    delta = sigma if s is None else sigma - reverse.noise(s)[0]
    clean = torch.empty(len(at), dtype=wide(x.device), device=x.device)

    def kernel(log_score: Tensor, x: Tensor, b: Tensor, i: Tensor) -> Tensor:
        posterior = tweedie_posterior(log_score, x, graph, sigma[b])
        clean[slot[b, i]] = posterior.gather(1, tokens[b, i, None])[:, 0].to(wide(x.device))
        if s is None:
            return posterior
        del posterior  # of a piece's size
        step = tweedie_probs(log_score, x, graph, delta[b]).clamp_(min=0)
        return step / step.sum(-1, keepdim=True)

    rows = reverse.rows_at(x, sigma, at, kernel)
    for part in rows.parts():
        rows[part]
    ahead.index_add_(0, at.sequence, _log(clean))
    return _GivenRows(rows, slot, ahead)


def _given(reverse: Reverse) -> tuple[Positions, Tensor]:
    """The given positions, and which of them each is, (R, L): read once a run, in which they stay the same."""

    def read() -> tuple[Positions, Tensor]:
        given = reverse.frozen
        return Positions.of(given), given.flatten().cumsum(0).view_as(given) - 1

    return reverse.once("given", read)


def _start(reverse: Reverse, tokens: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Free positions from the prior, given ones noised from their tokens; and the log-weights (R,) of that.

    The sampler begins everywhere with the prior. At the first time that differs from the tokens' noise by what is not
    forgotten there: a weight of prior(x) / p(x | c) for each given position.
    """
    x, graph = reverse.prior(), reverse.graph
    gain = torch.zeros(len(x), dtype=wide(x.device), device=x.device)
    at, _ = _given(reverse)
    if not at.sequences:
        return x, gain
    sequence, position = at.sequence, at.position
    prior = limit_law(graph, x.device)
    sigma = reverse.noise(t.expand(len(x)))[0][sequence]
    home, uniform = tokens[sequence, position], reverse.uniforms(sequence, position)
    for part in _pieces(len(home), graph, x.device):
        law = _forward(graph, home[part], sigma[part]).clamp_(min=0)
        drawn = draw_categorical(law, uniform[part])
        x[sequence[part], position[part]] = drawn
        gain.index_add_(0, sequence[part], _log(prior[drawn]) - _log(law.gather(1, drawn[:, None])[:, 0]))
    return x, gain


def _bridge(
    reverse: Reverse, x: Tensor, tokens: Tensor, model: _GivenRows, parent: Tensor, t: Tensor, s: Tensor | None
) -> tuple[Tensor, Tensor]:
    """X with the given positions moved on their bridges from t to s, or home (None), and the log-weights (R,)."""
    graph = reverse.graph
    at, _ = _given(reverse)
    gain = torch.zeros(len(x), dtype=wide(x.device), device=x.device)
    if not at.sequences:
        return x, gain
    sequence, position = at.sequence, at.position
    home, here = tokens[sequence, position], x[sequence, position]
    moved, log_q, own = home.clone(), torch.zeros_like(gain[sequence]), torch.empty_like(gain[sequence])
    if s is not None:
        sigma_s = reverse.noise(s)[0][sequence]
        delta, uniform = reverse.noise(t)[0][sequence] - sigma_s, reverse.uniforms(sequence, position)
    slot = model.slot[parent[sequence], position]

    def bridges(part: slice) -> Tensor:
        back = graph.transition_into(here[part], delta[part].to(gain.dtype))
        return times_row(_forward(graph, home[part], sigma_s[part]), back).clamp_(min=0)

    def again() -> None:
        for part in _pieces(len(home), graph, x.device):
            draw_categorical(bridges(part), uniform[part])

    for part in _pieces(len(home), graph, x.device):
        if s is not None:
            bridge = bridges(part)
            moved[part] = draw_categorical(bridge, uniform[part], old=home[part])
            total = bridge.sum(-1)
            reverse.notice(~((total > 0) & (total < torch.inf)), again)
            log_q[part] = (bridge.gather(1, moved[part, None])[:, 0] / total).log()
            del bridge  # of a piece's size
        own[part] = model.rows[slot[part]].gather(1, moved[part, None])[:, 0].to(wide(x.device))
    gain.index_add_(0, sequence, _log(own) - log_q)
    x = x.clone()
    x[sequence, position] = moved
    return x, gain


def _log(probability: Tensor) -> Tensor:
    """The logarithm, of 0 a very small number: a hopeless particle, where all are hopeless as good as any."""
    return probability.clamp(min=torch.finfo(probability.dtype).tiny).log()


def _forward(graph: Graph, token: Tensor, sigma: Tensor) -> Tensor:
    """exp(sigma Q)[., token], (M, N) in the device's widest precision."""
    clean = torch.zeros(len(token), graph.num_states, dtype=wide(token.device), device=token.device)
    clean.scatter_(1, token[:, None], 1.0)
    return graph.propagate(clean, sigma.to(clean.dtype))


def _pieces(count: int, graph: Graph, device: torch.device) -> list[slice]:
    """Slices of `count` rows of N float64 numbers that are worked at a time."""
    size = rows_at_a_time(2 * graph.num_states, device)
    return [slice(i, i + size) for i in range(0, count, size)]


def _by_sequence(score: ScoreModel, graph: Graph, K: int) -> ScoreModel:
    """The model, told of which sequence each of K particles is."""
    call = ScoreCall(score, graph)

    def rows_at(x: Tensor, sigma: Tensor, at: Positions, rows: Tensor) -> Answer:
        return call(x, sigma, at, rows // K)

    return Wrapper(rows_at, score)


def _mixed(seed: Tensor, number: Tensor) -> Tensor:
    """A seed of its own for each (seed, number), (M,) int64."""
    word, zero = 0xFFFFFFFF, torch.zeros_like(seed)
    high, low, _, _ = philox((number & word, zero, zero, zero + 1), (seed & word, (seed >> 32) & word))
    return (high << 32) | low
