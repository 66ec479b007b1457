"""Write the report of a run, also of one that is under way: one HTML file that needs no other.

sedd report runs/tiny
sedd report runs/tiny --output tiny.html
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sedd_train import report, storage
from sedd_train.commands.options import Options

__all__ = ["parser", "main"]


def parser(prog: str = "sedd report") -> argparse.ArgumentParser:
    """The options."""
    made = Options(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("run", type=Path, help="the folder of the run")
    made.add_argument("--output", type=Path, metavar="FILE", help="(default: report.html in the run's folder)")
    return made


def main(argv: Sequence[str] | None = None, *, prog: str = "sedd report") -> None:
    """Write the page and print where it is."""
    options = parser(prog)
    args = options.parse_args(argv)
    path = args.output or args.run / "report.html"
    try:
        storage.check_output(path)
        path.write_text(report.page(args.run), encoding="utf-8")
    except (ValueError, OSError) as error:
        options.exit(2, f"{options.prog}: error: {error}\n")
    print(path)
