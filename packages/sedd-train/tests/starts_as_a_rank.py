"""What a rank does with its text when a run starts: python starts_as_a_rank.py CORPUS CACHE. Writes what it read.

Read are the files that it asked the system for, and of files that it mapped the pages that it touched.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import transformers
from sedd_train import distributed, provenance, recipes, token_cache, tokens

corpus, cache = sys.argv[1:3]
assert transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast  # are read now, and counted as none of it
summed = []
checksum = token_cache._checksum
token_cache._checksum = lambda flat: summed.append(flat.nbytes) or checksum(flat)
counted = tokens.counted
tokens.counted = lambda flat: summed.append(flat.nbytes) or counted(flat)
values = {"corpus": corpus, "tokenizer": "bytes", "length": 64, "batch_size": 64}
recipe = recipes.override(recipes.read_recipe("tiny"), values)
distributed.start()
before, begun = int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1]), time.monotonic()
text = provenance.text_of(recipe, None, None, Path(cache), stop=lambda: False)
text.check_length(recipe.length)
text.train.counts(300)
text.train.block([0, text.train.blocks(64) - 1], 64)
seconds = time.monotonic() - begun
asked = int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1]) - before
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
