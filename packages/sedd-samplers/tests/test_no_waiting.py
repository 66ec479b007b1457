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
    Particles,
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
    blockwise,
    cached,
    clamped,
    entropy,
    generate,
    infill,
    margin,
    prefix_cached,
    sample,
    threshold,
    trajectory,
    when_still,
)
from sedd_samplers.adapters import from_logits, from_masked_lm, from_posterior, to_posterior
from sedd_samplers.controls import allowed_tokens, controlled, temperature, top_k, top_p
from sedd_samplers.guidance import classifier_free
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
OF_TOKENS = {"renoising": EntropyBoundRenoising(bound=0.5), "leave one out": LeaveOneOut(share=0.5)}
TABLE = torch.randn(N, N, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
PLANNED = {
    "planned": PathPlanning(lambda x, sigma: TABLE[x]),
    "planned by the draft": PathPlanning(lambda x, sigma: TABLE[x], reads_draft=True, controls=(top_k(3),)),
}
EVERY: dict[str, Any] = METHODS | OF_MASKS | OF_TOKENS | PLANNED
CASES = [
    *[("absorbing", name) for name in METHODS | OF_MASKS | PLANNED],
    *[("mask in the middle", name) for name in ("Tweedie", "unmasking", "confidence")],
    *[("uniform", name) for name in METHODS | OF_TOKENS],
]


class Dispatched(TorchDispatchMode):
    """A mode under which nothing is compiled: torch need not keep its compiler off each operation, which takes long."""

    @classmethod
    def _should_skip_dynamo(cls):
        return False


class Reads(Dispatched):
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


class _Calls:
    """What is no operation on the CPU and one that waits elsewhere: lists of tensors' values, and tensors of lists.

    Five functions are replaced: a mode of functions would be asked about each one that there is.
    """

    def __init__(self, found):
        self.found = found

    def __enter__(self):
        self.patching = pytest.MonkeyPatch()
        for name in ("tolist", "numpy", "cpu"):
            self.patching.setattr(torch.Tensor, name, self._counted(getattr(torch.Tensor, name), name, always=True))
        for name in ("tensor", "as_tensor"):
            self.patching.setattr(torch, name, self._counted(getattr(torch, name), name, always=False))

    def __exit__(self, *raised):
        self.patching.undo()

    def _counted(self, function, name, *, always):
        def call(*args, **kwargs):
            if always or "device" in kwargs:
                self.found.append(name)
            return function(*args, **kwargs)

        return call


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
    """Of the last step one more is read: how it ended. So it is where a corrector asks about other positions anew."""
    graph, noise = graph_of(ref, kind), ref.Geometric() if kind == "uniform" else ref.LogLinear()
    how: dict[str, Any] = {"method": EVERY[method], "seeds": torch.arange(3)}
    until = {"until": lambda state: torch.zeros(3, dtype=torch.bool)}
    for further in ({}, {"static_shapes": True}, {"log_probs": not isinstance(how["method"], Uniformization)}, until):
        each, last = reads_of_steps(score, graph, noise, **how, **further)
        assert max(each) <= 1 + (isinstance(how["method"], PredictorCorrector | LeaveOneOut) and "until" in further)
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


class Wide(Dispatched):
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
    graph, states = ref.StructuredAbsorbing(1023), 1024
    rows = torch.rand(2, 8, states, generator=torch.Generator().manual_seed(0)).to(precision) - 4
    network = lambda x, sigma: rows[: len(x)]  # noqa: E731
    for score in (network, from_logits(network, graph, controls=[temperature(0.9)])):
        with Wide() as wide:
            sample(score, graph, ref.LogLinear(), shape=(2, 8), steps=3, method=EVERY[method],
                   seeds=[0, 1])  # fmt: skip
        assert 16 <= wide.most <= 2 * states


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_float64_holds_rows_where_tokens_are_noised(ref, precision):
    states = 1024
    rows = torch.rand(2, 8, states, generator=torch.Generator().manual_seed(0)).to(precision) - 4
    with Wide() as wide:
        sample(lambda x, sigma: rows[: len(x)], ref.StructuredUniform(states), ref.Geometric(), shape=(2, 8), steps=1)
    assert wide.most >= 16 * states


def test_a_compiled_network_is_compiled_once(ref):
    """Three sequences with different prompts, one of them finished early: one graph for all steps, without a break."""
    from torch._dynamo.testing import CompileCounter  # takes seconds, of the one process that compiles

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
    "a loop": ("absorbing", Remasking(when_still(0.1)), (0.3, 0.6, 0.2)),
}


@pytest.mark.parametrize("name", FURTHER)
def test_further_methods_read_one_tensor(ref, as_on_an_accelerator, name):
    kind, method, loop = FURTHER[name]
    graph, noise = graph_of(ref, kind), ref.Geometric() if kind == "uniform" else ref.LogLinear()
    noise = noise if loop is None else Looped(noise, *loop)
    each, _ = reads_of_steps(at_positions, graph, noise, method=method, seeds=torch.arange(3))
    assert max(each) == 1


def test_leave_one_out_reads_as_often_as_it_corrects(ref, as_on_an_accelerator):
    graph = graph_of(ref, "uniform")
    for corrections in (1, 3):
        method = LeaveOneOut(corrections=corrections)
        each, _ = reads_of_steps(at_positions, graph, ref.Geometric(), method=method, seeds=torch.arange(3))
        assert max(each) == corrections


GIVEN = torch.arange(8) < torch.tensor([0, 3, 8])[:, None]


@pytest.mark.parametrize("score", [at_positions, everywhere])
@pytest.mark.parametrize("kind", ["absorbing", "uniform"])
def test_particles_read_one_tensor_a_step(ref, as_on_an_accelerator, kind, score):
    graph, noise = graph_of(ref, kind), ref.Geometric() if kind == "uniform" else ref.LogLinear()
    for method in (Tweedie(), Euler(), PredictorCorrector()):
        each, last = reads_of_steps(score, graph, noise, given=GIVEN, conditioning=Particles(4), method=method)
        assert max(each) <= 1
        assert last <= 2


@pytest.mark.parametrize("kind", ["absorbing", "uniform"])
def test_particles_are_the_same_whenever_values_are_read(ref, kind, request):
    graph, noise = graph_of(ref, kind), ref.Geometric() if kind == "uniform" else ref.LogLinear()
    how: dict[str, Any] = {"steps": 5, "seeds": torch.arange(3), "conditioning": Particles(4), "given": GIVEN,
                           "x": torch.arange(24).view(3, 8) % 3}  # fmt: skip
    expected = infill(everywhere, graph, noise, **how)
    request.getfixturevalue("as_on_an_accelerator")
    assert torch.equal(infill(at_positions, graph, noise, **how), expected)


def reads_of_blocks(score, graph, noise, **options):
    """Of every step of a run in blocks but those of the first, in which a model's first answer is looked at."""
    how: dict[str, Any] = {"x": torch.zeros_like(GIVEN).long(), "given": GIVEN, "block_size": 3, "seeds": [0, 1, 2]}
    states = blockwise(score, graph, noise, **how | options)
    for _ in range(5):
        next(states)
    counts: list[int] = []
    while True:
        with Reads() as reads:
            state = next(states, None)
        counts.append(len(reads.found))
        if state is None:
            return counts


OF_BLOCKS: dict[str, Any] = {
    "plain": {},
    "in blocks that begin elsewhere, and grow": {"origin": 2, "growing": True},
    "ended, in one shape": {"end_id": 2, "static_shapes": True},
    "ended": {"end_id": 2, "growing": True},
    "until": {"pad_id": 1, "until": lambda state: torch.tensor([True, state.step > 8, False])},
    "with probabilities": {"log_probs": True},
}


@pytest.mark.parametrize("options", OF_BLOCKS)
@pytest.mark.parametrize("method", ["Tweedie", "unmasking", "confidence", "planned"])
def test_a_step_of_a_block_reads_one_tensor(ref, as_on_an_accelerator, method, options):
    """One more at the very end: how the last step went."""
    how = OF_BLOCKS[options] | {"method": EVERY[method]}
    counts = reads_of_blocks(everywhere, graph_of(ref, "absorbing"), ref.LogLinear(), **how)
    assert len(counts) > (3 if "until" in how else 7)
    assert max(counts[:-2]) <= 1
    counts = reads_of_blocks(at_positions, graph_of(ref, "uniform"), ref.Geometric(), conditioning=clamped,
                             **OF_BLOCKS[options])  # fmt: skip
    assert max(counts[:-2]) <= 1


@pytest.mark.parametrize("options", OF_BLOCKS)
@pytest.mark.parametrize("method", ["Tweedie", "unmasking", "confidence", "planned"])
def test_text_in_blocks_does_not_depend_on_when_values_are_read_nor_on_shapes(ref, method, options, request):
    graph, shapes = graph_of(ref, "absorbing"), set()
    how: dict[str, Any] = {"x": torch.arange(24).view(3, 8) % 3, "given": GIVEN, "block_size": 3, "seeds": [0, 1, 2]}
    how |= OF_BLOCKS[options] | {"method": EVERY[method]}

    def fixed(x, sigma):
        shapes.add(tuple(x.shape))
        return everywhere(x, sigma)

    expected = generate(everywhere, graph, ref.LogLinear(), **how | {"static_shapes": False})
    for late in (False, True):
        if late:
            request.getfixturevalue("as_on_an_accelerator")
        for score, static in ((at_positions, False), (fixed, True)):
            found = generate(score, graph, ref.LogLinear(), **how | {"static_shapes": static})
            assert torch.equal(found.x, expected.x)
            assert torch.equal(found.lengths, expected.lengths)
    ends = [(3, 2), (3, 5), (3, 8)] if "origin" in how else [(3, 3), (3, 6), (3, 8)]
    assert shapes <= ({*ends} if how.get("growing") else {(3, 8)})


class NothingKept:
    """Keys and values of a network that looks at no other position."""

    def crop(self, count):
        assert count < 0

    def batch_select_indices(self, indices):
        assert len(indices) > 0


def test_kept_answers_take_a_read_of_their_own(ref, as_on_an_accelerator):
    """Which sequences have changed, one a call; two more where others are asked about than before."""
    graph, network = graph_of(ref, "absorbing"), cached(lambda x, sigma, positions: TABLE[x.flatten()[positions]])
    score, noise = from_logits(network, graph), ref.LogLinear()
    for method, most in ((ConfidenceUnmasking(), 2), (PathPlanning(network), 3), (Tweedie(), 4), (Unmasking(), 4)):
        each, _ = reads_of_steps(score, graph, noise, method=method, seeds=torch.arange(3))
        assert max(each) <= most


def test_a_long_step_of_two_stages_reads_one_tensor(ref, as_on_an_accelerator, monkeypatch):
    """Where the rates of all are too many at once, too, and sequences are moved in turns."""
    calls = []

    def score(x, sigma, positions):
        calls.append(1)
        return at_positions(x, sigma, positions)

    graph = graph_of(ref, "uniform")
    for rows, times in ((6, 2), (5, 6)):
        monkeypatch.setattr("sedd_samplers.multistage.rows_at_a_time", lambda *_, rows=rows: rows)
        calls.clear()
        each, _ = reads_of_steps(score, graph, ref.Geometric(), method=Trapezoidal(), seeds=torch.arange(3))
        assert max(each) == 1
        assert len(calls) == times * STEPS + 1


def test_keys_and_values_take_a_read_of_their_own(ref, as_on_an_accelerator):
    """How far contents agree, one a call; another where a sequence has left. What is kept is checked once a run."""
    graph = graph_of(ref, "absorbing")
    network = prefix_cached(lambda x, sigma, *, positions, cache: TABLE[x.flatten()[positions]], NothingKept,
                            block_size=3)  # fmt: skip
    score = from_logits(network, graph)
    reads_of_blocks(score, graph, ref.LogLinear(), given=GIVEN & False, growing=True)
    for growing in (False, True):
        counts = reads_of_blocks(score, graph, ref.LogLinear(), growing=growing, given=GIVEN & False,
                                 method=ConfidenceUnmasking())  # fmt: skip
        assert max(counts[:-2]) == 2
        counts = reads_of_blocks(score, graph, ref.LogLinear(), growing=growing)
        assert max(counts[:-2]) <= 4


@pytest.mark.parametrize("step", [2, 4])
def test_what_is_wrong_in_a_block_is_told_a_step_late(ref, as_on_an_accelerator, step):
    """In its final denoise, too: then in the first step of the next block that has something to write."""
    graph = graph_of(ref, "absorbing")
    seen: list[int] = []

    def score(x, sigma):
        rows = everywhere(x, sigma)
        rows[:, 3:6] += float("nan") if sigma[0] < {2: 1.5, 4: 0.3}[step] else 0.0
        return rows

    free = torch.zeros(8, 9, dtype=torch.bool)
    states = blockwise(score, graph, ref.LogLinear(), x=free.long(), given=free, block_size=3, t_min=0.2,
                       method=Euler(), seeds=range(8))  # fmt: skip
    with pytest.raises(ValueError, match=rf"^step {step} of 4 of block 1, from t = .*: the score model returned NaN"):
        seen.extend(state.step for state in states)
    assert seen[-1] == 4 + step
