"""Rows: coinciding states, sums, and exact draws, of states however rare."""

from __future__ import annotations

import pytest
import torch
from sedd_graphs import Row, Uniform


def test_of_keeps_the_last_of_coinciding_states():
    base = torch.zeros(4, dtype=torch.float64)
    a, b, c = torch.tensor([0, 1, 1, 3]), torch.tensor([0, 1, 2, 3]), torch.tensor([1, 1, 1, 3])
    row = Row.of(base, (a, base + 1), (b, base + 2), (c, base + 3), num_states=5)
    expected = torch.tensor([[2, 3, 0, 0, 0], [0, 3, 0, 0, 0], [0, 3, 2, 0, 0], [0, 0, 0, 3, 0]]).double()
    torch.testing.assert_close(row.dense(), expected)
    assert (row.index.sort().values.diff() > 0).all()


@pytest.mark.parametrize("num_states", [1, 2, 3, 4, 7, 20])
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_distinct_agrees_with_assignment_in_turn(num_states, count):
    generator = torch.Generator().manual_seed(count)
    base = torch.rand(200, generator=generator, dtype=torch.float64)
    index = torch.randint(num_states, (200, count), generator=generator)
    value = torch.rand(200, count, generator=generator, dtype=torch.float64)
    row = Row.distinct(base, index, value, num_states)
    expected = base[:, None].repeat(1, num_states)
    for k in range(count):
        expected[torch.arange(200), index[:, k]] = value[:, k]
    torch.testing.assert_close(row.dense(), expected)
    torch.testing.assert_close(row.sum(), expected.sum(-1))
    state = index[:, 0]
    torch.testing.assert_close(row.at(state), expected[torch.arange(200), state])
    assert (row.index.sort().values.diff() > 0).all()
    assert int(row.index.min()) >= 0
    assert int(row.index.max()) < num_states


@pytest.mark.parametrize(("num_states", "count"), [(3, 2), (4, 3), (5, 4), (7, 6)])
def test_distinct_takes_every_coincidence(num_states, count):
    """All ways in which states can coincide, with hardly a state left that is not named."""
    index = torch.cartesian_prod(*[torch.arange(num_states)] * count)
    index = index[:: max(1, len(index) // 4000)]
    value = (torch.arange(count) + 1.0).expand(index.shape)
    row = Row.distinct(torch.zeros(len(index)), index, value, num_states)
    expected = torch.zeros(len(index), num_states)
    for k in range(count):
        expected[torch.arange(len(index)), index[:, k]] = value[:, k]
    torch.testing.assert_close(row.dense(), expected, rtol=0, atol=0)
    assert (row.index.sort().values.diff() > 0).all()
    assert int(row.index.max()) < num_states


def test_what_has_no_chance_is_never_drawn():
    """Not even by the least and the greatest number that a uniform draw can give."""
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    for values, certain in (([0.0, 0.7, 0.0], 1), ([0.0, 0.0, 3.0], 2), ([0.1, 0.0, 0.0], 0)):
        assert (Row.full(torch.tensor(values, dtype=torch.float64)).quantile(ends) == certain).all()
    row = Row(torch.tensor(1.0).double(), torch.tensor([0, 3]), torch.zeros(2, dtype=torch.float64), 5)
    assert row.quantile(ends).tolist() == [1, 4]


def test_quantiles_cover_every_state_in_proportion():
    base, value = torch.tensor([0.1, 0.0]).double(), torch.tensor([[0.5, 0.2], [0.0, 4.0]]).double()
    row = Row(base, torch.tensor([[3, 0], [2, 1]]), value, 5)
    u = (torch.arange(1000).double() + 0.5) / 1000
    counts = torch.stack([r.bincount(minlength=5) for r in row.quantile(u.expand(2, -1))])
    assert counts.tolist() == [[200, 100, 100, 500, 100], [0, 1000, 0, 0, 0]]


def test_rare_states_are_drawn():
    row = Row(torch.tensor(1e-12).double(), torch.tensor([4]), torch.tensor([1.0]).double(), 10)
    u = torch.tensor([1 - 8.5e-12, 1 - 5e-13, 1 - 1e-16], dtype=torch.float64)
    assert row.quantile(u).tolist() == [0, 9, 9]


def test_rounding_draws_no_state_that_is_none():
    """Here the greatest uniform number, less the named state's share, is two whole shares of the two others."""
    base, value = torch.tensor([0.7453761605775864, 0.22765563659688126], dtype=torch.float64)
    greatest = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    assert Row(base, torch.tensor([0]), value[None], 3).quantile(greatest).tolist() == [2]


MANY = 2**40  # states: a float32 uniform number tells 2^24 of them apart


@pytest.mark.parametrize(
    "draw",
    [
        lambda random: Row(torch.ones(500), torch.zeros(500, 1).long(), torch.ones(500, 1), MANY).sample(
            generator=random
        ),
        lambda random: Uniform(MANY).sample_prior((500,), generator=random),
        lambda random: Uniform(MANY).sample(torch.zeros(500).long(), torch.tensor(50.0), generator=random),
    ],
    ids=["a row", "a prior", "a transition"],
)
def test_draws_reach_every_state(draw):
    """Odd states come as often as even ones: within 6 standard deviations, a false alarm in 5e8."""
    drawn = draw(torch.Generator().manual_seed(0))
    assert abs(int((drawn % 2).sum()) - 250) < 6 * 125**0.5
    assert abs(int((drawn < MANY // 2).sum()) - 250) < 6 * 125**0.5


def test_values_below_zero_count_as_zero():
    """The stay probability -.05 of an over-normalised score: the others come at .5 / 1.05 and .55 / 1.05, not .45."""
    u = (torch.arange(21_000).double() + 0.5) / 21_000
    for values in ([-0.05, 0.5, 0.55], [0.5, -0.05, 0.55], [0.5, 0.55, -0.05]):
        drawn = Row.full(torch.tensor(values, dtype=torch.float64)).quantile(u)
        expected = (torch.tensor(values) > 0) * torch.tensor(values) / 1.05 * 21_000
        torch.testing.assert_close(drawn.bincount(minlength=3).float(), expected, rtol=0, atol=1.5)
    row = Row(torch.tensor(-0.5), torch.tensor([3]), torch.tensor([0.25]), 5)
    assert (row.quantile(u) == 3).all()
    row = Row(torch.tensor(-0.1), torch.tensor([3, 0]), torch.tensor([0.25, 0.75]), 5)  # the base takes nothing away
    assert row.quantile(u).bincount(minlength=5).tolist() == [15_750, 0, 0, 5_250, 0]


def test_the_algebra_of_rows_is_that_of_their_values():
    """Of every pair of a sparse row, one that names all and one that names none but one: all N values, exactly."""
    base = torch.tensor([2.0, -1.0], dtype=torch.float64)
    rows = [
        Row(base, torch.tensor([[3, 0], [1, 2]]), torch.tensor([[0.5, 4.0], [3.0, 0.25]]).double(), 5),
        Row(base + 1, torch.tensor([[4], [1]]), torch.tensor([[8.0], [-3.0]]).double(), 5),
        Row.full(torch.arange(10.0).double().reshape(2, 5) - 4),
    ]
    state, value, factor = torch.tensor([3, 4]), torch.tensor([7.0, -6.0]).double(), torch.tensor([0.5, 3.0]).double()
    for row in rows:
        full = row.dense()
        assert row.shape == (2,)
        assert torch.equal(row.map(lambda v: v * v - 1).dense(), full * full - 1)
        assert torch.equal(row.scale(factor).dense(), full * factor[:, None])
        assert torch.equal(row.put(state, value).dense(), full.scatter(-1, state[:, None], value[:, None]))
        assert torch.equal(row.at(state), full.gather(-1, state[:, None])[:, 0])
        torch.testing.assert_close(row.sum(), full.sum(-1), rtol=1e-15, atol=1e-15)
        assert row.to(torch.float32).value.dtype == row.to(torch.float32).base.dtype == torch.float32
        for other in rows:
            both = row.combine(other, lambda a, b: a - 2 * b)
            assert torch.equal(both.dense(), full - 2 * other.dense())
            assert (both.base == 0).all() or both.index.shape[-1] < 5
    assert (rows[2].map(lambda v: v + 1).base == 0).all()  # no state is left for it
