"""A network bound to the sequences of a run: rows come and go, and each is what it would be alone."""

import pytest
import torch
from sedd_nets import LabelCondition, bind

LENGTHS = [5, 7, 3]
LABELS = torch.tensor([0, -1, 4])


@pytest.fixture
def net(make_sedd, randomise_):
    net = make_sedd().double()
    net.condition_embed = LabelCondition(5, 8).double()
    randomise_(net.condition_embed)
    return net


@pytest.mark.parametrize("rows", [None, [0, 1, 2], [2, 0], [1]])
def test_each_row_is_the_one_alone_whatever_stands_behind_it(net, wide, rows):
    x, sigma = wide
    score = bind(net, lengths=LENGTHS, condition=LABELS)
    chosen = torch.tensor([0, 1, 2] if rows is None else rows)
    where = torch.arange(7) < torch.tensor(LENGTHS)[chosen, None]
    together = score(x[chosen], sigma[chosen], rows=None if rows is None else chosen)
    for row, i in zip(together, chosen.tolist(), strict=True):
        size = LENGTHS[i]
        alone = net(x[i : i + 1, :size], sigma[i : i + 1], condition=LABELS[i : i + 1])
        torch.testing.assert_close(row[:size], alone[0], atol=1e-6, rtol=1e-6)  # rotary angles are float32
    other = torch.where(where, x[chosen], (x[chosen] + 1) % 11)
    found = score(other, sigma[chosen], where, chosen)
    torch.testing.assert_close(found, together[where], atol=1e-12, rtol=1e-12)


def test_without_lengths_it_is_the_network(net, wide):
    x, sigma = wide
    assert torch.equal(bind(net)(x, sigma), net(x, sigma))
    assert torch.equal(bind(net)(x[:2], sigma[:2], rows=torch.tensor([0, 1])), net(x[:2], sigma[:2]))
    assert torch.equal(bind(net, condition=LABELS)(x, sigma), net(x, sigma, condition=LABELS))


def test_what_does_not_fit_is_named(net, wide):
    x, sigma = wide
    with pytest.raises(ValueError, match=r"different numbers of sequences: \[2, 3\]"):
        bind(net, lengths=[5, 7], condition=LABELS)
    for _ in range(2):
        with pytest.raises(ValueError, match="x has 2 rows, and 3 sequences were bound"):
            bind(net, lengths=LENGTHS)(x[:2], sigma[:2])
    with pytest.raises(ValueError, match=r"lengths must be in 1\.\.4"):
        bind(net, lengths=LENGTHS)(x[:, :4], sigma)


def test_labels_may_be_a_list_and_no_number_alone(net, wide):
    x, sigma = wide
    assert torch.equal(bind(net, condition=LABELS.tolist())(x, sigma), bind(net, condition=LABELS)(x, sigma))
    for name in ("lengths", "condition"):
        with pytest.raises(ValueError, match=f"{name} must have one entry for each sequence, got 3 alone"):
            bind(net, **{name: 3})  # type: ignore[arg-type]


def test_it_says_of_how_many_sequences_it_is(net):
    """Samplers hand rows on, and nothing else would notice a label too many."""
    assert bind(net, lengths=LENGTHS).sequences == bind(net, condition=LABELS).sequences == 3  # type: ignore[attr-defined]
    assert not hasattr(bind(net), "sequences")
