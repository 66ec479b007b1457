"""What a run says of itself."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from sedd_train import report


def steps(path) -> list[int]:
    return [line["step"] for line in report.read(path)]


def test_a_resumed_log_has_no_step_twice(tmp_path):
    path = tmp_path / "log.jsonl"
    log = report.Log(path)
    for step in range(1, 6):
        log.write("train", step=step, loss=1 / step)
    log = report.Log(path, step=3)
    assert steps(path) == [1, 2, 3]
    log.write("train", step=4, loss=0.5)
    assert steps(path) == [1, 2, 3, 4]
    report.Log(path)  # a new run
    assert steps(path) == []


def test_a_half_written_line_is_passed_over(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"kind": "train", "step": 1}) + '\n{"kind": "tra')
    assert steps(path) == [1]


def test_a_full_disk_costs_the_log_alone(tmp_path, recwarn):
    log = report.Log(tmp_path / "log.jsonl")
    log.path = Path("/dev/full")  # where every write fails as on a full disk
    with pytest.warns(UserWarning, match="/dev/full cannot be written: No space left on device"):
        log.write("train", step=1, loss=1.0)
    log.write("train", step=2, loss=1.0)  # said once
    assert len(recwarn) == 0


def test_the_picture_is_drawn_of_whatever_there_is(tmp_path):
    path = tmp_path / "log.jsonl"
    log = report.Log(path)
    how = {"title": "a run", "unigram_entropy": 3.0, "characters_per_token": 1.0}
    report.picture(path, tmp_path / "empty.png", **how)
    for step in range(1, 50):
        log.write("train", step=step, loss=math.nan if step == 7 else 3 + 1 / step)
    log.write("valid", step=40, nats_per_token=2.5, standard_error=0.1)
    report.picture(path, tmp_path / "full.png", **how)
    report.picture(path, tmp_path / "again.png", **how)
    empty, full, again = ((tmp_path / f"{name}.png").read_bytes() for name in ("empty", "full", "again"))
    assert full == again
    assert len(full) > len(empty) > 1000
