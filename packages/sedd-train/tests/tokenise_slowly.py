"""Tokenises a corpus, saving at every batch: python tokenise_slowly.py CORPUS CACHE TOKENIZER. To be killed."""

from __future__ import annotations

import sys
from pathlib import Path

from sedd_train import coding, token_build, token_cache

corpus, cache, tokenizer = sys.argv[1:]
token_build.JOURNAL_EVERY, coding.BATCH, coding.ALONE = 0.0, 20_000, 2
coding.cores = lambda: 2
print("begins", flush=True)
print(token_cache.prepare(corpus, tokenizer, Path(cache)).fingerprint)
