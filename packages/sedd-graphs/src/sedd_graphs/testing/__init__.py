"""The laws that every graph and every schedule must obey, to run on your own.

    import pytest
    from sedd_graphs.testing import GRAPH_LAWS

    @pytest.mark.parametrize("law", GRAPH_LAWS, ids=lambda law: law.__name__)
    def test_law(law):
        law(MyGraph(num_states=7))

A law takes the graph and raises an `AssertionError` that says what is wrong. It relies on methods and on the fields
of rows alone, so that a graph need not inherit anything. The graph must be small (up to 64 states): laws build Q from
its rates and compare with `torch.matrix_exp` in float64; `single_precision_agrees_with_double` alone takes any size.
While a law runs, torch's default dtype is float64, in which a graph's rates then come.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sedd_graphs.testing.chains import (
    detailed_balance_carries_over,
    posterior_is_bayes_rule,
    prior_is_the_image_of_uniform_tokens,
    prior_is_the_limit,
    prior_kl_is_the_divergence,
    propagate_is_the_exponential,
    rates_form_a_generator,
    ratios_are_quotients_of_transitions,
    transitions_are_probabilities,
    transitions_are_the_exponential,
    transitions_compose,
    transitions_follow_kolmogorov,
    tweedie_is_bayes_rule,
)
from sedd_graphs.testing.contracts import (
    bad_input_is_refused,
    every_position_has_its_own_noise,
    no_positions_give_no_rows,
    noise_per_position_is_noise_per_sequence,
    rows_are_well_formed,
    single_precision_agrees_with_double,
)
from sedd_graphs.testing.draws import (
    prior_samples_follow_the_limit,
    samples_are_independent,
    samples_follow_the_transition,
)
from sedd_graphs.testing.schedules import (
    bad_times_are_refused,
    dsigma_is_the_derivative,
    inverse_returns_to_the_time,
    schedules_agree_in_single_precision,
    schedules_keep_shapes,
    sigma_increases,
)

__all__ = [
    "GRAPH_LAWS",
    "NOISE_LAWS",
    "rates_form_a_generator",
    "rows_are_well_formed",
    "transitions_are_the_exponential",
    "transitions_are_probabilities",
    "transitions_compose",
    "transitions_follow_kolmogorov",
    "ratios_are_quotients_of_transitions",
    "propagate_is_the_exponential",
    "samples_follow_the_transition",
    "samples_are_independent",
    "prior_is_the_image_of_uniform_tokens",
    "prior_is_the_limit",
    "prior_samples_follow_the_limit",
    "prior_kl_is_the_divergence",
    "posterior_is_bayes_rule",
    "tweedie_is_bayes_rule",
    "detailed_balance_carries_over",
    "noise_per_position_is_noise_per_sequence",
    "every_position_has_its_own_noise",
    "no_positions_give_no_rows",
    "single_precision_agrees_with_double",
    "bad_input_is_refused",
    "dsigma_is_the_derivative",
    "sigma_increases",
    "inverse_returns_to_the_time",
    "schedules_agree_in_single_precision",
    "schedules_keep_shapes",
    "bad_times_are_refused",
]

GRAPH_LAWS: tuple[Callable[[Any], None], ...] = (
    rates_form_a_generator,
    rows_are_well_formed,
    transitions_are_the_exponential,
    transitions_are_probabilities,
    transitions_compose,
    transitions_follow_kolmogorov,
    ratios_are_quotients_of_transitions,
    propagate_is_the_exponential,
    samples_follow_the_transition,
    samples_are_independent,
    prior_is_the_image_of_uniform_tokens,
    prior_is_the_limit,
    prior_samples_follow_the_limit,
    prior_kl_is_the_divergence,
    posterior_is_bayes_rule,
    tweedie_is_bayes_rule,
    detailed_balance_carries_over,
    noise_per_position_is_noise_per_sequence,
    every_position_has_its_own_noise,
    no_positions_give_no_rows,
    single_precision_agrees_with_double,
    bad_input_is_refused,
)
"""All laws of graphs."""

NOISE_LAWS: tuple[Callable[[Any], None], ...] = (
    dsigma_is_the_derivative,
    sigma_increases,
    inverse_returns_to_the_time,
    schedules_agree_in_single_precision,
    schedules_keep_shapes,
    bad_times_are_refused,
)
"""All laws of schedules."""
