"""Trains in processes that are killed again and again: python killed.py RECIPE FOLDER CACHE MOMENT KILLS.

FOLDER/undisturbed is the run that nothing happens to. FOLDER/run is killed so many times at a random point of the
moment, "saving", "resuming" or "saving-shards", goes on each time from what it finds, and is let run to its end. Shards
are saved by two ranks, which meet at MASTER_PORT and one of which is killed; the other has to find out and to end.
Prints how it went, as JSON. The runs are children of this process, which has imported everything: a start takes a
second, not ten.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import deepspeed
import held
from sedd_train import checkpoint, recipes, sharding, train

MOST = 5  # tries for each kill that is to meet its moment
STEPS = 5  # that a run takes before it waits to be killed


def begin(
    recipe: recipes.Recipe, output: Path, cache: Path, place: dict[str, str] | None = None, *, to_its_end: bool = False
) -> int:
    """A process that begins the run, or goes on with it; its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ |= place or {}
        if not to_its_end:
            held.hold(STEPS)
        train(recipe, output=output, cache=cache, resume="auto", tensorboard=False)
        code = 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def begin_two(recipe: recipes.Recipe, output: Path, cache: Path, *, to_its_end: bool = False) -> list[int]:
    """The two ranks of a run."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    places = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return [begin(recipe, output, cache, place, to_its_end=to_its_end) for place in places]


def ended(child: int) -> int:
    """The exit code of a process that is waited for, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait(child: int, happened: Callable[[], bool]) -> None:
    """Wait for something that a process does."""
    while not happened():
        if os.waitpid(child, os.WNOHANG)[0]:
            raise RuntimeError("the run was over before it could be killed: give it more steps")
        time.sleep(0.0005)


def lines(output: Path) -> int:
    """How many steps the log of a run tells of."""
    log = output / "log.jsonl"
    return log.read_text().count('"train"') if log.exists() else 0


def wait_for_lines(child: int, output: Path, count: int) -> None:
    """Wait until the log of a run tells of so many steps."""
    wait(child, lambda: lines(output) >= count)


def half_written(output: Path) -> set[Path]:
    """Checkpoints that are being written, or whose writing was cut short."""
    return set(output.glob("checkpoints/.step-*"))


def kill_while_saving(recipe: recipes.Recipe, output: Path, cache: Path, draw: random.Random) -> bool:
    """Whether a checkpoint was being written when the run was killed."""
    before, child = half_written(output), begin(recipe, output, cache)
    wait(child, lambda: bool(half_written(output) - before))
    time.sleep(draw.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    assert ended(child) == -signal.SIGKILL
    return bool(half_written(output) - before)


def kill_one_while_saving(recipe: recipes.Recipe, output: Path, cache: Path, draw: random.Random) -> bool:
    """Whether a checkpoint was being written when one rank was killed, and the other ended within a minute."""
    before, children = half_written(output), begin_two(recipe, output, cache)
    wait(children[0], lambda: bool(half_written(output) - before))
    time.sleep(draw.uniform(0, 0.03))
    victim = children.pop(draw.randrange(2))
    os.kill(victim, signal.SIGKILL)
    met = bool(half_written(output) - before)
    assert ended(victim) == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while not (left := os.waitpid(children[0], os.WNOHANG))[0]:
        assert time.monotonic() < deadline, "the other rank waits for ever"
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(left[1]) == 1
    return met


def kill_while_resuming(recipe: recipes.Recipe, output: Path, cache: Path, delay: float) -> bool:
    """Whether no step had been taken since the start when the run was killed, so many seconds after it."""
    found = checkpoint.find(output / "checkpoints")
    assert found is not None
    child = begin(recipe, output, cache)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    assert ended(child) == -signal.SIGKILL
    return checkpoint.find(output / "checkpoints") == found


def finished(recipe: recipes.Recipe, output: Path, cache: Path, two: bool) -> bool:
    """Whether a run came to its end, undisturbed."""
    run = (recipe, output, cache)
    children = begin_two(*run, to_its_end=True) if two else [begin(*run, to_its_end=True)]
    return [ended(child) for child in children] == [0] * len(children)


def main() -> None:
    """Kill, go on, and say how it went."""
    assert deepspeed.__version__  # imported for its children
    recipe, folder, cache = recipes.read_recipe(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    moment, kills = sys.argv[4], int(sys.argv[5])
    shards = moment == "saving-shards"
    if shards:
        sharding.ABOVE = 0
    assert finished(recipe, folder / "undisturbed", cache, shards)
    run, draw, met, tries, takes = folder / "run", random.Random(0), 0, 0, 0.0
    if moment == "resuming":
        for _ in range(2):  # the second time it goes on, and is measured
            before, begun = lines(run), time.monotonic()
            child = begin(recipe, run, cache)
            wait_for_lines(child, run, before + 3)
            takes = time.monotonic() - begun
            os.kill(child, signal.SIGKILL)
            assert ended(child) == -signal.SIGKILL
    while met < kills and tries < MOST * kills:
        tries += 1
        if shards:
            met += kill_one_while_saving(recipe, run, cache, draw)
        elif moment == "saving":
            met += kill_while_saving(recipe, run, cache, draw)
        else:
            delay = draw.uniform(0, takes)
            early = kill_while_resuming(recipe, run, cache, delay)
            met, takes = met + early, 1.05 * takes if early else delay  # a start takes longer, or not so long
    assert not (run / "export").exists()
    assert finished(recipe, run, cache, shards)
    print(json.dumps({"met": met, "tries": tries, "left": len(half_written(run))}))


if __name__ == "__main__":
    main()
