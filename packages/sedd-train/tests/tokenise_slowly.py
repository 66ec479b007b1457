"""Tokenises a corpus, saving at every batch, in a child for each line that it reads. To be killed.

python tokenise_slowly.py CORPUS CACHE TOKENIZER PAUSE

A child says its number when it begins, and the fingerprint at its end; after every batch it pauses for so many seconds,
so that there is time to kill it often. One whose line says "kill" waits for that when all is written but not published.
This process, which has imported everything for it, says when it has ended.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

from sedd_train import coding, token_build, token_cache


def paused() -> bool:
    """Whether to stop: never. The build asks twice a batch."""
    time.sleep(float(pause) / 2)
    return False


def held(*_: Any) -> None:
    """Wait to be killed."""
    while True:
        time.sleep(1)


if __name__ == "__main__":
    corpus, cache, tokenizer, pause = sys.argv[1:]
    token_build.JOURNAL_EVERY, coding.BATCH, coding.ALONE = 0.0, 20_000, 2
    coding.cores = lambda: 2
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            if line.strip() == "kill":
                mock.patch("sedd_train.token_build.identity", held).start()  # is asked for when all is written
            print(os.getpid(), flush=True)
            print(token_cache.prepare(corpus, tokenizer, Path(cache), stop=paused).fingerprint)
            sys.exit()
        os.waitpid(child, 0)
        print("ended", flush=True)
