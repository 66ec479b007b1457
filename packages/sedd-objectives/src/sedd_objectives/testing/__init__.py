"""The laws that a loss and a bound must obey, to run on your own; and an audit of a bound on a model and data.

    import pytest
    from sedd_objectives.testing import BOUND_LAWS, LOSS_LAWS

    @pytest.mark.parametrize("law", LOSS_LAWS, ids=lambda law: law.__name__)
    def test_law(law):
        law(my_loss, MyGraph(num_states=4), my_noise)

A law takes the loss or bound, a graph of a few states and a schedule, and raises an `AssertionError` that says what is
wrong. A loss is called as `loss(score, graph, noise, x0, t, generator=)` and returns (B,) nats a sequence, the
integrand of eq. 10 at the times t (B,); a bound as `bound(score, graph, noise, x0, generator=)`, and it returns an
object with `value` and `standard_error`, (B,). Functions with other arguments are adapted by a lambda. What they should
be is enumerated from the graph's rows in float64; draws are compared at 4.5 standard errors, a false alarm in 150,000
comparisons.
"""

from __future__ import annotations

from collections.abc import Callable

from .audit import Audit, Mistake, audit_bound
from .bounds import (
    bound_is_not_below_its_terms,
    bound_of_the_exact_score_is_the_entropy,
    standard_error_is_the_spread,
)
from .losses import loss_is_least_at_the_true_score, loss_is_the_enumerated_integrand

__all__ = [
    "LOSS_LAWS",
    "BOUND_LAWS",
    "loss_is_the_enumerated_integrand",
    "loss_is_least_at_the_true_score",
    "bound_of_the_exact_score_is_the_entropy",
    "bound_is_not_below_its_terms",
    "standard_error_is_the_spread",
    "audit_bound",
    "Audit",
    "Mistake",
]

LOSS_LAWS: tuple[Callable[..., None], ...] = (loss_is_the_enumerated_integrand, loss_is_least_at_the_true_score)
"""All laws of losses."""

BOUND_LAWS: tuple[Callable[..., None], ...] = (
    bound_of_the_exact_score_is_the_entropy,
    bound_is_not_below_its_terms,
    standard_error_is_the_spread,
)
"""All laws of bounds."""
