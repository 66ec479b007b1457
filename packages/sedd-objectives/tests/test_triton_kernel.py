"""The GPU kernels against the plain formulas in float64: in Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sedd_objectives.jumps import Jumps, merge
from torch.nn import functional as F

pytest.importorskip("triton")
from sedd_objectives.fast import triton_kernel
from sedd_objectives.fast.triton_kernel import cross_entropy_slopes_, score_entropy_slopes_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts bfloat16's last bits off where a GPU rounds.
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7, torch.float16: 2**-11}
SMALLEST = {torch.float32: 0, torch.bfloat16: 0, torch.float16: 2**-25}


def every_weight_and_ratio(jumps, num_states):
    """w and r at all the states, (M, N) float64; of a state listed twice the positive weight counts."""
    weight = jumps.base_weight.double()[:, None].repeat(1, num_states)
    ratio = jumps.base_ratio.double()[:, None].repeat(1, num_states)
    for row in range(len(weight)):
        states = jumps.index[row]
        weight[row, states] = 0
        for state, w, r in zip(states.tolist(), jumps.weight[row].double(), jumps.ratio[row].double(), strict=True):
            if w > 0:
                weight[row, state], ratio[row, state] = w, r
    return weight, ratio


def plain(logits, shift, jumps):
    """The sums and slopes of eq. 5 in float64, term by term, with e^d - 1 - d by its series where it cancels."""
    log_score = logits.double() + shift.double()[:, None]
    weight, ratio = every_weight_and_ratio(jumps, logits.shape[-1])
    positive = ratio > 0
    d = log_score - torch.where(positive, ratio, 1).log()
    phi = torch.where(d.abs() < 1e-2, d**2 / 2 * (1 + d / 3 * (1 + d / 4 * (1 + d / 5))), d.expm1() - d)
    score = log_score.exp()
    value = torch.where(positive, torch.where(d < 80, ratio * phi, score - ratio - ratio * d), score)
    slope = torch.where(positive & (d < 80), ratio * d.expm1(), score - ratio)
    counts = weight > 0
    return torch.where(counts, weight * value, 0).sum(-1), torch.where(counts, weight * slope, 0)


def on_device(function, logits, *arguments, width=None, **how):
    """The function's result and what it leaves of logits (M, N), which are handed over in rows of `width` columns."""
    rows, num_states = logits.shape
    room = torch.full((rows, width or num_states), float("nan"), dtype=logits.dtype, device=DEVICE)
    room[:, :num_states] = logits
    moved = [
        Jumps(*(field.to(DEVICE) for field in a.fields())) if isinstance(a, Jumps) else a.to(DEVICE) for a in arguments
    ]
    loss = function(room, *moved, num_states, **how)
    assert not room[:, num_states:].any()  # of no weight in the products, and no longer NaN
    return loss.cpu(), room[:, :num_states].cpu()


def compare(logits, shift, jumps, factor, *, width=None, tolerance=2e-6, **how):
    expected, slope = plain(logits, shift, jumps)
    slope = slope * factor.double()[:, None]
    loss, found = on_device(score_entropy_slopes_, logits, shift, jumps, factor, width=width, **how)
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
    off = (found.double() - slope).abs()
    largest = slope.abs() * (ROUNDING[logits.dtype] + tolerance) + SMALLEST[logits.dtype]
    # s - r is as precise as s, and s as the float32 number that is taken to the power
    weight, ratio = every_weight_and_ratio(jumps, logits.shape[-1])
    log_score = logits.double() + shift.double()[:, None]
    power = log_score.abs() + torch.where(ratio > 0, ratio, 1).log().abs()
    rounding = (1e-6 + 2**-24 * power) * log_score.exp()
    assert (off <= largest + rounding * weight * factor.double()[:, None]).all()


def jumps_of(graph, x, x0, sigma):
    rates = graph.rates_into(x)
    return merge(rates, graph.ratio(x, x0, sigma.double()), x, torch.float32, graph.num_states)


def case(graph, sigma, generator, dtype=torch.float32):
    """One position for each sigma: logits, shift, jumps and factor."""
    tokens = graph.num_states - (graph.mask_id is not None)
    x0 = torch.randint(tokens, sigma.shape, generator=generator)
    x = graph.sample(x0, sigma, generator=generator)
    logits = torch.randn(len(sigma), graph.num_states, generator=generator).to(dtype)
    shift = -sigma.double().expm1().clamp_min(1e-30).log().float()
    return logits, shift, jumps_of(graph, x, x0, sigma), torch.rand(len(sigma), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["uniform", "absorbing", "hybrid", "dense", "dense absorbing"])
def test_loss_and_slopes_are_those_of_the_plain_formula(kind, dtype, make_graphs, generator):
    graph = make_graphs(37)[kind]
    sigma = torch.tensor([0.05, 0.3, 1.0, 2.0, 4.0])
    compare(*case(graph, sigma, generator, dtype), width=64, dense=kind.startswith("dense"))


@pytest.mark.parametrize("vocab_size", [1, 2, 3, 5, 64, 2048])
def test_any_number_of_states(vocab_size, make_graphs, generator):
    """Small enough for the listed states to be as many as all states, and across the blocks of columns."""
    for kind in ("uniform", "absorbing", "hybrid"):
        compare(*case(make_graphs(vocab_size)[kind], torch.tensor([0.3, 1.0, 1.0]), generator))


@pytest.mark.parametrize("rates", [(0.0, 1.0), (1.0, 0.0)])
def test_the_vocabulary_of_gpt2(rates, hybrid_graph, generator):
    graph = hybrid_graph(50257, *rates)
    compare(*case(graph, torch.tensor([0.5, 3.0]), generator, torch.bfloat16), width=50304)


@pytest.mark.parametrize("sigma", [1e-30, 1e-6, 50.0, 500.0])
@pytest.mark.parametrize("kind", ["uniform", "absorbing", "hybrid"])
def test_finite_and_right_at_any_noise(kind, sigma, make_graphs, generator):
    graph = make_graphs(40)[kind]
    x0 = torch.randint(40, (4,), generator=generator)
    x = torch.full_like(x0, graph.mask_id) if graph.mask_id else torch.randint(40, (4,), generator=generator)
    jumps = jumps_of(graph, x, x0, torch.full((4,), sigma))
    # at these levels a network's log-scores are near those of the ratios
    shift = torch.full((4,), -20.0 if sigma > 1 else min(60.0, -torch.tensor(sigma).log().item()))
    logits = torch.randn(4, graph.num_states, generator=generator)
    loss, slope = on_device(score_entropy_slopes_, logits, shift, jumps, torch.ones(4))
    assert loss.isfinite().all()
    assert slope.isfinite().all()
    compare(logits, shift, jumps, torch.ones(4))


@pytest.mark.parametrize("distance", [1e-6, -1e-6, 1e-3, -0.4999, 0.5001, -30.0])
def test_keeps_its_digits_where_the_score_is_near_the_ratio(distance):
    """The loss there is r d^2 / 2: its relative error is twice that of d."""
    logits = torch.tensor([[-11.0, 3.0, 0.5, -7.25]]).bfloat16().repeat(3, 1)
    shift = torch.tensor([-10.8, 0.0, 7.3])
    ratio = (logits.double() + shift.double()[:, None] - distance).exp()
    weight = torch.tensor([0.25, 1.0, 3.0, 0.0]).repeat(3, 1)
    listed = Jumps(torch.zeros(3), torch.zeros(3).double(), torch.arange(4).repeat(3, 1), weight, ratio)
    compare(logits, shift, listed, torch.ones(3), tolerance=1e-6)
    compare(logits, shift, listed, torch.ones(3), tolerance=1e-6, dense=True)
    equal = torch.full((3, 5000), -11.0).bfloat16()
    none = torch.empty(3, 0)
    base = Jumps(torch.full((3,), 0.3), ratio[:, 0], none.long(), none, none.double())
    compare(equal, shift, base, torch.ones(3), tolerance=1e-6)


@pytest.mark.parametrize("count", [0, 1, 7, 129])
def test_any_number_of_listed_states_and_states_listed_twice(count, generator):
    logits = torch.randn(3, 2500, generator=generator)
    index = torch.randint(2500, (3, count), generator=generator)
    if count > 1:
        index[:, 1] = index[:, 0]
    index = index.sort(-1).values
    weight = torch.rand(3, count, generator=generator)
    repeated = index[:, 1:] == index[:, :-1]
    weight[0, 1:][repeated[0]] = 0  # the first counts
    weight[1, :-1][repeated[1]] = 0  # or the last
    weight[2, 1:][repeated[2]] = 0  # or none
    weight[2, :-1][repeated[2]] = 0
    ratio = torch.rand(3, count, generator=generator).double()
    base = torch.tensor([0.0, 0.7, 2.0]), torch.tensor([0.3, 0.0, 0.9]).double()
    compare(logits, torch.zeros(3), Jumps(*base, index, weight, ratio), torch.rand(3, generator=generator), width=2560)


def test_no_rows(make_graphs):
    empty = torch.empty(0, dtype=torch.int64)
    jumps = jumps_of(make_graphs(5)["hybrid"], empty, empty, torch.empty(0))
    assert score_entropy_slopes_(torch.empty(0, 6), torch.empty(0), jumps, torch.empty(0), 6).shape == (0,)
    assert cross_entropy_slopes_(torch.empty(0, 6), empty, empty, torch.empty(0), 6).shape == (0,)


def test_a_row_that_cannot_move_reads_as_nothing(make_graphs, generator):
    """Whatever its logits, and beside rows that can; its slopes are 0."""
    graph = make_graphs(9)["absorbing"]
    x0, x = torch.tensor([3, 4, 5]), torch.tensor([9, 4, 9])
    logits = torch.randn(3, 10, generator=generator)
    logits[1] = float("nan")
    jumps = jumps_of(graph, x, x0, torch.ones(3))
    loss, slope = on_device(score_entropy_slopes_, logits, torch.zeros(3), jumps, torch.ones(3))
    assert loss[1] == 0
    assert not slope[1].any()
    assert (loss[::2] > 0).all()


def test_nan_stays_in_its_row(make_graphs, generator):
    logits, shift, jumps, factor = case(make_graphs(9)["uniform"], torch.tensor([1.0, 1.0, 1.0]), generator)
    logits[1] = float("nan")
    loss, slope = on_device(score_entropy_slopes_, logits, shift, jumps, factor)
    assert loss.isnan().tolist() == [False, True, False]
    assert slope.isnan().any(-1).tolist() == [False, True, False]


def test_rows_may_lie_apart(make_graphs, generator):
    logits, shift, jumps, factor = case(make_graphs(9)["uniform"], torch.tensor([1.0, 1.0, 1.0]), generator)
    room = torch.zeros(3, 32, device=DEVICE)
    room[:, :9] = logits
    on = [a.to(DEVICE) for a in (shift, factor)]
    loss = score_entropy_slopes_(room[:, :9], on[0], Jumps(*(f.to(DEVICE) for f in jumps.fields())), on[1], 9)
    expected, slope = on_device(score_entropy_slopes_, logits, shift, jumps, factor)
    assert torch.equal(loss.cpu(), expected)
    assert torch.equal(room[:, :9].cpu(), slope)
    assert not room[:, 9:].any()


def softmax_case(num_states, dtype, generator):
    logits = (4 * torch.randn(5, num_states, generator=generator)).to(dtype)
    x = torch.tensor([num_states - 1, num_states - 1, 0, 1, 1])
    x0 = torch.tensor([0, num_states // 2, 1, num_states - 1, 0])
    return logits, x, x0, torch.rand(5, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_states", [3, 100, 2048, 2500])
def test_cross_entropy_is_the_plain_one(num_states, dtype, generator):
    logits, x, x0, factor = softmax_case(num_states, dtype, generator)
    others = logits.double().scatter(-1, x[:, None], -torch.inf).requires_grad_()
    expected = F.cross_entropy(others, x0, reduction="none")
    (slope,) = torch.autograd.grad((expected * factor).sum(), others)
    loss, found = on_device(cross_entropy_slopes_, logits, x, x0, factor, width=num_states + 60)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=2e-6)
    atol = {torch.float32: 1e-7, torch.bfloat16: 1e-7, torch.float16: 2e-7}[dtype]
    torch.testing.assert_close(found.double(), slope, rtol=ROUNDING[dtype] + 3e-6, atol=atol)


def test_cross_entropy_of_the_vocabulary_of_gpt2_and_of_extreme_logits(generator):
    logits, x, x0, factor = softmax_case(50258, torch.bfloat16, generator)
    logits[0] = -1e4
    logits[0, 7] = 1e4
    logits[1, 20:] = -torch.inf  # whole blocks of states that cannot be
    x0[:2] = torch.tensor([7, 3])
    others = logits.double().scatter(-1, x[:, None], -torch.inf)
    loss, slope = on_device(cross_entropy_slopes_, logits, x, x0, factor, width=50304)
    torch.testing.assert_close(loss.double(), F.cross_entropy(others, x0, reduction="none"), rtol=1e-6, atol=2e-6)
    assert slope.isfinite().all()


def test_a_nan_logit_makes_the_cross_entropy_nan(generator):
    logits, x, x0, factor = softmax_case(100, torch.float32, generator)
    logits[2, 50] = float("nan")
    loss, _ = on_device(cross_entropy_slopes_, logits, x, x0, factor)
    assert loss.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.zeros(2, 6, dtype=torch.float64), "bfloat16, float16 and float32 logits, got torch.float64"),
        (torch.zeros(2, 5), r"logits must be \(m, W >= N = 6\)"),
        (torch.zeros(6, 2).T, r"logits must be \(m, W >= N = 6\) with contiguous rows"),
    ],
)
def test_what_the_kernel_does_not_take_is_named(logits, message, make_graphs):
    states = torch.zeros(2, dtype=torch.int64)
    jumps = jumps_of(make_graphs(5)["absorbing"], states, states, torch.ones(2))
    with pytest.raises(ValueError, match=message):
        score_entropy_slopes_(logits, torch.zeros(2), jumps, torch.ones(2), 6)
    with pytest.raises(ValueError, match=message):
        cross_entropy_slopes_(logits, states, states, torch.ones(2), 6)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sedd_objectives.fast import triton_kernel as kernels

sizes = {"stride": "i32", "num_states": "i32", "width": "i32", "count": "i32"}
for kernel in (kernels._score_entropy, kernels._dense_score_entropy, kernels._cross_entropy):
    constants = {name: {"BLOCK": 2048, "LIST": 4}[name] for name in kernel.arg_names if name.isupper()}
    states = ("index", "x", "x0")
    signature = {name: sizes.get(name, "*i64" if name in states else "*fp32") for name in kernel.arg_names}
    signature |= {"logits": "*bf16"} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    assert "cubin" in compiled.asm
"""


def test_the_kernels_compile_for_gpus(tmp_path):
    """What the interpreter takes a compiler may refuse; it needs no GPU."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(triton_kernel.__file__).parents[2]), environment.get("PYTHONPATH", "")]
    )
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
