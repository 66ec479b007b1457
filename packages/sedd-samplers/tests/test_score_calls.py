"""What a run says of a model that is no score model, or is of other sequences, before its samples are believed."""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import pytest
import torch
from sedd_samplers import Euler, Particles, Tweedie, generate, infill, sample, trajectory
from sedd_samplers.adapters import from_logits, from_posterior, per_sequence, to_posterior
from sedd_samplers.controls import controlled, temperature
from sedd_samplers.guidance import classifier_free
from sedd_samplers.infilling import clamped

V = 5
NO_SCORE = r"the scores of the tokens at a mask sum to .* log-scores of no data.*from_logits\(network, graph\)"


def network(x, sigma):
    """Logits of p(x0 | x_t) with a column for the mask."""
    return torch.sin(torch.roll(x, 1, 1)[..., None] * (1.0 + torch.arange(V + 1)))


def graphs(ref):
    return {
        "absorbing": ref.StructuredAbsorbing(V),
        "a mask in the middle": ref.StructuredAbsorbing(V, 2),
        "hybrid": ref.hybrid_matrix(V),
    }


@pytest.mark.filterwarnings("always:at sigma")
@pytest.mark.parametrize("name", ["absorbing", "a mask in the middle", "hybrid"])
def test_logits_in_the_place_of_scores_are_told_of_once(ref, name):
    graph = graphs(ref)[name]
    options: dict[str, Any] = {"shape": (2, 3), "steps": 4, "seeds": [0, 1]}
    with pytest.warns(UserWarning, match=NO_SCORE) as seen:
        sample(network, graph, ref.LogLinear(), **options)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(from_logits(network, graph), graph, ref.LogLinear(), **options)
        guided = classifier_free(network, network, 2.0, num_states=V + 1)  # a wrapper answers for itself
        sample(guided, graph, ref.LogLinear(), **options)


@pytest.mark.filterwarnings("always:at sigma")
@pytest.mark.parametrize(
    "run",
    [
        lambda graph, noise, x, given: infill(network, graph, noise, x=x, given=given, conditioning=clamped),
        lambda graph, noise, x, given: infill(network, graph, noise, x=x, given=given, conditioning=Particles(4)),
        lambda graph, noise, x, given: infill(network, graph, noise, x=x, given=given, batch_size=1),
        lambda graph, noise, x, given: sample(network, graph, noise, shape=(2, 3), method=Euler()),
        lambda graph, noise, x, given: sample(
            controlled(network, graph, temperature(0.5)), graph, noise, shape=(2, 3), method=Tweedie()
        ),
        lambda graph, noise, x, given: to_posterior(network, graph)(torch.full_like(x, V), torch.full((2,), 6.0)),
    ],
)
def test_wherever_a_score_model_is_called(ref, run):
    x, given = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[True, False, False]] * 2)
    with pytest.warns(UserWarning, match=NO_SCORE):
        run(ref.StructuredAbsorbing(V), ref.LogLinear(), x, given)


@pytest.mark.filterwarnings("error:at sigma")
@pytest.mark.parametrize("factor", [0.99, 1.01])
@pytest.mark.parametrize("name", ["absorbing", "a mask in the middle", "hybrid"])
def test_a_hundred_times_what_any_data_give(ref, name, factor):
    """The bound is (1 - m) / m with m = exp(sigma Q)[mask, y], the same for every token y."""
    graph, sigma = graphs(ref)[name], torch.tensor([3.0, 0.2])
    x = torch.full((2, 2), graph.mask_id)
    token = torch.zeros(2, V + 1, dtype=torch.float64)
    token[:, 0] = 1
    masked = graph.propagate(token, sigma.double())[:, graph.mask_id]
    level = ((1 - masked) / masked * 100 * factor / V).log().float()

    def score(x, sigma):
        flat = level[:, None, None].expand(2, 2, V + 1).clone()
        flat[..., graph.mask_id] = 50.0  # the entry y = x carries no meaning
        return flat

    ask = functools.partial(to_posterior(score, graph), x, sigma)
    if factor > 1:
        with pytest.raises(UserWarning, match=r"at sigma = (3|0\.2) "):
            ask()
    else:
        ask()


@pytest.mark.filterwarnings("error:at sigma")
@pytest.mark.parametrize("score", [math.inf, math.nan, -math.inf])
def test_what_is_not_finite_is_told_of_as_such(ref, score):
    graph = ref.StructuredAbsorbing(V)
    with pytest.raises(ValueError, match=r"infinite log-score|returned NaN|no state can be drawn"):
        sample(lambda x, _: torch.full((*x.shape, V + 1), score), graph, ref.LogLinear(), shape=(1, 2), steps=2)


def labelled(x, sigma, label):
    return network(x, sigma) + label[:, None, None]


@pytest.mark.parametrize("batch_size", [None, 1, 2])
@pytest.mark.parametrize("count", [2, 4])
def test_a_model_of_other_sequences_than_the_run_s(ref, count, batch_size):
    graph = ref.StructuredAbsorbing(V)
    told = per_sequence(labelled, label=torch.arange(count))
    for score in (from_logits(told, graph), classifier_free(from_logits(told, graph), told, 1.0, num_states=V + 1)):
        with pytest.raises(ValueError, match=f"of {count} sequences, and the run has 3: one for each"):
            sample(score, graph, ref.LogLinear(), shape=(3, 4), batch_size=batch_size)
    x = torch.full((3, 4), V)
    with pytest.raises(ValueError, match=f"of {count} sequences, and the run has 3"):
        next(trajectory(from_logits(told, graph), graph, ref.LogLinear(), x=x, given=x < 0))


def test_conditions_of_different_numbers(ref):
    with pytest.raises(ValueError, match=r"different numbers of sequences: \{'label': 2, 'size': 3\}"):
        per_sequence(labelled, label=torch.arange(2), size=torch.arange(3))
    assert not hasattr(per_sequence(network), "sequences")


def test_a_network_of_the_tokens_alone(ref):
    graph: Any = ref.StructuredAbsorbing(V)

    class Network(torch.nn.Module):
        def forward(self, x, *, hurry=False):
            return network(x, None)

    networks: list[Any] = [Network(), lambda x: network(x, None)]
    for alone in networks:
        for adapt in (from_logits, from_posterior, to_posterior, lambda model, graph: controlled(model, graph)):
            with pytest.raises(ValueError, match=r"called as .*\(x, sigma\), .* tokens alone: hand in lambda x, sigma"):
                adapt(alone, graph)
        with pytest.raises(ValueError, match=r"the score model is called as score\(x, sigma\), and this"):
            sample(alone, graph, ref.LogLinear(), shape=(1, 2))
    from_logits(lambda *given: network(*given), graph)
    from_logits(lambda x, sigma: Network()(x), graph)


def test_text_in_the_place_of_its_ids(ref):
    graph, x = ref.StructuredAbsorbing(V), torch.zeros(1, 2, dtype=torch.int64)
    score, noise = from_logits(network, graph), ref.LogLinear()
    runs: list[Any] = [infill, generate]
    for run in runs:
        more: dict[str, Any] = {"block_size": 1} if run is generate else {}
        with pytest.raises(ValueError, match=r"x must be a tensor \(batch, length\), got 'to be': pad_prompts makes"):
            run(score, graph, noise, x="to be", given=x > 0, **more)
        with pytest.raises(ValueError, match=r"given must be a tensor \(batch, length\), got None"):
            run(score, graph, noise, x=x, given=None, **more)
