from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from sedd_samplers import FirstHitting, Reverse, Tweedie, Unmasking, draw_lengths, sample
from sedd_samplers.autoregressive import sample_left_to_right
from sedd_samplers.randomness import draw_shared, philox, row_seeds, uniforms

# the known answers that Random123 is published with
KNOWN = [
    ([0] * 6, ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]),
    ([0xFFFFFFFF] * 6, ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0],
        ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"],
    ),
]


@pytest.mark.parametrize(("words", "answer"), KNOWN)
def test_philox_gives_the_known_answers(words, answer):
    *counter, k0, k1 = (torch.tensor([w]) for w in words)
    assert [f"{int(w):08x}" for w in philox(tuple(counter), (k0, k1))] == answer


def test_uniforms_are_uniform_and_uncorrelated():
    """A false alarm once in 10,000 seeds for each of the four statements."""
    position = torch.arange(100_000)
    fixed = torch.full_like(position, 7)
    along_position = uniforms(fixed, fixed, position)
    along_draw = uniforms(fixed, position, fixed)
    along_seed = uniforms(position, fixed, fixed)
    for u in (along_position, along_draw, along_seed):
        assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-4
    lagged = torch.corrcoef(torch.stack([along_position[1:], along_position[:-1]]))[0, 1]
    assert abs(float(lagged)) < 3.9 / len(position) ** 0.5


def test_negative_and_large_seeds_differ():
    seed = torch.tensor([0, -1, 2**62, 2**31, -(2**63), 2**32])
    zero = torch.zeros_like(seed)
    u = uniforms(seed, zero, zero)
    assert len(set(u.tolist())) == len(seed)
    assert ((u >= 0) & (u < 1)).all()


def wave(x):
    return torch.sin(1.7 * x.sum(1)[:, None, None] + torch.arange(x.shape[1])[:, None] + 2 * torch.arange(6))


KNOWN_SAMPLES = {
    Tweedie: [[1, 4, 4, 2, 1, 0, 4, 1], [2, 4, 2, 4, 2, 4, 4, 3]],
    Unmasking: [[4, 4, 1, 0, 2, 0, 4, 0], [2, 4, 2, 1, 2, 4, 3, 1]],
    FirstHitting: [[1, 1, 0, 1, 0, 1, 3, 2], [4, 2, 2, 0, 3, 4, 3, 3]],
}


@pytest.mark.parametrize("method", KNOWN_SAMPLES)
def test_a_seed_gives_the_sample_that_it_has_always_given(ref, method):
    """Across versions: a seed in a paper is worth what it gives later."""
    score = lambda x, sigma: wave(x) - torch.log(torch.expm1(sigma))[:, None, None] - 1.6  # noqa: E731
    x = sample(score, ref.StructuredAbsorbing(5), ref.LogLinear(), shape=(2, 8), steps=5, method=method(),
               seeds=[3, -7])  # fmt: skip
    assert x.tolist() == KNOWN_SAMPLES[method]


def test_a_seed_writes_what_it_has_always_written_from_left_to_right():
    logits = lambda x: torch.sin(1.7 * x.cumsum(1)[..., None] + 2 * torch.arange(6))  # noqa: E731
    x = sample_left_to_right(logits, shape=(2, 8), start=1, num_states=6, seeds=[3, -7])
    assert x.tolist() == [[3, 1, 3, 0, 4, 3, 4, 4], [0, 2, 2, 4, 3, 2, 1, 0]]


def test_lengths_follow_their_law_and_belong_to_their_seeds():
    """Chi-square of 20,000 lengths; a false alarm once in 10,000 seeds."""
    law = torch.tensor([0.0, 5.0, 0.0, 1.0, 2.0])
    lengths = draw_lengths(law, range(20_000))
    count = torch.bincount(lengths, minlength=6)
    assert count[[0, 1, 3]].sum() == 0
    assert stats.chisquare(count[[2, 4, 5]].numpy(), 20_000 * np.array([5, 1, 2]) / 8).pvalue > 1e-4
    assert torch.equal(draw_lengths(law, [7, 3]), lengths[[7, 3]])


@pytest.mark.parametrize(
    "law", [torch.zeros(3), torch.tensor([1.0, -1.0]), torch.ones(2, 2), torch.tensor([torch.inf])]
)
def test_a_law_of_lengths_must_be_one(law):
    with pytest.raises(ValueError, match="none negative and not all 0"):
        draw_lengths(law, [0])


def test_a_uniform_has_the_53_bits_that_philox_gives_it():
    position, draw, seed = torch.arange(64), torch.full((64,), (3 << 32) + 5), torch.full((64,), (7 << 32) + 11)
    five, three, zero, eleven, seven = (torch.full((64,), n) for n in (5, 3, 0, 11, 7))
    high, low, _, _ = philox((position, five, three, zero), (eleven, seven))
    expected = [((h << 21) | (w >> 11)) / 2**53 for h, w in zip(high.tolist(), low.tolist(), strict=True)]
    assert uniforms(seed, draw, position).tolist() == expected


@pytest.mark.parametrize("how", ["uniforms", "uniforms_at", "uniform_of"])
def test_only_draws_of_a_sequence_itself_count(ref, how):
    """Whatever others draw, its next number is the same; and after its own, another."""

    def fresh():
        free = torch.zeros(3, 2, dtype=torch.bool)
        return Reverse(
            lambda x, sigma: torch.zeros(*x.shape, 6),
            ref.StructuredAbsorbing(5),
            ref.LogLinear(),
            frozen=free,
            seeds=torch.tensor([4, 5, 6]),
        )

    def drawn(reverse, sequences):
        chosen = torch.tensor(sequences)
        some = torch.zeros(3, dtype=torch.bool).index_fill(0, chosen, True)
        if how == "uniforms":
            return reverse.uniforms(chosen, torch.zeros_like(chosen)).tolist()
        if how == "uniform_of":
            return reverse.uniform_of(some)[chosen].tolist()
        return reverse.uniforms_at(some[:, None].expand(3, 2))[chosen, 0].tolist()

    alone, others = fresh(), fresh()
    first, second = drawn(alone, [1]), drawn(alone, [1])
    assert first != second
    drawn(others, [0, 2])
    drawn(others, [2])
    assert drawn(others, [1]) == first
    drawn(others, [0])
    assert drawn(others, [1, 2])[0] == second[0]


def test_seeds_come_from_whoever_is_named():
    """From 0 to 2^63 - 1: all of them, or two sequences in a few thousand would be one."""
    drawn = torch.randint(2**63 - 1, (5,), generator=torch.Generator().manual_seed(4))
    assert torch.equal(row_seeds(None, torch.Generator().manual_seed(4), 5), drawn)
    torch.manual_seed(4)
    first = torch.randint(2**63 - 1, (5,))
    torch.manual_seed(4)
    assert torch.equal(row_seeds(None, None, 5), first)
    for given in ([3, -1], range(3, 5), torch.tensor([3, 4], dtype=torch.int32)):
        seeds = row_seeds(given, None, 2)
        assert seeds.dtype == torch.int64
        assert seeds.tolist() == list(given)
    for wrong in ([1.0, 2.0], [1, 2, 3], [[1, 2]], 7):
        with pytest.raises(ValueError, match="seeds must be 2 integers, one a sequence, got torch"):
            row_seeds(wrong, None, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="either a generator or seeds, not both"):
        row_seeds([1, 2], torch.Generator(), 2)


def test_one_law_is_drawn_from_at_each_uniform_number():
    law = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2.0**-53], dtype=torch.float64)
    assert draw_shared(law, uniform).tolist() == [1, 1, 3, 3, 4, 4]
    assert draw_shared(3 * law, uniform).tolist() == [1, 1, 3, 3, 4, 4]


def test_a_length_is_drawn_before_all_else():
    """By the number that no run comes to, so that it goes with no draw of the sequence."""
    seeds, zero = torch.arange(50), torch.zeros(50, dtype=torch.int64)
    law = torch.ones(1000)
    expected = (1000 * uniforms(seeds, zero - 1, zero)).long() + 1
    assert torch.equal(draw_lengths(law, seeds), expected)


def test_a_first_number_is_the_first_of_its_seed(ref):
    """Numbers are (seed, how many were drawn before, position), and where they are asked for does not matter."""
    seeds, shape = torch.tensor([11, 12]), (2, 3)
    reverse = Reverse(
        lambda x, sigma: torch.zeros(*x.shape, 6),
        ref.StructuredAbsorbing(5),
        ref.LogLinear(),
        frozen=torch.zeros(shape, dtype=torch.bool),
        seeds=seeds,
    )
    place = torch.arange(3).expand(shape)

    def at(count):
        return uniforms(seeds.repeat_interleave(3), torch.full((6,), count), place.flatten()).view(shape)

    everywhere = torch.ones(shape, dtype=torch.bool)
    assert torch.equal(reverse.uniforms_at(everywhere), at(0))
    assert torch.equal(reverse.uniform_of(everywhere[:, 0], torch.tensor([2, 1])), at(1)[[0, 1], [2, 1]])
    assert torch.equal(reverse.uniform_of(everywhere[:, 0]), at(2)[:, 0])
    assert torch.equal(reverse.uniforms(torch.tensor([1]), torch.tensor([2])), at(3)[1, 2:])
    some = reverse.positions(torch.tensor([[True, False, True], [False, False, False]]))
    assert torch.equal(reverse.uniforms_at(some.where, some), at(3)[0, [0, 2]])
