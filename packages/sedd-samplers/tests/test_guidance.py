"""Guidance against Bayes' rule, worked out by enumeration in float64."""

from __future__ import annotations

import pytest
import torch
from sedd_samplers import sample
from sedd_samplers.adapters import to_posterior
from sedd_samplers.controls import controlled
from sedd_samplers.guidance import classifier_free, classifier_guided, first_order_ratios, neighbour_ratios

GRAPHS = {"absorbing": lambda ref: ref.StructuredAbsorbing(3), "uniform": lambda ref: ref.StructuredUniform(4)}
SIGMA = torch.tensor([0.4, 1.5], dtype=torch.float64)


def problem(ref, name):
    """A law of three tokens as a mixture of two classes: graph, p0 (unnormalised per class, their sum), and p(c)."""
    graph = GRAPHS[name](ref)
    vocab_size = graph.num_states - (graph.mask_id is not None)
    one, other = (ref.random_data(vocab_size, 3, graph.num_states, graph.mask_id, seed=seed) for seed in (1, 2))
    return graph, one, 0.3 * one + 0.7 * other


def log_classifier(ref, graph, one, whole):
    """(x (R, 3), sigma (R,)) -> log p_t(c | x), exact."""
    given_class, any_class = ref.ExactScore(one, graph.Q), ref.ExactScore(whole, graph.Q)

    def log_prob(x, sigma):
        levels, level = torch.unique(sigma, return_inverse=True)
        index = (level, *x.T)
        return (0.3 * given_class.marginal(levels.double())[index] / any_class.marginal(levels.double())[index]).log()

    return log_prob


@pytest.mark.parametrize("name", GRAPHS)
def test_a_classifier_at_weight_one_is_bayes_rule(ref, name):
    graph, one, whole = problem(ref, name)
    ratios = neighbour_ratios(log_classifier(ref, graph, one, whole), 4, batch_size=7)
    guided = classifier_guided(ref.ExactScore(whole, graph.Q), ratios, 1.0, num_states=4)
    free = classifier_free(ref.ExactScore(one, graph.Q), ref.ExactScore(whole, graph.Q), 1.0, num_states=4)
    x = torch.tensor([[0, 3, 3], [2, 1, 3]])
    expected = ref.ExactScore(one, graph.Q)(x, SIGMA)
    for score in (guided, free):
        torch.testing.assert_close(score(x, SIGMA).exp(), expected.exp(), rtol=1e-9, atol=1e-12)
        where = torch.tensor([[True, False, True], [False, True, False]])
        torch.testing.assert_close(score(x, SIGMA, where=where).exp(), expected[where].exp(), rtol=1e-9, atol=1e-12)


def test_guided_samples_are_the_class(ref):
    """A false alarm once in 10,000 seeds; without guidance the same test fails."""
    graph, one, whole = problem(ref, "absorbing")
    ratios = neighbour_ratios(log_classifier(ref, graph, one, whole), 4)

    def p_value(weight):
        score = classifier_guided(ref.ExactRows(whole, graph.Q), ratios, weight, num_states=4)
        x = sample(score, graph, ref.LogLinear(), shape=(4000, 3), steps=32,
                   generator=torch.Generator().manual_seed(0))  # fmt: skip
        return ref.chi_square(x, one)

    assert p_value(1.0) > 1e-4
    assert p_value(0.0) < 1e-6


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 3.0])
def test_both_kinds_are_the_same_combination(ref, weight):
    graph, one, whole = problem(ref, "uniform")
    x = torch.tensor([[0, 3, 3], [2, 1, 3]])
    given_class, any_class = ref.ExactScore(one, graph.Q), ref.ExactScore(whole, graph.Q)
    expected = any_class(x, SIGMA) + weight * (given_class(x, SIGMA) - any_class(x, SIGMA))
    free = classifier_free(given_class, any_class, weight, num_states=4)
    ratios = neighbour_ratios(log_classifier(ref, graph, one, whole), 4)
    guided = classifier_guided(any_class, ratios, weight, num_states=4)
    torch.testing.assert_close(free(x, SIGMA), expected)
    torch.testing.assert_close(guided(x, SIGMA), expected)


def test_first_order_is_exact_for_a_linear_classifier_and_near_for_a_weak_one(ref):
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def linear(tokens, sigma):
        return (tokens * weight).sum((1, 2)) * sigma

    def sigmoid(scale):
        return lambda tokens, sigma: torch.nn.functional.logsigmoid(scale * (tokens * weight).sum((1, 2)))

    def both(classifier):
        by_token = lambda x, sigma: classifier(torch.nn.functional.one_hot(x, 4).double(), sigma)  # noqa: E731
        x = torch.tensor([[0, 3, 3], [2, 1, 3]])
        return first_order_ratios(classifier, 4)(x, SIGMA), neighbour_ratios(by_token, 4)(x, SIGMA)

    torch.testing.assert_close(*both(linear))
    errors = [float((first - exact).abs().max()) for first, exact in map(both, (sigmoid(0.1), sigmoid(0.01)))]
    assert errors[1] == pytest.approx(errors[0] / 100, rel=0.2)  # second order in what was left out


def test_first_order_guidance_works_in_a_sampler_in_inference_mode(ref):
    """A classifier that wants token 2: guided samples have more of it; a network of the caller's is not trained."""
    graph, head = ref.StructuredAbsorbing(3), torch.nn.Linear(4, 1)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.0, 0.0, 2.0, 0.0]]))
    ratios = first_order_ratios(lambda tokens, sigma: head(tokens).sum((1, 2)), 4)
    flat = lambda x, sigma: (-sigma.expm1().log() - torch.tensor(3.0).log())[:, None, None].expand(*x.shape, 4)  # noqa: E731
    share = []
    for weight in (0.0, 1.0):
        with torch.inference_mode():
            score = controlled(classifier_guided(flat, ratios, weight, num_states=4), graph)
            x = sample(score, graph, ref.LogLinear(), shape=(50, 40), steps=20, seeds=range(50))
        share.append(float((x == 2).float().mean()))
    e = float(torch.tensor(2.0).exp())
    assert share[0] == pytest.approx(1 / 3, abs=0.05)  # 2000 tokens: a standard deviation of 0.011
    assert share[1] == pytest.approx(e / (e + 2), abs=0.05)
    assert head.weight.grad is None


def test_a_condition_for_each_sequence(ref):
    """Labels are looked up by the sequence's number in the run, also when others are finished."""
    graph = ref.StructuredAbsorbing(3)
    label = torch.tensor([0, 1, 2])

    def conditional(x, sigma, where, rows):
        s = torch.full((*x.shape, 4), 0.1).scatter(2, label[rows][:, None, None].expand(*x.shape, 1), 0.8)
        return (s.log() - sigma.expm1().log()[:, None, None])[where]

    flat = lambda x, sigma: (-sigma.expm1().log() - torch.tensor(3.0).log())[:, None, None].expand(*x.shape, 4)  # noqa: E731
    score = controlled(classifier_free(conditional, flat, 8.0, num_states=4), graph)  # type: ignore[arg-type]
    until = lambda state: torch.tensor([state.step > 3, False, False])  # noqa: E731
    x = sample(score, graph, ref.LogLinear(), shape=(3, 30), steps=10, seeds=range(3), until=until)
    assert (x[1:] == label[1:, None]).all()
    assert ((x[0] == 0) | (x[0] == 3)).all()


@pytest.mark.parametrize("weight", [0.3, 0.7, 2.0])
def test_what_one_score_excludes_is_excluded(weight):
    s = torch.tensor([[[0.0, -torch.inf, 1.0, -torch.inf]]])
    t = torch.tensor([[[0.0, 2.0, -torch.inf, -torch.inf]]])
    x, sigma = torch.zeros(1, 1).long(), torch.ones(1)
    free = classifier_free(lambda x, sigma: s, lambda x, sigma: t, weight, num_states=4)(x, sigma)
    assert free.tolist() == [[[0.0, -torch.inf, -torch.inf, -torch.inf]]]
    guided = classifier_guided(lambda x, sigma: s, lambda x, sigma: t + torch.inf, weight, num_states=4)
    assert guided(x, sigma)[0, 0, 1] == -torch.inf


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda f: classifier_free(f, f, -1.0, num_states=4), "weight must be finite and at least 0, got -1.0"),
        (lambda f: classifier_guided(f, f, float("inf"), num_states=4), "weight must be finite"),
        (lambda f: classifier_free(f, 3, 1.0, num_states=4), "the unconditional score model must be callable"),  # type: ignore[arg-type]
        (lambda f: classifier_guided(f, None, 1.0, num_states=4), "the classifier's ratios must be callable"),  # type: ignore[arg-type]
        (
            lambda f: classifier_guided(lambda x, s: torch.zeros(1, 2, 4), f, 1.0, num_states=4)(
                torch.zeros(1, 2).long(), torch.ones(1)
            ),
            r"the classifier's ratios must return a float tensor of shape \(1, 2, 4\), got torch.float32 \(1, 2, 5\)",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make, told):
    with pytest.raises(ValueError, match=told):
        make(lambda x, sigma: torch.zeros(1, 2, 5))


def test_the_guided_posterior_of_unequal_scores_does_not_sum_to_one_and_is_made_to(ref):
    graph, one, whole = problem(ref, "absorbing")
    score = classifier_free(ref.ExactScore(one, graph.Q), ref.ExactScore(whole, graph.Q), 2.0, num_states=4)
    x = torch.tensor([[0, 3, 3], [3, 1, 3]])
    masked = x == 3
    mass = (score(x, SIGMA).exp()[..., :3].sum(-1) * SIGMA.expm1()[:, None])[masked]
    assert (mass - 1).abs().min() > 0.01
    again = controlled(score, graph)
    mass = (again(x, SIGMA).exp()[..., :3].sum(-1) * SIGMA.expm1()[:, None])[masked]
    torch.testing.assert_close(mass, torch.ones_like(mass))
    torch.testing.assert_close(to_posterior(again, graph)(x, SIGMA), to_posterior(score, graph)(x, SIGMA))


@pytest.mark.parametrize("size", [1, 5, 11, 1000])
def test_ratios_are_worked_out_in_pieces_as_at_once(size, monkeypatch):
    """Sequences at a time for a gradient, neighbours at a time for evaluations; every answer where it belongs."""
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.randint(4, (5, 3), generator=torch.Generator().manual_seed(1))
    sigma = torch.linspace(0.5, 1.5, 5, dtype=torch.float64)
    where = torch.rand(5, 3, generator=torch.Generator().manual_seed(2)) < 0.6
    asked = []

    def linear(tokens, sigma):
        asked.append(len(tokens))
        return (tokens * weight).sum((1, 2)) * sigma

    by_token = lambda x, sigma: linear(torch.nn.functional.one_hot(x, 4).double(), sigma)  # noqa: E731
    monkeypatch.setattr("sedd_samplers.guidance.rows_at_a_time", lambda num_states, device: size)
    right = (weight[torch.arange(3)][None] - weight[torch.arange(3), x][..., None]) * sigma[:, None, None]
    ratios = first_order_ratios(linear, 4)
    torch.testing.assert_close(ratios(x, sigma), right)
    assert max(asked) == min(max(1, size // 3), 5)
    torch.testing.assert_close(ratios(x, sigma, where=where), right[where])
    asked.clear()
    neighbours = neighbour_ratios(by_token, 4, batch_size=size)
    torch.testing.assert_close(neighbours(x, sigma, where=where), right[where])
    total = 4 * int(where.sum())
    assert asked == [5, *(min(size, total - i) for i in range(0, total, size))]


@pytest.mark.parametrize("weight", [0, 0.0, 1, 1.0])
def test_at_weight_0_and_1_one_score_alone_counts_and_is_asked(weight):
    """Also of the states that the other one excludes; at weight 0 a classifier is not asked either."""
    s = torch.tensor([[[0.0, -torch.inf, 1.0, 0.5]]])
    t = torch.tensor([[[0.0, 2.0, -torch.inf, 0.5]]])
    x, sigma, asked = torch.zeros(1, 1).long(), torch.ones(1), []

    def named(name, answer):
        def model(x, sigma):
            asked.append(name)
            return answer

        return model

    free = classifier_free(named("given", s), named("any", t), weight, num_states=4)(x, sigma)
    assert torch.equal(free, s if weight else t)
    assert asked == ["given" if weight else "any"]
    asked.clear()
    guided = classifier_guided(named("any", t), named("ratios", torch.ones(1, 1, 4)), weight, num_states=4)(x, sigma)
    assert torch.equal(guided, t + weight)
    assert asked == ["any", "ratios"][: 1 + int(weight)]


@pytest.mark.parametrize(("one", "other"), [("float32", "float64"), ("float64", "float32"), ("bfloat16", "float32")])
def test_scores_of_two_precisions_are_combined(one, other):
    first, second = (torch.linspace(low, 1, 4).to(getattr(torch, kind)) for low, kind in ((0, one), (-1, other)))
    guided = classifier_free(lambda x, sigma: first.expand(1, 2, 4), lambda x, sigma: second.expand(1, 2, 4), 1.5,
                             num_states=4)  # fmt: skip
    found = guided(torch.zeros(1, 2).long(), torch.ones(1))
    expected = second.double() + 1.5 * (first.double() - second.double())
    torch.testing.assert_close(found[0, 1].double(), expected, rtol=1e-5, atol=1e-6)
