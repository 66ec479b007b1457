"""Everything that is there for speed, against the same thing written plainly; and a whole run against a plain loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sedd_samplers import Ancestral, Euler, TauLeaping, Tweedie, cached, prefix_cached, sample, uniform_grid
from sedd_samplers.fast import Answer, draw_by_blocks, exp_but_at, log, rows_at_a_time, spread, times_row
from sedd_samplers.randomness import uniforms

GRAPHS = {
    "absorbing": lambda ref: ref.StructuredAbsorbing(4),
    "absorbing, mask amid the tokens": lambda ref: ref.StructuredAbsorbing(4, 2),
    "uniform": lambda ref: ref.StructuredUniform(5),
    "hybrid": lambda ref: ref.hybrid_matrix(4),
    "cycle": lambda ref: ref.cycle_matrix(5),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# The equations of the methods with dense matrices, one position at a time. s is the concrete score with s_x = 1.


def plain_euler(s, x, Q, t, s_, noise):
    rates = (t - s_) * noise(t)[1] * Q[x] * s
    rates[x] = 0
    rates[x] = 1 - rates.sum()
    return rates


def plain_tau_leaping(s, x, Q, t, s_, noise):
    rates = (t - s_) * noise(t)[1] * Q[x] * s
    rates[x] = 0
    total = rates.sum()
    probs = rates * (1 - torch.exp(-total)) / total.clamp(min=1e-300)
    probs[x] = torch.exp(-total)
    return probs


def plain_tweedie(s, x, Q, t, s_, noise):
    step = torch.linalg.matrix_exp((noise(t)[0] - noise(s_)[0]) * Q)
    return torch.linalg.solve(step, s) * step[x]


def plain_ancestral(s, x, Q, t, s_, noise, mask_id):
    to_t, to_s = torch.linalg.matrix_exp(noise(t)[0] * Q), torch.linalg.matrix_exp(noise(s_)[0] * Q)
    clean = (torch.linalg.solve(to_t, s) * to_t[x]).clamp(min=0)
    if mask_id is not None:
        clean[mask_id] = 0
    clean = clean / clean.sum()
    step = torch.linalg.matrix_exp((noise(t)[0] - noise(s_)[0]) * Q)
    return sum(p * step[x] * to_s[:, x0] / to_t[x, x0] for x0, p in enumerate(clean) if p > 0)


PLAIN: dict[Any, Callable[..., torch.Tensor]] = {
    Euler: plain_euler,
    TauLeaping: plain_tau_leaping,
    Tweedie: plain_tweedie,
    Ancestral: plain_ancestral,
}


def plain_sample(score, graph, noise, shape, times, method, seeds):
    """The loop with nothing left out and nothing done at once: every position by itself, in float64."""
    B, L = shape
    Q, N = graph.Q, graph.num_states
    drawn = [0] * B

    def draw(law, b, i):
        u = uniforms(torch.tensor([seeds[b]]), torch.tensor([drawn[b]]), torch.tensor([i]))
        cumulative = law.clamp(min=0).cumsum(0)
        return int((cumulative <= u * cumulative[-1]).sum())

    tokens = torch.tensor([0.0 if y == graph.mask_id else 1.0 for y in range(N)], dtype=torch.float64)
    prior = torch.linalg.matrix_exp(500 * Q) @ (tokens / tokens.sum())
    x = torch.tensor([[draw(prior, b, i) for i in range(L)] for b in range(B)])
    for t, s in pairwise([*times, None]):
        moved = x.clone()
        for b in range(B):
            drawn[b] += 1
            log_score = score(x[b : b + 1], noise(t)[0][None])[0]
            free = [i for i in range(L) if (Q[x[b, i]] > 0).any()]
            drawn[b] -= not free  # a sequence with nothing to move draws nothing
            for i in free:
                concrete = log_score[i].exp()
                concrete[x[b, i]] = 1
                if s is None:
                    law = plain_tweedie(concrete, int(x[b, i]), Q, t, torch.zeros_like(t), lambda t_: (noise(t_)[0],))
                    if graph.mask_id is not None:
                        law[graph.mask_id] = 0
                else:
                    more = (graph.mask_id,) if method is Ancestral else ()
                    law = PLAIN[method](concrete, int(x[b, i]), Q, t, s, noise, *more)
                moved[b, i] = draw(law, b, i)
        x = moved
    return x


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("name", GRAPHS)
def test_a_run_draws_the_tokens_of_the_plain_loop(ref, name, method):
    graph, noise, times = GRAPHS[name](ref), ref.LogLinear(0.1), uniform_grid(3, 0.1)
    tokens = 5 - (graph.mask_id is not None)
    score = ref.ExactScore(ref.random_data(tokens, 3, 5, graph.mask_id), graph.Q)
    fast = sample(score, graph, noise, shape=(6, 3), times=times, method=method(), seeds=range(6))
    assert torch.equal(fast, plain_sample(score, graph, noise, (6, 3), times, method, range(6)))


@pytest.mark.parametrize("name", GRAPHS)
def test_a_row_is_multiplied_as_if_it_were_spread(ref, name):
    graph, x = GRAPHS[name](ref), torch.arange(5)
    sigma = torch.rand(5, generator=seeded(), dtype=torch.float64)
    row = graph.transition_into(x, sigma)
    plain = torch.stack([torch.linalg.matrix_exp(sigma[i] * graph.Q)[i] for i in range(5)])
    dense = torch.rand(5, 5, generator=seeded(1), dtype=torch.float64)
    torch.testing.assert_close(spread(row, dense).double(), plain, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(times_row(dense.clone(), row), dense * plain, rtol=1e-6, atol=1e-7)


def test_a_row_of_nothing_special_is_its_base():
    row = SimpleNamespace(base=torch.tensor([2.0]), index=torch.zeros(1, 0).long(), value=torch.zeros(1, 0))
    assert times_row(torch.ones(1, 3), row).tolist() == [[2.0] * 3]
    assert spread(row, torch.ones(1, 3)).tolist() == [[2.0] * 3]


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("there", [0.7, torch.inf, -torch.inf, torch.nan])
def test_an_exponential_is_1_where_it_carries_no_information(recorded, there):
    x, values = torch.tensor([2, 0]), torch.tensor([[0.3, -1.0, 0.0], [0.0, 2.0, -torch.inf]])
    values[torch.arange(2), x] = there
    before = values.clone()
    out = exp_but_at(values.requires_grad_(recorded), x)
    plain = [[math.exp(0.3), math.exp(-1.0), 1.0], [1.0, math.exp(2.0), 0.0]]
    torch.testing.assert_close(out.detach(), torch.tensor(plain), rtol=1e-6, atol=0)
    torch.testing.assert_close(values.detach(), before, rtol=0, atol=0, equal_nan=True)
    if recorded:
        (slope,) = torch.autograd.grad(out.sum(), values)
        expected = torch.tensor(plain).scatter(1, x[:, None], 0.0)
        torch.testing.assert_close(slope, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("num_states", [1, 2, 7, 64, 1000])
def test_a_draw_by_blocks_is_the_first_state_beyond_the_uniform_number(num_states):
    probs = torch.rand(500, num_states, generator=seeded(), dtype=torch.float64) ** 6
    uniform = torch.rand(500, generator=seeded(1), dtype=torch.float64)
    cumulative = probs.cumsum(1)
    plain = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(1)
    state, total = draw_by_blocks(probs, uniform)
    assert torch.equal(state, plain)
    torch.testing.assert_close(total, cumulative[:, -1])


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_draw_from_no_distribution_tells_by_its_sum(bad):
    probs = torch.rand(3, 100, generator=seeded())
    probs[1] = bad
    total = draw_by_blocks(probs, torch.full((3,), 0.5, dtype=torch.float64))[1]
    assert ((total > 0) & total.isfinite()).tolist() == [True, False, True]


@pytest.mark.parametrize("picked", [False, True])
def test_an_answer_is_converted_in_pieces_as_at_once(picked, monkeypatch):
    monkeypatch.setattr("sedd_samplers.fast.answer.rows_at_a_time", lambda num_states, device: 3)
    rows = torch.rand(11, 4, generator=seeded()).bfloat16()
    pick = torch.tensor([9, 0, 3, 3, 10, 7, 1]) if picked else None
    scale = torch.arange(11.0)[: 7 if picked else 11, None]
    answer = Answer(rows, pick).then(lambda r, part: r * scale[part]).then(lambda r, part: r + 1, torch.float64)
    plain = (rows.double()[pick] if picked else rows.double()) * scale + 1
    assert torch.equal(answer.tensor(), plain.float())
    assert torch.equal(answer[torch.tensor([5, 0])], plain[[5, 0]])
    assert answer[2:4].dtype == torch.float64
    assert torch.equal(answer.then(lambda r, part: r / 3, torch.float32)[2:4], plain[2:4] / 3)
    assert len(answer) == len(plain)


def test_a_cached_model_answers_as_the_model(ref):
    """Along a run in which sequences change one after the other, at all positions and at some."""
    table = torch.rand(5, 5, generator=seeded())
    model = lambda x, sigma: table[x] + x.sum(1)[:, None, None]  # noqa: E731
    ask, x = cached(model), torch.randint(5, (4, 6), generator=seeded(1))
    sigma, rows = torch.ones(4), torch.arange(4)
    for step in range(12):
        x = x.clone()
        x[step % 4, step % 6] = step % 5
        where = torch.rand(4, 6, generator=seeded(step // 3)) < 0.5
        assert torch.equal(ask(x, sigma, where=where, rows=rows), model(x, sigma)[where])


@pytest.mark.parametrize("of_where", [False, True])
def test_a_cached_model_notices_what_is_edited_in_place(of_where):
    calls = []

    def model(x, sigma):
        calls.append(len(x))
        return torch.nn.functional.one_hot(x, 5).float()

    ask, x, where = cached(model), torch.tensor([[1, 2], [3, 4]]), torch.tensor([[True, False], [True, True]])
    how = {"where": where, "rows": torch.arange(2)}
    ask(x, torch.ones(2), **how)
    if of_where:
        where[0, 1] = True
    else:
        x[0, 0] = 0
    assert ask(x, torch.ones(2), **how).argmax(-1).tolist() == x[where].tolist()
    ask(x, torch.ones(2), **how)
    assert calls[-1] == 1


@pytest.mark.parametrize(
    ("num_states", "device", "rows"),
    [(1024, "cpu", 1024), (1000, "cpu", 1048), (2**20, "cpu", 1), (2**21, "cpu", 1), (1024, "cuda", 65536)],
)
def test_a_piece_is_4_mb_of_a_cache_or_256_mb_of_a_gpu(num_states, device, rows):
    assert rows_at_a_time(num_states, torch.device(device)) == rows
    if device == "cpu":
        answer = Answer(torch.zeros(1, 1).expand(3000, num_states))
        assert answer.parts()[0] == slice(0, rows)
        assert answer.then(lambda r, part: r, torch.float64).parts()[0] == slice(0, max(1, 2**19 // num_states))
        assert len(answer.pieces(2 * rows)) == 2


def test_an_answer_has_the_shape_and_precision_that_it_will_have():
    answer = Answer(torch.zeros(5, 4).bfloat16(), torch.tensor([1, 3]))
    assert (answer.shape, answer.dtype, answer.work) == ((2, 4), torch.float32, torch.float32)
    assert Answer(torch.zeros(5, 4).double()).dtype == torch.float64
    wider = answer.then(lambda r, part: torch.cat([r, r], 1), torch.float64, width=8)
    assert (wider.shape, wider.dtype, wider.work) == ((2, 8), torch.float32, torch.float64)
    assert wider.then(lambda r, part: r).shape == (2, 8)
    assert wider.tensor().shape == (2, 8)
    assert wider.as_returned() is None
    rows, pick, shift = answer.as_returned() or (None, None, None)
    assert shift is None
    assert rows is not None
    assert pick is not None
    assert (rows.dtype, pick.tolist()) == (torch.bfloat16, [1, 3])


def test_a_logarithm_of_nothing_is_minus_infinity_and_has_no_gradient():
    plain = torch.tensor([0.0, 2.0, -1.0, torch.nan])
    recorded = plain.clone().requires_grad_()
    out = log(recorded)
    expected = [-math.inf, math.log(2), math.nan, math.nan]
    assert out.tolist() == pytest.approx(expected, nan_ok=True)
    assert log(plain.clone()).tolist() == pytest.approx(expected, nan_ok=True)
    (slope,) = torch.autograd.grad(out[:2].sum(), recorded)
    assert slope.tolist() == [0.0, 0.5, 0.0, 0.0]


def test_a_row_times_numbers_with_a_gradient_leaves_them_alone():
    row = SimpleNamespace(base=torch.tensor([2.0]), index=torch.tensor([[1]]), value=torch.tensor([[5.0]]))
    dense = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    out = times_row(dense, row)
    assert out.tolist() == [[2.0, 10.0, 6.0]]
    assert dense.tolist() == [[1.0, 2.0, 3.0]]
    assert torch.autograd.grad(out.sum(), dense)[0].tolist() == [[2.0, 5.0, 2.0]]


def test_a_state_is_the_last_of_positive_probability_at_the_end_of_the_unit_interval():
    """And the first one at its beginning, whatever zeros stand there."""
    probs = torch.zeros(2, 9)
    probs[:, [2, 5]] = torch.tensor([0.25, 0.75])
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert draw_by_blocks(probs, ends)[0].tolist() == [2, 5]
    assert draw_by_blocks(probs, torch.tensor([0.2499999, 0.2500001]).double())[0].tolist() == [2, 5]


class Seen:
    """Keys and values that are the tokens themselves."""

    def __init__(self):
        self.x = torch.empty(1, 0, dtype=torch.int64)

    def crop(self, length):
        self.x = self.x[:, :length]

    def batch_select_indices(self, indices):
        self.x = self.x[indices]


def test_keys_and_values_are_known_by_the_contents_of_what_they_are_of():
    """Also where the states are edited in place; what stands before the edit is not looked at again."""
    widths = []

    def model(x, sigma, cache):
        widths.append(x.shape[1])
        cache.x = torch.cat([cache.x, x], 1)
        return cache.x.cumsum(1)[:, -x.shape[1] :, None].expand(-1, -1, 2).float()

    network = prefix_cached(model, Seen, block_size=1)
    x, last, sigma = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[False, False, False, True]]), torch.ones(1)
    for place, token in ((3, 4), (3, 7), (1, 5), (0, 9)):
        x[0, place] = token
        assert network(x, sigma, last).tolist() == [[float(x.sum())] * 2]
    assert widths[:2] == [4, 1]
    assert widths[-2:] == [3, 4]
