"""Autoregressive sampling against laws that are enumerated; each chi-square fails a correct sampler in 1 of 10,000."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from sedd_samplers import pad_prompts
from sedd_samplers.autoregressive import continue_left_to_right, left_to_right, sample_left_to_right
from sedd_samplers.controls import allowed_tokens, temperature, top_k, top_p
from sedd_samplers.views import live

ALARM = 1e-4
N, L = 3, 4


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Enumerated:
    """A causal model in closed form: p(x_1 ... x_L | start), three tokens, four starts, everything dependent."""

    def __init__(self, scale=1.5, dtype=torch.float64):
        law = (scale * torch.randn(4, N**L, generator=seeded(1), dtype=torch.float64)).softmax(1)
        self.law = (0.9 * law + 0.1 / N**L).reshape(4, *[N] * L)
        self.dtype, self.seen = dtype, []

    def conditional(self, prefix):
        """log p(next | prefix), (b, N), prefix (b, k) with its start."""
        k = prefix.shape[1]
        marginal = self.law.flatten(1 + k).sum(-1) if k < L else self.law
        row = marginal[tuple(prefix.T)]
        return (row / row.sum(-1, keepdim=True)).log().to(self.dtype)

    def __call__(self, x):
        self.seen.append(x.clone())
        return torch.stack([self.conditional(x[:, : k + 1]) for k in range(x.shape[1])], 1)


class EnumeratedRows(Enumerated):
    def __init__(self):
        super().__init__()
        self.asked = []

    def __call__(self, x, where, rows):  # type: ignore[override]
        self.asked.append((int(where.sum()), rows.tolist()))
        return super().__call__(x)[where]


@pytest.mark.parametrize("start", [0, 3])
def test_samples_have_the_law_of_the_model(ref, start):
    model = Enumerated()
    x = sample_left_to_right(model, shape=(200_000, L), start=start, num_states=N, generator=seeded())
    assert ref.chi_square(x, model.law[start]) > ALARM
    assert ref.chi_square(x, model.law[1]) < ALARM  # the test can tell


def test_starts_of_their_own(ref):
    model = Enumerated()
    start = torch.arange(40_000) % 4
    x = sample_left_to_right(model, shape=(40_000, L), start=start, num_states=N, generator=seeded())
    for token in range(4):
        assert ref.chi_square(x[start == token], model.law[token]) > ALARM


@pytest.mark.parametrize("prefix", [[2], [0, 1], [1, 2, 0]])
def test_a_prompt_is_a_condition(ref, prefix):
    model = Enumerated()
    x, given = pad_prompts([prefix] * 20_000, L)
    x = continue_left_to_right(model, x=x, given=given, start=2, num_states=N, generator=seeded())
    law = torch.zeros_like(model.law[2])
    law[tuple(prefix)] = model.law[2][tuple(prefix)]
    assert ref.chi_square(x, law) > ALARM


def test_each_token_is_controlled_as_it_comes(ref):
    """The law is the product of the controlled conditionals: at temperature 0.6, of the two likeliest tokens."""
    model = Enumerated(scale=0.7)
    law = torch.ones(1, dtype=torch.float64)
    for k in range(L):
        prefix = torch.cat([torch.zeros(N**k, 1).long(), ref.all_states(N, k)], 1) if k else torch.zeros(1, 1).long()
        p = model.conditional(prefix).exp() ** (1 / 0.6)
        p = p * (p >= p.topk(2).values[:, 1:])
        law = (law[:, None] * p / p.sum(-1, keepdim=True)).flatten()
    x = sample_left_to_right(
        model, shape=(50_000, L), start=0, num_states=N, controls=[temperature(0.6), top_k(2)], generator=seeded()
    )
    assert ref.chi_square(x, law.reshape([N] * L)) > ALARM


def test_top_1_is_the_likeliest_continuation():
    model = Enumerated()
    x = sample_left_to_right(model, shape=(5, L), start=1, num_states=N, controls=[top_k(1)])
    prefix = torch.tensor([[1]])
    for i in range(L):
        token = model.conditional(prefix).argmax(-1)
        assert (x[:, i] == token).all()
        prefix = torch.cat([prefix, token[:, None]], 1)


def test_constraints_belong_to_their_sequence_and_position():
    tokens = torch.ones(3, L, N, dtype=torch.bool)
    tokens[2, 1] = torch.tensor([False, False, True])
    tokens[0, 3] = torch.tensor([True, False, False])
    x, given = pad_prompts([[0], [0, 1, 2], [1]], L)
    for seed in range(20):
        out = continue_left_to_right(
            Enumerated(), x=x, given=given, start=0, num_states=N, controls=[allowed_tokens(tokens)], seeds=[seed] * 3
        )
        assert out[2, 1] == 2
        assert out[0, 3] == 0


def wide(x):
    """A causal model of nine tokens that looks at all before: a running sum, through a sine."""
    order = torch.arange(1, x.shape[1] + 1)
    return 2 * torch.sin((x * order).cumsum(1)[..., None] * 0.37 + torch.arange(9.0) * 1.3)


def test_a_row_depends_on_its_seed_alone():
    """Not on its batch, its place, the padding beside it, nor on whether its beginning was drawn or given."""

    def run(seeds, prompts, lengths):
        x, given = pad_prompts(prompts, lengths, pad_id=0)
        return continue_left_to_right(wide, x=x, given=given, start=7, num_states=9, seeds=seeds)

    together = run(range(30), [[]] * 30, 12)
    assert torch.equal(together[[7]], run([7], [[]], 12))
    assert torch.equal(together[[20, 2]], run([20, 2], [[]] * 2, 12))
    assert len(together.unique(dim=0)) == 30
    assert torch.equal(together[[5]], run([5], [together[5, :8].tolist()], 12))
    mixed = run([3, 4], [[1, 2], []], [6, 12])
    assert torch.equal(mixed[:1, :6], run([3], [[1, 2]], 6))
    assert torch.equal(mixed[1], together[4])
    assert (mixed[0, 6:] == 0).all()
    one, same, other = (
        sample_left_to_right(wide, shape=(4, 12), start=7, num_states=9, generator=seeded(s)) for s in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@drawn(data=st.data())
def test_given_positions_never_change(data):
    shape = (data.draw(st.integers(1, 3)), data.draw(st.integers(1, 7)))
    rng = seeded(data.draw(st.integers(0, 2**31)))
    x = torch.randint(9, shape, generator=rng)
    given = torch.rand(shape, generator=rng) < data.draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    controls = data.draw(st.sampled_from([[], [temperature(0.5)], [top_p(0.7)], [top_k(3), temperature(2.0)]]))
    finished = torch.rand(shape[0], generator=rng) < 0.3
    until = data.draw(st.sampled_from([None, lambda state: finished]))
    for state in left_to_right(wide, x=x, given=given, start=0, num_states=9, controls=controls, generator=rng,
                               until=until):  # fmt: skip
        assert torch.equal(state.x[given], x[given])
        done = torch.zeros(shape, dtype=torch.bool)
        done[:, : state.step] = True
        assert ((state.x >= 0) & (state.x < 9))[done & ~(finished & (until is not None))[:, None]].all()
        assert (state.x[~done & ~given] == -1).all()


def test_the_model_reads_what_is_written_and_only_where_there_is_something_to_write():
    model = Enumerated()
    x, given = pad_prompts([[0, 1], [2, 2, 0, 1], []], L)
    given[2, 1] = True
    x[2, 1] = 1
    out = continue_left_to_right(model, x=x, given=given, start=torch.tensor([3, 0, 1]), num_states=N, seeds=range(3))
    starts = torch.tensor([3, 0, 1])[:, None]
    read = torch.cat([starts, out], 1)
    expected = [read[[2], :1], read[[0, 2], :3], read[[0, 2], :4]]
    assert len(model.seen) == 3
    assert all(torch.equal(a, b) for a, b in zip(model.seen, expected, strict=True))


def test_where_and_rows_are_offered():
    """The head runs at the last position only, the model learns which sequences these are; the sample is the same."""
    x, given = pad_prompts([[0], [], [1, 1, 2]], L)
    options: dict[str, Any] = {"x": x, "given": given, "start": 0, "num_states": N, "seeds": range(3)}
    model = EnumeratedRows()
    assert torch.equal(continue_left_to_right(model, **options), continue_left_to_right(Enumerated(), **options))
    assert model.asked == [(1, [1]), (2, [0, 1]), (2, [0, 1]), (3, [0, 1, 2])]


def test_a_finished_sequence_is_written_no_further():
    """Finished at its first 0; the loop ends when all are."""
    calls = []

    def model(x):
        calls.append(len(x))
        return wide(x)

    def until(state):
        return (state.x == 0).any(1)

    options: dict[str, Any] = {"shape": (6, 60), "start": 7, "num_states": 9, "seeds": range(6)}
    x = sample_left_to_right(model, until=until, **options)
    free = sample_left_to_right(wide, **options)
    lengths = []
    for row, whole in zip(x.tolist(), free.tolist(), strict=True):
        end = row.index(0) + 1
        assert row == whole[:end] + [-1] * (60 - end)
        lengths.append(end)
    assert len(calls) == max(lengths) < 60
    assert sum(calls) == sum(lengths)
    with pytest.raises(ValueError, match=r"until must return bool of shape \(6,\)"):
        sample_left_to_right(model, until=lambda state: True, **options)  # type: ignore[arg-type, return-value]


def test_states_are_counted_and_shown(capsys):
    stream = io.StringIO()
    states = left_to_right(wide, x=torch.zeros(1, 4).long(), given=torch.zeros(1, 4).bool(), start=0, num_states=9,
                           seeds=[0])  # fmt: skip
    seen = list(live(states, str, mask_id=-1, stream=stream))
    assert [(s.step, s.steps, s.t) for s in seen] == [(i, 4, 1 - i / 4) for i in range(5)]
    assert stream.getvalue().splitlines()[1].count("░") == 3
    sample_left_to_right(wide, shape=(1, 4), start=0, num_states=9, progress=True)
    assert "4/4" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_precision_is_welcome_and_the_arithmetic_is_float32_under_autocast(dtype):
    def run():
        return sample_left_to_right(lambda x: wide(x).to(dtype), shape=(3, 8), start=0, num_states=9, seeds=range(3))

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(), plain)


def test_no_gradient_is_recorded_and_a_module_decides_the_device():
    net = torch.nn.Embedding(9, 9)
    x = sample_left_to_right(net, shape=(2, 5), start=0, num_states=9)
    assert x.shape == (2, 5)
    assert net.weight.grad is None
    assert torch.is_grad_enabled()


def test_rare_tokens_have_their_rate(monkeypatch):
    """A token of probability 1e-9 in float32 logits: it is drawn by the uniforms of a set of that measure, to 1 %.

    The draw rises with the uniform number, so that the set is an interval, whose end is found by bisection.
    """
    rest = torch.randn(1000, generator=seeded(), dtype=torch.float64).softmax(0)
    logits = torch.cat([torch.tensor([1e-9]).double(), rest]).log().float()

    def drawn_by(u):
        monkeypatch.setattr("sedd_samplers.autoregressive.uniforms", lambda *_: torch.tensor([u], dtype=torch.float64))
        return int(sample_left_to_right(lambda x: logits.expand(*x.shape, -1), shape=(1, 1), start=0, num_states=1001))

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if drawn_by(middle) == 0 else (low, middle)
    assert low == pytest.approx(1e-9, rel=0.01)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"shape": (0, 3)}, "two positive integers"),
        ({"start": -1}, r"start must be one token or int64 of shape \(2,\), none negative, got -1"),
        ({"start": 0.5}, "start must be one token .* got 0.5"),
        ({"start": torch.zeros(3).long()}, r"of shape \(2,\), none negative, got torch.int64 \(3,\)"),
        ({"start": torch.zeros(2)}, r"got torch.float32 \(2,\)"),
        ({"seeds": [1]}, "seeds must be 2 integers"),
        ({"seeds": [1, 2], "generator": seeded()}, "not both"),
        ({"model": 3}, r"the model of the next token must be callable as model\(x\), got a int"),
        ({"num_states": 8}, r"shape \(2, 1, 8\), got torch.float32 \(2, 1, 9\)"),
        ({"model": lambda x: [x]}, "got a list"),
        ({"model": lambda x: wide(x)[:, 0]}, r"shape \(2, 1, 9\), got torch.float32 \(2, 9\)"),
        ({"model": lambda x: wide(x) + (math.nan if x.shape[1] == 3 else 0)}, "NaN at sequence 0, position 2"),
        ({"model": lambda x: wide(x) + math.inf * (x[..., None] >= 0)}, "an infinite logit at sequence 0, position 0"),
        ({"model": lambda x: wide(x) - math.inf}, "no logit above -inf at sequence 0, position 0"),
    ],
)
def test_what_makes_no_sense_is_refused(change, told):
    arguments = {"model": wide, "shape": (2, 4), "start": 0, "num_states": 9, **change}
    with pytest.raises(ValueError, match=told):
        sample_left_to_right(arguments.pop("model"), **arguments)


@pytest.mark.parametrize(
    ("x", "given", "told"),
    [
        (torch.zeros(2, 3), torch.ones(2, 3).bool(), "x must be int64"),
        (torch.zeros(2, 3).long(), torch.ones(2, 4).bool(), "given must be bool of x's shape"),
        (torch.full((2, 3), 9), torch.ones(2, 3).bool(), r"the state 9 at a given position; states are 0\.\.8"),
        (torch.full((2, 3), -1), torch.ones(2, 3).bool(), "the state -1 at a given position"),
    ],
)
def test_prompts_that_make_no_sense_are_refused_before_the_model_is_called(x, given, told):
    with pytest.raises(ValueError, match=told):
        continue_left_to_right(lambda x: pytest.fail("called"), x=x, given=given, start=0, num_states=9)


def test_constraints_that_leave_nothing_are_named():
    tokens = torch.zeros(4, 9, dtype=torch.bool)
    tokens[:, 0] = True
    model = lambda x: wide(x).index_fill(-1, torch.tensor([0]), -torch.inf)  # noqa: E731
    with pytest.raises(ValueError, match="the controls leave no token at sequence 0, position 0"):
        sample_left_to_right(model, shape=(2, 4), start=0, num_states=9, controls=[allowed_tokens(tokens)])
