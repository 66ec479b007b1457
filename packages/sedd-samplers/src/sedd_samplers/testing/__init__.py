"""Laws that a score model, a method and a scheduler must obey, to run on your own.

    import pytest
    from sedd_samplers.testing import METHOD_LAWS, SCORE_LAWS

    @pytest.mark.parametrize("law", SCORE_LAWS, ids=lambda law: law.__name__)
    def test_score(law):
        law(my_score, my_graph)

    @pytest.mark.parametrize("law", METHOD_LAWS, ids=lambda law: law.__name__)
    def test_method(law):
        law(MyMethod(), my_graph, my_noise)

A law raises an `AssertionError` that says what is wrong. Laws of methods enumerate pairs of tokens, under a graph of at
most 8 states. What is drawn is compared by chi-square tests at fixed seeds, each of which fails what is right once in
100,000 (`ALARM`). Of a method's order, and of a score whose law is known, more is asked:

    chain_has_order(MyMethod(), my_graph, my_noise, order=2)
    score_is_that_of(p0, my_score, my_graph)                                  # p0 (N, ..., N), enumerated
    sampler_reaches_the_law(scheduled(my_scheduler, 100, level=...), my_graph)   # in the manner of diffusers
    little_is_held(MyMethod(), my_large_graph, my_noise)                      # memory beside the network's answer
"""

from __future__ import annotations

from collections.abc import Callable

from ._enumerated import ALARM
from .memory import Peak, little_is_held, units_held
from .methods import (
    chain_has_order,
    given_positions_stay,
    samples_depend_on_their_seed_alone,
    samples_follow_the_chain,
    samples_reach_the_law,
    states_are_left_alone,
)
from .schedulers import Sampler, sampler_reaches_the_law, scheduled
from .scores import (
    posterior_is_a_distribution,
    rows_are_those_of_the_whole,
    score_is_consistent,
    score_is_that_of,
    sequences_are_answered_one_by_one,
)

__all__ = [
    "ALARM",
    "SCORE_LAWS",
    "METHOD_LAWS",
    "sequences_are_answered_one_by_one",
    "rows_are_those_of_the_whole",
    "score_is_consistent",
    "posterior_is_a_distribution",
    "score_is_that_of",
    "given_positions_stay",
    "samples_depend_on_their_seed_alone",
    "states_are_left_alone",
    "samples_follow_the_chain",
    "samples_reach_the_law",
    "chain_has_order",
    "Sampler",
    "scheduled",
    "sampler_reaches_the_law",
    "Peak",
    "units_held",
    "little_is_held",
]

SCORE_LAWS: tuple[Callable[..., None], ...] = (
    sequences_are_answered_one_by_one,
    rows_are_those_of_the_whole,
    score_is_consistent,
    posterior_is_a_distribution,
)
"""All laws of scores that take the score and the graph alone."""

METHOD_LAWS: tuple[Callable[..., None], ...] = (
    given_positions_stay,
    samples_depend_on_their_seed_alone,
    states_are_left_alone,
    samples_follow_the_chain,
    samples_reach_the_law,
)
"""All laws of methods that take the method, the graph and the schedule alone."""
