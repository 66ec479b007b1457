"""What a run logs of a step: per token of text, per device, and how long it will still take."""

from __future__ import annotations

import math

import pytest
import torch
from sedd_train import loggers, progress, recipes
from sedd_train.engine import Step


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(progress.time, "perf_counter", lambda: Clock.now)  # type: ignore[attr-defined]
    return Clock


def step(loss=8.0, applied=True):
    return Step(loss, 2.5, applied, False, torch.zeros(1))


def test_a_line_of_the_log(clock, tmp_path, monkeypatch):
    """Two ranks, a step of 4 x 8 tokens in 2 s, half a second of it without data."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    values = {"length": 8, "batch_size": 4, "steps": 11, "log_every": 2}
    recipe = recipes.override(recipes.Recipe(), values)
    options = {"flops_a_token": 300.0, "peak": 4800.0, "tensorboard": False, "wandb": ""}
    shown = progress.Progress(tmp_path, recipe, first=0, **options)  # type: ignore[arg-type]
    for number in range(3):
        clock.now += 0.5
        shown.data_arrived()
        clock.now += 1.5
        shown.step_taken(number, step(), 1e-3, loss=1.25)
        clock.now += 1000  # measuring, say
        shown.restart_clock()
    clock.now += 2
    shown.step_taken(3, step(math.nan, applied=False), 1e-3, loss=math.nan)
    lines = loggers.read(tmp_path / "log.jsonl")
    assert [line["step"] for line in lines] == [1, 3, 4]  # every second one, and what was skipped
    first, second, skipped = lines
    assert (first["loss"], first["grad_norm"], first["lr"]) == (1.25, 2.5, 1e-3)
    assert first["tokens_per_second"] == 16
    assert first["waited_for_data"] == 0.25
    assert first["mfu"] == pytest.approx(32 * 300 / 2 / 2 / 4800)  # a device's share of the arithmetic over its peak
    assert (first["eta_seconds"], second["eta_seconds"]) == (20, 16)
    assert skipped["loss"] is None
    assert first["memory_gb"] > 0.01


def test_the_speed_is_that_of_a_typical_step(clock, tmp_path):
    """Not of one that was compiled in, nor of the last one, which a host that ran ahead finds done."""
    recipe = recipes.override(recipes.Recipe(), {"length": 8, "batch_size": 4, "steps": 60, "log_every": 1})
    shown = progress.Progress(tmp_path, recipe, first=0, flops_a_token=300.0, peak=4800.0, tensorboard=False, wandb="")
    for number, seconds in enumerate([100.0, *[2.0] * 40, 0.001, *[4.0] * 11]):
        clock.now += seconds
        shown.step_taken(number, step(), 1e-3, loss=1.25)
    told = [line["tokens_per_second"] for line in loggers.read(tmp_path / "log.jsonl")]
    assert told[0] == 0  # 0.32: it is all there is
    assert told[2:42] == [16] * 40
    assert told[-1] == 8  # eleven of the last twenty
    assert loggers.read(tmp_path / "log.jsonl")[-1]["mfu"] == pytest.approx(32 * 300 / 4 / 4800)


def test_other_ranks_than_the_first_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = recipes.override(recipes.Recipe(), {"length": 8, "batch_size": 4, "steps": 2, "log_every": 1})
    shown = progress.Progress(
        tmp_path, recipe, first=0, flops_a_token=1.0, peak=None, tensorboard=True, wandb="project"
    )
    shown.data_arrived()
    shown.step_taken(0, step(), 1e-3, loss=1.0)
    shown.write("valid", step=1)
    assert not list(tmp_path.iterdir())
