"""Write the model of a run's last checkpoint as a folder that can be loaded, sent to somebody or uploaded.

sedd export runs/mine my-model            config.json, model.safetensors and the tokenizer
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sedd_train import load_trained, storage
from sedd_train.commands.options import Options

__all__ = ["parser", "main"]


def parser(prog: str = "sedd export") -> argparse.ArgumentParser:
    """The options."""
    made = Options(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("checkpoint", help="a run, also one under way, or any folder or name that can be loaded")
    made.add_argument("output", type=Path, help="the folder to write; it must not exist yet, or be empty")
    return made


def main(argv: Sequence[str] | None = None, *, prog: str = "sedd export") -> None:
    """Write the folder and print where it is."""
    options = parser(prog)
    args = options.parse_args(argv)
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        options.exit(2, f"{options.prog}: error: {args.output} exists and is not empty: choose another folder\n")
    try:
        storage.check_output(args.output, folder=True)
        net, _, tokenizer = load_trained(args.checkpoint)
        net.save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)
    except (ValueError, OSError) as error:
        options.exit(2, f"{options.prog}: error: {error}\n")
    print(args.output)
