"""Dropout by seeds: the choices are a hash, of good statistics, of (seed, place, position, channel) alone."""

import math
from functools import partial
from itertools import combinations

import pytest
import torch
from sedd_nets import BD3LM, RADD, SEDD, UDLM, Causal
from sedd_nets.fast.dropout import dropped, place_words
from sedd_nets.fast.memory_efficient import add_gated

ScaledSEDD = partial(SEDD, scale_by_sigma=True)
OneBlock = partial(BD3LM, block_size=12)
SEEDS = torch.tensor([0, 1, 2, -1, 2**40, 2**62 + 12345])
SIZES = {"width": 16, "depth": 2, "heads": 2, "length": 12, "dropout": 0.3}
P, LIMIT = 0.3, 5.0
"""A count is allowed 5 standard deviations: one in 1.7 million if the choices were independent."""


def chosen(seeds, places, length, width, probability):
    """(B, places, L, D) bool."""
    return torch.stack([dropped(words, probability) for words in place_words(seeds, places, length, width)], dim=1)


@pytest.fixture(scope="module")
def choices():
    """(6 seeds, 4 places, L, D) bool, dropped with probability 0.3: 4.9 million."""
    return chosen(SEEDS, 4, 512, 400, P)


@pytest.fixture(scope="module")
def centred(choices):
    return (choices.float() - P) / math.sqrt(P * (1 - P))


def mixed(a):
    a = (a ^ (a >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    a = (a ^ (a >> 27)) * 0x94D049BB133111EB % 2**64
    return a ^ (a >> 31)


def hashed(seed, place, position, channel):
    """The 32 bits of an element, written down with Python's whole numbers."""
    key = mixed((mixed(seed % 2**64) + mixed(place + 1)) % 2**64)
    bits = (mixed((key + position) % 2**64) ^ mixed((key - 1 - channel) % 2**64)) >> 32
    bits = bits * 0x85EBCA6B % 2**32
    return (bits ^ (bits >> 13)) * 0xC2B2AE35 % 2**32


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.9])
def test_hash_is_what_whole_numbers_give(probability):
    """Bit by bit, so that a stored run can be repeated with every later version and on every device."""
    for place, words in enumerate(place_words(SEEDS, 3, 5, 7)):
        found = dropped(words, probability)
        for row, position, channel in torch.cartesian_prod(*map(torch.arange, found.shape)).tolist():
            bits = hashed(SEEDS[row].item(), place, position, channel)
            # The lowest as a signed number are the lowest fractions.
            assert found[row, position, channel].item() is ((bits + 2**31) % 2**32 < round(probability * 2**32))


def test_an_elements_choice_depends_on_its_own_key_and_place_alone(choices):
    for row, place in ((0, 0), (3, 2), (5, 3)):
        small = chosen(SEEDS[row : row + 1], 9, 37, 21, P)
        assert torch.equal(small[0, place], choices[row, place, :37, :21])


def test_share_is_the_probability(choices, centred):
    """In all, in each sequence and place, each position and each channel."""
    assert abs(centred.sum()) / math.sqrt(choices.numel()) < LIMIT
    for axes in ((2, 3), (0, 1, 3), (0, 1, 2)):
        sums = centred.sum(axes) / math.sqrt(choices.numel() / centred.sum(axes).numel())
        assert sums.abs().max() < LIMIT + 1  # 936 of them: one in half a million


def test_shares_scatter_as_independent_choices_do(centred):
    """The squared sums over positions, over channels, over blocks of both: chi-square with n degrees of freedom."""
    for sums in (centred.sum(2), centred.sum(3), centred.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).sum((3, 5))):
        squares = sums.double().square() * sums.numel() / centred.numel()
        assert abs(squares.sum().item() - squares.numel()) < LIMIT * math.sqrt(2 * squares.numel())


def test_no_correlation(centred):
    """Between rows of unlike and like seeds, places, neighbouring positions and channels, corners of rectangles."""
    pairs = [(centred[a], centred[b]) for a, b in combinations(range(len(SEEDS)), 2)]
    pairs += [(centred[:, a], centred[:, b]) for a, b in combinations(range(4), 2)]
    for lag in (1, 2, 3, 4, 8, 16, 64, 128, 256):
        pairs.append((centred[..., lag:], centred[..., :-lag]))
        pairs.append((centred[..., lag:, :], centred[..., :-lag, :]))
        vertical = centred[..., lag:, :] * centred[..., :-lag, :]
        pairs += [(vertical[..., width:], vertical[..., :-width]) for width in (1, 2, 3, 4, 8)]
    for a, b in pairs:
        assert abs((a * b).sum(dtype=torch.float64)) < LIMIT * math.sqrt(a.numel())


@pytest.mark.parametrize("axis", [2, 3])
def test_patterns_of_eight_neighbours_are_equally_frequent(axis):
    """Chi-square with 255 degrees of freedom; 390 is passed once in 10 million."""
    halves = chosen(SEEDS, 4, 512, 400, 0.5).movedim(axis, -1)
    patterns = halves.reshape(-1, 8).long() @ 2 ** torch.arange(8)
    counts = torch.bincount(patterns, minlength=256).double()
    expected = counts.sum() / 256
    assert ((counts - expected).square() / expected).sum() < 390


@pytest.fixture(params=[ScaledSEDD, RADD, UDLM, Causal, OneBlock])
def net(request, randomise_):
    net = request.param(11, **SIZES).train()
    randomise_(net)
    return net


def test_a_row_is_the_same_in_every_batch(net, wide):
    x, sigma = wide
    net, seeds = net.double(), SEEDS[:3]
    together = net(x, sigma, dropout_seeds=seeds)
    order = torch.tensor([2, 0, 1])
    shuffled = net(x[order], sigma[order], dropout_seeds=seeds[order])
    torch.testing.assert_close(shuffled, together[order], atol=1e-12, rtol=1e-9)
    for i in range(3):
        alone = net(x[i : i + 1], sigma[i : i + 1], dropout_seeds=seeds[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], atol=1e-12, rtol=1e-9)


def test_seeds_alone_decide(net, batch):
    x, sigma = batch
    first = net(x, sigma, dropout_seeds=SEEDS[:3])
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(net(x, sigma, dropout_seeds=SEEDS[:3]), first)
    assert torch.equal(torch.get_rng_state(), state)
    other = net(x, sigma, dropout_seeds=SEEDS[[0, 1, 5]])
    assert torch.equal(other[:2], first[:2])
    assert not torch.allclose(other[2], first[2], atol=1e-3)
    assert not torch.equal(net(x, sigma), first)


def test_no_dropout_no_influence(net, batch):
    x, sigma = batch
    net.eval()
    assert torch.equal(net(x, sigma, dropout_seeds=SEEDS[:3]), net(x, sigma))


def test_the_rows_of_where(net, batch):
    x, sigma = batch
    where = x > 4
    full = net(x, sigma, dropout_seeds=SEEDS[:3])
    torch.testing.assert_close(net(x, sigma, where=where, dropout_seeds=SEEDS[:3]), full[where], atol=1e-5, rtol=1e-5)


def test_every_branch_has_its_own_choices(make_sedd):
    """A network of branches that are 1 everywhere: what is added tells what was dropped where."""
    seen = []

    def look(h, branch, gate, dropout, words):
        seen.append(dropped(words, dropout))
        return add_gated(h, branch, gate, dropout, words)

    net = make_sedd(width=64, dropout=0.3, depth=3).train()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sedd_nets.layers.add_gated", look)
        net.hidden(torch.zeros(1, 12, dtype=torch.int64), torch.ones(1), dropout_seeds=SEEDS[:1])
    assert len(seen) == 6
    for a, b in combinations(seen, 2):
        assert not torch.equal(a, b)


def run(net, hidden, x, sigma):
    net.zero_grad()
    out = hidden(x, sigma, dropout_seeds=SEEDS[:3])
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]


def test_recomputed_activations(net, batch):
    kept = run(net, net.hidden, *batch)
    net.checkpoint_activations = True
    for ours, theirs in zip(run(net, net.hidden, *batch), kept, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_on_a_gpu(choices):
    assert torch.equal(chosen(SEEDS.cuda(), 4, 512, 400, P).cpu(), choices)


@pytest.mark.parametrize("seeds", [torch.zeros(2, dtype=torch.int64), torch.zeros(3), torch.tensor(5)])
def test_other_seeds_are_refused(net, batch, seeds):
    with pytest.raises(ValueError, match=r"dropout_seeds must be int64 of shape \(3,\)"):
        net(*batch, dropout_seeds=seeds)
