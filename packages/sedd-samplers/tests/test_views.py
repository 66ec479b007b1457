"""The views: states pass unchanged, the terminal shows them, and the page holds them and nothing that could escape."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest
import torch
from sedd_samplers import State, trajectory
from sedd_samplers.views import live, record

MASK = 4
TEXT = {0: "to be", 1: " or\n", 2: "</script><b>&", 3: "\x1b[31m世", 4: "never shown"}.__getitem__


def states(*sequences, steps=None):
    """A trajectory through the given sequences of two rows each."""
    steps = len(sequences) - 1 if steps is None else steps
    for step, x in enumerate(sequences):
        yield State(torch.tensor(x), 1 - step / steps, step, steps)


def course():
    return list(states([[4, 4, 4], [4, 1, 4]], [[4, 0, 4], [4, 1, 4]], [[4, 0, 1], [2, 1, 4]], [[3, 0, 1], [2, 1, 0]]))


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """A stream that says it is a terminal, 20 columns wide and 6 lines high."""
    monkeypatch.setattr(shutil, "get_terminal_size", lambda fallback=(80, 24): os.terminal_size((20, 6)))
    return Terminal()


def screen(written):
    """What a terminal would show after these characters: the few control sequences that the view uses, carried out."""
    lines, y = [""], 0
    for part in re.split(r"(\x1b\[\d*[AJ]|\x1b\[[\d;]*m|\n|\r)", written):
        if part.endswith("A") and part.startswith("\x1b"):
            y -= int(part[2:-1])
            assert y >= 0
        elif part == "\x1b[J":
            lines = [*lines[:y], ""]
        elif part == "\n":
            y += 1
            lines += [""] * (y + 1 - len(lines))
        elif part == "\r" or (part.endswith("m") and part.startswith("\x1b")):
            continue
        else:
            lines[y] += part
    return [line.rstrip() for line in lines if line]


@pytest.mark.parametrize("view", ["live", "record"])
def test_states_pass_unchanged(tmp_path, view):
    before = course()
    after = list(live(before, TEXT, stream=io.StringIO()) if view == "live" else record(before, tmp_path / "r", TEXT))
    assert all(one is other for one, other in zip(before, after, strict=True))


def test_each_frame_is_drawn_over_the_last(terminal):
    shown = []
    for _ in live(course(), TEXT, mask_id=MASK, stream=terminal, every=0):
        shown.append(screen(terminal.getvalue()))
    assert [frame[0][:19] for frame in shown] == [
        f"step {i}/3  t = {t}" for i, t in enumerate(("1.000", "0.667", "0.333", "0.000"))
    ]
    assert [frame[1:] for frame in shown] == [["░░░"], ["░to be░"], ["░to be or⏎"], ["\ufffd[31m世to be or⏎"]]


def test_what_changed_is_green_and_what_is_masked_is_dim(terminal):
    list(live(course()[:2], TEXT, mask_id=MASK, stream=terminal, every=0))
    last = terminal.getvalue().split("\n")[-2]
    assert last.startswith("\x1b[2m░\x1b[0m\x1b[1;32mt\x1b[0m")


def test_text_is_wrapped_by_columns_and_cut_to_the_screen(terminal):
    """Wide characters count twice; more lines than fit are counted, so that the next frame finds its place."""
    long = list(states([[3] * 30, [0] * 30], [[3] * 30, [1] * 30]))
    for _ in live(long, lambda token: "世" if token == 3 else "ab", stream=terminal, every=0):
        assert screen(terminal.getvalue())[1:] == ["世" * 10] * 3
    terminal = Terminal()
    for _ in live(long, lambda token: "abcdefgh", row=1, stream=terminal, every=0):
        assert screen(terminal.getvalue())[1:] == [
            "abcdefghabcdefghabcd",
            "efghabcdefghabcdefgh",
            "abcdefghabcdefghabcd",
            "… 9 more lines",
        ]


def test_frames_are_not_drawn_faster_than_asked_but_the_last_one_is(terminal):
    for step, _ in enumerate(live(course(), TEXT, mask_id=MASK, stream=terminal, every=1e9)):
        assert screen(terminal.getvalue())[0].startswith("step 3/3" if step == 3 else "step 0/3")
    ended = Terminal()
    for state in live(course(), TEXT, mask_id=MASK, stream=ended, every=1e9):
        if state.step == 2:
            break
    assert screen(ended.getvalue())[0].startswith("step 0/3")
    early = Terminal()
    list(live(course()[:3], TEXT, mask_id=MASK, stream=early, every=1e9))  # a loop that ended before its last step
    assert screen(early.getvalue())[0].startswith("step 2/3")


def test_a_file_gets_ten_lines_and_no_control_characters():
    stream = io.StringIO()
    list(live(states(*[[[0, 4, 1]]] * 101), TEXT, mask_id=MASK, stream=stream))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[0] == "step   0/100  t = 1.000: to be░ or⏎"
    assert "\x1b" not in stream.getvalue()


def data_of(page):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found
    return json.loads(found[1])


def test_a_page_holds_the_trajectory_and_needs_nothing_else(tmp_path):
    path = tmp_path / "page.html"
    given = torch.tensor([[False, False, False], [False, True, False]])
    list(record(course(), path, TEXT, mask_id=MASK, given=given, title="A <title>"))
    page = path.read_text(encoding="utf-8")
    data = data_of(page)
    x = [[*row] for row in data["start"]]
    assert x == [[4, 4, 4], [4, 1, 4]]
    for changes, state in zip(data["changes"], course()[1:], strict=True):
        for b, i, token in zip(*changes, strict=True):
            x[b][i] = token
        assert x == state.x.tolist()
    assert data["text"] == {str(token): TEXT(token) for token in range(4)}
    assert data["given"] == given.int().tolist()
    assert data["t"] == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert "http" not in page
    assert "A &lt;title&gt;" in page


def test_no_token_escapes_from_its_page(tmp_path):
    path = tmp_path / "page.html"
    list(record(course(), path, TEXT, mask_id=MASK))
    page = path.read_text(encoding="utf-8")
    assert page.count("</script>") == 2
    assert "<b>" not in page
    assert "innerHTML" not in page


def test_a_page_is_written_when_the_loop_is_left_and_keeps_the_rows_asked_for(tmp_path):
    path = tmp_path / "page.html"
    views = record(course(), path, TEXT, mask_id=MASK, rows=1)
    next(views), next(views)
    views.close()  # type: ignore[attr-defined]
    data = data_of(path.read_text(encoding="utf-8"))
    assert len(data["start"]) == 1
    assert len(data["changes"]) == 1


SCRIPT = """
const fs = require("fs");
const page = fs.readFileSync(process.argv[2], "utf8");
const [data, code] = [...page.matchAll(/<script[^>]*>([^]*?)<\\/script>/g)].map(match => match[1]);
const elements = {};
const element = () => ({
  children: [], classes: new Set(), textContent: "",
  classList: null, appendChild(child) { this.children.push(child); return child; },
});
const make = () => {
  const e = element();
  e.classList = {
    add: name => e.classes.add(name), remove: name => e.classes.delete(name),
    toggle: (name, on) => on ? e.classes.add(name) : e.classes.delete(name),
  };
  all.push(e);
  return e;
};
const all = [];
const main = make();
for (const id of ["data", "play", "step", "place"]) elements[id] = make();
elements.data.textContent = data;
global.document = {
  getElementById: id => elements[id], createElement: make, querySelector: () => main,
  querySelectorAll: () => all.filter(e => e.classes.has("fresh")),
};
new Function(code)();
const look = () => main.children.map(p => p.children.map(s => [s.textContent, [...s.classes].sort().join(" ")]));
const out = [];
for (const step of [0, 1, 3, 2, 0]) { elements.step.value = step; elements.step.oninput(); out.push(look()); }
const press = key => {
  let kept = true;
  elements.step.onkeydown({ key, preventDefault() { kept = false; } });
  return kept;
};
elements.play.click = () => elements.play.onclick();
const said = [];
for (const key of ["ArrowRight", " ", " "]) said.push([press(key), elements.play.textContent]);
console.log(JSON.stringify([out, elements.place.textContent, elements.step.ariaValueText, said]));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="runs the page's script in node")
def test_the_slider_shows_every_state_forth_and_back(tmp_path):
    (tmp_path / "run.js").write_text(SCRIPT)
    list(
        record(course(), tmp_path / "page.html", TEXT, mask_id=MASK, given=torch.tensor([[0, 0, 0], [0, 1, 0]]).bool())
    )
    run = subprocess.run(
        ["node", "run.js", "page.html"], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    )
    frames, place, spoken, pressed = json.loads(run.stdout)
    for step, frame in zip([0, 1, 3, 2, 0], frames, strict=True):
        for b, row in enumerate(course()[step].x.tolist()):
            assert [text for text, _ in frame[b]] == ["░" if token == MASK else TEXT(token) for token in row]
            assert [("mask" in classes) for _, classes in frame[b]] == [token == MASK for token in row]
            before = course()[max(step - 1, 0)].x[b].tolist()
            assert [("fresh" in classes) for _, classes in frame[b]] == [
                x != y for x, y in zip(row, before, strict=True)
            ]
        assert ["given" in classes for _, classes in frame[1]] == [False, True, False]
    assert place == spoken == "step 0 of 3, t = 1.000"
    # The space bar starts and stops, and does not scroll the page; arrow keys are the browser's own.
    assert pressed == [[True, "Play"], [False, "Pause"], [False, "Play"]]


def test_views_stack_on_a_real_run(ref, tmp_path):
    graph, stream = ref.StructuredAbsorbing(3), io.StringIO()
    run = trajectory(lambda x, sigma: torch.zeros(*x.shape, 4), graph, ref.LogLinear(), x=torch.zeros(2, 5).long(),
                     given=torch.zeros(2, 5).bool(), steps=4, seeds=[1, 2])  # fmt: skip
    *_, last = record(live(run, "abc_".__getitem__, mask_id=3, stream=stream), tmp_path / "p", "abc_".__getitem__)
    line = stream.getvalue().splitlines()[-1]
    assert line.endswith("".join("abc_"[token] for token in last.x[0].tolist()))


def test_what_makes_no_sense_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no sequence 2 in a batch of 2"):
        list(live(course(), TEXT, row=2, stream=io.StringIO()))
    with pytest.raises(ValueError, match="rows must be at least 1"):
        list(record(course(), tmp_path / "p", TEXT, rows=0))


def test_a_page_that_cannot_be_written_is_told_before_anything_is_sampled(tmp_path):
    def never() -> Iterator[State]:
        raise AssertionError("sampled")
        yield  # type: ignore[unreachable]  # what makes it a generator

    with pytest.raises(OSError, match="nowhere"):
        list(record(never(), tmp_path / "nowhere" / "p", TEXT))


def test_what_goes_wrong_with_a_view_costs_no_sample(tmp_path):
    def text(token):
        raise RuntimeError("no such token")

    stream = io.StringIO()
    states = list(live(record(course(), tmp_path / "p", text), text, stream=stream))
    assert len(states) == 4
    assert stream.getvalue().splitlines()[-1].endswith("<3><0><1>")
    views = record(course(), tmp_path / "gone" / "p", TEXT)
    (tmp_path / "gone").mkdir()
    next(views)
    shutil.rmtree(tmp_path / "gone")
    with pytest.warns(UserWarning, match="could not be written"):
        assert len(list(views)) == 3
