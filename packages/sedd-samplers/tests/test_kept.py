"""What `cached` and `prefix_cached` ask, keep and refuse, call by call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sedd_samplers import cached, prefix_cached
from sedd_samplers.caching import _check_same, _Kept
from torch import Tensor


def differing(by: float, size: float) -> Any:
    """A network whose answer is `size` at sigma below 1, and more above."""
    return lambda x, sigma: (size + by * (sigma > 1))[:, None, None].expand(*x.shape, 3)


@pytest.mark.parametrize(
    ("size", "by", "told"),
    [
        (0.0, 0.9e-4, False),
        (0.0, 1.1e-4, True),
        (0.0, -1.1e-4, True),
        (1000.0, 0.1, False),
        (1000.0, 0.11, True),
        (torch.nan, 0.0, False),
        (-torch.inf, 0.0, False),
    ],
)
def test_a_network_that_knows_the_time_is_told_to_a_ten_thousandth(size: float, by: float, told: bool) -> None:
    x, sigma = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0.1, 0.1], dtype=torch.float64)
    model = cached(differing(by, size))
    if told:
        with pytest.raises(ValueError, match=r"answer changes with sigma, by up to .* from sigma = 0\.5 to 1\.5"):
            model(x, sigma)
    else:
        model(x, sigma)


def test_what_is_asked_of_a_cached_network() -> None:
    """At first twice about the first sequence, at two levels of noise; then what has changed, at its own."""
    asked = list[Any]()

    def network(x: Tensor, sigma: Tensor, where: Tensor) -> Tensor:
        asked.append((x.tolist(), [round(level, 3) for level in sigma.tolist()], where.int().tolist()))
        return x[where][:, None].expand(-1, 2).double()

    model, x = cached(network), torch.tensor([[1, 2], [3, 4], [5, 6]])
    where = torch.tensor([[True, True], [False, True], [True, False]])
    sigma, rows = torch.tensor([0.2, 0.3, 0.4]), torch.tensor([5, 6, 7])
    whole = [1.0, 2.0, 4.0, 5.0]
    assert model(x, sigma, where, rows)[:, 0].tolist() == whole
    assert asked == [
        ([[1, 2]], [0.5], [[1, 1]]),
        ([[1, 2]], [1.5], [[1, 1]]),
        ([[1, 2], [3, 4], [5, 6]], [0.2, 0.3, 0.4], [[1, 1], [0, 1], [1, 0]]),
    ]
    assert model(x, sigma, where, rows)[:, 0].tolist() == whole
    assert len(asked) == 3
    x[1, 1] = 9  # in place
    assert model(x, sigma + 1, where, rows)[:, 0].tolist() == [1.0, 2.0, 9.0, 5.0]
    assert asked[3:] == [([[3, 9]], [1.3], [[0, 1]])]
    assert model(x[2:], sigma[2:], where[2:], rows[2:])[:, 0].tolist() == [5.0]  # the others are gone, and forgotten
    assert len(asked) == 4
    assert model(x[[2, 0]], sigma[[2, 0]], where[[2, 0]], rows[[2, 0]])[:, 0].tolist() == [5.0, 1.0, 2.0]
    assert asked[4:] == [([[1, 2]], [0.2], [[1, 1]])]


def test_a_canvas_of_another_length_is_asked_about_anew() -> None:
    """By the same sequences and by others; one without positions that are asked about has no rows."""
    asked = list[Any]()

    def network(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        asked.append((x.shape[1], rows.tolist()))
        return x[..., None].expand(-1, -1, 2).double()

    model, x = cached(network), torch.arange(6).view(2, 3)
    sigma, rows = torch.ones(2), torch.tensor([3, 4])
    model(x[:, :2], sigma, rows=rows)
    asked.clear()
    for length, some in ((3, [0, 1]), (2, [1]), (2, [1]), (3, [1, 0])):
        found = model(x[some, :length], sigma[some], rows=rows[some])
        assert torch.equal(found[..., 0], x[some, :length].double())
    assert asked == [(3, [3, 4]), (2, [4]), (3, [4, 3])]
    where = torch.tensor([[False, False, False], [True, False, False]])
    assert model(x, sigma, where, rows)[:, 0].tolist() == [3.0]
    assert model(x, sigma, where & False, rows).shape == (0, 2)


@pytest.mark.parametrize(
    ("size", "off", "told"),
    [
        (0.0, 1.1e-4, False),
        (0.0, 1.3e-4, True),
        (10.0, 1.1e-3, False),
        (10.0, 1.3e-3, True),
        (1.0, torch.nan, True),
    ],
)
def test_keys_that_change_are_told_to_a_thousand_roundings(size: float, off: float, told: bool) -> None:
    """1e3 times 1.19e-7 of the largest number, or of 1; what is infinite for certain is not compared."""
    whole = torch.tensor([[size, -torch.inf, -size, 0.0]])
    answer = whole + torch.tensor([[0.0, 7.0, off, 0.0]])
    if told:
        with pytest.raises(ValueError, match="what this model says by"):
            _check_same(answer, whole)
    else:
        _check_same(answer, whole)


class Notes:
    """What is done to keys and values."""

    def __init__(self, noted: list[Any]) -> None:
        self.noted = noted
        noted.append("new")

    def crop(self, count: int) -> None:
        self.noted.append(count)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.noted.append(indices.tolist())


def kept(*calls: Any, block_size: int, origin: int = 0, approximate: bool = False) -> tuple[list[int], list[Any]]:
    """Where each call begins, and what happened to the keys and values: calls are states, asked from where, rows."""
    noted = list[Any]()
    keeping = _Kept(lambda: Notes(noted), block_size, origin, approximate)
    noted.clear()
    begins = []
    for states, first, rows in calls:
        x = torch.tensor([[int(token) for token in text] for text in states.split()])
        asked = torch.zeros_like(x, dtype=torch.bool)
        asked[:, first:] = True
        begins.append(keeping.begin(x, asked, torch.tensor(rows)))
        x[:] = -1  # what was seen is kept whatever becomes of it
    return begins, noted


@pytest.mark.parametrize(
    ("calls", "how", "begins", "noted"),
    [
        # the first call sees all; then the first block that is asked about, or has changed
        ([("0123", 0, [0]), ("0123", 2, [0]), ("0123", 3, [0])], {"block_size": 2}, [0, 2, 2], ["new", -2, -2]),
        ([("0123", 2, [0]), ("0923", 2, [0]), ("0983", 2, [0])], {"block_size": 1}, [0, 1, 2], ["new", -3, -2]),
        ([("0123", 2, [0]), ("9123", 2, [0])], {"block_size": 2}, [0, 0], ["new", "new"]),
        # in any of the sequences
        ([("0123 4567", 3, [0, 1]), ("0123 4967", 3, [0, 1])], {"block_size": 1}, [0, 1], ["new", -3]),
        # a canvas that grows: nothing is cropped where all that was seen stands
        ([("01", 0, [0]), ("0123", 2, [0]), ("012345", 4, [0])], {"block_size": 2}, [0, 2, 4], ["new"]),
        ([("01", 0, [0]), ("0923", 2, [0])], {"block_size": 2}, [0, 0], ["new", "new"]),
        # blocks from an origin on, what stands before it being one
        ([("01234567", 6, [0]), ("01234567", 5, [0])], {"block_size": 2, "origin": 3}, [0, 5], ["new", -3]),
        ([("01234567", 6, [0]), ("01294567", 6, [0])], {"block_size": 2, "origin": 3}, [0, 3], ["new", -5]),
        ([("01234567", 6, [0]), ("01934567", 6, [0])], {"block_size": 2, "origin": 3}, [0, 0], ["new", "new"]),
        # sequences that leave, or stand in another order, are looked up; one that is new begins anew
        ([("012 345 678", 2, [4, 5, 6]), ("678 012", 2, [6, 4])], {"block_size": 1}, [0, 2], ["new", [2, 0], -1]),
        ([("012 345", 2, [4, 5]), ("345", 2, [5]), ("012", 2, [4])], {"block_size": 1}, [0, 2, 0],
         ["new", [1], -1, "new"]),
        ([("012", 2, [0]), ("012 345", 2, [0, 1])], {"block_size": 1}, [0, 0], ["new", "new"]),
        # the approximation keeps from a block's first call what stands before it, and begins anew with the next block
        ([("0123", 2, [0]), ("0173", 2, [0]), ("0178", 3, [0])], {"block_size": 2, "approximate": True}, [0, 2, 2],
         ["new", -2, -2]),
        ([("0123", 1, [0]), ("0123", 2, [0]), ("0123", 2, [0])], {"block_size": 2, "approximate": True}, [0, 0, 2],
         ["new", "new", -2]),
        ([("0123", 2, [0]), ("0923", 2, [0])], {"block_size": 2, "approximate": True}, [0, 0], ["new", "new"]),
    ],
)  # fmt: skip
def test_what_is_kept_ends_where_something_is_new(
    calls: list[Any], how: dict[str, Any], begins: list[int], noted: list[Any]
) -> None:
    assert kept(*calls, **how) == (begins, noted)


def test_the_first_reuse_is_checked_and_none_after_it() -> None:
    """By the first sequence alone: beside another text than its own, and as a whole."""

    class Text:
        def __init__(self) -> None:
            self.x = torch.empty(0, 0, dtype=torch.int64)

        def crop(self, count: int) -> None:
            self.x = self.x[:, :count]

        def batch_select_indices(self, indices: Tensor) -> None:
            self.x = self.x[indices]

    asked = list[Any]()

    def network(x: Tensor, sigma: Tensor, where: Tensor, cache: Any) -> Tensor:
        asked.append((x.tolist(), sigma.tolist()))
        cache.x = torch.cat([cache.x.view(len(x), -1), x], 1)
        out: Tensor = cache.x.cumsum(1)[:, -x.shape[1] :, None].expand(-1, -1, 2)[where].double()
        return out

    model = prefix_cached(network, Text, block_size=1)
    x, last = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[False, False, True]] * 2)
    sigma = torch.tensor([0.5, 2.0])
    for _ in range(3):
        assert model(x, sigma, last)[:, 0].tolist() == [6.0, 15.0]
    both = [([[3], [6]], [0.5, 2.0])]
    beside = [([[1, 2, 2]], [0.5]), ([[3]], [0.5]), ([[1, 2, 3]], [0.5])]
    assert asked == [(x.tolist(), [0.5, 2.0]), *both, *beside, *both]
    assert model(x, sigma).shape == (2, 3, 2)  # of all positions, as a model of sequences answers


def test_what_is_kept_is_where_the_states_are(ref: Any) -> None:
    """Of sequences that stay, come in another order, and come back."""

    class Cache:
        def __init__(self) -> None:
            self.x: Any = None

        def crop(self, count: int) -> None:
            self.x = self.x[:, :count]

        def batch_select_indices(self, indices: Tensor) -> None:
            self.x = self.x[indices]

    def reads(x: Tensor, sigma: Tensor, positions: Tensor, cache: Any) -> Tensor:
        cache.x = x if cache.x is None else torch.cat([cache.x, x], 1)
        out: Tensor = cache.x.cumsum(1)[:, -x.shape[1] :].flatten()[positions, None].double()
        return out

    plain = cached(lambda x, sigma, positions: x.flatten()[positions, None].double())
    x, last = torch.arange(9).view(3, 3), torch.tensor([[False, False, True]] * 3)
    for model, expected in ((plain, [2, 5, 8]), (prefix_cached(reads, Cache, block_size=1), [3, 12, 21])):
        for rows in ([0, 1, 2], [0, 1, 2], [2, 0], [0, 2], [1]):
            some = torch.tensor(rows)
            with ref.Elsewhere(torch.tensor):
                found = model(x[some], torch.full((len(rows),), 0.5, device="cpu"), last[some], some)
            assert found[:, 0].tolist() == [expected[row] for row in rows]


@pytest.mark.parametrize("wrong", [0, -1, True, 1.0])
def test_blocks_have_a_size(wrong: Any) -> None:
    with pytest.raises(ValueError, match="block_size must be a positive integer, got"):
        prefix_cached(lambda x, cache: x, lambda: Notes([]), block_size=wrong)
    prefix_cached(lambda x, cache: x, lambda: Notes([]), block_size=1)
