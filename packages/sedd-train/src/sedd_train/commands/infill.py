"""Fill the blanks of a text with a trained score model, one token an underscore.

sedd infill --checkpoint runs/tiny/export "The state of the ____ is ________."
sedd infill --checkpoint runs/tiny/export "____ citizens of the ______" --num 4 --temperature 0.8
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from torch import Tensor

from sedd_train.commands import sample
from sedd_train.commands.options import Options

__all__ = ["parser", "main"]


def parser(prog: str = "sedd infill") -> argparse.ArgumentParser:
    """The options."""
    made = Options(
        prog=prog,
        description=__doc__,
        epilog=sample.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sample.add_checkpoint(made)
    made.add_argument(
        "text", metavar="TEXT", help=r'one underscore for each free token: "The ____ of the Union"; \_ is an underscore'
    )
    sample.add_drawing(made)
    made.set_defaults(prefix="", suffix="", length=None)
    return made


def main(argv: Sequence[str] | None = None, *, prog: str = "sedd infill") -> Tensor:
    """Fill in and print; also returns the samples, (B, L)."""
    return sample.draw(parser(prog), argv)
