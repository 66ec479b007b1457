"""The documentation's code runs as printed, its links lead somewhere, and its API pages name every module."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(DOCS)
    check_site: Any = importlib.import_module("check_site")
    formulas: Any = importlib.import_module("formulas")
    sources: Any = importlib.import_module("sources")
PAGES = sorted(DOCS.rglob("*.md"))
WITH_CODE = [page for page in PAGES if "```python\n" in page.read_text()]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_python_blocks_run(page: Path) -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "page"}  # a block may go on from those above it, as in a notebook
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        exec(compile(block, str(page), "exec"), names)


def test_a_network_of_your_own_takes_forty_lines_at_most() -> None:
    """From the text to a filled gap, without blank lines and imports."""
    block, _ = re.findall(r"```python\n(.*?)```", (DOCS / "tutorials/your-network.md").read_text(), flags=re.DOTALL)
    lines = [line for line in block.splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(lines) <= 40


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:|img/)([^)#]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("name", ["graphs", "objectives", "nets", "samplers", "train"])
def test_every_module_is_in_the_reference(name: str) -> None:
    source = ROOT / f"packages/sedd-{name}/src/sedd_{name}"
    modules = {path.stem for path in source.glob("[!_]*.py")}
    folders = {path.parent.name for path in source.glob("*/__init__.py")} - {"fast"}  # which no one needs to read first
    named = set(re.findall(rf"::: sedd_{name}\.(\w+)$", (DOCS / f"api/{name}.md").read_text(), flags=re.MULTILINE))
    assert named == modules | folders


LAID_OUT = {
    "index.html": '<script src="a.js"></script><article><a href="b.html">b</a></article><a href="far.html">',
    "b.html": '<article><a href="c.html#here">c</a></article>',
    "c.html": '<article id="here"><a href="far.html">far</a></article>',
    "far.html": "",
}


def laid_out(folder: Path, pages: dict[str, str]) -> Path:
    for name, text in pages.items():
        (folder / name).write_text(text)
    return folder


def test_the_site_s_check_counts_clicks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the links of a page's text: those of the lists around it do not count."""
    monkeypatch.setattr(check_site, "WANTED", {"it": "c.html#here"})
    assert check_site.faults(laid_out(tmp_path, LAID_OUT)) == []
    monkeypatch.setattr(check_site, "WANTED", {"it": "far.html"})
    assert check_site.faults(tmp_path) == ["it (far.html) is more than two clicks from index.html"]


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ('<script src="https://cdn.example/x.js"></script>', "loads https://cdn.example/x.js"),
        ('<link rel="stylesheet" href="//fonts.example/a.css">', "loads //fonts.example/a.css"),
        ('<span class="arithmatex">\\(x\\)</span>', "has a formula that was not drawn"),
        ("x" * 1_000_001, "has 1,000,001 bytes, more than 1,000,000"),
        ('<article><a href="gone.html">', "leads to gone.html, which is not there"),
        ('<article><a href="c.html#there">', "leads to c.html#there, and that page has no such place"),
    ],
)
def test_the_site_s_check_finds(page: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_site, "WANTED", {})
    assert check_site.faults(laid_out(tmp_path, {**LAID_OUT, "b.html": page})) == [f"b.html {said}"]


def test_a_style_sheet_loads_nothing_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_site, "WANTED", {})
    laid_out(tmp_path, {**LAID_OUT, "a.css": "a{background:url('https://x.example/y.png')}b{background:url(data:,)}"})
    assert check_site.faults(tmp_path) == ["a.css loads https://x.example/y.png"]


def test_formulas_are_drawn_as_outlines() -> None:
    inside, alone = (
        '<span class="arithmatex">\\(x_0 &lt; 1\\)</span>',
        '<div class="arithmatex">\\[y = x \\tag{3}\\]</div>',
    )
    drawn = formulas.on_page_content(f"<p>of {inside}</p>{alone}")
    assert drawn.count("<svg") == 2
    assert 'aria-label="x_0 &lt; 1"' in drawn
    assert drawn.endswith("<span>(3)</span></div>")
    assert "tag" not in drawn
    with pytest.raises(ValueError, match="Unknown symbol"):
        formulas.outline(r"\nosuchthing")


def test_code_is_linked_to_a_name_for_each_line(tmp_path: Path) -> None:
    """The links of an API page lead to the line where the object begins, in a page of its module."""
    code = """<p>a</p><details class="mkdocstrings-source">
        <summary>Source code in <code>packages/sedd-nets/src/sedd_nets/fast/tied_head.py</code></summary>
        <pre><span></span><span class="normal"> 7</span>
<span class="normal"> 8</span></pre><code>def f</code></details><p>b</p>"""
    linked = sources.on_page_content(code, SimpleNamespace(url="api/nets.html"))
    to = "sedd_nets/fast/tied_head.py"
    assert linked == f'<p>a</p><p><a href="../source/{to}.html#L7">Source: {to}, line 7</a></p><p>b</p>'
    package = tmp_path / "packages" / "a" / "src" / "b"
    package.mkdir(parents=True)
    (package / "c.py").write_text("x = 1 < 2\n\ny = 3\n")
    sources.on_post_build(SimpleNamespace(config_file_path=str(tmp_path / "mkdocs.yml"), site_dir=str(tmp_path)))
    page = (tmp_path / "source" / "b" / "c.py.html").read_text()
    assert "<title>b/c.py</title>" in page
    assert '<pre><a id="L1" href="#L1">1</a> x = 1 &lt; 2\n<a id="L2" href="#L2">2</a> \n<a id="L3"' in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_formula_can_be_drawn(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for formula in re.findall(r"\$\$.*?\$\$|\$[^$\n]+?\$", text, flags=re.DOTALL):
        formulas.outline(formulas.NUMBER.sub("", formula.strip("$")))
