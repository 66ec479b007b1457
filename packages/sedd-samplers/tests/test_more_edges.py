"""Further parts at their ends: adapters, the loop, exact methods, draws, and what happens where reading waits."""

from __future__ import annotations

import importlib
import math
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sedd_samplers import (
    Euler,
    Particles,
    PathPlanning,
    Reverse,
    Uniformization,
    adaptive_grid,
    blockwise,
    clamped,
    generate,
    infill,
    trajectory,
)
from sedd_samplers.adapters import from_logits, from_masked_lm, from_posterior
from sedd_samplers.adapters.canvas import canvas_logits
from sedd_samplers.adapters.processes import Masking, Proportional, Replacing
from sedd_samplers.autoregressive import left_to_right
from sedd_samplers.controls import apply_controls
from sedd_samplers.fast import Answer, draw_by_blocks, log, spread, times_row
from sedd_samplers.grids import _try
from sedd_samplers.infilling import _mixed
from sedd_samplers.model_calls import Wrapper
from sedd_samplers.positions import Positions
from sedd_samplers.precision import check_recoverable
from sedd_samplers.randomness import draw_categorical, draw_shared, philox, row_seeds, uniforms
from sedd_samplers.sampling import grid_of
from sedd_samplers.waiting import require
from torch import Tensor

NOISE = Proportional()


def flat(x: Tensor, sigma: Tensor) -> Tensor:
    return torch.zeros(*x.shape, 4)


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("entry", "told"), [(-0.9e-6, False), (-1.1e-6, True)])
def test_an_entry_below_nothing_is_told_beyond_a_millionth(entry: float, told: bool) -> None:
    """In the first answer, wherever it stands; later ones are not looked at."""
    answers = [torch.full((1, 2, 4), 0.25), torch.full((1, 2, 4), 0.25)]
    answers[0][0, 1, 2] = entry
    answers[1][0, 1, 2] = -0.5

    for first, second in ((0, 1), (1, 0)):
        turn = iter((answers[first], answers[second]))
        score = from_posterior(lambda x, sigma, turn=turn: next(turn), Replacing(4))
        x = torch.tensor([[0, 1]])
        if told or first == 1:
            with pytest.raises(ValueError, match="a posterior holds probabilities, and this one an entry of -"):
                score(x, torch.ones(1))
        else:
            score(x, torch.ones(1))
            score(x, torch.ones(1))


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([[0.5, 0.5009, 0.0]], True),
        ([[0.5, 0.4991, 0.0]], True),
        ([[0.5, 0.5011, 0.0]], False),
        ([[0.5, 0.4989, 0.0]], False),
        ([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]], True),
        ([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], False),
        ([[1.25, -0.25, 0.0]], False),
        ([[0.5, 0.5, 0.0], [0.5, 0.6, 0.0]], False),
        ([[0.5, 0.5, 0.0]] * 8 + [[5.0, 7.0, -1.0]], True),
        ([[0.5, 0.5, 0.0]] * 7 + [[5.0, 7.0, -1.0]], False),
    ],
)
def test_rows_that_sum_to_one_are_no_logits(rows: list[list[float]], told: bool) -> None:
    """To a thousandth, none negative, in the first eight rows of the first answer, and not all of them certain."""
    law, calls = torch.tensor([rows]), list[int]()

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(1)
        return law if len(calls) == 1 else torch.full_like(law, 1 / 3)

    score, x = from_logits(network, Replacing(3)), torch.zeros(1, len(rows), dtype=torch.int64)
    if told:
        with pytest.raises(ValueError, match="its rows are >= 0 and sum to 1: probabilities go through"):
            score(x, torch.ones(1))
    else:
        score(x, torch.ones(1))
        score(x, torch.ones(1))


@pytest.mark.parametrize(
    ("graph", "subs", "taken", "refused"),
    [
        (Masking(4, 1), True, [0, 2], [0, 2, 3]),
        (Masking(4, 1), False, [0, 2], [0, 2, 3]),
        (Masking(4, 1), True, [0, 1, 2], [0, 1, 2, 3]),
        (Replacing(3), True, [0, 2], [0, 1, 2]),
    ],
)
def test_one_token_at_least_is_left_to_draw(graph: Any, subs: bool, taken: list[int], refused: list[int]) -> None:
    from_logits(flat, graph, subs=subs, banned=taken)
    with pytest.raises(ValueError, match="banned holds every token: none is left to draw"):
        from_logits(flat, graph, subs=subs, banned=refused)
    for wrong in (-1, graph.num_states):
        with pytest.raises(
            ValueError, match=rf"banned holds the state {wrong}; states are 0\.\.{graph.num_states - 1}"
        ):
            from_logits(flat, graph, banned=[0, wrong])


def test_a_model_of_any_inputs_is_told_of_padding_and_one_of_none_is_not() -> None:
    """By name, if it takes it or takes whatever comes; 1 where there is none; `inputs` have the last word."""
    graph, told = Masking(4, 3), list[dict[str, Any]]()

    def anything(input_ids: Tensor, **kwargs: Any) -> Tensor:
        told.append(kwargs)
        return torch.zeros(*input_ids.shape, 4)

    def nothing(input_ids: Tensor) -> Tensor:
        told.append({})
        return torch.zeros(*input_ids.shape, 4)

    x, sigma = torch.tensor([[3, 1, 0]]), torch.ones(1)
    from_masked_lm(anything, graph)(x, sigma)
    from_masked_lm(anything, graph, pad_id=0)(x, sigma)
    from_masked_lm(anything, graph, pad_id=0, inputs=lambda x, rows: {"attention_mask": 7 + rows, "more": x})(x, sigma)
    from_masked_lm(nothing, graph, pad_id=0)(x, sigma)
    assert told[0]["attention_mask"].tolist() == [[1, 1, 1]]
    assert told[1]["attention_mask"].tolist() == [[1, 1, 0]]
    assert told[1]["attention_mask"].dtype == torch.int64
    assert told[2]["attention_mask"].tolist() == [7]
    assert told[2]["more"] is x
    assert told[3] == {}


class Headed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head, self.seen = torch.nn.Embedding(6, 3), torch.nn.Linear(3, 6), list[int]()
        self.head.register_forward_pre_hook(lambda module, inputs: self.seen.append(inputs[0].numel() // 3))

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.embed(input_ids))
        return out


def test_a_head_runs_at_what_can_move_and_with_static_shapes_everywhere() -> None:
    model = Headed().eval()
    score = from_masked_lm(model, Masking(6, 5))
    x = torch.tensor([[5, 1, 5, 5], [5, 0, 0, 1]])
    how: dict[str, Any] = {"x": x, "given": x != 5, "steps": 1, "denoise": False, "seeds": [0, 1]}
    moved = infill(score, Masking(6, 5), NOISE, **how)
    assert model.seen == [4]
    model.seen.clear()
    assert torch.equal(infill(score, Masking(6, 5), NOISE, static_shapes=True, **how), moved)
    assert model.seen == [8]


@pytest.mark.parametrize(("make", "answer"), [(from_logits, 0.25), (from_posterior, -0.25)])
def test_an_answer_about_nothing_is_not_the_first_one(make: Any, answer: float) -> None:
    """That is looked at where it has rows."""
    score, x = make(lambda x, sigma: torch.full((*x.shape, 4), answer), Replacing(4)), torch.zeros(2, 3).long()
    assert score(x, torch.ones(2), where=x > 0).shape == (0, 4)
    with pytest.raises(ValueError, match="probabilities"):
        score(x, torch.ones(2))


def test_a_canvas_asked_about_one_sequence_knows_nothing_of_the_other() -> None:
    """Of two the second one first: then the first begins anew, beside an answer that it never gave."""
    told = list[dict[str, Any]]()

    def model(past_key_values: Any, decoder_input_ids: Tensor, **further: Any) -> Any:
        told.append(further)
        return SimpleNamespace(logits=torch.full((*decoder_input_ids.shape, 3), float(len(told)), dtype=torch.float64))

    keys: Any = SimpleNamespace(layers=[], batch_select_indices=lambda rows: None)
    model.get_encoder = lambda: lambda **_: SimpleNamespace(past_key_values=keys)  # type: ignore[attr-defined]
    net, x = canvas_logits(model, torch.zeros(2, 5).long(), torch.ones(2, 5)), torch.zeros(2, 2).long()
    net(x[1:], torch.ones(1), rows=torch.tensor([1]))
    net(x, torch.tensor([0.5, 0.5]))
    net(x, torch.tensor([0.5, 0.5]))
    net(x, torch.tensor([0.4, 0.4]))
    assert "self_conditioning_logits" not in told[0]
    assert told[1]["self_conditioning_logits"][:, 0, 0].tolist() == [0.0, 1.0]
    assert told[1]["self_conditioning_logits"].dtype == torch.float64
    assert [each["self_conditioning_mask"].tolist() for each in told[1:]] == [[False, True], [False, True], [True] * 2]
    assert told[3]["decoder_attention_mask"].dtype == torch.bool
    assert told[3]["decoder_attention_mask"].shape == (2, 7)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_processes_begin_anywhere(shape: tuple[int, ...]) -> None:
    """At a noise at which something is left: tokens alike, the mask with what has turned into it."""
    sigma = torch.full(shape, 0.7, dtype=torch.float64)
    row = Masking(5, 2).prior(sigma)
    assert row.base.shape == shape
    assert row.index.shape == row.value.shape == (*shape, 1)
    assert (row.index == 2).all()
    torch.testing.assert_close(row.base, torch.full(shape, math.exp(-0.7) / 4, dtype=torch.float64))
    torch.testing.assert_close(row.value, torch.full((*shape, 1), 1 - math.exp(-0.7), dtype=torch.float64))
    row = Replacing(5).prior(sigma)
    torch.testing.assert_close(row.base, torch.full(shape, 0.2, dtype=torch.float64))
    assert (row.index.shape, row.value.shape) == ((*shape, 0), (*shape, 0))


@pytest.mark.parametrize("graph", [Masking(4, 0), Masking(4, 2), Replacing(4)])
def test_noise_may_be_of_each_position(graph: Any) -> None:
    """(B, L) as well as (B,), in the precision of the noise; rates are float32."""
    x = torch.tensor([[0, 1, 2], [3, 2, 0]])
    sigma = torch.tensor([[0.1, 0.5, 0.9], [0.2, 0.4, 2.0]], dtype=torch.float64)
    row = graph.transition_into(x, sigma)
    for b, i in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        one = graph.transition_into(x[b, i], sigma[b, i])
        for part in ("base", "index", "value"):
            assert torch.equal(getattr(row, part)[b, i], getattr(one, part))
    assert row.base.dtype == row.value.dtype == torch.float64
    assert graph.transition_into(x, sigma.float()).value.dtype == torch.float32
    assert graph.rates_into(x).base.dtype == graph.rates_out_of(x).value.dtype == torch.float32
    v = torch.rand(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(graph.propagate(v, sigma)[1, 2], graph.propagate(v[1, 2], sigma[1, 2]))


# --- the loop --------------------------------------------------------------------------------------------------------


def test_times_or_steps_are_given_and_not_both() -> None:
    times = torch.tensor([1.0, 0.5])
    assert grid_of(None, None, times).tolist() == [1.0, 0.5]
    assert grid_of(None, None, times).dtype == torch.float64
    for steps, t_min in ((2, None), (None, 0.1), (2, 0.1)):
        with pytest.raises(ValueError, match="give either times or steps and t_min, not both"):
            grid_of(steps, t_min, times)
    assert grid_of(2, 0.5, None).tolist() == [1.0, 0.75, 0.5]
    assert grid_of(2, None, None)[-1] == 1e-5
    assert len(grid_of(None, 0.5, None)) == 129


@pytest.mark.parametrize("denoise", [True, False])
def test_particles_are_counted_and_clocked_as_other_runs(denoise: bool) -> None:
    x, given = torch.tensor([[3, 0, 0]]), torch.tensor([[True, False, False]])
    run = trajectory(flat, Replacing(4), NOISE, x=x, given=given, steps=2, t_min=0.5, conditioning=Particles(3),
                     denoise=denoise, seeds=[1])  # fmt: skip
    seen = [(state.step, state.steps, state.t) for state in run]
    last = 2 + denoise
    assert seen == [(0, last, 1.0), (1, last, 0.75), (2, last, 0.5), (3, last, 0.0)][: last + 1]


def test_a_run_that_begins_later_says_from_which_states() -> None:
    x = torch.zeros(1, 2, dtype=torch.int64)
    how: dict[str, Any] = {"x": x, "given": x > 0, "times": torch.tensor([0.75, 0.5])}
    with pytest.raises(ValueError, match=r"times begin at 0\.75, below 1: say from which states, start="):
        infill(flat, Masking(4, 3), NOISE, **how)
    assert infill(flat, Masking(4, 3), NOISE, start=x, **how).tolist() == [[0, 0]]


@pytest.mark.parametrize("loop", ["trajectory", "blocks", "left to right", "a pilot"])
def test_lists_are_no_tensors_to_any_loop(loop: str) -> None:
    """A text or a list in the place of x, or of given: told before anything else is made of it."""
    x = torch.zeros(1, 2, dtype=torch.int64)
    runs: dict[str, Any] = {
        "trajectory": lambda **how: next(trajectory(flat, Masking(4, 3), NOISE, **how)),
        "blocks": lambda **how: next(blockwise(flat, Masking(4, 3), NOISE, block_size=2, **how)),
        "left to right": lambda **how: next(left_to_right(lambda x: flat(x, x), start=0, num_states=4, **how)),
        "a pilot": lambda **how: adaptive_grid(flat, Masking(4, 3), NOISE, **how),
    }
    for wrong, told in (
        ({"x": "to be", "given": x > 0}, "x must be"),
        ({"x": x, "given": [[False] * 2]}, "given must"),
    ):
        with pytest.raises(ValueError, match=f"{told}.* a tensor \\(batch, length\\), got .*: pad_prompts makes"):
            runs[loop](**wrong)


@pytest.mark.parametrize("other", [[False, False], [True, True]])
def test_one_token_held_among_noised_ones_is_enough_to_be_asked_about(other: list[bool]) -> None:
    """In one sequence of two, of which the other is free or given throughout."""
    x, given = torch.zeros(2, 2, dtype=torch.int64), torch.tensor([[True, False], other])
    with pytest.raises(ValueError, match="a given token that is held still would be an approximation"):
        infill(flat, Replacing(4), NOISE, x=x, given=given, steps=1)
    infill(flat, Replacing(4), NOISE, x=x, given=torch.tensor([[True, True], other]), steps=1)


def test_particles_weigh_their_start_and_are_not_warned_of_it() -> None:
    """Nor is who says where it starts; a run from the prior is."""
    x, given = torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[True, False]])
    little: Any = lambda t: (t, 1 + 0 * t)  # noqa: E731
    how: dict[str, Any] = {"x": x, "steps": 1, "t_min": 0.5}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        infill(flat, Replacing(4), little, given=given, conditioning=Particles(2), **how)
        infill(flat, Replacing(4), little, given=given, conditioning=clamped, start=x, **how)
    with pytest.warns(UserWarning, match="is left of a token"):
        infill(flat, Replacing(4), little, given=given, conditioning=clamped, **how)


def test_a_schedule_is_asked_about_all_times_of_a_run_at_once() -> None:
    """In the precision of the grid; of other times a step asks once for each, of the last two it knows."""
    asked = list[Tensor]()

    def noise(t: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(t)
        return NOISE(t)

    x = torch.zeros(2, 3, dtype=torch.int64)
    list(trajectory(flat, Masking(4, 3), noise, x=x, given=x > 0, steps=5, t_min=0.1))
    assert [len(t) for t in asked if len(t) > 1] == [6]
    assert {t.dtype for t in asked} == {torch.float64}
    once = len(asked)
    asked.clear()
    list(trajectory(flat, Masking(4, 3), noise, x=x, given=x > 0, steps=9, t_min=0.1))
    assert len(asked) == once
    asked.clear()
    reverse = Reverse(flat, Masking(4, 3), noise, frozen=x > 0, seeds=torch.arange(2))
    one, two, three = (torch.full((2,), t, dtype=torch.float64) for t in (0.9, 0.6, 0.3))
    for t in (one, two, one, two, three, two, three, one):
        torch.testing.assert_close(reverse.noise(t), NOISE(t))
    assert [float(t[0]) for t in asked] == [0.9, 0.6, 0.3, 0.9]


@pytest.mark.parametrize("late", [False, True])
def test_what_is_wrong_where_nothing_is_to_be_drawn_is_not_wrong(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among positions that are known anyhow, with a number missing at another: the model is asked once."""
    waiting = importlib.import_module("sedd_samplers.waiting")
    for module in ("reverse", "randomness"):
        monkeypatch.setattr(f"sedd_samplers.{module}.reading_waits", lambda device: late and not waiting._at_once.get())
    calls = list[int]()

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(1)
        return torch.tensor([0.0, torch.nan, 0.0])[:, None].expand(len(x), 3, 4)

    x, some = torch.full((2, 3), 3), torch.tensor([[True, False, True], [False, False, True]])
    reverse = Reverse(score, Masking(4, 3), NOISE, frozen=x < 0, seeds=torch.arange(2))
    law: Any = lambda log_score, x, b, i: log_score.exp() * torch.tensor([1.0, 1.0, 1.0, 0.0])  # noqa: E731
    out = reverse.redraw(x, torch.ones(2), some, law, among=Positions.everywhere(x.shape, x.device))
    reverse.finish()
    assert torch.equal(out != 3, some)
    assert len(calls) == 1

    def everywhere() -> None:
        reverse.redraw(x, torch.ones(2), x > 0, law)
        reverse.finish()

    with pytest.raises(ValueError, match="returned NaN at sequence 0, position 1, sigma = 1"):
        everywhere()


def test_no_loop_records_a_gradient_nor_keeps_others_from_it() -> None:
    """While the model is called; between two states, and afterwards, it is as it was."""
    graph, x, recording = Masking(4, 3), torch.zeros(2, 3, dtype=torch.int64), list[bool]()

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        recording.append(torch.is_grad_enabled())
        return torch.zeros(*x.shape, 4)

    def causal(x: Tensor) -> Tensor:
        return score(x, x)

    how: dict[str, Any] = {"x": x, "given": x > 0}
    runs: list[Any] = [
        trajectory(score, graph, NOISE, steps=2, **how),
        trajectory(score, Replacing(4), NOISE, steps=2, conditioning=Particles(2), **how),
        blockwise(score, graph, NOISE, block_size=2, **how),
        left_to_right(causal, start=0, num_states=4, **how),
    ]
    for run in runs:
        recording.clear()
        assert all(torch.is_grad_enabled() for _ in run)
        assert recording
        assert not any(recording)
    recording.clear()
    adaptive_grid(score, graph, NOISE, target=1.0, t_min=0.5, **how)
    assert recording
    assert not any(recording)


# --- blocks ----------------------------------------------------------------------------------------------------------


def test_blocks_take_what_other_runs_take() -> None:
    """Seeds of a generator, in batches or not, and a schedule that ends in infinite noise; a network is looked at."""
    graph, x = Masking(4, 3), torch.zeros(3, 5, dtype=torch.int64)
    score = from_logits(flat, graph)
    how: dict[str, Any] = {"x": x, "given": x > 0, "block_size": 2}

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(4)

    seeds = row_seeds(None, seeded(), 3)
    natural: Any = lambda t: (-torch.log1p(-t), 1 / (1 - t))  # noqa: E731
    for noise in (NOISE, natural):
        expected = generate(score, graph, noise, seeds=seeds, **how).x
        assert not (expected == 3).any()
        assert torch.equal(generate(score, graph, noise, generator=seeded(), **how).x, expected)
        assert torch.equal(generate(score, graph, noise, generator=seeded(), batch_size=2, **how).x, expected)
        assert torch.equal(list(blockwise(score, graph, noise, generator=seeded(), **how))[-1].x, expected)
    with pytest.warns(UserWarning, match="the Dropout is in training mode"):
        generate(Wrapper(lambda x, sigma, at, rows: torch.zeros(len(at), 4), torch.nn.Dropout()), graph, NOISE, **how)
    held = torch.tensor([[True, False, False, False, False]]).expand_as(x)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"x": x.float()}, "x must be int64"),
        ({"x": x + 3, "given": held}, r"holds the mask \(3\) at a given position"),
        ({"seeds": [1]}, "seeds must be 3 integers"),
        ({"steps": 2, "times": torch.tensor([1.0, 0.5])}, "give either times or steps"),
        ({"batch_size": 0}, "batch_size must be a positive integer"),
    ]
    for change, told in wrong:
        with pytest.raises(ValueError, match=told):
            generate(score, graph, NOISE, **how | change)
    for slip, told in (((Masking, NOISE), "got the class Masking"), ((graph, 3), "the noise must be callable")):
        with pytest.raises(ValueError, match=told):
            generate(score, *slip, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("growing", [False, True])
def test_log_probabilities_are_told_block_by_block(growing: bool) -> None:
    """Of tokens that do not depend on each other, log p at its place from the step on in which it was written."""
    graph, rng = Masking(6, 2), torch.Generator().manual_seed(0)
    logits = torch.randn(7, 6, generator=rng)
    law = logits.index_fill(1, torch.tensor([2]), -torch.inf).log_softmax(-1).double()
    x, given = torch.zeros(9, 7, dtype=torch.int64), torch.rand(9, 7, generator=rng) < 0.3
    score = from_logits(lambda x, sigma: logits[: x.shape[1]].expand(len(x), -1, -1), graph)
    run = blockwise(score, graph, NOISE, x=x, given=given, block_size=3, steps=2, t_min=0.1, growing=growing,
                    log_probs=True, seeds=range(9))  # fmt: skip
    for state in run:
        right = law[torch.arange(7), state.x].masked_fill(given | (state.x == 2), 0.0)
        torch.testing.assert_close(state.log_prob, right, rtol=1e-4, atol=1e-5)
    assert not (state.x == 2).any()


def test_blocks_by_a_method_that_reads_nothing() -> None:
    """A block of given positions is left at its first step, one of free positions goes through all of its own."""
    x, given = torch.zeros(2, 6, dtype=torch.int64), torch.tensor([[1, 1, 0, 1, 1, 1]] * 2).bool()
    still: Any = lambda reverse, x, t, s: x  # noqa: E731
    how: dict[str, Any] = {"x": x, "given": given, "block_size": 2, "steps": 3, "method": still, "denoise": False}
    run = list(blockwise(flat, Masking(4, 3), NOISE, **how))
    assert [state.step for state in run] == [0, 4, 5, 6]
    assert all(state.x[0].tolist() == [0, 0, 3, 0, 0, 0] for state in run)


# --- methods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("high", "low"), [(math.inf, 1.0), (1.0, 0.0), (math.nan, 1.0)])
def test_uniformization_is_between_two_levels_of_noise(high: float, low: float) -> None:
    reverse = Reverse(
        flat, Replacing(4), lambda t: (t, 0 * t), frozen=torch.zeros(1, 2).bool(), seeds=torch.zeros(1).long()
    )
    x, t, s = torch.zeros(1, 2, dtype=torch.int64), torch.tensor([high]).double(), torch.tensor([low]).double()
    with pytest.raises(ValueError, match=rf"levels above 0, got sigma = {high:.6g} to {low:.6g}; end the grid at"):
        Uniformization()(reverse, x, t, s)
    assert torch.equal(Uniformization()(reverse, x, torch.ones(1).double(), torch.ones(1).double()), x)


def test_a_sequence_that_is_planned_is_asked_about_and_no_other() -> None:
    """One without masks of which none is due is left alone; at eta = 0 no planner is asked."""
    asked = list[list[int]]()

    def planner(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        asked.append(rows.tolist())
        return torch.zeros(*x.shape, 4)

    graph = Masking(4, 3)
    x = torch.tensor([[3, 3, 0], [0, 1, 2]])
    new = lambda: Reverse(flat, graph, NOISE, frozen=x < 0, seeds=torch.arange(2))  # noqa: E731
    t, s = torch.ones(2).double(), torch.full((2,), 1e-9).double()
    PathPlanning(planner)(new(), x, t, s)
    assert asked == [[0]]
    PathPlanning(planner)(new(), x, t, t / 2)
    assert asked == [[0], [0, 1]]
    PathPlanning(planner, eta=0.0)(new(), x, t, t / 2)
    assert len(asked) == 2


def test_a_pilot_s_grid_does_not_depend_on_what_is_worked_at_a_time(ref: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = ref.StructuredAbsorbing(3)
    score = ref.SpectralScore(ref.random_data(3, 3, 4, 3), graph.Q)
    x = torch.zeros(9, 3, dtype=torch.int64)
    how: dict[str, Any] = {"x": x, "given": torch.rand(9, 3, generator=torch.Generator().manual_seed(0)) < 0.3}

    def grid() -> Tensor:
        return adaptive_grid(score, graph, ref.LogLinear(), target=0.1, t_min=0.05, **how)

    whole = grid()
    monkeypatch.setattr("sedd_samplers.fast.answer.rows_at_a_time", lambda num_states, device: 4)
    torch.testing.assert_close(grid(), whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("graph", [Masking(4, 3), Replacing(4)])
def test_a_pilot_s_positions_may_move_in_every_step(graph: Any) -> None:
    """What has moved in one does not count in its error, and is as free as before in the next."""
    x, given = torch.full((20, 5), 3), torch.tensor([True, False, False, False, False]).expand(20, 5)
    pilot = Reverse(from_logits(flat, graph), graph, NOISE, frozen=given, seeds=torch.arange(20))
    y, _ = _try(pilot, x, 0.9, 0.2)
    assert ((y != x) & ~given).any()
    movable = ~given if graph.mask_id is None else ~given & (y == 3)
    assert torch.equal(pilot.movable(y), movable)
    assert torch.equal(y[given], x[given])


def test_kernels_serve_rows_on_a_gpu_in_float32_or_less() -> None:
    serve = importlib.import_module("sedd_samplers.reverse").kernels_serve
    has = importlib.util.find_spec("triton") is not None
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        rows: Any = SimpleNamespace(device=torch.device("cuda"), dtype=dtype)
        assert serve(rows) == (has and dtype != torch.float64)
        assert not serve(torch.zeros(1, dtype=dtype))


# --- draws and rows --------------------------------------------------------------------------------------------------


def test_without_float64_a_number_has_24_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds, zero = torch.tensor([5, -3, 2**40]), torch.zeros(3, dtype=torch.int64)
    position, draw = torch.tensor([1, 2, 3]), torch.tensor([0, 7, 2**33])
    word = 0xFFFFFFFF
    high, low, _, _ = philox((position, draw & word, draw >> 32, zero), (seeds & word, (seeds >> 32) & word))
    assert torch.equal(uniforms(seeds, draw, position), ((high << 21) | (low >> 11)).double() / 2**53)
    monkeypatch.setattr("sedd_samplers.precision.WITHOUT_FLOAT64", {"cpu"})
    found = uniforms(seeds, draw, position)
    assert found.dtype == torch.float32
    assert torch.equal(found.double(), (high >> 8).double() / 2**24)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float64, 53), (torch.float32, 24)])
def test_the_last_number_below_1_draws_the_last_state(dtype: torch.dtype, bits: int) -> None:
    """Of laws of any sum, to which rounding adds nothing; 0 draws the first state that has a share."""
    ends = torch.tensor([0.0, 1 - 2.0**-bits], dtype=dtype)
    sums = torch.rand(300, 1, generator=torch.Generator().manual_seed(0), dtype=dtype) * 4
    for law in torch.cat([sums, torch.tensor([[0.5], [1.0], [2.0], [1e-30], [1e30]], dtype=dtype)]):
        assert draw_shared(torch.cat([0 * law, law, law, 0 * law]), ends).tolist() == [1, 2]
        assert draw_shared(law / torch.ones(7, dtype=dtype), ends).tolist() == [0, 6]


def test_seeds_of_particles_are_numbers_of_64_bits() -> None:
    """Of (seed, number), by a counter that no uniform number has."""
    seed, number = torch.tensor([7, 7, -1]), torch.tensor([0, 1, 64])
    zero, word = torch.zeros_like(seed), 0xFFFFFFFF
    high, low, _, _ = philox((number, zero, zero, zero + 1), (seed & word, (seed >> 32) & word))
    assert torch.equal(_mixed(seed, number), (high << 32) | low)
    assert len(_mixed(seed, number).unique()) == 3


def test_a_draw_in_float32_tells_its_sum_in_float32() -> None:
    probs = torch.tensor([[0.5, 0.25, 0.25], [1.0, 2.0, 1.0]], dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        state, total = draw_by_blocks(probs, torch.tensor([0.6, 0.6], dtype=dtype))
        assert total.dtype == dtype
        assert state.tolist() == [1, 1]
        assert total.tolist() == [1.0, 4.0]


def test_where_reading_waits_what_cannot_be_drawn_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    probs = torch.tensor([[0.0, 1.0], [0.0, 0.0], [torch.nan, 1.0], [1.0, torch.inf]])
    uniform, old = torch.full((4,), 0.5).double(), torch.tensor([0, 1, 1, 0])
    with pytest.raises(ValueError, match=r"row 1 of the probabilities sums to 0\.0"):
        draw_categorical(probs, uniform, old=old)
    some = torch.tensor([True, False, False, False])
    assert draw_categorical(probs, uniform, old=old, wanted=some).tolist() == [1, 1, 1, 0]
    with pytest.raises(ValueError, match=r"row 2 of the probabilities sums to nan"):
        draw_categorical(probs, uniform, old=old, wanted=some ^ torch.tensor([False, False, True, True]))
    monkeypatch.setattr("sedd_samplers.randomness.reading_waits", lambda device: True)
    assert draw_categorical(probs, uniform, old=old).tolist() == [1, 1, 1, 0]
    with pytest.raises(ValueError, match=r"row 1 of the probabilities sums to 0\.0"):
        draw_categorical(probs, uniform)


def test_rows_in_double_precision_are_half_as_many_at_a_time() -> None:
    """2^20 float32 numbers of the model's own width, however wide they become."""
    answer = Answer(torch.zeros(9, 2**18))
    assert [part.stop - part.start for part in answer.parts()] == [4, 4, 4]
    assert [part.start for part in answer.pieces(5)] == [0, 4]
    for wide in (answer.then(lambda r, part: r, torch.float64), Answer(torch.zeros(9, 2**18, dtype=torch.float64))):
        assert [part.start for part in wide.parts()] == [0, 2, 4, 6, 8]
    assert [part.start for part in answer.then(lambda r, part: r[:, :1], width=1).parts()] == [0, 4, 8]
    assert len(Answer(torch.zeros(0, 3)).parts()) == 0


def test_where_reading_waits_the_device_is_asked_to_see_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the sentence that names no values; on a CPU the device is at once."""
    monkeypatch.setattr("sedd_samplers.waiting.reading_waits", lambda device: True)
    require(torch.tensor([True]), "this must hold", lambda: pytest.fail("read"))
    with pytest.raises(RuntimeError, match="this must hold"):
        require(torch.tensor([True, False]), "this must hold", lambda: pytest.fail("read"))


@pytest.mark.parametrize(("rate", "dtype"), [(1.0, torch.float32), (2.5, torch.float32), (1.0, torch.float64)])
def test_what_is_left_of_a_posterior_is_told_of_all_levels(rate: float, dtype: torch.dtype) -> None:
    """e^(rate sigma) eps up to a thousandth, of the largest."""
    limit = math.log(1e-3 / torch.finfo(dtype).eps) / rate
    check_recoverable(rate, torch.tensor([0.1, limit - 1e-3]), dtype)
    check_recoverable(rate, torch.tensor([limit], dtype=torch.float64), dtype)
    check_recoverable(0.0, torch.tensor([1e9]), dtype)
    check_recoverable(rate, torch.empty(0), dtype)
    with pytest.raises(ValueError, match=rf"from a {dtype} score at sigma = .* lost in rounding beyond {limit:.3g}"):
        check_recoverable(rate, torch.tensor([limit + 1e-3, 0.1]), dtype)


def test_rows_are_worked_in_place_and_in_the_precision_of_the_dense() -> None:
    row: Any = SimpleNamespace(
        base=torch.tensor([2.0, 3.0]).double(), index=torch.tensor([[1, 0], [2, 1]]), value=torch.ones(2, 2).double()
    )
    dense = torch.arange(1.0, 7.0).view(2, 3)
    assert spread(row, dense).dtype == torch.float32
    assert spread(row, dense).tolist() == [[1.0, 1.0, 2.0], [3.0, 1.0, 1.0]]
    out = times_row(dense, row)
    assert out is dense
    assert out.tolist() == [[1.0, 2.0, 6.0], [12.0, 5.0, 6.0]]
    values = torch.tensor([1.0, 0.0])
    assert log(values) is values
    assert values.tolist() == [0.0, -math.inf]


def test_a_kernel_is_left_out_where_probabilities_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read off the rows, which a kernel does not make."""
    reverse = importlib.import_module("sedd_samplers.reverse")
    asked = list[Tensor]()

    def serve(rows: Tensor) -> bool:
        asked.append(rows)
        return False

    monkeypatch.setattr(reverse, "kernels_serve", serve)
    x = torch.zeros(2, 3, dtype=torch.int64)
    for log_probs in (False, True):
        asked.clear()
        list(trajectory(flat, Masking(4, 3), NOISE, x=x, given=x > 0, steps=2, method=Euler(), log_probs=log_probs))
        assert bool(asked) != log_probs


def test_rows_that_do_not_matter_may_be_left_nothing() -> None:
    """Of them comes no number; of one that matters the sequence and the position are told."""
    p, at = torch.full((3, 2), 0.5), torch.tensor([4, 5, 6])
    nothing: Any = lambda p, sequence, position: p * torch.tensor([[1.0], [0.0], [1.0]])  # noqa: E731
    law = apply_controls([nothing], p, at, at + 10, wanted=torch.tensor([True, False, True]))
    assert law[[0, 2]].tolist() == [[0.5, 0.5]] * 2
    assert law[1].isnan().all()
    for wanted in (None, torch.tensor([False, True, False])):
        with pytest.raises(ValueError, match="leave no token at sequence 5, position 15"):
            apply_controls([nothing], p, at, at + 10, wanted=wanted)


def test_positions_asked_about_without_need_are_known() -> None:
    """With static shapes, of all that are asked about those that can move; else all."""
    where = torch.tensor([[True, False, False], [False, True, True]])
    reverse = Reverse(
        flat, Masking(4, 3), NOISE, frozen=torch.zeros(2, 3).bool(), seeds=torch.arange(2), static_shapes=True
    )
    at = reverse.positions(where)
    assert (len(at), at.sequences, at.whole) == (6, 2, True)
    for part in (slice(1, 5), torch.tensor([5, 0, 1])):
        wanted = at.wanted_in(part)
        assert wanted is not None
        assert torch.equal(wanted, where.flatten()[part])
    assert Positions.of(where).wanted_in(slice(0, 2)) is None
