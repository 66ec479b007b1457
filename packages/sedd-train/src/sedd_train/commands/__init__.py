"""The command `sedd`, of which each module here is one word: `sedd train --help`, `sedd sample --help`, ...

Under a launcher it is a module: `deepspeed --module sedd_train train ...`, `torchrun ... -m sedd_train train ...`.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

__all__ = ["main"]

COMMANDS = {
    "train": "train a model on text",
    "finetune": "train on from a checkpoint, on your own text",
    "plan": "say what a run would do and hold, without training",
    "sample": "write text with a trained model",
    "infill": "fill the blanks of a text",
    "evaluate": "bound the likelihood of held-out text: nats a token, perplexity, bits a character",
    "lm-eval": "run tasks of lm-evaluation-harness",
    "tables": "fill the paper's likelihood tables: train and measure every system",
    "report": "write a run's page, also while it is under way",
    "export": "write the model of a run as a folder that can be loaded anywhere",
}
USAGE = """\
usage: sedd COMMAND [options]

Discrete diffusion language models by score entropy.

{commands}

sedd COMMAND --help explains the command; sedd --print-completion bash (or zsh, tcsh) prints what completes them
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the first word names; ends the process with 2 where there is none of that name."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0].startswith("--local_rank"):  # the deepspeed launcher puts it first
        words.pop(0)
    listed = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    usage = USAGE.format(commands=listed)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage, end="")
    elif words[0] == "--version":
        print(import_module("sedd_train").__version__)
    elif words[0] == "--print-completion":
        print(_completion(words[1:]))
    elif words[0] in COMMANDS:
        _command(words[0]).main(words[1:])
    else:
        begun = [name for name in COMMANDS if name.startswith(words[0])]
        near = begun or difflib.get_close_matches(words[0], COMMANDS, n=1)
        meant = f"; did you mean `sedd {near[0]}`?" if near else ""
        print(f"sedd: error: there is no command {words[0]!r}{meant}\n\n{usage}", end="", file=sys.stderr)
        sys.exit(2)


def _command(name: str) -> Any:
    return import_module(f"sedd_train.commands.{name.replace('-', '_')}")


def _completion(shell: Sequence[str]) -> str:
    """The script that teaches a shell the commands and their options."""
    import shtab

    if len(shell) != 1 or shell[0] not in shtab.SUPPORTED_SHELLS:
        print(f"sedd: error: --print-completion takes one of {', '.join(shtab.SUPPORTED_SHELLS)}", file=sys.stderr)
        sys.exit(2)
    whole = argparse.ArgumentParser(prog="sedd")
    words: Any = whole.add_subparsers()
    for name, text in COMMANDS.items():
        options = _command(name).parser()
        options.add_help = False
        words.add_parser(name, help=text, parents=[options], conflict_handler="resolve", add_help=False)
    return str(shtab.complete(whole, shell=shell[0]))
