"""Begins runs in processes of their own, which have imported everything: a start takes a second, not ten.

Reads lines of JSON, [options, file]: the options of `sedd train`, and where that process prints. Answers with its
number, in whose group it is alone, and with its exit code, or minus the signal that ended it, once it has ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys

import transformers
from deepspeed.runtime.zero.muon import muon_optimizer
from sedd_train.commands import train

IMPORTED = (muon_optimizer, transformers.PreTrainedTokenizerFast)  # for the children; with the first torch's compiler


def begin(options: list[str], printed: str) -> int:
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
    train.main(options)
    sys.exit()


if __name__ == "__main__":
    for line in sys.stdin:
        number = begin(*json.loads(line))
        print(number, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]), flush=True)
