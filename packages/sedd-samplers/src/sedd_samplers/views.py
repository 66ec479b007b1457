"""Watching a sample come to light: in the terminal while it happens, and as a page to look at afterwards.

Both are wrappers of a generator of states, which they hand on unchanged whatever goes wrong with the view, and look at
some sequences of the batch:

    for state in live(trajectory(...), text): ...
    for state in record(trajectory(...), "sample.html", text): ...

`text` gives the characters of one token, such as `lambda token: tokenizer.decode([token])`.
"""

from __future__ import annotations

import html
import json
import os
import shutil
import sys
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from .sampling import State

__all__ = ["live", "record"]

Text = Callable[[int], str]
MASK = "░"
_DIM, _FRESH, _BOLD, _PLAIN = "\x1b[2m", "\x1b[1;32m", "\x1b[1m", "\x1b[0m"


def live(
    states: Iterable[State],
    text: Text,
    *,
    mask_id: int | None = None,
    row: int = 0,
    stream: TextIO | None = None,
    every: float = 0.05,
) -> Iterator[State]:
    """States as they pass, with one sequence shown in the terminal: masks dim, what the last frame changed green.

    On a stream that is no terminal (a file, a notebook's log) it prints a plain line ten times in the run instead.

    Args:
        states: what `trajectory` yields.
        text: the characters of a token.
        mask_id: the graph's mask, shown as a block; None when there is none.
        row: which sequence of the batch.
        stream: where to; stderr when None.
        every: seconds between two frames at least, so that drawing does not slow the sampler down.

    Yields:
        The states.

    Raises:
        ValueError: the batch has no such row.
    """
    stream = sys.stderr if stream is None else stream
    drawing = stream.isatty()
    shown: list[int] | None = None
    lines, drawn_at, tenth, state = 0, -float("inf"), -1, None
    for state in states:
        tokens = _tokens(state, row)
        last = state.step == state.steps
        if drawing and (last or time.monotonic() - drawn_at >= every):
            lines = _draw(stream, state, tokens, shown, text, mask_id, lines)
            shown, drawn_at = tokens, time.monotonic()
        elif not drawing and (last or 10 * state.step // state.steps > tenth):
            tenth = 10 * state.step // state.steps
            line = "".join(MASK if token == mask_id else _printable(_told(text, token)) for token in tokens)
            stream.write(f"{_place(state)}: {line}\n")
            stream.flush()
        yield state
    if drawing and state is not None and shown != (tokens := _tokens(state, row)):
        _draw(stream, state, tokens, shown, text, mask_id, lines)  # the loop was ended between two frames


def _draw(
    stream: TextIO,
    state: State,
    tokens: list[int],
    before: list[int] | None,
    text: Text,
    mask_id: int | None,
    lines: int,
) -> int:
    """Draw a frame over the last one, which had so many lines; returns how many this one has."""
    width, height = _size(stream)
    place = _place(state)[:width]
    bar = max(0, min(20, width - len(place) - 1))
    filled = round(bar * state.step / max(state.steps, 1))
    frame = [f"{_BOLD}{place}{_PLAIN} {'█' * filled}{_DIM}{'█' * (bar - filled)}{_PLAIN}", ""]
    used, room = 0, height - 2
    for i, token in enumerate(tokens):
        masked = token == mask_id
        style = _DIM if masked else _FRESH if before is not None and before[i] != token else ""
        for character in MASK if masked else _printable(_told(text, token)):
            columns = _columns(character)
            if used + columns > width:
                frame.append("")
                used = 0
            frame[-1] += f"{style}{character}{_PLAIN}" if style else character
            used += columns
    if len(frame) - 1 > room:
        frame = [*frame[:room], f"{_DIM}… {len(frame) - room} more lines{_PLAIN}"]
    up = f"\x1b[{lines}A" if lines else ""
    stream.write(up + "\r\x1b[J" + "\n".join(frame) + "\n")
    stream.flush()
    return len(frame)


def _size(stream: TextIO) -> tuple[int, int]:
    try:
        size = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError):
        size = shutil.get_terminal_size()
    return max(size.columns, 20), max(size.lines, 4)


def _place(state: State) -> str:
    return f"step {state.step:{len(str(state.steps))}d}/{state.steps}  t = {state.t:.3f}"


def _printable(characters: str) -> str:
    """Nothing that would move the cursor: line ends and tabs as signs, other control characters as a question mark."""
    shown = characters.replace("\r\n", "\n").translate({10: "⏎", 13: "⏎", 9: "⇥"})
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in shown)


def _told(text: Text, token: int) -> str:
    """A token's characters, or its number where they cannot be had: a view must not lose a sample."""
    try:
        return str(text(token))
    except Exception:
        return f"<{token}>"


def _columns(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _tokens(state: State, row: int) -> list[int]:
    if not 0 <= row < len(state.x):
        raise ValueError(f"there is no sequence {row} in a batch of {len(state.x)}")
    tokens: list[int] = state.x[row].tolist()
    return tokens


def record(
    states: Iterable[State],
    path: str | os.PathLike[str],
    text: Text,
    *,
    mask_id: int | None = None,
    given: Tensor | None = None,
    rows: int = 4,
    title: str = "A sample, step by step",
) -> Iterator[State]:
    """States as they pass; at the end a page is written, one file without any other, to step through them.

    The page keeps the first state and every change after it. It is written also when the loop is left early.

    Args:
        states: what `trajectory` yields.
        path: the HTML file.
        text: the characters of a token.
        mask_id: the graph's mask, shown as a block; None when there is none.
        given: (B, L) bool, the prompt's positions, underlined.
        rows: how many sequences of the batch to keep, the first ones.
        title: of the page.

    Yields:
        The states.

    Raises:
        ValueError: `rows` is not positive.
        OSError: the file cannot be written, before anything is sampled. If it cannot be at the end, that is a warning.
    """
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    with open(path, "a", encoding="utf-8"):  # before anything is sampled
        pass
    record: dict[str, Any] = {"t": [], "start": [], "changes": [], "mask": mask_id}
    before: Tensor | None = None
    try:
        for state in states:
            x = state.x[:rows].cpu()
            record["t"].append(state.t)
            if before is None:
                record["start"] = x.tolist()
            else:
                b, i = (x != before).nonzero(as_tuple=True)
                record["changes"].append([b.tolist(), i.tolist(), x[b, i].tolist()])
            before = x
            yield state
    finally:
        if before is not None:
            seen = {token for row in record["start"] for token in row}
            seen.update(token for _, _, tokens in record["changes"] for token in tokens)
            record["text"] = {token: _told(text, token) for token in sorted(seen) if token != mask_id}
            record["given"] = [] if given is None else given[:rows].int().tolist()
            try:
                Path(path).write_text(_page(title, record), encoding="utf-8")
            except OSError as error:  # the samples are worth more than the page
                warnings.warn(f"the page {path} could not be written: {error}", stacklevel=2)


def _page(title: str, record: dict[str, Any]) -> str:
    data = json.dumps(record, separators=(",", ":")).replace("<", "\\u003c")  # nothing in a token can end the script
    return _PAGE.replace("{title}", html.escape(title)).replace("{data}", data)


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  :root { color-scheme: light dark; font: 16px/1.6 system-ui, sans-serif; }
  body { max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }
  h1 { font-size: 1.2rem; font-weight: 600; }
  nav { display: flex; flex-wrap: wrap; gap: .2rem .8rem; align-items: center; padding: .6rem 0;
        position: sticky; top: 0; background: Canvas; }
  button { font: inherit; min-width: 4.5rem; }
  input[type=range] { flex: 1 1 12rem; min-height: 1.8rem; }
  output { min-width: 13rem; font-variant-numeric: tabular-nums; }
  p { font-family: ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
      border-top: 1px solid #8886; padding-top: .8rem; }
  footer { color: GrayText; font-size: .85rem; }
  .mask { display: inline-block; opacity: .4; }
  .given { text-decoration: underline; text-underline-offset: .25em; text-decoration-color: #888; }
  .fresh { background: #ffd54a; color: #000; border-radius: .2em; }
</style>
<h1>{title}</h1>
<nav>
  <button type="button" id="play">Play</button>
  <input type="range" id="step" min="0" value="0" aria-label="step" autofocus>
  <output id="place" for="step"></output>
</nav>
<main></main>
<footer>Arrow keys step, Home and End go to noise and text, the space bar plays.</footer>
<script type="application/json" id="data">{data}</script>
<script>
  const data = JSON.parse(document.getElementById("data").textContent);
  const slider = document.getElementById("step"), play = document.getElementById("play");
  const steps = data.changes.length;
  slider.max = steps;
  const spans = data.start.map((row, b) => {
    const p = document.querySelector("main").appendChild(document.createElement("p"));
    return row.map((_, i) => {
      const span = p.appendChild(document.createElement("span"));
      if (data.given.length && data.given[b][i]) span.classList.add("given");
      return span;
    });
  });
  let x = [], at = -1;
  const put = (b, i, token) => {
    const masked = token === data.mask, span = spans[b][i];
    x[b][i] = token;
    span.textContent = masked ? "\\u2591" : data.text[token];
    span.classList.toggle("mask", masked);
  };
  function show(step) {
    if (at < 0 || step < at) {
      x = data.start.map(row => row.slice());
      x.forEach((row, b) => row.forEach((token, i) => put(b, i, token)));
      at = 0;
    }
    document.querySelectorAll(".fresh").forEach(span => span.classList.remove("fresh"));
    for (; at < step; at++) {
      const [rows, positions, tokens] = data.changes[at];
      rows.forEach((b, k) => put(b, positions[k], tokens[k]));
    }
    if (step > 0) {
      const [rows, positions] = data.changes[step - 1];
      rows.forEach((b, k) => spans[b][positions[k]].classList.add("fresh"));
    }
    slider.value = step;
    const said = `step ${step} of ${steps}, t = ${data.t[step].toFixed(3)}`;
    document.getElementById("place").textContent = said;
    slider.ariaValueText = said;
  }
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; play.textContent = "Play"; };
  play.onclick = () => {
    if (timer) return stop();
    if (+slider.value === steps) show(0);
    play.textContent = "Pause";
    const next = () => +slider.value < steps ? show(+slider.value + 1) : stop();
    timer = setInterval(next, Math.max(30, 8000 / (steps + 1)));
  };
  slider.oninput = () => { stop(); show(+slider.value); };
  slider.onkeydown = event => {
    if (event.key !== " ") return;
    event.preventDefault();
    play.click();
  };
  show(0);
</script>
</html>
"""
