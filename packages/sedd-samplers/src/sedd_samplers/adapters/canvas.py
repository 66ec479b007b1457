"""Networks that rewrite a canvas of random tokens: DiffusionGemma of transformers, and what is made like it.

Such a model is an encoder of the prompt, whose keys and values it keeps, and a decoder that sees a whole canvas, some
of its tokens noise, and answers with logits of p(x0 | x_t): uniform noise, no mask, no time. It is conditioned on its
own answer of the step before (self-conditioning; Chen, Zhang, Hinton, *Analog bits*, 2022, arXiv 2208.04202), so that
it has a memory: one for each sequence of a run, empty where a run begins.

    logits_t = decoder(x_t, prompt, softmax(logits_{t + 1} / tau_{t + 1})) / tau_t
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..fast import Answer
from ..model_calls import Wrapper, offers
from ..positions import Positions
from ..precision import wide

__all__ = ["rewrites_a_canvas", "canvas_logits"]


def rewrites_a_canvas(model: Any) -> bool:
    """Whether a model has the surface of DiffusionGemma: a canvas, a prompt's cache and self-conditioning."""
    wanted = ("input_ids", "past_key_values", "decoder_input_ids", "self_conditioning_logits")
    return all(offers(model, name) for name in wanted)


def canvas_logits(
    model: Any,
    prompt: Tensor,
    attention_mask: Tensor | None = None,
    temperature: Callable[[Tensor], Tensor] | None = None,
) -> Wrapper:
    """The network of logits (x (b, L), sigma (b,)) -> (b, L, N) that a canvas model is, given its prompt.

    A sequence's memory begins anew where it is asked about at noise no lower than its run began with; so make one for
    each run that goes on where another left off. It keeps one answer, as the model's own `generate` does.

    Args:
        model: called as model(past_key_values=, decoder_input_ids=, self_conditioning_logits=,
            self_conditioning_mask=, decoder_attention_mask=), its prompt encoded by `get_encoder()`.
        prompt: (B, P) int64, a prompt for each sequence of the run.
        attention_mask: (B, P), 0 at padding, at whichever side; None where there is none.
        temperature: sigma (b,) -> (b,): what logits are divided by, before the model is conditioned on them as well.

    Returns:
        A model that offers `where` and `rows`.

    Raises:
        ValueError: a prompt of another shape; when called, for more sequences than prompts.
    """
    if prompt.ndim != 2 or prompt.dtype != torch.int64:
        raise ValueError(f"prompt must be int64 of shape (batch, length), got {prompt.dtype} {tuple(prompt.shape)}")
    if attention_mask is not None and attention_mask.shape != prompt.shape:
        raise ValueError(
            f"attention_mask must have the prompt's shape {tuple(prompt.shape)}, got {tuple(attention_mask.shape)}"
        )
    encoded: list[Any] = []
    before: list[Tensor] = []  # the last answer (B, L, N)
    highest = torch.full((len(prompt),), -torch.inf, dtype=wide(prompt.device), device=prompt.device)

    def rows_at(x: Tensor, sigma: Tensor, at: Positions, rows: Tensor) -> Answer:
        if len(rows) > len(prompt) or (len(rows) < len(prompt) and int(rows.max()) >= len(prompt)):
            raise ValueError(
                f"the model was given {len(prompt)} prompts, and is asked about sequence {int(rows.max())}"
            )
        if not encoded:
            encoded.append(model.get_encoder()(input_ids=prompt, attention_mask=attention_mask).past_key_values)
        anew = sigma >= highest[rows]
        highest[rows] = torch.where(anew, sigma.to(highest.dtype), highest[rows])
        further: dict[str, Any] = {}
        if before and before[0].shape[1] == x.shape[1]:
            further["self_conditioning_logits"] = before[0][rows]
            further["self_conditioning_mask"] = ~anew
        if attention_mask is not None:
            seen = attention_mask[rows].bool()
            further["decoder_attention_mask"] = torch.cat([seen, torch.ones_like(x, dtype=torch.bool)], 1)
        cache = encoded[0] if len(rows) == len(prompt) else _of_sequences(encoded[0], rows)
        logits: Tensor = model(past_key_values=cache, decoder_input_ids=x, **further).logits
        if temperature is not None:
            logits = logits / temperature(sigma).to(logits.dtype)[:, None, None]
        if len(rows) == len(prompt):
            before[:] = [logits.detach()]
        elif before:
            before[:] = [before[0].index_copy(0, rows, logits.detach())]
        else:
            kept = logits.new_zeros(len(prompt), *logits.shape[1:])
            before[:] = [kept.index_copy_(0, rows, logits.detach())]
        return Answer(logits.flatten(0, 1), at.flat)

    return Wrapper(rows_at, model)


def _of_sequences(cache: Any, rows: Tensor) -> Any:
    """The same keys and values of some sequences; the cache itself is left alone."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(rows)
    return chosen
