"""Begins runs in processes of their own, which have imported everything: a start takes a second, not ten.

Reads lines of JSON, [options, file, step]: the options of `sedd train`, where that process prints, and the step at
which it waits until there is a file with ".go" behind that one's name. Answers with its number, in whose group it is
alone, and with its exit code, or minus the signal that ended it, once it has ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import held
import transformers
from deepspeed.runtime.zero.muon import muon_optimizer
from sedd_train.commands import train

IMPORTED = (muon_optimizer, transformers.PreTrainedTokenizerFast)  # for the children; with the first torch's compiler


def begin(options: list[str], printed: str, step: int) -> int:
    """Returns to the process that asked alone."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    signal.alarm(300)  # ends one that hangs
    file = os.open(printed, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    held.hold(step, Path(f"{printed}.go"))
    train.main(options)
    sys.exit()


if __name__ == "__main__":
    for line in sys.stdin:
        number = begin(*json.loads(line))
        print(number, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]), flush=True)
