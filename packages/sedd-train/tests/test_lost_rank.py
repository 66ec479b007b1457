"""One rank dies: the run ends within a minute and says so, and what it saved is whole."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

import psutil
import pytest
from sedd_train import checkpoint

SCRIPT = Path(__file__).with_name("slow_words.py")


def ranks(process) -> dict[int, psutil.Process]:
    """The processes of a launched run by their rank. What a rank starts comes behind it, and may be gone when asked."""
    found: dict[int, psutil.Process] = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if SCRIPT.name in " ".join(child.cmdline()) and "RANK" in child.environ():
                found.setdefault(int(child.environ()["RANK"]), child)
    return found


@pytest.mark.parametrize(("launcher", "stage"), [pytest.param("deepspeed", 2, marks=pytest.mark.slow), ("torchrun", 3)])
@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_one_rank_is_killed(victim, launcher, stage, start, tmp_path):
    run = tmp_path / "run"
    options = ("--steps", "100000", "--checkpoint-every", "5", "--zero-stage", str(stage))
    with start(run, *options, launcher=launcher, ranks=2, script=SCRIPT) as process:
        process.wait_until((run / "checkpoints" / "latest").exists)
        family = ranks(process.process)
        assert family.keys() == {0, 1}
        family[victim].send_signal(signal.SIGKILL)
        printed = process.output(seconds=60)
        assert process.process.returncode != 0
    _, alive = psutil.wait_procs(family.values(), timeout=60)
    assert not alive
    assert f"rank {1 - victim} of 2 ends, and the run with it: lost another rank" in printed
    assert "continue with --resume" in printed
    assert checkpoint.find(run / "checkpoints") is not None
