"""The GPU's draw against a plain one in float64: in Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scipy import stats

pytest.importorskip("triton")
from sedd_samplers.fast import draw_kernel
from sedd_samplers.fast.draw_kernel import BLOCK, draw_moves

pytestmark = pytest.mark.usefixtures("quick_interpreter")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STAY = {
    "Euler": lambda leaving: (1 - leaving).clamp_min(0),
    "tau-leaping": lambda leaving: leaving / torch.expm1(leaving),
    "never": torch.zeros_like,
}


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def row(base, index, value):
    return SimpleNamespace(base=base.to(DEVICE), index=index.to(DEVICE), value=value.to(DEVICE))


def draw(log_score, x, weight, stay, uniform, **how):
    how = {name: value.to(DEVICE) for name, value in how.items()}
    drawn = draw_moves(log_score.to(DEVICE), x.to(DEVICE), row(*weight), stay, uniform.to(DEVICE), **how)
    assert torch.equal(drawn.right, drawn.total.isfinite() & (drawn.total > 0))
    return drawn.state.cpu(), drawn.total.cpu()


def plain_law(log_score, x, weight, stay):
    """The law in float64, one state after the other: (M, N)."""
    base, index, value = (part.double() if part.is_floating_point() else part for part in weight)
    law = base[:, None].expand(log_score.shape).scatter(1, index, value) * log_score.double().exp()
    law.scatter_(1, x[:, None], 0.0)
    return law.scatter(1, x[:, None], stay(law.sum(-1))[:, None])


def plain_draw(law, uniform):
    cumulative = law.cumsum(1)
    return (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(1)


def case(num_states, generator, dtype=torch.float32, rows=16, listed=2):
    log_score = (2 * torch.randn(rows, num_states, generator=generator)).to(dtype)
    x = torch.randint(num_states, (rows,), generator=generator)
    index = torch.rand(rows, num_states, generator=generator).argsort(1)[:, : min(listed, num_states)]
    value = torch.rand(index.shape, generator=generator) / 8
    weight = torch.rand(rows, generator=generator) / num_states / 8, index, value
    return log_score, x, weight, torch.rand(rows, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("method", STAY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_uniform_number_leads_to_the_state_of_the_plain_draw(method, dtype, generator):
    log_score, x, weight, uniform = case(BLOCK + 70, generator, dtype)
    law = plain_law(log_score, x, weight, STAY[method])
    state, total = draw(log_score, x, weight, STAY[method], uniform)
    torch.testing.assert_close(total, law.sum(-1), rtol=1e-6, atol=0)
    assert torch.equal(state, plain_draw(law, uniform))


@pytest.mark.parametrize("num_states", [2, 3, 17, BLOCK, BLOCK + 1])
@pytest.mark.parametrize("listed", [0, 1, 5])
def test_any_number_of_states_and_of_listed_ones(num_states, listed, generator):
    log_score, x, weight, uniform = case(num_states, generator, rows=10, listed=listed)
    law = plain_law(log_score, x, weight, STAY["Euler"])
    state, _ = draw(log_score, x, weight, STAY["Euler"], uniform)
    assert torch.equal(state, plain_draw(law, uniform))


def test_the_vocabulary_of_gpt2_from_rows_picked_out_of_others_and_shifted(generator):
    """As a masked position is drawn under absorption: the mask's own mass is what the tokens leave."""
    log_score, _, _, uniform = case(50_258, generator, torch.bfloat16, rows=5)
    pick, x = torch.tensor([4, 0, 2]), torch.full((3,), 50_257)
    shift = torch.tensor([-12.0, -14.0, -18.0])
    weight = torch.full((3,), 0.5), torch.empty(3, 0, dtype=torch.int64), torch.empty(3, 0)
    uniform = torch.tensor([0.999, 0.7, 0.3], dtype=torch.float64)
    state, total = draw(log_score, x, weight, STAY["Euler"], uniform, shift=shift, pick=pick)
    law = plain_law(log_score[pick].double() + shift.double()[:, None], x, weight, STAY["Euler"])
    torch.testing.assert_close(total, law.sum(-1), rtol=1e-6, atol=0)
    assert torch.equal(state, plain_draw(law, uniform))
    assert (state < 50_257).any()
    assert (state == 50_257).any()


@pytest.mark.parametrize("count", [150, pytest.param(600, marks=pytest.mark.slow)])
def test_chi_square(generator, count):
    """A false alarm once in 10,000 seeds."""
    log_score, x, weight, _ = case(9, generator, rows=1)
    law = plain_law(log_score, x, weight, STAY["Euler"])[0]
    uniform = torch.rand(count, dtype=torch.float64, generator=generator)
    many = tuple(part.expand(count, *part.shape[1:]) for part in weight)
    state, _ = draw(
        log_score, x.expand(count), many, STAY["Euler"], uniform, pick=torch.zeros(count, dtype=torch.int64)
    )
    observed = torch.bincount(state, minlength=9).double().numpy()
    assert stats.chisquare(observed, (law / law.sum()).numpy() * count).pvalue > 1e-4


def test_a_state_of_probability_1e_12_has_that_share_of_the_uniform_numbers(generator):
    """By bisection for the smallest number that leads to it and the smallest that leads beyond, within 1 %."""
    rare, place = 1e-12, BLOCK + 5
    log_score = torch.rand(1, 2 * BLOCK, generator=generator)
    log_score[0, place] = math.log(rare * float(log_score.double().exp().sum()))
    x, weight = torch.tensor([0]), (torch.ones(1), torch.empty(1, 0, dtype=torch.int64), torch.empty(1, 0))
    law = plain_law(log_score, x, weight, STAY["never"])[0]

    def drawn(tried):
        many = tuple(part.expand(len(tried), *part.shape[1:]) for part in weight)
        return draw(
            *(log_score, x.expand(len(tried)), many, STAY["never"], tried.clamp_max(1 - 2**-53)),
            pick=torch.zeros(len(tried), dtype=torch.int64),
        )[0]

    def smallest(beyond):
        """It lies where float64 has it, to the float32 rounding of a block's sum."""
        middle = float(law[:place].sum() / law.sum())
        low, high = middle - 1e-6, middle + 1e-6
        assert (drawn(torch.tensor([low, high], dtype=torch.float64)) < beyond).tolist() == [True, False]
        for _ in range(32):
            tried = (low + high) / 2
            low, high = (tried, high) if drawn(torch.tensor([tried], dtype=torch.float64)) < beyond else (low, tried)
        return high

    share = smallest(place + 1) - smallest(place)
    assert math.isclose(share, float(law[place] / law.sum()), rel_tol=0.01)


def test_states_of_no_probability_are_never_drawn(generator):
    """Nor where the number is the largest below 1, nor next to states that have all of it."""
    log_score = torch.full((4, BLOCK + 9), -torch.inf)
    log_score[:, [3, BLOCK + 2]] = torch.rand(4, 2, generator=generator)
    x = torch.full((4,), BLOCK + 8)
    weight = torch.ones(4), torch.tensor([[7], [3], [7], [7]]), torch.zeros(4, 1)
    uniform = torch.tensor([0.0, 0.0, 1 - 2**-53, 0.5], dtype=torch.float64)
    state, _ = draw(log_score, x, weight, STAY["never"], uniform)
    assert state.tolist() == [3, BLOCK + 2, BLOCK + 2, state[3]]
    assert int(state[3]) in (3, BLOCK + 2)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of arithmetic with infinity, as asked for
def test_a_row_with_nothing_to_draw_says_so_and_stays(generator):
    log_score, x, weight, uniform = case(20, generator, rows=4)
    log_score[0] = float("nan")
    log_score[1] = -torch.inf
    log_score[2] = torch.inf
    state, total = draw(log_score, x, weight, STAY["never"], uniform)
    assert torch.equal(state[:3], x[:3])
    assert (total.isfinite() & (total > 0)).tolist() == [False, False, False, True]


def test_no_rows():
    none = torch.empty(0, dtype=torch.int64)
    weight = torch.empty(0), torch.empty(0, 1, dtype=torch.int64), torch.empty(0, 1)
    state, total = draw(torch.empty(0, 6), none, weight, STAY["Euler"], torch.empty(0, dtype=torch.float64))
    assert len(state) == len(total) == 0


@pytest.mark.parametrize(
    ("log_score", "message"),
    [
        (torch.zeros(2, 6, dtype=torch.float64), "bfloat16, float16 and float32 log-scores, got torch.float64"),
        (torch.zeros(6, 2).T, r"log_score must be \(R, N\) with contiguous rows"),
    ],
)
def test_what_the_kernels_do_not_take_is_named(log_score, message):
    weight = torch.ones(2), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
    with pytest.raises(ValueError, match=message):
        draw(log_score, torch.zeros(2, dtype=torch.int64), weight, STAY["Euler"], torch.zeros(2, dtype=torch.float64))


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sedd_samplers.fast import draw_kernel as kernels
from sedd_samplers.fast import uniform_kernel as uniforms

types = {"log_score": "*bf16", "right": "*i1"}
types |= dict.fromkeys(("shift", "base", "value", "sums"), "*fp32")
types |= dict.fromkeys(("own", "uniform", "total", "out"), "*fp64")
types |= dict.fromkeys(("stride", "num_states", "num_blocks", "count"), "i32")
for kernel, sizes in (
    (kernels._sum_of_block, {"BLOCK": kernels.BLOCK}),
    (kernels._state, {"BLOCK": kernels.BLOCK, "BLOCKS": 32}),
    (uniforms._uniforms, {"BLOCK": uniforms.BLOCK}),
):
    for constants in (sizes, sizes | {"pick": None}):
        if not constants.keys() <= set(kernel.arg_names):
            continue
        signature = {name: types.get(name, "*i64") for name in kernel.arg_names}
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
        assert "cubin" in compiled.asm
"""


def test_the_kernels_compile_for_gpus(tmp_path):
    """What the interpreter takes a compiler may refuse; it needs no GPU."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    paths = [str(Path(draw_kernel.__file__).parents[2]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def test_rows_may_lie_apart_and_be_drawn_from_more_than_once(generator):
    """Rows of a wider tensor, some of them twice; what is given stays, in whatever precision the rest comes."""
    wide, x, (base, index, value), uniform = case(BLOCK + 40, generator, rows=6)
    log_score, pick = wide[:, : BLOCK + 9], torch.tensor([5, 0, 5, 2])
    assert log_score.stride(0) == BLOCK + 40
    x, uniform = x[:4] % (BLOCK + 9), uniform[:4]
    weight = base[:4].double(), index[:4] % (BLOCK + 9), value[:4].double()
    shift = torch.tensor([0.5, -0.25, 1.0, -2.0], dtype=torch.float64)
    before = wide.clone()
    state, total = draw(log_score, x, weight, STAY["Euler"], uniform, shift=shift, pick=pick)
    law = plain_law(log_score[pick].double() + shift[:, None], x, weight, STAY["Euler"])
    assert (state.dtype, total.dtype) == (torch.int64, torch.float64)
    torch.testing.assert_close(total, law.sum(-1), rtol=1e-6, atol=0)
    assert torch.equal(state, plain_draw(law, uniform))
    assert torch.equal(wide, before)
    for wrong in (wide[:, ::2], wide[0], wide[None]):
        with pytest.raises(ValueError, match=r"log_score must be \(R, N\) with contiguous rows, got \("):
            draw(wrong, x, weight, STAY["Euler"], uniform)


@pytest.mark.parametrize("x", [0, BLOCK - 1, BLOCK, BLOCK + 8])
def test_the_mass_of_staying_stands_at_x_in_its_block(x, generator):
    """At the ends of blocks: all numbers lead there where it has all, and none where it has none."""
    log_score = torch.randn(3, BLOCK + 9, generator=generator)
    weight = torch.full((3,), 1e-9), torch.tensor([[1], [2], [3]]), torch.full((3, 1), 2e-9)
    uniform = torch.tensor([1e-5, 0.5, 1 - 1e-5], dtype=torch.float64)
    here, told = torch.full((3,), x), []

    def stay(leaving):
        told.append(leaving.cpu())
        return 10.0 + leaving

    state, total = draw(log_score, here, weight, stay, uniform)
    assert torch.equal(state, here)
    law = plain_law(log_score, here, weight, torch.zeros_like)
    assert told[0].dtype == torch.float64
    torch.testing.assert_close(told[0], law.sum(-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(total, 2 * law.sum(-1) + 10, rtol=1e-9, atol=0)
    state, _ = draw(log_score, here, weight, STAY["never"], uniform)
    assert torch.equal(state, plain_draw(law, uniform))
    assert not (state == x).any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what is beyond float32, as asked for
def test_what_is_said_of_states_of_no_weight_does_not_count(generator):
    """Not of x, nor of what cannot be jumped to, were it beyond all numbers."""
    log_score, x = torch.randn(2, 12, generator=generator), torch.tensor([4, 0])
    log_score[0, [4, 7]], log_score[1, [0, 7]] = torch.inf, 1e4
    weight = torch.tensor([0.1, 0.2]), torch.tensor([[7], [7]]), torch.zeros(2, 1)
    plain = log_score.clone()
    plain[:, 7], plain[0, 4], plain[1, 0] = 0.0, 0.0, 0.0
    for number in (0.0, 0.3, 0.6, 0.99):
        uniform = torch.full((2,), number, dtype=torch.float64)
        state, total = draw(log_score, x, weight, STAY["Euler"], uniform)
        law = plain_law(plain, x, weight, STAY["Euler"])
        assert torch.equal(state, plain_draw(law, uniform))
        torch.testing.assert_close(total, law.sum(-1), rtol=1e-6, atol=0)


def test_a_state_holds_its_lower_end_and_not_its_upper():
    """Two fifths in the second of four blocks, the others in the last; x, which has nothing, in the third."""
    log_score = torch.full((5, 4 * BLOCK), -torch.inf)
    log_score[:, BLOCK + 3], log_score[:, 3 * BLOCK + 1] = math.log(2.0), math.log(3.0)
    weight = torch.ones(5), torch.empty(5, 0, dtype=torch.int64), torch.empty(5, 0)
    uniform = torch.tensor([0.0, 0.3999, 0.4001, 0.7, 1 - 2.0**-53], dtype=torch.float64)
    state, total = draw(log_score, torch.full((5,), 2 * BLOCK), weight, STAY["never"], uniform)
    assert state.tolist() == [BLOCK + 3] * 2 + [3 * BLOCK + 1] * 3
    torch.testing.assert_close(total, torch.full((5,), 5.0, dtype=torch.float64), rtol=1e-6, atol=0)
