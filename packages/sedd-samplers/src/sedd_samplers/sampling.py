"""The one loop: states from the prior at t = 1 down to t_min, then the final denoise.

    trajectory   a generator of states; progress, animation, recording and early stopping are the caller's
    sample       its last state
    infill       its last state, with given tokens

By Bayes' rule the score of the free positions given the others is the unconditional score with the given tokens filled
in (21, 22), so that under an absorbing graph a prompt is nothing but a set of positions that never move. Where tokens
themselves are noised that is an approximation, and `conditioning` has to say what is wanted: see `infilling`.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import torch
from torch import Generator, Tensor
from tqdm import tqdm

from .grids import check_times, finite_start, uniform_grid, warn_of_text_left
from .infilling import Clamped, Particles
from .interfaces import Graph, Noise, ScoreModel, check_graph
from .model_calls import ScoreCall, Wrapper, check_sequences, device_of, warn_of_training
from .precision import wide
from .prompts import check_prompt, check_shape, check_start, check_tensors
from .randomness import row_seeds
from .reverse import Reverse
from .steps import Method, Tweedie, final_denoise
from .waiting import NoticedLate

__all__ = ["State", "TrajectoryOptions", "trajectory", "sample", "infill"]


@dataclass(frozen=True)
class State:
    """Where a trajectory stands.

    Attributes:
        x: (B, L) int64.
        t: the time of x: 1 at the start, 0 after the final denoise.
        step: how many steps were made.
        steps: how many there will be, the final denoise included.
        log_prob: (B, L) float64 nats, if it was asked for: see `trajectory`.
    """

    x: Tensor
    t: float
    step: int
    steps: int
    log_prob: Tensor | None = None


class TrajectoryOptions(TypedDict, total=False):
    """What `sample` and `infill` hand to `trajectory`, where each is explained."""

    steps: int | None
    method: Method
    generator: Generator | None
    seeds: Sequence[int] | Tensor | None
    times: Tensor | None
    t_min: float | None
    denoise: bool
    until: Callable[[State], Tensor] | None
    start: Tensor | None
    conditioning: Clamped | Particles | None
    static_shapes: bool
    log_probs: bool


def sample(
    score: ScoreModel,
    graph: Graph,
    noise: Noise,
    *,
    shape: tuple[int, int],
    device: torch.device | str | None = None,
    batch_size: int | None = None,
    progress: bool = False,
    **options: Unpack[TrajectoryOptions],
) -> Tensor:
    """Samples from a score model.

    Args:
        score: (x (B, L), sigma (B,)) -> log-score (B, L, N), see `ScoreModel`.
        graph: the forward process the model was trained for.
        noise: its schedule.
        shape: (B, L).
        device: where the states live; the device of the model's first parameter when None, else the CPU.
        batch_size: how many sequences go through the model at a time, one batch after another; all when None. A
            sequence's sample does not depend on it. `until` then sees the states of a batch.
        progress: whether to show a bar, one for each batch.
        **options: `steps=128`, `method=Tweedie()`, `generator`, `seeds`, `times`, `t_min=1e-5`, `denoise=True`,
            `until`, `start`, `conditioning`, `static_shapes`; and the errors: see `trajectory`.

    Returns:
        (B, L) int64.
    """
    check_options(options, "sample")
    check_shape(shape)
    free = torch.zeros(shape, dtype=torch.bool, device=device_of(score, device))
    x = free.long()
    return infill(score, graph, noise, x=x, given=free, batch_size=batch_size, progress=progress, **options)


def infill(
    score: ScoreModel,
    graph: Graph,
    noise: Noise,
    *,
    x: Tensor,
    given: Tensor,
    batch_size: int | None = None,
    progress: bool = False,
    **options: Unpack[TrajectoryOptions],
) -> Tensor:
    """Samples of the free positions given the others.

    Args:
        score: (x (B, L), sigma (B,)) -> log-score (B, L, N), see `ScoreModel`.
        graph: the forward process the model was trained for.
        noise: its schedule.
        x: (B, L) int64, the given tokens; what it holds at free positions does not matter.
        given: (B, L) bool, the positions that keep their tokens, another set for each sequence if so wished. Exact
            under absorbing graphs; under others say `conditioning=Particles(64)` or, for an approximation, `clamped`.
        batch_size: as for `sample`.
        progress: whether to show a bar.
        **options: as for `sample`; and the errors: see `trajectory`.

    Returns:
        (B, L) int64, equal to x at the given positions.
    """
    check_options(options, "infill")
    check_tensors(x, given)
    out = []
    for rows, own, seeds in batches(score, graph, len(x), batch_size, options):
        part: TrajectoryOptions = {**options, "seeds": seeds, "generator": None}
        start = options.get("start")
        if start is not None:
            part["start"] = check_start(start, x, graph.num_states)[rows]
        out.append(last_state(trajectory(own, graph, noise, x=x[rows], given=given[rows], **part), progress))
    return torch.cat(out)


def batches(
    score: ScoreModel, graph: Graph, total: int, batch_size: int | None, options: Mapping[str, Any]
) -> Iterator[tuple[slice, ScoreModel, Tensor]]:
    """Some of `total` sequences at a time: which, the model told that they are those, and their seeds.

    Seeds are drawn for all at once, as without batches.

    Raises:
        ValueError: for a batch_size that is no positive integer, and a model of another number of sequences.
    """
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}")
    check_sequences(score, total)
    seeds = row_seeds(options.get("seeds"), options.get("generator"), total)
    size = total if batch_size is None else batch_size
    for begin in range(0, total, size):
        rows = slice(begin, min(begin + size, total))
        yield rows, score if size >= total else _numbered(score, graph, rows), seeds[rows]


def _numbered(score: ScoreModel, graph: Graph, rows: slice) -> ScoreModel:
    """The model of a batch, told which of the whole run's sequences these are."""
    call = ScoreCall(score, graph)
    told = Wrapper(lambda x, sigma, at, own: call(x, sigma, at, own + rows.start), score)
    told.sequences = rows.stop - rows.start
    return told


@torch.no_grad()
def trajectory(
    score: ScoreModel,
    graph: Graph,
    noise: Noise,
    *,
    x: Tensor,
    given: Tensor,
    steps: int | None = None,
    method: Method = Tweedie(),  # noqa: B008, frozen and without state
    generator: Generator | None = None,
    seeds: Sequence[int] | Tensor | None = None,
    times: Tensor | None = None,
    t_min: float | None = None,
    denoise: bool = True,
    until: Callable[[State], Tensor] | None = None,
    start: Tensor | None = None,
    conditioning: Clamped | Particles | None = None,
    static_shapes: bool = False,
    log_probs: bool = False,
) -> Iterator[State]:
    """The states on the way, from the prior (step 0) to the sample; nothing is kept of those that were yielded.

    A module is used as it stands: put it into evaluation mode first. To stop early, leave the loop. On a GPU the host
    reads one small tensor a step, before it asks the model: what went wrong in a step is told in the next one, and of
    the last before it is yielded.

    Args:
        score: (x (B, L), sigma (B,)) -> log-score (B, L, N), see `ScoreModel`.
        graph: the forward process the model was trained for.
        noise: its schedule.
        x: (B, L) int64, the given tokens; what it holds at free positions does not matter.
        given: (B, L) bool, the positions that never move.
        steps: the number of steps from t = 1 to t_min; the final denoise comes on top. 128 when None.
        method: the step.
        generator: where the sequences' seeds are drawn from; the global generator when None.
        seeds: B integers instead, one a sequence: its sample then depends on nothing else in the batch.
        times: a grid (steps + 1,) of the caller's own, instead of `steps` and `t_min`.
        t_min: the time at which the last step ends; 1e-5 when None.
        denoise: whether to take the final step to t = 0; without it a mask may be left.
        until: State -> (B,) bool, which sequences are finished. Asked before every step. A finished sequence does not
            change any more, and keeps the masks it still has; when all are finished the loop ends.
        start: (B, L) int64, states at the time that the grid begins with, to go on with a run, to redo half-noised
            text, to polish a draft; the prior when None, which is the law at t = 1 of a schedule that ends in noise.
        conditioning: how given tokens are kept where the graph noises tokens: `Particles(count)`, exact as particles
            grow, or `clamped`, which is an approximation. Under absorbing graphs None is exact.
        static_shapes: whether the model is called with all B sequences and for all L positions, (B, L) and (B,) in,
            (B, L, N) out, as long as one can move, so that its shapes never change: for a network that was compiled, or
            captured as a CUDA graph. The samples are the same; finished sequences and positions cost what others do.
        log_probs: whether `State.log_prob` says with what probability each position came to its state, (B, L) nats:
            that of the state among those that it could have moved to, controls included, in the step in which it last
            moved; 0 where it was given, has not moved, or is masked. Of a token under an absorbing graph that is log
            p(x0 = token | x_t), and the sum is log p(x) where one position moves at a time, in an order that does not
            look at what was drawn.

    Yields:
        `State`, steps + 1 of them, one more with the final denoise; fewer when `until` ends the loop.

    Raises:
        ValueError: for arguments that make no sense, before the first step; for given tokens under a graph that noises
            tokens without a word on `conditioning`; for a model that returns the wrong shape,
            NaN or infinity, or leaves no state to draw, at the step where it does, which the message names. What else
            the model raises carries the step as a note.
    """
    check_method(method)
    check_process(graph, noise)
    warn_of_training(score)
    check_prompt(x, given, graph.num_states, graph.mask_id)
    check_sequences(score, len(x))
    grid = grid_of(steps, t_min, times)
    if start is None and grid[0] < 1:
        raise ValueError(f"times begin at {float(grid[0]):.6g}, below 1: say from which states, start= (B, L)")
    grid = finite_start(noise, grid)
    if start is None and not isinstance(conditioning, Particles):  # which weigh their start
        warn_of_text_left(graph, noise, given.new_full((), float(grid[0]), dtype=wide(given.device)))
    seeds = row_seeds(seeds, generator, len(x)).to(x.device)
    total, clock = len(grid) - 1 + denoise, [*grid.tolist(), *([0.0] if denoise else [])]  # the host's own numbers
    if isinstance(conditioning, Particles):
        if start is not None or until is not None or static_shapes or log_probs:
            raise ValueError("particles begin at noise, end together and change in number: neither start nor until "
                             "nor static_shapes nor log_probs goes with them")  # fmt: skip
        ends = [(given.new_full((), t, dtype=wide(given.device)), given.new_full((), s, dtype=wide(given.device)))
                for t, s in itertools.pairwise(clock)]  # fmt: skip
        states = conditioning.run(
            score, graph, noise, x=x, given=given, seeds=seeds, ends=ends, method=method, denoise=denoise
        )
        for step, x in enumerate(states):
            yield State(x, clock[step], step, total)
        return
    times = grid.to(x.device, wide(x.device))
    reverse = Reverse(score, graph, noise, frozen=given, seeds=seeds, static_shapes=static_shapes, times=times)
    if conditioning is None and reverse.noises_tokens and bool((given.any(1) & ~given.all(1)).any()):
        raise ValueError(
            "this graph noises tokens, and a given token that is held still would be an approximation: choose "
            "conditioning=Particles(64), which is exact as particles grow, or conditioning=clamped for the "
            "approximation, and for padding that the model does not look at"
        )
    x = torch.where(given, x, reverse.prior() if start is None else check_start(start, x, graph.num_states))
    log_prob = torch.zeros(x.shape, dtype=wide(x.device), device=x.device) if log_probs else None
    state = State(x, clock[0], 0, total, log_prob)
    yield state
    for step, (t, s) in enumerate(itertools.pairwise(clock), 1):
        if until is not None:
            reverse.frozen = reverse.frozen | check_finished(until(state), len(x))[:, None]
            reverse.unfinished = None
        with named_step(reverse, step, total, t, s):
            reverse.log_prob = None if log_prob is None else torch.full_like(log_prob, torch.nan)
            x = one_step(reverse, x, method, step, len(grid))
            log_prob = None if log_prob is None else told(log_prob, reverse, state.x, x)
            if step == total:
                reverse.finish()
        if until is not None:
            if reverse.unfinished is None:  # the step had nothing to read
                reverse.unfinished = not bool(reverse.frozen.all())
            if not reverse.unfinished:
                return
        state = State(x, s, step, total, log_prob)
        yield state


def one_step(reverse: Reverse, x: Tensor, method: Method, step: int, times: int) -> Tensor:
    """X (B, L) after step 1, 2, ... of a run of so many times, the final denoise behind them."""
    t = reverse.time(step - 1)
    return method(reverse, x, t, reverse.time(step)) if step < times else final_denoise(reverse, x, t)


def told(log_prob: Tensor, reverse: Reverse, before: Tensor, after: Tensor) -> Tensor:
    """The log-probabilities (B, L) after a step, from those before it and what the step has told.

    Raises:
        ValueError: the method has drawn a state and not said with what probability; on a GPU a step late.
    """

    def refuse() -> None:
        raise ValueError("log_probs: this method does not say with what probability it draws: see Reverse.tell")

    assert reverse.log_prob is not None
    moved = before != after
    masked = after == (-1 if reverse.graph.mask_id is None else reverse.graph.mask_id)
    reverse.notice(moved & ~masked & reverse.log_prob.isnan(), refuse)
    return torch.where(moved, torch.where(masked, 0.0, reverse.log_prob.nan_to_num()), log_prob)


def grid_of(steps: int | None, t_min: float | None, times: Tensor | None) -> Tensor:
    """The caller's times, or equal steps; ValueError for both."""
    if times is None:
        return uniform_grid(128 if steps is None else steps, 1e-5 if t_min is None else t_min)
    if steps is not None or t_min is not None:
        raise ValueError("give either times or steps and t_min, not both: the times say how many steps there are")
    return check_times(times)


def check_finished(finished: object, batch: int) -> Tensor:
    """What `until` answered, or ValueError: (B,) bool, which sequences are finished."""
    if not isinstance(finished, Tensor) or finished.shape != (batch,) or finished.dtype != torch.bool:
        got = f"{finished.dtype} {tuple(finished.shape)}" if isinstance(finished, Tensor) else f"{finished!r}"
        raise ValueError(f"until must return bool of shape ({batch},), one a sequence, got {got}")
    return finished


@contextmanager
def named_step(reverse: Reverse, step: int, total: int, t: float, s: float, of: str = "") -> Iterator[None]:
    """What goes wrong inside says in which step."""
    reverse.step = where = f"step {step} of {total}{of}, from t = {t:.4g} to {s:.4g}"
    try:
        yield
    except NoticedLate as error:
        raise ValueError(f"{error.where}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except Exception as error:
        error.add_note(f"raised in {where} of a sampling loop")
        raise


def last_state(states: Iterator[State], progress: bool) -> Tensor:
    first = next(states)
    shown = tqdm(states, total=first.steps, desc="sampling", unit="step", disable=not progress)
    last: State = deque(itertools.chain([first], shown), maxlen=1).pop()
    return last.x


def check_method(method: object) -> None:
    """ValueError unless it can be called as a step: the usual slip is the class, or its name."""
    if isinstance(method, type) or not callable(method):
        got = f"the class {method.__name__}" if isinstance(method, type) else repr(method)
        raise ValueError(f"method must be a step such as Tweedie(), an object that can be called, got {got}")


def check_process(graph: object, noise: object) -> None:
    """ValueError unless they are a graph and a schedule: the usual slip is the class for its object."""
    check_graph(graph)
    if isinstance(noise, type):
        raise ValueError(f"the noise must be an object such as LogLinear(), got the class {noise.__name__}")
    if not callable(noise):
        raise ValueError(f"the noise must be callable as noise(t) -> (sigma, dsigma), got a {type(noise).__name__}")


_MEANT = {
    "num_steps": "steps=",
    "n_steps": "steps=",
    "seed": "seeds=, one a sequence, or generator=",
    "temperature": "a control of the model: from_logits(network, graph, controls=[temperature(0.9)])",
    "top_k": "a control of the model: from_logits(network, graph, controls=[top_k(50)])",
    "top_p": "a control of the model: from_logits(network, graph, controls=[top_p(0.95)])",
    "sampler": "method=",
    "prompt": "infill, whose x= and given= pad_prompts makes of prompts",
    "num_samples": "shape=(batch, length)",
}


def check_options(options: Mapping[str, object], function: str) -> None:
    """TypeError for an option that there is not, which says what was meant where that is plain."""
    for name in options.keys() - TrajectoryOptions.__annotations__.keys():
        known = ", ".join(TrajectoryOptions.__annotations__)
        meant = f": you may mean {_MEANT[name]}" if name in _MEANT else ""
        raise TypeError(f"{function} has no option {name!r}{meant}. Its options are {known}")
