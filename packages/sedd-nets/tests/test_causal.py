"""The left-to-right network: what a row sees, what it costs to store, and what its config is taken for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sedd_nets import RADD, Causal, Documents, from_pretrained

SIZES: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2, "dropout": 0.0, "length": 12}


@pytest.fixture
def net(randomise_):
    net = Causal(11, **SIZES).double()
    randomise_(net)
    return net


@pytest.fixture
def x():
    return torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("changed", [0, 3, 6])
def test_a_row_depends_on_what_stands_before_it_and_on_its_own_token_alone(net, x, changed):
    other = x.clone()
    other[:, changed] = (other[:, changed] + 1) % 11
    before, after = net(x), net(other)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert ((before - after).abs().amax(-1) > 1e-6)[:, changed:].all()


def test_rows_where_asked_are_those_of_the_whole(net, x):
    where = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    torch.testing.assert_close(net(x, where=where), net(x)[where], rtol=0, atol=1e-12)


def test_documents_in_one_row_do_not_see_each_other(net, x):
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1]]).expand(3, -1)
    packed = net(x, documents=Documents(ids))
    apart = net(x[:, 3:])
    torch.testing.assert_close(packed[:, :3], net(x[:, :3]), rtol=0, atol=1e-12)
    # Rotary positions count from the row's start. Attention sees their differences alone, to the angles' float32.
    torch.testing.assert_close(packed[:, 3:], apart, rtol=0, atol=1e-6)


def test_it_comes_back_from_disk_as_what_it_is(net, x, tmp_path):
    net.float().save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert isinstance(again, Causal)
    assert torch.equal(again(x), net(x))
    with pytest.raises(ValueError, match=r"not RADD's: .* are Causal's"):
        RADD.from_pretrained(tmp_path)


def test_another_family_s_config_is_refused(tmp_path):
    RADD(11, **SIZES).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"not Causal's: .* are RADD's"):
        Causal.from_pretrained(tmp_path)


def test_noise_is_ignored_and_sizes_are_checked(net, x):
    assert torch.equal(net(x, torch.tensor([0.1, 2.0, 5.0])), net(x))
    assert torch.equal(net(x, None, x > 4), net(x, where=x > 4))
    assert net(x).shape == (3, 7, 11)
    with pytest.raises(ValueError, match="13 tokens; this network takes 1 to 12"):
        net(torch.zeros(1, 13, dtype=torch.int64))
    with pytest.raises(ValueError, match="Causal is not modulated and takes no condition"):
        net(x, condition=torch.tensor([0, 1, 2]))


def test_logits_are_those_of_a_linear_head(net, x):
    hidden = net.hidden(x, torch.zeros(3))
    linear = net.output_layer.linear
    torch.testing.assert_close(net(x), hidden @ linear.weight.T + linear.bias, rtol=0, atol=1e-12)
    net.train()
    assert torch.equal(net(x, dropout_seeds=torch.tensor([1, 2, 3])), net(x))  # dropout 0
