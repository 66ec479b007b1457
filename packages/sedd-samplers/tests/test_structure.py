"""Speed by structure: the work that is left out, counted, and the samples it does not change."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sedd_samplers import (
    Ancestral,
    ByConfidence,
    ConfidenceUnmasking,
    EntropyBoundRenoising,
    Euler,
    FirstHitting,
    Method,
    PathPlanning,
    PredictorCorrector,
    Psi,
    Remasking,
    TauLeaping,
    Trapezoidal,
    Tweedie,
    Uniformization,
    Unmasking,
    at_rate,
    cached,
    capped,
    entropy,
    entropy_bound,
    infill,
    masked,
    sample,
    threshold,
    trajectory,
)
from sedd_samplers.adapters import from_logits, from_posterior
from sedd_samplers.controls import Control, min_p, repetition_penalty, temperature, top_k, top_p
from sedd_samplers.guidance import classifier_free, classifier_guided, first_order_ratios
from sedd_samplers.randomness import uniforms
from sedd_samplers.testing import Peak, little_is_held

pieces = importlib.import_module("sedd_samplers.fast.answer")
ALARM = 1e-4


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of a 32nd of their size: what is held then has the same share of an answer of a 32nd of the size."""

    plain = pieces.rows_at_a_time

    def rows_at_a_time(num_states, device):
        return max(1, plain(num_states, device) // 32)

    for module in ("fast.answer", "guidance", "infilling", "multistage"):
        monkeypatch.setattr(f"sedd_samplers.{module}.rows_at_a_time", rows_at_a_time)


class Counting:
    """A stand-in for a time-free network: its logits depend on every token in the open. Counts what is asked of it."""

    def __init__(self, num_states, *, dtype=torch.float64):
        self.weight = torch.randn(num_states, num_states, generator=torch.Generator().manual_seed(0), dtype=dtype)
        self.calls = self.sequences = self.head_rows = 0

    def __call__(self, x, sigma, where):
        self.calls += 1
        self.sequences += len(x)
        self.head_rows += int(where.sum())
        place = torch.linspace(0.5, 1.5, x.shape[1], dtype=self.weight.dtype)
        context = torch.einsum("bln,l->bn", self.weight[x], place) / x.shape[1] ** 0.5
        return context[where.nonzero()[:, 0]] * place[where.nonzero()[:, 1], None]


@pytest.mark.parametrize(("length", "share"), [(512, 0.63), (128, 0.22)])
def test_calls_and_head_rows_are_those_of_the_moves(ref, length, share):
    """Calls within 5 % of N (1 - (1 - 1/N)^L) of N = 512 steps, and L rows of the head in the whole run.

    Four sequences' mean number of calls has a standard deviation of about 1 %; fixed seeds.
    """
    network, steps = Counting(4, dtype=torch.float32), 512
    graph = ref.StructuredAbsorbing(3)
    x = sample(from_logits(network, graph), graph, ref.LogLinear(), shape=(4, length), steps=steps,
               method=Unmasking(), seeds=range(4))  # fmt: skip
    assert not (x == 3).any()
    expected = steps * (1 - (1 - 1 / steps) ** length)
    assert expected / steps == pytest.approx(share, abs=0.01)
    assert network.sequences / 4 == pytest.approx(expected, rel=0.05)
    assert network.head_rows == 4 * length


def test_unmasking_follows_the_law_of_tweedies_steps(ref):
    """Three steps on an enumerable problem, each joint transition; a false alarm once in 10,000 seeds."""
    graph = ref.StructuredAbsorbing(3, 1)
    p0 = ref.random_data(3, 3, 4, 1)
    noise, times = ref.Linear(2.0), torch.tensor([1.0, 0.6, 0.3, 0.1], dtype=torch.float64)
    score = ref.ExactRows(p0, graph.Q)
    start = torch.zeros(64, dtype=torch.float64)
    start[21] = 1  # (1, 1, 1), all masked
    law = ref.law_of_chain(score, graph, noise, Tweedie(), times, start, denoise=True).reshape(p0.shape)
    x = sample(score, graph, noise, shape=(50_000, 3), times=times, method=Unmasking(),
               generator=torch.Generator().manual_seed(0))  # fmt: skip
    assert ref.chi_square(x, law) > ALARM


def test_which_positions_move_does_not_depend_on_the_model(ref):
    graph = ref.StructuredAbsorbing(5)

    def masks(level):
        states = trajectory(lambda x, sigma: level * torch.arange(6.0).expand(*x.shape, 6), graph, ref.LogLinear(),
                            x=torch.zeros(3, 20).long(), given=torch.zeros(3, 20).bool(), steps=7, seeds=range(3),
                            method=Unmasking())  # fmt: skip
        return [state.x == 5 for state in states]

    for one, other in zip(masks(0.0), masks(3.0), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("method", [Tweedie(), Euler(), Unmasking()])
def test_a_draw_takes_one_uniform_number(ref, method, monkeypatch):
    """Not one for each of the N states: three steps of four masks of 4096 states, the prior included."""
    taken = []

    def counted(seed, draw, position):
        taken.append(len(seed))
        return uniforms(seed, draw, position)

    monkeypatch.setattr("sedd_samplers.reverse.uniforms", counted)
    graph, masked = ref.StructuredAbsorbing(4095), []
    x = torch.zeros(2, 2, dtype=torch.int64)
    for state in trajectory(lambda x, sigma: torch.zeros(*x.shape, 4096), graph, ref.LogLinear(), x=x, given=x > 0,
                            steps=3, method=method, seeds=[0, 1]):  # fmt: skip
        masked.append(int((state.x == 4095).sum()))
    choices = 1 if method != Unmasking() else 2  # whether it moves, and where to
    assert sum(taken) <= 4 + choices * sum(masked[:-1])
    assert sum(taken) >= 4 + masked[0]


def test_unmasking_refuses_graphs_in_which_tokens_move(ref):
    with pytest.raises(ValueError, match="Unmasking needs an absorbing graph"):
        sample(lambda x, sigma: torch.zeros(*x.shape, 5), ref.hybrid_matrix(4), ref.LogLinear(), shape=(1, 2),
               method=Unmasking())  # fmt: skip


@pytest.mark.parametrize("method", [Tweedie(), Euler(), Unmasking()])
def test_what_is_cached_changes_no_sample(ref, method):
    """Five sequences at different places in their course, some finished early, 60 steps."""
    graph, network, spared = ref.StructuredAbsorbing(5), Counting(6), Counting(6)
    given = torch.rand(5, 12, generator=torch.Generator().manual_seed(1)) < torch.linspace(0, 0.9, 5)[:, None]
    x = torch.randint(5, (5, 12), generator=torch.Generator().manual_seed(2))

    def run(logits):
        return infill(from_logits(logits, graph), graph, ref.LogLinear(), x=x, given=given, steps=60, method=method,
                      seeds=range(5))  # fmt: skip

    assert torch.equal(run(network), run(cached(spared)))
    assert spared.sequences <= network.sequences + 2
    if method != Unmasking():
        assert spared.sequences < 0.5 * network.sequences
        assert spared.sequences <= 7 + int((~given).sum())  # two to check, one at first, one after each move


def test_what_is_cached_belongs_to_a_sequence_and_its_states(ref):
    seen = []

    def model(x, sigma, where, rows):
        seen.append(rows.tolist())
        return (x * 10 + rows[:, None]).double()[..., None].expand(*x.shape, 2)[where]

    ask = cached(model)
    everywhere = torch.ones(3, 2, dtype=torch.bool)
    x, sigma = torch.tensor([[0, 1], [0, 1], [1, 1]]), torch.ones(3)
    first = ask(x, sigma, everywhere, torch.arange(3))
    assert torch.equal(first, ask(x, sigma, everywhere, torch.arange(3)))
    x = x.clone()
    x[1, 0] = 1
    assert ask(x[1:], sigma[1:], everywhere[1:], torch.tensor([1, 2]))[:, 0].tolist() == [11, 11, 12, 12]
    part = torch.tensor([[True, False], [True, True]])
    assert ask(x[[2, 1]], sigma[1:], part, torch.tensor([2, 1]))[:, 0].tolist() == [12, 11, 11]
    assert ask(x[:1], sigma[:1], everywhere[:1], torch.tensor([0]))[:, 0].tolist() == [0, 10]
    assert seen == [[0], [0], [0, 1, 2], [1], [2], [0]]


def test_what_is_cached_is_compared_exactly():
    """Tokens 150,000 and 150,001 are not the same; to a relative tolerance they would be."""
    asked = []

    def model(x, sigma, where):
        asked.append(x.tolist())
        return x.double()[where][:, None]

    ask = cached(model)
    everywhere, sigma = torch.ones(1, 2, dtype=torch.bool), torch.ones(1)
    for token in (150_000, 150_001, 150_001):
        x = torch.tensor([[7, token]])
        assert ask(x, sigma, everywhere, torch.arange(1))[:, 0].tolist() == [7, token]
    assert asked[2:] == [[[7, 150_000]], [[7, 150_001]]]


@pytest.mark.parametrize("name", ["uniform", "hybrid"])
def test_what_is_cached_is_known_by_contents_not_by_the_tensor_that_held_it(ref, name):
    """Uniformization edits its states in place."""
    graph = {"uniform": ref.StructuredUniform(4), "hybrid": ref.hybrid_matrix(3)}[name]
    network = Counting(4)

    def run(logits):
        return sample(from_logits(logits, graph), graph, ref.Linear(4.0), shape=(6, 5), steps=2, t_min=0.05,
                      method=Uniformization(slack=3.0), seeds=range(6))  # fmt: skip

    assert torch.equal(run(network), run(cached(network)))


def test_a_model_that_knows_the_time_is_not_cached(ref):
    graph = ref.StructuredAbsorbing(3)
    with pytest.raises(ValueError, match=r"a score model.*from_logits\(cached\(network\), graph\)"):
        cached(from_logits(Counting(4), graph))
    timed = lambda x, sigma: sigma[:, None, None] * torch.ones(*x.shape, 4)  # noqa: E731
    with pytest.raises(ValueError, match="answer changes with sigma, by up to 1 "):
        sample(from_logits(cached(timed), graph), graph, ref.LogLinear(), shape=(2, 3), steps=2)


@pytest.mark.parametrize("adapted", [False, True])
def test_beside_the_network_s_answer_only_pieces_are_held_whatever_the_number_of_steps(ref, adapted, request):
    """With an adapter or without, no tensor of the answer's size, which is 16 pieces; temporaries may be half of it.

    Without, pieces have the size that they have in use.
    """
    buffers = 0.5
    num_states, shape = 4096, (8, 16 if adapted else 512)
    if adapted:
        request.getfixturevalue("small_pieces")
    graph = ref.StructuredAbsorbing(num_states - 1)
    answer = torch.rand(shape[0] * shape[1], num_states)
    peaks = []
    for steps in (1, 4):
        network = lambda x, sigma, where: answer[: int(where.sum())]  # noqa: E731, nothing allocated here
        score: Callable[..., torch.Tensor] = from_posterior(network, graph) if adapted else network
        with Peak() as memory:
            sample(score, graph, ref.LogLinear(), shape=shape, steps=steps, seeds=range(8), denoise=False)
        peaks.append(memory.peak / (answer.numel() * 4))
    assert max(peaks) < buffers
    assert peaks[1] < 1.02 * peaks[0]
    assert min(peaks) > 0.02  # the meter runs


@pytest.mark.parametrize("method", [Tweedie(), Trapezoidal(), Uniformization(slack=20.0), EntropyBoundRenoising()])
def test_where_tokens_are_noised_no_method_holds_more_than_half_a_unit_beside_the_answer(ref, method):
    """In float64, which is worked in pieces of as many bytes; Trapezoidal takes a fourth of the batch at a time."""
    little_is_held(method, ref.StructuredUniform(4096), ref.Linear(0.001 if method == Uniformization(20.0) else 1.0))


def test_a_method_that_keeps_a_copy_is_told(ref):
    class Keeping:
        def __call__(self, reverse, x, t, s):
            kept = reverse.evaluate(x, reverse.noise(t)[0], reverse.movable(x), lambda log_score, *_: log_score.exp())
            return Tweedie()(reverse, x, t, s) + 0 * len(kept)

    with pytest.raises(AssertionError, match=r"2\.\d+ units of \(B, L, N\) float32 are held"):
        little_is_held(Keeping(), ref.StructuredUniform(4096), ref.Linear(1.0))
    with pytest.raises(ValueError, match="too small beside pieces of 4 MB"):
        little_is_held(Tweedie(), ref.StructuredUniform(100), ref.Linear(1.0))


@pytest.mark.parametrize("guide", ["classifier-free", "classifier"])
def test_guidance_holds_two_answers_and_pieces(ref, guide):
    num_states, shape = 4096, (8, 512)
    graph, answer = ref.StructuredAbsorbing(num_states - 1), torch.rand(8 * 512, num_states)
    network: Any = lambda x, sigma, where: answer[: int(where.sum())]  # noqa: E731, nothing allocated here
    if guide == "classifier-free":
        score, own = classifier_free(network, network, 2.0, num_states=num_states), 0
    else:
        ratios = first_order_ratios(lambda tokens, sigma: tokens[..., 0].sum(1), num_states)
        score, own = classifier_guided(network, ratios, 1.0, num_states=num_states), 1
    with Peak() as memory:
        sample(score, graph, ref.LogLinear(), shape=shape, steps=1, seeds=range(8), denoise=False)
    assert own < memory.peak / (answer.numel() * 4) < own + 0.5 + 0.5 * own  # a sequence's tokens and gradient


HELD: dict[str, tuple[Method, tuple[Control, ...]]] = {
    "Euler": (Euler(), ()),
    "tau-leaping": (TauLeaping(), ()),
    "Tweedie": (Tweedie(), ()),
    "ancestral": (Ancestral(), ()),
    "corrected": (PredictorCorrector(), ()),
    "trapezoidal": (Trapezoidal(), ()),
    "unmasking": (Unmasking(), ()),
    "remasking": (Remasking(at_rate(1.0)), ()),
    "confidence": (ConfidenceUnmasking(), ()),
    "confidence, of five": (ConfidenceUnmasking(controls=(top_k(5),)), ()),
    "confidence, hot, most": (ConfidenceUnmasking(controls=(temperature(2.0), top_p(0.9))), ()),
    "confidence, by threshold": (ConfidenceUnmasking(rule=threshold(0.9)), ()),
    "entropy, bounded": (ConfidenceUnmasking(entropy, rule=entropy_bound(0.1)), ()),
    "confidence, penalised": (ConfidenceUnmasking(controls=(repetition_penalty(1.2), min_p(0.1))), ()),
    "remasking by confidence": (ByConfidence(capped(0.1)), ()),
    "superposition": (Psi(), ()),
    "Tweedie, hot": (Tweedie(), (temperature(2.0),)),
    "Tweedie, of five": (Tweedie(), (top_k(5),)),
    "Tweedie, hot, most": (Tweedie(), (temperature(2.0), top_p(0.9))),
}


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("name", HELD)
def test_no_method_or_control_holds_half_of_what_the_network_returns(ref, name):
    """Beside the network's answer, which is 16 pieces here: 1.5 units in all, the answer being one."""
    method, controls = HELD[name]
    num_states, shape = 4096, (8, 16)
    graph = ref.StructuredAbsorbing(num_states - 1)
    answer = torch.rand(8 * 16, num_states)
    score = from_logits(lambda x, sigma, where: answer[: int(where.sum())], graph, controls=controls)
    with Peak() as memory:
        sample(score, graph, ref.LogLinear(), shape=shape, steps=2, seeds=range(8), method=method, denoise=False)
    assert memory.peak / (answer.numel() * 4) < 0.5 + 0.25 * (name == "trapezoidal")  # the rates of a fourth, kept


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("log_probs", [False, True])
def test_planning_and_telling_hold_as_little(ref, log_probs):
    """A planner whose answer is the network's own; and every number that is told is one a position."""
    num_states, shape = 4096, (8, 16)
    graph = ref.StructuredAbsorbing(num_states - 1)
    answer = torch.rand(8 * 16, num_states)
    network = lambda x, sigma, where: answer[: int(where.sum())]  # noqa: E731
    x = torch.zeros(shape, dtype=torch.int64)
    score, method = from_logits(network, graph), PathPlanning(network)
    with Peak() as memory:
        for _ in trajectory(score, graph, ref.LogLinear(), x=x, given=x > 0, steps=3, method=method, denoise=False,
                            log_probs=log_probs, seeds=range(8)):  # fmt: skip
            pass
    assert memory.peak / (answer.numel() * 4) < 0.5


def test_the_rate_of_absorption_is_looked_up_once_a_run(ref, monkeypatch):
    calls = []
    plain = masked.absorption_rate

    def counted(*args):
        calls.append(1)
        return plain(*args)

    monkeypatch.setattr(masked, "absorption_rate", counted)
    for method in (Unmasking(), Remasking(at_rate(1.0)), ConfidenceUnmasking(), FirstHitting()):
        calls.clear()
        sample(lambda x, sigma: torch.zeros(*x.shape, 4), ref.StructuredAbsorbing(3), ref.LogLinear(), shape=(2, 8),
               steps=9, method=method)  # fmt: skip
        assert len(calls) == 1
