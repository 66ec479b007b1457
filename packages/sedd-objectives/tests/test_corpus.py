from __future__ import annotations

import math

import pytest
import torch
from sedd_objectives import Bound, Estimate, corpus_likelihood, likelihood_bound


@pytest.fixture
def batches(generator):
    return [
        Estimate(torch.rand(n, generator=generator).double() * 50, torch.rand(n, generator=generator).double())
        for n in (3, 5)
    ]


def test_sums_over_batches_with_the_combined_error(batches):
    found = corpus_likelihood(batches, 40)
    nats = sum(float(b.value.sum()) for b in batches)
    error = math.sqrt(sum(float((b.standard_error**2).sum()) for b in batches))
    assert (found.nats, found.standard_error) == pytest.approx((nats, error), rel=1e-12)
    assert found.num_sequences == 8
    assert found.nats_per_token == pytest.approx(nats / 40)
    assert found.perplexity == pytest.approx(math.exp(nats / 40))
    assert found.perplexity_error == pytest.approx(math.exp(nats / 40) * error / 40)
    assert found.bits_per(100) == pytest.approx((nats / math.log(2) / 100, error / math.log(2) / 100))
    assert corpus_likelihood(batches[0], 15).nats == pytest.approx(float(batches[0].value.sum()))


def test_covers_where_intervals_of_single_sequences_do_not(make_graphs, enumerated, log_linear):
    """200 corpora of 200 sequences, 4 times each, around their common mean: 1.96 errors hold 0.95 +- 0.015 of them."""
    data = enumerated(make_graphs(5)["absorbing"], length=1)
    x0 = data.sequences[:1].expand(40_000, -1)
    bound = likelihood_bound(
        *(data.score(), data.graph, log_linear, x0),
        num_times=4,
        num_reconstructions=2,
        small_noise_share=0.5,
        generator=torch.Generator().manual_seed(0),
    )
    mean = float(bound.value.mean())
    single = ((bound.value - mean).abs() < 1.96 * bound.standard_error).double().mean()
    corpora = [
        corpus_likelihood(Estimate(value, error), 200)
        for value, error in zip(bound.value.split(200), bound.standard_error.split(200), strict=True)
    ]
    covered = sum(abs(c.nats - 200 * mean) < 1.96 * c.standard_error for c in corpora) / 200
    assert single < 0.8
    assert covered > 0.9


def test_prints_in_a_line(make_graphs, batches, enumerated, log_linear, generator):
    data = enumerated(make_graphs(5)["absorbing"], length=2)
    x0 = data.sample(64, generator)
    bound = likelihood_bound(data.score(), data.graph, log_linear, x0, num_times=2, num_reconstructions=2)
    for shown in (repr(bound), repr(corpus_likelihood(bound, 128))):
        assert len(shown) < 160
        assert "64 sequences" in shown
    assert f"{float(bound.value.mean()):.2f}" in repr(bound)
    assert f"perplexity {corpus_likelihood(bound, 128).perplexity:.4g}" in repr(corpus_likelihood(bound, 128))


def test_bad_input_is_named(batches):
    with pytest.raises(ValueError, match=r"num_tokens must be positive.*got 0"):
        corpus_likelihood(batches, 0)
    with pytest.raises(ValueError, match="measured must hold a sequence at least"):
        corpus_likelihood([], 3)
    with pytest.raises(ValueError, match=r"\(B,\) each, got \(2, 3\) and \(2, 3\)"):
        corpus_likelihood(Estimate(torch.ones(2, 3), torch.ones(2, 3)), 3)
    with pytest.raises(ValueError, match="count must be positive"):
        corpus_likelihood(batches, 3).bits_per(0)


def test_a_bound_is_printed_with_its_parts_and_the_error_of_the_mean():
    parts = ([7.0, 9.0], [0.3, 0.4], [5.0, 6.0], [0.5, 0.5], [1.5, 2.5])
    bound = Bound(*(torch.tensor(part, dtype=torch.float64) for part in parts))
    told = "Bound(2 sequences: 8.00 +- 0.25 nats on average, diffusion 5.50, prior 0.50, reconstruction 2.00)"
    assert repr(bound) == told
    told = "CorpusLikelihood(2 sequences, 8 tokens: 2.0000 +- 0.0625 nats a token, perplexity 7.389 +- 0.46)"
    assert repr(corpus_likelihood(bound, 8)) == told


def test_what_no_number_holds_is_infinite():
    found = corpus_likelihood(Estimate(torch.tensor([1420.0]).double(), torch.tensor([0.1]).double()), 2)
    assert (found.nats_per_token, found.perplexity) == (710.0, math.inf)
    assert corpus_likelihood(Estimate(torch.tensor([1416.0]), torch.tensor([0.1])), 2).perplexity == math.exp(708)
    with pytest.raises(ValueError, match=r"got \(2,\) and \(3,\)"):
        corpus_likelihood(Estimate(torch.ones(2), torch.ones(3)), 3)


def test_an_estimate_says_its_mean_and_the_mean_s_error():
    assert repr(Estimate(torch.tensor([2.0, 4.0]), torch.tensor([0.3, 0.4]))) == "Estimate((2,): 3 +- 0.25 on average)"
    assert repr(Estimate(torch.tensor(2.0), torch.tensor(0.3))) == "Estimate((): 2 +- 0.3 on average)"
