"""How a model is called: with what it offers and no more, at the positions that matter, and its answer looked at."""

from __future__ import annotations

import functools
import inspect
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sedd_samplers import cached
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
from sedd_samplers.adapters.processes import Masking, Replacing
from sedd_samplers.controls import controlled
from sedd_samplers.fast import Answer
from sedd_samplers.guidance import classifier_free, classifier_guided, first_order_ratios, neighbour_ratios
from sedd_samplers.model_calls import (
    ModelCall,
    ScoreCall,
    Wrapper,
    check_conditions,
    device_of,
    modules_in,
    offers,
    warn_of_training,
)
from sedd_samplers.positions import Positions, true_indices
from sedd_samplers.sampling import batches
from sedd_samplers.waiting import require
from torch import Tensor

N = 4
X = torch.tensor([[0, 3, 1], [2, 2, 0]])
SIGMA = torch.tensor([0.5, 2.0])
ROWS = torch.tensor([4, 7])
SOME = torch.tensor([[True, False, True], [False, False, True]])
CPU = torch.device("cpu")


def answer(x: Tensor, sigma: Tensor | None, rows: Tensor | None = None) -> Tensor:
    """(B, L, N), every number of its own."""
    out = 10.0 * x[..., None] + torch.arange(N) + 100 * torch.arange(x.shape[1])[:, None]
    out = out if sigma is None else out + 1000 * sigma[:, None, None]
    return out if rows is None else out + 10_000 * rows[:, None, None]


MODELS: dict[str, Any] = {
    "plain": lambda x, sigma: answer(x, sigma),
    "where": lambda x, sigma, where=None: answer(x, sigma) if where is None else answer(x, sigma)[where],
    "where, wanted": lambda x, sigma, where: answer(x, sigma)[where],
    "positions": lambda x, sigma, positions=None: (
        answer(x, sigma) if positions is None else answer(x, sigma).flatten(0, 1)[positions]
    ),
    "positions, wanted": lambda x, sigma, positions: answer(x, sigma).flatten(0, 1)[positions],
    "positions before where": lambda x, sigma, where=None, positions=None: answer(x, sigma).flatten(0, 1)[positions],
    "rows": lambda x, sigma, rows: answer(x, sigma, rows),
    "rows and where": lambda x, sigma, rows, where: answer(x, sigma, rows)[where],
    "clock": lambda x: answer(x, None),
}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_given_what_it_offers(name: str, whole: bool) -> None:
    """The rows of its whole answer; with static shapes it is not asked about some, unless it must be."""
    model, told = MODELS[name], dict[str, Any]()

    @functools.wraps(model)
    def heard(*inputs: Any, **further: Any) -> Tensor:
        told.update(further, inputs=inputs)
        out: Tensor = model(*inputs, **further)
        return out

    at = Positions.everywhere(X.shape, CPU, whole=True) if whole else Positions.of(SOME)
    sigma = None if name == "clock" else SIGMA
    if name == "positions before where" and whole:
        model = heard.__wrapped__ = MODELS["where"]
    got = ModelCall(heard, N, "score model", "x" if name == "clock" else "x, sigma")(X, sigma, at, ROWS)
    expected = answer(X, sigma, ROWS if "rows" in name else None).flatten(0, 1)[at.flat]
    assert torch.equal(got.tensor(), expected)
    assert got.shape == (len(at), N)
    assert len(told.pop("inputs")) == (1 if sigma is None else 2)
    asks = {"rows"} & set(name.split())
    if not whole or "wanted" in name or name == "rows and where":
        asks |= {key for key in ("where", "positions") if key in name}
    assert set(told) == asks - ({"where"} if "positions" in asks else set())
    if "rows" in told:
        assert torch.equal(told["rows"], ROWS)


def test_a_wrapper_is_taken_in_pieces_and_its_answer_looked_at() -> None:
    """Nothing is made of it before it is read; a width or a kind that is not N floats is told."""
    made = list[int]()

    def rows_at(x: Tensor, sigma: Tensor, at: Positions, rows: Tensor) -> Answer:
        def convert(part: Tensor, _: Any) -> Tensor:
            made.append(len(part))
            return part + 1

        return Answer(answer(x, sigma, rows).flatten(0, 1), at.flat).then(convert)

    at = Positions.of(SOME)
    got = ModelCall(Wrapper(rows_at), N, "score model")(X, SIGMA, at, ROWS)
    assert not made
    assert torch.equal(got.tensor(), answer(X, SIGMA, ROWS)[SOME] + 1)
    with pytest.raises(ValueError, match=r"the logits must return a float tensor of shape \(3, 5\), got .* \(3, 4\)"):
        ModelCall(Wrapper(rows_at), N + 1, "logits")(X, SIGMA, at, ROWS)
    wide = ModelCall(Wrapper(rows_at), N - 1, "logits", widths=())(X, SIGMA, at, ROWS)
    assert wide.shape == (3, N)


@pytest.mark.filterwarnings("always:at sigma")
@pytest.mark.parametrize(
    ("place", "x", "sigma", "told"),
    [
        (7, 3, 1.0, True),
        (8, 3, 1.0, False),  # behind the first eight rows
        (0, 1, 1.0, False),  # at a token, whose score says nothing
        (0, 3, 1e-4, False),  # where so little noise is left that a mask is hardly ever due
    ],
)
def test_the_first_eight_rows_of_scores_are_looked_at(place: int, x: int, sigma: float, told: bool) -> None:
    """Once: 445 is more than a hundred times 1 / (e - 1), at a noise of 1."""
    graph, states = Masking(4, 3), torch.full((1, 9), 3)
    states[0, place] = x
    log_score = torch.full((1, 9, 4), -9.0).index_fill(1, torch.tensor([place]), 5.0)
    call = ScoreCall(lambda x, sigma: log_score, graph)
    for warned in (told, False):
        with warnings.catch_warnings(record=True) as seen:
            call(states, torch.tensor([sigma]), Positions.everywhere(states.shape, CPU), torch.arange(1))
        assert ["sum to 445.2, and those of any data to 0.582 at most" in str(each.message) for each in seen] == (
            [True] * warned
        )


@pytest.mark.parametrize(
    ("widths", "taken", "refused"),
    [
        (None, [6], [5, 7, 133]),
        ((), [6, 7, 133], [5, 4, 134, 1]),
        ((5,), [5, 6, 7, 133], [4, 134]),
        ((300, 2), [2, 6, 133, 300], [5, 134, 299, 301]),
    ],
)
def test_an_answer_is_as_wide_as_the_states_or_as_was_said(
    widths: tuple[int, ...] | None, taken: list[int], refused: list[int]
) -> None:
    everywhere = Positions.everywhere(X.shape, CPU)

    def ask(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Answer:
        call = ModelCall(lambda x, sigma: torch.zeros(shape, dtype=dtype), 6, "logits", widths=widths)
        return call(X, SIGMA, everywhere, ROWS)

    for width in taken:
        assert ask((2, 3, width)).shape == (6, width)
    for width in refused:
        with pytest.raises(
            ValueError, match=r"the logits must return a float tensor of shape \(2, 3, 6\), got"
        ) as told:
            ask((2, 3, width))
        assert ("a column short: logits of the tokens alone" in str(told.value)) == (width == 5 and widths is None)
        assert ("a column short: if V counts the mask" in str(told.value)) == (width == 5 and widths is not None)
    for shape in ((3, 2, 6), (2, 3), (6, 6), (2, 4, 6)):
        with pytest.raises(ValueError, match="must return a float tensor"):
            ask(shape)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert ask((2, 3, 6), dtype).dtype == torch.promote_types(dtype, torch.float32)
    for wrong in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(ValueError, match=f"got {wrong}"):
            ask((2, 3, 6), wrong)


def test_what_is_no_model_is_told_how_it_would_be_called() -> None:
    with pytest.raises(ValueError, match=r"the score model must be callable as score\(x, sigma\), got a int"):
        ModelCall(3, N, "score model")
    with pytest.raises(ValueError, match=r"the planner must be callable as planner\(x\), got a NoneType"):
        ModelCall(None, N, "planner", "x")
    with pytest.raises(ValueError, match=r"the planner must return .* \(2, 3, 4\), got a list"):
        ModelCall(lambda x: [x], N, "planner", "x")(X, None, Positions.everywhere(X.shape, CPU), ROWS)


def test_what_a_model_offers_is_seen_by_its_call() -> None:
    class Net(torch.nn.Module):
        def forward(self, x: Tensor, sigma: Tensor, where: Tensor) -> Tensor:
            return x

    def model(x: Tensor, sigma: Tensor, **further: Any) -> Tensor:
        return x

    assert offers(Net(), "where")
    assert not offers(Net(), "rows")
    assert offers(SimpleNamespace(_orig_mod=Net()), "where")  # what torch.compile returns
    assert offers(functools.partial(Net().forward), "where")
    assert offers(Net().forward, "sigma")
    assert not offers(model, "where")
    assert offers(model, "further")
    assert not offers(min, "where")  # no signature to be had
    assert not offers(3, "where")


@pytest.mark.parametrize("given", [False, True])
def test_a_wrapper_is_a_model_of_rows(given: bool) -> None:
    """(B, L, N) or the rows asked for; sequences are those of x, from 0 on, unless they are named."""
    wrapper = Wrapper(lambda x, sigma, at, rows: answer(x, sigma, rows).flatten(0, 1)[at.flat])
    rows = ROWS if given else None
    expected = answer(X, SIGMA, ROWS if given else torch.arange(2))
    assert torch.equal(wrapper(X, SIGMA, rows=rows), expected)
    assert torch.equal(wrapper(X, SIGMA, where=SOME, rows=rows), expected[SOME])
    assert offers(wrapper, "where")
    assert offers(wrapper, "rows")
    assert not offers(wrapper, "positions")


class Part(torch.nn.Module):
    def __init__(self, **parameters: Tensor) -> None:
        super().__init__()
        for name, value in parameters.items():
            self.register_parameter(name, torch.nn.Parameter(value))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x


def test_modules_are_found_in_their_order() -> None:
    """Of a wrapper all that it calls, of a function what it closes over and no more."""
    one, two, unused = Part(), Part(), Part()
    number = 3
    wrapper = Wrapper(lambda *_: X.float(), one, functools.partial(two), number)
    assert list(modules_in(wrapper)) == [one, two]
    assert list(modules_in(lambda x, sigma: two(x, sigma) + number * one(x, sigma))) in ([one, two], [two, one])
    assert list(modules_in(functools.partial(one.forward))) == [one]
    assert list(modules_in([unused])) == list(modules_in(None)) == list(modules_in(number)) == []
    assert list(modules_in(torch.nn.Sequential(one, two))) != [one, two]  # the module itself, once

    def defined_later() -> Any:
        def later(x: Tensor) -> Any:
            return empty(x)

        assert list(modules_in(later)) == []  # the cell is empty yet
        empty: Any = one
        return later

    assert list(modules_in(defined_later())) == [one]


def test_whatever_is_made_of_models_names_them_in_their_order() -> None:
    """An adapter its one, guidance the score or what is given the class first."""
    one, two, graph = Part(), Part(), Replacing(N)
    assert list(modules_in(classifier_free(one, two, 2.0, num_states=N))) == [one, two]
    assert list(modules_in(classifier_guided(one, two, 2.0, num_states=N))) == [one, two]
    level = lambda sigma: sigma / 2  # noqa: E731
    for made in (
        from_posterior(one, graph), from_logits(one, graph), from_reverse(one, graph, level), from_velocity(one, graph),
        to_posterior(one, graph), to_reverse(one, graph, level), to_velocity(one, graph), controlled(one, graph),
        from_masked_lm(one, Masking(N, 0)), cached(one), neighbour_ratios(one, N), first_order_ratios(one, N),
    ):  # fmt: skip
        assert list(modules_in(made)) == [one]
    told = next(batches(one, graph, 4, 2, {}))[1]
    assert list(modules_in(told)) == [one]


def test_states_live_where_the_first_parameter_does() -> None:
    meta, here = Part(weight=torch.zeros(1, device="meta")), Part(weight=torch.zeros(1))
    both = Wrapper(lambda *_: X.float(), Part(), meta, here)
    assert device_of(both, None) == torch.device("meta")
    assert device_of(both, "cpu") == device_of(Part(), None) == device_of(len, None) == CPU
    assert device_of(here, torch.device("meta")) == torch.device("meta")


def test_one_module_in_training_mode_is_told_of_and_where_the_run_begins() -> None:
    """Of two such modules the first, at the line that asks for the states."""
    one, two = torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(2)
    both = Wrapper(lambda *_: X.float(), torch.nn.Dropout(0.5).eval(), one, two)

    def run() -> None:
        warn_of_training(both)

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run()
        line = inspect.currentframe().f_lineno - 1  # type: ignore[union-attr]
    assert [str(each.message)[:42] for each in seen] == ["the Dropout is in training mode, and its d"]
    assert (seen[0].filename, seen[0].lineno) == (__file__, line)


def test_a_condition_is_a_tensor_of_one_dimension_at_least() -> None:
    def net(x: Tensor, sigma: Tensor, scale: Any = 1.0, label: Any = None) -> Tensor:
        return x

    for held in ({"scale": 2.0}, {"scale": torch.tensor(2.0)}, {"label": None}, {}):
        check_conditions(functools.partial(net, **held), "score model")
    check_conditions(net, "score model")
    for vector in (torch.zeros(1), torch.zeros(2, 3)):
        with pytest.raises(ValueError, match=r"the planner is a partial that holds the tensor 'label' \("):
            check_conditions(functools.partial(net, scale=torch.tensor(2.0), label=vector), "planner")


@pytest.mark.parametrize("kind", ["plain", "where", "positions"])
def test_conditions_are_those_of_the_sequences_asked_about(kind: str) -> None:
    """By position, if the model offers that, else by `where`."""

    def plain(x: Tensor, sigma: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return answer(x, sigma) * scale[:, None, None] + shift[:, None, None]

    def at_where(x: Tensor, sigma: Tensor, where: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        out: Tensor = plain(x, sigma, shift, scale)[where]
        return out

    def at_positions(
        x: Tensor, sigma: Tensor, shift: Tensor, scale: Tensor, positions: Tensor, where: Any = None
    ) -> Tensor:
        assert where is None
        out: Tensor = plain(x, sigma, shift, scale).flatten(0, 1)[positions]
        return out

    shift, scale = torch.arange(9.0), torch.arange(9.0) ** 2
    models: dict[str, Any] = {"plain": plain, "where": at_where, "positions": at_positions}
    model = per_sequence(models[kind], shift=shift, scale=scale)
    assert offers(model, "rows")
    assert [offers(model, key) for key in ("where", "positions")] == [kind == "where", kind == "positions"]
    got = ModelCall(model, N, "score model")(X, SIGMA, Positions.of(SOME), ROWS)
    assert torch.equal(got.tensor(), plain(X, SIGMA, shift[ROWS], scale[ROWS])[SOME])


def test_positions_are_those_of_the_batch() -> None:
    where = torch.tensor([[0, 1, 0], [0, 0, 0], [1, 0, 1], [0, 0, 0]]).bool()
    at = Positions.of(where)
    assert (at.flat.tolist(), at.sequence.tolist(), at.position.tolist()) == ([1, 6, 8], [0, 2, 2], [1, 0, 2])
    assert (len(at), at.sequences, at.whole) == (3, 2, False)
    assert at.where is where
    some, rows = at.in_sequences_that_have_any()
    assert rows.tolist() == [0, 2]
    assert some.where.tolist() == [[False, True, False], [True, False, True]]
    assert (some.flat.tolist(), some.sequence.tolist(), some.position.tolist()) == ([1, 3, 5], [0, 1, 1], [1, 0, 2])
    assert (len(some), some.sequences, some.whole) == (3, 2, False)
    everywhere = Positions.everywhere(where.shape, CPU)
    assert (everywhere.flat.tolist(), everywhere.sequences, everywhere.whole) == (list(range(12)), 4, False)
    assert everywhere.where.all()
    assert everywhere.where.dtype == torch.bool
    assert Positions.everywhere(where.shape, CPU, whole=True).whole
    none = Positions.of(where & False)
    assert (len(none), none.sequences) == (0, 0)


@pytest.mark.parametrize("values", [[], [0, 0], [1], [0, 1, 1, 0, 1], [1, 1, 1]])
def test_the_true_ones_are_counted_off(values: list[int]) -> None:
    true = true_indices(torch.tensor(values, dtype=torch.bool), sum(values))
    assert true.dtype == torch.int64
    assert true.tolist() == [i for i, value in enumerate(values) if value]


def test_what_must_hold_must_hold_everywhere() -> None:
    """The sentence is made only where it does not."""
    require(torch.tensor([True, True]), "this", lambda: pytest.fail("told of nothing"))
    require(torch.ones(0).bool(), "this", lambda: pytest.fail("told of nothing"))
    for wrong in ([True, False], [False, False], False):
        with pytest.raises(ValueError, match=r"^what was found$"):
            require(torch.tensor(wrong), "this", lambda: "what was found")
