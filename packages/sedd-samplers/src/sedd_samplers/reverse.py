"""The reverse process as a method sees it: which positions can move, their log-scores, and one exact draw for each.

Everything that must hold for every method is held here, once: given positions never move; only positions that can move
reach the network's head; the network is not called for a sequence in which none can; arithmetic after the head is
float32 (float64 for a float64 score) under any autocast; a row's random numbers depend on nothing but its seed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .fast import Answer, Part
from .interfaces import Graph, Noise, Row, ScoreModel
from .model_calls import ModelCall
from .precision import fastest_rate, working_dtype
from .randomness import draw_categorical, draw_shared, uniforms

__all__ = ["Reverse", "Kernel", "Moves"]

T = TypeVar("T")

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(log_score (m, N), x (m,), sequence (m,), position (m,)) -> unnormalised probabilities (m, N)."""

Moves = Callable[[Tensor, Tensor], tuple[Row, Callable[[Tensor], Tensor]]]
"""(x (M,), sequence (M,)) -> weights w of the moves from x, as M rows, and R (M,) float64 -> the mass of staying (M,):
a kernel whose probabilities are w_y s_y for y != x, R in all, and that mass at x."""


class Reverse:
    """A score model run backwards through a graph's noise, with some positions held fixed.

    Args:
        score: the score model.
        graph: the forward process.
        noise: its schedule.
        frozen: (B, L) bool, the positions that never move.
        seeds: (B,) int64, one seed a sequence.
    """

    def __init__(
        self,
        score: ScoreModel,
        graph: Graph,
        noise: Noise,
        *,
        frozen: Tensor,
        seeds: Tensor,
    ) -> None:
        self.score = score
        self.graph = graph
        self.noise = noise
        self.frozen = frozen
        self._seeds = seeds
        self._drawn = torch.zeros_like(seeds)
        self._call = ModelCall(score, graph.num_states, "score model")
        into = graph.rates_into(torch.arange(graph.num_states, device=frozen.device))
        # a jump leads into x where the row Q[x, .] is positive; its one negative entry is the diagonal
        self._enterable = (into.base > 0) | (into.value > 0).any(-1)
        rate = fastest_rate(graph, frozen.device)
        self.noises_tokens = rate > 0  # else only the mask is jumped to
        self._work = working_dtype(rate, frozen.device)
        self._once: dict[object, Any] = {}

    def once(self, key: object, make: Callable[[], T]) -> T:
        """What is the same in every step of a run, made when it is first asked for."""
        if key not in self._once:
            self._once[key] = make()
        made: T = self._once[key]
        return made

    def prior(self) -> Tensor:
        """States from the limit of the forward process, independent over positions: (B, L) int64."""
        row = self.graph.prior(torch.tensor(torch.inf, device=self.frozen.device))
        law = row.base.double().expand(self.graph.num_states).scatter(0, row.index, row.value.double())
        sequence, position = torch.ones_like(self.frozen).nonzero(as_tuple=True)
        return draw_shared(law, self.uniforms(sequence, position)).view(self.frozen.shape)

    def movable(self, x: Tensor) -> Tensor:
        """The positions of x (B, L) whose state the reverse process can still leave: (B, L) bool."""
        return self._enterable[x] & ~self.frozen

    def uniforms(self, sequence: Tensor, position: Tensor) -> Tensor:
        """A fresh float64 uniform for each (sequence, position), both (M,) int64."""
        draw = self._drawn[sequence]
        self._drawn[sequence] = draw + 1  # a sequence that draws nothing does not count
        return uniforms(self._seeds[sequence], draw, position)

    def redraw(self, x: Tensor, sigma: Tensor, where: Tensor, kernel: Kernel, *, moves: Moves | None = None) -> Tensor:
        """X (B, L) with the states at `where` (B, L) bool drawn anew from the kernel's rows, at noise sigma (B,).

        Where the kernel is one of `moves`, a GPU draws by these, without making the rows: the same states.
        """
        sequence, position = where.nonzero(as_tuple=True)
        if not len(sequence):
            return x
        old = x[sequence, position]
        new = torch.empty_like(old)
        uniform = self.uniforms(sequence, position)
        log_scores = self._answer(x, sigma, where)
        drawn = None if moves is None else _by_moves(log_scores, old, moves(old, sequence), uniform)
        if drawn is not None:
            x = x.clone()
            x[sequence, position] = drawn
            return x
        answer = log_scores.then(
            lambda log_score, part: kernel(log_score, old[part], sequence[part], position[part]), self._work
        )
        for part in answer.parts():
            probs = answer[part].clamp_(min=0)
            try:
                new[part] = draw_categorical(probs, uniform[part])
            except ValueError as error:
                raise _named(error, log_scores[part], probs, sequence[part], position[part], sigma) from error
        x = x.clone()
        x[sequence, position] = new
        return x

    def evaluate(self, x: Tensor, sigma: Tensor, where: Tensor, kernel: Kernel) -> Tensor:
        """The kernel's rows (M, N) at `where` (B, L) bool, at noise sigma (B,), in row-major order; nothing is drawn.

        For methods that choose by themselves what moves.

        Raises:
            ValueError: if a row holds NaN or infinity.
        """
        rows = self.rows(x, sigma, where, kernel)
        return rows.tensor() if len(rows) else torch.empty(0, self.graph.num_states, device=x.device)

    def rows(self, x: Tensor, sigma: Tensor, where: Tensor, kernel: Kernel) -> Answer:
        """The same, to be read piece by piece: beside the model's output nothing of its size is held."""
        sequence, position = where.nonzero(as_tuple=True)
        if not len(sequence):
            return Answer(torch.empty(0, self.graph.num_states, device=x.device))
        old = x[sequence, position]
        answer = self._answer(x, sigma, where)

        def checked(log_score: Tensor, part: Part) -> Tensor:
            rows = kernel(log_score, old[part], sequence[part], position[part])
            bad = ~rows.sum(-1).isfinite()
            if bad.any():
                row = int(bad.nonzero()[0])
                b, i = int(sequence[part][row]), int(position[part][row])
                what = (
                    "NaN" if log_score[row].isnan().any() else f"a log-score of up to {float(log_score[row].max()):.6g}"
                )
                raise ValueError(
                    f"the score model returned {what} at sequence {b}, position {i}, sigma = {float(sigma[b]):.6g}, "
                    "which leaves no finite rates"
                )
            return rows

        return answer.then(checked, self._work)

    def flip(self, x: Tensor, where: Tensor, state: int, probability: Tensor) -> Tensor:
        """X (B, L) with each position of `where` (B, L) bool set to `state` with a probability, (B,) or (B, L)."""
        sequence, position = where.nonzero(as_tuple=True)
        chance = probability[sequence] if probability.ndim == 1 else probability[sequence, position]
        flipped = self.uniforms(sequence, position) < chance
        x = x.clone()
        x[sequence[flipped], position[flipped]] = state
        return x

    def _answer(self, x: Tensor, sigma: Tensor, where: Tensor) -> Answer:
        """The model's rows at `where`, of the sequences that have any."""
        rows = where.any(1).nonzero()[:, 0]
        if len(rows) < len(x):
            x, sigma, where = x[rows], sigma[rows], where[rows]
        return self._call(x, sigma.to(torch.float32), where, rows)


def _by_moves(
    log_scores: Answer, x: Tensor, moves: tuple[Row, Callable[[Tensor], Tensor]], uniform: Tensor
) -> Tensor | None:
    """The states (M,) drawn by the kernels; None where they do not serve, or find a row with nothing to draw."""
    returned = log_scores.as_returned()
    if returned is None or not kernels_serve(returned[0]):
        return None
    from .fast.draw_kernel import draw_moves

    rows, pick = returned
    state, total = draw_moves(rows, x, *moves, uniform, pick=pick)
    right = total.isfinite() & (total > 0)
    return state if bool(right.all()) else None


def kernels_serve(rows: Tensor) -> bool:
    """Whether the kernels can draw from rows as they are: on CUDA, with triton, in float32 or less."""
    return rows.is_cuda and rows.dtype != torch.float64 and importlib.util.find_spec("triton") is not None


def _named(
    error: ValueError, log_score: Tensor, probs: Tensor, sequence: Tensor, position: Tensor, sigma: Tensor
) -> ValueError:
    """The error of a failed draw, told in terms of the model that caused it."""
    total = probs.sum(-1)
    row = int((~((total > 0) & total.isfinite())).nonzero()[0])
    b, i = int(sequence[row]), int(position[row])
    place = f"at sequence {b}, position {i}, sigma = {float(sigma[b]):.6g}"
    if log_score[row].isnan().any():
        return ValueError(f"the score model returned NaN {place}")
    if log_score[row].max() == torch.inf:
        return ValueError(f"the score model returned an infinite log-score {place}")
    return ValueError(f"no state can be drawn {place}: {error}")
