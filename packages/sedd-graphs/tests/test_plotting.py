"""Pictures show the numbers that the graphs and schedules give."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from matplotlib.text import Text

pytest.importorskip("matplotlib")

from sedd_graphs import Absorbing, Geometric, Linear, LogLinear, Ordinal, Uniform
from sedd_graphs.plotting import _path, draw_distribution, draw_schedules, draw_sentence

WORDS = ["the", "cat", "sat", "on", "mat", "[mask]"]
SENTENCE = torch.tensor([0, 1, 2, 3, 0, 4])


def lines(figure, steps):
    """The words of each line, as drawn."""
    drawn: list[list[Text]] = [[] for _ in range(steps + 1)]
    for text in figure.axes[0].texts:
        drawn[round(text.get_position()[1])].append(text)
    return drawn


def saved(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def test_a_sentence_begins_clean_and_a_masked_word_stays_masked():
    figure = draw_sentence(Absorbing(5), LogLinear(), SENTENCE, WORDS, generator=torch.Generator().manual_seed(0))
    drawn = lines(figure, 8)
    assert [text.get_text() for text in drawn[0]] == [WORDS[y] for y in SENTENCE]
    masked = torch.tensor([[text.get_text() == "[mask]" for text in line] for line in drawn])
    assert (masked[:-1] <= masked[1:]).all()
    assert 0 < masked.sum() < masked.numel()
    assert masked[-1].sum() >= 5  # each word survives with probability 1e-3: a false alarm in 70,000
    for line, is_masked in zip(drawn, masked, strict=True):
        for text, hidden in zip(line, is_masked, strict=True):
            assert text.get_color() == ("tab:gray" if hidden else "black")
    assert saved(figure).startswith(b"\x89PNG")


def test_replaced_words_are_red():
    generator = torch.Generator().manual_seed(0)
    figure = draw_sentence(Uniform(6), Geometric(), SENTENCE, WORDS, steps=4, generator=generator)
    for line in lines(figure, 4):
        for text, state in zip(line, SENTENCE, strict=True):
            assert (text.get_color() == "tab:red") == (text.get_text() != WORDS[state])
    assert any(text.get_color() == "tab:red" for text in figure.axes[0].texts)


def test_a_path_has_the_noise_of_each_time():
    """Shares of masks within 6 standard deviations of 1 - e^-sigma, at every line."""
    noise, count = Linear(sigma_max=1.0), 10_000
    x0 = torch.zeros(count, dtype=torch.int64)
    t, path = _path(Absorbing(3), noise, x0, 4, torch.Generator().manual_seed(0))
    masked = -(-noise.sigma(t)).expm1()
    error = ((path == 3).double().mean(-1) - masked).abs()
    assert (error <= 6 * (masked * (1 - masked) / count).sqrt()).all()


def test_a_distribution_is_that_of_the_graph():
    graph, noise, p0 = Ordinal(8), Geometric(), torch.zeros(8)
    p0[2] = 1
    figure = draw_distribution(graph, noise, p0, steps=5)
    image = figure.axes[0].images[0]
    assert (image.origin, list(image.get_extent())) == ("lower", [0, 1, -0.5, 7.5])  # states upwards
    shown = torch.tensor(image.get_array())
    sigma = noise(torch.linspace(0, 1, 5, dtype=torch.float64))[0]
    torch.testing.assert_close(shown.T, graph.transition_from(torch.full((5,), 2), sigma).dense())
    assert saved(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("num_states", [2, 33, 1000])
def test_a_distribution_is_seen_when_it_is_spread_out(num_states):
    """The share that each state has in the end keeps away from the darkest colour, and from the brightest."""
    figure = draw_distribution(Uniform(num_states), Geometric(), torch.eye(num_states)[0], steps=3)
    image = figure.axes[0].images[0]
    norm: Any = image.norm
    never, share, sure = (norm(p) for p in (0.0, 1 / num_states, 1.0))
    assert 0.3 < share < 0.9
    assert sure == 1
    assert image.cmap(never) == image.cmap(0.0)


def test_schedules_are_drawn_as_they_are():
    schedules = {"log-linear": LogLinear(), "geometric": Geometric()}
    figure = draw_schedules(schedules, steps=10)
    total, rate, masked = figure.axes
    for i, noise in enumerate(schedules.values()):
        t = torch.tensor(total.lines[i].get_xdata())
        sigma, dsigma = noise(t)
        torch.testing.assert_close(torch.tensor(total.lines[i].get_ydata()), sigma)
        torch.testing.assert_close(torch.tensor(rate.lines[i].get_ydata()), dsigma)
        torch.testing.assert_close(torch.tensor(masked.lines[i].get_ydata()), 1 - (-sigma).exp())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(schedules)
    assert saved(figure).startswith(b"\x89PNG")


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match=r"x0 must be one sentence of shape \(L,\), got \(2, 3\)"):
        draw_sentence(Uniform(6), Geometric(), SENTENCE.reshape(2, 3), WORDS)
    with pytest.raises(ValueError, match="words must name each of the graph's 7 states, got 6"):
        draw_sentence(Absorbing(6), LogLinear(), SENTENCE, WORDS)
    with pytest.raises(ValueError, match="v must have the graph's 6 states"):
        draw_distribution(Uniform(6), Geometric(), torch.ones(5))
    with pytest.raises(ValueError, match="schedules must name at least one schedule"):
        draw_schedules({})


def test_a_sentence_is_read_from_top_to_bottom():
    """Times beside the lines, one a line; columns as wide as their longest word and half a word's room."""
    figure = draw_sentence(
        Absorbing(5), LogLinear(), SENTENCE, WORDS, generator=torch.Generator().manual_seed(0), steps=4
    )
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0.00", "0.25", "0.50", "0.75", "1.00"]
    assert list(axes.get_yticks()) == [0, 1, 2, 3, 4]
    assert axes.get_ylim() == (4.5, -0.5)
    assert (axes.get_ylabel(), list(axes.get_xticks())) == ("t", [])
    drawn = lines(figure, 4)
    widths = [max(len(line[i].get_text()) for line in drawn) + 1.5 for i in range(len(SENTENCE))]
    for line in drawn:
        for i, text in enumerate(line):
            assert text.get_position()[0] == pytest.approx(sum(widths[:i]) + 0.75)
            assert (text.get_bbox_patch() is not None) == (text.get_text() == "[mask]")
    assert axes.get_xlim() == pytest.approx((0, sum(widths)))
    assert len(lines(draw_sentence(Uniform(6), Geometric(), SENTENCE, WORDS), 8)[8]) == 6  # nine lines unless told


def test_a_chain_goes_on_from_where_it_is():
    """A path's states at the last time have the noise of all of it, and each step only its own."""
    noise, count = Geometric(sigma_min=0.1, sigma_max=1.0), 10_000
    x0 = torch.zeros(count, dtype=torch.int64)
    t, path = _path(Uniform(2), noise, x0, 3, torch.Generator().manual_seed(0))
    assert t.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert torch.equal(path[0], x0)
    sigma = noise.sigma(t)
    sigma[0] = 0  # the first line is clean
    for i in range(3):
        moved, due = (path[i + 1] != path[i]).double().mean(), -(sigma[i] - sigma[i + 1]).expm1() / 2
        assert abs(moved - due) <= 6 * (due * (1 - due) / count).sqrt()


def test_pictures_say_what_they_show():
    picture = draw_distribution(Ordinal(8), Geometric(), torch.eye(8)[0])
    axes, colours = picture.axes
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("t", "state", "Ordinal(num_states=8)")
    assert colours.get_ylabel() == "probability"
    image = axes.images[0]
    shown = image.get_array()
    assert shown is not None
    assert shown.shape == (8, 200)
    assert (image.norm.vmin, image.norm.vmax) == (0.01 / 8, 1)  # type: ignore[union-attr]
    total, rate, masked = draw_schedules({"a": LogLinear(), "b": Geometric()}).axes
    assert [each.get_title() for each in (total, rate, masked)] == [
        "total noise sigma",
        "rate dsigma/dt",
        "1 - exp(-sigma)",
    ]
    assert [each.get_yscale() for each in (total, rate, masked)] == ["log", "log", "linear"]
    assert [each.get_subplotspec().get_geometry() for each in (total, rate, masked)] == [(1, 3, i, i) for i in range(3)]  # type: ignore[union-attr]
    for each in (total, rate, masked):
        assert [line.get_linestyle() for line in each.lines] == ["-", "--"]
        x = list(each.lines[0].get_xdata())  # type: ignore[arg-type]
        assert (len(x), x[0], x[-1]) == (400, 1 / 400, 1)
