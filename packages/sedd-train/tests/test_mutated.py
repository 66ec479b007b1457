"""Whatever stands in a checkpoint's files of text: it loads, or a ValueError or FileNotFoundError says why not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("count", [250, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_checkpoints(tmp_path, count):
    """config.json, manifests, `latest`, indices and tokenizers of seven layouts, with one to three random changes."""
    script = Path(__file__).with_name("mutated.py")
    command = [sys.executable, str(script), str(tmp_path / "here"), str(count), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["faults"] == []
    assert found["seen"] == found["ran"] == []
    assert found["grown_kb"] < 1 << 20  # a gigabyte
    came_of_it = found["came_of_it"]
    assert came_of_it.keys() <= {"loaded", "ValueError", "FileNotFoundError"}
    assert came_of_it["loaded"] > count / 20  # the changes are small, too
    assert came_of_it["ValueError"] > count / 5
