"""The start of a run on many processes: one of them looks after the text, and none reads the whole cache."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from sedd_train import token_cache

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SCRIPT = str(Path(__file__).with_name("starts_as_ranks.py"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """7 million characters in a file, which are as many tokens and twice as many bytes."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(3000)]
    rows = [json.dumps({"text": " ".join(draw.choices(words, k=800))}) for _ in range(1500)]
    file = tmp_path_factory.mktemp("corpus") / "rows.jsonl"
    file.write_text("\n".join(rows))
    return file


@pytest.mark.parametrize("ranks", [3, pytest.param(64, marks=pytest.mark.slow)])
def test_a_rank_reads_what_it_needs(corpus, tmp_path, ranks, port):
    made = token_cache.prepare(str(corpus), "bytes", tmp_path)
    size = made.train.flat.nbytes
    assert size > 12_000_000
    outside = {name: value for name, value in os.environ.items() if name not in PLACE} | {"OMP_NUM_THREADS": "1"}
    outside |= {"DS_ACCELERATOR": "cpu", "MASTER_PORT": str(port())}
    command = [sys.executable, SCRIPT, str(corpus), str(tmp_path), str(ranks)]
    done = subprocess.run(command, env=outside, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    assert {each["fingerprint"] for each in found} == {made.fingerprint}
    for each in found:
        assert each["summed"] == 0
        assert each["mapped"] < 1 << 22  # two blocks, round each of which the system maps 2 MB at most
        # Tokenizer, ends and counts; the first rank also looks into a corpus that was only just written.
        assert each["asked"] < 4_000_000 + (each["rank"] == 0) * 3 * corpus.stat().st_size
    asked, private = (max(each[what] for each in found[1:]) for what in ("asked", "private"))
    print(f"{ranks} ranks, a cache of {size:,} bytes: {asked:,} asked for, {private:,} of memory, at most, a rank")
