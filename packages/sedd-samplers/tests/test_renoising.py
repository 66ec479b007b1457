"""Entropy-bounded renoising and the network of a canvas model, by rules that tell every call and token."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sedd_samplers import EntropyBoundRenoising, Tweedie, sample
from sedd_samplers.adapters import from_hf, from_posterior, to_posterior
from sedd_samplers.adapters.canvas import canvas_logits, rewrites_a_canvas
from sedd_samplers.adapters.processes import Proportional, Replacing
from sedd_samplers.renoising import within_bound

N = 50


@pytest.mark.parametrize(
    ("bound", "inside"),
    [
        (0.0, [False, False, True, False]),
        (0.0999, [False, False, True, False]),
        (0.1001, [False, True, True, False]),
        (0.2999, [False, True, True, False]),
        (0.3001, [True, True, True, False]),
        (9.0, [True, True, True, False]),
    ],
)
def test_positions_within_a_bound_are_those_of_least_entropy_but_for_the_largest(bound, inside):
    entropy = torch.tensor([[0.3, 0.2, 0.1, torch.inf]])
    assert within_bound(entropy, bound).tolist() == [inside]


def test_what_is_certain_is_within_any_bound_and_what_is_infinite_in_none():
    entropy = torch.tensor([[0.0, 0.4, 0.0], [torch.inf] * 3])
    assert within_bound(entropy, 0.0).tolist() == [[True, True, True], [False] * 3]


def certain(graph, calls, tokens):
    """A model that is sure of these tokens (B, L), and notes which sequences it is asked about."""

    def posterior(x, sigma, where, rows):
        calls.append(rows.tolist())
        return torch.nn.functional.one_hot(tokens[rows], N).double()[where]

    return from_posterior(posterior, graph)


@pytest.mark.parametrize(
    ("how", "asked"),
    [
        ({"stable": 0}, 1),
        ({}, 2),
        ({"stable": 2}, 3),
        ({"stable": 4}, 5),
        ({"confident": None}, 6),
    ],
)
def test_a_sequence_is_done_once_it_is_sure_and_was_for_as_many_steps(ref, how, asked):
    graph = ref.StructuredUniform(N)
    calls: list[list[int]] = []
    tokens = torch.tensor([[3, 7, 49], [0, 1, 2]])
    of_run: dict[str, Any] = {"shape": (2, 3), "steps": 6, "seeds": [0, 1], "denoise": False}
    score, method = certain(graph, calls, tokens), EntropyBoundRenoising(**how)
    x = sample(score, graph, ref.LogLinear(), **of_run, method=method)
    assert torch.equal(x, tokens)
    assert calls == [[0, 1]] * asked


def test_a_sequence_that_is_not_sure_goes_on(ref):
    """One of two: of the mean of its entropies, and by its likeliest tokens, which change."""
    graph = ref.StructuredUniform(N)
    calls: list[list[int]] = []

    def posterior(x, sigma, where, rows):
        calls.append(rows.tolist())
        likely = torch.tensor([5, 5 + len(calls) % 2])[rows]
        p = torch.nn.functional.one_hot(likely, N).double()
        return p[:, None].expand(*x.shape, N)[where]

    how: dict[str, Any] = {
        "shape": (2, 3),
        "steps": 5,
        "seeds": [0, 1],
        "denoise": False,
        "method": EntropyBoundRenoising(),
    }
    sample(from_posterior(posterior, graph), graph, ref.LogLinear(), **how)
    assert calls == [[0, 1], [0, 1], [1], [1], [1]]
    for share, asked in ((0.999, 2), (0.998, 5)):  # entropies of 0.0118 and 0.0220 nats, before either is 0.015
        calls.clear()
        p = torch.full((N,), (1 - share) / (N - 1), dtype=torch.float64)
        p[5] = share

        def even(x, sigma, where, rows, p=p):
            calls.append(rows.tolist())
            return p.expand(*x.shape, N)[where]

        how |= {"method": EntropyBoundRenoising(confident=0.015)}
        sample(from_posterior(even, graph), graph, ref.LogLinear(), **how)
        assert len(calls) == asked


def test_tokens_within_the_bound_are_drawn_and_all_others_thrown_anew(ref):
    """Position 0 is drawn between two tokens, 1 is sure, 2 beyond the bound; at no noise all are the likeliest."""
    graph, count = ref.StructuredUniform(N), 2000
    p = torch.zeros(3, N, dtype=torch.float64)
    p[0, 4], p[0, 5], p[1, 9], p[2, 10:14] = 0.7, 0.3, 1.0, torch.tensor([0.4, 0.3, 0.1, 0.2]).double()
    score = from_posterior(lambda x, sigma, where: p.expand(count, 3, N)[where], graph)
    how: dict[str, Any] = {
        "shape": (count, 3),
        "denoise": False,
        "seeds": range(count),
        "times": torch.tensor([1.0, 0.5]),
    }
    x = sample(score, graph, ref.LogLinear(), **how, method=EntropyBoundRenoising(bound=0.1))
    assert (x[:, 1] == 9).all()
    assert float((x[:, 0] == 4).double().mean()) == pytest.approx(0.7, abs=0.05)
    assert ((x[:, 0] == 4) | (x[:, 0] == 5)).all()
    assert float(((x[:, 2] >= 10) & (x[:, 2] < 14)).double().mean()) == pytest.approx(4 / N, abs=0.03)
    x = sample(
        score, graph, ref.Linear(1.0), **how | {"times": torch.tensor([1.0, 0.0])}, method=EntropyBoundRenoising()
    )
    assert (x == torch.tensor([4, 9, 10])).all()


def test_renoising_is_refused_where_nothing_is_thrown_anew(ref):
    graph = ref.StructuredAbsorbing(5)
    with pytest.raises(ValueError, match="throws tokens anew, under graphs that noise tokens and have no mask"):
        sample(
            lambda x, sigma: torch.zeros(*x.shape, 6),
            graph,
            ref.LogLinear(),
            shape=(1, 2),
            steps=2,
            method=EntropyBoundRenoising(),
        )


class Cache:
    def __init__(self, layers):
        self.layers = layers

    def batch_select_indices(self, rows):
        for layer in self.layers:
            layer.keys = layer.keys[rows]


class Canvas:
    """What a canvas model of transformers offers, answering with what it was told."""

    def __init__(self):
        self.encoded, self.told = [], []

    def get_encoder(self):
        def encode(input_ids, attention_mask):
            self.encoded.append((input_ids, attention_mask))
            return SimpleNamespace(past_key_values=Cache([SimpleNamespace(keys=input_ids)]))

        return encode

    def __call__(self, past_key_values, decoder_input_ids, **further):
        self.told.append({"keys": past_key_values.layers[0].keys, "x": decoder_input_ids, **further})
        logits = torch.nn.functional.one_hot(decoder_input_ids, 7).float() * len(self.told)
        return SimpleNamespace(logits=logits)


def test_a_canvas_is_given_its_prompt_once_and_its_own_last_answer():
    model, prompt = Canvas(), torch.tensor([[1, 2], [3, 4], [5, 6]])
    mask = torch.tensor([[0, 1], [1, 1], [1, 1]])
    net = canvas_logits(model, prompt, attention_mask=mask, temperature=lambda sigma: 2 * sigma)
    x, everywhere = torch.tensor([[0, 1], [2, 3], [4, 5]]), torch.ones(3, 2, dtype=torch.bool)
    first = net(x, torch.full((3,), 4.0), everywhere, torch.arange(3)).view(3, 2, 7)
    assert torch.equal(first, torch.nn.functional.one_hot(x, 7) / 8)
    some = torch.tensor([2, 0])
    second = net(x[some], torch.tensor([4.0, 1.0]), everywhere[:2], some).view(2, 2, 7)
    assert torch.equal(second, 2 * torch.nn.functional.one_hot(x[some], 7) / torch.tensor([8.0, 2.0])[:, None, None])
    net(x, torch.full((3,), 0.5), everywhere, torch.arange(3))
    assert len(model.encoded) == 1
    assert "self_conditioning_logits" not in model.told[0]
    assert model.told[0]["decoder_attention_mask"].tolist() == [[False, True, True, True], [True] * 4, [True] * 4]
    assert torch.equal(model.told[1]["keys"], prompt[some])
    assert model.told[1]["decoder_attention_mask"].tolist() == [[True] * 4, [False, True, True, True]]
    assert torch.equal(model.told[1]["self_conditioning_logits"], first[some])
    assert model.told[1]["self_conditioning_mask"].tolist() == [
        False,
        True,
    ]  # at the noise it began with it begins anew
    assert torch.equal(model.told[2]["keys"], prompt)
    kept = torch.stack([second[1], first[1], second[0]])
    assert torch.equal(model.told[2]["self_conditioning_logits"], kept)
    assert model.told[2]["self_conditioning_mask"].tolist() == [True] * 3


def test_a_canvas_has_a_prompt_for_each_sequence():
    model, prompt = Canvas(), torch.tensor([[1, 2], [3, 4]])
    with pytest.raises(ValueError, match="prompt must be int64"):
        canvas_logits(model, prompt[0])
    with pytest.raises(ValueError, match=r"attention_mask must have the prompt's shape \(2, 2\)"):
        canvas_logits(model, prompt, attention_mask=torch.ones(2, 3))
    net, where = canvas_logits(model, prompt), torch.ones(1, 2, dtype=torch.bool)
    net(prompt[:1], torch.ones(1), where, torch.tensor([1]))
    assert "decoder_attention_mask" not in model.told[0]
    with pytest.raises(ValueError, match="was given 2 prompts, and is asked about sequence 2"):
        net(prompt[:1], torch.ones(1), where, torch.tensor([2]))
    assert math.isfinite(float(net(prompt, torch.ones(2), where.expand(2, 2), torch.arange(2)).sum()))


class OnItsOwn(Canvas):
    """With a head and a generation configuration, as `from_hf` looks for them."""

    def __init__(self, width=7, **config):
        super().__init__()
        self.width, self.generation_config = width, SimpleNamespace(**config)

    def get_output_embeddings(self):
        return SimpleNamespace(out_features=self.width)

    def __call__(  # type: ignore[override]
        self, input_ids=None, past_key_values=None, decoder_input_ids=None, self_conditioning_logits=None, **further
    ):
        return super().__call__(past_key_values, decoder_input_ids, **further)


def test_a_canvas_model_is_known_by_its_call_and_samples_by_tweedie():
    prompt = torch.tensor([[1, 2], [3, 4]])
    score, graph, noise, options = from_hf(OnItsOwn(), prompt=prompt, banned=[3])
    assert (graph, noise, options) == (Replacing(7), Proportional(), {"method": Tweedie(), "steps": 48})
    x = torch.tensor([[0, 1, 2], [4, 5, 6]])
    p = to_posterior(score, graph)(x, torch.ones(2, dtype=torch.float64))
    assert (p[..., 3] == 0).all()
    assert p.shape == (2, 3, 7)
    with pytest.raises(ValueError, match=r"a OnItsOwn writes after a prompt: prompt= \(B, P\) int64 ids"):
        from_hf(OnItsOwn())
    assert not rewrites_a_canvas(Canvas())


@pytest.mark.parametrize("stability", [None, 0, 2])
def test_a_canvas_model_s_own_decoder_is_its_configuration_s(stability):
    """What it says, and what it leaves out by the defaults; a temperature that falls from t_max to t_min."""
    config = {
        "max_denoising_steps": 4,
        "t_min": 0.5,
        "t_max": None,
        "confidence_threshold": 0.25,
        "stability_threshold": stability,
        "sampler_config": SimpleNamespace(entropy_bound=0.3),
        "_get_default_generation_params": lambda: {"t_max": 0.9, "t_min": 7.0},
    }
    model, prompt = OnItsOwn(**config), torch.tensor([[1, 2]])
    score, graph, noise, options = from_hf(model, prompt=prompt, own_decoder=True)
    confident = None if stability is None else 0.25
    assert options["method"] == EntropyBoundRenoising(0.3, confident, stability or 0)
    assert options["times"].tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert options["times"].dtype == torch.float64
    assert options["denoise"] is False
    x, sigma = torch.tensor([[0, 1]]), noise(torch.tensor([0.25], dtype=torch.float64))[0]
    got = to_posterior(score, graph)(x, sigma)
    right = (torch.nn.functional.one_hot(x, 7) / (0.5 + 0.4 * 0.25)).softmax(-1)
    torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-6)


def test_a_canvas_s_tokens_are_controlled_and_those_of_no_word_are_not_drawn():
    """By what the tokenizer knows and by what is banned besides; without any of it all are."""
    words = SimpleNamespace(
        get_vocab=lambda: {str(i): i for i in range(6)}, all_special_ids=[0, 4], cls_token_id=None, eos_token_id=4
    )
    x, prompt = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 2]])

    def drawn(*of, **how):
        score, graph, _, _ = from_hf(OnItsOwn(), *of, prompt=prompt, **how)
        p = to_posterior(score, graph)(x, torch.ones(1, dtype=torch.float64))
        return [state for state in range(7) if (p[..., state] > 0).all()]

    assert drawn() == list(range(7))
    assert drawn(banned=None) == list(range(7))
    assert drawn(words, banned=[3]) == [1, 2, 4, 5]
    assert drawn(words, controls=[lambda p, sequence, position: p * (torch.arange(7) > 2)]) == [3, 4, 5]


def test_what_a_configuration_says_goes_before_its_defaults():
    """And where it has none to fall back on, all is said."""
    config = {
        "max_denoising_steps": 2, "t_min": 0.4, "t_max": 0.8, "confidence_threshold": 0.01, "stability_threshold": 1,
        "sampler_config": SimpleNamespace(entropy_bound=0.2),
    }  # fmt: skip
    _, _, _, options = from_hf(OnItsOwn(**config), prompt=torch.tensor([[1, 2]]), own_decoder=True)
    assert options["method"] == EntropyBoundRenoising(0.2, 0.01, 1)
    assert options["times"].tolist() == [1.0, 0.5, 0.0]


def test_a_canvas_of_another_length_is_a_new_one():
    """It is not conditioned on an answer about fewer positions; the next one of its own length is."""
    model = Canvas()
    net = canvas_logits(model, torch.tensor([[1, 2]]))
    for length, sigma in ((2, 4.0), (3, 2.0), (3, 1.0)):
        x = torch.ones(1, length, dtype=torch.int64)
        net(x, torch.tensor([sigma]), x > 0, torch.arange(1))
    assert ["self_conditioning_logits" in told for told in model.told] == [False, False, True]
    assert model.told[2]["self_conditioning_logits"].shape == (1, 3, 7)
