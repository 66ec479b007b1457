"""Keys and values kept: the same tokens where that is exact, Fast-dLLM's where it is not, and what goes through."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sedd_samplers import (
    ConfidenceUnmasking,
    Tweedie,
    Unmasking,
    confidence,
    generate,
    infill,
    pad_prompts,
    prefix_cached,
    threshold,
)
from sedd_samplers.adapters import from_logits
from sedd_samplers.autoregressive import sample_left_to_right
from sedd_samplers.controls import top_k

MASK, V = 3, 9
GREEDY = ConfidenceUnmasking(confidence, controls=(top_k(1),))


class Kept:
    """What two layers of averages know of the positions before."""

    def __init__(self):
        self.layers = [torch.empty(0, 0, 6).double()] * 2

    def add(self, layer, new):
        old = self.layers[layer]
        self.layers[layer] = new if not old.numel() else torch.cat([old, new], 1)
        return self.layers[layer]

    def crop(self, count):
        assert count < 0
        self.layers = [a[:, :count] for a in self.layers]

    def batch_select_indices(self, indices):
        self.layers = [a[indices] for a in self.layers]


class Network:
    """Two layers in which a position sees a weighted mean over its block and those before it, or over all."""

    def __init__(self, block_size=None, seed=0):
        rng = torch.Generator().manual_seed(seed)
        self.embedding = torch.randn(V, 6, generator=rng, dtype=torch.float64)
        self.out = torch.randn(6, V, generator=rng, dtype=torch.float64) * 2
        self.block_size, self.seen, self.calls = block_size, 0, 0

    def __call__(self, x, sigma=None, *, cache=None):
        cache = Kept() if cache is None else cache
        self.calls += 1
        self.seen += x.numel()
        past = cache.layers[0].shape[1]
        place = torch.arange(past + x.shape[1])
        e = self.embedding[x] + torch.sin(1.7 * place[past:, None] * torch.arange(1, 7))
        whole = cache.add(0, e)
        weight = 1 / (1 + (place[past:, None] - place).abs()).double()
        if self.block_size is not None:
            weight = weight * (place[past:, None] // self.block_size >= place // self.block_size)
        weight = weight / weight.sum(-1, keepdim=True)
        h = torch.tanh(e + 2 * weight @ whole)
        logits = (h + 2 * weight @ cache.add(1, h)) @ self.out
        return logits.index_fill(2, torch.tensor([MASK]), -math.inf)


def plain(network):
    return lambda x, sigma: network(x, sigma)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "method",
    [GREEDY, Tweedie(), Unmasking(), ConfidenceUnmasking(confidence, rule=threshold(0.6))],
    ids=["greedy", "tweedie", "unmasking", "threshold"],
)
def test_an_exact_cache_changes_no_token(ref, method, seed):
    """Sequences that end at different places leave the call, and their keys and values with them."""
    graph, network = ref.StructuredAbsorbing(V - 1, MASK), Network(4, seed)
    x, given = pad_prompts([[1], [2, 4], [], [8, 7, 6, 1, 1]], 24)
    options: dict[str, Any] = {"x": x, "given": given, "block_size": 4, "growing": True, "method": method, "steps": 6,
               "seeds": range(4), "pad_id": 0,
               "until": lambda state: state.step >= torch.tensor([21, 7, 35, 99])}  # fmt: skip
    without = generate(from_logits(plain(network), graph), graph, ref.LogLinear(), **options)
    asked, network.seen = network.seen, 0
    kept = from_logits(prefix_cached(network, Kept, block_size=4), graph)
    out = generate(kept, graph, ref.LogLinear(), **options)
    assert torch.equal(out.x, without.x)
    assert torch.equal(out.lengths, without.lengths)
    assert network.seen < asked
    assert without.lengths.tolist() == [12, 4, 20, 24]


@pytest.mark.parametrize(("K", "n"), [(2, 4), (6, 4), (8, 2)])
def test_what_goes_through_the_network_is_the_share_that_is_stated(ref, K, n):
    graph, network, S = ref.StructuredAbsorbing(V - 1, MASK), Network(4), 4
    x = torch.zeros(3, K * S, dtype=torch.int64)
    options: dict[str, Any] = {"x": x, "given": x > 0, "block_size": S, "growing": True, "method": GREEDY, "steps": n}
    generate(from_logits(plain(network), graph), graph, ref.LogLinear(), **options)
    asked, network.seen = network.seen, 0
    assert asked == 3 * n * S * K * (K + 1) // 2
    generate(from_logits(prefix_cached(network, Kept, block_size=S), graph), graph, ref.LogLinear(), **options)
    once = 2 * S + 2 * S + S  # three calls about one sequence, which show that nothing is changed
    assert (network.seen - once) / asked == pytest.approx(2 * (n + 1 - 1 / K) / (n * (K + 1)))


def test_a_canvas_of_masks_behind_the_block_is_no_hindrance(ref):
    """All of it goes through; still no token changes, as no position sees it."""
    graph, network = ref.StructuredAbsorbing(V - 1, MASK), Network(4)
    x = torch.zeros(2, 16, dtype=torch.int64)
    options: dict[str, Any] = {"x": x, "given": x > 0, "block_size": 4, "method": GREEDY}
    without = generate(from_logits(plain(network), graph), graph, ref.LogLinear(), **options)
    kept = from_logits(prefix_cached(network, Kept, block_size=4), graph)
    assert torch.equal(generate(kept, graph, ref.LogLinear(), **options).x, without.x)


def test_infilling_in_any_order_is_right_too(ref):
    """Contents are compared: whatever has changed goes through again."""
    graph, network = ref.StructuredAbsorbing(V - 1, MASK), Network(4)
    x, given = torch.ones(3, 16, dtype=torch.int64), torch.arange(16).expand(3, -1) < 6
    options: dict[str, Any] = {"x": x, "given": given, "steps": 20, "seeds": range(3)}
    without = infill(from_logits(plain(network), graph), graph, ref.LogLinear(), **options)
    kept = from_logits(prefix_cached(network, Kept, block_size=4), graph)
    assert torch.equal(infill(kept, graph, ref.LogLinear(), **options), without)


def test_left_to_right_takes_one_position_a_token():
    network = Network(1)
    options: dict[str, Any] = {"shape": (4, 20), "start": 0, "num_states": V, "seeds": range(4)}
    without = sample_left_to_right(lambda x: network(x), **options)
    asked, network.seen = network.seen, 0
    out = sample_left_to_right(prefix_cached(network, Kept, block_size=1), **options)
    assert torch.equal(out, without)
    assert (asked, network.seen) == (4 * 20 * 21 // 2, 4 * 20 + 2 + 2 + 1)


def test_a_network_that_looks_further_is_found_out(ref):
    graph, x = ref.StructuredAbsorbing(V - 1, MASK), torch.zeros(2, 16, dtype=torch.int64)
    for network, block in ((Network(None), 4), (Network(4), 3), (Network(4), 2)):
        kept = from_logits(prefix_cached(network, Kept, block_size=block), graph)
        with pytest.raises(ValueError, match=r"looks beyond its block.*approximate=True"):
            generate(kept, graph, ref.LogLinear(), x=x, given=x > 0, block_size=block, growing=True, method=GREEDY)


def fast_dllm(network, prompt, *, length, block):
    """Greedy decoding with a prefix cache, one token a step, as published.

    At the beginning of a block the whole canvas goes through, masks behind it included; its keys and values of what
    stands before the block are kept until it is finished, and what goes through is the block and all behind it.
    """
    P = prompt.shape[1]
    canvas = torch.cat([prompt, torch.full((len(prompt), length), MASK)], 1)
    for begin in range(P, P + length, block):
        cache = Kept()
        p = network(canvas, cache=cache).softmax(-1)[:, begin:]
        for step in range(block):
            if step:
                cache.crop(begin - canvas.shape[1])
                p = network(canvas[:, begin:], cache=cache).softmax(-1)
            for b in range(len(canvas)):
                best = [float(p[b, i].max()) if canvas[b, begin + i] == MASK else -1.0 for i in range(block)]
                i = best.index(max(best))
                canvas[b, begin + i] = p[b, i].argmax()
    return canvas


@pytest.mark.parametrize("seed", range(4))
def test_the_approximation_is_fast_dllms_prefix_cache(ref, seed):
    graph, network = ref.StructuredAbsorbing(V - 1, MASK), Network(None, seed)
    prompt = torch.randint(4, V, (3, 5), generator=torch.Generator().manual_seed(seed))
    wanted = fast_dllm(network, prompt, length=24, block=8)
    x, given = pad_prompts(prompt.tolist(), 29)
    options: dict[str, Any] = {"x": x, "given": given, "block_size": 8, "origin": 5, "method": GREEDY}
    network.seen = 0
    kept = from_logits(prefix_cached(network, Kept, block_size=8, origin=5, approximate=True), graph)
    assert torch.equal(generate(kept, graph, ref.LogLinear(), **options).x, wanted)
    assert network.seen == 3 * sum(29 + 7 * (29 - begin) for begin in (5, 13, 21))


def test_a_cache_is_asked_for_what_it_can_do():
    with pytest.raises(ValueError, match="a model with a parameter `cache`, and this one has none"):
        prefix_cached(lambda x, sigma: x, Kept, block_size=4)
    with pytest.raises(ValueError, match="block_size must be a positive integer, got 0"):
        prefix_cached(Network(4), Kept, block_size=0)
