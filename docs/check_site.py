"""What a built site must keep: nothing is loaded from elsewhere, formulas are drawn, links and anchors lead somewhere,
and from the first page whatever a newcomer looks for is two clicks away.

python docs/check_site.py build/site
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from posixpath import dirname, join, normpath

START = "index.html"
WANTED = {
    "my own graph": "tutorials/your-graph.html",
    "my own network": "tutorials/your-network.html",
    "a model from the hub": "tutorials/a-model-you-have.html",
    "fine-tuning": "tutorials/train.html#from-a-checkpoint",
    "multi-node": "tutorials/train.html#one-gpu-to-a-cluster",
    "a bound": "choosing.html#a-bound",
    "a prompt in the middle": "tutorials/infill.html",
    "an equation": "equations.html",
    "numbers to compare with": "numbers.html",
}
ELSEWHERE = ("http:", "https:", "//")
HEAVIEST = 1_000_000  # bytes of a page, which a phone reads in a second
LOADING = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "modulepreload", "manifest"}


@dataclass
class Page(HTMLParser):
    """What stands in a page.

    Attributes:
        loaded: addresses that a browser fetches to show it.
        links: where its own text leads, without the lists around it.
        names: the anchors.
    """

    loaded: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    _inside: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what the tag loads, where it leads and what it is called."""
        given = {name: value or "" for name, value in attrs}
        self._inside = self._inside or tag == "article"
        self.names |= {given[name] for name in ("id", "name") if name in given}
        self.loaded += [given[name] for name in ("src", "srcset", "poster", "data") if name in given]
        if tag == "link" and LOADING & set(given.get("rel", "").split()):
            self.loaded.append(given.get("href", ""))
        if tag == "a" and self._inside and "href" in given:
            self.links.append(given["href"])

    def handle_endtag(self, tag: str) -> None:
        """Note where the page's own text ends."""
        self._inside = self._inside and tag != "article"


def faults(site: Path) -> list[str]:
    """What is wrong with a site, in words; nothing where all is well."""
    pages: dict[str, Page] = {}
    found = []
    for path in sorted(site.rglob("*.html")):
        name, text = path.relative_to(site).as_posix(), path.read_text(encoding="utf-8")
        pages[name] = page = Page()
        page.feed(text)
        found += [f"{name} loads {address}" for address in page.loaded if address.startswith(ELSEWHERE)]
        if len(text.encode()) > HEAVIEST:
            found.append(f"{name} has {len(text.encode()):,} bytes, more than {HEAVIEST:,}")
        if 'class="arithmatex"' in text:
            found.append(f"{name} has a formula that was not drawn")
    for path in sorted(site.rglob("*.css")):
        for address in re.findall(r"url\(['\"]?(.*?)['\"]?\)|@import\s+['\"](.*?)['\"]", path.read_text("utf-8")):
            found += [f"{path.relative_to(site)} loads {part}" for part in address if part.startswith(ELSEWHERE)]
    for name, page in pages.items():
        for link in page.links:
            target, _, anchor = resolved(name, link).partition("#")
            if link.startswith((*ELSEWHERE, "mailto:")) or name == "404.html":
                continue
            if target not in pages and not (site / target).exists():
                found.append(f"{name} leads to {link}, which is not there")
            elif anchor and target in pages and anchor not in pages[target].names:
                found.append(f"{name} leads to {link}, and that page has no such place")
    clicks = distances(pages)
    for what, target in WANTED.items():
        if clicks.get(target, 3) > 2:
            found.append(f"{what} ({target}) is more than two clicks from {START}")
    return found


def distances(pages: dict[str, Page]) -> dict[str, int]:
    """How many clicks lead from the first page to each place, by the links of the pages' own text."""
    clicks, border = {START: 0}, [START]
    while border:
        place = border.pop(0)
        page = place.partition("#")[0]
        for link in pages[page].links if page in pages else ():
            target = resolved(page, link)
            for reached in (target, target.partition("#")[0]):
                if reached not in clicks:
                    clicks[reached] = clicks[place] + 1
                    border.append(reached)
    return clicks


def resolved(page: str, link: str) -> str:
    """Where a link of a page leads, from the site's root."""
    target, mark, anchor = link.partition("#")
    return (normpath(join(dirname(page), target)) if target else page) + mark + anchor


if __name__ == "__main__":
    wrong = faults(Path(sys.argv[1]))
    print("\n".join(wrong) or "nothing from elsewhere, no formula undrawn, no link astray, all within two clicks")
    sys.exit(bool(wrong))
