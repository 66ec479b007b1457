"""DiffusionGemma of transformers, built tiny: its law by our samplers, and its own decoder step for step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sedd_samplers import Tweedie, sample
from sedd_samplers.adapters import from_hf, to_posterior
from sedd_samplers.adapters.canvas import rewrites_a_canvas
from sedd_samplers.renoising import EntropyBoundRenoising, within_bound
from torch import Tensor
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, DiffusionGemmaTextConfig
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    EntropyBoundSampler,
    EntropyBoundSamplerConfig,
)

CANVAS, WORDS = 8, 32
# A draw on the way is between two tokens whose logits differ by less than 1e-4: this leaves nothing to chance there.
COLD = {"t_min": 1e-7, "t_max": 2e-7}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    make: Any = DiffusionGemmaTextConfig
    text = make(
        vocab_size=WORDS, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, global_head_dim=8, num_experts=2, top_k_experts=1, moe_intermediate_size=8,
        layer_types=["sliding_attention", "full_attention"], sliding_window=16,
    )  # fmt: skip
    picture = {"model_type": "gemma4_vision", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    picture |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    made: Any = DiffusionGemmaForBlockDiffusion(
        DiffusionGemmaConfig(text_config=text, vision_config=picture, canvas_length=CANVAS)
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3)  # fresh ones say nearly the same of every token
    return made.eval()


@pytest.fixture
def prompt() -> Tensor:
    return torch.tensor([[2, 5, 6], [2, 9, 10]])


def canvas(seed: int = 0) -> Tensor:
    return torch.randint(WORDS, (2, CANVAS), generator=torch.Generator().manual_seed(seed))


def generated(model: Any, prompt: Tensor, start: Tensor, **options: Any) -> Tensor:
    """What its own `generate` appends to the prompts."""
    out = model.generate(prompt, decoder_input_ids=start, max_new_tokens=CANVAS, **options)
    new: Tensor = out.sequences[:, prompt.shape[1] :]
    return new


def ours(model: Any, prompt: Tensor, start: Tensor, **options: Any) -> Tensor:
    """The same by `from_hf`, whose defaults come from the model's generation configuration."""
    before = dict(vars(model.generation_config))
    try:
        vars(model.generation_config).update(options)
        score, graph, noise, defaults = from_hf(model, prompt=prompt, own_decoder=True)
    finally:
        vars(model.generation_config).clear()
        vars(model.generation_config).update(before)
    return sample(score, graph, noise, shape=(2, CANVAS), start=start, **defaults)


def test_it_is_known_by_what_it_can_be_called_with(model: Any) -> None:
    assert rewrites_a_canvas(model)
    assert not rewrites_a_canvas(torch.nn.Linear(2, 2))


def test_its_posterior_is_its_softmax_with_and_without_a_memory(model: Any, prompt: Tensor) -> None:
    """The first answer of a run is unconditioned, the next conditioned on it, and a run at full noise begins anew."""
    score, graph, _, _ = from_hf(model, prompt=prompt)
    posterior, x, y = to_posterior(score, graph), canvas(1), canvas(2)
    high, low = (torch.full((2,), level, dtype=torch.float64) for level in (2.0, 1.0))
    with torch.no_grad():
        first = model(input_ids=prompt, decoder_input_ids=x).logits
        second = model(input_ids=prompt, decoder_input_ids=y, self_conditioning_logits=first).logits
        for _ in range(2):
            torch.testing.assert_close(posterior(x, high), first.softmax(-1), rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(posterior(y, low), second.softmax(-1), rtol=1e-3, atol=1e-5)


def test_a_sequence_has_the_sample_that_it_has_alone(model: Any, prompt: Tensor) -> None:
    """With another beside it, with one that is finished early, and with padding before its prompt."""
    padded = torch.cat([torch.zeros(2, 2, dtype=torch.int64), prompt], 1)
    seen = (torch.arange(5) >= 2).long().expand(2, -1)

    def run(rows: list[int], **options: Any) -> Tensor:
        score, graph, noise, defaults = from_hf(model, prompt=prompt[rows])
        return sample(score, graph, noise, shape=(len(rows), CANVAS), seeds=rows, **{**defaults, "steps": 6, **options})

    both = run([0, 1])
    assert torch.equal(both[[1]], run([1]))
    ended = run([0, 1], until=lambda state: torch.tensor([state.step > 2, False]))
    assert torch.equal(both[1], ended[1])
    assert len(set(both.flatten().tolist())) > 4
    with torch.no_grad():
        given_mask, graph, _, _ = from_hf(model, prompt=padded, attention_mask=seen)
        model_mask = torch.cat([seen, torch.ones(2, CANVAS).long()], 1)
        logits = model(
            input_ids=padded, attention_mask=seen, decoder_input_ids=canvas(), decoder_attention_mask=model_mask
        ).logits
        level = torch.ones(2, dtype=torch.float64)
        got = to_posterior(given_mask, graph)(canvas(), level)
    torch.testing.assert_close(got, logits.softmax(-1), rtol=1e-3, atol=1e-5)


def test_a_tweedie_step_home_draws_from_its_posterior(model: Any, prompt: Tensor) -> None:
    """3000 times from one canvas: every token of every position within 5 standard errors.

    256 comparisons, a false alarm once in 7,000 seeds.
    """
    count, start = 3000, canvas(1)[:1]
    with torch.no_grad():
        law = model(input_ids=prompt[:1], decoder_input_ids=start).logits[0].double().softmax(-1)
    score, graph, noise, _ = from_hf(model, prompt=prompt[:1].expand(count, -1))
    x = sample(score, graph, noise, shape=(count, CANVAS), start=start.expand(count, -1), times=torch.tensor([1.0, 0]),
               method=Tweedie(), denoise=False, generator=torch.Generator().manual_seed(0))  # fmt: skip
    share = torch.nn.functional.one_hot(x, WORDS).double().mean(0)
    assert ((share - law).abs() < 5 * (law * (1 - law) / count).sqrt() + 1e-4).all()


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_its_own_decoder_at_little_temperature_is_its_generate(model: Any, prompt: Tensor, steps: int) -> None:
    """There is nothing random left: draws are the likeliest tokens, and all are accepted. The start is given."""
    cold = {**COLD, "max_denoising_steps": steps}
    for seed in range(3):
        assert torch.equal(ours(model, prompt, canvas(seed), **cold), generated(model, prompt, canvas(seed), **cold))


@pytest.mark.parametrize(
    "options",
    [
        {"max_denoising_steps": 9},
        {"max_denoising_steps": 9, "sampler_config": EntropyBoundSamplerConfig(2.0)},
        {"max_denoising_steps": 12, "t_min": 0.05, "t_max": 0.3, "sampler_config": EntropyBoundSamplerConfig(1.0)},
        {"max_denoising_steps": 12, "confidence_threshold": 3.0, "stability_threshold": 2},
        {"max_denoising_steps": 12, "confidence_threshold": 3.0, "stability_threshold": 0},
    ],
)
def test_its_own_decoder_is_its_generate_step_for_step(
    model: Any, prompt: Tensor, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its own temperatures, acceptance, rethrows and ends, with the same draws on both sides.

    Drawn are the likeliest tokens, and thrown is one canvas again and again.
    """
    thrown = canvas(7)
    monkeypatch.setattr(EntropyBoundSampler, "initialize_canvas", lambda self, batch_size, device: thrown)
    monkeypatch.setattr(torch, "multinomial", lambda p, num_samples: p.argmax(-1, keepdim=True))
    monkeypatch.setattr("sedd_samplers.reverse.Reverse.prior", lambda self: thrown)
    monkeypatch.setattr("sedd_samplers.renoising.draw_categorical", lambda p, uniform, **_: p.argmax(1))
    results = []
    for seed in range(3):
        results.append(generated(model, prompt, canvas(seed), **options))
        assert torch.equal(ours(model, prompt, canvas(seed), **options), results[-1])
    assert len(set(torch.cat(results).flatten().tolist())) > 2


def test_canvases_follow_each_other(model: Any, prompt: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them, the second after the prompt and the first: `generate` again."""
    cold, start = {**COLD, "max_denoising_steps": 5}, canvas(3)
    monkeypatch.setattr(EntropyBoundSampler, "initialize_canvas", lambda self, batch_size, device: start)
    whole = model.generate(prompt, max_new_tokens=2 * CANVAS, **cold).sequences
    first = ours(model, prompt, start, **cold)
    second = ours(model, torch.cat([prompt, first], 1), start, **cold)
    assert torch.equal(torch.cat([prompt, first, second], 1), whole)


def test_what_is_accepted_is_what_transformers_accepts() -> None:
    """Its sampler on random logits, at bounds from nothing to everything."""
    logits = 4 * torch.randn(16, 10, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = logits.softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    for bound in (1e-6, 0.1, 1.0, 3.0, 100.0):
        sampler: Any = EntropyBoundSampler(EntropyBoundSamplerConfig(bound), 10, 5, 1)
        sampler.accept_canvas(torch.zeros(16, 10).long(), torch.zeros(16, 10).long(), logits, 1)
        assert torch.equal(within_bound(entropy, bound), sampler.accepted_token_mask)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, r"a DiffusionGemmaForBlockDiffusion writes after a prompt"),
        ({"prompt": torch.zeros(2, 3)}, r"prompt must be int64 of shape \(batch, length\), got torch.float32 \(2, 3\)"),
        (
            {"prompt": torch.zeros(2, 3).long(), "attention_mask": torch.ones(2, 4)},
            r"attention_mask must have the prompt's shape \(2, 3\), got \(2, 4\)",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(model: Any, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        from_hf(model, **options)


def test_more_sequences_than_prompts_are_refused(model: Any, prompt: Tensor) -> None:
    score, graph, noise, _ = from_hf(model, prompt=prompt)
    with pytest.raises(ValueError, match="given 2 prompts, and is asked about sequence 2"):
        sample(score, graph, noise, shape=(3, CANVAS), steps=2)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"bound": 0.0}, "bound must be"),
        ({"confident": -1.0}, "confident must be"),
        ({"stable": 1.5}, "stable must be"),
    ],
)
def test_a_decoder_out_of_range_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        EntropyBoundRenoising(**options)
