r"""Formulas of the pages, $...$ and $$...$$, drawn when the site is built: no script, font or other page is needed.

A hook of MkDocs. The extension arithmatex finds the formulas, and leaves code and sums of money alone; matplotlib,
which draws the pictures, too, sets them; they become outlines in the colour of the text. Their source is what a screen
reader is told.
"""

from __future__ import annotations

import html
import re

from matplotlib.font_manager import FontProperties
from matplotlib.path import Path
from matplotlib.textpath import TextPath, text_to_path

FOUND = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
NUMBER = re.compile(r"\s*\\tag\{(.*?)\}")
FONT = FontProperties(math_fontfamily="cm", size=100)  # units of a hundredth of an em
LETTERS: dict[int, str] = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C"}


def on_page_content(content: str, **_: object) -> str:
    """The page with its formulas drawn."""
    return FOUND.sub(drawn, content)


def drawn(found: re.Match[str]) -> str:
    """One formula: within a line, or on a line of its own with its number."""
    source = html.unescape(found[2]).strip()
    if found[1] == "span":
        return outline(source)
    number = NUMBER.search(source)
    named = f"<span>({number[1]})</span>" if number else ""
    source = NUMBER.sub("", source).replace(r"\frac", r"\dfrac")  # as TeX sets them on a line of their own
    return f'<div class="formula">{outline(source)}{named}</div>'


def outline(source: str) -> str:
    """A formula as an SVG that stands on the line."""
    text = f"${' '.join(source.split())}$"
    width, height, depth = text_to_path.get_text_width_height_descent(text, FONT, ismath=True)
    lines = []
    for points, code in TextPath((0, 0), text, prop=FONT).iter_segments(curves=True, simplify=False):
        if code == Path.CLOSEPOLY:
            lines.append("Z")
            continue
        flipped = [y if i % 2 == 0 else height - depth - y for i, y in enumerate(points)]
        lines.append(LETTERS[code] + " ".join(f"{y:.0f}" for y in flipped))
    return (
        f'<svg class="math" role="img" aria-label="{html.escape(source)}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'style="width:{width / 100:.2f}em;vertical-align:{-depth / 100:.2f}em"><path d="{"".join(lines)}"/></svg>'
    )
