"""Score models out of models that predict something else, and back.

    posterior    p(x0 | x_t)               s(x)_y = sum_{x0} p(x0 | x) p(y | x0) / p(x | x0)
    logits       of p(x0 | x_t)            their softmax
    reverse      p(x_s | x_t), D3PM        the same sum with the law of a shorter step, sigma(t) - sigma(s)
    velocity     of a discrete flow        u(y, x) = (p(x0 = y | x) - delta_x(y)) / (1 - kappa), kappa = e^-sigma

All go through one pair of row kernels: `tweedie_score` (from the law of an earlier state to the score) and its inverse
`tweedie_probs`. `from_...` wraps a foreign model as a score model, `to_...` wraps a score model as the other kind; the
two undo each other. A wrapper offers `where` and `rows` (see `sedd_samplers.model_calls`), hands them on to a model
that has them too, and indexes the answer of one that has not. It works in float32 (in float64 for float64 answers).

Sources: posterior and Tweedie's theorem, equations 18 and 19; SUBS, Sahoo et al. 2024 (arXiv 2406.07524); reverse
model, Austin et al. 2021 (arXiv 2107.03006); velocity, Gat et al. 2024 (arXiv 2407.15595).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..controls import Control, apply_controls
from ..fast import Answer, Part
from ..interfaces import Graph, RowModel, ScoreModel, check_graph
from ..leave_one_out import score_of, without_own
from ..model_calls import ModelCall, ScoreCall, Wrapper, offers
from ..positions import Positions
from ..precision import check_recoverable, fastest_rate, working_dtype
from ..steps import denoise_probs, tweedie_probs
from ..token_ids import ends_of
from ..waiting import require
from .heads import fit, logits_of, path_of_head, with_head_at, without_mask

__all__ = [
    "from_posterior",
    "to_posterior",
    "from_logits",
    "from_masked_lm",
    "from_reverse",
    "to_reverse",
    "from_velocity",
    "to_velocity",
]

Model = Callable[..., Tensor]
Levels = Callable[[Tensor], Tensor]


def from_posterior(posterior: Model, graph: Graph, *, controls: Sequence[Control] = ()) -> RowModel:
    """The score model of a model that predicts the clean tokens.

    Args:
        posterior: (x (B, L) int64, sigma (B,)) -> probabilities (B, L, N) of each position's clean token; what it says
            of x0 that cannot have become x is ignored. It may offer `where` and `rows`.
        graph: the forward process.
        controls: temperature and the like, applied to the posterior in this order (see `sedd_samplers.controls`).

    Returns:
        (x, sigma) -> log_score (B, L, N), float32 at least; 0 at y = x, -inf where no probability leads.

    Raises:
        ValueError: the posterior is not callable or the graph none; when called, if it returns another shape, and if
            its first answer holds negative numbers, as logits do.
    """
    return _from_law(posterior, "posterior", graph, lambda sigma: sigma, controls)


def to_posterior(score: ScoreModel, graph: Graph) -> RowModel:
    """The model of clean tokens that a score model is: the law of its final denoise.

    Args:
        score: the score model.
        graph: the forward process.

    Returns:
        (x, sigma) -> p(x0 | x_t = x) (B, L, N), normalised over the tokens, 0 at the mask; negative entries, which a
        score of no distribution gives, are set to 0. At a position that holds a token of an absorbing graph it is the
        certainty of that token.

    Raises:
        ValueError: the score model is not callable or the graph none; when called, if it returns another shape, or if
            tokens are noised and sigma is too high to tell the posterior from a score of that precision (9 in float32).
    """
    return _to_law(score, graph, lambda sigma: sigma, denoise_probs)


def from_logits(
    logits: Model,
    graph: Graph,
    *,
    subs: bool = True,
    banned: Sequence[int] | None = (),
    controls: Sequence[Control] = (),
) -> RowModel:
    """The score model of a network whose logits, normalised, are p(x0 | x_t).

    Args:
        logits: (x (B, L) int64, sigma (B,)) -> (B, L, N). It may offer `where` and `rows`. A head without a column
            for a mask behind all tokens, (B, L, N - 1), and one that is padded beyond the N states are taken as what
            they are.
        graph: the forward process.
        subs: whether the mask is taken out before the softmax, as in the SUBS parametrisation. Its other half, that a
            token once there is carried over, needs no option: nothing leads into a token of an absorbing graph. With
            False the softmax is over all states as they stand (D3PM's), and what falls on the mask keeps a position
            masked until the final denoise.
        banned: states that never are clean tokens, such as [CLS] and [PAD].
        controls: as for `from_posterior`.

    Returns:
        A score model.

    Raises:
        ValueError: logits is not callable, the graph is none, or a banned state is none of the graph's; when called, if
            it returns another shape, and if the rows of its first answer are probabilities: not negative, with a sum of
            1, and not all of them 0 or 1.
    """
    check_graph(graph)
    banned = () if banned is None else banned
    wrong = [state for state in banned if not 0 <= state < graph.num_states]
    if wrong:
        raise ValueError(f"banned holds the state {wrong[0]}; states are 0..{graph.num_states - 1}")
    never = {*banned} | ({graph.mask_id} if subs and graph.mask_id is not None else set())
    if len(never | {graph.mask_id}) == graph.num_states + (graph.mask_id is None):
        raise ValueError("banned holds every token: none is left to draw")
    indices = {torch.device("cpu"): torch.tensor(sorted(never), dtype=torch.int64, device="cpu")}
    widths = without_mask(graph)
    call, look = ModelCall(logits, graph.num_states, "logits", widths=widths), _at_first(check_logits)

    def rows_at(x: Tensor, sigma: Tensor, at: Positions, rows: Tensor) -> Answer:
        answer = look(call(x, sigma, at, rows))
        if answer.device not in indices:
            indices[answer.device] = indices[torch.device("cpu")].to(answer.device)
        out = indices[answer.device]

        def softmax(part: Tensor, _: Part) -> Tensor:
            return fit(part, graph).index_fill(1, out, -torch.inf).softmax(-1)

        return answer.then(softmax, width=graph.num_states)

    return from_posterior(Wrapper(rows_at, logits), graph, controls=controls)


def from_masked_lm(
    model: Any,
    graph: Graph,
    *,
    banned: Sequence[int] | None = (),
    pad_id: int | None = None,
    shifted: bool = False,
    inputs: Callable[[Tensor, Tensor], Mapping[str, Any]] | None = None,
    controls: Sequence[Control] = (),
) -> RowModel:
    """The score model of a masked language model, such as an `AutoModelForMaskedLM` of transformers.

        graph = Absorbing(model.config.vocab_size - 1, mask_id=tokenizer.mask_token_id)
        score = from_masked_lm(model, graph, banned=tokenizer.all_special_ids, pad_id=tokenizer.pad_token_id)

    `from_hf` does both from model and tokenizer, and refuses where no mask can be found: a tokenizer without one has
    `mask_token_id` None, which a graph may take for its last state. Models that expect [CLS] and [SEP], such as BERT
    and ESM, get them as given tokens.

    Args:
        model: called as model(input_ids=x, attention_mask=...), without the latter if it has no such parameter. Its
            answer is (B, L, W) logits: a tensor, `.logits`, or the first of a tuple. Where its output embedding can be
            found by `get_output_embeddings()`, that runs only at the positions asked for. Put it into evaluation mode
            first. It is not changed, and threads may share it.
        graph: an absorbing graph over its vocabulary, the mask where its tokenizer has it.
        banned: states that are never drawn, such as the tokenizer's special tokens; the mask is banned anyway.
        pad_id: the padding token: positions that hold it get an attention mask of 0, and it is banned. Where ends of
            text are written by the same token, leave it None and give the attention mask by `inputs`.
        shifted: whether the logits at a position are of the token *after* it, as in models that were causal ones
            (Dream); the first token's are its own position's.
        inputs: (x (b, L), rows (b,)) -> more inputs by name, such as position or token type ids, or an attention mask
            of one's own; `rows` are the sequences of the run that x holds.
        controls: as for `from_posterior`.

    Returns:
        A score model that does not depend on sigma but by the factor of the graph.

    Raises:
        ValueError: see `from_logits`; the graph has no mask, or another than the model's configuration names; `pad_id`
            also ends texts; when called, for an answer of another kind, and for a model that scales by the share of
            masks (ESM's token dropout) where a sequence is nothing but masks.
    """
    check_graph(graph)
    mask_id = graph.mask_id
    if mask_id is None:
        raise ValueError("a masked language model needs a graph with a mask: its mask_id is None")
    if not callable(model):
        raise ValueError(f"the masked language model must be callable, got a {type(model).__name__}")
    config = getattr(model, "config", None)
    own_mask = getattr(config, "mask_token_id", None)
    if own_mask is not None and own_mask != mask_id:
        raise ValueError(f"the graph's mask is {mask_id}, and the {type(model).__name__} has {own_mask}")
    if pad_id is not None and pad_id in ends_of(config):
        raise ValueError(
            f"pad_id={pad_id} also ends texts, and every end would be hidden from the {type(model).__name__}: leave it "
            "out, and tell padding by inputs=lambda x, rows: {'attention_mask': mask[rows]}"
        )
    path = path_of_head(model)
    takes_mask = offers(model, "attention_mask") or offers(model, "kwargs")
    all_masks = (
        f"the {type(model).__name__} divides by the share of tokens that are no masks, and a sequence is nothing but "
        "masks: give it its frame (CLS and EOS), or a token, by infill(..., given=)"
    )

    def rows_at(x: Tensor, sigma: Tensor, at: Positions, rows: Tensor) -> Answer:
        if getattr(config, "token_dropout", False):
            require(~x.eq(mask_id).all(1), "a sequence may not be nothing but masks", lambda: all_masks)
        further: dict[str, Any] = {}
        if takes_mask:
            further["attention_mask"] = torch.ones_like(x) if pad_id is None else (x != pad_id).long()
        if inputs is not None:
            further.update(inputs(x, rows))
        # of a causal model's logits those before each; the first position's are asked for once or twice
        source = torch.where(at.position > 0, at.flat - 1, at.flat) if shifted else at.flat
        called = model if path is None or at.whole else with_head_at(model, path, source)
        logits = logits_of(called(input_ids=x, **further))
        return Answer(logits.flatten(0, 1), source) if logits.ndim == 3 else Answer(logits)

    banned = [*(banned or ()), *([] if pad_id is None else [pad_id])]
    return from_logits(Wrapper(rows_at, model), graph, banned=banned, controls=controls)


def from_reverse(reverse: Model, graph: Graph, delta_sigma: Levels) -> RowModel:
    """The score model of a model of reverse steps, p(x_s | x_t), as D3PM's.

    A Tweedie step of the same length is the model's own step again, whatever the model.

    Args:
        reverse: (x (B, L) int64, sigma (B,)) -> probabilities (B, L, N) of each position's state one of its own steps
            earlier. It may offer `where` and `rows`.
        graph: the forward process.
        delta_sigma: sigma (B,) -> (B,): how much of the total noise that step takes away, in (0, sigma].

    Returns:
        A score model.

    Raises:
        ValueError: reverse is not callable or the graph none; when called, if it returns another shape.
    """
    return _from_law(reverse, "reverse model", graph, delta_sigma)


def to_reverse(score: ScoreModel, graph: Graph, delta_sigma: Levels) -> RowModel:
    """The model of reverse steps p(x_s | x_t) that a score model is by Tweedie's equation 19.

    Arguments as for `from_reverse`; returns (x, sigma) -> probabilities (B, L, N), normalised, negatives set to 0.
    """
    return _to_law(score, graph, delta_sigma, tweedie_probs)


def from_velocity(velocity: Model, graph: Graph) -> RowModel:
    """The score model of a discrete flow along the path p(. | x0) = kappa delta_x0 + (1 - kappa) prior.

    That is the graph's own path at the total noise at which kappa = e^-sigma. The flow's clock is kappa itself; of
    another scheduler kappa(tau) the velocity is `lambda x, kappa: u(x, tau(kappa)) / slope(kappa)[:, None, None]`, with
    the scheduler's inverse and its derivative d kappa / d tau.

    Args:
        velocity: (x (B, L) int64, kappa (B,)) -> u (B, L, N), the rate of the jump x -> y per unit of kappa, and minus
            the sum of the others at y = x. It may offer `where` and `rows`.
        graph: the forward process; each token keeps itself with probability e^-sigma and else forgets itself, as under
            absorbing and uniform graphs.

    Returns:
        A score model.

    Raises:
        ValueError: the velocity is not callable or the graph's path is another; when called, if it returns another
            shape.
    """
    _check_path(graph)
    call = ModelCall(velocity, graph.num_states, "velocity")

    def rows_at(x: Tensor, sigma: Tensor, at: Positions, rows: Tensor) -> Answer:
        answer = call(x, torch.exp(-sigma), at, rows)
        here, left = x.flatten()[at.flat, None], -torch.expm1(-sigma)[at.sequence, None]

        def posterior(u: Tensor, part: Part) -> Tensor:
            p = u * left[part].to(u.dtype)
            return p.scatter_add_(1, here[part], torch.ones_like(p[:, :1])).clamp_min_(0)

        return answer.then(posterior)

    return from_posterior(Wrapper(rows_at, velocity), graph)


def to_velocity(score: ScoreModel, graph: Graph) -> RowModel:
    """The velocity (x, kappa (B,)) -> u (B, L, N) of the discrete flow that a score model is, 0 < kappa < 1.

    Arguments and errors as for `from_velocity`.
    """
    _check_path(graph)
    posterior = _to_law(score, graph, lambda sigma: sigma, denoise_probs)

    def rows_at(x: Tensor, kappa: Tensor, at: Positions, rows: Tensor) -> Tensor:
        p = posterior.answer(x, -torch.log(kappa), at, rows).tensor()
        here, left = x.flatten()[at.flat, None], (1 - kappa)[at.sequence, None]
        return p.scatter_add_(1, here, -torch.ones_like(p[:, :1])).div_(left.to(p.dtype))

    return Wrapper(rows_at, score)


def _from_law(law: Model, name: str, graph: Graph, delta_sigma: Levels, controls: Sequence[Control] = ()) -> RowModel:
    check_graph(graph)
    call, rate, look = ModelCall(law, graph.num_states, name), fastest_rate(graph), _at_first(check_probabilities)

    def rows_at(x: Tensor, sigma: Tensor, at: Positions, rows: Tensor) -> Answer:
        answer = look(call(x, sigma, at, rows))
        here, level = x.flatten()[at.flat], delta_sigma(sigma)[at.sequence]
        sequence, position = rows[at.sequence], at.position

        def convert(p: Tensor, part: Part) -> Tensor:
            pi = without_own(p, here[part], graph, level[part])
            del p  # of a piece's size
            if controls:
                how = x, at.sequence[part], at.wanted_in(part)
                pi = apply_controls(controls, pi, sequence[part], position[part], *how)
            return score_of(pi, here[part], graph, level[part])

        return answer.then(convert, working_dtype(rate, answer.device))

    return Wrapper(rows_at, law)


def _at_first(check: Callable[[Answer], None]) -> Callable[[Answer], Answer]:
    """What hands answers on, and checks the first that has any rows: to look at values is to wait for them."""
    seen = list[bool]()

    def look(answer: Answer) -> Answer:
        if not seen and len(answer):
            check(answer)
            seen.append(True)
        return answer

    return look


def check_probabilities(answer: Answer) -> None:
    """ValueError for negative entries in the first answer of a model of probabilities: those are logits."""
    least = min(float(answer[part].detach().min()) for part in answer.parts())
    if least < -1e-6:
        raise ValueError(
            f"a posterior holds probabilities, and this one an entry of {least:.4g}: a network of logits goes through "
            "from_logits"
        )


def check_logits(answer: Answer) -> None:
    """ValueError where the first rows of a network's first answer are probabilities, and not all of them 0 or 1."""
    rows = answer[: min(8, len(answer))].detach()
    shares = (rows >= 0).all() & ((rows.sum(-1) - 1).abs() < 1e-3).all() & (rows.frac() != 0).any()
    if bool(shares):
        raise ValueError(
            "the network must return logits, of which a softmax is taken, and its rows are >= 0 and sum to 1: "
            "probabilities go through from_posterior"
        )


def _to_law(score: ScoreModel, graph: Graph, delta_sigma: Levels, kernel: Callable[..., Tensor]) -> Wrapper:
    check_graph(graph)
    call, rate = ScoreCall(score, graph), fastest_rate(graph)

    def rows_at(x: Tensor, sigma: Tensor, at: Positions, rows: Tensor) -> Answer:
        answer = call(x, sigma, at, rows)
        check_recoverable(rate, delta_sigma(sigma), torch.promote_types(answer.dtype, torch.float32))
        here, level = x.flatten()[at.flat], delta_sigma(sigma)[at.sequence]

        def normalised(log_score: Tensor, part: Part) -> Tensor:
            p = kernel(log_score, here[part], graph, level[part].to(log_score.dtype)).clamp_min_(0)
            return p.div_(p.sum(-1, keepdim=True))

        return answer.then(normalised, working_dtype(rate, answer.device))

    return Wrapper(rows_at, call.model)


def _check_path(graph: Graph) -> None:
    """That exp(sQ) v = e^-s v for every v with sum 0: tokens keep themselves with e^-s and else forget themselves."""
    check_graph(graph)
    seeded = torch.Generator().manual_seed(0)
    v = torch.randn(graph.num_states, dtype=torch.float64, generator=seeded, device="cpu")
    v -= v.mean()
    after = graph.propagate(v[None], torch.ones(1, dtype=torch.float64, device="cpu"))[0]
    if not torch.allclose(after, v / torch.e, rtol=0, atol=1e-6):
        raise ValueError(
            "a flow's path is kappa delta_x0 + (1 - kappa) prior; this graph's transitions are no such mixture with "
            "kappa = e^-sigma, as those of absorbing and uniform graphs are. Adapt the posterior instead"
        )
