"""A step on an accelerator reads one tensor back to the host: shown on the CPU, by what is dispatched.

And what follows from that: what is wrong is told one step late, with the same words; and batches of constant shape.
"""

from __future__ import annotations

import contextlib
import importlib
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
    LeaveOneOut,
    Looped,
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
    entropy,
    infill,
    margin,
    sample,
    threshold,
    trajectory,
    when_still,
)
from sedd_samplers.adapters import from_logits, from_masked_lm, from_posterior, to_posterior
from sedd_samplers.controls import allowed_tokens, controlled, temperature, top_k, top_p
from sedd_samplers.guidance import classifier_free
from torch._dynamo.testing import CompileCounter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

waiting = importlib.import_module("sedd_samplers.waiting")
READS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim",
    "unique_consecutive",
}  # fmt: skip
N, STEPS = 7, 6
METHODS = {
    "Tweedie": Tweedie(),
    "Euler": Euler(),
    "tau-leaping": TauLeaping(),
    "ancestral": Ancestral(),
    "trapezoidal": Trapezoidal(),
    "corrected": PredictorCorrector(),
    "corrected twice": PredictorCorrector(Euler(), corrections=2),
}
OF_MASKS = {
    "unmasking": Unmasking(),
    "remasking": Remasking(at_rate(1.0)),
    "confidence": ConfidenceUnmasking(randomness=1.0),
    "entropy": ConfidenceUnmasking(entropy, controls=(top_k(3),)),
    "margin": ConfidenceUnmasking(margin),
    "by threshold": ConfidenceUnmasking(rule=threshold(0.9)),
    "by least confidence": ByConfidence(at_rate(1.0)),
}
OF_TOKENS = {"renoising": EntropyBoundRenoising(bound=0.5)}
EVERY: dict[str, Any] = METHODS | OF_MASKS | OF_TOKENS
CASES = [
    *[("absorbing", name) for name in METHODS | OF_MASKS],
    *[("mask in the middle", name) for name in ("Tweedie", "unmasking", "confidence")],
    *[("uniform", name) for name in METHODS | OF_TOKENS],
]


class Reads(TorchDispatchMode):
    """The operations whose result, or its shape, depends on values, inside: the host waits for them."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __enter__(self):
        self.calls = _Calls(self.found)
        self.calls.__enter__()
        return super().__enter__()

    def __exit__(self, *raised):
        super().__exit__(*raised)
        self.calls.__exit__(*raised)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in READS or by_mask:
            self.found.append(name)
        return operation(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    """What is no operation on the CPU and one that waits elsewhere: lists of tensors' values, and tensors of lists."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in ("tolist", "numpy", "cpu") or (name in ("tensor", "as_tensor") and "device" in (kwargs or {})):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def as_on_an_accelerator(monkeypatch):
    for module in ("waiting", "reverse", "randomness", "controls"):
        monkeypatch.setattr(f"sedd_samplers.{module}.reading_waits", lambda device: not waiting._at_once.get())


def graph_of(ref, kind):
    return {
        "absorbing": lambda: ref.StructuredAbsorbing(N - 1),
        "mask in the middle": lambda: ref.StructuredAbsorbing(N - 1, 3),
        "uniform": lambda: ref.StructuredUniform(N),
    }[kind]()


TABLE = torch.randn(N, N, generator=torch.Generator().manual_seed(0)).log_softmax(-1)


def with_positions(function: Any) -> Any:
    """The same: that it takes a third argument is found out, and not declared."""
    return function


@with_positions
def at_positions(x, sigma, positions):
    """A score model that offers rows by number."""
    return TABLE[x.flatten()[positions]] - sigma.expm1().log()[positions // x.shape[1], None]


def everywhere(x, sigma):
    return TABLE[x] - sigma.expm1().log()[:, None, None]


def reads_of_steps(score, graph, noise, **options):
    """Of every step of a run of 6, but the first, which looks up what is the same in all, and of the final denoise."""
    free = torch.zeros(3, 8, dtype=torch.bool)
    how: dict[str, Any] = {"x": free.long(), "given": free, "steps": STEPS} | options
    states = trajectory(score, graph, noise, **how)
    next(states), next(states)
    counts: list[int] = []
    while True:
        with Reads() as reads:
            state = next(states, None)
        if state is None:
            return counts[:-1], counts[-1]
        counts.append(len(reads.found))


@pytest.mark.parametrize("score", [at_positions, everywhere])
@pytest.mark.parametrize(("kind", "method"), CASES)
def test_a_step_reads_one_tensor(ref, as_on_an_accelerator, kind, method, score):
    """Of the last step one more is read: how it ended."""
    graph, noise = graph_of(ref, kind), ref.Geometric() if kind == "uniform" else ref.LogLinear()
    how: dict[str, Any] = {"method": EVERY[method], "seeds": torch.arange(3)}
    for further in ({}, {"static_shapes": True}, {"until": lambda state: torch.zeros(3, dtype=torch.bool)}):
        each, last = reads_of_steps(score, graph, noise, **how, **further)
        assert max(each) <= 1 + (isinstance(how["method"], PredictorCorrector) and "until" in further)
        assert last <= 2


ADAPTED: dict[str, Any] = {
    "posterior": lambda graph: from_posterior(lambda x, sigma: TABLE[x].softmax(-1), graph),
    "logits": lambda graph: from_logits(at_positions, graph, banned=[0]),
    "logits, controlled": lambda graph: from_logits(at_positions, graph, controls=[temperature(0.7), top_k(3)]),
    "logits, mostly": lambda graph: from_logits(at_positions, graph, controls=[top_p(0.8)]),
    "constrained": lambda graph: from_logits(at_positions, graph, controls=[allowed_tokens(torch.ones(8, N).bool())]),
    "controlled": lambda graph: controlled(at_positions, graph, temperature(2.0)),
    "guided": lambda graph: classifier_free(at_positions, everywhere, 1.5, num_states=N),
    "there and back": lambda graph: from_posterior(to_posterior(at_positions, graph), graph),
    "masked language model": lambda graph: from_masked_lm(lambda input_ids: TABLE[input_ids], graph, shifted=True),
}


@pytest.mark.parametrize("name", ADAPTED)
def test_nor_do_adapters_controls_and_guidance_read(ref, as_on_an_accelerator, name):
    graph = graph_of(ref, "absorbing")
    score = ADAPTED[name](graph)
    assert max(reads_of_steps(score, graph, ref.LogLinear())[0]) <= 1
    if name == "posterior":  # of a uniform graph, too
        graph = graph_of(ref, "uniform")
        score = ADAPTED[name](graph)
        assert max(reads_of_steps(score, graph, ref.Geometric())[0]) <= 1


def test_an_exact_method_reads_one_number_an_event(ref, as_on_an_accelerator, monkeypatch):
    """First hitting: one of each event and one a step. Uniformization: three of each candidate and window."""
    graph, events = graph_of(ref, "absorbing"), []
    exact = importlib.import_module("sedd_samplers.exact")

    def counted(plain):
        def call(*args, **how):
            events.append(1)
            return plain(*args, **how)

        return call

    for name in ("redraw_clean", "_next_candidate"):
        monkeypatch.setattr(exact, name, counted(getattr(exact, name)))
    for method, most in ((FirstHitting(), 1), (Uniformization(), 3)):
        states = trajectory(at_positions, graph, ref.LogLinear(), x=torch.zeros(2, 9).long(),
                            given=torch.zeros(2, 9).bool(), steps=3, method=method, denoise=False, t_min=0.01,
                            seeds=[0, 1])  # fmt: skip
        next(states), next(states)
        events.clear()
        with Reads() as reads:
            next(states)
        assert len(events) > 2
        assert len(reads.found) <= most * len(events) + 1


def test_reads_are_found(ref):
    """On the CPU values are read at once, so that there are more."""
    graph = graph_of(ref, "absorbing")
    assert min(reads_of_steps(everywhere, graph, ref.LogLinear())[0]) > 1
    with Reads() as reads:
        torch.ones(2)[torch.ones(2).bool()]
        torch.ones(2).tolist()
        torch.tensor([1], device="cpu")
        bool(torch.ones(2).all())
    assert reads.found == ["index", "tolist", "tensor", "_local_scalar_dense"]


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_samples_do_not_depend_on_when_values_are_read_nor_on_shapes(ref, kind, method, request):
    graph, noise = graph_of(ref, kind), ref.Geometric() if kind == "uniform" else ref.LogLinear()
    x = torch.randint(3, (4, 8), generator=torch.Generator().manual_seed(1))
    given = torch.arange(8) < torch.tensor([0, 3, 8, 5])[:, None]
    how: dict[str, Any] = {"steps": 5, "method": EVERY[method], "seeds": torch.arange(4)}
    if kind == "uniform":
        given = given[:, :1].expand(-1, 8).clone()  # whole sequences, which is exact
    until = lambda state: torch.tensor([False, state.step > 1, False, False])  # noqa: E731
    expected = infill(everywhere, graph, noise, x=x, given=given, until=until, **how)
    shapes = []

    def fixed(x, sigma, positions=None):
        shapes.append(tuple(x.shape))
        assert positions is None
        return everywhere(x, sigma)

    assert torch.equal(infill(fixed, graph, noise, x=x, given=given, until=until, static_shapes=True, **how), expected)
    assert set(shapes) == {(4, 8)}
    request.getfixturevalue("as_on_an_accelerator")
    assert torch.equal(infill(at_positions, graph, noise, x=x, given=given, until=until, **how), expected)
    assert torch.equal(infill(fixed, graph, noise, x=x, given=given, until=until, static_shapes=True, **how), expected)


@pytest.mark.parametrize("exact", [FirstHitting(), Uniformization()])
def test_exact_methods_draw_the_same_with_static_shapes(ref, exact):
    graph = graph_of(ref, "absorbing")
    how: dict[str, Any] = {"shape": (3, 6), "steps": 2, "t_min": 0.01, "method": exact, "seeds": [0, 1, 2]}
    shapes = []

    def fixed(x, sigma):
        shapes.append(tuple(x.shape))
        return everywhere(x, sigma)

    expected = sample(at_positions, graph, ref.LogLinear(), **how)
    assert torch.equal(sample(fixed, graph, ref.LogLinear(), static_shapes=True, **how), expected)
    assert set(shapes) == {(3, 6)}


def test_all_finished_end_the_loop_without_a_read_of_their_own(ref, as_on_an_accelerator):
    graph, calls = graph_of(ref, "absorbing"), []

    def score(x, sigma):
        calls.append(1)
        return everywhere(x, sigma)

    states = list(trajectory(score, graph, ref.LogLinear(), x=torch.zeros(2, 4).long(), given=torch.zeros(2, 4).bool(),
                             steps=9, seeds=[0, 1], until=lambda state: torch.full((2,), state.step >= 2)))  # fmt: skip
    assert [state.step for state in states] == [0, 1, 2]
    assert len(calls) == 2


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("bad", "told"), [(float("nan"), "NaN"), (float("inf"), "an infinite log-score")])
@pytest.mark.parametrize("step", [1, 3, 4])
def test_what_is_wrong_is_told_a_step_late_in_the_same_words(ref, as_on_an_accelerator, step, bad, told, static):
    """In the first step, in the last but one, and in the final denoise."""
    graph, noise = graph_of(ref, "uniform"), ref.Geometric()
    end = float(noise(torch.tensor([1, 2 / 3, 1 / 3, 0], dtype=torch.float64)[step - 1])[0])

    def score(x, sigma):
        rows = everywhere(x, sigma)
        rows[1, 2] += bad if abs(float(sigma[0]) / end - 1) < 1e-3 else 0.0
        return rows

    seen = []

    def run():
        for state in trajectory(score, graph, noise, x=torch.zeros(2, 4).long(), given=torch.zeros(2, 4).bool(),
                                t_min=0.0, steps=3, static_shapes=static):  # fmt: skip
            seen.append(state.step)
            assert ((state.x >= 0) & (state.x < N)).all()

    where = rf"^step {step} of 4, from t = .*: the score model returned {told} at sequence 1, position 2"
    with pytest.raises(ValueError, match=where):
        run()
    assert seen == list(range(min(step, 3) + 1))


def test_what_is_not_wrong_when_looked_for_again_is_told_all_the_same(ref, as_on_an_accelerator):
    graph, calls = graph_of(ref, "absorbing"), []

    def score(x, sigma):
        calls.append(1)
        return everywhere(x, sigma) + (float("nan") if len(calls) == 1 else 0.0)

    with pytest.raises(ValueError, match=r"step 1 of 4, .* left no state to draw, and did not when it was asked again"):
        sample(score, graph, ref.LogLinear(), shape=(1, 4), steps=3)


@pytest.mark.parametrize("method", [Tweedie(), ConfidenceUnmasking(), Unmasking(), FirstHitting()])
def test_controls_that_leave_nothing_are_told_late_as_at_once(ref, as_on_an_accelerator, method):
    graph = graph_of(ref, "absorbing")
    allowed = torch.ones(4, N, dtype=torch.bool)
    allowed[2] = False
    allowed[2, -1] = True  # the mask, which no model gives
    score = from_logits(at_positions, graph, controls=[allowed_tokens(allowed)])
    with pytest.raises(ValueError, match=r"step \d of 4, .*: the controls leave no token at sequence \d, position 2"):
        sample(score, graph, ref.LogLinear(), shape=(2, 4), steps=3, method=method)


def test_a_bound_that_a_rate_exceeds_is_told_late(ref, as_on_an_accelerator):
    """A score with a peak between the ends of a window; see test_exact.py for the same without waiting."""
    graph = graph_of(ref, "uniform")

    def peak(x, sigma):
        return 5 * torch.exp(-((sigma - 0.75) ** 2) / 0.005)[:, None, None].expand(*x.shape, N)

    with pytest.raises(ValueError, match=r"above the bound .* relied on"):
        sample(peak, graph, ref.Linear(1.0), shape=(40, 4), steps=1, t_min=0.2, method=Uniformization(slack=1.0),
               seeds=range(40))  # fmt: skip


class Wide(TorchDispatchMode):
    """The largest float64 tensor."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                self.most = max(self.most, tensor.numel())
        return out


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", list(METHODS | OF_MASKS))
def test_float64_holds_no_rows_where_tokens_are_not_noised(ref, method, precision):
    """Under an absorbing graph: numbers for each position, block sums of the draw, and one row, the prior's."""
    graph, states = ref.StructuredAbsorbing(4095), 4096
    rows = torch.rand(2, 8, states, generator=torch.Generator().manual_seed(0)).to(precision) - 4
    network = lambda x, sigma: rows[: len(x)]  # noqa: E731
    for score in (network, from_logits(network, graph, controls=[temperature(0.9)])):
        with Wide() as wide:
            sample(score, graph, ref.LogLinear(), shape=(2, 8), steps=3, method=EVERY[method],
                   seeds=[0, 1])  # fmt: skip
        assert 16 <= wide.most <= 2 * states
    with Wide() as wide:
        sample(network, ref.StructuredUniform(states), ref.Geometric(), shape=(2, 8), steps=1)
    assert wide.most >= 16 * states  # where they are it takes rows


def test_a_compiled_network_is_compiled_once(ref):
    """Three sequences with different prompts, one of them finished early: one graph for all steps, without a break."""
    torch._dynamo.reset()
    counter = CompileCounter()
    graph = graph_of(ref, "absorbing")
    network = torch.nn.Sequential(torch.nn.Embedding(N, 16), torch.nn.Linear(16, N))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(network, backend=counter, fullgraph=True, dynamic=False)
    x = torch.randint(6, (3, 8), generator=torch.Generator().manual_seed(0))
    given = torch.arange(8) < torch.tensor([0, 3, 8])[:, None]
    how: dict[str, Any] = {"x": x, "given": given, "steps": 8, "seeds": [0, 1, 2]}
    for method in (Tweedie(), Unmasking(), ConfidenceUnmasking()):
        runs = [
            infill(from_logits(lambda x, sigma, model=model: model(x), graph), graph, ref.LogLinear(), method=method,
                   static_shapes=static, **how)
            for model, static in ((network, False), (compiled, True))
        ]  # fmt: skip
        assert torch.equal(*runs)
    assert counter.frame_count == 1
    with contextlib.suppress(Exception):  # without them every number of sequences would be a graph of its own
        infill(from_logits(lambda x, sigma: compiled(x), graph), graph, ref.LogLinear(), method=Unmasking(), **how)
    assert counter.frame_count > 1


def test_particles_have_no_static_shapes(ref):
    from sedd_samplers import Particles

    with pytest.raises(ValueError, match="nor static_shapes nor log_probs goes with them"):
        sample(everywhere, graph_of(ref, "uniform"), ref.Geometric(), shape=(1, 2), conditioning=Particles(2),
               static_shapes=True)  # fmt: skip


FURTHER: dict[str, Any] = {  # graph, method, and the times of a loop
    "Psi": ("uniform", Psi(0.9), None),
    "leave one out": ("uniform", LeaveOneOut(), None),
    "a loop": ("absorbing", Remasking(when_still(0.1)), (0.3, 0.6, 0.2)),
    "path planning": ("absorbing", PathPlanning(everywhere), None),
}
ELSEWHERE = {"leave one out": 2, "path planning": 11}


@pytest.mark.parametrize("name", FURTHER)
def test_further_methods_read_one_tensor_but_where_it_is_said(ref, as_on_an_accelerator, name):
    kind, method, loop = FURTHER[name]
    graph, noise = graph_of(ref, kind), ref.Geometric() if kind == "uniform" else ref.LogLinear()
    noise = noise if loop is None else Looped(noise, *loop)
    each, _ = reads_of_steps(at_positions, graph, noise, method=method, seeds=torch.arange(3))
    assert max(each) == ELSEWHERE.get(name, 1)
