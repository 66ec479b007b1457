"""The tutorials as notebooks, from their pages: what is marked `python` becomes cells to run, the rest is text.

python docs/notebooks.py FOLDER             writes them
python docs/notebooks.py FOLDER --execute   and runs each from top to bottom; the first error ends it
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

TUTORIALS = Path(__file__).parent / "tutorials"


def main(argv: Sequence[str] | None = None) -> None:
    """Write the notebooks, and run them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--execute", action="store_true", help="run them, and keep what they print and draw")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    for page in sorted(TUTORIALS.glob("*.md")):
        book = notebook(page.read_text(encoding="utf-8"))
        if args.execute:
            NotebookClient(book, timeout=600, resources={"metadata": {"path": str(args.folder)}}).execute()
        path = args.folder / f"{page.stem}.ipynb"
        nbformat.write(book, path)
        print(path, flush=True)


def notebook(page: str) -> nbformat.NotebookNode:
    """The cells of a page."""
    cells = []
    for i, part in enumerate(re.split(r"```python\n(.*?)```\n?", page, flags=re.DOTALL)):
        if i % 2:
            cells.append(new_code_cell(part.rstrip("\n")))
        elif part.strip():  # references that only the site resolves are left as their words
            cells.append(new_markdown_cell(re.sub(r"\[([^\]]+)\]\[[\w.]+\]", r"\1", part).strip("\n")))
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"  # the same at every writing
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel})


if __name__ == "__main__":
    main()
