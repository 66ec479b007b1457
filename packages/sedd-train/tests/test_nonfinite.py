"""Steps whose loss is not finite: skipped by all ranks together, counted, and explained at the end."""

from __future__ import annotations

import json
import math

import pytest
import torch
from sedd_train import TrainingError, loggers, nonfinite, plotting


@pytest.mark.filterwarnings("default")  # DeepSpeed warns
def test_training_stops_with_a_diagnosis(here, tmp_path):
    """A learning rate that makes the weights overflow: nothing is hooked or patched."""
    with pytest.raises(TrainingError) as caught:
        here(tmp_path / "run", learning_rate=1e30, warmup=0, max_skipped=3, steps=50)
    printed = str(caught.value)
    assert "3 steps in a row had a loss or gradient that is not finite: training stops" in printed
    text = (tmp_path / "run" / "log.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    lines = loggers.read(tmp_path / "run" / "log.jsonl")
    skipped = [line for line in lines if line["kind"] == "skipped"]
    assert len(skipped) == 3
    for line in skipped:
        assert line["loss"] is None or line["grad_norm"] is None
        first = (line["step"] - 1) * 8
        assert set(line["samples"]) <= set(range(first, first + 8))
        assert len(line["starts"]) == len(line["samples"]) > 0
    (diagnosis,) = [line["text"] for line in lines if line["kind"] == "diagnosis"]
    assert diagnosis in printed
    assert "weights: all finite, the largest 1e+30" in diagnosis
    assert "is the first that is not finite" in diagnosis
    assert "(t = 0." in diagnosis
    plotting.loss_curve(
        tmp_path / "run" / "log.jsonl", tmp_path / "a.png", title="", unigram_entropy=3.0, characters_per_token=1.0
    )


def test_json_is_strict():
    def refuse(constant):
        raise AssertionError(constant)

    values = {"a": float("nan"), "b": [1.5, float("-inf"), {"c": float("inf")}], "d": (1, None, True, "NaN")}
    text = loggers.to_json(values)
    expected = {"a": None, "b": [1.5, None, {"c": None}], "d": [1, None, True, "NaN"]}
    assert json.loads(text, parse_constant=refuse) == expected


def test_the_largest_weight_is_the_one_farthest_from_0():
    weights = {"a": torch.tensor([1.0, -3.0]), "b": torch.tensor([2.0]), "none": torch.zeros(0)}
    assert nonfinite._weights(weights) == "weights: all finite, the largest 3 in a"
    assert nonfinite._weights(weights | {"b": torch.tensor([math.inf])}) == "weights: not finite in b"
