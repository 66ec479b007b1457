"""The importable laws pass for what is right, and each of them fails something that is wrong in just that way."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sedd_samplers import Euler, Remasking, Reverse, TauLeaping, Trapezoidal, Tweedie, Unmasking, capped, testing
from sedd_samplers.adapters import from_logits
from sedd_samplers.adapters.processes import Masking, Proportional, Replacing
from sedd_samplers.testing import METHOD_LAWS, SCORE_LAWS, scheduled
from sedd_samplers.testing._enumerated import Pairs, check_frequencies
from torch import Tensor

GRAPHS: dict[str, Callable[[Any], Any]] = {
    "absorbing": lambda ref: Masking(4, 3),
    "mask amid the tokens": lambda ref: Masking(4, 1),
    "uniform": lambda ref: Replacing(3),
    "hybrid": lambda ref: ref.hybrid_matrix(3),
    "ordinal": lambda ref: ref.ordinal_matrix(4),
    "cycle": lambda ref: ref.cycle_matrix(3),
}


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("law", SCORE_LAWS, ids=lambda law: law.__name__)
def test_an_exact_score_obeys(ref: Any, law: Any, name: str) -> None:
    graph = GRAPHS[name](ref)
    law(Pairs(graph).score, graph, length=2)


def test_a_network_obeys_and_is_not_consistent(ref: Any) -> None:
    """One of logits that were never trained: no ratios of any law."""
    graph, table = Masking(5, 4), torch.randn(5, 5, generator=torch.Generator().manual_seed(0))

    def logits(x: Tensor, sigma: Tensor, where: Tensor | None = None) -> Tensor:
        out = table[x] + (table[x].sum(1, keepdim=True) - table[x]).cos() * torch.arange(x.shape[1])[:, None]
        return out if where is None else out[where]

    score = from_logits(logits, graph)
    for law in SCORE_LAWS:
        if law is not testing.score_is_consistent:
            law(score, graph)
    with pytest.raises(AssertionError, match="two changes in either order"):
        testing.score_is_consistent(score, graph)


def broken_batch(score: Any) -> Any:
    return lambda x, sigma: score(x, sigma.mean().expand_as(sigma))


def broken_shape(score: Any) -> Any:
    return lambda x, sigma: score(x, sigma)[..., :-1]


def broken_input(score: Any) -> Any:
    def writes(x: Tensor, sigma: Tensor) -> Tensor:
        out: Tensor = score(x, sigma)
        x[:, 0] = 0
        return out

    return writes


def broken_number(score: Any) -> Any:
    return lambda x, sigma: score(x, sigma).masked_fill((sigma < 0.1)[:, None, None], torch.nan)


def broken_rows(score: Any) -> Any:
    def flipped(x: Tensor, sigma: Tensor, where: Tensor | None = None) -> Tensor:
        out: Tensor = score(x, sigma)
        return out if where is None else out[where].flip(0)

    return flipped


def broken_ratio(score: Any) -> Any:
    return lambda x, sigma: score(x, sigma) + 0.05 * x.sum(1)[:, None, None] * torch.arange(2)[:, None]


def broken_scale(score: Any) -> Any:
    return lambda x, sigma: score(x, sigma) + 0.1


@pytest.mark.parametrize(
    ("law", "broken", "told"),
    [
        ("sequences_are_answered_one_by_one", broken_batch, "alone and in its batch"),
        ("sequences_are_answered_one_by_one", broken_shape, r"expected \(4, 2, N\), got \(4, 2, 3\)"),
        ("sequences_are_answered_one_by_one", broken_input, "wrote into its input"),
        ("sequences_are_answered_one_by_one", broken_number, "NaN where the reverse process can move"),
        ("rows_are_those_of_the_whole", broken_rows, "the rows at where, and those of the whole"),
        ("score_is_consistent", broken_ratio, "two changes in either order"),
        ("posterior_is_a_distribution", broken_scale, "the posterior gives the mask"),
    ],
)
def test_a_law_of_scores_fails_what_breaks_it(law: str, broken: Any, told: str) -> None:
    graph = Masking(4, 3)
    with pytest.raises(AssertionError, match=told):
        getattr(testing, law)(broken(Pairs(graph).score), graph, length=2)


def test_where_tokens_are_noised_a_change_is_undone_and_a_posterior_not_negative() -> None:
    graph = Replacing(3)
    score = Pairs(graph).score
    with pytest.raises(AssertionError, match="a change and its undoing"):
        testing.score_is_consistent(broken_scale(score), graph, length=2)
    with pytest.raises(AssertionError, match="the posterior has an entry of -"):
        testing.posterior_is_a_distribution(lambda x, sigma: 3 * score(x, sigma), graph, length=2)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_score_is_that_of_its_law_and_of_no_other(ref: Any, name: str) -> None:
    graph = GRAPHS[name](ref)
    pairs = Pairs(graph)
    testing.score_is_that_of(pairs.p0, pairs.score, graph)
    other = pairs.p0 * torch.linspace(1, 1.2, graph.num_states, dtype=torch.float64)
    with pytest.raises(
        AssertionError, match=r"the log-score at sigma = 0\.05 and that of p0: they differ by up to 0\."
    ):
        testing.score_is_that_of(other, pairs.score, graph)


METHODS = [
    ("absorbing", Tweedie()),
    ("mask amid the tokens", Euler()),
    ("absorbing", Unmasking()),
    ("absorbing", Remasking(capped(0.2))),
    ("uniform", Tweedie()),
    ("hybrid", TauLeaping()),
    ("ordinal", Trapezoidal()),
]


@pytest.mark.parametrize(("name", "method"), METHODS)
@pytest.mark.parametrize("law", METHOD_LAWS, ids=lambda law: law.__name__)
def test_our_methods_obey(ref: Any, law: Any, name: str, method: Any) -> None:
    graph = GRAPHS[name](ref)
    noise = ref.Linear(8.0 if name != "ordinal" else 10.0)
    if law is testing.samples_follow_the_chain:
        if isinstance(method, Unmasking):
            pytest.skip("it decides who moves by numbers of its own")
        noise = ref.Linear(2.0)
    if law is testing.samples_reach_the_law and isinstance(method, Remasking):
        pytest.skip("it does not converge")
    law(method, graph, noise)


@dataclass(frozen=True)
class Wrong:
    """Tweedie with one thing wrong."""

    how: str

    def __call__(self, reverse: Reverse, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        if self.how == "moves what is given":
            free = Reverse(reverse.score, reverse.graph, reverse.noise, frozen=torch.zeros_like(reverse.frozen),
                           seeds=torch.arange(len(x)))  # fmt: skip
            out = Tweedie()(free, torch.where(reverse.frozen, 2, x), t, s)
            masked: Tensor = out == 3
            return torch.where(masked, x, out)
        if self.how == "draws from the global generator":
            shown: Tensor = x != 3
            return torch.where(shown | reverse.frozen | (torch.rand(x.shape) < 0.5), x, 0)
        if self.how == "writes into its states":
            x[:] = Tweedie()(reverse, x, t, s)
            return x
        if self.how == "draws something else than its rows":
            out = Tweedie()(reverse, x, t, s)
            return torch.where((out == 1) & (x != 1) & ~reverse.frozen, 0, out)
        if self.how == "takes half of the noise away":
            return Tweedie()(reverse, x, t, (t + s) / 2)
        raise AssertionError


@pytest.mark.parametrize(
    ("law", "how", "told"),
    [
        ("given_positions_stay", "moves what is given", r"given tokens \[0, 1, 2\] became"),
        ("samples_depend_on_their_seed_alone", "draws from the global generator", "depend on the batch"),
        ("states_are_left_alone", "writes into its states", "wrote into the states that it was given"),
        ("samples_follow_the_chain", "draws something else than its rows", "three steps, and the law of their rows"),
        ("samples_reach_the_law", "draws something else than its rows", "100 steps, and the law of the data"),
    ],
)
def test_a_law_of_methods_fails_what_breaks_it(ref: Any, law: str, how: str, told: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(AssertionError, match=told):
        getattr(testing, law)(Wrong(how), Masking(4, 3), ref.Linear(4.0))


@pytest.mark.parametrize(("method", "order"), [(Euler(), 1), (Tweedie(), 1), (TauLeaping(), 1), (Trapezoidal(), 1.75)])
def test_orders_are_measured(ref: Any, method: Any, order: float) -> None:
    """Second order is had where tokens depend on each other mildly; these do more, and it is 1.71 and 1.57 here."""
    testing.chain_has_order(method, Replacing(3), ref.Linear(2.0), order=order, steps=8)
    with pytest.raises(AssertionError, match="the error falls with the orders"):
        testing.chain_has_order(method, Replacing(3), ref.Linear(2.0), order=order + 0.5, steps=8)


def test_an_order_is_lost_by_a_step_that_goes_half_way(ref: Any) -> None:
    with pytest.raises(AssertionError, match="the error falls with the orders"):
        testing.chain_has_order(Wrong("takes half of the noise away"), Replacing(3), ref.Linear(2.0), order=1, steps=8)


def test_a_method_of_many_draws_cannot_be_enumerated_and_is_told_so(ref: Any) -> None:
    thrice = lambda reverse, x, t, s: [x := Tweedie()(reverse, x, t, s) for _ in range(3)][-1]  # noqa: E731
    with pytest.raises(ValueError, match=r"one or two draws a step by Reverse\.redraw, this one makes 3"):
        testing.samples_follow_the_chain(thrice, Replacing(3), ref.Linear(2.0))


class Scheduler:
    """In the manner of diffusers, for masks: the share of masks is the timestep over the number of steps."""

    def __init__(self, wrong: str = "") -> None:
        self.wrong = wrong

    def set_timesteps(self, num_inference_steps: int) -> None:
        self.num = num_inference_steps
        self.timesteps = torch.arange(num_inference_steps, 0, -1)

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, generator: Any = None) -> Any:
        p = model_output.softmax(-1)
        if self.wrong == "likeliest":
            p = torch.nn.functional.one_hot(p.argmax(-1), p.shape[-1]).float()
        token = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view_as(sample)
        shows = torch.rand(sample.shape, generator=generator) < 1 / timestep
        if self.wrong == "leaves masks":
            shows &= timestep > 1
        out = torch.where((sample == 3) & shows, token, sample)
        return (out,) if self.wrong == "tuple" else SimpleNamespace(prev_sample=out)


@pytest.mark.parametrize("wrong", ["", "tuple", "likeliest", "leaves masks"])
def test_a_scheduler_s_samples_have_the_law_or_it_is_told(wrong: str) -> None:
    """100 steps, a mask of k coming to light with 1 / k."""
    noise, steps = Proportional(1e-6), 100
    sampler = scheduled(Scheduler(wrong), steps, level=lambda step: noise((step / steps).double())[0])
    if wrong in ("", "tuple"):
        testing.sampler_reaches_the_law(sampler, Masking(4, 3))
    else:
        told = {"likeliest": "samples, and the law of the data", "leaves masks": "a mask is left"}[wrong]
        with pytest.raises(AssertionError, match=told):
            testing.sampler_reaches_the_law(sampler, Masking(4, 3))


def test_the_chi_square_test_alarms_at_its_rate() -> None:
    """p below .01 comes in one of a hundred true draws: 8 to 34 of 2000, all but once in 10,000."""
    law = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    generator, alarms = torch.Generator().manual_seed(0), 0
    import sedd_samplers.testing._enumerated as enumerated

    before = enumerated.ALARM
    enumerated.ALARM = 0.01
    try:
        for _ in range(2000):
            cell = torch.multinomial(law, 500, replacement=True, generator=generator)
            try:
                check_frequencies(torch.stack([cell // 2, cell % 2], 1), law, "draws")
            except AssertionError:
                alarms += 1
    finally:
        enumerated.ALARM = before
    assert 8 <= alarms <= 34
    with pytest.raises(AssertionError, match=r"the state \(1, 1\) came, which cannot be"):
        check_frequencies(torch.ones(3, 2).long(), torch.tensor([1.0, 0, 0, 0]).double(), "draws")


def test_a_graph_of_many_states_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 8 states, to enumerate pairs, got 9"):
        testing.samples_reach_the_law(Tweedie(), Replacing(9), Proportional())


def test_numbers_unless_told_otherwise() -> None:
    numbers: dict[Any, dict[str, Any]] = {
        testing.sequences_are_answered_one_by_one: {"length": 6, "tolerance": 1e-4},
        testing.rows_are_those_of_the_whole: {"length": 6, "tolerance": 1e-4},
        testing.score_is_consistent: {"length": 4, "tolerance": 1e-3},
        testing.posterior_is_a_distribution: {"length": 6, "tolerance": 1e-3},
        testing.score_is_that_of: {"tolerance": 1e-3},
        testing.samples_follow_the_chain: {"count": 20_000},
        testing.chain_has_order: {"steps": 16},
        testing.samples_reach_the_law: {"steps": 100, "t_min": 1e-3, "count": 4000},
        testing.sampler_reaches_the_law: {"count": 4000},
        testing.little_is_held: {"batch": 8, "length": 512},
        scheduled: {"output": torch.log},
    }
    for law, expected in numbers.items():
        given = inspect.signature(law).parameters.values()
        assert {p.name: p.default for p in given if p.default is not inspect.Parameter.empty} == expected, law
    assert testing.ALARM == 1e-5


def test_memory_is_counted_by_the_byte() -> None:
    """What is made and let go again, views for nothing, a storage once."""
    with testing.Peak() as memory:
        one = torch.zeros(1000)
        assert memory.peak == 4000
        view = one[10:].view(-1, 1)
        two = torch.zeros(300, dtype=torch.float64)
        assert memory.peak == 6400
        del one
        three = torch.zeros(500)
        assert memory.peak == 8400  # the view holds what it is of
        del view, two
        four = torch.zeros(1600)
        assert memory.peak == 8400
    assert len(three) + len(four) == 2100
    assert testing.units_held(lambda: torch.zeros(6, 10), (3, 4, 5)) == 1.0
    assert testing.units_held(lambda: [torch.zeros(30), torch.zeros(60)], (3, 4, 5)) == 1.5


def test_frequencies_of_what_is_rare_are_counted_together() -> None:
    """100 draws of which two states are due 2 each: ten of either are four too many, and told; at 4 and 0 nothing."""
    law = torch.tensor([0.48, 0.48, 0.02, 0.02], dtype=torch.float64)

    def draws(*counts: int) -> Tensor:
        cell = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
        return torch.stack([cell // 2, cell % 2], 1)

    check_frequencies(draws(48, 48, 4, 0), law, "draws")
    check_frequencies(draws(48, 48, 2, 2), 7 * law, "draws")
    with pytest.raises(AssertionError, match=r"draws: chi-square 26\.0 on 2 degrees of freedom.* variation 0\.1000 fr"):
        check_frequencies(draws(43, 43, 14, 0), law, "draws")
    with pytest.raises(AssertionError, match="on 1 degrees of freedom"):
        check_frequencies(draws(90, 10, 0, 0), torch.tensor([0.5, 0.5, 0, 0]).double(), "draws")


def test_a_law_of_scores_asks_for_what_it_says() -> None:
    """Two positions of three tokens are 9 states; 4096 are enumerated, and no more."""
    graph = Replacing(3)
    pairs = Pairs(graph)

    def too_few(x: Tensor, sigma: Tensor, where: Tensor | None = None) -> Tensor:
        return torch.zeros(*x.shape, 3) if where is None else torch.zeros(int(where.sum()), 2)

    with pytest.raises(AssertionError, match=r"p0 must have 3 entries an axis, got \(3, 2\)"):
        testing.score_is_that_of(pairs.p0[:, :2], pairs.score, graph)
    with pytest.raises(AssertionError, match="p0 has 6561 states, more than the 4096"):
        testing.score_is_that_of(torch.ones((3,) * 8), pairs.score, graph)
    with pytest.raises(AssertionError, match="floating point, got torch"):
        testing.sequences_are_answered_one_by_one(lambda x, sigma: torch.zeros(*x.shape, 3).long(), graph)
    with pytest.raises(AssertionError, match="an infinite log-score where"):
        testing.sequences_are_answered_one_by_one(lambda x, sigma: torch.full((*x.shape, 3), torch.inf), graph)
    with pytest.raises(AssertionError, match=r"expected \(\d+, 3\) rows at where, got \(\d+, 2\)"):
        testing.rows_are_those_of_the_whole(too_few, graph)
    narrow = lambda x, sigma: torch.zeros(*x.shape, 3)  # noqa: E731
    testing.sequences_are_answered_one_by_one(narrow, graph)


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (lambda shape: torch.zeros(shape[0], 3).long(), r"expected samples of shape \(4000, 2\), got \(4000, 3\)"),
        (lambda shape: torch.zeros(shape), "samples are int64 states, got torch.float32"),
        (lambda shape: torch.full(shape, 4), r"a sample holds a state outside 0\.\.3"),
        (lambda shape: torch.full(shape, -1), r"a sample holds a state outside 0\.\.3"),
        (lambda shape: torch.full(shape, 3), "a mask is left in a sample"),
    ],
)
def test_samples_are_tokens_of_the_shape_that_was_asked_for(made: Any, told: str) -> None:
    with pytest.raises(AssertionError, match=told):
        testing.sampler_reaches_the_law(lambda score, graph, shape, generator: made(shape), Masking(4, 3))
