"""What benchmarks/gpu.py checks on a GPU, on the CPU: every graph's loss and the draws, by kernels interpreted."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
GOALS = (  # every line that a GPU is to reach
    "training step, blocks compiled, B",
    "blocks compiled: peak memory above weights",
    "head + loss, absorb, half of the positions, 32 rows",
    "head + loss, uniform, a row",
    "over the same step by hand",
    "start of a compiled run",
    "B = 8, all masked, compiled and captured, a step",
    "B = 4, half masked, compiled and captured, a step",
    "B = 1, all masked, compiled and captured, a step",
    "reads back to the host, a training step",
    "reads back to the host, a sampling step",
)


def run(output: Path, *options: str) -> dict[str, list[dict[str, Any]]]:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--small", "--output", str(output), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, list[dict[str, Any]]] = json.loads(output.read_text())
    return found


def test_losses_of_all_graphs_and_draws_are_those_of_the_plain_ways(tmp_path):
    found = run(tmp_path / "gpu.json", "--parts", "losses", "samples")
    assert len({check["check"].split(", float32")[0] for check in found["checks"] if "float32" in check["check"]}) == 12
    assert all(check["right"] for check in found["checks"])


@pytest.mark.slow
def test_every_part_runs(tmp_path):
    found = run(tmp_path / "gpu.json")
    assert not found["failed"]
    told = [row["row"] for row in found["rows"] if row["goal"]]
    for goal in GOALS:
        assert any(goal in row for row in told), goal
    assert all(row["row"] in told for row in found["rows"] if any(goal in row["row"] for goal in GOALS))


def test_the_whole_script_takes_less_than_four_minutes():
    gpu = runpy.run_path(str(SCRIPT))
    assert sum(gpu["LIMITS"].values()) <= 236
    with pytest.raises(TimeoutError, match="more than 1 s"), gpu["at_most"](1):
        time.sleep(5)
