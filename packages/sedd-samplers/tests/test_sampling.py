"""The loop: prompts, rows asked of the model, seeds, precision, and what is refused."""

from __future__ import annotations

import functools
import inspect
import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from sedd_samplers import (
    ConfidenceUnmasking,
    EntropyBoundRenoising,
    Euler,
    LeaveOneOut,
    Looped,
    Particles,
    PathPlanning,
    PredictorCorrector,
    Psi,
    TauLeaping,
    Trapezoidal,
    Tweedie,
    Uniformization,
    Unmasking,
    adapters,
    adaptive_grid,
    at_rate,
    blockwise,
    cached,
    capped,
    clamped,
    confidence,
    entropy_bound,
    generate,
    guidance,
    infill,
    mask_probability,
    noise_grid,
    pad_prompts,
    prefix_cached,
    rescaled,
    sample,
    threshold,
    token_grid,
    trajectory,
    uniform_grid,
    views,
    when_still,
)
from sedd_samplers.adapters import from_logits, from_posterior
from sedd_samplers.adapters.processes import Masking
from sedd_samplers.controls import allowed_tokens, controlled, min_p, repetition_penalty, temperature, top_k, top_p
from sedd_samplers.grids import check_times
from sedd_samplers.guidance import classifier_free
from sedd_samplers.model_calls import device_of, warn_of_training
from sedd_samplers.prompts import check_prompt, check_start
from sedd_samplers.views import live

METHODS = [Euler(), TauLeaping(), Tweedie()]
GRAPHS = {
    "absorbing": lambda ref: ref.StructuredAbsorbing(5),
    "absorbing, mask amid the tokens": lambda ref: ref.StructuredAbsorbing(5, 2),
    "uniform": lambda ref: ref.StructuredUniform(6),
    "hybrid": lambda ref: ref.hybrid_matrix(5),
}


def flat(num_states, level=0.0):
    """A score model that knows nothing."""
    return lambda x, sigma: torch.full((*x.shape, num_states), level)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def wrapped(graph, shape):
    """A score model that knows nothing, under every kind of control."""
    even = torch.ones(*shape, 6, dtype=torch.bool)
    even[..., 1::2] = False
    plain = from_posterior(lambda x, sigma: torch.full((*x.shape, 6), 1 / 6), graph)
    return {
        "plain": flat(6),
        "controlled": controlled(plain, graph, temperature(0.7), top_k(4), top_p(0.9)),
        "allowed": from_posterior(lambda x, sigma: torch.ones(*x.shape, 6), graph, controls=[allowed_tokens(even)]),
        "guided": classifier_free(plain, flat(6), 2.0, num_states=6),
        "cached": from_posterior(cached(lambda x, sigma: torch.ones(*x.shape, 6)), graph),
    }


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@drawn(data=st.data())
def test_given_positions_never_change(ref, data):
    """Whatever the graph, the method, the prompt, the control and the option."""
    name = data.draw(st.sampled_from(sorted(GRAPHS)))
    graph = GRAPHS[name](ref)
    method = data.draw(st.sampled_from(METHODS + [Unmasking()] * name.startswith("absorbing")))
    shape = (data.draw(st.integers(1, 3)), data.draw(st.integers(1, 7)))
    rng = seeded(data.draw(st.integers(0, 2**31)))
    tokens = torch.tensor([y for y in range(6) if y != graph.mask_id])
    x = tokens[torch.randint(len(tokens), shape, generator=rng)]
    fixed = torch.rand(shape, generator=rng) < data.draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    denoise, stopping = data.draw(st.booleans()), data.draw(st.booleans())
    finished = torch.rand(shape[0], generator=rng) < 0.3
    control = data.draw(st.sampled_from(["plain", "controlled", "allowed", "guided", "cached"]))
    states = trajectory(
        wrapped(graph, shape)[control], graph, ref.LogLinear(), x=x, given=fixed, steps=data.draw(st.integers(1, 5)),
        method=method, denoise=denoise, generator=rng, until=(lambda state: finished) if stopping else None,
        conditioning=clamped,
    )  # fmt: skip
    for state in live(states, str, stream=io.StringIO()):
        assert torch.equal(state.x[fixed], x[fixed])
        assert ((state.x >= 0) & (state.x < 6)).all()
    if denoise and not stopping and graph.mask_id is not None:
        assert not (state.x == graph.mask_id).any()
    if denoise and not stopping and control == "allowed":
        assert (state.x[~fixed] % 2 == 0).all()


def test_a_batch_of_prompts_and_lengths_is_its_sequences_alone(ref):
    """A model that looks at what is no padding: each sequence has the sample that it would have by itself."""
    graph, pad = ref.StructuredAbsorbing(5), 4
    table = torch.rand(6, 6, generator=seeded(), dtype=torch.float64)

    def posterior(x, sigma):
        seen = (x != pad)[..., None]
        p = ((table[x] * seen).sum(1, keepdim=True) + torch.arange(x.shape[1])[:, None] / 3 + table[x]).square()
        return p * (torch.arange(6) < pad)

    score = from_posterior(posterior, graph)
    prompts, lengths = [[1, 2], [], [3, 3, 0]], [6, 3, 9]
    x, fixed = pad_prompts(prompts, lengths, pad_id=pad)
    together = infill(score, graph, ref.LogLinear(), x=x, given=fixed, steps=9, seeds=[5, 6, 7])
    for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        x, fixed = pad_prompts([prompt], length)
        alone = infill(score, graph, ref.LogLinear(), x=x, given=fixed, steps=9, seeds=[5 + i])
        assert torch.equal(together[[i], :length], alone)
        assert (together[i, length:] == pad).all()


def test_infilling_follows_the_conditional_distribution(ref):
    """A given middle token, many steps; a false alarm once in 10,000 seeds."""
    graph = ref.StructuredAbsorbing(3)
    p0 = ref.random_data(3, 3, 4, 3)
    x = torch.tensor([[0, 1, 0]]).expand(50_000, -1)
    fixed = torch.tensor([[False, True, False]]).expand(50_000, -1)
    score = ref.ExactRows(p0, graph.Q)
    out = infill(score, graph, ref.LogLinear(), x=x, given=fixed, steps=100, generator=seeded())
    law = torch.zeros_like(p0)
    law[:, 1] = p0[:, 1]
    assert ref.chi_square(out, law) > 1e-4


def test_the_grid_starts_at_one_and_ends_at_t_min():
    times = uniform_grid(4, 0.2)
    torch.testing.assert_close(times, torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2], dtype=torch.float64))


def test_the_model_is_asked_at_every_time_of_the_grid_once(ref):
    graph, noise, levels = ref.StructuredUniform(4), ref.Linear(2.0), []

    def score(x, sigma):
        levels.append(float(sigma[0]))
        return torch.zeros(*x.shape, 4)

    states = list(trajectory(score, graph, noise, x=torch.zeros(1, 3, dtype=torch.int64),
                             given=torch.zeros(1, 3, dtype=torch.bool), steps=4, t_min=0.2))  # fmt: skip
    assert levels == pytest.approx([2.0, 1.6, 1.2, 0.8, 0.4])
    assert [s.step for s in states] == [0, 1, 2, 3, 4, 5]
    assert {s.steps for s in states} == {5}
    assert [s.t for s in states] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])


def test_only_positions_that_can_move_reach_the_head(ref):
    graph = ref.StructuredAbsorbing(3)
    score = ref.ExactRows(ref.random_data(3, 4, 4, 3), graph.Q)
    x = torch.zeros(8, 4, dtype=torch.int64)
    fixed = torch.zeros_like(x, dtype=torch.bool)
    fixed[:, 0] = True
    masked = []
    for state in trajectory(score, graph, ref.LogLinear(), x=x, given=fixed, steps=10, generator=seeded()):
        masked.append(int((state.x == 3).sum()))
    assert masked[0] == 24
    assert masked[-1] == 0
    assert score.asked == [m for m in masked[:-1] if m]


def test_no_position_left_no_call(ref):
    graph = ref.StructuredAbsorbing(3)
    score = ref.ExactScore(ref.random_data(3, 4, 4, 3), graph.Q)
    x = torch.randint(3, (2, 4), generator=seeded())
    fixed = torch.ones_like(x, dtype=torch.bool)
    assert torch.equal(infill(score, graph, ref.LogLinear(), x=x, given=fixed, steps=6), x)
    assert score.calls == 0
    fixed[1] = False
    infill(score, graph, ref.LogLinear(), x=x, given=fixed, steps=6)
    assert score.rows == score.calls > 0  # the finished sequence is left out, one row a call


@pytest.mark.parametrize("name", GRAPHS)
def test_where_or_not_gives_the_same_sample(ref, name):
    graph = GRAPHS[name](ref)
    p0 = ref.random_data(6 - (graph.mask_id is not None), 3, 6, graph.mask_id)
    results = [
        sample(kind(p0, graph.Q), graph, ref.LogLinear(), shape=(16, 3), steps=6, generator=seeded())
        for kind in (ref.ExactScore, ref.ExactRows)
    ]
    assert torch.equal(*results)


def test_a_row_depends_on_its_seed_alone(ref):
    """Not on its batch, nor on its place in it; a generator gives the seeds, the same for the same generator."""
    graph = ref.StructuredUniform(6)
    score = ref.ExactRows(ref.random_data(6, 3), graph.Q)

    def run(seeds):
        return sample(score, graph, ref.LogLinear(), shape=(len(seeds), 3), steps=6, seeds=seeds)

    together = run(list(range(40)))
    assert torch.equal(together[[7]], run([7]))
    assert torch.equal(together[[30, 2]], run([30, 2]))
    assert len(together.unique(dim=0)) > 10
    one, same, other = (
        sample(score, graph, ref.LogLinear(), shape=(20, 3), steps=6, generator=seeded(s)) for s in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_arithmetic_is_float32_under_autocast(ref):
    graph = ref.StructuredAbsorbing(5)
    log_score = torch.randn(4, 50, 6, generator=seeded(3))

    def run():
        return sample(lambda x, sigma: log_score, graph, ref.LogLinear(), shape=(4, 50), steps=5, seeds=range(4))

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(), plain)


def test_a_half_precision_model_is_welcome(ref):
    graph = ref.StructuredAbsorbing(5)
    x = sample(lambda x, sigma: torch.zeros(*x.shape, 6).bfloat16(), graph, ref.LogLinear(), shape=(2, 5), steps=3)
    assert x.dtype == torch.int64


def test_no_gradient_is_recorded(ref):
    weight = torch.zeros(6, requires_grad=True)
    seen = []

    def score(x, sigma):
        seen.append(torch.is_grad_enabled())
        return weight.expand(*x.shape, 6)

    sample(score, ref.StructuredUniform(6), ref.LogLinear(), shape=(1, 2), steps=2)
    assert not any(seen)
    assert torch.is_grad_enabled()


def test_the_bar_counts_every_step(ref, capsys):
    sample(flat(6), ref.StructuredUniform(6), ref.LogLinear(), shape=(1, 2), steps=4, progress=True)
    assert "5/5" in capsys.readouterr().err


def test_finished_sequences_stop_and_all_finished_end_the_loop(ref):
    """A sequence freezes as it is once `until` says so, mask or not, and the model does not see it again."""
    graph, rows = ref.StructuredAbsorbing(5), []

    def score(x, sigma):
        rows.append(len(x))
        return (-sigma.expm1().log() - math.log(5))[:, None, None].expand(*x.shape, 6)

    def until(state):
        return torch.tensor([state.step >= 2, state.step >= 4, False])

    x, given = torch.zeros(3, 400).long(), torch.zeros(3, 400).bool()
    options: dict[str, Any] = {"x": x, "given": given, "steps": 8, "seeds": range(3)}
    states = list(trajectory(score, graph, ref.LogLinear(), until=until, **options))
    assert len(states) == 10
    assert rows == [3, 3, 2, 2, 1, 1, 1, 1]  # by the denoise none is left to call for
    assert torch.equal(states[2].x[0], states[-1].x[0])
    assert (states[-1].x == 5).sum(1).gt(0).tolist() == [True, True, False]
    free = list(trajectory(score, graph, ref.LogLinear(), **options))
    assert torch.equal(free[-1].x[2], states[-1].x[2])  # the others' end is nothing to it
    ended = list(trajectory(score, graph, ref.LogLinear(), until=lambda s: torch.tensor([s.step > 2] * 3), **options))
    assert [state.step for state in ended] == [0, 1, 2, 3]


def test_a_finished_sequence_stays_finished(ref):
    """Whatever `until` says of it later."""
    states = list(trajectory(flat(6, -8.0), ref.StructuredAbsorbing(5), ref.LogLinear(), x=torch.zeros(2, 40).long(),
                             given=torch.zeros(2, 40).bool(), steps=6, seeds=[1, 2],
                             until=lambda state: torch.tensor([state.step == 2, False])))  # fmt: skip
    assert torch.equal(states[2].x[0], states[-1].x[0])
    assert not torch.equal(states[2].x[1], states[-1].x[1])


def test_until_must_answer_for_every_sequence(ref):
    for answer in (True, torch.tensor([True]), torch.tensor([1.0, 0.0])):

        def until(state, answer=answer):
            return answer

        with pytest.raises(ValueError, match=r"until must return bool of shape \(2,\)"):
            sample(flat(6), ref.StructuredUniform(6), ref.LogLinear(), shape=(2, 3), until=until)


def test_an_error_names_the_step_it_happened_in(ref):
    calls = []

    def score(x, sigma):
        calls.append(1)
        return torch.full((*x.shape, 6), math.nan if len(calls) == 3 else 0.0)

    with pytest.raises(ValueError, match=r"^step 3 of 5, from t = 0.5 to 0.25: the score model returned NaN"):
        sample(score, ref.StructuredUniform(6), ref.LogLinear(), shape=(1, 4), steps=4, t_min=0.0)

    def broken(x, sigma):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory") as raised:
        sample(broken, ref.StructuredUniform(6), ref.LogLinear(), shape=(1, 4), steps=4)
    assert raised.value.__notes__ == ["raised in step 1 of 5, from t = 1 to 0.75 of a sampling loop"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"steps": 0}, "steps must be a positive integer, got 0"),
        ({"steps": 2.5}, "steps must be a positive integer"),
        ({"t_min": 1.0}, "t_min must lie in"),
        ({"shape": (0, 3)}, "two positive integers"),
        ({"shape": (3,)}, "two positive integers"),
        ({"times": [0.5], "steps": None}, "at least one step"),
        ({"times": [1.0, 0.5]}, "either times or steps and t_min, not both"),
        ({"times": [1.0, 0.5], "steps": None, "t_min": 0.1}, "either times or steps and t_min, not both"),
        ({"times": [0.5, 0.7], "steps": None}, "fall strictly"),
        ({"times": [1.5, 0.7], "steps": None}, "fall strictly"),
        ({"seeds": [1]}, "seeds must be 2 integers"),
        ({"seeds": [1, 2], "generator": seeded()}, "not both"),
        ({"score": 3}, "the score model must be callable as score"),
        ({"score": flat(5)}, r"shape \(2, 3, 6\), got torch.float32 \(2, 3, 5\)"),
        ({"score": lambda x, sigma: [x]}, "got a list"),
        ({"score": lambda x, sigma: torch.zeros(*x.shape, 6).long()}, "float tensor"),
        ({"score": flat(6, math.nan)}, "returned NaN at sequence 0, position 0, sigma"),
        ({"score": flat(6, math.inf)}, "infinite log-score at sequence 0"),
        ({"score": flat(6, -math.inf), "times": [1.0, 0.9], "steps": None}, "no state can be drawn at sequence 0"),
    ],
)
def test_what_makes_no_sense_is_refused(ref, change, told):
    arguments = {"score": flat(6), "shape": (2, 3), "steps": 3, **change}
    with pytest.raises(ValueError, match=told):
        sample(arguments.pop("score"), ref.StructuredAbsorbing(5), ref.LogLinear(), **arguments)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"method": Tweedie}, r"such as Tweedie\(\), an object that can be called, got the class Tweedie"),
        ({"method": "tweedie"}, r"such as Tweedie\(\).*got 'tweedie'"),
        ({"noise": 3}, "the noise must be callable"),
        ({"noise": dict}, r"an object such as LogLinear\(\), got the class dict"),
        ({"graph": dict}, r"an object such as Absorbing\(50257\), got the class dict"),
        ({"graph": 3}, "the graph, a int, has no num_states"),
        ({"seeds": 0}, "seeds must be 2 integers"),
    ],
)
def test_slips_of_a_first_hour_are_told(ref, change, told):
    arguments = {"score": flat(6), "graph": ref.StructuredAbsorbing(5), "noise": ref.LogLinear(), **change}
    with pytest.raises(ValueError, match=told):
        sample(
            arguments.pop("score"), arguments.pop("graph"), arguments.pop("noise"), shape=(2, 3), steps=2, **arguments
        )


@pytest.mark.parametrize(
    ("option", "told"),
    [("num_steps", "you may mean steps="), ("seed", "seeds=, one a sequence"), ("temperature", "controls=")],
)
def test_options_that_are_none_are_told_with_what_was_meant(ref, option, told):
    wrong: dict[str, Any] = {option: 1}
    x = torch.zeros(2, 3).long()
    with pytest.raises(TypeError, match=rf"sample has no option '{option}': .*{told}.* Its options are steps, method"):
        sample(flat(6), ref.StructuredAbsorbing(5), ref.LogLinear(), shape=(2, 3), **wrong)
    with pytest.raises(TypeError, match=f"infill has no option '{option}'"):
        infill(flat(6), ref.StructuredAbsorbing(5), ref.LogLinear(), x=x, given=x > 0, **wrong)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.dropout = torch.nn.Parameter(torch.zeros(6)), torch.nn.Dropout(0.1)

    def forward(self, x, sigma):
        return self.weight.expand(*x.shape, 6)

    def answer(self, x, sigma):
        return self(x, sigma)


WRAPPED = {
    "itself": lambda net, graph: net,
    "a wrapper": lambda net, graph: from_logits(net, graph),
    "wrappers of wrappers": lambda net, graph: controlled(from_logits(cached(net), graph), graph, top_k(2)),
    "guidance": lambda net, graph: classifier_free(net, flat(6), 2.0, num_states=6),
    "a partial": lambda net, graph: functools.partial(net),
    "a method": lambda net, graph: net.answer,
    "a closure": lambda net, graph: lambda x, sigma: net(x, sigma),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_a_module_is_found_whatever_it_is_wrapped_in(ref, how):
    """Its device is the samples', and in training mode it is named."""
    graph = ref.StructuredAbsorbing(5)
    assert device_of(WRAPPED[how](Net().to("meta"), graph), None) == torch.device("meta")
    assert device_of(WRAPPED[how](Net(), graph), "meta") == torch.device("meta")
    score = WRAPPED[how](Net().train(), graph)
    with pytest.warns(UserWarning, match=r"the Net is in training mode.*call \.eval\(\)"):
        sample(score, graph, ref.LogLinear(), shape=(1, 2), steps=1)
    sample(WRAPPED[how](Net().eval(), graph), graph, ref.LogLinear(), shape=(1, 2), steps=1)
    same = Net().train()
    same.dropout.p = 0.0  # in training mode or not
    sample(WRAPPED[how](same, graph), graph, ref.LogLinear(), shape=(1, 2), steps=1)


def test_a_sequence_that_is_finished_from_the_start_is_left_alone(ref):
    graph = ref.StructuredAbsorbing(5)
    start = torch.full((2, 4), 5)
    x = infill(flat(6), graph, ref.LogLinear(), x=start, given=start < 0, start=start, steps=3,
               until=lambda state: torch.tensor([True, False]))  # fmt: skip
    assert torch.equal(x[0], start[0])
    assert (x[1] != 5).all()


@pytest.mark.parametrize(
    ("x", "fixed", "told"),
    [
        (torch.zeros(2, 3), torch.ones(2, 3).bool(), "x must be int64"),
        (torch.zeros(3).long(), torch.ones(3).bool(), "x must be int64 of shape"),
        (torch.zeros(2, 3).long(), torch.ones(2, 4).bool(), "given must be bool of x's shape"),
        (torch.zeros(2, 3).long(), torch.ones(2, 3), "given must be bool"),
        (torch.full((2, 3), 6), torch.ones(2, 3).bool(), "the state 6 at a given position"),
        (torch.full((2, 3), -1), torch.ones(2, 3).bool(), "the state -1 at a given position"),
        (torch.full((2, 3), 5), torch.ones(2, 3).bool(), "the mask"),
    ],
)
def test_prompts_that_make_no_sense_are_refused(ref, x, fixed, told):
    with pytest.raises(ValueError, match=told):
        infill(flat(6), ref.StructuredAbsorbing(5), ref.LogLinear(), x=x, given=fixed)


def told(function):
    """What a function, or a method's numbers, are unless told otherwise; None is left out."""
    given = inspect.signature(function).parameters.values()
    defaults = {each.name: each.default for each in given if each.default is not inspect.Parameter.empty}
    return {name: value for name, value in defaults.items() if value is not None}


def test_numbers_unless_told_otherwise(ref):
    """A changed one would change every sample of whoever leaves it out."""
    values: dict[Any, dict[str, Any]] = {
        trajectory: {"method": Tweedie(), "denoise": True, "static_shapes": False, "log_probs": False},
        blockwise: {
            "origin": 0,
            "growing": False,
            "method": Tweedie(),
            "denoise": True,
            "static_shapes": False,
            "log_probs": False,
        },
        prefix_cached: {"origin": 0, "approximate": False},
        Particles: {"count": 64, "threshold": 0.5},
        Trapezoidal: {"theta": 0.5},
        PredictorCorrector: {"predictor": Tweedie(), "corrections": 1, "ratio": 1.0},
        Uniformization: {"slack": 1.5, "shrink": 0.5},
        ConfidenceUnmasking: {"order": confidence, "randomness": 0.0, "controls": ()},
        PathPlanning: {"eta": 1.0, "reads_draft": False, "controls": ()},
        Psi: {"kappa": 0.98},
        LeaveOneOut: {"predictor": Tweedie(), "share": 0.1, "corrections": 1},
        token_grid: {"t_min": 1e-5},
        uniform_grid: {"t_min": 1e-5, "t_max": 1.0},
        noise_grid: {"level": mask_probability, "t_min": 1e-5},
        adaptive_grid: {"target": 0.01, "t_min": 1e-5, "seed": 0, "most": 10_000},
        mask_probability: {"rate": 1.0},
        pad_prompts: {"left": False},
        adapters.from_posterior: {"controls": ()},
        adapters.from_logits: {"subs": True, "banned": (), "controls": ()},
        adapters.from_masked_lm: {"banned": (), "shifted": False, "controls": ()},
        guidance.neighbour_ratios: {"batch_size": 1024},
        views.live: {"row": 0, "every": 0.05},
        views.record: {"rows": 4, "title": "A sample, step by step"},
    }
    for function, expected in values.items():
        assert told(function) == expected, function
    free = torch.zeros(1, 2, dtype=torch.bool)
    graph = ref.StructuredAbsorbing(5)
    states = list(trajectory(flat(6), graph, ref.LogLinear(), x=free.long(), given=free, seeds=[0]))
    assert [len(states), states[0].t, states[-2].t, states[-1].t] == [130, 1.0, 1e-5, 0.0]
    assert [state.step for state in states] == list(range(130))
    assert {state.steps for state in states} == {129}


def noise(t):
    return 4 * t, torch.full_like(t, 4.0)


JUST = 1e-9
TAKEN_AND_REFUSED: dict[str, tuple[Callable[[Any], object], list[Any], list[Any]]] = {
    "temperature": (temperature, [JUST, 1e9], [0.0, -1.0, math.inf, math.nan]),
    "top_k": (top_k, [1, 10**9], [0, True, 1.0]),
    "top_p": (top_p, [JUST, 1], [0.0, 1 + JUST, math.nan]),
    "min_p": (min_p, [0.0, 1.0], [-JUST, 1 + JUST, math.nan]),
    "repetition_penalty": (repetition_penalty, [JUST, 1e9], [0.0, -1.0, math.inf, math.nan]),
    "Psi kappa": (Psi, [0, 1.0], [-JUST, 1 + JUST, math.nan]),
    "share": (lambda v: LeaveOneOut(share=v), [JUST, 1], [0, 1 + JUST, math.nan]),
    "corrections of one out": (lambda v: LeaveOneOut(corrections=v), [1], [0, True, 1.5]),
    "eta": (lambda v: PathPlanning(planner=flat(6), eta=v), [0, 1e9], [-JUST, math.inf, math.nan]),
    "at": (lambda v: Looped(noise, v, 0.6, 0.4), [JUST, 1 - JUST], [0, 1, math.nan]),
    "on": (lambda v: Looped(noise, 0.5, v, 0.4), [0.4 + JUST, 1 - JUST], [0.4, 1, math.nan]),
    "off": (lambda v: Looped(noise, 0.5, 0.6, v), [JUST, 0.6 - JUST], [0, 0.6, math.nan]),
    "when_still": (when_still, [0, 1], [-JUST, 1 + JUST, math.nan]),
    "capped": (capped, [0, 1], [-JUST, 1 + JUST, math.nan]),
    "rescaled": (rescaled, [0, 1], [-JUST, 1 + JUST, math.nan]),
    "at_rate": (at_rate, [0, 1e9], [-JUST, math.inf, math.nan]),
    "threshold": (threshold, [JUST, 1], [0, 1 + JUST, math.nan]),
    "entropy_bound": (entropy_bound, [0, 1e9], [-JUST, math.inf, math.nan]),
    "randomness": (lambda v: ConfidenceUnmasking(randomness=v), [0, 1e9], [-JUST, math.inf, math.nan]),
    "slack": (lambda v: Uniformization(slack=v), [1, 1e9], [1 - JUST, math.nan]),
    "shrink": (lambda v: Uniformization(shrink=v), [JUST, 1 - JUST], [0, 1, math.nan]),
    "steps": (uniform_grid, [1, 10**4], [0, True, 1.0]),
    "t_min": (lambda v: uniform_grid(2, v), [0, 1 - JUST], [-JUST, 1, math.nan]),
    "t_max": (lambda v: uniform_grid(2, 0.5, v), [0.5 + JUST, 1], [0.5, 1 + JUST, math.nan]),
    "tokens": (lambda v: token_grid(noise, v, 3), [3, 4], [2, True, 4.0]),
    "times": (
        lambda v: check_times(torch.tensor(v, dtype=torch.float64)),
        [[1, 0], [1.0, JUST, 0]],
        [[1], [1 + JUST, 0], [1, -JUST], [1, 0.5, 0.5], [0.5, 1]],
    ),
    "count": (lambda v: Particles(count=v), [2], [1, True, 2.0]),
    "threshold of particles": (lambda v: Particles(threshold=v), [0, 1], [-JUST, 1 + JUST, math.nan]),
    "theta": (lambda v: Trapezoidal(theta=v), [JUST, 1 - JUST], [0, 1, math.nan]),
    "corrections": (lambda v: PredictorCorrector(corrections=v), [1], [0, True, 1.5]),
    "ratio": (lambda v: PredictorCorrector(ratio=v), [JUST, 1e9], [0, math.inf, math.nan]),
    "bound": (lambda v: EntropyBoundRenoising(bound=v), [JUST, 1e9], [0, math.inf, math.nan]),
    "confident": (lambda v: EntropyBoundRenoising(confident=v), [JUST, 1e9, None], [0, math.inf, math.nan]),
    "stable": (lambda v: EntropyBoundRenoising(stable=v), [0, 1], [-1, True, 1.0]),
    "weight of guidance": (lambda v: classifier_free(flat(6), flat(6), v, num_states=6), [0, 9], [-JUST, math.inf]),
    "length of a prompt": (lambda v: pad_prompts([[1, 2]], v), [2, 3], [1, 0]),
    "lengths": (lambda v: pad_prompts([[], [1]], v, pad_id=0), [[1, 1], [3, 1]], [[0, 1], [1, 0], [1]]),
}


@pytest.mark.parametrize("which", TAKEN_AND_REFUSED)
def test_numbers_are_taken_up_to_their_ends_and_refused_beyond(which):
    function, taken, refused = TAKEN_AND_REFUSED[which]
    for value in taken:
        function(value)
    for value in refused:
        with pytest.raises(ValueError, match=r"must|needs|do not fit"):
            function(value)


@pytest.mark.parametrize("which", ["target", "t_min", "most"])
def test_an_adaptive_grid_takes_numbers_up_to_their_ends(ref, which):
    graph, free = ref.StructuredUniform(6), torch.zeros(1, 1, dtype=torch.bool)
    how: dict[str, Any] = {"x": free.long(), "given": free, "target": 1e9, "t_min": 0.5, "most": 100}
    refused: list[Any] = {"target": [0, math.inf, math.nan], "t_min": [0, 1, math.nan], "most": [0, True, 9.0]}[which]
    for value in refused:
        with pytest.raises(ValueError, match=f"{which} must"):
            adaptive_grid(flat(6), graph, ref.LogLinear(), **how | {which: value})
    steps = len(adaptive_grid(flat(6), graph, ref.LogLinear(), **how)) - 1
    adaptive_grid(flat(6), graph, ref.LogLinear(), **how | {"most": steps})
    with pytest.raises(ValueError, match=f"{steps - 1} steps only lead to"):
        adaptive_grid(flat(6), graph, ref.LogLinear(), **how | {"most": steps - 1})


def test_states_are_taken_up_to_the_last(ref):
    """Of a prompt, of a start and of the rows that are shown."""
    graph = ref.StructuredAbsorbing(5, 2)
    x, given = torch.tensor([[0, 5, 3]]), torch.tensor([[True, True, False]])
    check_prompt(x, given, 6, 2)
    for state, message in ((-1, "state -1"), (6, "state 6"), (2, "the mask \\(2\\)")):
        with pytest.raises(ValueError, match=message):
            check_prompt(x.masked_fill(given, state), given, 6, 2)
        check_prompt(x.masked_fill(~given, state), given, 6, 2)  # what stands at a free position does not count
    check_start(torch.tensor([[0, 5, 2]]), x, 6)
    for state in (-1, 6):
        with pytest.raises(ValueError, match=r"outside 0\.\.5"):
            check_start(torch.tensor([[0, 5, state]]), x, 6)
    for mask_id in (0, graph.num_states - 1):
        Masking(6, mask_id)
    for mask_id in (-1, 6, True):
        with pytest.raises(ValueError, match=r"states 0\.\.5"):
            Masking(6, mask_id)


def test_a_schedule_that_ends_in_little_noise_is_told_of(ref):
    """Of one of four tokens e^-2 (1 - 1/4) is left, as a total variation."""
    graph = ref.StructuredUniform(4)
    how: dict[str, Any] = {"shape": (1, 3), "steps": 1, "seeds": [0]}
    flat, little = lambda x, sigma: torch.zeros(*x.shape, 4), lambda t: (2 * t, torch.full_like(t, 2.0))
    with pytest.warns(UserWarning, match="at t = 1 the noise is 2, and 10% is left of a token: this run begins"):
        sample(flat, graph, little, **how)
    x, given = torch.zeros(1, 4).long(), torch.zeros(1, 4).bool()
    with pytest.warns(UserWarning, match="is left of a token"):
        generate(flat, graph, little, x=x, given=given, block_size=4, steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(flat, graph, little, start=torch.zeros(1, 3).long(), **how)
        sample(flat, graph, lambda t: (4 * t, torch.full_like(t, 4.0)), **how)  # e^-4 3/4, under a twentieth


@pytest.mark.parametrize(
    ("part", "told"),
    [
        (torch.nn.Dropout(0.1), True),
        (torch.nn.Dropout(0.0), False),
        (torch.nn.MultiheadAttention(4, 1, dropout=0.1), True),  # a number of its own, no module
        (torch.nn.MultiheadAttention(4, 1), False),
        (torch.nn.BatchNorm1d(4), True),
        (torch.nn.LayerNorm(4), False),
    ],
)
def test_training_mode_is_told_of_where_something_acts_otherwise_in_it(part, told):
    for training, warned in ((True, told), (False, False)):
        model = torch.nn.Sequential(part).train(training)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            warn_of_training(functools.partial(model))
        assert ["the Sequential is in training mode" in str(each.message) for each in seen] == [True] * warned
