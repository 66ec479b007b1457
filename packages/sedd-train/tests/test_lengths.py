"""A model of rows of many lengths carries the law of their lengths."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from sedd_train.tokens import Tokens


def test_the_law_counts_rows_by_the_tokens_that_they_hold():
    ends = np.cumsum([3, 1, 7, 3, 20])
    tokens = Tokens(np.zeros(34, np.uint16), ends, 34)
    assert tokens.law_of_lengths(8) == [1, 0, 2, 0, 0, 0, 1, 1]
    assert sum(tokens.law_of_lengths(8)) == tokens.documents


@pytest.mark.slow
def test_training_without_packing_writes_the_law_into_the_checkpoint(tmp_path, cache):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(40):
        (corpus / f"{i:02}.txt").write_text("ab " * (1 + i % 5))
    sizes: dict[str, object] = {
        "steps": 2,
        "length": 16,
        "width": 16,
        "depth": 1,
        "heads": 2,
        "cond-dim": 8,
        "batch-size": 4,
    }
    sizes |= {"evaluate-blocks": 2, "evaluate-times": 2, "sample-steps": 2, "tokenizer": "bpe:300"}
    words = ["--recipe", "tiny", "--corpus", corpus, "--output", tmp_path / "run", "--cache", cache, "--no-packing"]
    words += ["--no-tensorboard", *(word for name, value in sizes.items() for word in (f"--{name}", value))]
    done = subprocess.run(
        [sys.executable, "-m", "sedd_train", "train", *map(str, words)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    config = json.loads((tmp_path / "run" / "export" / "config.json").read_text())
    law = config["lengths"]
    assert len(law) == 16
    assert sum(count > 0 for count in law) > 1
    assert 1 < sum(law) < 40  # a part of the texts is held out
