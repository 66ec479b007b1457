"""Text in blocks with keys and values kept, by networks of ours and of transformers: the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sedd_graphs import Absorbing, LogLinear
from sedd_nets import BD3LM, RADD, Causal, KeyValueCache
from sedd_samplers import ConfidenceUnmasking, Tweedie, confidence, generate, pad_prompts, prefix_cached, threshold
from sedd_samplers.adapters import from_logits
from sedd_samplers.autoregressive import continue_left_to_right
from sedd_samplers.controls import top_k

transformers = pytest.importorskip("transformers")

V, S = 30, 8
SIZES: dict[str, Any] = {"width": 32, "depth": 2, "heads": 2, "dropout": 0.0, "length": 48}
GREEDY = ConfidenceUnmasking(confidence, controls=(top_k(1),))
METHODS = {"greedy": GREEDY, "tweedie": Tweedie(), "threshold": ConfidenceUnmasking(rule=threshold(0.5))}


def lively(net):
    """Every parameter random, in evaluation mode."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=0.3)
    return net.eval()


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_block_diffusion_writes_the_same_with_a_cache(method):
    net = lively(BD3LM(V + 1, **SIZES, cond_dim=8, block_size=S))
    graph, noise = Absorbing(V), LogLinear()
    x, given = pad_prompts([[1, 2, 3], [], [4] * 11, [5]], 48)
    options: dict[str, Any] = {"x": x, "given": given, "block_size": S, "growing": True, "steps": 5, "end_id": 7}
    options |= {"method": method, "seeds": range(4)}
    without = generate(net, graph, noise, **options)
    out = generate(prefix_cached(net, KeyValueCache, block_size=S), graph, noise, **options)
    assert torch.equal(out.x, without.x)
    assert torch.equal(out.lengths, without.lengths)


def test_a_left_to_right_network_writes_the_same_with_a_cache():
    net = lively(Causal(V + 1, **SIZES))
    x, given = pad_prompts([[1, 2, 3], [], [4] * 11], 40)
    options: dict[str, Any] = {"x": x, "given": given, "start": V, "num_states": V + 1, "seeds": range(3)}
    without = continue_left_to_right(net, **options)
    assert torch.equal(continue_left_to_right(prefix_cached(net, KeyValueCache, block_size=1), **options), without)


def test_a_network_that_looks_both_ways_is_refused_or_approximate():
    net = lively(RADD(V + 1, **SIZES))
    graph, noise = Absorbing(V), LogLinear()
    x = torch.zeros(2, 48, dtype=torch.int64)
    options: dict[str, Any] = {"x": x, "given": x > 0, "block_size": S, "steps": 5, "method": GREEDY}
    with pytest.raises(ValueError, match="looks beyond its block"):
        generate(prefix_cached(net, KeyValueCache, block_size=S), graph, noise, **options)
    kept = prefix_cached(net, KeyValueCache, block_size=S, approximate=True)
    assert not (generate(kept, graph, noise, **options).x == V).any()


def llama(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(
        vocab_size=V + 1, **sizes, num_key_value_heads=1, initializer_range=0.3, **options
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_block_causal_model_of_transformers_writes_the_same_with_its_own_cache(method):
    """A decoder whose mask lets a position see its block: what block diffusion is trained from."""
    model = llama()

    def network(x, sigma, cache=None):
        cache = transformers.DynamicCache() if cache is None else cache
        past = cache.get_seq_length()
        place = torch.arange(past + x.shape[1])
        sees = place[past:, None] // S >= place // S
        mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
        out = model(x, past_key_values=cache, position_ids=place[None, past:], attention_mask=mask[None, None])
        return out.logits

    graph, noise = Absorbing(V), LogLinear()
    x, given = pad_prompts([[1, 2, 3], [], [4] * 11, [5]], 48)
    options: dict[str, Any] = {"x": x, "given": given, "block_size": S, "growing": True, "steps": 5, "end_id": 7}
    options |= {"method": method, "seeds": range(4)}
    without = generate(from_logits(lambda x, sigma: network(x, sigma), graph), graph, noise, **options)
    kept = prefix_cached(network, transformers.DynamicCache, block_size=S)
    out = generate(from_logits(kept, graph), graph, noise, **options)
    assert torch.equal(out.x, without.x)
    assert torch.equal(out.lengths, without.lengths)


def test_a_causal_model_of_transformers_writes_its_own_greedy_text_with_its_cache():
    model = llama(eos_token_id=None, bos_token_id=None, pad_token_id=0)
    prompt = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    wanted = model.generate(prompt, max_new_tokens=20, do_sample=False)

    def network(x, cache):
        return model(x, past_key_values=cache).logits

    x, given = pad_prompts(prompt[:, 1:].tolist(), 24)
    out = continue_left_to_right(prefix_cached(network, transformers.DynamicCache, block_size=1), x=x, given=given,
                                 start=prompt[:, 0], num_states=V + 1, controls=[top_k(1)])  # fmt: skip
    assert torch.equal(out, wanted[:, 1:])
