"""The reverse process as a method sees it: which positions can move, their log-scores, and one exact draw for each.

Everything that must hold for every method is held here, once: given positions never move; only positions that can move
reach the network's head; the network is not called for a sequence in which none can; arithmetic after the head is
float32 (float64 for a float64 score) under any autocast; a row's random numbers depend on nothing but its seed.

Nor does the host wait for the device more than once a step: how many positions can move is read back, whether the step
before drew all its states, and whether any sequence is unfinished, in one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .fast import Answer, Part, draw_by_blocks
from .interfaces import Graph, Noise, Row, ScoreModel
from .model_calls import ScoreCall, no_rates, no_state
from .positions import Positions, true_first
from .precision import fastest_rate, limit_law, working_dtype
from .randomness import draw_shared, uniforms
from .waiting import Unread, has_kernels, look_again, reading_waits

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
        static_shapes: whether the model is asked at all positions of all sequences in every call; see `trajectory`.
        times: (K,) those of the run, whose noise is worked out at once; see `time`.

    Attributes:
        step: what errors call the step that is being made.
        unfinished: whether any position was not frozen at the last read; None when nothing was read since it was set
            to None.
        log_prob: (B, L) float64, what was told of states that were drawn; None where nobody asks.
    """

    def __init__(
        self,
        score: ScoreModel,
        graph: Graph,
        noise: Noise,
        *,
        frozen: Tensor,
        seeds: Tensor,
        static_shapes: bool = False,
        times: Tensor | None = None,
    ) -> None:
        self.score = score
        self.graph = graph
        self._noise = noise
        self._times = times
        self._levels: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []
        self.step = "a step"
        self.unfinished: bool | None = None
        self.log_prob: Tensor | None = None
        self._seeds = seeds
        self._drawn = torch.zeros_like(seeds)
        self._sequences = torch.arange(len(seeds), device=frozen.device)
        self._all = Positions.everywhere(frozen.shape, frozen.device, whole=True)
        self._static = static_shapes
        self._later = False
        self._unread: list[Unread] = []
        self._call = ScoreCall(score, graph)
        into = graph.rates_into(torch.arange(graph.num_states, device=frozen.device))
        # a jump leads into x where the row Q[x, .] is positive; its one negative entry is the diagonal
        self._enterable = (into.base > 0) | (into.value > 0).any(-1)
        self._all_enterable = bool(self._enterable.all())
        rate = fastest_rate(graph, frozen.device)
        self.noises_tokens = rate > 0  # else only the mask is jumped to
        self._work = working_dtype(rate, frozen.device)
        self._once: dict[object, Any] = {}
        self.frozen = frozen

    @property
    def frozen(self) -> Tensor:
        """(B, L) bool, the positions that never move; may be assigned anew between two steps, with more of them."""
        return self._frozen

    @frozen.setter
    def frozen(self, frozen: Tensor) -> None:
        self._frozen, self._unfrozen = frozen, ~frozen
        self._unfinished = self._unfrozen.any()
        self._free: Positions | None = None

    def noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(sigma, dsigma) at t, both of t's shape; of the last two tensors of times they are kept."""
        for times, levels in self._levels:
            if times is t:
                return levels
        return self._kept(t, self._noise(t))[1]

    def time(self, number: int) -> Tensor:
        """The time of that number, of those of the run, for every sequence: (B,), with its noise known."""
        times = self._times
        assert times is not None
        levels = self.once("levels", lambda: self._noise(times))
        t, sigma, dsigma = (of[number].expand(len(self._seeds)) for of in (times, *levels))
        return self._kept(t, (sigma, dsigma))[0]

    def _kept(self, t: Tensor, levels: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        self._levels = [*self._levels[-1:], (t, levels)]
        return self._levels[-1]

    def once(self, key: object, make: Callable[[], T]) -> T:
        """What is the same in every step of a run, made when it is first asked for."""
        if key not in self._once:
            self._once[key] = make()
        made: T = self._once[key]
        return made

    def prior(self) -> Tensor:
        """States from the limit of the forward process, independent over positions: (B, L) int64."""
        law = limit_law(self.graph, self.frozen.device)
        return draw_shared(law, self.uniforms_at(torch.ones_like(self.frozen)).flatten()).view(self.frozen.shape)

    def movable(self, x: Tensor) -> Tensor:
        """The positions of x (B, L) that the reverse process can still leave, (B, L) bool: not to be modified."""
        return self._unfrozen if self._all_enterable else self._enterable[x] & self._unfrozen

    @property
    def _everywhere(self) -> Positions:
        """All positions; anew where frozen has another length now."""
        if self._all.where.shape != self.frozen.shape:
            self._all = Positions.everywhere(self.frozen.shape, self.frozen.device, whole=True)
        return self._all

    def positions(self, where: Tensor) -> Positions:
        """The true positions of `where` (B, L) bool; with static shapes all of them, if any is true.

        The one read of a step: the number of positions, and all else that the host has to know of the device.

        Raises:
            NoticedLate: for what went wrong since the last read.
        """
        if self._later and where is self._unfrozen and self._free is not None:
            return self._free
        return self.positions_of(where)[0]

    def positions_of(self, *wheres: Tensor) -> list[Positions]:
        """The same of several, in one read."""
        # before the read, behind which a GPU waits for what comes next
        indices = [] if self._static else [true_first(where.flatten()) for where in wheres]
        flags = torch.stack([self._unfinished, *(unread.wrong for unread in self._unread)])
        numbers = torch.cat([*(where.sum(1) for where in wheres), flags]).tolist()
        batch = len(self._seeds)
        self.unfinished, *wrong = map(bool, numbers[batch * len(wheres) :])
        self._settle(any(wrong))
        counts = [numbers[i : i + batch] for i in range(0, batch * len(wheres), batch)]
        if self._static:
            return [
                replace(self._everywhere, sequences=batch - own.count(0), wanted=where)
                for where, own in zip(wheres, counts, strict=True)
            ]
        return [
            Positions(where, first[: sum(own)], batch - own.count(0))
            for where, first, own in zip(wheres, indices, counts, strict=True)
        ]

    def free(self) -> Positions:
        """The positions that are not frozen; read again only when these are others."""
        if self._free is None:
            self._free = self.positions_of(self._unfrozen)[0]
        return self._free

    @contextmanager
    def reading_later(self) -> Iterator[None]:
        """Inside, a step that asks about all free positions reads nothing: for methods that read after it."""
        self.free()
        self._later = True
        try:
            yield
        finally:
            self._later = False

    def finish(self) -> None:
        """Reads how the last step ended; ValueError if something went wrong in it. No read where none is pending."""
        if self._unread:
            self._settle(bool(torch.stack([unread.wrong for unread in self._unread]).any()))

    def notice(self, wrong: Tensor, again: Callable[[], object]) -> None:
        """Calls `again`, which raises, if any of `wrong` (...) bool is true: at the next read, where reading waits."""
        if reading_waits(wrong.device):
            self._unread.append(Unread(wrong.any(), again, self.step))
        elif wrong.any():
            again()

    def uniforms(self, sequence: Tensor, position: Tensor) -> Tensor:
        """A fresh float64 uniform for each (sequence, position), both (M,) int64."""
        draw = self._drawn[sequence]
        self._drawn[sequence] = draw + 1  # a sequence that draws nothing does not count
        return uniforms(self._seeds[sequence], draw, position)

    def uniforms_at(self, where: Tensor, at: Positions | None = None) -> Tensor:
        """A fresh float64 uniform for each position of the batch, (B, L), or for those of `at` only, (M,).

        For sequences with a true position in `where` (B, L) bool; numbers of others mean nothing, and do not count.
        """
        chosen = self._everywhere if at is None else at
        drawn = uniforms(self._seeds[chosen.sequence], self._drawn[chosen.sequence], chosen.position)
        self._drawn = self._drawn + where.any(1)
        return drawn.view(where.shape) if at is None else drawn

    def uniform_of(self, counts: Tensor, position: Tensor | None = None) -> Tensor:
        """A fresh float64 uniform for each sequence (B,), at a position of it, the first when None.

        For sequences in `counts` (B,) bool; those of others mean nothing, and do not count.
        """
        position = torch.zeros_like(self._seeds) if position is None else position
        drawn = uniforms(self._seeds, self._drawn, position)
        self._drawn = self._drawn + counts
        return drawn

    def redraw(
        self,
        x: Tensor,
        sigma: Tensor,
        where: Tensor,
        kernel: Kernel,
        *,
        moves: Moves | None = None,
        among: Positions | None = None,
    ) -> Tensor:
        """X (B, L) with the states at `where` (B, L) bool drawn anew from the kernel's rows, at noise sigma (B,).

        Where the kernel is one of `moves`, a GPU draws by these, without making the rows: the same states.

        Args:
            x: (B, L) int64, the states.
            sigma: (B,) their total noise.
            where: (B, L) bool.
            kernel: their rows.
            moves: the same as weights, where that is what it is.
            among: positions that hold all of `where`, to be asked about instead: then nothing is read.
        """
        at = self.positions(where) if among is None else among
        if not at.sequences:
            return x
        log_scores = self._answer(x, sigma, at)  # before anything else, so that a GPU need not wait for it
        uniform, old = self.uniforms_at(where, at), x.flatten()[at.flat]
        drawn = None
        if moves is not None and self.log_prob is None:
            drawn = _by_moves(log_scores, old, moves, at, uniform)
        if drawn is None:
            drawn = self._by_rows(log_scores, x, sigma, at, where, kernel, uniform)
        state, right = drawn

        def again() -> None:
            self._by_rows(self._answer(x, sigma, at), x, sigma, at, where, kernel, uniform)

        exactly = at.where is where
        self.notice(~right if exactly else ~right & where.flatten()[at.flat], again)
        out = x.flatten().index_put((at.flat,), torch.where(right, state, old)).view_as(x)
        return out if exactly else torch.where(where, out, x)

    def evaluate(self, x: Tensor, sigma: Tensor, where: Tensor, kernel: Kernel) -> Tensor:
        """The kernel's rows (M, N) at `where` (B, L) bool, at noise sigma (B,), in row-major order; nothing is drawn.

        For methods that choose by themselves what moves.

        Raises:
            ValueError: if a row holds NaN or infinity.
        """
        at = Positions.of(where) if self._static else self.positions(where)
        rows = self.rows_at(x, sigma, at, kernel)
        return rows.tensor() if len(rows) else torch.empty(0, self.graph.num_states, device=x.device)

    def rows_at(self, x: Tensor, sigma: Tensor, at: Positions, kernel: Kernel, where: Tensor | None = None) -> Answer:
        """The same at positions that are known, to be read piece by piece: beside the model's output nothing of its
        size is held. With `where` (B, L) bool, the rows of others may be what they like.
        """
        if not at.sequences:
            return Answer(torch.empty(0, self.graph.num_states, device=x.device))
        old, wanted = x.flatten()[at.flat], None if where is None else where.flatten()[at.flat]

        def checked(log_score: Tensor, part: Part) -> Tensor:
            sequence, position = at.sequence[part], at.position[part]
            rows = kernel(log_score, old[part], sequence, position)
            bad = ~(rows.sum(-1).abs() < torch.inf)
            bad = bad if wanted is None else bad & wanted[part]
            if reading_waits(x.device):
                self.notice(bad, again)
            elif bad.any():
                row = int(bad.nonzero()[0])
                raise no_rates(log_score[row], sequence[row], position[row], sigma)
            return rows

        def again() -> None:
            rows = self._answer(x, sigma, at).then(checked, self._work)
            for part in rows.parts():
                rows[part]

        return self._answer(x, sigma, at).then(checked, self._work)

    def flip(self, x: Tensor, where: Tensor, state: int, probability: Tensor) -> Tensor:
        """X (B, L) with each position of `where` (B, L) bool set to `state` with a probability, (B,) or (B, L)."""
        chance = probability[:, None] if probability.ndim == 1 else probability
        return x.masked_fill(where & (self.uniforms_at(where) < chance), state)

    def tell(self, flat: Tensor, probs: Tensor, state: Tensor, old: Tensor) -> None:
        """For who asks: that states were drawn from probs (m, N), which need not sum to 1.

        Args:
            flat: (m,) int64, at which positions, as indices into the flattened batch.
            probs: their rows.
            state: (m,) int64, what was drawn.
            old: (m,) int64, the states before.
        """
        if self.log_prob is None:
            return
        here, stay = (probs.gather(1, y[:, None])[:, 0].to(self.log_prob.dtype) for y in (state, old))
        others = probs.sum(-1, dtype=self.log_prob.dtype) - stay
        before = self.log_prob.flatten()
        log_prob = torch.where(state == old, before[flat], (here / others).log().clamp(max=0.0))
        self.log_prob = before.index_put((flat,), log_prob).view_as(self.log_prob)

    def _answer(self, x: Tensor, sigma: Tensor, at: Positions) -> Answer:
        """The model's rows at some positions, of the sequences that have any."""
        rows = self._sequences
        if at.sequences < len(x) and not at.whole:
            at, rows = at.in_sequences_that_have_any()
            x, sigma = x[rows], sigma[rows]
        return self._call(x, sigma.to(torch.float32), at, rows)

    def _by_rows(
        self,
        log_scores: Answer,
        x: Tensor,
        sigma: Tensor,
        at: Positions,
        where: Tensor,
        kernel: Kernel,
        uniform: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The states (M,) drawn from the kernel's rows, and whether there was one to draw."""
        old, wanted = x.flatten()[at.flat], where.flatten()[at.flat]
        state, right = torch.empty_like(old), torch.empty_like(wanted)
        rows = log_scores.then(
            lambda log_score, part: kernel(log_score, old[part], at.sequence[part], at.position[part]), self._work
        )
        for part in rows.parts():
            probs = rows[part].clamp_(min=0)
            state[part], total = draw_by_blocks(probs, uniform[part])
            if self.log_prob is not None:  # what is drawn elsewhere is not taken
                self.tell(at.flat[part], probs, torch.where(wanted[part], state[part], old[part]), old[part])
            right[part] = found = (total > 0) & (total < torch.inf)
            if not reading_waits(x.device) and not (found | ~wanted[part]).all():
                row = int((~found & wanted[part]).nonzero()[0])
                raise no_state(log_scores[part][row], probs[row], at.sequence[part][row], at.position[part][row], sigma)
        return state, right

    def _settle(self, wrong: bool) -> None:
        """Forget what was to be read, or say what was wrong."""
        unread, self._unread = self._unread, []
        if wrong:
            look_again(unread)


def _by_moves(
    log_scores: Answer, x: Tensor, moves: Moves, at: Positions, uniform: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The states (M,) drawn by the kernels, and whether there was one to draw; None where they do not serve."""
    returned = log_scores.as_returned()
    if returned is None or not kernels_serve(returned[0]):
        return None
    from .fast.draw_kernel import draw_moves

    rows, pick, shift = returned
    drawn = draw_moves(rows, x, *moves(x, at.sequence), uniform, pick=pick, shift=shift)
    return drawn.state, drawn.right


def kernels_serve(rows: Tensor) -> bool:
    """Whether the kernels can draw from rows as they are: on CUDA, with triton, in float32 or less."""
    return rows.dtype != torch.float64 and has_kernels(rows.device)
