"""What benchmarks/gpu.py checks on a GPU, on the CPU: every graph's loss and the draws, by kernels interpreted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def run(output: Path, *options: str) -> dict[str, list[dict[str, Any]]]:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--small", "--output", str(output), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, list[dict[str, Any]]] = json.loads(output.read_text())
    return found


def test_losses_of_all_graphs_and_draws_are_those_of_the_plain_ways(tmp_path):
    found = run(tmp_path / "gpu.json", "--parts", "losses", "samples")
    assert len({check["check"].split(", float32")[0] for check in found["checks"] if "float32" in check["check"]}) == 9
    assert all(check["right"] for check in found["checks"])


@pytest.mark.slow
def test_every_part_runs(tmp_path):
    found = run(tmp_path / "gpu.json")
    assert not found["failed"]
    assert len(found["rows"]) > 20
