"""Cross-entropy in its three coordinates is the diffusion loss of the matching score."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from sedd_objectives import (
    any_order_loss,
    cross_entropy_loss,
    denoising_cross_entropy,
    denoising_loss,
    denoising_score_entropy,
    lambda_cross_entropy_loss,
)
from sedd_objectives.cross_entropy import rate_back
from torch import nn

LENGTH, TOKENS = 3, 3


def matching_score(logits, sigma):
    """log p - log(e^sigma - 1), the mask (last) left out."""
    log_p = logits.double()[..., :-1].log_softmax(-1)
    log_score = log_p - torch.log(torch.expm1(sigma.double())).reshape(-1, *[1] * (log_p.ndim - 1))
    return torch.cat([log_score, torch.full_like(log_score[..., :1], torch.nan)], -1)


class Conditional:
    """The exact p(x0 | unmasked tokens) of a random distribution over sequences, or a wrong one: time-free logits."""

    def __init__(self, wrong=0.0, timed=0.0):
        generator = torch.Generator().manual_seed(0)
        weights = torch.rand((TOKENS,) * LENGTH, generator=generator, dtype=torch.float64) ** 2
        self.probability = weights / weights.sum()
        self.sequences = torch.tensor(list(itertools.product(range(TOKENS), repeat=LENGTH)))
        self.noise = wrong * torch.randn((TOKENS + 1,) * LENGTH + (LENGTH, TOKENS), generator=generator).double()
        self.timed = timed

    def __call__(self, x, sigma):
        agree = (x[:, None] == self.sequences) | (x[:, None] == TOKENS)
        weight = self.probability.flatten() * agree.all(-1)
        one_hot = torch.nn.functional.one_hot(self.sequences, TOKENS).double()
        log_p = torch.einsum("bs,sly->bly", weight, one_hot).log()
        unlikely = -torch.expm1(-sigma) - (x == TOKENS).double().mean(-1)  # this many masks at this noise level
        log_p = log_p + self.noise[x[:, 0], x[:, 1], x[:, 2]] * (1 + self.timed * unlikely**2)[:, None, None]
        return torch.cat([log_p, torch.full_like(log_p[..., :1], 3.0)], -1)  # logits: the mask's must not count

    def entropy(self):
        return float(-(self.probability * self.probability.log()).sum())

    def expect(self, loss):
        return float((self.probability.flatten() * loss).sum())

    def surprise(self, hidden):
        """-log p(x0) summed over the hidden positions, for each clean sequence; straight from the definition."""
        x = self.sequences.clone()
        x[:, hidden] = TOKENS
        log_p = self(x, torch.ones(len(x)))[..., :-1].log_softmax(-1)
        return -log_p.gather(-1, self.sequences[..., None])[..., 0][:, hidden].sum(-1)

    def any_order(self):
        """The average over all orders, enumerated."""
        total = 0.0
        for k in range(1, LENGTH + 1):
            subsets = list(itertools.combinations(range(LENGTH), k))
            total += sum(self.expect(self.surprise(list(s))) for s in subsets) / len(subsets) / k
        return total


@pytest.fixture(params=["absorbing", "dense absorbing"])
def absorbing(request, make_graphs):
    return make_graphs(TOKENS)[request.param]


@pytest.fixture
def case(absorbing, generator):
    sigma = torch.tensor([1e-3, 0.1, 1.0, 8.0], dtype=torch.float64)
    x0 = torch.randint(TOKENS, (4, 6), generator=generator)
    x = absorbing.sample(x0, sigma, generator=generator)
    x[:, 0] = TOKENS
    logits = torch.randn(4, 6, TOKENS + 1, generator=generator, dtype=torch.float64)
    return logits, x, x0, sigma


def test_equals_denoising_score_entropy_of_the_matching_score_with_its_gradient(absorbing, case):
    logits, x, x0, sigma = case
    logits.requires_grad_()
    found = denoising_cross_entropy(logits, absorbing, x, x0, sigma)
    want = denoising_score_entropy(matching_score(logits, sigma), absorbing, x, x0, sigma)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-12)
    assert (found[x != TOKENS] == 0).all()
    one, other = (torch.autograd.grad(loss.sum(), logits)[0] for loss in (found, want))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_the_loss_in_t_is_the_denoising_loss(absorbing, case, log_linear):
    logits, x, x0, _ = case
    t = torch.tensor([0.05, 0.3, 0.6, 0.99], dtype=torch.float64)
    weight = torch.tensor([1.0, 2, 0, 1, 1, 0.5])[None].expand(4, 6)
    found = cross_entropy_loss(lambda x, s: logits, absorbing, log_linear, x0, t, xt=x, weight=weight)
    want = denoising_loss(lambda x, s: matching_score(logits, s), absorbing, log_linear, x0, t, xt=x, weight=weight)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-12)
    level = torch.tensor([0.01, 0.3, 0.7, 0.999], dtype=torch.float64)
    found = lambda_cross_entropy_loss(lambda x, s: logits, absorbing, x0, level, xt=x)
    masked = x == TOKENS
    surprise = -logits[..., :-1].log_softmax(-1).gather(-1, x0[..., None])[..., 0]
    torch.testing.assert_close(found, (surprise * masked).sum(-1) / level, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("wrong", [0.0, 1.0])
def test_both_integrals_are_one_number_and_bound_the_entropy(wrong, make_graphs):
    """Enumerated: every clean sequence, every set of masks; over lambda by quadrature, exact for polynomials."""
    graph, model = make_graphs(TOKENS)["absorbing"], Conditional(wrong)
    want = model.any_order()
    assert want == pytest.approx(model.entropy(), abs=1e-12) if wrong == 0 else want > model.entropy() + 0.1
    orders = masks = 0.0
    nodes, weights = np.polynomial.legendre.leggauss(3)
    nodes, weights = (nodes + 1) / 2, weights / 2
    for pattern in itertools.product([False, True], repeat=LENGTH):
        hidden = torch.tensor(pattern)
        k = int(hidden.sum())
        if not k:
            continue
        chosen = torch.full((len(model.sequences),), k)
        weight = hidden[None].expand(len(chosen), -1)  # with the others given, all that are left are masked
        loss = any_order_loss(model, graph, model.sequences, given=~weight, num_masked=chosen)
        orders += model.expect(loss) / k / math.comb(LENGTH, k)
        xt = model.sequences.masked_fill(hidden, TOKENS)
        for node, quadrature in zip(nodes, weights, strict=True):
            level = torch.full((len(xt),), node, dtype=torch.float64)
            chance = node**k * (1 - node) ** (LENGTH - k)
            masks += (
                quadrature
                * chance
                * model.expect(lambda_cross_entropy_loss(model, graph, model.sequences, level, xt=xt))
            )
    assert orders == pytest.approx(want, abs=1e-9)
    assert masks == pytest.approx(want, abs=1e-9)


def drawn(model, loss, generator):
    """Mean over random sequences and its error; strata shared by a batch only make the true error smaller."""
    x0 = model.sequences[torch.multinomial(model.probability.flatten(), 10000, replacement=True, generator=generator)]
    values = loss(x0)
    return float(values.mean()), float(values.std()) / len(x0) ** 0.5


def test_draws_estimate_the_same_number(make_graphs, generator):
    """Within 4.5 standard errors: a false alarm in 70,000 runs."""
    graph, model = make_graphs(TOKENS)["absorbing"], Conditional(1.0)
    for loss in (any_order_loss, lambda_cross_entropy_loss):
        mean, error = drawn(model, lambda x0, loss=loss: loss(model, graph, x0, generator=generator), generator)
        assert abs(mean - model.any_order()) < 4.5 * error
        assert error < 0.05 * mean


def test_a_model_that_looks_at_the_noise_gets_the_same_bound_in_any_order(make_graphs, generator):
    """The noise level given with k masks has its law given k; 4.5 standard errors: a false alarm in 150,000 runs."""
    graph, model = make_graphs(TOKENS)["absorbing"], Conditional(1.0, timed=20.0)
    one, error = drawn(model, lambda x0: any_order_loss(model, graph, x0, generator=generator), generator)
    other, more = drawn(model, lambda x0: lambda_cross_entropy_loss(model, graph, x0, generator=generator), generator)
    assert abs(one - other) < 4.5 * (error**2 + more**2) ** 0.5
    assert abs(one - Conditional(1.0).any_order()) > 10 * error  # the noise level matters to it


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(TOKENS + 1, 8), nn.Linear(8, TOKENS + 1)
        self.rows = 0

    def forward(self, x, sigma, where=None):
        hidden = self.embed(x) + self.embed(x).mean(1, keepdim=True)
        hidden = hidden if where is None else hidden[where]
        self.rows += hidden[..., 0].numel()
        return self.head(hidden)


def test_any_order_masks_k_of_the_positions_that_count(make_graphs, generator):
    graph, x0 = make_graphs(TOKENS)["absorbing"], torch.randint(TOKENS, (4, 50), generator=generator)
    weight = torch.rand(4, 50, generator=generator)
    weight[:, 30:] = 0
    weight[3] = 0
    seen: dict[str, Any] = {}

    def model(x, sigma):
        seen.update(x=x, sigma=sigma)
        return torch.zeros(4, 50, TOKENS + 1)

    num_masked = torch.tensor([1, 7, 30, 0])
    how = {"weight": weight, "given": weight == 0}
    loss = any_order_loss(model, graph, x0, num_masked=num_masked, generator=generator, **how)
    masked = seen["x"] == TOKENS
    assert masked.sum(-1).tolist() == [1, 7, 30, 0]
    assert not masked[:, 30:].any()
    assert (seen["sigma"] > 0).all()
    assert seen["sigma"].isfinite().all()
    want = (weight * masked).sum(-1) * math.log(TOKENS) * 30 / num_masked.clamp_min(1)
    torch.testing.assert_close(loss, want)
    counts = [int((any_order_shown(graph, x0, generator) == TOKENS).sum()) for _ in range(3)]
    assert len(set(counts)) > 1


def any_order_shown(graph, x0, generator):
    shown = []

    def model(x, sigma):
        shown.append(x)
        return torch.zeros(*x.shape, TOKENS + 1)

    any_order_loss(model, graph, x0, generator=generator)
    return shown[0]


def test_only_masked_positions_that_count_reach_the_head_and_learn(make_graphs, log_linear, case):
    graph = make_graphs(TOKENS)["absorbing"]
    _, x, x0, _ = case
    weight = torch.tensor([1, 1, 1, 1, 0, 0]).expand(4, 6)
    net = Net()
    loss = cross_entropy_loss(net, graph, log_linear, x0, torch.full((4,), 0.5), xt=x, weight=weight)
    assert net.rows == int(((x == TOKENS) & (weight > 0)).sum())
    loss.sum().backward()
    by_index = Net()
    by_index.load_state_dict(net.state_dict())
    score = lambda x, sigma: by_index(x, sigma)  # noqa: E731
    cross_entropy_loss(score, graph, log_linear, x0, torch.full((4,), 0.5), xt=x, weight=weight).sum().backward()
    torch.testing.assert_close(net.head.weight.grad, by_index.head.weight.grad)
    net.rows = 0
    any_order_loss(net, graph, x0, num_masked=torch.tensor([1, 2, 3, 4]), given=weight == 0)
    assert net.rows == 10
    net.rows = 0
    any_order_loss(net, graph, x0, num_masked=torch.full((4,), 6), weight=weight)
    assert net.rows == 16  # all are masked, padding too, and four of each six count


def test_bfloat16_is_computed_in_float32_under_autocast(make_graphs, case):
    graph = make_graphs(TOKENS)["absorbing"]
    logits, x, x0, sigma = case
    logits, sigma = logits.bfloat16(), sigma.float()
    plain = denoising_cross_entropy(logits.float(), graph, x, x0, sigma)
    with torch.autocast("cpu", torch.bfloat16):
        found = denoising_cross_entropy(logits, graph, x, x0, sigma)
    assert found.dtype == torch.float32
    assert torch.equal(found, plain)


def test_float32_agrees_with_float64_at_any_mask_probability(make_graphs, case):
    graph = make_graphs(TOKENS)["absorbing"]
    logits, _, x0, _ = case
    xt = torch.full_like(x0, TOKENS)
    for share in (1e-6, 0.3, 1 - 1e-6):
        level = torch.full((4,), share)
        losses = [
            lambda_cross_entropy_loss(lambda x, s, d=dtype: logits.to(d), graph, x0, level.to(dtype), xt=xt)
            for dtype in (torch.float32, torch.float64)
        ]
        torch.testing.assert_close(losses[0].double(), losses[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["uniform", "hybrid", "dense"])
def test_other_processes_are_refused(kind, make_graphs, generator, log_linear):
    graph = make_graphs(TOKENS)[kind]
    x0 = torch.randint(TOKENS, (4, 6), generator=generator)
    with pytest.raises(ValueError, match="the graph is not one that absorbs every token at one rate"):
        cross_entropy_loss(lambda x, s: torch.zeros(4, 6, graph.num_states), graph, log_linear, x0, generator=generator)


def test_uneven_rates_are_refused(make_graphs, log_linear):
    graph = make_graphs(TOKENS)["dense absorbing"]
    graph.matrix = graph.matrix * torch.tensor([1.0, 1.0, 1.5, 1.0])
    x0, xt = torch.zeros(2, 4).long(), torch.full((2, 4), TOKENS)
    with pytest.raises(ValueError, match="absorbs every token at one rate"):
        cross_entropy_loss(lambda x, s: torch.zeros(2, 4, 4), graph, log_linear, x0, torch.ones(2) / 2, xt=xt)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x0": torch.zeros(6, dtype=torch.int64)}, r"x0 must have shape \(B, L\)"),
        ({"x0": torch.full((4, 6), 9)}, "x0 must lie in"),
        ({"xt": torch.full((4, 6), -1)}, "xt must lie in"),
        ({"xt": torch.zeros(4, 5, dtype=torch.int64)}, "xt must have shape"),
        ({"t": torch.zeros(4, 1)}, r"t must be floating, of shape \(B,\) or \(B, L\)"),
        ({"t": torch.full((4,), -1.0)}, "sigma is a total noise and must be >= 0"),
        ({"weight": torch.zeros(4)}, "weight is 0 at every position"),
        ({"weight": -torch.ones(4)}, "weight must be >= 0"),
        ({"model": lambda x, s: torch.zeros(4, 6, 3)}, "the model must return logits of shape"),
        ({"model": lambda x, s: torch.full((4, 6, 4), torch.nan)}, "logits are NaN"),
    ],
)
def test_bad_input_is_named(change, message, make_graphs, log_linear):
    arguments = {
        "model": lambda x, s: torch.zeros(4, 6, 4),
        "x0": torch.zeros(4, 6, dtype=torch.int64),
        "t": torch.full((4,), 0.5),
        "xt": torch.full((4, 6), 3),
    } | change
    model, x0, t = (arguments.pop(name) for name in ("model", "x0", "t"))
    with pytest.raises(ValueError, match=message):
        cross_entropy_loss(model, make_graphs(TOKENS)["absorbing"], log_linear, x0, t, **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x0": torch.full((2, 3), 3)},
            r"x0 must hold clean tokens, and no mask \(mask_id 3\) .* got it at 6 of 6 positions",
        ),
        ({"x0": torch.zeros(3, dtype=torch.int64)}, r"x0 must have shape \(B, L\)"),
        ({"num_masked": torch.tensor([0, 1])}, r"num_masked must lie in 1..L, .*got \[0, 1\]"),
        ({"num_masked": torch.tensor([1, 4])}, r"num_masked must lie in 1..L, .*got \[1, 4\]"),
        ({"num_masked": torch.tensor([1.0, 1.0])}, "num_masked must be integers"),
        ({"num_masked": torch.tensor([1])}, r"num_masked must be integers of shape \(B,\)"),
        ({"weight": torch.zeros(2)}, "weight is 0 at every position"),
        ({"model": lambda x, s: torch.zeros(2, 3, 9)}, "the model must return logits of shape"),
    ],
)
def test_bad_input_of_any_order_is_named(change, message, make_graphs):
    arguments = {"model": lambda x, s: torch.zeros(2, 3, 4), "x0": torch.zeros(2, 3).long()} | change
    with pytest.raises(ValueError, match=message):
        any_order_loss(arguments.pop("model"), make_graphs(TOKENS)["absorbing"], arguments.pop("x0"), **arguments)


def test_any_order_needs_a_mask_and_lambda_a_probability(make_graphs):
    x0 = torch.zeros(2, 3).long()
    with pytest.raises(ValueError, match="graph must have a mask"):
        any_order_loss(lambda x, s: torch.zeros(2, 3, 3), make_graphs(TOKENS)["uniform"], x0)
    with pytest.raises(ValueError, match=r"mask_probability must lie in \[0, 1\), got values in \[0.5, 1.0\]"):
        lambda_cross_entropy_loss(
            lambda x, s: torch.zeros(2, 3, 4), make_graphs(TOKENS)["absorbing"], x0, torch.tensor([0.5, 1.0])
        )
    with pytest.raises(ValueError, match="logits must have shape"):
        denoising_cross_entropy(torch.zeros(2, 3, 5), make_graphs(TOKENS)["absorbing"], x0, x0, torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_any_order_the_factor_has_the_loss_s_digits(dtype, make_graphs):
    """7 / 3 of three times log 3, with a weight on one position."""
    x0, weight = torch.zeros(1, 7, dtype=torch.int64), torch.full((1, 7), 0.1, dtype=torch.float64)
    model = lambda x, s: torch.zeros(1, 7, TOKENS + 1, dtype=dtype)  # noqa: E731
    how: dict[str, Any] = {"num_masked": torch.tensor([3])}
    found = any_order_loss(model, make_graphs(TOKENS)["absorbing"], x0, weight=weight, **how)
    assert found.dtype == dtype
    assert float(found) == pytest.approx(0.7 * math.log(3), rel=1e-14 if dtype == torch.float64 else 1e-6)


def test_the_rate_back_is_that_of_the_clean_token(hybrid_graph, make_graphs):
    """Under masking at rate 2: 2 / (e^(2 sigma) - 1) from a mask; rates are one to 1e-4."""
    sigma, x0 = torch.tensor([0.1, 0.7, 2.0], dtype=torch.float64), torch.tensor([0, 1, 2])
    found = rate_back(hybrid_graph(3, 0.0, 2.0), torch.full((3,), 3), x0, sigma)
    torch.testing.assert_close(found, 2 / torch.expm1(2 * sigma), rtol=1e-6, atol=0)
    graph = make_graphs(3)["dense absorbing"]
    even = graph.matrix.clone()
    for off, right in ((0.9e-4, True), (1.1e-4, False), (-0.9e-4, True), (-1.1e-4, False)):
        graph.matrix = even * torch.tensor([1.0, 1.0, 1 + off, 1.0])
        if right:
            rate_back(graph, torch.tensor([3]), torch.tensor([0]), sigma[:1])
            continue
        with pytest.raises(
            ValueError, match="in the reverse process x may become a state other than x0, at 2 of 2 pos"
        ):
            rate_back(graph, torch.tensor([3, 3]), torch.tensor([0, 2]), sigma[:2])


@pytest.mark.parametrize(
    ("matrix", "moves"),
    [
        ([[-1.1, 0, 0], [0.1, -1, 0], [1, 1, 0]], False),  # a token that may become another one
        ([[-1, 0, 0.5], [0, -1, 0], [1, 1, -0.5]], False),  # a mask that becomes a token again
        ([[-1, 0, 0], [0, -1, 0], [1, 1, 0]], True),
        ([[-3, 0, 0], [0, -3, 0], [3, 3, 0]], True),
    ],
)
def test_a_state_to_which_there_is_another_way_is_not_absorbed(matrix, moves, graph_of):
    graph = graph_of(torch.tensor(matrix, dtype=torch.float64))
    at = torch.tensor([2, 2]), torch.tensor([0, 1]), torch.tensor([0.5, 0.5], dtype=torch.float64)
    if moves:
        speed = matrix[2][0]
        torch.testing.assert_close(rate_back(graph, *at), speed / torch.expm1(speed * at[2]), rtol=1e-9, atol=0)
    else:
        with pytest.raises(ValueError, match="the graph is not one that absorbs every token at one rate"):
            rate_back(graph, *at)


@pytest.mark.parametrize("how", [{}, {"given": torch.tensor([[True, False, False, False]])}])
def test_numbers_of_masks_reach_from_one_to_all_that_count(how, make_graphs):
    """Without a word on it they are spread over 1..L of what is not given, whatever the weights."""
    seen = []

    def model(x, sigma):
        seen.append((x == TOKENS).sum(-1))
        return torch.zeros(*x.shape, TOKENS + 1)

    how = {name: value.expand(12, 4) for name, value in how.items()}
    x0, weight = torch.zeros(12, 4, dtype=torch.int64), torch.tensor([1.0, 1, 0, 1])
    any_order_loss(model, make_graphs(TOKENS)["absorbing"], x0, weight=weight.expand(12, 4), **how)
    length = 3 if how else 4
    assert sorted(seen[0].tolist()) == [k for k in range(1, length + 1) for _ in range(12 // length)]


def test_levels_of_masks_are_stratified_from_zero_on(make_graphs):
    told = []

    def model(x, sigma):
        told.append(-torch.expm1(-sigma))
        return torch.zeros(*x.shape, TOKENS + 1)

    lambda_cross_entropy_loss(model, make_graphs(TOKENS)["absorbing"], torch.zeros(100, 2, dtype=torch.int64))
    assert torch.equal((told[0] * 100).floor().sort().values, torch.arange(100.0))
