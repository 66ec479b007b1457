"""Controls: what may be done to the law of a token before it is drawn.

Temperature, top-k, top-p and constraints are statements about tokens. In a diffusion model two factors make up what is
known of a clean token x0 at a position whose state is x: by equation 18

    p(x0 = c | x_t) = pi(c) p(x | c) / sum over c' of pi(c') p(x | c'),       pi = exp(-sigma Q) s, normalised

The likelihood p(x | c) says what noise does and is the graph's; pi is the law of x0 given the *other* positions, and
the model's. Controls act on pi, and the score follows from what they make of it: the reverse of the process that starts
from the controlled law. (Acting on p(x0 | x_t) would not be: near sigma = 0 that is a spike at x, which a temperature
leaves as it is.) At a mask p(mask | c) is the same for all c, and pi is p(x0 | x_t) itself.

What that is exactly, and what not, under every graph:

- One position, everything else known: exact, the controlled conditional.
- Several: each position's conditional is controlled as it comes, as in any left-to-right model. The samples' joint law
  is not p0 to the power 1/temperature, nor p0 restricted to a set.
- `allowed_tokens`: every finished sample obeys. But a position that is drawn now does not look ahead to the constraints
  of those still open. The law is p0 given the constraint where tokens do not depend on each other, or where every
  constrained position is constrained to one token, which then belongs into the prompt: there the network sees it.

Where tokens are noised, pi of a model of posteriors is its answer divided by p(x | c): near sigma = 0 the small entries
of the answer count, as those of a softmax are right relative to themselves.

A control is a callable (p (M, N), sequence (M,), position (M,)) -> (M, N), non-negative; rows need not sum to 1. One
that has a parameter `counts` is told, by that name, how often each state stands in the row's sequence, (M, N).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .fast import Answer, Part, log
from .interfaces import Graph, RowModel, ScoreModel, check_graph
from .leave_one_out import leave_one_out, score_of
from .model_calls import ScoreCall, Wrapper, offers
from .positions import Positions
from .precision import check_recoverable, fastest_rate, working_dtype
from .waiting import reading_waits, require

__all__ = [
    "Control",
    "controlled",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "allowed_tokens",
    "apply_controls",
]

Control = Callable[..., Tensor]
"""(law of x0 given the other positions (M, N), sequence (M,), position (M,)) -> (M, N), non-negative."""


def controlled(score: ScoreModel, graph: Graph, *controls: Control) -> RowModel:
    """A score model whose law of each token given the other positions is controlled.

    That law is recovered from the score by Tweedie's theorem. That is well conditioned for absorbing graphs. Where
    tokens themselves are noised it amplifies the score's rounding by e^sigma, and is refused where nothing would be
    left: a model that has a posterior to begin with is controlled there by the `controls` of `from_posterior` and
    `from_logits`.

    Without any control it makes a score's posterior sum to 1.

    Args:
        score: the score model.
        graph: the forward process.
        *controls: applied in this order.

    Returns:
        A score model that offers `where` and `rows`.

    Raises:
        ValueError: the score model is not callable or the graph none; when called, if it returns another shape, if the
            controls leave no token to a position, or if tokens are noised and sigma is too high for the score's
            precision (9 in float32).
    """
    check_graph(graph)
    call, rate = ScoreCall(score, graph), fastest_rate(graph)

    def rows_at(x: Tensor, sigma: Tensor, at: Positions, rows: Tensor) -> Answer:
        answer = call(x, sigma, at, rows)
        here, level, sequence, position = x.flatten()[at.flat], sigma[at.sequence], rows[at.sequence], at.position
        check_recoverable(rate, sigma, torch.promote_types(answer.dtype, torch.float32))

        def convert(log_score: Tensor, part: Part) -> Tensor:
            pi = leave_one_out(log_score, here[part], graph, level[part])
            how = x, at.sequence[part], at.wanted_in(part)
            pi = apply_controls(controls, pi, sequence[part], position[part], *how)
            return score_of(pi, here[part], graph, level[part])

        return answer.then(convert, working_dtype(rate, answer.device))

    return Wrapper(rows_at, score)


def apply_controls(
    controls: Sequence[Control],
    p: Tensor,
    sequence: Tensor,
    position: Tensor,
    x: Tensor | None = None,
    index: Tensor | None = None,
    wanted: Tensor | None = None,
) -> Tensor:
    """One control after another, each on rows that sum to 1.

    Args:
        controls: applied in this order.
        p: (M, N) float, non-negative.
        sequence: (M,) int64, which sequence of the run each row belongs to.
        position: (M,) int64, and where in it.
        x: (B, L) int64, the states that controls with a parameter `counts` count; negative ones stand for nothing.
        index: (M,) int64, which row of x each is; `sequence` when None.
        wanted: (M,) bool, the rows that matter: of another that has nothing left comes NaN. All when None.

    On an accelerator a control that leaves nothing gives NaN, from which nothing can be drawn: whoever draws finds it,
    and asks again.

    Raises:
        ValueError: a control leaves nothing, or asks for counts where there is no x.
    """
    p = p / p.sum(-1, keepdim=True)
    for control in controls:
        if offers(control, "counts"):
            if x is None:
                raise ValueError(
                    "a control asks what stands in the sequence, and is not told here: apply it by "
                    "controlled(score, graph, control)"
                )
            p = control(p, sequence, position, counts=_counts(x, sequence if index is None else index, p.shape[-1]))
        else:
            p = control(p, sequence, position)
        total = p.sum(-1, keepdim=True)
        none = total[:, 0] == 0 if wanted is None else (total[:, 0] == 0) & wanted
        if not reading_waits(p.device) and none.any():
            row = int(none.nonzero()[0])
            raise ValueError(
                f"the controls leave no token at sequence {int(sequence[row])}, position {int(position[row])}: "
                "the model gives those that they allow no probability"
            )
        p = p / total
    return p


def _counts(x: Tensor, index: Tensor, num_states: int) -> Tensor:
    """How often each of the N states stands in x[index], (M, N) int32."""
    if reading_waits(x.device):
        rows, which = torch.arange(len(x), device=x.device), index
    else:  # of a piece's own sequences alone
        rows, which = torch.unique(index, return_inverse=True)
    there = x[rows]
    counts = torch.zeros(len(rows), num_states, dtype=torch.int32, device=x.device)
    return counts.scatter_add_(1, there.clamp(min=0), (there >= 0).int())[which]


def temperature(value: float) -> Control:
    """P to the power 1 / value: below 1 for likelier tokens. ValueError unless positive and finite."""
    if not 0 < value < float("inf"):
        raise ValueError(
            f"temperature must be positive and finite, got {value!r}; for the likeliest token use top_k(1)"
        )
    return lambda p, sequence, position: (log(p + 0) / value).softmax(-1)


def top_k(count: int) -> Control:
    """The `count` likeliest tokens. ValueError unless a positive integer."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"top_k must be a positive integer, got {count!r}")

    def keep(p: Tensor, sequence: Tensor, position: Tensor) -> Tensor:
        top = p.topk(min(count, p.shape[-1]))
        return torch.zeros_like(p).scatter_(1, top.indices, top.values)

    return keep


def top_p(mass: float) -> Control:
    """The likeliest tokens that together have at least the probability `mass`: nucleus sampling.

    Holtzman et al., *The curious case of neural text degeneration* (2020). ValueError unless 0 < mass <= 1.
    """
    if not 0 < mass <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {mass!r}")

    def keep(p: Tensor, sequence: Tensor, position: Tensor) -> Tensor:
        falling, order = p.sort(-1, descending=True)
        likelier = falling.cumsum(-1)[:, :-1]  # the mass before the second, the third, ...
        falling[:, 1:].masked_fill_(likelier >= mass, 0.0)
        del likelier  # of a piece's size
        return torch.zeros_like(p).scatter_(1, order, falling)

    return keep


def min_p(share: float) -> Control:
    """The tokens at least `share` times as likely as the likeliest.

    Nguyen et al., *Turning up the heat: min-p sampling* (arXiv 2407.01082, 2024). ValueError unless 0 <= share <= 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"min_p must lie in [0, 1], got {share!r}")
    return lambda p, sequence, position: p.masked_fill(p < share * p.amax(-1, keepdim=True), 0.0)


def repetition_penalty(penalty: float) -> Control:
    """P to the power `penalty` for tokens that stand in the sequence already, which above 1 makes them less likely.

    Keskar et al., *CTRL* (arXiv 1909.05858, 2019), with the penalty on log-probabilities: on logits it depends on the
    constant that a softmax ignores. ValueError unless positive and finite.
    """
    if not 0 < penalty < float("inf"):
        raise ValueError(f"repetition_penalty must be positive and finite, got {penalty!r}")
    return lambda p, sequence, position, counts: torch.where(counts > 0, p**penalty, p)


def allowed_tokens(tokens: Tensor) -> Control:
    """Only the tokens that are allowed at each position; see above for when the law is exact.

    Args:
        tokens: (L, N) bool, or (B, L, N) with other constraints for each sequence of the run.

    Raises:
        ValueError: another shape or dtype, or a position without any token; when called, if the run has another shape.
    """
    if tokens.ndim not in (2, 3) or tokens.dtype != torch.bool:
        raise ValueError(
            f"allowed tokens must be bool of shape (L, N) or (B, L, N), got {tokens.dtype} {tuple(tokens.shape)}"
        )
    empty = (~tokens.any(-1)).nonzero()
    if len(empty):
        raise ValueError(f"no token is allowed at {'position' if tokens.ndim == 2 else 'sequence, position'} "
                         f"{', '.join(str(i) for i in empty[0].tolist())}")  # fmt: skip

    copies = {tokens.device: tokens}

    def on(device: torch.device) -> Tensor:
        if device not in copies:
            copies[device] = tokens.to(device)
        return copies[device]

    def restrict(p: Tensor, sequence: Tensor, position: Tensor) -> Tensor:
        at = (position,) if tokens.ndim == 2 else (sequence, position)

        def told() -> str:
            return (
                f"allowed tokens have the shape {tuple(tokens.shape)}: too small for sequence {int(sequence.max())}, "
                f"position {int(position.max())} and {p.shape[-1]} states"
            )

        if p.shape[-1] != tokens.shape[-1]:
            raise ValueError(told())
        for i, most in zip(at, tokens.shape[:-1], strict=True):
            require(i < most, "allowed tokens are too small for what is sampled", told)
        return p * on(p.device)[at]

    return restrict
