"""The documentation's code runs as printed, its links lead somewhere, and its API pages name every module."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
WITH_CODE = [page for page in PAGES if "```python\n" in page.read_text()]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_python_blocks_run(page: Path) -> None:
    torch.manual_seed(0)
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        exec(compile(block, str(page), "exec"), {"__name__": "page"})


def test_a_network_of_your_own_takes_forty_lines_at_most() -> None:
    """From the text to a filled gap, without blank lines and imports."""
    [block] = re.findall(r"```python\n(.*?)```", (DOCS / "tutorials/your-network.md").read_text(), flags=re.DOTALL)
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
