"""A model of the hub with the process that it was trained for, in one call: `from_hf`.

What a model is, is seen by what it can be called with, never by its name: see `from_hf`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..controls import Control
from ..interfaces import Graph, Noise, RowModel
from ..masked import Unmasking
from ..model_calls import offers
from ..renoising import EntropyBoundRenoising
from ..steps import Tweedie
from ..token_ids import banned_of, mask_of, pad_of
from .canvas import canvas_logits, rewrites_a_canvas
from .conversions import from_logits, from_masked_lm
from .processes import Masking, Proportional, Replacing

__all__ = ["Adapted", "from_hf"]


class Adapted(NamedTuple):
    """A model of the hub as the samplers take it.

    Attributes:
        score: the score model.
        graph: the forward process that the model was trained for.
        noise: a schedule of it; the models know no time, so that it sets the lengths of steps alone.
        options: what suits the model, for `sample` and `infill`: a method, and a grid where it has its own.
    """

    score: RowModel
    graph: Graph
    noise: Noise
    options: dict[str, Any]


def from_hf(
    model: Any,
    tokenizer: Any = None,
    *,
    mask_id: int | None = None,
    attention_mask: Tensor | None = None,
    prompt: Tensor | None = None,
    own_decoder: bool = False,
    shifted: bool | None = None,
    banned: Sequence[int] | None = (),
    controls: Sequence[Control] = (),
) -> Adapted:
    """A model of transformers, or one made like them, with the process that it was trained for.

        score, graph, noise, options = from_hf(model, tokenizer)
        y = infill(score, graph, noise, x=x, given=x != graph.mask_id, **options)

    What kind it is, is seen by what it can be called with:

    - masked language models, any `AutoModelForMaskedLM`; LLaDA; Dream, whose logits are of the token before
      (it has `diffusion_generate`) and whose attention mask is one of pairs: masks, and `Unmasking`
    - DiffusionGemma, which rewrites a canvas of random tokens after a prompt: uniform noise, and `Tweedie`. The states
      are the canvas alone, (B, any length).

    Special tokens and ids that the tokenizer cannot decode are never drawn. Ends of text are, unless the tokenizer
    frames its texts by [CLS] and [SEP]. Padding is hidden from the model where `pad_token_id` says nothing else; where
    it also ends texts, `attention_mask` tells the one from the other.

    Args:
        model: in evaluation mode.
        tokenizer: its tokenizer; None bans nothing by itself, and needs a mask from `mask_id` or the configuration.
        mask_id: the mask's id, where neither tokenizer nor configuration names it.
        attention_mask: (B, L), 0 at padding, left or right, for each sequence of the run; with `prompt`, (B, P).
            Position ids, where the model takes them, count what is no padding.
        prompt: (B, P) int64, for DiffusionGemma: what each sequence's canvas goes on from.
        own_decoder: for DiffusionGemma, as its own `generate` decodes: logits over a temperature that falls, from the
            model's generation configuration, and `EntropyBoundRenoising`. That is no sample of its law.
        shifted: whether logits are of the token after each position; None to see by the model.
        banned: more states that are never drawn.
        controls: as for `from_posterior`.

    Returns:
        `Adapted`: score, graph, noise, options.

    Raises:
        ValueError: no mask can be found, or two different ones; a prompt to a model that takes none, or none to one
            that needs it; and see `from_masked_lm`, `from_logits`.
    """
    noise = Proportional()
    if rewrites_a_canvas(model):
        if prompt is None:
            raise ValueError(f"a {type(model).__name__} writes after a prompt: prompt= (B, P) int64 ids")
        width = int(model.get_output_embeddings().out_features)
        plain = {"method": Tweedie(), "steps": 48}
        temperature, options = _own_decoder(model, noise) if own_decoder else (None, plain)
        graph: Graph = Replacing(width)
        out = [*(banned or ()), *banned_of(model, tokenizer, width)]
        logits = canvas_logits(model, prompt, attention_mask, temperature)
        return Adapted(from_logits(logits, graph, banned=out, controls=controls), graph, noise, options)
    if prompt is not None or own_decoder:
        raise ValueError(
            f"prompt and own_decoder are for models that write a canvas after a prompt; a {type(model).__name__} gets "
            "its prompt as given tokens: infill(..., x=x, given=given), see pad_prompts"
        )
    mask = mask_of(model, tokenizer, mask_id)
    dream = hasattr(model, "diffusion_generate")
    graph = Masking(max(_width_of(model, tokenizer), mask + 1), mask)
    pad = pad_of(model, tokenizer) if attention_mask is None else None
    out = [*(banned or ()), *(state for state in banned_of(model, tokenizer, graph.num_states) if state != mask)]
    score = from_masked_lm(
        model,
        graph,
        banned=out,
        pad_id=pad,
        shifted=dream if shifted is None else shifted,
        inputs=_attention(model, attention_mask, pad, pairs=dream),
        controls=controls,
    )
    return Adapted(score, graph, noise, {"method": Unmasking()})


def _width_of(model: Any, tokenizer: Any) -> int:
    """N, by the model's head, its configuration or, where neither says, its tokenizer."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 2:
        return weight.shape[0]
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if size is None and tokenizer is not None:
        size = len(tokenizer)
    if size is None:
        raise ValueError(f"nothing says how many tokens the {type(model).__name__} has: give its tokenizer")
    return int(size)


def _attention(
    model: Any, attention_mask: Tensor | None, pad: int | None, *, pairs: bool
) -> Callable[[Tensor, Tensor], dict[str, Any]] | None:
    """What a model is told of padding: a mask of positions, or of pairs of them, and position ids that skip it."""
    counts = offers(model, "position_ids")
    if attention_mask is None and not pairs:
        return None

    def inputs(x: Tensor, rows: Tensor) -> dict[str, Any]:
        if attention_mask is not None:
            seen = attention_mask[rows].to(x.device).bool()
        else:
            seen = torch.ones_like(x, dtype=torch.bool) if pad is None else x != pad
        told: dict[str, Any] = {
            "attention_mask": (seen[:, None, :, None] & seen[:, None, None]) if pairs else seen.long()
        }
        if counts and attention_mask is not None:
            told["position_ids"] = (seen.long().cumsum(1) - 1).clamp(min=0)
        return told

    return inputs


def _own_decoder(model: Any, noise: Proportional) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    """The temperature of each noise level, and the options, of a model's own `generate`."""
    config, defaults = model.generation_config, {}
    if hasattr(config, "_get_default_generation_params"):
        defaults = config._get_default_generation_params()

    def said(name: str) -> Any:
        value = getattr(config, name, None)
        return defaults.get(name) if value is None else value

    steps, low, high = said("max_denoising_steps"), said("t_min"), said("t_max")
    confident, stable = said("confidence_threshold"), said("stability_threshold")
    method = EntropyBoundRenoising(
        said("sampler_config").entropy_bound, None if stable is None else confident, stable or 0
    )
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return lambda sigma: low + (high - low) * noise.time(sigma), {"method": method, "times": times, "denoise": False}
