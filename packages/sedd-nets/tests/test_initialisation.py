"""The start with local attention: where heads look, that nothing else moves, and what it is for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from sedd_nets import MDLM, RADD, SEDD, init_local_attention, init_unigram_bias
from sedd_nets.fast.memory_efficient import rotated
from sedd_nets.initialisation import offset

SIZES: dict[str, Any] = {"width": 128, "depth": 3, "heads": 4, "dropout": 0.0, "length": 64}


def networks():
    torch.manual_seed(0)
    return [SEDD(40, cond_dim=16, **SIZES, scale_by_sigma=True), RADD(40, **SIZES), MDLM(40, cond_dim=16, **SIZES)]


@pytest.mark.parametrize("net", networks(), ids=["sedd", "radd", "mdlm"])
def test_every_head_of_every_block_looks_first_at_its_offset(net):
    net = copy.deepcopy(net)
    init_local_attention(net)
    x = torch.randint(40, (8, 64), generator=torch.Generator().manual_seed(1))
    c, h, (cos, sin) = net.conditioning(x, torch.ones(8), None), net.vocab_embed(x), net.rotary_emb(64)
    for b, block in enumerate(net.blocks):
        shift, scale = block.adaLN_modulation(c).chunk(6, -1)[:2] if c is not None else (None, None)
        qkv = block.attn_qkv(block.norm1(h, shift, scale)).unflatten(-1, (3, 4, -1))
        q, k, _ = rotated(qkv, cos, sin)
        weights = torch.einsum("blhd,bmhd->bhlm", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
        for head in range(4):
            inside = torch.arange(16, 48)
            at_offset = weights[:, head, inside, inside + offset(b, head)].mean()
            assert at_offset > 0.5, (b, head, float(at_offset))  # all alike would be 1 / 64
        h = block(h, c, cos, sin, net.attention)


def test_scores_fall_with_the_distance_from_the_offset_as_the_formula_says():
    """Without the fresh weights' own part: score(m, n) = sharpness mean_i cos(omega_i (n - m - delta))."""
    net = networks()[0]
    for block in net.blocks:
        torch.nn.init.zeros_(block.attn_qkv.weight)
    init_local_attention(net, sharpness=50.0)
    x = torch.randint(40, (1, 64), generator=torch.Generator().manual_seed(1))
    c, h, (cos, sin) = net.conditioning(x, torch.ones(1), None), net.vocab_embed(x), net.rotary_emb(64)
    distance = torch.arange(64)[None, :] - torch.arange(64)[:, None]
    for b, block in enumerate(net.blocks):
        shift, scale = block.adaLN_modulation(c).chunk(6, -1)[:2]
        q, k, _ = rotated(block.attn_qkv(block.norm1(h, shift, scale)).unflatten(-1, (3, 4, -1)), cos, sin)
        scores = torch.einsum("lhd,mhd->hlm", q[0], k[0]) / q.shape[-1] ** 0.5
        for head in range(4):
            angle = (distance - offset(b, head))[..., None] * net.rotary_emb.inv_freq
            torch.testing.assert_close(scores[head], 50 * angle.cos().mean(-1), atol=1e-3, rtol=0)


def test_offsets_go_to_both_sides_and_farther_in_later_blocks():
    assert [offset(0, h) for h in range(6)] == [-1, 1, -2, 2, -3, 3]
    assert [offset(2, h) for h in range(6)] == [-1, 1, -4, 4, -7, 7]


def test_only_queries_keys_shift_and_gates_change():
    net = networks()[0]
    before = copy.deepcopy(net.state_dict())
    init_local_attention(net)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"blocks.{b}.{part}" for b in range(3) for part in ("attn_qkv.weight", "adaLN_modulation.bias")}
    assert torch.equal(net.blocks[0].attn_qkv.weight[256:], before["blocks.0.attn_qkv.weight"][256:])


def test_a_neighbour_reaches_the_hidden_vector_and_a_far_token_does_not():
    """The start's purpose: what a position is told of its neighbours is not drowned in an average over all tokens."""
    net = networks()[0]
    x = torch.randint(40, (16, 64), generator=torch.Generator().manual_seed(1))

    def influence(distance: int) -> float:
        other = x.clone()
        other[:, 30 + distance] = (other[:, 30 + distance] + 1) % 40
        difference = net.hidden(x, torch.ones(16)) - net.hidden(other, torch.ones(16))
        return float(difference[:, 30].norm(dim=-1).mean())

    with torch.no_grad():
        assert influence(1) == influence(20) == 0  # the gates are shut
        init_local_attention(net)
        assert min(influence(-1), influence(1)) > 20 * influence(20)


@pytest.mark.parametrize("net", networks(), ids=["sedd", "radd", "mdlm"])
def test_a_network_that_begins_with_frequencies_gives_their_score(net):
    """At a mask: log p(y) - log(e^sigma - 1)."""
    net = copy.deepcopy(net)
    counts = torch.randint(1, 1000, (40,), generator=torch.Generator().manual_seed(2))
    counts[39] = 0
    init_unigram_bias(net, counts)
    sigma = torch.tensor([0.1, 3.0])
    log_score = net(torch.full((2, 5), 39), sigma)[..., :39]
    expected = torch.log((counts[:39] + 0.5) / (counts.sum() + 20)) - sigma.expm1().log()[:, None, None]
    # the families that normalise over tokens alone leave out the half occurrence of the mask
    torch.testing.assert_close(log_score, expected.expand_as(log_score), rtol=0, atol=0.5 / float(counts.sum()) + 1e-5)


@pytest.mark.parametrize("counts", [torch.ones(39), -torch.ones(40), torch.zeros(40), torch.full((40,), torch.inf)])
def test_counts_must_be_numbers_of_occurrences(counts):
    with pytest.raises(ValueError, match="counts must"):
        init_unigram_bias(networks()[0], counts)


def test_sharpness_must_be_a_positive_number():
    with pytest.raises(ValueError, match="sharpness must be a positive number, got 0"):
        init_local_attention(networks()[0], sharpness=0)


def test_norms_without_modulation_shift_by_one():
    """A network that is not modulated has the constant in its norms' biases, of attention alone; its gates are open."""
    net = networks()[1]
    before = copy.deepcopy(net.state_dict())
    init_local_attention(net)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"blocks.{b}.{part}" for b in range(3) for part in ("attn_qkv.weight", "norm1.bias")}
    assert all((block.norm1.bias == 1).all() for block in net.blocks)


def test_shifts_and_gates_are_one_and_scales_are_not_touched():
    net = networks()[0]
    init_local_attention(net)
    for block in net.blocks:
        shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation.bias.chunk(6)
        assert all((part == 1).all() for part in (shift1, gate1, gate2))
        assert all((part == 0).all() for part in (scale1, shift2, scale2))


def test_sharpness_unless_told_otherwise():
    told, untold = networks()[1], networks()[1]
    init_local_attention(told, sharpness=200.0)
    init_local_attention(untold)
    assert all(torch.equal(a, b) for a, b in zip(told.parameters(), untold.parameters(), strict=True))


def test_half_an_occurrence_is_added_to_each():
    net = networks()[1]
    counts = torch.zeros(40)
    counts[3] = 19
    init_unigram_bias(net, counts)
    expected = torch.full((40,), 0.5).index_fill(0, torch.tensor([3]), 19.5) / 39 * 39
    torch.testing.assert_close(net.output_layer.linear.bias.detach(), expected.log())
    for wrong in (torch.full((40,), torch.nan), torch.ones(40).index_fill(0, torch.tensor([5]), -0.5)):
        with pytest.raises(ValueError, match="none negative or infinite, not all 0"):
            init_unigram_bias(net, wrong)


@pytest.mark.parametrize("wrong", [-1.0, float("inf"), float("nan")])
def test_sharpness_must_be_finite(wrong):
    with pytest.raises(ValueError, match="sharpness must be a positive number"):
        init_local_attention(networks()[0], sharpness=wrong)
