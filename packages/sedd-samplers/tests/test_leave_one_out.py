"""The law of a token given the other positions, and the score that it makes, against dense matrices in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sedd_samplers.leave_one_out import carry, concrete_score, leave_one_out, score_of, without_own
from sedd_samplers.steps import (
    ancestral_probs,
    denoise_probs,
    leap,
    reverse_rates,
    tweedie_posterior,
    tweedie_score,
    unmasking_weights,
)
from torch import Tensor

GRAPHS = {
    "absorbing": lambda ref: ref.StructuredAbsorbing(4),
    "mask amid the tokens": lambda ref: ref.StructuredAbsorbing(4, 2),
    "absorbing, dense rows": lambda ref: ref.absorbing_matrix(4, 1),
    "uniform": lambda ref: ref.StructuredUniform(5),
    "hybrid": lambda ref: ref.hybrid_matrix(4),
    "cycle": lambda ref: ref.cycle_matrix(5),
    "ordinal": lambda ref: ref.ordinal_matrix(5),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Rows:
    """Every state of five as x, twice, each at a noise of its own; scores of no law, laws that say much of anything."""

    def __init__(self, graph: Any) -> None:
        self.graph, self.x = graph, torch.arange(5).repeat(2)
        self.sigma = torch.linspace(0.9, 0.1, 10, dtype=torch.float64)
        self.log_score = torch.randn(10, 5, generator=seeded(), dtype=torch.float64)
        self.p = torch.rand(10, 5, generator=seeded(1), dtype=torch.float64)
        self.forward = torch.linalg.matrix_exp(self.sigma[:, None, None] * graph.Q)
        self.likely = self.forward[torch.arange(10), self.x].clamp(min=0)  # of x, given what it was
        self.likely[self.likely < 1e-14] = 0  # of rounding
        self.s = self.log_score.exp().scatter(1, self.x[:, None], 1.0)

    def back(self) -> Tensor:
        out: Tensor = torch.linalg.solve(self.forward, self.s)
        return out

    def tokens_only(self, law: Tensor) -> Tensor:
        law = law.clone()
        if self.graph.mask_id is not None:
            law[:, self.graph.mask_id] = 0
        return law


@pytest.fixture(params=GRAPHS)
def rows(request: Any, ref: Any) -> Rows:
    return Rows(GRAPHS[request.param](ref))


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-4}[dtype]  # rates of some rows are float32 numbers
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_each_is_its_equation(rows: Rows, dtype: torch.dtype) -> None:
    """In the precision of the rows, whatever that of the noise; what is given stays as it is."""
    log_score, p, x, graph, sigma = rows.log_score.to(dtype), rows.p.to(dtype), rows.x, rows.graph, rows.sigma
    before = log_score.clone(), p.clone()
    close(concrete_score(log_score, x), rows.s, dtype)
    pi = rows.tokens_only(rows.back().clamp(min=0)).masked_fill(rows.likely == 0, 0.0)
    pi = pi / pi.sum(1, keepdim=True)
    close(leave_one_out(log_score, x, graph, sigma), pi, dtype)
    posterior = rows.tokens_only(rows.back() * rows.likely)
    close(denoise_probs(log_score, x, graph, sigma), posterior, dtype)
    posterior = posterior.clamp(min=0) / posterior.clamp(min=0).sum(1, keepdim=True)
    close(tweedie_posterior(log_score, x, graph, sigma), posterior, dtype)
    alone = torch.where(rows.likely > 0, rows.p / rows.likely.clamp(min=1e-300), 0.0)
    found = without_own(p, x, graph, sigma)
    torch.testing.assert_close(found.double() * rows.likely, alone * rows.likely, rtol=1e-4, atol=1e-6)
    assert ((found == 0) == (rows.likely == 0)).all()
    onward = (rows.forward @ rows.p[..., None])[..., 0]
    close(carry(p, graph, sigma), onward, dtype)
    close(score_of(p, x, graph, sigma), (onward / onward.gather(1, x[:, None])).log(), dtype)
    onward = (rows.forward @ alone[..., None])[..., 0]
    close(tweedie_score(p, x, graph, sigma), (onward / onward.gather(1, x[:, None])).log(), dtype)
    assert torch.equal(log_score, before[0])
    assert torch.equal(p, before[1])


def test_an_average_over_clean_tokens_has_every_noise_its_own(rows: Rows) -> None:
    """Ancestral steps of which no two begin or end at the same noise."""
    earlier = rows.sigma / torch.linspace(2, 5, 10, dtype=torch.float64)
    clean = rows.tokens_only(rows.back() * rows.likely).clamp(min=0)
    clean = clean / clean.sum(1, keepdim=True)
    step = torch.linalg.matrix_exp((rows.sigma - earlier)[:, None, None] * rows.graph.Q)
    to_s = torch.linalg.matrix_exp(earlier[:, None, None] * rows.graph.Q)
    weight = torch.where(clean > 0, clean / rows.likely.clamp(min=1e-300), 0.0)
    expected = step[torch.arange(10), rows.x] * (to_s @ weight[..., None])[..., 0]
    found = ancestral_probs(rows.log_score, rows.x, rows.graph, earlier, rows.sigma)
    close(found, expected, torch.float64)
    torch.testing.assert_close(found.sum(1), torch.ones(10, dtype=torch.float64), rtol=1e-6, atol=0)


def test_rates_and_leaps_are_their_equations(rows: Rows) -> None:
    """A row from which nothing leads stays where it is; jumps are overwritten."""
    rates = (rows.graph.Q[rows.x] * rows.s).scatter(1, rows.x[:, None], 0.0)
    close(reverse_rates(rows.log_score, rows.x, rows.graph), rates, torch.float64)
    jumps = rates * rows.sigma[:, None]
    jumps[0] = 0
    total = jumps.sum(1, keepdim=True)
    leaving = torch.where(total > 0, (1 - torch.exp(-total)) / total.clamp(min=1e-300), 1.0)
    expected = (jumps * leaving).scatter(1, rows.x[:, None], torch.exp(-total))
    leapt = jumps.clone()
    assert leap(leapt, rows.x) is leapt
    close(leapt, expected, torch.float64)


def test_a_score_of_nothing_that_can_have_become_x_is_none(ref: Any) -> None:
    """And of what cannot come it is -inf; a share below nothing is none."""
    graph, sigma = ref.StructuredAbsorbing(2), torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    pi = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.5, -0.1, 0.0]], dtype=torch.float64)
    found = score_of(pi, torch.tensor([0, 0, 0]), graph, sigma)
    assert found[0].isnan().all()
    assert found[1].tolist() == pytest.approx([0.0, -math.inf, math.log(math.e - 1)])
    assert found[2, 1] == -math.inf
    assert found[2, 2] == pytest.approx(math.log((math.e - 1) * 0.4 / 0.5))


@pytest.mark.parametrize(("dtype", "tiny"), [(torch.float32, 2.0**-126), (torch.float64, 2.0**-1022)])
def test_what_hardly_ever_becomes_x_is_left_out(dtype: torch.dtype, tiny: float) -> None:
    """At 1e7 times the smallest number that is written in full, and below."""
    likely = torch.tensor([[1e7 * tiny * 1.01, 1e7 * tiny * 0.99, 0.5]], dtype=dtype)
    row = SimpleNamespace(base=likely[:, 2], index=torch.tensor([[0, 1]]), value=likely[:, :2])
    asked = list[Tensor]()

    def transition_into(x: Tensor, sigma: Tensor) -> Any:
        asked.append(sigma)
        return row

    graph: Any = SimpleNamespace(transition_into=transition_into)
    level = torch.tensor([0.3], dtype=torch.float64)
    found = without_own(torch.full((1, 3), 0.25, dtype=dtype), torch.tensor([2]), graph, level)
    assert found[0, 1] == 0
    assert found[0, 2] == 0.5
    assert found[0, 0] == pytest.approx(0.25 / float(likely[0, 0]), rel=1e-6)
    assert [(level.dtype, float(level)) for level in asked] == [(dtype, float(torch.tensor(0.3, dtype=dtype)))]


def test_weights_where_jumps_lead_into_the_mask_alone(ref: Any) -> None:
    """e^(D Q[x, y]) - 1: e^D - 1 from a token into the mask, and at the mask itself 0, with no jump into tokens."""
    graph, D = ref.StructuredAbsorbing(3, 1), torch.tensor([0.5, 2.0], dtype=torch.float64)
    for x in (1, 3):
        weight = unmasking_weights(graph, torch.tensor([x, x]), D)
        dense = weight.base[:, None].expand(2, 4).scatter(1, weight.index, weight.value)
        expected = (D[:, None] * graph.Q[x]).expm1()
        torch.testing.assert_close(dense, expected, rtol=1e-6, atol=1e-7)
