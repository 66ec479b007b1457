"""Blocks from left to right: LLaDA's decoding token for token, exact laws, ends of text."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from sedd_samplers import (
    ConfidenceUnmasking,
    FirstHitting,
    Tweedie,
    Unmasking,
    blockwise,
    clamped,
    confidence,
    generate,
    pad_prompts,
    threshold,
    token_grid,
)
from sedd_samplers.adapters import from_logits
from sedd_samplers.blocks import _bounds as block_bounds
from sedd_samplers.controls import top_k

MASK, V = 3, 9
GREEDY = ConfidenceUnmasking(confidence, controls=(top_k(1),))
ALARM = 1e-4


def network(seed):
    """Float64 logits that depend on every state of the sequence, masks included; none for the mask."""
    rng = torch.Generator().manual_seed(seed)
    weight, at = torch.randn(V, V, generator=rng, dtype=torch.float64), torch.randn(64, 64, generator=rng).double()

    def logits(x, sigma):
        L = x.shape[1]
        out = torch.einsum("bln,lk->bkn", weight[x], at[:L, :L]) / 3
        return out.index_fill(2, torch.tensor([MASK]), -math.inf)

    return logits


def llada(logits, prompt, *, length, block, steps):
    """Greedy low-confidence remasking in blocks, as the paper's algorithm and its published code have it.

    The canvas is the prompt and masks. A block takes its share of the steps; in each, every mask is given its likeliest
    token, and those of the block with the highest probability stay, as many as the plan says: an equal share of the
    block's masks for every step, what is left over to the first ones, one each.
    """
    P = prompt.shape[1]
    canvas = torch.cat([prompt, torch.full((len(prompt), length), MASK)], 1)
    per_block = steps // (length // block)
    for begin in range(P, P + length, block):
        plan = [block // per_block + (k < block % per_block) for k in range(per_block)]
        for count in plan:
            highest, token = logits(canvas, None).softmax(-1).max(-1)
            for b, (p, own) in enumerate(zip(highest.tolist(), canvas.tolist(), strict=True)):
                open_ = [i for i in range(begin, begin + block) if own[i] == MASK]
                best = sorted(open_, key=lambda i: -p[i])[:count]
                canvas[b, best] = token[b, best]
    return canvas


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("block", "steps"), [(24, 24), (8, 24), (8, 12), (8, 15), (12, 10), (4, 6)])
def test_generation_in_blocks_is_lladas_low_confidence_decoding(ref, block, steps, seed):
    graph, noise, logits = ref.StructuredAbsorbing(V - 1, MASK), ref.LogLinear(), network(seed)
    prompt = torch.randint(4, V, (3, 5), generator=torch.Generator().manual_seed(seed))
    wanted = llada(logits, prompt, length=24, block=block, steps=steps)
    x, given = pad_prompts(prompt.tolist(), 29)
    asked = []

    def counted(x, sigma):
        asked.append(len(x))
        return logits(x, sigma)

    out = generate(from_logits(counted, graph), graph, noise, x=x, given=given, block_size=block, origin=5,
                   times=token_grid(noise, block, steps // (24 // block)), method=GREEDY)  # fmt: skip
    assert torch.equal(out.x, wanted)
    assert out.lengths.tolist() == [29, 29, 29]
    assert sum(asked) == 3 * steps
    if block % (steps // (24 // block)) == 0:  # then equal steps in time are the same grid
        same = generate(from_logits(logits, graph), graph, noise, x=x, given=given, block_size=block, origin=5,
                        steps=steps // (24 // block), method=GREEDY)  # fmt: skip
        assert torch.equal(same.x, wanted)


@pytest.mark.parametrize("seed", range(3))
def test_blocks_that_are_absent_are_not_seen(ref, seed):
    """One token a step, the canvas cut behind the block: against a loop; and otherwise than with masks there."""
    graph, logits = ref.StructuredAbsorbing(V - 1, MASK), network(seed)
    x, given = pad_prompts([[4, 5], [6, 7]], 14)
    wanted = torch.where(given, x, MASK)
    for end in (4, 8, 12, 14):  # the first block holds the prompt and two free positions
        for b in range(2):
            while (wanted[b, :end] == MASK).any():
                p = logits(wanted[b : b + 1, :end], None)[0].softmax(-1)
                i = int(p.amax(-1).masked_fill(wanted[b, :end] != MASK, -1).argmax())
                wanted[b, i] = p[i].argmax()
    out = {
        growing: generate(from_logits(logits, graph), graph, ref.LogLinear(), x=x, given=given, block_size=4,
                          growing=growing, method=GREEDY).x
        for growing in (True, False)
    }  # fmt: skip
    assert torch.equal(out[True], wanted)
    assert not torch.equal(out[False], wanted)


@pytest.mark.parametrize("method", [Tweedie(), Unmasking(), FirstHitting()], ids=["tweedie", "unmasking", "first"])
def test_the_law_is_the_product_of_the_blocks(ref, method):
    """An exact score of each block given those before it, enough steps: the joint law by chi-square, 20,000 samples.

    First hitting is exact on any grid: two steps to a block.
    """
    p0 = ref.random_data(3, 4, 4, 3)
    graph, score = ref.StructuredAbsorbing(3), ref.ExactScore(p0, ref.StructuredAbsorbing(3).Q)
    first = p0.sum((2, 3))[:3, :3]
    short = torch.zeros(4, 4, dtype=torch.float64)
    short[:3, :3] = first
    of_first = ref.ExactScore(short, graph.Q)

    def growing(x, sigma):
        return of_first(x, sigma) if x.shape[1] == 2 else score(x, sigma)

    x = torch.zeros(20_000, 4, dtype=torch.int64)
    noise = ref.LogLinear()
    out = generate(growing, graph, noise, x=x, given=x > 0, block_size=2, growing=True,
                   steps=2 if method == FirstHitting() else 96, method=method,
                   generator=torch.Generator().manual_seed(0))  # fmt: skip
    assert ref.chi_square(out.x, p0) > ALARM


END, PAD = 5, 0


def counting(x, sigma):
    """A network sure of position + 6, and of the end at a place that the first token tells."""
    place = torch.arange(x.shape[1])
    token = torch.where(place == x[:, :1] * 3, END, 6 + place % 3)
    return torch.nn.functional.one_hot(token, V).double() * 50


@pytest.mark.parametrize("growing", [False, True])
def test_an_end_token_ends_its_sequence_alone(ref, growing):
    graph = ref.StructuredAbsorbing(V - 1, MASK)
    x, given = pad_prompts([[1], [2], [4], [8]], 16)  # ends at 3, 6, 12 and never
    asked, states = [], []

    def counted(x, sigma):
        asked.append(x[:, 0].tolist())
        return counting(x, sigma)

    run = blockwise(from_logits(counted, graph), graph, ref.LogLinear(), x=x, given=given, block_size=4, end_id=END,
                    pad_id=PAD, growing=growing, method=GREEDY)  # fmt: skip
    for state in run:
        states.append(state)
    text = states[-1]
    assert text.lengths.tolist() == [4, 7, 13, 16]
    for b, first in enumerate([1, 2, 4, 8]):
        n = int(text.lengths[b])
        right = [first, *[END if i == 3 * first else 6 + i % 3 for i in range(1, n)]]
        assert text.x[b].tolist() == right + [PAD] * (16 - n)
    assert not (text.x == MASK).any()
    assert [len(a) for a in asked] == [4] * 3 + [3] * 4 + [2] * 4 + [2] * 4  # the first block has one given
    assert [state.lengths.tolist() for state in states[:6]][4:] == [[16] * 4, [4, 16, 16, 16]]


def test_a_sequence_that_is_finished_keeps_no_masks_at_any_later_state(ref):
    graph = ref.StructuredAbsorbing(V - 1, MASK)
    x, given = pad_prompts([[1], [2], [4], [8]], 16)
    for state in blockwise(from_logits(counting, graph), graph, ref.LogLinear(), x=x, given=given, block_size=4,
                           end_id=END, method=GREEDY):  # fmt: skip
        over = state.lengths < 16
        assert not (state.x[over] == MASK).any()
        assert (state.x[over][torch.arange(16) >= state.lengths[over, None]] == END).all()


def test_until_is_asked_at_the_start_and_what_it_ends_is_padded(ref):
    graph, asked = ref.StructuredAbsorbing(V - 1, MASK), []
    x, given = pad_prompts([[1], [2], [4]], 12)

    def until(state):
        asked.append(state.step)
        return (state.x[:, 0] == 1) | ((state.x[:, 0] == 2) & (state.step > 0))

    def network(x, sigma):
        assert (x[:, 0] != 1).all()
        return counting(x, sigma)

    out = generate(from_logits(network, graph), graph, ref.LogLinear(), x=x, given=given, block_size=4, until=until,
                   pad_id=PAD, method=GREEDY, denoise=False)  # fmt: skip
    assert asked == [0, 4, 8, 12]
    assert out.lengths.tolist() == [0, 4, 12]
    assert out.x[0].tolist() == [1] + [PAD] * 11
    assert out.x[1, 4:].tolist() == [PAD] * 8
    assert not (out.x == MASK).any()
    done = generate(from_logits(network, graph), graph, ref.LogLinear(), x=x[:1], given=given[:1], block_size=4,
                    until=until, pad_id=PAD)  # fmt: skip
    assert done.x.tolist() == [[1] + [PAD] * 11]


def test_an_end_token_in_the_prompt_ends_nothing(ref):
    graph = ref.StructuredAbsorbing(V - 1, MASK)
    x, given = pad_prompts([[8, END, 7]], 8)
    out = generate(from_logits(counting, graph), graph, ref.LogLinear(), x=x, given=given, block_size=4, end_id=END,
                   method=GREEDY)  # fmt: skip
    assert out.lengths.tolist() == [8]
    assert out.x[0].tolist() == [8, END, 7, 6, 7, 8, 6, 7]


def test_a_sequence_does_not_depend_on_its_batch(ref):
    graph, logits = ref.StructuredAbsorbing(V - 1, MASK), network(1)
    prompts = [[4], [5, 6, 7], [8, 8, 4, 4, 5]]
    x, given = pad_prompts(prompts, 20)
    options: dict[str, Any] = {
        "block_size": 6,
        "end_id": END,
        "method": ConfidenceUnmasking(confidence, rule=threshold(0.5)),
    }
    score = from_logits(logits, graph)
    together = generate(score, graph, ref.LogLinear(), x=x, given=given, seeds=[1, 2, 3], **options)
    for b in range(3):
        alone = generate(
            score, graph, ref.LogLinear(), x=x[b : b + 1], given=given[b : b + 1], seeds=[b + 1], **options
        )
        assert torch.equal(alone.x[0], together.x[b])
        assert alone.lengths[0] == together.lengths[b]


def test_graphs_that_noise_tokens_generate_blocks_where_that_is_said(ref):
    graph = ref.StructuredUniform(5)
    x = torch.zeros(2, 8, dtype=torch.int64)

    def score(x, sigma):
        assert x.shape[1] in (4, 8)
        return torch.zeros(*x.shape, 5)

    run = blockwise(score, graph, ref.Geometric(), x=x, given=x > 0, block_size=4, steps=5, growing=True,
                    conditioning=clamped, seeds=[0, 1])  # fmt: skip
    states = [state.x for state in run]
    assert len(states) == 13
    assert torch.equal(states[6][:, :4], states[-1][:, :4])
    assert torch.equal(states[6][:, 4:], states[0][:, 4:])
    with pytest.raises(ValueError, match="say conditioning=clamped"):
        generate(score, graph, ref.Geometric(), x=x, given=x > 0, block_size=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size must be a positive integer, got 0"),
        ({"block_size": 4, "origin": 9}, r"origin must be a position of 0\.\.8, got 9"),
        ({"block_size": 4, "end_id": MASK}, "end_id must be a token of 0..8 and not the mask, got 3"),
        ({"block_size": 4, "pad_id": 9}, "pad_id must be a token of 0..8 and not the mask, got 9"),
        ({"block_size": 4, "until": lambda state: state}, "say what pads them, pad_id="),
        ({"block_size": 4, "until": lambda state: state, "pad_id": 0}, r"until must return bool of shape \(2,\)"),
        ({"block_size": 4, "method": Tweedie}, r"method must be a step such as Tweedie\(\)"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_before_the_first_step(ref, options, message):
    graph, x = ref.StructuredAbsorbing(V - 1, MASK), torch.zeros(2, 8, dtype=torch.int64)

    def never(x, sigma):
        raise AssertionError

    with pytest.raises(ValueError, match=message):
        generate(never, graph, ref.LogLinear(), x=x, given=x > 0, **options)


def test_what_goes_wrong_says_in_which_block(ref):
    graph, x = ref.StructuredAbsorbing(V - 1, MASK), torch.zeros(2, 8, dtype=torch.int64)

    def breaks(x, sigma):
        return torch.full((*x.shape, V), torch.nan if (x != MASK).any() else 0.0)

    with pytest.raises(ValueError, match=r"step 2 of 3 of block 0, from t = 0.5 .*returned NaN"):
        generate(breaks, graph, ref.LogLinear(), x=x, given=x > 0, block_size=4, steps=2, method=GREEDY)


@pytest.mark.parametrize(("tokens", "steps"), [(8, 3), (10, 4), (32, 20), (7, 7), (100, 1)])
def test_a_token_grid_has_lladas_numbers(ref, tokens, steps):
    noise = ref.LogLinear()
    masks = (tokens * -torch.expm1(-noise(token_grid(noise, tokens, steps))[0])).round()
    masks[0] = tokens  # the first step begins with all
    assert (-masks.diff()).tolist() == [tokens // steps + (k < tokens % steps) for k in range(steps)]
    with pytest.raises(ValueError, match=r"steps must lie in 1\.\.4"):
        token_grid(noise, 4, 5)


@pytest.mark.parametrize(
    ("length", "size", "origin", "ends"),
    [(8, 3, 2, [0, 2, 5, 8]), (8, 4, 0, [0, 4, 8]), (7, 4, 0, [0, 4, 7]), (4, 9, 0, [0, 4]), (6, 2, 6, [0, 6])],
)
def test_blocks_cover_the_text_and_what_stands_before_the_origin_is_one(length, size, origin, ends):
    assert block_bounds(length, size, origin) == list(itertools.pairwise(ends))


TAKEN_AND_REFUSED: dict[str, tuple[list[Any], list[Any], str]] = {
    "block_size": ([1, 8, 100], [0, -1, True, 4.0], "block_size must be a positive integer"),
    "origin": ([0, 8], [-1, 9, True, 1.0], r"origin must be a position of 0\.\.8"),
    "end_id": ([0, V - 1], [-1, V, MASK], "end_id must be a token of 0..8 and not the mask"),
    "pad_id": ([0, V - 1], [-1, V, MASK], "pad_id must be a token of 0..8 and not the mask"),
}


@pytest.mark.parametrize("which", TAKEN_AND_REFUSED)
def test_numbers_are_taken_up_to_their_ends_and_refused_beyond(ref, which):
    graph, x = ref.StructuredAbsorbing(V - 1, MASK), torch.zeros(1, 8, dtype=torch.int64)
    taken, refused, message = TAKEN_AND_REFUSED[which]

    def first(value):
        how: dict[str, Any] = {"block_size": 4, which: value}
        return next(blockwise(from_logits(network(0), graph), graph, ref.LogLinear(), x=x, given=x > 0, **how))

    for value in taken:
        assert first(value).step == 0
    for value in refused:
        with pytest.raises(ValueError, match=message):
            first(value)


def test_a_block_takes_as_many_steps_as_positions_unless_told_otherwise(ref):
    """And every state says where it stands: the block's time, all steps of all blocks."""
    graph, x = ref.StructuredAbsorbing(V - 1, MASK), torch.zeros(2, 7, dtype=torch.int64)
    how: dict[str, Any] = {"x": x, "given": x > 0, "block_size": 3, "seeds": [0, 1]}
    run = list(blockwise(from_logits(network(0), graph), graph, ref.LogLinear(), **how))
    assert [state.step for state in run] == list(range(13))
    assert {state.steps for state in run} == {12}
    assert [state.t for state in run[:5]] == pytest.approx([1.0, *(1 - k * (1 - 1e-5) / 3 for k in (1, 2, 3)), 0.0])
    assert [state.t for state in run[5:9]] == pytest.approx([state.t for state in run[1:5]])
    open_ = list(blockwise(from_logits(network(0), graph), graph, ref.LogLinear(), denoise=False, t_min=0.2, **how))
    assert [open_[-1].step, open_[-1].steps, open_[-1].t] == [9, 9, 0.2]
    assert all(state.log_prob is None for state in run)


def test_a_prompt_behind_an_end_stands(ref):
    """What is given there is neither padded nor an end."""
    graph = ref.StructuredAbsorbing(V - 1, MASK)
    x = torch.tensor([[1, 0, 0, 0, 0, 7, 5, 0]])
    given = torch.tensor([[True, False, False, False, False, True, True, False]])
    out = generate(from_logits(counting, graph), graph, ref.LogLinear(), x=x, given=given, block_size=4, end_id=END,
                   pad_id=2, method=GREEDY)  # fmt: skip
    assert out.x.tolist() == [[1, 7, 8, 5, 2, 7, 5, 2]]
    assert out.lengths.tolist() == [4]
    assert out.log_prob is None
