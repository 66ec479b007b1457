"""Parallel decoding and self-correction, against transcriptions of the published algorithms and exact laws."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from sedd_samplers import (
    Ancestral,
    ByConfidence,
    ConfidenceUnmasking,
    LeaveOneOut,
    Looped,
    PathPlanning,
    PredictorCorrector,
    Psi,
    Remasking,
    Reverse,
    Tweedie,
    Unmasking,
    cached,
    capped,
    confidence,
    controls,
    entropy,
    entropy_bound,
    sample,
    threshold,
    trajectory,
    when_still,
)
from sedd_samplers.adapters import from_logits
from sedd_samplers.controls import apply_controls, controlled, min_p, repetition_penalty, temperature, top_k
from sedd_samplers.correctors import psi_probs
from sedd_samplers.steps import ancestral_probs

ALARM = 1e-4
GREEDY = (top_k(1),)


def network(mask_id, seed, *, sharpness=2.0):
    """Float64 logits that depend on every token in the open, none for the mask."""
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def logits(x, sigma):
        place = torch.linspace(0.5, 1.5, x.shape[1], dtype=torch.float64)
        context = torch.einsum("bln,lk->bkn", weight[x], torch.cos(place[:, None] * place[None] * 7))
        return (sharpness * context).index_fill(2, torch.tensor([mask_id]), -math.inf)

    return logits


def decode(logits, mask_id, length, choose, *, rows):
    """Greedy decoding, position by position in Python: `choose` says which of the masked ones are taken."""
    x, calls = torch.full((rows, length), mask_id), 0
    for b in range(rows):
        while (x[b] == mask_id).any():
            calls += 1
            p = logits(x[b : b + 1], None)[0].softmax(-1)
            best = p.max(-1)
            masked = [i for i in range(length) if x[b, i] == mask_id]
            for i in choose(masked, p, best.values):
                x[b, i] = best.indices[i]
    return x, calls


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tau", [0.3, 0.6, 0.9, 1.0])
def test_a_threshold_decodes_as_fast_dllm_does(ref, tau, seed):
    """The most confident, and every other of at least tau, until no mask is left."""
    graph, logits = ref.StructuredAbsorbing(7, 3), network(3, seed)

    def choose(masked, p, best):
        ranked = sorted(masked, key=lambda i: -best[i])
        return [ranked[0], *[i for i in ranked[1:] if best[i] >= tau]]

    wanted, calls = decode(logits, 3, 12, choose, rows=1)
    asked = []

    def counted(x, sigma):
        asked.append(len(x))
        return logits(x, sigma)

    method = ConfidenceUnmasking(confidence, controls=GREEDY, rule=threshold(tau))
    x = sample(from_logits(counted, graph), graph, ref.LogLinear(0.0), shape=(1, 12), steps=12, method=method)
    assert torch.equal(x, wanted)
    assert sum(asked) == calls
    assert calls <= 12


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("gamma", [0.0, 0.1, 1.0])
def test_an_entropy_bound_decodes_as_the_eb_sampler_does(ref, gamma, seed):
    graph, logits = ref.StructuredAbsorbing(7, 3), network(3, seed)

    def choose(masked, p, best):
        H = {i: -sum(float(q) * math.log(q) for q in p[i] if q > 0) for i in masked}
        ranked = sorted(masked, key=lambda i: H[i])
        taken = [n for n in range(1, len(ranked) + 1) if sum(H[i] for i in ranked[:n]) - H[ranked[n - 1]] <= gamma]
        return ranked[: max(taken)]

    wanted, calls = decode(logits, 3, 12, choose, rows=3)
    asked = []

    def counted(x, sigma):
        asked.append(len(x))
        return logits(x, sigma)

    method = ConfidenceUnmasking(entropy, controls=GREEDY, rule=entropy_bound(gamma))
    x = sample(from_logits(counted, graph), graph, ref.LogLinear(0.0), shape=(3, 12), steps=12, method=method)
    assert torch.equal(x, wanted)
    assert sum(asked) == calls
    assert (calls == 36) == (gamma == 0)


def test_a_rule_takes_no_fewer_than_the_grid_says(ref):
    graph, masked = ref.StructuredAbsorbing(7, 3), []
    x = torch.zeros(2, 12, dtype=torch.int64)
    for state in trajectory(from_logits(network(3, 0), graph), graph, ref.LogLinear(0.0), x=x, given=x > 0, steps=4,
                            method=ConfidenceUnmasking(confidence, rule=threshold(1.0)), denoise=False):  # fmt: skip
        masked.append((state.x == 3).sum(1).tolist())
    assert masked == [[12, 12], [9, 9], [6, 6], [3, 3], [0, 0]]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 2.0])
def test_path_planning_is_p2(ref, eta, seed):
    """Greedy: a draft, the score of tokens times eta, the lowest masked; token for token after every step."""
    graph, logits = ref.StructuredAbsorbing(7, 3), network(3, seed)
    state, wanted, remasked = torch.full((12,), 3), [], 0
    for step in range(1, 7):
        log_p = logits(state[None], None)[0].log_softmax(-1)
        masked = state == 3
        draft = torch.where(masked, log_p.argmax(-1), state)
        score = log_p.gather(1, draft[:, None])[:, 0] * torch.where(masked, 1.0, eta)
        lowest = sorted(range(12), key=lambda i: float(score[i]))[: 12 - 2 * step]
        remasked += sum(not masked[i] for i in lowest)
        state = draft.clone()
        state[lowest] = 3
        wanted.append(state)
    asked = []

    def counted(x, sigma):
        asked.append(len(x))
        return logits(x, sigma)

    net = cached(counted)
    x = torch.zeros(2, 12, dtype=torch.int64)
    states = [
        s.x
        for s in trajectory(from_logits(net, graph), graph, ref.LogLinear(0.0), x=x, given=x > 0, steps=6,
                            method=PathPlanning(net, eta, controls=GREEDY), denoise=False)
    ]  # fmt: skip
    for got, right in zip(states[1:], wanted, strict=True):
        assert (got == right).all()
    assert sum(asked) <= 6 * 2 + 4  # one call a sequence and step, and what `cached` asks to see that it may
    assert remasked or eta < 1


def test_a_planner_may_read_the_draft(ref):
    """One that calls every position but the last right: that is taken back, though it is the sampler's surest."""
    graph, seen = ref.StructuredAbsorbing(7, 3), []

    def planner(x, sigma):
        seen.append(x.clone())
        right = torch.nn.functional.one_hot(x, 8).double() * 20
        right[:, -1] *= -1
        return right

    x = torch.zeros(5, 6, dtype=torch.int64)
    method = PathPlanning(planner, reads_draft=True)
    run = trajectory(from_logits(network(3, 1), graph), graph, ref.LogLinear(0.0), x=x, given=x > 0, steps=6,
                     method=method, start=torch.tensor([[3, 3, 3, 3, 3, 1]]).expand(5, 6), denoise=False)  # fmt: skip
    states = [state.x for state in run]
    assert (states[1][:, -1] == 3).all()
    assert all((draft != 3).all() for draft in seen)


def test_planning_refuses_what_it_cannot_use(ref):
    with pytest.raises(ValueError, match="the planner must be callable"):
        PathPlanning(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="eta must be finite and at least 0, got -1"):
        PathPlanning(lambda x, sigma: x, eta=-1)
    with pytest.raises(ValueError, match="PathPlanning needs an absorbing graph"):
        sample(lambda x, sigma: torch.zeros(*x.shape, 5), ref.StructuredUniform(5), ref.LogLinear(), shape=(1, 2),
               method=PathPlanning(lambda x, sigma: torch.zeros(*x.shape, 5)))  # fmt: skip


GRAPHS = {
    "absorbing": lambda ref: ref.StructuredAbsorbing(3, 1),
    "uniform": lambda ref: ref.StructuredUniform(3),
    "hybrid": lambda ref: ref.hybrid_matrix(3),
    "clustered": lambda ref: ref.clustered_matrix(),
    "ordinal": lambda ref: ref.ordinal_matrix(4),
    "cycle": lambda ref: ref.cycle_matrix(3),
}


def problem(ref, name, length):
    graph = GRAPHS[name](ref)
    tokens = graph.num_states - (graph.mask_id is not None)
    return graph, ref.ExactScore(ref.random_data(tokens, length, graph.num_states, graph.mask_id), graph.Q)


@pytest.mark.parametrize("kappa", [0.0, 0.7, 1.0, lambda t: t])
@pytest.mark.parametrize("name", GRAPHS)
def test_a_superposition_keeps_a_single_positions_law(ref, name, kappa):
    graph, score = problem(ref, name, 1)
    noise, times = ref.Linear(1.5), torch.tensor([1.0, 0.6, 0.5, 0.2], dtype=torch.float64)
    start, end = score.marginal(noise(times[[0, -1]])[0])
    law = ref.law_of_chain(score, graph, noise, Psi(kappa), times, start)
    torch.testing.assert_close(law, end, rtol=0, atol=1e-7)  # the hybrid matrix's 0.6 is a float32


def test_a_superposition_at_1_is_ancestral_and_under_absorption_it_is_remasking(ref):
    graph, score = problem(ref, "absorbing", 2)
    noise, times = ref.Linear(1.5), torch.tensor([0.8, 0.3], dtype=torch.float64)
    start = torch.full((16,), 1 / 16, dtype=torch.float64)

    def law(method, stages=1):
        return ref.law_of_chain(score, graph, noise, method, times, start, stages=stages)

    torch.testing.assert_close(law(Psi(1.0)), law(Ancestral()), rtol=0, atol=1e-12)
    anew = Remasking(lambda sigma_t, sigma_s, r_max: 0.3 * -torch.expm1(-sigma_s))
    torch.testing.assert_close(law(Psi(0.7)), law(anew, stages=2), rtol=0, atol=1e-12)


def test_the_rows_of_a_superposition_ignore_what_means_nothing(ref):
    graph = ref.StructuredAbsorbing(3, 1)
    x, level = torch.tensor([0, 1]), torch.tensor([0.9, 0.9])
    log_score = torch.tensor([[0.0, torch.inf, torch.nan, 3.0], [0.1, 0.0, -0.4, 0.2]])
    rows = psi_probs(log_score, x, graph, level / 2, level, torch.full((2,), 0.8))
    torch.testing.assert_close(rows.sum(1), torch.ones(2))
    assert rows[0, 2] == rows[0, 3] == 0
    at_mask = ancestral_probs(log_score[1:], x[1:], graph, level[1:] / 2, level[1:])
    assert rows[1, 1] == pytest.approx(0.8 * float(at_mask[0, 1]) + 0.2 * -math.expm1(-0.45), rel=1e-5)


@pytest.mark.parametrize("name", [name for name in GRAPHS if name != "absorbing"])
def test_a_position_redrawn_from_its_law_given_the_others_leaves_the_joint_law_alone(ref, name):
    """Each position by itself, by enumeration."""
    graph, score = problem(ref, name, 3)
    sigma = torch.tensor([0.4], dtype=torch.float64)
    law, states = score.marginal(sigma)[0].flatten(), ref.all_states(graph.num_states, 3)
    for i in range(3):
        rows = torch.nn.functional.one_hot(states, graph.num_states).double()
        rows[:, i] = score(states, sigma.expand(len(states)))[:, i].exp()
        rows[:, i] /= rows[:, i].sum(-1, keepdim=True)
        torch.testing.assert_close(law @ ref.joint(rows), law, rtol=0, atol=1e-7)

    # and the corrector's own kernel, at position 1 alone
    reverse = ref.Enumerator(score, graph, lambda t: (t, torch.ones_like(t)), states.shape)
    reverse.uniforms_at = lambda where: (
        torch.where(torch.arange(where.shape[1]) == 1, 0.0, 1.0).double().expand(where.shape)
    )
    level = sigma.expand(len(states))
    LeaveOneOut(lambda reverse, x, t, s: x, share=0.5)(reverse, states, level * 2, level)
    torch.testing.assert_close(law @ ref.joint(reverse.stages[0]), law, rtol=0, atol=1e-7)


def test_leave_one_out_mends_what_few_steps_break(ref):
    """Total variation at two steps on the exact problem, by 60,000 samples: the corrected is less than half."""
    graph, score = problem(ref, "uniform", 3)
    noise = ref.Linear(4.0)

    def distance(method):
        x = sample(score, graph, noise, shape=(60_000, 3), steps=2, t_min=0.02, method=method, denoise=False,
                   generator=torch.Generator().manual_seed(0))  # fmt: skip
        count = torch.bincount(x @ torch.tensor([9, 3, 1]), minlength=27).double()
        law = score.marginal(noise(torch.tensor([0.02]).double())[0])[0].flatten()
        return float((count / len(x) - law).abs().sum()) / 2

    assert distance(LeaveOneOut(Tweedie(), share=0.2, corrections=12)) < distance(Tweedie()) / 2


def test_leave_one_out_refuses_graphs_whose_tokens_do_not_change(ref):
    with pytest.raises(ValueError, match=r"under this graph a token's score says nothing.*Remasking"):
        sample(lambda x, sigma: torch.zeros(*x.shape, 4), ref.StructuredAbsorbing(3), ref.LogLinear(), shape=(1, 2),
               method=LeaveOneOut())  # fmt: skip


def test_remasking_by_confidence_shares_the_probability_out_as_remdm_does(ref):
    """eta r with eta the softmax of minus the probability of each token when it was drawn, and none for a mask."""
    graph, flips, states = ref.StructuredAbsorbing(7, 3), [], []
    logits, noise = network(3, 2, sharpness=0.6), ref.LogLinear(0.0)

    class Recording(Reverse):
        def flip(self, x, where, state, probability):
            flips.append((where, probability.clone()))
            return super().flip(x, where, state, probability)

    x = torch.full((4, 10), 3)
    reverse = Recording(from_logits(logits, graph), graph, noise, frozen=x < 0, seeds=torch.arange(4))
    drawn = torch.ones(4, 10, dtype=torch.float64)
    for t, s in itertools.pairwise([0.95, 0.7, 0.5, 0.3, 0.2]):
        p = logits(x, None).softmax(-1)
        after = ByConfidence(capped(0.9))(reverse, x, torch.full((4,), t).double(), torch.full((4,), s).double())
        where, probability = flips.pop()
        r = min(0.9, s / (1 - t), 1.0)
        for b in range(4):
            weight = [math.exp(-float(drawn[b, i])) if x[b, i] != 3 else 0.0 for i in range(10)]
            for i in range(10):
                share = weight[i] / sum(weight) if sum(weight) else 0.0
                assert float(probability[b, i]) == pytest.approx(r * share, rel=1e-6)
                assert bool(where[b, i]) == (x[b, i] != 3)
        new = (x == 3) & (after != 3)
        drawn[new] = p.gather(2, after[..., None])[..., 0][new].double()
        states.append(x)
        x = after
    assert any(((a != 3) & (b == 3)).any() for a, b in itertools.pairwise(states))


def test_remasking_by_confidence_without_remasking_is_unmasking(ref):
    graph = ref.StructuredAbsorbing(3, 1)
    score = ref.ExactRows(ref.random_data(3, 3, 4, 1), graph.Q)
    noise, times = ref.Linear(2.0), torch.tensor([1.0, 0.6, 0.3, 0.1], dtype=torch.float64)
    start = torch.zeros(64, dtype=torch.float64)
    start[21] = 1
    law = ref.law_of_chain(score, graph, noise, Tweedie(), times, start, denoise=True).reshape(4, 4, 4)
    for method in (ByConfidence(capped(0.0)), Unmasking()):
        x = sample(score, graph, noise, shape=(50_000, 3), times=times, method=method,
                   generator=torch.Generator().manual_seed(0))  # fmt: skip
        assert ref.chi_square(x, law) > ALARM


def test_a_loop_has_the_mask_probabilities_of_remdms(ref):
    """Their move chances at alpha_on = 0.9, t_on = 0.55, t_off = 0.05, and the derivative by differences."""
    on, off, alpha = 0.55, 0.05, 0.9
    noise = Looped(ref.LogLinear(0.0), at=1 - alpha, on=on, off=off)
    for t in (0.99, 0.8, 0.56, 0.55, 0.3, 0.06, 0.05, 0.03, 0.001):
        if t > on:
            chance = 1 - (1 - t) * alpha / (1 - on)
        elif t <= off:
            chance = t * (1 - alpha) / off
        else:
            chance = 1 - alpha
        sigma, _ = noise(torch.tensor([t], dtype=torch.float64))
        assert float(-torch.expm1(-sigma)) == pytest.approx(chance, abs=1e-12)
    times = torch.tensor([0.9, 0.7, 0.4, 0.2, 0.04, 0.01], dtype=torch.float64)
    slope = (noise(times + 1e-6)[0] - noise(times - 1e-6)[0]) / 2e-6
    torch.testing.assert_close(noise(times)[1], slope, rtol=1e-5, atol=1e-8)


def test_a_loop_takes_tokens_back_while_the_noise_stands_still_and_only_then(ref):
    graph, taken = ref.StructuredAbsorbing(7, 3), []
    noise = Looped(ref.LogLinear(0.0), at=0.3, on=0.61, off=0.19)
    x = torch.zeros(50, 40, dtype=torch.int64)
    before = None
    for state in trajectory(from_logits(network(3, 0), graph), graph, noise, x=x, given=x > 0, steps=10,
                            method=Remasking(when_still(0.1)), seeds=range(50)):  # fmt: skip
        if before is not None:
            taken.append(int(((before != 3) & (state.x == 3)).sum()))
        before = state.x
    still = [k in (4, 5, 6, 7) for k in range(11)]
    # 2000 positions, 0.7 of them tokens, each taken back with 0.1: 140 a step, standard deviation 11
    assert all((85 < n < 195) if loops else n == 0 for n, loops in zip(taken, still, strict=True))
    assert not (state.x == 3).any()
    with pytest.raises(ValueError, match=r"a loop needs 0 < off < on < 1"):
        Looped(ref.LogLinear(), at=0.3, on=0.2, off=0.6)


def rows():
    return torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.1, 0.1, 0.7]])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.6, 1.0])
def test_min_p_keeps_what_is_not_much_less_likely_than_the_likeliest(share):
    kept = apply_controls([min_p(share)], rows(), torch.tensor([0, 1]), torch.tensor([0, 0]))
    for p, got in zip(rows().tolist(), kept.tolist(), strict=True):
        right = [q if q >= share * max(p) else 0.0 for q in p]
        assert got == pytest.approx([q / sum(right) for q in right])


def test_a_repetition_penalty_lowers_what_stands_in_the_sequence():
    x = torch.tensor([[1, 1, -1], [3, 0, -1]])
    got = apply_controls([repetition_penalty(1.5)], rows(), torch.tensor([0, 1]), torch.tensor([2, 2]), x)
    for p, seen, out in zip(rows().tolist(), [{1}, {0, 3}], got.tolist(), strict=True):
        right = [q**1.5 if y in seen else q for y, q in enumerate(p)]
        assert out == pytest.approx([q / sum(right) for q in right])


def test_a_penalty_acts_in_a_run_on_the_sequence_as_it_stands(ref):
    """Independent tokens of equal odds: with a great penalty no token comes twice while there are others."""
    graph = ref.StructuredAbsorbing(7, 3)
    plain = from_logits(lambda x, sigma: torch.zeros(*x.shape, 8), graph)
    score = controlled(plain, graph, repetition_penalty(60.0))
    x = sample(score, graph, ref.LogLinear(0.0), shape=(20, 7), steps=7, method=ConfidenceUnmasking(), seeds=range(20))
    assert (x.sort(1).values == torch.tensor([0, 1, 2, 4, 5, 6, 7])).all()
    method = ConfidenceUnmasking(controls=(repetition_penalty(60.0), temperature(0.9)))
    x = sample(plain, graph, ref.LogLinear(0.0), shape=(20, 7), steps=7, method=method, seeds=range(20))
    assert (x.sort(1).values == torch.tensor([0, 1, 2, 4, 5, 6, 7])).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: threshold(0.0), r"threshold must lie in \(0, 1\], got 0.0"),
        (lambda: entropy_bound(-1.0), "gamma must be finite and at least 0, got -1.0"),
        (lambda: min_p(1.5), r"min_p must lie in \[0, 1\], got 1.5"),
        (lambda: repetition_penalty(0.0), "repetition_penalty must be positive and finite, got 0.0"),
        (lambda: when_still(2.0), r"eta must lie in \[0, 1\], got 2.0"),
        (lambda: Psi(1.5), r"kappa must lie in \[0, 1\], got 1.5"),
        (lambda: LeaveOneOut(share=0.0), r"share must lie in \(0, 1\], got 0.0"),
        (lambda: LeaveOneOut(corrections=0), "corrections must be a positive integer, got 0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_control_that_is_not_told_what_stands_there_says_so():
    with pytest.raises(ValueError, match=r"apply it by controlled\(score, graph, control\)"):
        controls.apply_controls([repetition_penalty(1.2)], rows(), torch.tensor([0, 1]), torch.tensor([2, 2]))


def test_predictors_go_with_correctors(ref):
    graph, score = problem(ref, "uniform", 3)
    x = sample(score, graph, ref.Linear(4.0), shape=(3, 3), steps=3, seeds=range(3),
               method=LeaveOneOut(PredictorCorrector(), share=1.0))  # fmt: skip
    assert x.shape == (3, 3)
