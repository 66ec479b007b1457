"""What is reported of held-out text, by hand: units, ratios, chunks and their noise, the integral's limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sedd_graphs import Absorbing, LogLinear
from sedd_objectives import Estimate
from sedd_train import evaluation
from sedd_train.evaluation import Evaluation, bounds, by_noise_level, evaluate, measure
from sedd_train.objectives import ScoreEntropy
from torch import nn

NET = nn.Linear(1, 1)  # whose weights say which device is meant


class Recorded(ScoreEntropy):
    """An objective whose bound of a sequence is its first token, and that keeps what it was given."""

    given: list[Any]

    def __init__(self):
        super().__init__(Absorbing(5), LogLinear())
        object.__setattr__(self, "given", [])

    def bound(self, net, x0, *, num_times, generator, lengths=None):
        self.given.append((x0.clone(), num_times, generator.initial_seed(), lengths))
        return x0[:, 0].double()


def test_units():
    found = Evaluation(nats_per_token=math.log(8), standard_error=0.0, characters_per_token=4.0)
    assert found.bits_per_character == pytest.approx(3 / 4)
    assert found.perplexity == pytest.approx(8)
    assert math.isfinite(Evaluation(1e6, 0.0, 1.0).perplexity)


def test_a_mean_over_whole_blocks_is_of_tokens():
    """Sequences of 4 tokens with 2, 4 and 12 nats: 1.5 nats a token; their standard deviation is 1.3229."""
    blocks = torch.tensor([[2, 0, 0, 0], [4, 0, 0, 0], [12, 0, 0, 0]])
    found = measure(NET, Recorded(), blocks, characters_per_token=2.0)
    assert found.nats_per_token == pytest.approx(1.5)
    assert found.standard_error == pytest.approx(torch.tensor([0.5, 1.0, 3.0]).std().item() / math.sqrt(3))
    assert found.characters_per_token == 2.0
    alone = measure(NET, Recorded(), blocks[:1], characters_per_token=2.0)
    assert alone.nats_per_token == 0.5
    assert math.isnan(alone.standard_error)


def test_padded_rows_weigh_as_much_as_they_have_text():
    """All nats over all tokens of text, 9 / 6, not the mean of the rows' ratios, (3 + 1.2) / 2; its error by hand.

    A ratio r = sum a / sum b has residuals a - r b; divided by the mean of b their spread is that of r.
    """
    blocks, lengths = torch.tensor([[3, 0, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]]), torch.tensor([1, 5])
    found = measure(NET, Recorded(), blocks, characters_per_token=1.0, lengths=lengths)
    assert found.nats_per_token == pytest.approx(9 / 6)
    residuals = torch.tensor([3 - 1.5 * 1, 6 - 1.5 * 5]).double() / 3
    assert found.standard_error == pytest.approx(residuals.std().item() / math.sqrt(2))


def test_every_chunk_has_its_own_noise_and_its_own_rows():
    blocks, lengths = torch.arange(10).reshape(10, 1).repeat(1, 3), torch.arange(1, 11).clamp(max=3)
    seen = Recorded()
    values = bounds(NET, seen, blocks, num_times=5, seed=7, chunk=4, lengths=lengths)
    torch.testing.assert_close(values, torch.arange(10).double() / 3)
    assert [len(x0) for x0, *_ in seen.given] == [4, 4, 2]
    assert {num_times for _, num_times, _, _ in seen.given} == {5}
    assert torch.cat([given for *_, given in seen.given]).tolist() == lengths.tolist()
    seeds = [number for _, _, number, _ in seen.given]
    assert len(set(seeds)) == 3
    again, other = Recorded(), Recorded()
    bounds(NET, again, blocks, seed=7, chunk=4)
    bounds(NET, other, blocks, seed=8, chunk=4)
    assert [number for _, _, number, _ in again.given] == seeds
    assert not {number for _, _, number, _ in other.given} & set(seeds)


def test_evaluate_by_times_is_the_mean_of_bounds_of_the_same_numbers(monkeypatch):
    """Times, noise and chunks are those of the objective's bound; its errors are added by their squares."""
    asked: list[Any] = []

    def bound(net, graph, noise, x0, *, num_times, generator):
        asked.append((num_times, generator.initial_seed()))
        return Estimate(x0[:, 0].double(), torch.full((len(x0),), 0.5))

    monkeypatch.setitem(evaluation.ESTIMATORS, "times", bound)
    blocks, again = torch.arange(10).reshape(5, 2), Recorded()
    options: dict[str, Any] = {"num_times": 3, "seed": 7, "chunk": 2}
    found = evaluate(NET, Absorbing(10), LogLinear(), blocks, characters_per_token=2.0, estimator="times", **options)
    values = bounds(NET, again, blocks, **options)
    assert found.nats_per_token == pytest.approx(float(values.mean()))
    assert found.standard_error == pytest.approx(float(values.std()) / math.sqrt(5))
    assert found.measurement_error == pytest.approx(math.sqrt(5) * 0.5 / 10)
    assert found.estimator == "times"
    assert asked == [given[1:3] for given in again.given]


@pytest.mark.parametrize("lengths", [None, torch.tensor([2, 4, 6])])
def test_the_integral_s_limits_and_where_its_times_lie(lengths, monkeypatch):
    """A loss of t in [t_min, 1] at t_min = .5: K exact parts of the integral, (1 - t_min^2) / 2 = .375 in all.

    The time of an interval is uniform in it, so that the loss 1 gives (1 - t_min) / K exactly.
    """
    drawn = []

    def loss(self, net, x0, t, *, generator, lengths=None):
        drawn.append(t)
        return torch.ones(len(x0)) * x0.shape[1]

    monkeypatch.setattr(ScoreEntropy, "loss", loss)
    blocks = torch.zeros(3, 6, dtype=torch.int64)
    found = by_noise_level(NET, Absorbing(5), LogLinear(), blocks, num_levels=4, t_min=0.5, lengths=lengths)
    each = 0.5 / 4 * (1 if lengths is None else 6 / 4)  # nats a token of text
    assert found.nats_per_token.tolist() == pytest.approx([each] * 4)
    assert found.t.tolist() == pytest.approx([0.5625, 0.6875, 0.8125, 0.9375])
    for level, t in enumerate(drawn):
        assert ((t >= 0.5 + level / 8) & (t <= 0.5 + (level + 1) / 8)).all()
        assert len(set(t.tolist())) == 3


def test_levels_differ_from_the_bound_s_noise_and_by_chunk(monkeypatch):
    numbers = []

    def loss(self, net, x0, t, *, generator, lengths=None):
        numbers.append(generator.initial_seed())
        return torch.ones(len(x0))

    monkeypatch.setattr(ScoreEntropy, "loss", loss)
    blocks = torch.zeros(6, 4, dtype=torch.int64)
    by_noise_level(NET, Absorbing(5), LogLinear(), blocks, num_levels=2, chunk=2)
    seen = Recorded()
    bounds(NET, seen, blocks, chunk=2)
    assert len({*numbers, *(number for _, _, number, _ in seen.given)}) == 6


def test_a_bound_that_is_nan_is_said(monkeypatch):
    class Broken(Recorded):
        def bound(self, net, x0, **given):
            raise ValueError("the bound is NaN")

    with pytest.raises(ValueError, match="the bound is NaN"):
        bounds(NET, Broken(), torch.zeros(3, 2, dtype=torch.int64))


def test_ranks_share_the_chunks(monkeypatch):
    """Of three ranks each measures a third of the chunks, and the sum over ranks is every sequence once."""
    blocks, parts = torch.arange(1, 14).reshape(13, 1).repeat(1, 2), []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist, "all_reduce", lambda values: parts.append(values.clone()))
    monkeypatch.setattr(evaluation, "_raise_together", lambda failure: None)
    for rank in range(3):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        bounds(NET, Recorded(), blocks, chunk=2)
    assert torch.stack(parts).sum(0).tolist() == blocks[:, 0].tolist()
    assert [int((part > 0).sum()) for part in parts] == [5, 4, 4]
