"""More sequences than a batch holds, and the log-probabilities of what was drawn."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
import torch
from sedd_samplers import (
    ByConfidence,
    ConfidenceUnmasking,
    FirstHitting,
    Particles,
    PathPlanning,
    PredictorCorrector,
    Tweedie,
    Uniformization,
    Unmasking,
    generate,
    infill,
    random_order,
    rescaled,
    sample,
    trajectory,
)
from sedd_samplers.adapters import from_logits, per_sequence
from sedd_samplers.controls import allowed_tokens, controlled, top_k

SIZES = [1, 3, 7, 20]


def labelled(x, sigma, label):
    """Logits that depend on the neighbours and on a label of the sequence."""
    near = torch.roll(x, 1, 1) + 2 * torch.roll(x, -1, 1) + label[:, None]
    return 2 * torch.sin(near[..., None] * (1.0 + torch.arange(6)))


class Counted:
    """A model of one label a sequence, which notes how many sequences it is asked about."""

    def __init__(self):
        self.asked, self.model = [], per_sequence(labelled, label=torch.arange(7))

    def __call__(self, x, sigma, rows):
        self.asked.append(len(x))
        return self.model(x, sigma, rows=rows)


@pytest.mark.parametrize("size", SIZES)
def test_a_sample_does_not_depend_on_the_batch_size(ref, size):
    """With a label and constraints for each sequence of the run, and seeds drawn for all at once."""
    graph, network = ref.StructuredAbsorbing(5), Counted()
    allowed = torch.rand(7, 8, 6, generator=torch.Generator().manual_seed(0)) < 0.7
    allowed[..., 0] = True
    score = from_logits(network, graph, controls=[allowed_tokens(allowed)])
    options: dict[str, Any] = {"shape": (7, 8), "steps": 6, "method": Unmasking()}
    whole = sample(score, graph, ref.LogLinear(), generator=torch.Generator().manual_seed(3), **options)
    network.asked.clear()
    split = sample(
        score, graph, ref.LogLinear(), generator=torch.Generator().manual_seed(3), batch_size=size, **options
    )
    assert torch.equal(split, whole)
    assert max(network.asked) <= size
    torch.manual_seed(5)
    whole = sample(score, graph, ref.LogLinear(), **options)
    torch.manual_seed(5)
    assert torch.equal(sample(score, graph, ref.LogLinear(), batch_size=size, **options), whole)


@pytest.mark.parametrize("size", SIZES)
def test_infilling_and_blocks_go_in_batches_too(ref, size):
    graph, rng = ref.StructuredAbsorbing(5), torch.Generator().manual_seed(1)
    x, given = torch.randint(5, (7, 8), generator=rng), torch.rand(7, 8, generator=rng) < 0.4
    start = torch.where(torch.rand(7, 8, generator=rng) < 0.5, 5, x)
    options: dict[str, Any] = {"x": x, "given": given, "seeds": range(7)}

    def both(**more):
        score = from_logits(Counted(), graph)
        part = infill(
            score, graph, ref.LogLinear(), start=start, times=torch.tensor([0.5, 0.2, 0.0]), **options, **more
        )
        text = generate(score, graph, ref.LogLinear(), block_size=4, end_id=3, log_probs=True, **options, **more)
        return part, *text

    for split, whole in zip(both(batch_size=size), both(), strict=True):
        assert torch.equal(split, whole)
    uniform = ref.StructuredUniform(6)
    options |= {"conditioning": Particles(4), "steps": 3}
    wave = lambda x, sigma: torch.sin(x[..., None] + torch.arange(6.0))  # noqa: E731
    whole = infill(wave, uniform, ref.Geometric(), **options)
    assert torch.equal(infill(wave, uniform, ref.Geometric(), batch_size=size, **options), whole)


@pytest.mark.parametrize("size", [0, -1, True, 2.0])
def test_a_batch_has_a_number_of_sequences(ref, size):
    with pytest.raises(ValueError, match="batch_size must be a positive integer, got"):
        sample(lambda x, sigma: x, ref.StructuredAbsorbing(5), ref.LogLinear(), shape=(2, 3), batch_size=size)


def last(run):
    return deque(run, maxlen=1).pop()


@pytest.mark.parametrize("method", [FirstHitting(), ConfidenceUnmasking(random_order)], ids=["first", "any order"])
def test_one_position_a_step_the_sum_is_the_sequences_log_probability(ref, method):
    graph = ref.StructuredAbsorbing(3, 1)
    p0 = ref.random_data(3, 4, 4, 1)
    score = ref.ExactScore(p0, graph.Q)
    x = torch.zeros(200, 4, dtype=torch.int64)
    state = last(trajectory(score, graph, ref.LogLinear(0.0), x=x, given=x > 0, steps=4, method=method, log_probs=True,
                            seeds=range(200)))  # fmt: skip
    right = p0[tuple(state.x.T)].log()
    torch.testing.assert_close(state.log_prob.sum(1), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [Unmasking(), Tweedie(), ConfidenceUnmasking(), ByConfidence(rescaled(0.3))])
def test_each_token_has_the_log_probability_of_its_posterior(ref, method):
    """Of independent tokens: whenever it was drawn, p(x0 = token) at its position; 0 while it is masked, or given."""
    graph, rng = ref.StructuredAbsorbing(5), torch.Generator().manual_seed(0)
    logits = torch.randn(8, 6, generator=rng).index_fill(1, torch.tensor([5]), -torch.inf)
    score = from_logits(lambda x, sigma: logits.expand(len(x), -1, -1), graph)
    x, given = torch.ones(20, 8, dtype=torch.int64), torch.rand(20, 8, generator=rng) < 0.3
    for state in trajectory(score, graph, ref.LogLinear(), x=x, given=given, steps=5, method=method, log_probs=True,
                            seeds=range(20)):  # fmt: skip
        right = logits.log_softmax(-1)[torch.arange(8), state.x.clamp(max=4)].double()
        right = torch.where(given | (state.x == 5), 0.0, right)
        torch.testing.assert_close(state.log_prob, right, rtol=1e-4, atol=1e-5)


def test_controls_count(ref):
    graph, network = ref.StructuredAbsorbing(5), Counted()
    x = torch.zeros(7, 8, dtype=torch.int64)
    options: dict[str, Any] = {"x": x, "given": x > 0, "log_probs": True, "steps": 4}
    plain, greedy = from_logits(network, graph), (top_k(1),)
    for score, method in (
        (plain, ConfidenceUnmasking(controls=greedy)),
        (plain, PathPlanning(network, controls=greedy)),
        (controlled(plain, graph, *greedy), Unmasking()),
        (controlled(plain, graph, *greedy), Tweedie()),
    ):
        state = last(trajectory(score, graph, ref.LogLinear(), method=method, **options))
        torch.testing.assert_close(state.log_prob, torch.zeros(7, 8).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["uniform", "hybrid"])
def test_a_jump_among_tokens_is_told_given_that_it_was_one(ref, name):
    """One step of Tweedie's from known states, against the enumerated rows."""
    graph = {"uniform": lambda: ref.StructuredUniform(4), "hybrid": lambda: ref.hybrid_matrix(3)}[name]()
    tokens = graph.num_states - (graph.mask_id is not None)
    score = ref.ExactScore(ref.random_data(tokens, 3, 4, graph.mask_id), graph.Q)
    noise, times = ref.Linear(2.0), torch.tensor([0.8, 0.2], dtype=torch.float64)
    start = ref.all_states(4, 3)
    rows = ref.Enumerator(score, graph, noise, start.shape)
    Tweedie()(rows, start, times[:1].expand(len(start)), times[1:].expand(len(start)))
    state = last(trajectory(score, graph, noise, x=start, given=start < 0, start=start, times=times, denoise=False,
                            log_probs=True, seeds=range(len(start))))  # fmt: skip
    law = rows.stages[0]
    here, stay = (law.gather(2, y[..., None])[..., 0] for y in (state.x, start))
    moved = state.x != start
    assert moved.float().mean() > 0.3
    masked = state.x == (-1 if graph.mask_id is None else graph.mask_id)
    right = torch.where(moved & ~masked, (here / (1 - stay)).log(), 0.0)
    torch.testing.assert_close(state.log_prob, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [Uniformization(), PredictorCorrector()])
def test_every_method_tells(ref, method):
    graph = ref.StructuredUniform(4)
    score = ref.ExactScore(ref.random_data(4, 3), graph.Q)
    x = torch.zeros(20, 3, dtype=torch.int64)
    state = last(trajectory(score, graph, ref.Geometric(1e-2, 8.0), x=x, given=x > 0, steps=6, method=method,
                            log_probs=True, seeds=range(20)))  # fmt: skip
    assert (state.log_prob <= 0).all()
    assert (state.log_prob < 0).float().mean() > 0.5


def test_a_method_that_does_not_tell_is_found_out(ref):
    graph, x = ref.StructuredUniform(4), torch.zeros(2, 3, dtype=torch.int64)

    def silent(reverse, x, t, s):
        return (x + 1) % 4

    def score(x, sigma):
        return torch.zeros(*x.shape, 4)

    run = trajectory(score, graph, ref.Geometric(), x=x, given=x > 0, method=silent,
                     log_probs=True)  # fmt: skip
    with pytest.raises(ValueError, match="does not say with what probability it draws"):
        last(run)
    with pytest.raises(ValueError, match="nor log_probs goes with them"):
        last(trajectory(score, graph, ref.Geometric(), x=x, given=x > 0, conditioning=Particles(4), log_probs=True))
