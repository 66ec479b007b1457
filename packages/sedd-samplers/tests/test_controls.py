"""Controls on the posterior: what they do to a row, and to samples."""

from __future__ import annotations

import math

import pytest
import torch
from sedd_samplers import Tweedie, infill, pad_prompts, sample, uniform_grid
from sedd_samplers.adapters import from_posterior, to_posterior
from sedd_samplers.controls import (
    allowed_tokens,
    apply_controls,
    controlled,
    min_p,
    repetition_penalty,
    temperature,
    top_k,
    top_p,
)
from sedd_samplers.leave_one_out import leave_one_out

ROW = torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15]], dtype=torch.float64)
NOWHERE = torch.zeros(1, dtype=torch.int64)
GRAPHS = {
    "absorbing": lambda ref: ref.StructuredAbsorbing(4),
    "uniform": lambda ref: ref.StructuredUniform(5),
    "hybrid": lambda ref: ref.hybrid_matrix(4),
    "clustered": lambda ref: ref.clustered_matrix((0, 0, 1, 1, 1)),
    "ordinal": lambda ref: ref.ordinal_matrix(5),
}


def on_row(control):
    p = control(ROW.clone(), NOWHERE, NOWHERE)
    return (p / p.sum())[0].tolist()


def test_temperature_is_a_power():
    assert on_row(temperature(0.5)) == pytest.approx([p**2 / 0.285 for p in ROW[0].tolist()])
    assert on_row(temperature(1.0)) == pytest.approx(ROW[0].tolist())


def test_top_k_keeps_the_likeliest():
    assert on_row(top_k(2)) == pytest.approx([0, 4 / 7, 0, 3 / 7, 0])
    assert on_row(top_k(99)) == pytest.approx(ROW[0].tolist())


@pytest.mark.parametrize(
    ("mass", "kept"), [(1e-9, [1]), (0.4, [1]), (0.41, [1, 3]), (0.8, [1, 3, 4]), (1.0, [0, 1, 2, 3, 4])]
)
def test_top_p_keeps_the_fewest_that_reach_the_mass(mass, kept):
    assert [i for i, p in enumerate(on_row(top_p(mass))) if p] == kept


def test_allowed_is_by_position_and_sequence():
    tokens = torch.ones(2, 3, 5, dtype=torch.bool)
    tokens[1, 2, [1, 3]] = False
    p = allowed_tokens(tokens)(ROW.expand(3, 5), torch.tensor([0, 1, 1]), torch.tensor([2, 2, 1]))
    assert (p == 0).nonzero().tolist() == [[1, 1], [1, 3]]
    p = allowed_tokens(tokens[1])(ROW.expand(2, 5), torch.tensor([0, 7]), torch.tensor([1, 2]))
    assert (p == 0).nonzero().tolist() == [[1, 1], [1, 3]]


@pytest.mark.parametrize("name", GRAPHS)
def test_controls_act_on_the_law_given_the_other_positions(ref, name):
    """On the posterior or through the score, one control or several in their order: p' is pi' times the likelihood."""
    graph = GRAPHS[name](ref)
    x = torch.arange(5).repeat(2, 1)
    sigma = torch.tensor([0.3, 1.7], dtype=torch.float64)
    p = torch.rand(2, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if graph.mask_id is not None:
        p[..., graph.mask_id] = 0
    likelihood = torch.linalg.matrix_exp(sigma[:, None, None] * graph.Q)[:, torch.arange(5)]  # p(x | c), x = 0..4
    pi = torch.where(likelihood > 1e-12, p / likelihood, 0.0)
    hot = (pi / pi.sum(-1, keepdim=True)) ** (1 / 1.5)
    expected = hot * (hot >= hot.topk(2).values[..., 1:]) * likelihood
    expected /= expected.sum(-1, keepdim=True)
    controls = [temperature(1.5), top_k(2)]
    for score in (
        from_posterior(lambda x, sigma: p, graph, controls=controls),
        controlled(from_posterior(lambda x, sigma: p, graph), graph, *controls),
    ):
        torch.testing.assert_close(to_posterior(score, graph)(x, sigma), expected, rtol=1e-6, atol=1e-9)


P0 = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05], dtype=torch.float64)
CONTROLS = {
    "none": ([], P0),
    "top-1": ([top_k(1)], torch.tensor([1.0, 0, 0, 0, 0])),
    "top-2": ([top_k(2)], P0 * torch.tensor([1.0, 1, 0, 0, 0])),
    "top-p": ([top_p(0.75)], P0 * torch.tensor([1.0, 1, 1, 0, 0])),
    "min-p": ([min_p(0.25)], P0 * torch.tensor([1.0, 1, 1, 0, 0])),
    "cold": ([temperature(0.5)], P0**2),
    "hot": ([temperature(2.0)], P0**0.5),
    "allowed": (
        [allowed_tokens(torch.tensor([[False, True, False, True, True]]))],
        P0 * torch.tensor([0.0, 1, 0, 1, 1]),
    ),
    "hot, then top-2": ([temperature(2.0), top_k(2)], P0**0.5 * torch.tensor([1.0, 1, 0, 0, 0])),
    "top-3, then top-p": ([top_k(3), top_p(0.75)], P0 * torch.tensor([1.0, 1, 0, 0, 0])),  # .7 of .85 is .82
}
NOISED = {
    "absorbing": lambda ref: ref.absorbing_matrix(5, 2),
    "absorbing, mask last": lambda ref: ref.absorbing_matrix(5),
    "dense": lambda ref: ref.cycle_matrix(5),
    "uniform": lambda ref: ref.uniform_matrix(5),
    "hybrid": lambda ref: ref.hybrid_matrix(5),
    "clustered": lambda ref: ref.clustered_matrix((0, 0, 1, 1, 1)),
    "ordinal": lambda ref: ref.ordinal_matrix(5),
}


def over_states(graph, law):
    """A law of five tokens over the graph's states: nothing at the mask."""
    if graph.mask_id is None:
        return law.double()
    return torch.cat([law[: graph.mask_id], torch.zeros(1), law[graph.mask_id :]]).double()


def one_position(ref, name, control):
    """A graph, a network's float32 posterior under a control, and the controlled law."""
    graph, (controls, law) = NOISED[name](ref), CONTROLS[control]
    if control == "allowed" and graph.mask_id is not None:
        controls = [allowed_tokens(over_states(graph, torch.tensor([0.0, 1, 0, 1, 1])).bool()[None])]
    p0 = over_states(graph, P0)

    def posterior(x, sigma):
        levels, level = torch.unique(sigma, return_inverse=True)
        return (p0 * graph.exp(levels)).float()[level[:, None], x]

    score = from_posterior(posterior, graph, controls=controls)
    return graph, score, over_states(graph, law / law.sum())


class OnStates:
    """A score model whose states can be enumerated, asked about those that a jump leads into."""

    def __init__(self, score, graph):
        self.score, self.p0 = score, torch.zeros(graph.num_states)
        self.enterable = (graph.Q > 1e-12).any(1)

    def __call__(self, x, sigma):
        where = self.enterable[x]
        out = torch.full((*x.shape, len(self.p0)), math.nan)
        out[where] = self.score(x, sigma, where=where)
        return out


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("name", NOISED)
def test_one_position_has_the_controlled_law_under_every_graph(ref, name, control):
    """The exact law after 32 steps and the denoise, whatever the control: no chance in it."""
    graph, score, law = one_position(ref, name, control)
    noise, times = ref.Geometric(1e-4, 8.0), uniform_grid(32)
    start = graph.exp(torch.tensor(200.0))[:, 0].clamp(min=0)
    score = OnStates(score, graph)
    got = ref.law_of_chain(score, graph, noise, Tweedie(), times, start, denoise=True)
    assert float((got - law).abs().sum()) / 2 < 1e-3


@pytest.mark.parametrize("name", NOISED)
@pytest.mark.parametrize(
    "control",
    [pytest.param(c, marks=[] if c == "hot, then top-2" else [pytest.mark.slow]) for c in CONTROLS],
)
def test_samples_have_the_controlled_law(ref, name, control):
    """100,000 of them, each token within 4 standard errors; a false alarm once in 3,000 seeds each."""
    graph, score, law = one_position(ref, name, control)
    n = 100_000
    x = sample(score, graph, ref.Geometric(1e-4, 8.0), shape=(n, 1), steps=6,
               generator=torch.Generator().manual_seed(0))  # fmt: skip
    share = torch.bincount(x[:, 0], minlength=graph.num_states) / n
    assert ((share - law).abs() <= 4 * (law * (1 - law) / n).sqrt() + 1e-12).all()


@pytest.mark.parametrize("name", ["uniform", "hybrid", "clustered"])
def test_one_position_is_controlled_through_its_score_as_well(ref, name):
    """As far as the noise goes at which a float64 score still tells the law; a false alarm once in 10,000 seeds."""
    graph = NOISED[name](ref)
    score = controlled(ref.ExactRows(over_states(graph, P0), graph.Q), graph, temperature(0.5), top_k(3))
    x = sample(score, graph, ref.Linear(11.0), shape=(20_000, 1), steps=6, t_min=1e-3,
               generator=torch.Generator().manual_seed(0))  # fmt: skip
    assert ref.chi_square(x, over_states(graph, P0**2 * torch.tensor([1.0, 1, 1, 0, 0]))) > 1e-4


def test_without_controls_a_score_is_normalised(ref):
    graph = ref.StructuredAbsorbing(4)
    x, sigma = torch.full((1, 3), 4), torch.tensor([0.7], dtype=torch.float64)
    score = lambda x, sigma: torch.zeros(*x.shape, 5, dtype=torch.float64)  # noqa: E731
    s = controlled(score, graph)(x, sigma).exp()
    torch.testing.assert_close(s[..., :4] * sigma.expm1(), torch.full((1, 3, 4), 0.25).double())


def test_what_is_said_of_tokens_that_cannot_have_become_x_is_no_part_of_its_law(ref):
    """Under absorption a token was itself, whatever a network answers there; a mask was any."""
    x, level = torch.tensor([2, 4]), torch.full((2,), 0.7, dtype=torch.float64)
    law = leave_one_out(torch.zeros(2, 5, dtype=torch.float64), x, ref.StructuredAbsorbing(4), level)
    torch.testing.assert_close(law, torch.tensor([[0.0, 0, 1, 0, 0], [0.25, 0.25, 0.25, 0.25, 0]]).double())


def test_one_position_is_sampled_at_its_temperature(ref):
    """Exact with everything else given; a false alarm once in 10,000 seeds."""
    graph = ref.StructuredAbsorbing(3)
    p0 = ref.random_data(3, 2, 4, 3)
    score = controlled(ref.ExactRows(p0, graph.Q), graph, temperature(0.5))
    x = torch.tensor([[1, 0]]).expand(20_000, 2)
    out = infill(score, graph, ref.LogLinear(), x=x, given=torch.tensor([[True, False]]).expand(20_000, 2), steps=4,
                 generator=torch.Generator().manual_seed(0))  # fmt: skip
    law = torch.zeros_like(p0)
    law[1] = p0[1] ** 2
    assert ref.chi_square(out, law) > 1e-4


def constraints(graph, mask_id):
    tokens = torch.ones(3, 5, dtype=torch.bool)
    tokens[0, [0, 1]] = False
    tokens[2] = False
    tokens[2, [0, 2, 3]] = True
    if mask_id is not None:
        tokens[:, mask_id] = False
    return tokens


@pytest.mark.parametrize("name", GRAPHS)
def test_constraints_hold_in_every_sample_of_every_graph(ref, name):
    graph = GRAPHS[name](ref)
    p0 = ref.random_data(5 - (graph.mask_id is not None), 3, 5, graph.mask_id)
    tokens = constraints(graph, graph.mask_id)
    posterior = to_posterior(ref.ExactRows(p0, graph.Q), graph)
    score = from_posterior(posterior, graph, controls=[allowed_tokens(tokens)])
    x = sample(score, graph, ref.Linear(4.0), shape=(2000, 3), steps=8, generator=torch.Generator().manual_seed(0))
    assert tokens[torch.arange(3), x].all()
    assert len(x.unique(dim=0)) > 10


@pytest.mark.parametrize("through_the_score", [False, True])
def test_constraints_stay_with_their_sequence_when_others_are_finished(ref, through_the_score):
    """Each sequence is allowed one token of its own; the first and the third are out of the call from the start."""
    graph = ref.StructuredAbsorbing(4)
    own = torch.tensor([0, 1, 2, 3])
    control = allowed_tokens(torch.nn.functional.one_hot(own, 5).bool()[:, None].expand(4, 3, 5))
    flat = lambda x, sigma: torch.ones(*x.shape, 5)  # noqa: E731
    if through_the_score:
        score = controlled(from_posterior(flat, graph), graph, control)
    else:
        score = from_posterior(flat, graph, controls=[control])
    given = torch.tensor([True, False, True, False])[:, None].expand(4, 3)
    out = infill(score, graph, ref.LogLinear(), x=torch.zeros(4, 3).long(), given=given, steps=5, seeds=range(4))
    assert out.tolist() == [[0] * 3, [1] * 3, [0] * 3, [3] * 3]


@pytest.mark.parametrize("name", ["absorbing", "uniform"])
def test_constraints_on_independent_tokens_are_exact(ref, name):
    """The law is p0 given the constraint; a false alarm once in 10,000 seeds."""
    graph = GRAPHS[name](ref)
    tokens = constraints(graph, graph.mask_id)
    rows = torch.rand(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.2
    if graph.mask_id is not None:
        rows[:, graph.mask_id] = 0
    rows /= rows.sum(-1, keepdim=True)
    p0 = torch.einsum("a,b,c->abc", *rows)
    posterior = to_posterior(ref.ExactRows(p0, graph.Q), graph)
    score = from_posterior(posterior, graph, controls=[allowed_tokens(tokens)])
    x = sample(score, graph, ref.Linear(12.0), shape=(20_000, 3), steps=16, t_min=1e-3,
               generator=torch.Generator().manual_seed(0))  # fmt: skip
    law = torch.einsum("a,b,c->abc", *(rows * tokens))
    assert ref.chi_square(x, law) > 1e-4


def test_a_constraint_that_the_model_excludes_is_named(ref):
    graph = ref.StructuredAbsorbing(4)
    tokens = torch.ones(3, 5, dtype=torch.bool)
    tokens[1] = torch.tensor([False, False, True, False, False])
    p = torch.tensor([0.5, 0.5, 0, 0, 0]).expand(2, 3, 5)
    score = from_posterior(lambda x, sigma: p, graph, controls=[allowed_tokens(tokens)])
    with pytest.raises(
        ValueError, match=r"step 1 of 5, from t = 1 to .*: the controls leave no token at sequence 0, pos"
    ):
        sample(score, graph, ref.LogLinear(), shape=(2, 3), steps=4)


def test_a_posterior_that_rounding_has_eaten_is_refused(ref):
    """Uniform noise in float32: the posterior comes back to 1e-2 as far as it is let, and beyond there is an error.

    In float64 it goes on; absorbing graphs, whose masks hide tokens but do not change them, have no such end.
    """
    graph = ref.StructuredUniform(5)
    p = torch.tensor([[[0.5, 0.3, 0.1, 0.06, 0.04]]])
    score = from_posterior(lambda x, sigma: p, graph)
    x = torch.zeros(1, 1, dtype=torch.int64)
    for level in (1.0, 5.0, 9.0):
        torch.testing.assert_close(to_posterior(score, graph)(x, torch.tensor([level])), p, rtol=0, atol=1e-2)
    for wrapper in (to_posterior(score, graph), controlled(score, graph, temperature(0.9))):
        with pytest.raises(ValueError, match=r"cannot be told from a torch.float32 score at sigma = 10: .*beyond 9.03"):
            wrapper(x, torch.tensor([10.0]))
    exact = from_posterior(lambda x, sigma: p.double(), graph)
    back = to_posterior(exact, graph)(x, torch.tensor([20.0], dtype=torch.float64))
    torch.testing.assert_close(back, p.double(), rtol=0, atol=1e-2)
    graph = ref.StructuredAbsorbing(4, 0)
    back = to_posterior(from_posterior(lambda x, sigma: p, graph), graph)(x, torch.tensor([20.0]))
    torch.testing.assert_close(back, torch.tensor([[[0.0, 0.6, 0.2, 0.12, 0.08]]]))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: temperature(0), r"top_k\(1\)"),
        (lambda: temperature(math.nan), "temperature must be positive and finite, got nan"),
        (lambda: top_k(0), "top_k must be a positive integer, got 0"),
        (lambda: top_k(1.5), "top_k must be a positive integer"),  # type: ignore[arg-type]
        (lambda: top_p(0), r"top_p must lie in \(0, 1\], got 0"),
        (lambda: top_p(1.1), "top_p must lie in"),
        (lambda: allowed_tokens(torch.ones(3, 5)), "must be bool of shape"),
        (lambda: allowed_tokens(torch.zeros(3, 5).bool()), "no token is allowed at position 0"),
        (lambda: allowed_tokens(torch.ones(3, 4).bool())(ROW, NOWHERE, NOWHERE), "too small for .* 5 states"),
        (lambda: allowed_tokens(torch.ones(3, 5).bool())(ROW, NOWHERE, NOWHERE + 3), "too small for .* position 3"),
        (lambda: pad_prompts([[1, 2], [1]], [4]), "one length for each prompt, got 1 for 2 prompts"),
        (lambda: pad_prompts([[1, 2, 3]], 2), "prompt 0 has 3 tokens, which do not fit into a sequence of length 2"),
        (lambda: pad_prompts([[1, 2], []], [1, 4], pad_id=0), "prompt 0 has 2 tokens, .* a sequence of length 1"),
        (lambda: pad_prompts([[1], [2]], [4, 5]), "lengths differ, from 4 to 5: name the token that pads"),
        (lambda: pad_prompts([], 4), "one length for each prompt"),
    ],
)
def test_what_makes_no_sense_is_refused(make, told):
    with pytest.raises(ValueError, match=told):
        make()


def test_prompts_and_sequences_of_different_lengths():
    x, given = pad_prompts([[5, 7], [], [6]], [2, 3, 4], pad_id=9)
    assert x.tolist() == [[5, 7, 9, 9], [9, 9, 9, 9], [6, 9, 9, 9]]
    assert given.int().tolist() == [[1, 1, 1, 1], [0, 0, 0, 1], [1, 0, 0, 0]]
    x, given = pad_prompts([[5], []], 2)
    assert given.int().tolist() == [[1, 0], [0, 0]]


@pytest.mark.parametrize("kind", ["absorbing", "hybrid"])
def test_a_leave_one_out_law_is_one_of_tokens(ref, kind):
    """None of it is the mask's, which could have stayed what it is."""
    graph = ref.StructuredAbsorbing(4) if kind == "absorbing" else ref.hybrid_matrix(4)
    x, sigma = torch.tensor([4, 1]), torch.tensor([0.7, 1.2], dtype=torch.float64)
    log_score = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    law = leave_one_out(log_score, x, graph, sigma)
    assert (law[:, 4] == 0).all()
    torch.testing.assert_close(law.sum(-1), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (law >= 0).all()


EACH = {
    "temperature": (temperature(0.5), [0.25, 0.0, 0.09, 0.04]),
    "temperature 1": (temperature(1.0), [0.5, 0.0, 0.3, 0.2]),
    "top 1": (top_k(1), [0.5, 0.0, 0.0, 0.0]),
    "top 9": (top_k(9), [0.5, 0.0, 0.3, 0.2]),
    "most": (top_p(0.7), [0.5, 0.0, 0.3, 0.0]),
    "all": (top_p(1), [0.5, 0.0, 0.3, 0.2]),
    "not rare": (min_p(0.5), [0.5, 0.0, 0.3, 0.0]),
    "none rare": (min_p(0.0), [0.5, 0.0, 0.3, 0.2]),
    "once": (repetition_penalty(2.0), [0.5, 0.0, 0.09, 0.2]),
    "allowed": (allowed_tokens(torch.tensor([[True] * 4, [False, True, True, True]])), [0.0, 0.0, 0.3, 0.2]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EACH)
def test_a_control_makes_a_new_law_of_the_same_precision(name, dtype):
    """Of one that is twice a distribution: it is made one first, once more afterwards, and itself left alone."""
    control, weights = EACH[name]
    law = torch.tensor([[1.0, 0.0, 0.6, 0.4]], dtype=dtype)
    before, x = law.clone(), torch.tensor([[0, 1, 3], [2, 2, -1]])
    sequence = torch.tensor([1])
    out = apply_controls([control], law, sequence, torch.tensor([1]), x)
    assert out.dtype == dtype
    assert out[0].tolist() == pytest.approx([w / sum(weights) for w in weights], rel=1e-6)
    assert torch.equal(law, before)
    again = apply_controls(
        [control, lambda p, sequence, position: p], law, sequence + 6, torch.tensor([1]), x, sequence
    )
    torch.testing.assert_close(again, out)
    one = law / 2
    counts = {"counts": torch.tensor([[0, 0, 2, 0]])} if name == "once" else {}
    control(one, sequence, torch.tensor([1]), **counts)
    assert torch.equal(one, before / 2)


def test_every_control_is_given_a_distribution():
    sums: list[float] = []

    def noted(p, sequence, position):
        sums.append(float(p.sum()))
        return 3 * p

    law = torch.tensor([[2.0, 0.0, 1.0]])
    apply_controls([noted, noted, noted], law, torch.zeros(1).long(), torch.zeros(1).long())
    assert sums == pytest.approx([1.0, 1.0, 1.0])


def test_allowed_tokens_are_those_of_the_sequence_and_the_position():
    tokens = torch.zeros(2, 2, 4, dtype=torch.bool)
    for b, i, y in ((0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 3)):
        tokens[b, i, y] = True
    sequence, position = torch.tensor([1, 0, 1, 0]), torch.tensor([0, 1, 1, 0])
    out = allowed_tokens(tokens)(torch.full((4, 4), 0.25), sequence, position)
    assert out.argmax(1).tolist() == [2, 1, 3, 0]
    assert (out > 0).sum(1).tolist() == [1] * 4
    for b, i, told in ((2, 0, "sequence 2"), (0, 2, "position 2")):
        with pytest.raises(ValueError, match=f"too small for .*{told}"):
            allowed_tokens(tokens)(torch.ones(1, 4), torch.tensor([b]), torch.tensor([i]))
    tokens[1, 1] = False
    with pytest.raises(ValueError, match="no token is allowed at sequence, position 1, 1"):
        allowed_tokens(tokens)
