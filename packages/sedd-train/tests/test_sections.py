"""Graphs and schedules as config.json and recipes say them, to the word."""

from __future__ import annotations

import re
from typing import Any

import pytest
from sedd_graphs import Absorbing, Cosine, Geometric, Hybrid, Linear, LogLinear, Masked, Ordinal, Polynomial, Uniform
from sedd_train.sections import described, graph_section, in_a_word, make_noise, noise_section, read_graph

GRAPHS: list[tuple[Any, dict[str, Any]]] = [
    (Absorbing(9), {"type": "absorb", "mask_id": 9}),
    (Absorbing(9, mask_id=0), {"type": "absorb", "mask_id": 0}),
    (Uniform(10), {"type": "uniform"}),
    (Ordinal(10), {"type": "ordinal"}),
    (
        Hybrid(9, uniform_rate=0.25, mask_rate=2.0, mask_id=4),
        {"type": "hybrid", "uniform_rate": 0.25, "mask_rate": 2.0, "mask_id": 4},
    ),
    (
        Masked(Uniform(9), rate=0.5, mask_rate=1.5, mask_id=2),
        {"type": "masked", "tokens": {"type": "uniform"}, "rate": 0.5, "mask_rate": 1.5, "mask_id": 2},
    ),
]


@pytest.mark.parametrize(("graph", "section"), GRAPHS, ids=repr)
def test_a_graph_s_section(graph, section):
    assert graph_section(graph) == section
    again = read_graph(section, 10)
    assert type(again) is type(graph)
    assert (again.num_states, again.mask_id) == (10, graph.mask_id)
    assert graph_section(again) == section


@pytest.mark.parametrize("kind", ["absorb", "hybrid", "masked"])
def test_the_mask_is_the_last_state_unless_said_and_a_state_of_the_graph(kind):
    values: dict[str, Any] = {
        "type": kind,
        "uniform_rate": 1.0,
        "mask_rate": 1.0,
        "rate": 1.0,
        "tokens": {"type": "ordinal"},
    }
    assert read_graph(values, 7).mask_id == 6
    for mask_id in (0, 6):
        assert read_graph(values | {"mask_id": mask_id}, 7).mask_id == mask_id
    wrongs: list[Any] = [-1, 7, 1.5, "1"]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=re.escape(f"mask_id must be a whole number of 0 to 6; got {wrong!r}")):
            read_graph(values | {"mask_id": wrong}, 7)


@pytest.mark.parametrize("missing", ["uniform_rate", "mask_rate", "rate", "tokens"])
def test_rates_have_no_default(missing):
    values: dict[str, Any] = {"uniform_rate": 1.0, "mask_rate": 1.0, "rate": 1.0, "tokens": {"type": "ordinal"}}
    kind = "hybrid" if missing == "uniform_rate" else "masked"
    del values[missing]
    with pytest.raises(ValueError, match=rf"{missing} must be .*; there is none"):
        read_graph({"type": kind} | values, 7)


def test_what_is_none_is_told_with_what_there_is():
    with pytest.raises(ValueError, match=r"graph.type 'ring' is none of absorb, uniform, ordinal, hybrid, masked"):
        read_graph({"type": "ring"}, 7)
    with pytest.raises(
        ValueError, match=r"noise.type 'sine' is none of loglinear, cosine, polynomial, geometric, linear"
    ):
        make_noise({"type": "sine"})


NOISES: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [  # a schedule, its section, what that need not say
    (LogLinear(1e-3), {"type": "loglinear"}, {"eps": 1e-3}),
    (Cosine(1e-3), {"type": "cosine"}, {"eps": 1e-3}),
    (Polynomial(2.0, 1e-3), {"type": "polynomial"}, {"power": 2.0, "eps": 1e-3}),
    (Geometric(0.5, 3.0), {"type": "geometric", "sigma_min": 0.5, "sigma_max": 3.0}, {}),
    (Linear(3.0), {"type": "linear", "sigma_max": 3.0}, {"sigma_min": 0.0}),
]


@pytest.mark.parametrize(("noise", "section", "more"), NOISES, ids=repr)
def test_a_schedule_s_section(noise, section, more):
    assert noise_section(noise) == section | more
    for told in (section, section | more):
        assert repr(make_noise(told)) == repr(noise)
    other: dict[str, Any] = section | {name: 0.25 for name in section | more if name != "type" and name != "sigma_max"}
    assert noise_section(make_noise(other)) == other


@pytest.mark.parametrize(
    ("what", "word", "section"),
    [
        ("graph", "absorb", {"type": "absorb"}),
        ("graph", "absorb:mask_id=103", {"type": "absorb", "mask_id": 103}),
        ("graph", "hybrid:uniform_rate=1,mask_rate=0.5", {"type": "hybrid", "uniform_rate": 1, "mask_rate": 0.5}),
        (
            "graph",
            "masked:tokens=ordinal,rate=1e-2,mask_rate=2",
            {"type": "masked", "tokens": {"type": "ordinal"}, "rate": 0.01, "mask_rate": 2},
        ),
        ("noise", "polynomial:power=3,eps=1e-4", {"type": "polynomial", "power": 3, "eps": 1e-4}),
        ("noise", "linear", {"type": "linear"}),
        ("graph", "own:Dense(a: b)", {"type": "own", "is": "Dense(a: b)"}),
        ("noise", "loglinear:eps=much", {"type": "loglinear", "eps": "much"}),
    ],
)
def test_a_word_s_section(what, word, section):
    found = described(what, word)
    assert found == section
    assert {name: type(value) for name, value in found.items()} == {
        name: type(value) for name, value in section.items()
    }


@pytest.mark.parametrize(
    ("section", "word"),
    [
        ({"type": "absorb"}, "absorb"),
        ({"type": "absorb", "mask_id": 0}, "absorb:mask_id=0"),
        ({"type": "uniform", "mask_id": 3}, "uniform"),
        ({"type": "masked", "tokens": {"type": "ordinal"}, "rate": 1.0, "mask_rate": 2.0, "mask_id": 5},
         "masked:tokens=ordinal,rate=1.0,mask_rate=2.0,mask_id=5"),
        ({"type": "geometric", "sigma_min": 1e-5, "sigma_max": 7.0}, "geometric:sigma_min=1e-05,sigma_max=7.0"),
        ({"type": "Dense", "is": "Dense(Q)"}, "own:Dense(Q)"),
    ],
)  # fmt: skip
def test_a_section_in_a_word(section, word):
    assert in_a_word(section) == word


@pytest.mark.parametrize(
    ("what", "word", "told"),
    [
        ("graph", "", "graph = '': expected absorb, uniform, ordinal, hybrid, masked"),
        ("noise", "absorb", "noise = 'absorb': expected loglinear, cosine, polynomial, geometric, linear"),
        ("graph", "uniform:rate=1", "'rate' is no value of uniform; it has none"),
        ("graph", "ordinal:mask_id=1", "'mask_id' is no value of ordinal; it has none"),
        ("graph", "masked:x", "'x' is no value of masked; it has tokens, rate, mask_rate, mask_id"),
        ("noise", "geometric:eps=1", "'eps' is no value of geometric; it has sigma_min, sigma_max"),
        ("noise", "linear:eps=1", "'eps' is no value of linear; it has sigma_max, sigma_min"),
    ],
)
def test_a_word_that_says_nothing_is_told_with_what_would(what, word, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        described(what, word)
