"""Laws of the form: rows, shapes of noise, empty batches, precision, and errors on bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sedd_graphs.testing._support import (
    assert_close,
    assert_refused,
    assert_single_precision,
    dense,
    has_mask,
    law,
    tokens_of,
)

__all__ = [
    "rows_are_well_formed",
    "noise_per_position_is_noise_per_sequence",
    "every_position_has_its_own_noise",
    "no_positions_give_no_rows",
    "single_precision_agrees_with_double",
    "bad_input_is_refused",
]


@law
def rows_are_well_formed(graph: Any) -> None:
    """Distinct int64 states in range, one base and K values a row, in sigma's dtype."""
    generator = torch.Generator().manual_seed(0)
    x0 = tokens_of(graph)[torch.randint(len(tokens_of(graph)), (3, 5), generator=generator)]
    sigma = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float32)
    x = graph.sample(x0, sigma, generator=generator)
    assert x.shape == x0.shape, f"sample(x0, sigma) must have x0's shape {tuple(x0.shape)}, got {tuple(x.shape)}"
    assert x.dtype == torch.int64, f"samples must be int64, got {x.dtype}"
    rows = {
        "rates_into": graph.rates_into(x),
        "rates_out_of": graph.rates_out_of(x),
        "transition_from": graph.transition_from(x0, sigma),
        "transition_into": graph.transition_into(x, sigma),
        "ratio": graph.ratio(x, x0, sigma),
        "posterior": graph.posterior(x, x0, sigma / 2, sigma),
        "prior": graph.prior(sigma[:, None].expand(3, 5)),
    }
    for name, row in rows.items():
        assert row.base.shape == x0.shape, f"{name}: base must be {tuple(x0.shape)}, got {tuple(row.base.shape)}"
        assert row.index.shape == row.value.shape, f"{name}: index and value must have one shape"
        assert row.index.shape[:-1] == x0.shape, f"{name}: index must be (..., K), got {tuple(row.index.shape)}"
        assert row.index.dtype == torch.int64, f"{name}: index must be int64, got {row.index.dtype}"
        assert (row.index >= 0).all(), f"{name}: negative state"
        assert (row.index < graph.num_states).all(), f"{name}: state out of range"
        assert (row.index.sort(-1).values.diff() > 0).all(), f"{name}: the states of a row must be distinct"
        if row.index.shape[-1] == graph.num_states:
            assert (row.base == 0).all(), f"{name}: a row that names every state must have base 0"
        if not name.startswith("rates"):
            assert row.value.dtype == torch.float32, f"{name}: must come in sigma's dtype, got {row.value.dtype}"
    empty = torch.zeros(2, 0, dtype=torch.int64)
    assert graph.ratio(empty, empty, torch.ones(2)).base.shape == (2, 0), "no positions must be no error"


@law
def noise_per_position_is_noise_per_sequence(graph: Any) -> None:
    """Sigma of shape (B,) and the same levels as (B, L) give the same; so does a 0-dimensional one for all."""
    generator = torch.Generator().manual_seed(0)
    x0 = tokens_of(graph)[torch.randint(len(tokens_of(graph)), (3, 4), generator=generator)]
    for sigma in (torch.tensor([0.2, 1.0, 3.0]), torch.tensor(0.7)):
        each = sigma.reshape(-1, 1).expand(3, 4)
        x = graph.sample(x0, sigma, generator=generator)
        v = torch.rand(3, 4, graph.num_states, generator=generator)
        for name, a, b in [
            ("transition_from", graph.transition_from(x0, sigma), graph.transition_from(x0, each)),
            ("transition_into", graph.transition_into(x, sigma), graph.transition_into(x, each)),
            ("ratio", graph.ratio(x, x0, sigma), graph.ratio(x, x0, each)),
        ]:
            assert_close(
                dense(a, graph), dense(b, graph), 1e-12, f"{name} with one level a sequence and one a position"
            )
        assert_close(graph.propagate(v, sigma), graph.propagate(v, each), 1e-12, "propagate with either")
        assert_close(graph.prior_kl(x0, sigma), graph.prior_kl(x0, each), 1e-12, "prior_kl with either")


@law
def every_position_has_its_own_noise(graph: Any) -> None:
    """Sigma of shape (B, L) with another level at each position gives what each position has alone."""
    generator = torch.Generator().manual_seed(0)
    x0 = tokens_of(graph)[torch.randint(len(tokens_of(graph)), (2, 3), generator=generator)]
    late = torch.tensor([[0.3, 2.0, 0.1], [1.1, 0.6, 4.0]])
    early = late * torch.tensor([[0.5, 0.9, 0.0], [0.2, 1.0, 0.7]])
    x = graph.sample(x0, late, generator=generator)
    v = torch.rand(2, 3, graph.num_states, generator=generator)
    calls: dict[str, Callable[..., Tensor]] = {
        "transition_from": lambda i: dense(graph.transition_from(x0[i], late[i]), graph),
        "transition_into": lambda i: dense(graph.transition_into(x[i], late[i]), graph),
        "ratio": lambda i: dense(graph.ratio(x[i], x0[i], late[i]), graph),
        "posterior": lambda i: dense(graph.posterior(x[i], x0[i], early[i], late[i]), graph),
        "prior": lambda i: dense(graph.prior(late[i]), graph),
        "prior_kl": lambda i: graph.prior_kl(x0[i], late[i]),
        "propagate": lambda i: graph.propagate(v[i], late[i]),
        "propagate backwards": lambda i: graph.propagate(v[i], -0.1 * late[i]),
    }
    for name, call in calls.items():
        alone = torch.stack([torch.stack([call((b, j)) for j in range(3)]) for b in range(2)])
        scale = float(alone.abs().max().clamp(min=1))
        assert_close(call(...), alone, 1e-10 * scale, f"{name} with a level a position, against each position alone")


@law
def no_positions_give_no_rows(graph: Any) -> None:
    """An empty batch, such as the positions of a batch that can still move when none can, gives empty results."""
    n = graph.num_states
    for shape in [(0,), (2, 0), (0, 3)]:
        x, sigma = torch.empty(shape, dtype=torch.int64), torch.ones(shape[:1])
        for name, row in {
            "rates_into": graph.rates_into(x),
            "rates_out_of": graph.rates_out_of(x),
            "transition_from": graph.transition_from(x, sigma),
            "transition_into": graph.transition_into(x, sigma),
            "ratio": graph.ratio(x, x, sigma),
            "posterior": graph.posterior(x, x, sigma / 2, sigma),
            "prior": graph.prior(torch.ones(shape)),
        }.items():
            found = tuple(dense(row, graph).shape)
            assert found == (*shape, n), f"{name}: expected shape {(*shape, n)}, got {found}"
        for name, values, expected in [
            ("sample", graph.sample(x, sigma), shape),
            ("sample_prior", graph.sample_prior(shape), shape),
            ("prior_kl", graph.prior_kl(x, sigma), shape),
            ("propagate", graph.propagate(torch.ones(*shape, n), sigma), (*shape, n)),
        ]:
            assert values.shape == expected, f"{name}: expected shape {expected}, got {tuple(values.shape)}"


@law
def single_precision_agrees_with_double(graph: Any) -> None:
    """From sigma = 1e-6 to 50, float32 results are finite and within 1e-5 of float64, relative to each value.

    Values below 1e-37, which float32 cannot hold, are compared absolutely. Takes graphs of any size.
    """
    generator = torch.Generator().manual_seed(0)
    sigma = torch.logspace(math.log10(1e-6), math.log10(50), 33, dtype=torch.float32)
    start = torch.randint(graph.num_states, (len(sigma), 3), generator=generator)
    x0 = torch.where(start == graph.mask_id, (start + 1) % graph.num_states, start) if has_mask(graph) else start
    x = graph.sample(x0, sigma, generator=generator)
    x[:, 0] = x0[:, 0]
    for name, call in {
        "transition_from": lambda level: graph.transition_from(x0, level),
        "transition_into": lambda level: graph.transition_into(x, level),
        "ratio": lambda level: graph.ratio(x, x0, level),
        "posterior": lambda level: graph.posterior(x, x0, level / 2, level),
        "prior": graph.prior,
    }.items():
        single, double = call(sigma), call(sigma.double())
        assert torch.equal(single.index, double.index), f"{name} must name the same states in either precision"
        assert_single_precision(single.base, double.base, name)
        assert_single_precision(single.value, double.value, name)
    assert_single_precision(graph.prior_kl(x0, sigma), graph.prior_kl(x0, sigma.double()), "prior_kl")
    v = torch.rand(len(sigma), graph.num_states, generator=generator, dtype=torch.float32)
    assert_single_precision(graph.propagate(v, sigma), graph.propagate(v.double(), sigma.double()), "propagate")


@law
def bad_input_is_refused(graph: Any) -> None:
    """States out of range or not int64, sigma negative, NaN or of a wrong shape: an error that names the argument."""
    n = graph.num_states
    x, sigma = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2)
    v = torch.ones(2, 3, n)
    for wrong, named in [
        (x + n, "x"),
        (x - 1, "x"),
        (x.double(), "x"),
    ]:
        for call in (
            lambda x: graph.rates_into(x),
            lambda x: graph.rates_out_of(x),
            lambda x: graph.transition_from(x, sigma),
            lambda x: graph.transition_into(x, sigma),
            lambda x: graph.ratio(x, torch.zeros(2, 3, dtype=torch.int64), sigma),
            lambda x: graph.ratio(torch.zeros(2, 3, dtype=torch.int64), x, sigma),
            lambda x: graph.sample(x, sigma),
            lambda x: graph.prior_kl(x, sigma),
        ):
            assert_refused(call, wrong, named)
    for wrong in (-sigma, sigma * math.nan, torch.ones(3), torch.ones(2, 1), torch.ones(2, dtype=torch.int64)):
        for call in (
            lambda s: graph.transition_from(x, s),
            lambda s: graph.transition_into(x, s),
            lambda s: graph.ratio(x, x, s),
            lambda s: graph.sample(x, s),
            lambda s: graph.prior_kl(x, s),
        ):
            assert_refused(call, wrong, "sigma")
    for wrong in (-sigma, sigma * math.nan, torch.ones(2, dtype=torch.int64)):
        assert_refused(graph.prior, wrong, "sigma")
    for wrong in (sigma * math.nan, torch.ones(3), torch.ones(2, 1)):
        assert_refused(lambda s: graph.propagate(v, s), wrong, "sigma")
    assert_refused(lambda v: graph.propagate(v, sigma), torch.ones(2, 3, n + 1), "v")
    assert_refused(lambda s: graph.posterior(x, x, 2 * s, s), sigma, "sigma_s")
    assert_refused(lambda x: graph.ratio(x, x[:1], sigma), x, "x0")
    assert_refused(lambda x: graph.ratio(x + 1, x, 0 * sigma), x, "x0")  # without noise nothing becomes another state
