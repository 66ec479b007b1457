"""Say what a run would do and what each rank would hold, for every ZeRO stage, without training.

sedd plan                          the paper's SEDD small on this machine
sedd plan 64 --recipe tiny         on 64 ranks
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sedd_train.commands import train

__all__ = ["parser", "main"]


def parser(prog: str = "sedd plan") -> argparse.ArgumentParser:
    """The options: the number of ranks, and those of `train`."""
    made = train.parser(prog)
    made.description = __doc__
    made.add_argument("ranks", type=int, nargs="?", default=1, help="how many ranks (default: %(default)s)")
    return made


def main(argv: Sequence[str] | None = None, *, prog: str = "sedd plan") -> None:
    """Print the plan."""
    args = parser(prog).parse_args(argv)
    args.plan = args.ranks
    train.run(args, prog=prog)
