"""What ranks do with their text when a run starts, each in a process: python starts_as_ranks.py CORPUS CACHE RANKS.

They meet at MASTER_PORT. They are children of this one process, which has imported everything: so many that start by
themselves would need half a gigabyte each. Read are the files that a rank asked the system for, and of files that it
mapped the pages that it touched.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import transformers
from sedd_train import distributed, provenance, recipes, token_cache, tokens

for name in ("AutoTokenizer", "PreTrainedTokenizerFast"):
    getattr(transformers, name)  # are read now, and counted as none of it
summed: list[int] = []


def noted(plain: Callable[[Any], Any]) -> Any:
    """The same, and how many bytes it was given goes into `summed`."""

    def call(flat: Any) -> Any:
        summed.append(flat.nbytes)
        return plain(flat)

    return call


def asked_so_far() -> int:
    """The bytes that this process asked the system for."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def private() -> int:
    """The bytes of memory that this process shares with no other."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private_"))


def mapped(ending: str) -> int:
    """How many bytes of the files whose names end so this process has touched."""
    size, name = 0, ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-", line):
            name = line
        elif line.startswith("Rss:") and name.endswith(ending):
            size += int(line.split()[1]) * 1024
    return size


def rank_reads(corpus: str, cache: str) -> dict[str, Any]:
    """The text of a run as a rank has it, of which it looks at the first and the last block."""
    values = {"corpus": corpus, "tokenizer": "bytes", "length": 64, "batch_size": 64}
    recipe = recipes.override(recipes.read_recipe("tiny"), values)
    distributed.start()
    before, begun = asked_so_far(), time.monotonic()
    text = provenance.text_of(recipe, None, None, Path(cache), stop=lambda: False)
    text.check_length(recipe.length)
    text.train.counts(300)
    text.train.block([0, text.train.blocks(64) - 1], 64)
    seconds, asked = round(time.monotonic() - begun, 2), asked_so_far() - before
    found = {"asked": asked, "mapped": mapped("train.bin"), "summed": sum(summed), "seconds": seconds}
    return found | {"fingerprint": text.fingerprint, "private": private()}


def be_rank(rank: int, ranks: int) -> None:
    """Never returns."""
    code = 1
    try:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1"}
        found = rank_reads(*sys.argv[1:3])
        Path(sys.argv[2], f"rank-{rank}.json").write_text(json.dumps({"rank": rank} | found))
        distributed.finish()
        code = 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)


if __name__ == "__main__":
    assert deepspeed.__version__  # imported for its children
    ranks = int(sys.argv[3])
    token_cache._checksum = noted(token_cache._checksum)
    tokens.counted = noted(tokens.counted)
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            be_rank(rank, ranks)
        children.append(child)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children))
