from __future__ import annotations

import itertools

import pytest
import torch
from sedd_objectives import autoregressive_loss
from torch import nn

TOKENS, START = 3, 3


class Markov(nn.Module):
    """A causal model: logits of the next token by a table of the last two."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(2 * torch.randn(TOKENS + 1, TOKENS + 1, TOKENS, generator=generator).double())

    def forward(self, x):
        before = torch.cat([torch.full_like(x[:, :1], START), x[:, :-1]], -1)
        return self.table[before, x]


@pytest.fixture
def sequences():
    return torch.tensor(list(itertools.product(range(TOKENS), repeat=4)))


def test_is_the_likelihood_of_whole_sequences(sequences):
    """Over all sequences of four the probabilities sum to 1, and each is the product of its conditionals."""
    model = Markov()
    loss = autoregressive_loss(model, sequences, start=START)
    assert float(torch.exp(-loss).sum().detach()) == pytest.approx(1, abs=1e-12)
    p = model.table.detach().softmax(-1)
    for x, value in zip(sequences.tolist(), loss.tolist(), strict=True):
        path = [START, START, *x]
        want = sum(-float(p[path[i], path[i + 1], path[i + 2]].log()) for i in range(4))
        assert value == pytest.approx(want, abs=1e-12)


def test_a_start_for_each_sequence_leaves_out_the_first_token(sequences):
    model = Markov()
    rest = autoregressive_loss(model, sequences[:, 1:], start=sequences[:, 0])
    assert float(torch.exp(-rest).sum().detach()) == pytest.approx(TOKENS, abs=1e-12)


def test_weights_multiply_tokens_and_padding_counts_nothing(sequences, generator, monkeypatch):
    model = Markov()
    weight = torch.rand(sequences.shape, generator=generator, dtype=torch.float64)
    weight[:, 2:] = 0
    weight[0] = 0
    logits = model(torch.cat([torch.full_like(sequences[:, :1], START), sequences[:, :-1]], -1)).log_softmax(-1)
    want = -(weight * logits.gather(-1, sequences[..., None])[..., 0]).sum(-1)
    (slope,) = torch.autograd.grad(want.sum(), model.table)
    for size in (1 << 22, 10):  # in chunks of three rows too
        monkeypatch.setattr("sedd_objectives.fast.rows.CHUNK_ELEMENTS", size)
        found = autoregressive_loss(model, sequences, start=START, weight=weight)
        torch.testing.assert_close(found, want)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), model.table)[0], slope)
    short = autoregressive_loss(model, sequences[:, :2], start=START)
    torch.testing.assert_close(autoregressive_loss(model, sequences, start=START, weight=weight > 0)[1:], short[1:])


def test_bfloat16_is_computed_in_float32_under_autocast(sequences):
    logits = torch.randn(81, 4, TOKENS, generator=torch.Generator().manual_seed(0)).bfloat16()
    plain = autoregressive_loss(lambda x: logits.float(), sequences, start=START)
    with torch.autocast("cpu", torch.bfloat16):
        found = autoregressive_loss(lambda x: logits, sequences, start=START)
    assert found.dtype == torch.float32
    assert torch.equal(found, plain)


def test_one_nan_is_its_own_sequence_s_where_the_caller_counts_them():
    logits = torch.zeros(2, 4, 5)
    logits[1, 2] = torch.nan
    x = torch.zeros(2, 4, dtype=torch.int64)
    assert autoregressive_loss(lambda x: logits, x, start=0, refuse_nan=False).isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, dtype=torch.int64)}, r"x must be integers of shape \(B, L\)"),
        ({"x": torch.zeros(2, 4)}, r"x must be integers of shape \(B, L\), got torch.float32"),
        ({"x": torch.full((2, 4), 5)}, "x must lie in"),
        ({"start": torch.zeros(3, dtype=torch.int64)}, r"start must be one token or have shape \(B,\)"),
        ({"weight": torch.zeros(2)}, "weight is 0 at every position"),
        ({"weight": torch.ones(4)}, "weight must have a shape that is a leading part"),
        ({"model": lambda x: torch.zeros(2, 3, 5)}, "the model must return logits of shape"),
        ({"model": lambda x: torch.full((2, 4, 5), torch.nan)}, "logits are NaN"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"model": lambda x: torch.zeros(2, 4, 5), "x": torch.zeros(2, 4).long(), "start": 0} | change
    with pytest.raises(ValueError, match=message):
        autoregressive_loss(arguments.pop("model"), arguments.pop("x"), **arguments)
