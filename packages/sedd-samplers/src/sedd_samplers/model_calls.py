"""Calls of a model of sequences: at the positions that matter, in the way it offers, and checked.

A model is a callable (x (B, L), sigma (B,)) -> (B, L, N). It may have four parameters more, by name:

    where      (B, L) bool: return only the M rows at its true positions, (M, N), in row-major order
    positions  (M,) int64: the same as ascending indices into x.flatten(), asked for instead of `where` where both are
               offered: how many rows there are is then known, and on a GPU the host need not wait to learn it
    rows       (B,) int64: which sequences of the run x holds; a sequence that is finished is not asked about again, so
               that a model with a condition for each sequence (a label, a constraint) needs to be told
    apart      bool: return rows as the network makes them, in bfloat16, say, and the number to be added to each, (M,),
               but at a position's own state, where the sum is 0. Asked for on a GPU, with `positions`

The wrappers of this package (adapters, controls, guidance) offer `where` and `rows`, and hand on all four. A model with
a condition for each sequence may say of how many, `sequences`: a run of other ones is refused before it begins.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .fast import Answer
from .interfaces import Graph
from .positions import Positions
from .precision import wide

__all__ = [
    "ModelCall",
    "ScoreCall",
    "no_rates",
    "no_state",
    "offers",
    "Wrapper",
    "modules_in",
    "device_of",
    "warn_of_training",
    "check_conditions",
    "check_sequences",
    "per_sequence",
]


_SHORT = "logits of the tokens alone go through from_logits, which adds the mask's"
_TWO_MASKS = (
    "if V counts the mask, as the size of a tokenizer with a mask does, the graph is Absorbing(V - 1, mask_id=m); if "
    "not, the mask stands among the tokens, and its column, of -inf, has to be put there"
)


class ModelCall:
    """A model as it is called, whatever it offers.

    Args:
        model: the callable; a module is asked about its forward.
        num_states: N, the width its answers must have.
        name: what errors call it.
        takes: what it is called with.
        widths: for logits, other widths that will do beside N and what heads are padded to; None for N alone.

    Raises:
        ValueError: the model is not callable, or takes the tokens alone.
    """

    def __init__(
        self, model: Any, num_states: int, name: str, takes: str = "x, sigma", widths: tuple[int, ...] | None = None
    ) -> None:
        if not callable(model):
            raise ValueError(f"the {name} must be callable as {name.split()[0]}({takes}), got a {type(model).__name__}")
        check_conditions(model, name)
        if "," in takes and _takes_one(model):
            raise ValueError(
                f"the {name} is called as {name.split()[0]}({takes}), and this {type(model).__name__} takes the tokens "
                f"alone: hand in lambda {takes}: network(x)"
            )
        self.model, self._num_states, self._name, self._widths = model, num_states, name, widths
        self._offers_where, self._offers_rows = offers(model, "where"), offers(model, "rows")
        self._offers_positions, self._offers_apart = offers(model, "positions"), offers(model, "apart")
        self._must_be_told = _required(model, "where", "positions")

    def __call__(self, x: Tensor, sigma: Tensor | None, at: Positions, rows: Tensor) -> Answer:
        """The rows at some positions of x (B, L), in row-major order.

        A model that does not take sigma is called with None.

        Raises:
            ValueError: the answer has another shape or is no float tensor.
        """
        if isinstance(self.model, Wrapper) and sigma is not None:
            made = self.model.answer(x, sigma, at, rows)
            self._check(made.shape, made.dtype, (len(made), self._num_states))
            return made
        inputs = (x,) if sigma is None else (x, sigma)
        further = {"rows": rows} if self._offers_rows else {}
        if sigma is not None and self._offers_apart and self._offers_positions and comes_apart(x.device):
            return self._apart(x, at, self.model(*inputs, **further, positions=at.flat, apart=True))
        if (self._offers_positions or self._offers_where) and (not at.whole or self._must_be_told):
            further |= {"positions": at.flat} if self._offers_positions else {"where": at.where}
            return Answer(self._checked(self.model(*inputs, **further), (len(at), self._num_states)))
        answer = self._checked(self.model(*inputs, **further), (*x.shape, self._num_states))
        return Answer(answer.flatten(0, 1), None if at.whole else at.flat)

    def _apart(self, x: Tensor, at: Positions, made: tuple[Tensor, Tensor]) -> Answer:
        rows, shift = made
        return Answer(self._checked(rows, (len(at), self._num_states)), shift=shift, state=x.flatten()[at.flat])

    def _checked(self, answer: object, expected: tuple[int, ...]) -> Tensor:
        if not isinstance(answer, Tensor):
            raise ValueError(self._told(expected, f"a {type(answer).__name__}"))
        short = expected[-1] - 1
        if answer.shape == (*expected[:-1], short) and short not in (self._widths or ()):
            told = _TWO_MASKS if self._widths is not None else _SHORT
            raise ValueError(self._told(expected, f"{answer.dtype} {tuple(answer.shape)}, a column short: {told}"))
        self._check(tuple(answer.shape), answer.dtype, expected)
        return answer

    def _check(self, shape: tuple[int, ...], dtype: torch.dtype, expected: tuple[int, ...]) -> None:
        fits = shape == expected or (
            self._widths is not None
            and shape[:-1] == expected[:-1]
            and (0 < shape[-1] - expected[-1] < 128 or shape[-1] in self._widths)
        )
        if not fits or not dtype.is_floating_point:
            raise ValueError(self._told(expected, f"{dtype} {shape}"))

    def _told(self, expected: tuple[int, ...], got: str) -> str:
        return f"the {self._name} must return a float tensor of shape {expected}, got {got}"


class ScoreCall(ModelCall):
    """A score model as it is called. Of one that is none of the package's wrappers, the first answer is looked at.

    The tokens' scores at a mask have a sum that no data can change, whatever the other positions hold:

        sum_y s(x)_y = (1 - m) / m,   m = P(x_t = mask) between the least and the largest exp(sigma Q)[mask, y]

    which is 1 / (e^sigma - 1) under absorbing: logits of p(x0 | x_t) in the place of log-scores miss it by far.

    Args:
        score: the score model.
        graph: the forward process.

    Raises:
        ValueError: the model is not callable.
    """

    def __init__(self, score: Any, graph: Graph) -> None:
        super().__init__(score, graph.num_states, "score model")
        self._graph, self._seen = graph, graph.mask_id is None or isinstance(score, Wrapper)

    def __call__(self, x: Tensor, sigma: Tensor | None, at: Positions, rows: Tensor) -> Answer:
        """The rows at some positions of x (B, L); a warning if the first ones cannot be log-scores."""
        answer = super().__call__(x, sigma, at, rows)
        if not self._seen and sigma is not None and len(answer):
            self._seen = True
            few = slice(0, min(8, len(answer)))
            _warn_of_logits(answer[few], x.flatten()[at.flat[few]], sigma[at.sequence[few]], self._graph)
        return answer


def _warn_of_logits(log_score: Tensor, x: Tensor, sigma: Tensor, graph: Graph) -> None:
    """A warning where the scores (m, N) of tokens at masks have a sum a hundred times as large as it can be."""
    mask = torch.full_like(x, -1 if graph.mask_id is None else graph.mask_id)
    row = graph.transition_into(mask, sigma.to(wide(x.device)))
    least = row.value.masked_fill(row.index == mask[:, None], 1.0).amin(1)
    if row.index.shape[-1] < graph.num_states:
        least = torch.minimum(least, row.base)
    most = (1 - least) / least
    total = log_score.detach().scatter(1, mask[:, None], -torch.inf).logsumexp(1)
    excess = torch.where(x == mask, total - most.log(), 0.0)
    worst = int(excess.nan_to_num(0.0, 0.0, 0.0).argmax())
    if math.log(100) < float(excess[worst]) < math.inf:
        warnings.warn(
            f"at sigma = {float(sigma[worst]):.4g} the scores of the tokens at a mask sum to "
            f"{float(total[worst].exp()):.4g}, and those of any data to {float(most[worst]):.4g} at most, so that "
            "these are log-scores of no data. Logits of p(x0 | x_t) go through from_logits(network, graph); a network "
            "of scores that is not trained yet gives such numbers, too",
            stacklevel=2,
        )


def comes_apart(device: torch.device) -> bool:
    """Whether rows are asked for as the network makes them: where there are kernels that draw from them so."""
    return device.type == "cuda"


def offers(model: Any, parameter: str) -> bool:
    """Whether a model has a parameter of that name; a module is asked about its forward."""
    return parameter in _parameters(model)


def _required(model: Any, *names: str) -> bool:
    """Whether one of these parameters has to be given."""
    found = _parameters(model)
    return any(name in found and found[name].default is inspect.Parameter.empty for name in names)


def _takes_one(model: Any) -> bool:
    """Whether a model has one parameter alone that can be given by its place."""
    kinds = [parameter.kind for parameter in _parameters(model).values()]
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(kind in by_place for kind in kinds) == 1 and inspect.Parameter.VAR_POSITIONAL not in kinds


def _parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    function = model.forward if isinstance(model, torch.nn.Module) else model
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


class Wrapper:
    """A model made of others, as a `RowModel`; inside the package its answer is taken in pieces.

    Args:
        rows_at: (x, sigma, positions, rows) -> the rows (M, N) at these positions, or an `Answer`.
        *inside: the models that it calls.

    Attributes:
        sequences: of how many sequences it is; None where only those inside may say.
    """

    sequences: int | None = None

    def __init__(
        self, rows_at: Callable[[Tensor, Tensor, Positions, Tensor], Tensor | Answer], *inside: object
    ) -> None:
        self._rows_at, self.inside = rows_at, inside

    def answer(self, x: Tensor, sigma: Tensor, at: Positions, rows: Tensor) -> Answer:
        """The rows at some positions of x (B, L)."""
        out = self._rows_at(x, sigma, at, rows)
        return out if isinstance(out, Answer) else Answer(out)

    def __call__(self, x: Tensor, sigma: Tensor, /, where: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """(B, L, N), or (M, N) for the M true positions of `where`."""
        at = Positions.everywhere(x.shape, x.device) if where is None else Positions.of(where)
        rows = torch.arange(len(x), device=x.device) if rows is None else rows
        out = self.answer(x, sigma, at, rows).tensor()
        return out.reshape(*x.shape, -1) if where is None else out


def modules_in(model: object) -> Iterator[torch.nn.Module]:
    """The modules that a callable is made of, as far as one can see: wrapped, partial, bound or closed over."""
    if isinstance(model, torch.nn.Module):
        yield model
    elif isinstance(model, Wrapper):
        for part in model.inside:
            yield from modules_in(part)
    elif isinstance(model, functools.partial):
        yield from modules_in(model.func)
    elif inspect.ismethod(model):
        yield from modules_in(model.__self__)
    elif inspect.isfunction(model):
        for cell in model.__closure__ or ():
            with contextlib.suppress(ValueError):  # a cell that is empty yet
                if isinstance(cell.cell_contents, (torch.nn.Module, Wrapper, functools.partial)):
                    yield from modules_in(cell.cell_contents)


def device_of(model: object, device: torch.device | str | None) -> torch.device:
    """The device that was asked for, else that of the first parameter inside the model, else the CPU."""
    if device is None:
        device = next((p.device for module in modules_in(model) for p in module.parameters()), None)
    return torch.device("cpu" if device is None else device)


def warn_of_training(model: object) -> None:
    """A warning for a module in training mode that acts otherwise there: with dropout its samples are others."""
    for module in modules_in(model):
        if any(part.training and _acts_in_training(part) for part in module.modules()):
            warnings.warn(
                f"the {type(module).__name__} is in training mode, and its dropout or normalisation takes part in the "
                "samples: call .eval() before",
                stacklevel=3,
            )
            return


def _acts_in_training(module: torch.nn.Module) -> bool:
    shares = (getattr(module, name, None) for name in ("p", "dropout"))
    return isinstance(module, torch.nn.modules.batchnorm._BatchNorm) or any(
        isinstance(share, float) and share > 0 for share in shares
    )


def check_conditions(model: object, name: str) -> None:
    """ValueError for a partial that holds a tensor: finished sequences leave the call, and it would not know."""
    if isinstance(model, functools.partial):
        for key, value in model.keywords.items():
            if isinstance(value, Tensor) and value.ndim > 0:
                raise ValueError(
                    f"the {name} is a partial that holds the tensor {key!r} {tuple(value.shape)}. Sequences that are "
                    "finished leave the call, so that a condition for each has to be looked up by `rows`: "
                    f"per_sequence(model, {key}=...), or lambda x, sigma, rows: model(x, sigma, {key}={key}[rows])"
                )


def per_sequence(model: Callable[..., Tensor], **conditions: Tensor) -> Callable[..., Tensor]:
    """A model with a condition for each sequence of the run, such as a label, handed on by name.

        score = per_sequence(network, labels=torch.tensor([3, 1, 4]))

    Args:
        model: (x (b, L), sigma (b,), **conditions) -> (b, L, N); it may offer `where` or `positions`.
        **conditions: (B, ...) each, B being the sequences of the run.

    Returns:
        A model that offers `rows`, and `where` or `positions` if `model` does; `sequences` is B.

    Raises:
        ValueError: the conditions are of different numbers of sequences.
    """

    def plain(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        return model(x, sigma, **{key: value[rows] for key, value in conditions.items()})

    def at_positions(x: Tensor, sigma: Tensor, where: Tensor, rows: Tensor) -> Tensor:
        return model(x, sigma, where=where, **{key: value[rows] for key, value in conditions.items()})

    def at_flat(x: Tensor, sigma: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        return model(x, sigma, positions=positions, **{key: value[rows] for key, value in conditions.items()})

    made: Callable[..., Tensor] = at_positions if offers(model, "where") else plain
    if offers(model, "positions"):
        made = at_flat
    sizes = {key: len(value) for key, value in conditions.items()}
    if len({*sizes.values()}) > 1:
        raise ValueError(f"conditions are of different numbers of sequences: {sizes}")
    if sizes:
        setattr(made, "sequences", max(sizes.values()))  # noqa: B010, a function has no such attribute of its own
    return made


def check_sequences(model: object, total: int) -> None:
    """ValueError where a model says that it is of another number of sequences than the run has."""
    own = getattr(model, "sequences", None) if inspect.isfunction(model) or isinstance(model, Wrapper) else None
    if own is not None and own != total:
        raise ValueError(
            f"the score model has conditions (labels, lengths) of {own} sequences, and the run has {total}: one for "
            "each is needed"
        )
    if own is None and isinstance(model, Wrapper):
        for part in model.inside:
            check_sequences(part, total)


def no_rates(log_score: Tensor, sequence: Tensor, position: Tensor, sigma: Tensor) -> ValueError:
    """The error of a row (N,) whose rates are not finite, told in terms of the model that caused it."""
    what = "NaN" if log_score.isnan().any() else f"a log-score of up to {float(log_score.max()):.6g}"
    place = _place(sequence, position, sigma)
    return ValueError(f"the score model returned {what} {place}, which leaves no finite rates")


def no_state(log_score: Tensor, probs: Tensor, sequence: Tensor, position: Tensor, sigma: Tensor) -> ValueError:
    """The same of a row (N,) from whose probabilities (N,) no state can be drawn."""
    place = _place(sequence, position, sigma)
    if log_score.isnan().any():
        return ValueError(f"the score model returned NaN {place}")
    if log_score.max() == torch.inf:
        return ValueError(f"the score model returned an infinite log-score {place}")
    return ValueError(
        f"no state can be drawn {place}: the probabilities sum to {float(probs.sum())}; expected a finite, positive "
        "sum: no state to draw is left (0) or an entry is NaN or infinite"
    )


def _place(sequence: Tensor, position: Tensor, sigma: Tensor) -> str:
    """Where a row is: its sequence () and position (), and the noise of its sequence, of sigma (B,)."""
    b, i = int(sequence), int(position)
    return f"at sequence {b}, position {i}, sigma = {float(sigma[b]):.6g}"
