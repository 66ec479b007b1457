"""What a rank does with its text when a run starts: python starts_as_a_rank.py CORPUS CACHE. Writes what it read.

Read are the files that it asked the system for, and of files that it mapped the pages that it touched.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from sedd_train import distributed, provenance, recipes, token_cache, tokens

corpus, cache = sys.argv[1:3]
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


token_cache._checksum = noted(token_cache._checksum)
tokens.counted = noted(tokens.counted)
values = {"corpus": corpus, "tokenizer": "bytes", "length": 64, "batch_size": 64}
recipe = recipes.override(recipes.read_recipe("tiny"), values)
distributed.start()
before, begun = asked_so_far(), time.monotonic()
text = provenance.text_of(recipe, None, None, Path(cache), stop=lambda: False)
text.check_length(recipe.length)
text.train.counts(300)
text.train.block([0, text.train.blocks(64) - 1], 64)
seconds = time.monotonic() - begun
asked = asked_so_far() - before
mapped, name = 0, ""
for line in Path("/proc/self/smaps").read_text().splitlines():
    if re.match(r"[0-9a-f]+-", line):
        name = line
    elif line.startswith("Rss:") and name.endswith("train.bin"):
        mapped += int(line.split()[1]) * 1024
rank, _ = distributed.place()
found = {"rank": rank, "asked": asked, "mapped": mapped, "summed": sum(summed), "seconds": round(seconds, 2)}
Path(cache, f"rank-{rank}.json").write_text(json.dumps({**found, "fingerprint": text.fingerprint}))
distributed.finish()
