"""A step's data: which samples, where in the text, whose rank; and what is made ahead. (The order: `test_data.py`.)"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sedd_graphs import Absorbing, LogLinear
from sedd_train import randomness, recipes
from sedd_train.loading import Batches, order
from sedd_train.objectives import Autoregressive, ScoreEntropy
from sedd_train.tokens import Tokens

ENDS = np.cumsum([3, 9, 1, 5, 30, 2, 8, 4, 6, 12])
TOKENS = Tokens(np.arange(80, dtype=np.uint16), ENDS, characters=80)
OBJECTIVE = ScoreEntropy(Absorbing(100), LogLinear())


def batches(rank=0, world_size=1, end=None, **values):
    recipe = recipes.override(recipes.Recipe(), {"length": 8, "batch_size": 4, "seed": 5} | values)
    return Batches(TOKENS, recipe, OBJECTIVE, rank, world_size, end)


def test_blocks_come_in_the_order_of_the_run():
    found = batches(micro_batch_size=4)
    assert (found.available, found.micro_batches) == (10, 1)
    seen = [found.make(step)[0][0] for step in range(5)]
    starts = [8 * block for block in order(5, range(20), 10)]
    assert torch.cat(seen)[:, 0].tolist() == starts
    assert sorted(starts[:10]) == list(range(0, 80, 8))  # an epoch
    assert starts[:10] != starts[10:]
    for step, x0 in enumerate(seen):
        assert found.where(found.samples(step)) == x0[:, 0].tolist()


@pytest.mark.parametrize("end", [None, 99])
def test_ranks_and_micro_batches_cut_a_step_without_changing_it(end):
    """Tokens, noise, times and dropout's seeds of every sample of step 3, however it is cut."""
    packing = end is None
    (whole,) = batches(end=end, packing=packing).make(3)
    rows = {number: [part[i] for part in whole] for i, number in enumerate(batches(end=end).samples(3))}
    assert sorted(rows) == [12, 13, 14, 15]
    for world_size, micro in [(2, 1), (2, 2), (4, 1), (1, 2)]:
        seen = []
        for rank in range(world_size):
            part = batches(rank, world_size, end, packing=packing, micro_batch_size=micro)
            made = part.make(3)
            assert all(len(x0) == micro for x0, *_ in made)
            numbers = part.samples(3)
            seen += numbers
            parts = [torch.cat(parts) for parts in zip(*made, strict=True)]
            for i, number in enumerate(numbers):
                assert all(torch.equal(one[i], other) for one, other in zip(parts, rows[number], strict=True))
        assert sorted(seen) == sorted(rows)


def test_rows_of_documents_and_how_many_of_their_tokens_are_text():
    found = batches(end=99, packing=False)
    assert found.available == 10
    for step in range(3):
        ((x0, _, _, _, lengths),) = found.make(step)
        numbers = found.where(found.samples(step))
        assert lengths.tolist() == [min(8, [3, 9, 1, 5, 30, 2, 8, 4, 6, 12][n]) for n in numbers]
        assert ((x0 == 99).sum(1) == 8 - lengths).all()
        assert found.text_tokens(step) == int(lengths.sum()) < 32
        for rank in range(2):  # of all ranks, on each of them
            assert batches(rank, 2, 99, packing=False).text_tokens(step) == found.text_tokens(step)
    assert batches().text_tokens(7) == 32


def test_crops_are_taken_where_they_begin():
    found = batches(crops=True)
    starts = found.where(range(40))
    assert any(start % 8 for start in starts)
    assert found.make(2)[0][0][:, 0].tolist() == starts[8:12]


def test_x_t_is_noise_of_x_0_at_the_times_told():
    ((x0, xt, t, *_),) = batches(length=40, batch_size=2).make(0)
    assert ((xt == x0) | (xt == 100)).all()
    assert t.tolist() == sorted(t.tolist())
    masked = (xt == 100).float().mean(1)
    assert masked[0] < masked[1]


def test_times_are_of_the_recipe_s_seed_and_least_time():
    ((_, _, t, *_),) = batches(t_min=0.5).make(3)
    assert torch.equal(t, randomness.times(5, 3, range(4), 4, 0.5))


def test_where_there_is_a_gpu_batches_are_pinned_and_say_which_positions_count(monkeypatch):
    """Those that are masks and, of rows, no padding; an objective of another kind is not asked."""
    plain = [batches(end=end, packing=end is None, micro_batch_size=4).make(3)[0] for end in (None, 99)]
    assert [len(batch) for batch in plain] == [4, 5]
    pinned: list[torch.Tensor] = []

    def pin(tensor):
        pinned.append(tensor)
        return tensor

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    for end, before in ((None, plain[0]), (99, plain[1])):
        pinned.clear()
        (batch,) = batches(end=end, packing=end is None, micro_batch_size=4).make(3)
        *others, lengths, positions = batch
        assert all(torch.equal(one, other) for one, other in zip(others, before[:4], strict=True))
        assert (lengths is None) if end is None else torch.equal(lengths, before[4])
        live = others[1] == OBJECTIVE.graph.mask_id
        live &= True if lengths is None else torch.arange(8) < lengths[:, None]
        assert torch.equal(positions, live.flatten().nonzero()[:, 0])
        assert 0 < len(positions) < 32
        assert len(pinned) == 5 + (end is not None)
    other = Batches(TOKENS, recipes.override(recipes.Recipe(), {"length": 8}), Autoregressive(99), 0, 1, None)
    assert len(other.make(0)[0]) == 4
