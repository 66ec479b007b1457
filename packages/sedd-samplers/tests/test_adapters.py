"""Foreign models as score models, and back: in float64 the two undo each other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sedd_samplers import Tweedie, infill, sample
from sedd_samplers.adapters import (
    from_logits,
    from_masked_lm,
    from_posterior,
    from_reverse,
    from_velocity,
    per_sequence,
    to_posterior,
    to_reverse,
    to_velocity,
)
from sedd_samplers.adapters.heads import logits_of, path_of_head, with_head_at
from sedd_samplers.controls import controlled, temperature
from sedd_samplers.guidance import classifier_free
from sedd_samplers.steps import tweedie_probs, tweedie_score

GRAPHS = {
    "absorbing": lambda ref: ref.StructuredAbsorbing(4),
    "absorbing, mask amid the tokens": lambda ref: ref.StructuredAbsorbing(4, 2),
    "uniform": lambda ref: ref.StructuredUniform(5),
    "hybrid": lambda ref: ref.hybrid_matrix(4),
    "cycle": lambda ref: ref.cycle_matrix(5),
}
SIGMA = torch.tensor([0.3, 1.7], dtype=torch.float64)


@pytest.fixture(params=GRAPHS)
def graph(request, ref):
    return GRAPHS[request.param](ref)


def states():
    """(2, 5): every state once in each sequence."""
    return torch.stack([torch.arange(5), torch.arange(5).flip(0)])


def reach(graph, x, delta):
    """exp(delta Q)[x, .], (B, L, N), dense."""
    forward = torch.linalg.matrix_exp(delta[:, None, None] * graph.Q.double())
    return forward.gather(1, x[..., None].expand(-1, -1, 5))


def law_of(graph, x, delta, *, clean):
    """Any distribution over the states, or over the clean tokens, that can have become x."""
    p = torch.rand(*x.shape, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p *= reach(graph, x, delta) > 1e-12
    if clean and graph.mask_id is not None:
        p[..., graph.mask_id] = 0
    return p / p.sum(-1, keepdim=True)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)  # matrix_exp by eigenvectors, and cancellation


def test_a_posterior_there_and_back(graph):
    p = law_of(graph, states(), SIGMA, clean=True)
    score = from_posterior(lambda x, sigma: p, graph)
    close(to_posterior(score, graph)(states(), SIGMA), p)


def test_the_score_is_the_sum_over_clean_tokens(graph):
    x = states()
    p = law_of(graph, x, SIGMA, clean=True)
    s = from_posterior(lambda x, sigma: p, graph)(x, SIGMA).exp()
    for b in range(2):
        transition = torch.linalg.matrix_exp(SIGMA[b] * graph.Q.double())
        for i in range(5):
            clean = [x0 for x0 in range(5) if p[b, i, x0] > 0]
            expected = sum(p[b, i, x0] * transition[:, x0] / transition[x[b, i], x0] for x0 in clean)
            close(s[b, i], expected)


def test_a_score_there_and_back(graph):
    """The score of a distribution of sequences, seen as each of the other kinds and taken back."""
    x = states()
    delta = 0.4 * SIGMA
    p = law_of(graph, x, SIGMA, clean=True)
    score = from_posterior(lambda x, sigma: p, graph)
    s = score(x, SIGMA)
    close(from_posterior(to_posterior(score, graph), graph)(x, SIGMA).exp(), s.exp())
    steps = to_reverse(score, graph, lambda sigma: 0.4 * sigma)
    close(steps(x, SIGMA).sum(-1), torch.ones(2, 5, dtype=torch.float64))
    back = from_reverse(steps, graph, lambda sigma: 0.4 * sigma)(x, SIGMA)
    can = reach(graph, x, delta) > 1e-12  # a step tells nothing of states that cannot have become x in its course
    close(torch.where(can, back.exp(), 0.0), torch.where(can, s.exp(), 0.0))


def test_a_reverse_model_there_and_back(graph):
    """The model's own step is the Tweedie step of the score made from it, whatever the model says."""
    x, delta = states(), 0.4 * SIGMA
    p = law_of(graph, x, delta, clean=False)
    score = from_reverse(lambda x, sigma: p, graph, lambda sigma: 0.4 * sigma)
    close(to_reverse(score, graph, lambda sigma: 0.4 * sigma)(x, SIGMA), p)


@pytest.mark.parametrize("name", ["absorbing", "absorbing, mask amid the tokens", "uniform"])
def test_a_velocity_there_and_back(ref, name):
    graph = GRAPHS[name](ref)
    x = states()
    p = law_of(graph, x, SIGMA, clean=True)
    u = (p - torch.nn.functional.one_hot(x, 5)) / -torch.expm1(-SIGMA)[:, None, None]
    close(u.sum(-1), torch.zeros(2, 5, dtype=torch.float64))
    seen = []

    def velocity(x, kappa):
        seen.append(kappa)
        return u

    score = from_velocity(velocity, graph)
    close(score(x, SIGMA).exp(), from_posterior(lambda x, sigma: p, graph)(x, SIGMA).exp())
    close(seen[0], torch.exp(-SIGMA))
    close(to_velocity(score, graph)(x, torch.exp(-SIGMA)), u)


def test_the_velocity_of_an_absorbing_graph_is_its_reverse_rate(ref):
    """Per unit of kappa the reverse process jumps at Q[x, y] s_y dsigma / dkappa, with dkappa = kappa dsigma."""
    graph = ref.StructuredAbsorbing(4)
    x = torch.full((2, 5), 4)
    p = law_of(graph, x, SIGMA, clean=True)
    score = from_posterior(lambda x, sigma: p, graph)
    u = to_velocity(score, graph)(x, torch.exp(-SIGMA))
    close(u[..., :4], score(x, SIGMA).exp()[..., :4] * SIGMA.exp()[:, None, None])


@pytest.mark.parametrize("name", ["hybrid", "cycle"])
def test_a_flow_along_another_path_is_refused(ref, name):
    with pytest.raises(ValueError, match="transitions are no such mixture"):
        from_velocity(lambda x, kappa: x, GRAPHS[name](ref))


def test_tweedie_read_backwards_is_tweedie(graph):
    x, delta = states().flatten(), SIGMA.repeat_interleave(5)
    p = law_of(graph, states(), SIGMA, clean=False).flatten(0, 1)
    close(tweedie_probs(tweedie_score(p, x, graph, delta), x, graph, delta), p)


def test_logits_are_normalised_over_what_may_be_drawn(ref):
    graph = ref.StructuredAbsorbing(4, 2)
    x = torch.tensor([[2, 2, 2, 3, 0]])
    logits = torch.randn(1, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma = SIGMA[:1]

    def posterior(**options):
        return to_posterior(from_logits(lambda x, sigma: logits, graph, **options), graph)(x, sigma)

    subs = logits.clone()
    subs[..., 2] = -torch.inf
    expected = subs.softmax(-1)
    expected[0, 3:] = torch.nn.functional.one_hot(x[0, 3:], 5).double()  # a token is carried over
    close(posterior(), expected)
    subs[..., 1] = -torch.inf
    expected[0, :3] = subs.softmax(-1)[0, :3]
    close(posterior(banned=[1]), expected)
    close(posterior(banned=None), posterior())
    assert logits.isfinite().all()  # the network's answer is left alone


def test_plain_logits_leave_to_the_mask_what_they_gave_it(ref):
    """D3PM's softmax over all states: the jumps have the probabilities that it says, the mask keeps the rest."""
    graph = ref.StructuredAbsorbing(4)
    logits = torch.randn(1, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, sigma = torch.full((1, 3), 4), SIGMA[:1]
    s = from_logits(lambda x, sigma: logits, graph, subs=False)(x, sigma).exp()
    close(s[..., :4] * sigma.expm1(), logits.softmax(-1)[..., :4])


@pytest.mark.parametrize("rare", [1e-6, 1e-9, 1e-12])
def test_rare_tokens_keep_their_rate_through_score_and_step(ref, rare):
    """A vocabulary of 2000 in float32: what logits say of a rare token is what a Tweedie step draws from, to 1e-5.

    `draw_categorical` meets the rate of such a row, see there.
    """
    graph = ref.StructuredAbsorbing(2000)
    p = torch.rand(2001, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p[[700, 2000]] = 0
    p *= (1 - rare) / p.sum()
    p[700] = rare
    x, sigma = torch.full((1, 1), 2000), torch.tensor([1.5])
    delta = torch.tensor([0.2], dtype=torch.float64)
    log_score = from_logits(lambda x, sigma: p.log().float().expand(1, 1, -1), graph)(x, sigma)
    step = tweedie_probs(log_score[0], x[0], graph, delta.float())[0, 700]
    expected = rare * torch.expm1(delta) / torch.expm1(sigma.double())
    assert float(step) == pytest.approx(float(expected), rel=1e-5)


def test_where_is_handed_on_or_indexed(graph):
    """One answer, whether the model below offers `where` or not, and with `where` only its rows."""
    x, where = states(), torch.tensor([[True, False, True, False, False], [False, True, True, True, False]])
    p = law_of(graph, x, SIGMA, clean=True)
    asked = []

    def rows_of(x, sigma, where=None):
        asked.append(where)
        return p if where is None else p[where]

    plain = from_posterior(lambda x, sigma: p, graph)
    close(plain(x, SIGMA, where=where).exp(), plain(x, SIGMA)[where].exp())
    close(from_posterior(rows_of, graph)(x, SIGMA, where=where).exp(), plain(x, SIGMA, where=where).exp())
    assert torch.equal(asked[0], where)


def test_sequences_are_named_when_others_are_finished(ref):
    """A model with a condition for each sequence gets their indices through the wrappers."""
    graph = ref.StructuredAbsorbing(3)
    label = torch.tensor([0, 1, 2, 1])

    def posterior(x, sigma, rows):
        return torch.nn.functional.one_hot(label[rows], 4).double()[:, None].expand(*x.shape, 4)

    x = torch.tensor([[2, 2], [0, 0], [0, 0], [0, 0]])
    given = torch.tensor([[True, True], [False, False], [True, False], [False, False]])
    score = from_posterior(to_posterior(from_posterior(posterior, graph), graph), graph)
    out = infill(score, graph, ref.LogLinear(), x=x, given=given, steps=3, seeds=range(4))
    assert out.tolist() == [[2, 2], [1, 1], [0, 2], [1, 1]]


def test_steps_of_a_reverse_model_on_its_own_grid_are_its_own(ref):
    """The chain of a D3PM-like model of three steps, sampled by Tweedie; a false alarm once in 10,000 seeds."""
    graph = ref.StructuredUniform(3)
    table = torch.rand(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1  # [x, y]
    table /= table.sum(-1, keepdim=True)
    score = from_reverse(lambda x, sigma: table[x], graph, lambda sigma: torch.full_like(sigma, 1.0))
    x = sample(score, graph, ref.Linear(3.0), shape=(20_000, 1), steps=3, t_min=0.0, method=Tweedie(), denoise=False,
               generator=torch.Generator().manual_seed(0))  # fmt: skip
    law = torch.full((3,), 1 / 3, dtype=torch.float64) @ table @ table @ table
    assert ref.chi_square(x, law) > 1e-4


@pytest.mark.parametrize("through", ["posterior", "logits", "controlled", "guided"])
def test_gradients_reach_the_network(graph, through):
    """A loss on the log-score, by finite differences in float64; banned tokens and states without a way are no NaN."""
    x = states()[:1]
    weight = torch.randn(1, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own = torch.nn.functional.one_hot(x, 5).bool()
    counted = torch.rand(1, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(weight):
        score = from_logits(lambda x, sigma: weight, graph, banned=[3])
        if through == "posterior":
            score = from_posterior(lambda x, sigma: weight.softmax(-1), graph)
        if through == "controlled":
            score = controlled(score, graph, temperature(0.8))
        if through == "guided":
            score = classifier_free(score, lambda x, sigma: torch.zeros(1, 5, 5).double(), 1.5, num_states=5)
        # score entropy: s - r log s over states that are led to, with x = 3 left out where it is banned
        s = score(x, SIGMA[:1])
        term = torch.where(s > -torch.inf, s.exp() - counted * torch.where(s > -torch.inf, s, 0.0), 0.0)
        return term.masked_fill(own, 0.0)[:, [0, 1, 2, 4]].sum()

    weight.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(weight), weight)
    assert gradient.isfinite().all()
    for i, y in ((0, 1), (1, 4), (4, 0), (2, 2)):
        step = torch.zeros_like(weight)
        step[0, i, y] = 1e-6
        with torch.no_grad():
            slope = (loss(weight + step) - loss(weight - step)) / 2e-6
        torch.testing.assert_close(gradient[0, i, y], slope, rtol=1e-4, atol=1e-6)


class TinyMaskedLM(torch.nn.Module):
    """A bag-of-words masked language model with the surface of transformers' models."""

    def __init__(self, vocab_size, *, head=True):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(vocab_size, 8)
        self.decoder = torch.nn.Linear(8, vocab_size)
        self.eval()
        self.has_head, self.seen = head, []

    @property
    def rows(self):
        return sum(self.seen)

    def get_output_embeddings(self):
        return self.decoder if self.has_head else None

    def forward(self, input_ids, attention_mask):
        h = self.embed(input_ids) * attention_mask[..., None]
        context = h.sum(1, keepdim=True) / attention_mask.sum(1)[:, None, None]
        h = (h + context) @ self.embed.weight.T @ self.embed.weight
        logits = self.decoder(h)
        self.seen.append(logits.numel() // logits.shape[-1])
        return SimpleNamespace(logits=logits)


def test_a_masked_language_model_is_a_sampler(ref):
    graph = ref.StructuredAbsorbing(9, 4)  # [PAD] 0, [CLS] 1, [SEP] 2, [MASK] 4
    x = torch.tensor([[1, 5, 4, 4, 2, 0], [1, 4, 4, 4, 4, 2]])
    given = x != 4
    outs = []
    for head in (True, False):
        model = TinyMaskedLM(10, head=head)
        score = from_masked_lm(model, graph, banned=[0, 1, 2, 4], pad_id=0)
        outs.append(infill(score, graph, ref.LogLinear(), x=x, given=given, steps=20, seeds=[3, 4]))
        assert torch.equal(outs[-1][given], x[given])
        assert not torch.isin(outs[-1][~given], torch.tensor([0, 1, 2, 4])).any()
        assert not model.decoder._forward_pre_hooks
        assert (model.rows % 6 == 0) != head  # its head sees the positions asked for, or all of them
    assert torch.equal(*outs)


def test_padding_does_not_reach_a_masked_language_model(ref):
    """The same sequence, alone and padded beside a longer one: the same sample."""
    graph = ref.StructuredAbsorbing(9, 4)
    score = from_masked_lm(TinyMaskedLM(10), graph, banned=[1, 2], pad_id=0)
    x = torch.tensor([[1, 4, 4, 2, 0, 0], [1, 4, 4, 4, 4, 2]])
    both = infill(score, graph, ref.LogLinear(), x=x, given=x != 4, steps=10, seeds=[3, 4])
    alone = infill(score, graph, ref.LogLinear(), x=x[:1, :4], given=x[:1, :4] != 4, steps=10, seeds=[3])
    assert torch.equal(both[:1, :4], alone)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda graph: from_posterior(3, graph), r"the posterior must be callable as posterior\(x, sigma\), got a int"),  # type: ignore[arg-type]
        (lambda graph: to_posterior(None, graph), "the score model must be callable"),  # type: ignore[arg-type]
        (lambda graph: from_masked_lm("bert", graph), "must be callable, got a str"),
        (lambda graph: from_logits(torch.relu, graph, banned=[5]), "banned holds the state 5"),
        (lambda graph: from_logits(torch.relu, graph, banned=[0, 1, 2, 3]), "banned holds every token"),
        (
            lambda graph: from_posterior(lambda x, sigma: torch.ones(2, 5, 4), graph)(states(), SIGMA),
            r"the posterior must return a float tensor of shape \(2, 5, 5\), got torch.float32 \(2, 5, 4\)",
        ),
        (
            lambda graph: from_masked_lm(lambda input_ids: torch.zeros(2, 5, 3), graph)(states(), SIGMA),
            r"the logits must return a float tensor of shape \(10, 5\), got torch.float32 \(10, 3\)",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(ref, make, told):
    with pytest.raises(ValueError, match=told):
        make(ref.StructuredAbsorbing(4))


def test_a_masked_language_model_needs_a_mask(ref):
    with pytest.raises(ValueError, match="needs a graph with a mask"):
        from_masked_lm(TinyMaskedLM(5), ref.StructuredUniform(5))


def masked_x():
    return torch.tensor([[1, 5, 4, 4, 2, 4], [1, 4, 4, 3, 4, 2]])


def posterior_of(score, graph, x):
    return to_posterior(score, graph)(x, torch.ones(len(x), dtype=torch.float64))


def test_shifted_logits_are_those_of_the_token_before(ref):
    """Dream's: the logits at i are of token i + 1, the first token's its own. Also with the head at some positions."""
    graph, x = ref.StructuredAbsorbing(9, 4), masked_x()
    x[:, 0] = 4
    logits = TinyMaskedLM(10)(x, torch.ones_like(x)).logits
    plain = from_logits(lambda x, sigma: torch.cat([logits[:, :1], logits[:, :-1]], 1), graph)
    for head in (True, False):
        model = TinyMaskedLM(10, head=head)
        got = from_masked_lm(model, graph, shifted=True)
        torch.testing.assert_close(posterior_of(got, graph, x), posterior_of(plain, graph, x))
        where = torch.rand(2, 6, generator=torch.Generator().manual_seed(0)) < 0.5
        sigma = torch.ones(2)
        torch.testing.assert_close(got(x, sigma, where=where), plain(x, sigma)[where])


@pytest.mark.parametrize("kind", ["tensor", "tuple", "object"])
def test_any_kind_of_answer_will_do(ref, kind):
    graph, x, model = ref.StructuredAbsorbing(9, 4), masked_x(), TinyMaskedLM(10)

    def called(input_ids, attention_mask):
        logits = model(input_ids, attention_mask).logits
        return {"tensor": logits, "tuple": (logits, "hidden states"), "object": SimpleNamespace(logits=logits)}[kind]

    one, other = (posterior_of(from_masked_lm(m, graph), graph, x) for m in (called, model))
    torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match=r"must return logits .* got a str"):
        from_masked_lm(lambda input_ids: "logits", graph)(x, torch.ones(2))


def test_further_inputs_are_handed_on_with_the_sequences_that_they_are_of(ref):
    graph, seen = ref.StructuredAbsorbing(9, 4), []

    def model(input_ids, token_type_ids):
        seen.append(token_type_ids)
        return torch.zeros(*input_ids.shape, 10)

    x = torch.ones_like(masked_x())
    score = from_masked_lm(model, graph, inputs=lambda x, rows: {"token_type_ids": rows[:, None].expand_as(x)})
    infill(score, graph, ref.LogLinear(), x=x, given=torch.tensor([[True], [False]]).expand(2, 6), steps=2)
    assert all((part == 1).all() for part in seen)


@pytest.mark.parametrize(("extra", "mask_id"), [(-1, 9), (0, 4), (6, 4)])
def test_heads_of_other_widths_are_taken_as_what_they_are(ref, extra, mask_id):
    """Without a column for the mask, or padded beyond the vocabulary: what cannot be drawn is not."""
    graph, x = ref.StructuredAbsorbing(9, mask_id), torch.full((2, 3), mask_id)
    logits = torch.randn(2, 3, 10 + extra, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = posterior_of(from_logits(lambda x, sigma: logits, graph), graph, x)
    tokens = [y for y in range(10) if y != mask_id]
    columns = range(9) if extra == -1 else tokens
    close(p[..., tokens], logits[..., list(columns)].softmax(-1))
    assert (p[..., mask_id] == 0).all()


@pytest.mark.parametrize(
    "adapt",
    [
        *(from_posterior, to_posterior, from_logits, from_masked_lm, from_velocity, to_velocity, controlled),
        *(
            lambda model, graph, way=way: way(model, graph, lambda sigma: sigma / 2)
            for way in (from_reverse, to_reverse)
        ),
    ],
)
def test_a_graph_s_class_or_something_else_in_its_place_is_named(ref, adapt):
    with pytest.raises(ValueError, match=r"the graph must be an object such as Absorbing\(50257\), got the class S"):
        adapt(lambda x, sigma: x, ref.StructuredAbsorbing)
    with pytest.raises(ValueError, match=r"the graph, a LogLinear, has no num_states: see sedd_samplers\.Graph"):
        adapt(lambda x, sigma: x, ref.LogLinear())


def test_probabilities_are_no_logits(ref):
    """Their softmax would be another distribution; zeros, whose softmax is uniform, are logits."""
    graph, x = ref.StructuredAbsorbing(3), torch.full((2, 3), 3)
    law = torch.tensor([0.7, 0.2, 0.1, 0.0], dtype=torch.float64).expand(2, 3, 4)
    with pytest.raises(ValueError, match=r"must return logits.* sum to 1: probabilities go through from_posterior"):
        from_logits(lambda x, sigma: law, graph)(x, torch.ones(2))
    close(posterior_of(from_logits(lambda x, sigma: law.log(), graph), graph, x), law)
    for logits in (torch.zeros(2, 3, 4), torch.eye(4)[:3].expand(2, 3, 4)):
        assert posterior_of(from_logits(lambda x, sigma, y=logits: y, graph), graph, x).isfinite().all()


@pytest.mark.parametrize("wrap", [lambda model, graph: model, from_posterior])
def test_a_column_too_few_is_told_where_to_go(ref, wrap):
    graph = ref.StructuredAbsorbing(3)
    model = wrap(lambda x, sigma: torch.full((*x.shape, 3), 1 / 3), graph)
    with pytest.raises(ValueError, match=r"\(2, 5, 3\), a column short: .* go through from_logits"):
        sample(model, graph, ref.LogLinear(), shape=(2, 5), steps=2)


@pytest.mark.parametrize("mask_id", [0, 2])
def test_a_mask_that_may_have_been_counted_twice(ref, mask_id):
    """A tokenizer of 4 ids, its mask among them: a graph of 4 tokens has a state that is none."""
    graph, x = ref.StructuredAbsorbing(4, mask_id), torch.full((2, 3), mask_id)
    with pytest.raises(
        ValueError, match=r"\(2, 3, 4\), a column short: if V counts the mask, .* Absorbing\(V - 1, mask_"
    ):
        from_logits(lambda x, sigma: torch.zeros(*x.shape, 4), graph)(x, torch.ones(2))


def test_threads_share_a_model_and_nothing_of_it_is_touched(ref):
    """Eight calls at once, each at positions of its own, against the same calls one after the other."""
    graph, model = ref.StructuredAbsorbing(9, 4), TinyMaskedLM(10)
    before = dict(model._modules)
    score = from_masked_lm(model, graph)
    x = [torch.where(torch.rand(3, 6, generator=torch.Generator().manual_seed(i)) < 0.5, 4, 7) for i in range(8)]

    def call(x):
        return [score(x, torch.ones(3), where=x == 4) for _ in range(20)]

    alone = [call(each) for each in x]
    with ThreadPoolExecutor(8) as pool:
        for one, other in zip(alone, pool.map(call, x), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert model._modules == before
    assert not model.decoder._forward_pre_hooks


def test_logits_are_no_posterior(ref):
    logits = torch.tensor([0.7, 0.1, 0.1, 0.1]).log()
    score = from_posterior(lambda x, sigma: logits.expand(*x.shape, 4), ref.StructuredUniform(4))
    with pytest.raises(ValueError, match=r"holds probabilities, and this one an entry of -2.303.*from_logits"):
        score(torch.zeros(1, 2).long(), torch.ones(1))


def test_conditions_are_looked_up_by_sequence(ref):
    """Labels for each sequence, of which some are finished early; a partial would not know, and is refused."""
    graph, label = ref.StructuredAbsorbing(3), torch.tensor([0, 1, 2, 1])

    def net(x, sigma, where, label):
        return 50.0 * torch.nn.functional.one_hot(label, 4)[:, None].expand(*x.shape, 4).float()[where]

    given = torch.tensor([[True, True], [False, False], [True, False], [False, False]])
    score = from_logits(per_sequence(net, label=label), graph)
    out = infill(score, graph, ref.LogLinear(), x=torch.zeros(4, 2).long(), given=given, steps=3)
    assert out.tolist() == [[0, 0], [1, 1], [0, 2], [1, 1]]
    with pytest.raises(ValueError, match=r"a partial that holds the tensor 'label' \(4,\).*per_sequence"):
        from_logits(partial(net, label=label), graph)


def test_heads_are_as_wide_as_the_vocabulary_or_padded_to_a_multiple_of_128_at_most(ref):
    """Of 6 states: one column less, without the mask's, or up to 127 more, whose logits are never looked at."""
    graph, x, sigma = ref.StructuredAbsorbing(5), torch.full((1, 2), 5), torch.ones(1, dtype=torch.float64)
    own = torch.tensor([0.1, 0.7, -0.3, 2.0, 0.0, 9.0], dtype=torch.float64)

    def answer(width):
        logits = torch.full((1, 2, width), 50.0, dtype=torch.float64)
        logits[..., :6] = own[:width]
        return from_logits(lambda x, sigma: logits, graph)(x, sigma)

    for width in (5, 7, 133):
        torch.testing.assert_close(answer(width), answer(6), rtol=1e-12, atol=0)
    for width in (4, 134, 1000):
        with pytest.raises(ValueError, match=r"must return a float tensor of shape \(1, 2, 6\)"):
            answer(width)


class Scaled(torch.nn.Module):
    """A head that is called with more than its input, and looked into by its model."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
        self.seen = []

    def forward(self, h, scale):
        self.seen.append(tuple(h.shape))
        return scale * h @ self.weight


class Inside(torch.nn.Module):
    def __init__(self, flat):
        super().__init__()
        self.trunk: Any = torch.nn.Module()
        self.trunk.last = Scaled()
        self.flat = flat

    def get_output_embeddings(self):
        return self.trunk.last

    def forward(self, h):
        h = h.flatten(0, 1)[:2] if self.flat else h
        return self.trunk.last(h, 3.0) + self.trunk.last.weight.sum()


def test_a_head_anywhere_sees_some_positions_and_is_called_as_it_was():
    """With all that it is given; its attributes stand; what is no longer (B, L, D) goes through as it is."""
    h, positions = torch.arange(12.0).view(2, 3, 2), torch.tensor([0, 4])
    model = Inside(flat=False)
    path = path_of_head(model)
    assert path == "trunk.last"
    some = with_head_at(model, path, positions)
    torch.testing.assert_close(some(h), model(h).flatten(0, 1)[positions])
    assert model.trunk.last.seen == [(2, 2), (2, 3, 2)]
    assert some.trunk is not model.trunk
    assert model.get_output_embeddings() is model.trunk.last
    flat = Inside(flat=True)
    torch.testing.assert_close(with_head_at(flat, path, positions)(h), flat(h))
    assert path_of_head(torch.nn.Linear(2, 2)) is None
    assert path_of_head(SimpleNamespace(get_output_embeddings=lambda: model.trunk.last)) is None


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(1, 1, 1, 1), (), {"logits": torch.zeros(1, 2, 3)}])
def test_logits_are_rows_or_sequences_of_rows(wrong):
    three, two = torch.zeros(1, 2, 3), torch.zeros(2, 3)
    for right in (three, two):
        for answer in (right, [right], (right, 1), SimpleNamespace(logits=right)):
            assert logits_of(answer) is right
    with pytest.raises(ValueError, match=r"must return logits \(B, L, N\), alone, as \.logits or first, got"):
        logits_of(wrong)
