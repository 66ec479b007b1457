"""The code behind the API's pages: a link each, to a page for each module that has a name for every line.

A hook of MkDocs. Printed under each function and once more under its class, the same lines made a page of megabytes.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

CODE = re.compile(
    r'<details class="mkdocstrings-source">\s*<summary>Source code in <code>packages/[\w-]+/src/([\w/]+\.py)</code>'
    r'</summary>.*?class="normal">\s*(\d+)<.*?</details>',
    re.DOTALL,
)
PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<title>{name}</title>
<style>
a {{ color: gray; text-decoration: none; display: inline-block; min-width: 4ch }}
:target {{ font-weight: bold; outline: thin solid }}
</style>
</head>
<body>
<h1>{name}</h1>
<pre>{lines}</pre>
</body>
</html>
"""


def on_page_content(content: str, page: Any, **_: object) -> str:
    """The page with links in the place of the code."""
    top = "../" * page.url.count("/")

    def link(found: re.Match[str]) -> str:
        file, line = found.groups()
        return f'<p><a href="{top}source/{file}.html#L{line}">Source: {file}, line {line}</a></p>'

    return CODE.sub(link, content)


def on_post_build(config: Any, **_: object) -> None:
    """Write a page for each module."""
    for source in sorted(Path(config.config_file_path).parent.glob("packages/*/src")):
        for path in sorted(source.rglob("*.py")):
            name = path.relative_to(source).as_posix()
            target = Path(config.site_dir) / "source" / f"{name}.html"
            target.parent.mkdir(parents=True, exist_ok=True)
            lines = [
                f'<a id="L{number}" href="#L{number}">{number}</a> {html.escape(line, quote=False)}'
                for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            ]
            target.write_text(PAGE.format(name=name, lines="\n".join(lines)), encoding="utf-8")
