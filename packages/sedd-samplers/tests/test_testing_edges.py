"""How much the importable laws let pass, what they run, and the enumerated laws that they rest on."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sedd_samplers import Reverse, Tweedie, testing
from sedd_samplers.adapters import from_logits
from sedd_samplers.adapters.processes import Masking, Replacing
from sedd_samplers.testing import memory, scheduled
from sedd_samplers.testing._enumerated import (
    Enumerating,
    Pairs,
    check_frequencies,
    dense,
    law_of_chain,
    marginal,
    score_of_law,
    transitions,
)
from sedd_samplers.testing.scores import _close, _led_into, _others, _states
from torch import Tensor


@pytest.mark.parametrize(
    ("found", "expected", "tolerance", "told"),
    [
        (1.5, 1.0, 0.5, None),
        (0.5, 1.0, 0.5, None),
        (1.5, 1.0, 0.49, r"this: they differ by up to 0\.5 nats, more than 0\.49"),
        (0.5, 1.0, 0.49, "up to 0.5 nats"),
        (-torch.inf, -torch.inf, 0.0, None),
        (-torch.inf, 0.0, 9.0, "up to inf nats"),
        (torch.nan, 0.0, 9.0, "up to nan nats"),
    ],
)
def test_numbers_are_close_or_told(found: float, expected: float, tolerance: float, told: str | None) -> None:
    """All of them: the first two are the same."""
    one, other = torch.tensor([0.0, 7.0, found]), torch.tensor([0.0, 7.0, expected])
    if told is None:
        _close(one, other, tolerance, "this")
    else:
        with pytest.raises(AssertionError, match=told):
            _close(one, other, tolerance, "this")


def test_entries_that_mean_something_are_those_that_a_jump_leads_from() -> None:
    """Under a mask, 1, its own tokens; of uniform noise all other states."""
    x = torch.tensor([[0, 1, 2]])
    assert _led_into(Masking(3, 1), x).tolist() == [[False, True, False]]
    assert _others(x, Masking(3, 1)).int().tolist() == [[[0, 0, 0], [1, 0, 1], [0, 0, 0]]]
    assert _led_into(Replacing(3), x).all()
    assert _others(x, Replacing(3)).int().tolist() == [[[0, 1, 1], [1, 0, 1], [1, 1, 0]]]
    states = _states(Replacing(3), 4, 6)
    assert states.shape == (4, 6)
    assert states.unique().tolist() == [0, 1, 2]


class Off:
    """The exact score of pairs, which also offers rows, off by something somewhere."""

    def __init__(self, graph: Any, how: str, by: float) -> None:
        self.exact, self.how, self.by, self.graph = Pairs(graph).score, how, by, graph

    def __call__(self, x: Tensor, sigma: Tensor, where: Tensor | None = None) -> Tensor:
        out: Tensor = self.exact(x, sigma.double())
        if self.how == "in a batch":
            out = out + self.by * (len(x) > 1)
        if self.how == "in rows":
            out = out + self.by * (where is not None)
        if self.how == "in order":  # a ratio that knows what stands before
            out = out + self.by * (x[:, :1, None] == 0) * torch.tensor([0.0, 1.0])[:, None]
        if self.how == "at one level":
            out = out + self.by * (sigma == 3.0)[:, None, None]
        return out if where is None else out[where]


@pytest.mark.parametrize(
    ("law", "how", "passes", "fails"),
    [
        (testing.sequences_are_answered_one_by_one, "in a batch", 0.9e-4, 1.1e-4),
        (testing.rows_are_those_of_the_whole, "in rows", 0.9e-4, 1.1e-4),
        (testing.score_is_consistent, "in order", 0.9e-3, 1.1e-3),
        (testing.score_is_that_of, "at one level", 0.9e-3, 1.1e-3),
    ],
)
def test_a_law_lets_its_tolerance_pass_and_no_more(law: Any, how: str, passes: float, fails: float) -> None:
    graph = Masking(4, 3)
    options: dict[str, Any] = {} if law is testing.score_is_that_of else {"length": 2}
    before = (Pairs(graph).p0,) if law is testing.score_is_that_of else ()
    for by in (passes, -passes):
        law(*before, Off(graph, how, by), graph, **options)
    for by in (fails, -fails):
        with pytest.raises(AssertionError, match=f"differ by up to {fails:.3g} nats"):
            law(*before, Off(graph, how, by), graph, **options)
        law(*before, Off(graph, how, by), graph, tolerance=1.1 * fails, **options)


@pytest.mark.parametrize("by", [0.9e-3, 1.1e-3])
@pytest.mark.parametrize("name", ["mask", "uniform"])
def test_a_posterior_may_leave_a_thousandth_to_the_mask_or_lack_it(name: str, by: float) -> None:
    """A score that is off by a factor leaves its share to the mask; where tokens are noised, entries are negative."""
    if name == "mask":
        graph: Any = Masking(4, 3)
        exact = Pairs(graph).score
        score = lambda x, sigma: exact(x, sigma) + math.log1p(-by)  # noqa: E731
        told = "the posterior gives the mask 0.0011"
    else:
        graph = Replacing(3)
        told = r"has an entry of -0\.0011"

        def score(x: Tensor, sigma: Tensor) -> Tensor:
            """s_y of all others such that e^sigma m (s_y - m sum(s)) is -by, but at a noise too small for it."""
            level = sigma.double()
            m = -torch.expm1(-level) / 3
            s = (m - by * (level > 0.1) * torch.exp(-level) / m) / (1 - 2 * m)
            return s.log()[:, None, None].expand(*x.shape, 3)

    if by < 1e-3:
        testing.posterior_is_a_distribution(score, graph, length=2)
    else:
        with pytest.raises(AssertionError, match=told):
            testing.posterior_is_a_distribution(score, graph, length=2)


def test_laws_are_given_up_to_4096_states_in_any_unit() -> None:
    graph = Replacing(2)
    p0 = torch.rand((2,) * 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    testing.score_is_that_of(7 * p0, score_of_law(p0 / p0.sum(), graph), graph)
    with pytest.raises(AssertionError, match="p0 has 8192 states, more than the 4096 that are enumerated"):
        testing.score_is_that_of(torch.ones((2,) * 13), lambda x, sigma: x.double(), graph)


@pytest.mark.parametrize("graph", [Masking(4, 1), Replacing(3)])
def test_the_law_of_pairs_is_the_one_it_was(graph: Any) -> None:
    """exp(1.2 normal numbers), nine tenths, and one tenth alike; nothing at the mask."""
    N, pairs = graph.num_states, Pairs(graph)
    p = torch.exp(1.2 * torch.randn(N, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    tokens = torch.tensor([y != graph.mask_id for y in range(N)])
    p = p * (tokens[:, None] & tokens)
    expected = 0.9 * p / p.sum() + 0.1 * (p > 0) / int(tokens.sum()) ** 2
    torch.testing.assert_close(pairs.p0, expected)
    one = torch.nn.functional.one_hot(torch.tensor(1), 4).double() if N == 4 else torch.full((3,), 1 / 3).double()
    torch.testing.assert_close(pairs.prior(), torch.outer(one, one).flatten())
    with pytest.raises(ValueError, match="at most 8 states, to enumerate pairs, got 9"):
        Pairs(Replacing(9))
    Pairs(Replacing(8))


def test_marginals_and_scores_of_a_law_are_sums_over_clean_sequences() -> None:
    """Three positions of three states, by a loop over all that they were."""
    graph, sigma = Replacing(3), torch.tensor([0.2, 1.5], dtype=torch.float64)
    p0 = torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = transitions(graph, sigma)
    Q = torch.full((3, 3), 1 / 3, dtype=torch.float64) - torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(step, torch.linalg.matrix_exp(sigma[:, None, None] * Q))
    p = marginal(p0, graph, sigma)
    for level in range(2):
        for now in itertools.product(range(3), repeat=3):
            total = sum(
                float(p0[was]) * math.prod(float(step[level, a, b]) for a, b in zip(now, was, strict=True))
                for was in itertools.product(range(3), repeat=3)
            )
            assert float(p[(level, *now)]) == pytest.approx(total, rel=1e-12)
    x = torch.tensor([[0, 1, 2], [2, 2, 0]])
    out = score_of_law(p0, graph)(x, sigma)
    assert out.shape == (2, 3, 3)
    for b, i, y in itertools.product(range(2), range(3), range(3)):
        other = x[b].clone()
        other[i] = y
        ratio = p[(b, *other.tolist())] / p[(b, *x[b].tolist())]
        assert float(out[b, i, y]) == pytest.approx(math.log(ratio), abs=1e-12)


def test_a_marginal_of_rounded_transitions_is_not_below_nothing(ref: Any) -> None:
    """What a matrix exponential rounds to -1e-17 is nothing, and its logarithm a number or -inf."""
    graph = ref.absorbing_matrix(4, 1)
    exact: Any = graph.exp
    graph.exp = lambda sigma: exact(sigma) - 1e-17 * (exact(sigma) < 1e-9)
    p0 = torch.zeros(5, 5, dtype=torch.float64)
    p0[0, 0] = 1.0
    sigma = torch.tensor([0.3, 2.0], dtype=torch.float64)
    assert (transitions(graph, sigma) < 0).any()
    assert (marginal(p0, graph, sigma) >= 0).all()
    assert not score_of_law(p0, graph)(torch.tensor([[0, 1], [1, 1]]), sigma).isnan().any()


def test_rows_are_spread_in_float64() -> None:
    row: Any = SimpleNamespace(base=torch.tensor([0.5, 0.25]), index=torch.tensor([[1], [0]]), value=torch.ones(2, 1))
    full = dense(row, 3)
    assert full.dtype == torch.float64
    assert full.tolist() == [[0.5, 1.0, 0.5], [1.0, 0.25, 0.25]]


def test_a_run_that_draws_nothing_keeps_its_rows() -> None:
    """Of draws and of flips, with a probability for each sequence or each position; then it goes where it is told."""
    x, told = torch.tensor([[0, 1], [2, 1]]), torch.tensor([[2, 2], [0, 0]])
    run = Enumerating(lambda x, sigma: torch.zeros(*x.shape, 3), Replacing(3), lambda t: (t, t), x, [told])
    where = torch.tensor([[True, False], [True, True]])
    assert run.flip(x, where, 2, torch.tensor([0.25, 0.5], dtype=torch.float64)) is told
    assert run.flip(x, where, 2, torch.tensor([[0.25, 0.5], [0.5, 0.125]], dtype=torch.float64)) is x
    assert run.draws[0].tolist() == [[[0.75, 0.0, 0.25], [0.0, 1.0, 0.0]], [[0.0, 0.0, 1.0], [0.0, 0.5, 0.5]]]
    assert run.draws[1].tolist() == [[[0.75, 0.0, 0.25], [0.0, 1.0, 0.0]], [[0.0, 0.0, 1.0], [0.0, 0.875, 0.125]]]
    weights = torch.tensor([[3.0, -1.0, 1.0], [0.0, 1.0, 0.0], [1.0, 1.0, 2.0]], dtype=torch.float64)
    out = run.redraw(x, torch.ones(2), where, lambda log_score, x, b, i: weights)
    assert out is x
    assert run.draws[2].tolist() == [[[0.75, 0.0, 0.25], [0.0, 1.0, 0.0]], [[0.0, 1.0, 0.0], [0.25, 0.25, 0.5]]]


class Rotating:
    """Draws so many times in a step, each time surely the next state."""

    def __init__(self, draws: int) -> None:
        self.draws = draws

    def __call__(self, reverse: Reverse, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        for _ in range(self.draws):
            where = torch.ones_like(x, dtype=torch.bool)
            x = reverse.redraw(
                x, t, where, lambda log_score, y, b, i: torch.nn.functional.one_hot((y + 1) % 3, 3).double()
            )
        return x


@pytest.mark.parametrize("draws", [1, 2])
def test_a_chain_is_followed_through_all_its_draws(draws: int) -> None:
    pairs, start = Pairs(Replacing(3)), torch.zeros(9, dtype=torch.float64)
    start[1] = 1.0  # (0, 1)
    times = torch.tensor([1.0, 0.6, 0.2], dtype=torch.float64)
    law = law_of_chain(pairs, lambda t: (t, t), Rotating(draws), times, start)
    expected = torch.zeros(9, dtype=torch.float64)
    expected[{1: 2 * 3 + 0, 2: 1 * 3 + 2}[draws]] = 1.0  # each two times on, or four
    torch.testing.assert_close(law, expected)
    for wrong in (0, 3):
        with pytest.raises(ValueError, match=rf"this one makes {wrong}$"):
            law_of_chain(pairs, lambda t: (t, t), Rotating(wrong), times, start)


def test_frequencies_are_of_the_first_token_and_then_the_second() -> None:
    """Five due count by themselves; below, together."""
    law = torch.tensor([0.45, 0.05, 0.45, 0.05], dtype=torch.float64)

    def draws(*counts: int) -> Tensor:
        cell = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
        return torch.stack([cell // 2, cell % 2], 1)

    for counts, told in (
        ((60, 0, 40, 0), r"15\.6 on 3 degrees of freedom, p = 1\.4e-03"),
        ((20, 5, 70, 5), r"27\.8 on 3 degrees of freedom, p = 4\.0e-06; total variation 0\.2500 from 100 samples"),
    ):
        if "e-03" in told:
            check_frequencies(draws(*counts), law, "draws")
        else:
            with pytest.raises(AssertionError, match=told):
                check_frequencies(draws(*counts), law, "draws")
    with pytest.raises(AssertionError, match="on 2 degrees of freedom"):  # 4.95 are due, twice
        check_frequencies(draws(19, 5, 70, 5), law, "draws")


class Seen:
    """Notes the steps that it is asked for, and makes Tweedie's."""

    def __init__(self) -> None:
        self.steps, self.shapes, self.given = list[tuple[float, float]](), set[tuple[int, ...]](), list[Tensor]()

    def __call__(self, reverse: Reverse, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        self.steps.append((round(float(t[0]), 9), round(float(s[0]), 9)))
        self.shapes.add(tuple(x.shape))
        self.given.append(reverse.frozen.clone())
        return Tweedie()(reverse, x, t, s)


def grid(steps: int, t_min: float) -> list[tuple[float, float]]:
    times = [round(1 + (t_min - 1) * k / steps, 9) for k in range(steps + 1)]
    return list(itertools.pairwise(times))


@pytest.mark.parametrize(
    ("law", "steps", "shapes"),
    [
        (testing.given_positions_stay, grid(4, 0.05), {(3, 2)}),
        (testing.samples_depend_on_their_seed_alone, 3 * grid(4, 0.05), {(40, 2), (1, 2), (2, 2)}),
        (testing.states_are_left_alone, [(0.9, 0.3)], {(50, 2)}),
        (testing.samples_follow_the_chain, 2 * grid(3, 0.1), {(16, 2), (20_000, 2)}),
        (testing.samples_reach_the_law, grid(9, 0.02), {(70, 2)}),
    ],
)
def test_a_law_of_methods_makes_these_steps(ref: Any, law: Any, steps: Any, shapes: Any) -> None:
    method, fewer = Seen(), {"steps": 9, "t_min": 0.02, "count": 70} if law is testing.samples_reach_the_law else {}
    law(method, Masking(4, 3), ref.Linear(9.0), **fewer)
    assert method.steps == steps
    assert method.shapes == shapes
    if law is testing.given_positions_stay:
        assert all(given.tolist() == [[True, False]] * 3 for given in method.given)


def test_an_order_is_measured_at_three_numbers_of_steps(ref: Any) -> None:
    method = Seen()
    testing.chain_has_order(method, Replacing(3), ref.Linear(2.0), order=1, steps=4)
    assert method.steps == grid(4, 0.1) + grid(8, 0.1) + grid(16, 0.1)


@pytest.mark.parametrize(("units", "told"), [(0.49, "only 0.49 units"), (0.51, None), (1.49, None), (1.51, "1.51 uni")])
def test_from_half_a_unit_to_one_and_a_half_may_be_held(units: float, told: str | None) -> None:
    """By a method that makes so much in each of two steps, of 8 sequences of 512."""
    seen = list[Any]()

    def holding(reverse: Reverse, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        seen.append((tuple(x.shape), round(float(t[0]), 9), round(float(s[0]), 9)))
        del seen[9:]
        torch.empty(round(units * x.numel()), 4096)
        return x

    if told is None:
        testing.little_is_held(holding, Masking(4096, 4095), lambda t: (9 * t, 9 + 0 * t))
    else:
        with pytest.raises(AssertionError, match=told):
            testing.little_is_held(holding, Masking(4096, 4095), lambda t: (9 * t, 9 + 0 * t))
    assert seen == [((8, 512), 1.0, 0.6), ((8, 512), 0.6, 0.2)]


def test_a_unit_is_64_mb_at_least() -> None:
    free = lambda t: (9 * t, 9 + 0 * t)  # noqa: E731
    with pytest.raises(ValueError, match="a unit of 67092480 bytes is too small beside pieces of 4 MB"):
        testing.little_is_held(Tweedie(), Masking(4095, 0), free)
    with pytest.raises(ValueError, match="a unit of 33554432 bytes"):
        testing.little_is_held(Tweedie(), Masking(4096, 0), free, batch=4)
    with pytest.raises(ValueError, match="a unit of 16777216 bytes"):
        testing.little_is_held(Tweedie(), Masking(4096, 0), free, length=128)


def test_an_answer_that_allocates_no_more_than_itself() -> None:
    """Rows at the positions asked for, float32, all alike."""
    where = torch.tensor([[True, False], [True, True]])
    out = memory.an_answer(Masking(7, 2))(torch.zeros(2, 2).long(), torch.ones(2), where=where)
    assert out.dtype == torch.float32
    assert torch.equal(out, torch.zeros(3, 7))


def test_memory_is_counted_of_every_tensor_that_is_made() -> None:
    """Of two at once, too; a storage that another has is no new one; beyond what was made before, nothing."""
    before = torch.zeros(500)
    with testing.Peak() as meter:
        before.view(5, 100)
        assert meter.peak == 0
        values, order = torch.zeros(100).sort()
        assert meter.peak == 400 + 400 + 800
        del values, order
        torch.zeros(50)
        assert meter.peak == 1600
        kept = [torch.zeros(400) for _ in range(2)]
        assert meter.peak == 3200
        kept[0].add_(1.0)
        assert meter.peak == 3200
    assert testing.units_held(lambda: torch.zeros(3, 5, 7), (3, 5, 7)) == 1.0
    assert testing.units_held(lambda: torch.zeros(3, 5, 7).double(), (3, 5, 7)) == 3.0
    assert testing.units_held(lambda: None, (3, 5, 7)) == 0.0


def test_what_is_let_go_is_counted_once_however_often_it_was_written_to() -> None:
    """What tensors of one storage hold is let go with the last of them."""
    with testing.Peak() as meter:
        one = torch.zeros(100)
        one.add_(1.0).mul_(2.0)
        other = one.detach()
        other.sub_(1.0)
        del one
        two = torch.zeros(100)
        assert meter.peak == 800
        del other, two
        three = torch.zeros(300)
        assert meter.peak == 1200
    assert len(three) == 300


def test_a_scheduler_is_called_as_diffusers_call_it() -> None:
    """From the prior, at each of its timesteps with what a network would have said, and the run's generator."""
    seen, generator = list[Any](), torch.Generator().manual_seed(3)

    class Stepping:
        timesteps = torch.tensor([30, 10])

        def set_timesteps(self, steps: int) -> None:
            seen.append(steps)

        def step(self, said: Tensor, timestep: Tensor, x: Tensor, generator: Any) -> Any:
            seen.append((said, int(timestep), x, generator))
            return SimpleNamespace(prev_sample=(x + 1) % 3 if timestep == 30 else x)

    graph, asked = Replacing(3), list[Any]()
    exact = Pairs(graph).score

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        asked.append((x, sigma))
        out: Tensor = exact(x, sigma.double())
        return out

    level = lambda step: step / 100  # noqa: E731
    x = scheduled(Stepping(), 2, level=level, output=lambda p: p.transpose(1, 2))(score, graph, (5, 2), generator)
    assert seen[0] == 2
    (first, early, begin, one), (second, late, middle, other) = seen[1:]
    assert (early, late) == (30, 10)
    assert one is other is generator
    draws = torch.multinomial(torch.full((3,), 1 / 3).double(), 10, replacement=True,
                              generator=torch.Generator().manual_seed(3))  # fmt: skip
    assert torch.equal(begin, draws.view(5, 2))
    assert torch.equal(middle, (begin + 1) % 3)
    assert torch.equal(x, middle)
    assert [states.tolist() for states, _ in asked] == [begin.tolist(), middle.tolist()]
    for (_, sigma), expected in zip(asked, (0.3, 0.1), strict=True):
        torch.testing.assert_close(sigma, torch.full((5,), expected, dtype=sigma.dtype))
    for said in (first, second):
        assert said.shape == (5, 3, 2)
        torch.testing.assert_close(said.sum(1), torch.ones(5, 2, dtype=said.dtype))


def test_a_scheduler_may_answer_by_a_tuple_and_count_in_plain_numbers() -> None:
    class Stepping:
        timesteps = (3, 1)

        def set_timesteps(self, steps: int) -> None:
            assert steps == 2

        def step(self, said: Tensor, timestep: int, x: Tensor, generator: Any) -> Any:
            return 0 * x + timestep, said

    sampler = scheduled(Stepping(), 2, level=lambda step: step / 4)
    x = sampler(Pairs(Replacing(4)).score, Replacing(4), (3, 2), torch.Generator())
    assert x.tolist() == [[1, 1]] * 3


@pytest.mark.parametrize("law", testing.SCORE_LAWS, ids=lambda law: law.__name__)
def test_a_network_of_tokens_that_do_not_depend_on_each_other_obeys(law: Any) -> None:
    """Of a token under absorption it says nothing, and no law asks it to."""
    graph, table = Masking(5, 4), torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    score = from_logits(lambda x, sigma: table[: x.shape[1]].expand(len(x), -1, -1), graph)
    law(score, graph)
