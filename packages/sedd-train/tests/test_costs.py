"""What a run costs and how it is drawn: a plan to the letter, arithmetic, memory, and what stands in the pictures."""

from __future__ import annotations

import math
import resource
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from sedd_graphs import Absorbing, Cosine, LogLinear, Uniform
from sedd_nets import SEDD
from sedd_train import flops, loggers, plan, plotting, recipes, token_cache
from sedd_train.objectives import D3PM, Autoregressive, ScoreEntropy
from sedd_train.tokens import Tokens

# Arithmetic and memory


class Counted:
    """A network of ten operations a token and a thousand for each position that reaches the head."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def flops(self, length: int, *, rows: int) -> int:
        self.asked.append((length, rows))
        return 10 * length + 1000 * rows


@pytest.mark.parametrize(
    ("objective", "t_min", "share"),
    [
        (ScoreEntropy(Absorbing(9), LogLinear()), 1e-3, 0.999 * (1 + 1e-3) / 2),
        (ScoreEntropy(Absorbing(9), LogLinear()), 0.5, 0.999 * 0.75),
        (D3PM(Absorbing(9), LogLinear()), 1e-3, 0.999 * (1 + 1e-3) / 2),
        (ScoreEntropy(Absorbing(9), Cosine()), 1e-3, 1 - 2 / math.pi),
        (ScoreEntropy(Uniform(9), LogLinear()), 1e-3, 1.0),
        (Autoregressive(9), 1e-3, 1.0),
    ],
    ids=["score entropy", "from the middle", "d3pm", "cosine", "uniform", "causal"],
)
def test_arithmetic_is_of_three_passes_of_which_the_head_sees_a_share(objective, t_min, share):
    net = Counted()
    found = flops.training_flops(net, objective, 10_000, t_min)
    ((length, rows),) = net.asked
    assert length == 10_000
    assert rows / length == pytest.approx(share, abs=1e-3)
    assert found == pytest.approx(3 * (10 + 1000 * rows / length))
    assert flops.training_flops(object(), objective, 8) == 0.0


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        *(("NVIDIA H200", 989e12, 67e12), ("NVIDIA H100 NVL", 989e12, 67e12), ("NVIDIA H100 PCIe", 756e12, 51e12)),
        *(("NVIDIA A100 80GB PCIe", 312e12, 19.5e12), ("NVIDIA L40S", 362e12, 91.6e12), ("NVIDIA A10G", 70e12, 35e12)),
        *(("NVIDIA GeForce RTX 4090", 165e12, 82.6e12), ("NVIDIA GeForce RTX 3090", 71e12, 35.6e12)),
    ],
)
def test_peaks_are_those_of_their_makers(name, bf16, fp32, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert [flops.peak_flops(precision) for precision in ("bf16", "fp16", "fp32")] == [bf16, bf16, fp32]
    assert flops.peak_flops("fp32", 1.5) == 1.5e12  # as told


def test_memory_is_in_bytes_wherever_it_is(monkeypatch):
    usage = SimpleNamespace(ru_maxrss=12345)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(resource, "getrusage", lambda who: usage if who == resource.RUSAGE_SELF else None)
    for platform, held in (("linux", 12345 * 1024.0), ("darwin", 12345.0)):
        monkeypatch.setattr(sys, "platform", platform)
        assert flops.memory() == held
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 77)
    assert flops.memory() == 77.0


# A plan

VALUES: dict[str, Any] = {
    **{"corpus": "none", "tokenizer": "characters", "length": 128, "width": 64, "depth": 3, "heads": 2, "cond_dim": 32},
    **{"batch_size": 24, "micro_batch_size": 3, "steps": 5000, "checkpoint_every": 250, "keep": 4, "dropout": 0.0},
}


def planned(monkeypatch: Any, tmp_path: Any, cached: Any = None, ranks: int = 4, **values: Any) -> list[str]:
    monkeypatch.setattr(token_cache, "cached", lambda *given, **how: cached)
    recipe = recipes.override(recipes.Recipe(), VALUES | values)
    return plan.describe(recipe, ranks, tmp_path).splitlines()


def test_a_plan_to_the_letter(monkeypatch, tmp_path):
    lines = planned(monkeypatch, tmp_path, zero_stage=2)
    net = SEDD(28, width=64, depth=3, heads=2, cond_dim=32, length=128, dropout=0.0, scale_by_sigma=True)
    parameters = sum(p.numel() for p in net.parameters())
    parts = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in net.parameter_counts().items())
    assert list(net.parameter_counts()) == ["embedding", "conditioning", "blocks", "head"]
    a_token = flops.training_flops(net, ScoreEntropy(Absorbing(27), LogLinear()), 128)
    assert lines[:8] == [
        f"network      {parameters:,} parameters ({parts}), 28 states",
        "text         none in characters: not tokenised yet",
        "step         24 sequences of 128 = 4 ranks x 2 micro-batches x 3; 3,072 tokens",
        "run          5,000 steps, 15,360,000 tokens",
        f"arithmetic   {a_token / 1e9:.3g} GFLOP a token, {a_token * 3072 / 1e12:.3g} TFLOP a step, "
        f"{a_token * 15_360_000 / 1e18:.3g} EFLOP in all",
        f"checkpoints  {16 * parameters / 1e9:.2f} GB each, every 250 steps; the last 4 and the best are kept",
        "",
        "GB a rank      weights  gradients  masters  moments  averages  bucket  for backward  in all",
    ]
    assert [line.split()[:2] for line in lines[8:]] == [["ZeRO", str(stage)] for stage in range(4)]
    assert [line.endswith("  <- this run") for line in lines[8:]] == [False, False, True, False]


def test_the_stage_of_a_plan_is_the_run_s(monkeypatch, tmp_path):
    """One rank has nobody to share with."""
    for ranks, offload, stage in ((1, False, 0), (2, False, 2), (1, True, 2)):
        lines = planned(monkeypatch, tmp_path, ranks=ranks, zero_stage=2, offload=offload)
        (marked,) = (line for line in lines if line.endswith("<- this run"))
        assert marked.split()[:2] == ["ZeRO", str(stage)]


def test_the_numbers_of_each_stage_stand_under_their_names(monkeypatch, tmp_path):
    """Enlarged, so that their digits show."""
    memory = plan.memory

    def large(parameters, stage, ranks, **how):
        return {name: value * 1e5 for name, value in memory(parameters, stage, ranks, **how).items()}

    asked: list[Any] = []

    def activations(new, depth, length, *, precision):
        asked.append((depth, length, precision, new(2).checkpoint_activations, new(2).depth))
        return 2e10

    monkeypatch.setattr(plan, "memory", large)
    monkeypatch.setattr(plan, "activations", activations)
    lines = planned(monkeypatch, tmp_path, precision="bf16", activation_checkpointing=True)
    assert asked == [(3, 128, "bf16", True, 2)]
    parameters = int(lines[0].split()[1].replace(",", ""))
    for stage, line in enumerate(lines[8:12]):
        held = {name: value * 1e5 for name, value in memory(parameters, stage, 4).items()}
        columns = [held[name] for name in ("weights", "gradients", "masters", "moments")]
        columns += [held["average"] + held["averaged network"], held["bucket"], 3 * 2e10]  # of a micro-batch of three
        found = [float(word) for word in line.split()[2:10]]
        assert found == pytest.approx([value / 1e9 for value in [*columns, sum(columns)]], abs=0.0051)


def test_a_plan_knows_how_often_a_text_is_seen(monkeypatch, tmp_path):
    tokens = Tokens(np.zeros(128 * 100 + 5, np.uint16), np.array([1]), 1)
    lines = planned(monkeypatch, tmp_path, SimpleNamespace(train=tokens))
    assert lines[1] == "text         none in characters: 12,805 tokens, seen 1.2e+03 times"
    (stage_1,) = (planned(monkeypatch, tmp_path, offload=True, zero_stage=stage)[-1] for stage in (1,))
    assert stage_1 == "  offloaded: masters and moments lie in the machine's memory in place of the GPU's"
    stage_3 = planned(monkeypatch, tmp_path, offload=True, zero_stage=3)[-1]
    assert stage_3 == "  offloaded: weights, masters and moments lie in the machine's memory in place of the GPU's"


# Pictures


@pytest.fixture
def drawn(monkeypatch):
    """The axes of the pictures that were saved."""
    figures: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: figures.append(self.axes[0]))
    return figures


def legend(axes: Any) -> list[str]:
    """What the picture says that its lines are, outside of its axes."""
    (found,) = axes.figure.legends
    return [text.get_text() for text in found.get_texts()]


def test_a_loss_curve_is_of_the_log_s_numbers(drawn, tmp_path):
    log = loggers.Log(tmp_path / "log.jsonl")
    for step in range(1, 101):
        log.write("train", step=step, loss=math.nan if step == 50 else 5 - step / 50)
    log.write("valid", step=40, nats_per_token=4.5, standard_error=None)
    log.write("valid", step=50, nats_per_token=math.nan, standard_error=0.5)
    log.write("valid", step=80, nats_per_token=3.25, standard_error=0.125)
    how: dict[str, Any] = {"title": "a run", "unigram_entropy": 4.0, "characters_per_token": 2.0}
    plotting.loss_curve(tmp_path / "log.jsonl", tmp_path / "a.png", **how)
    (axes,) = drawn
    level, each, smooth, bound = axes.lines[:4]
    assert set(level.get_ydata()) == {4.0}
    steps = [step for step in range(1, 101) if step != 50]
    assert each.get_xdata().tolist() == smooth.get_xdata().tolist() == steps
    losses = [5 - step / 50 for step in steps]
    assert each.get_ydata().tolist() == pytest.approx(losses)
    assert smooth.get_ydata().tolist() == plotting._smoothed(np.array(losses)).tolist()
    assert (bound.get_xdata().tolist(), bound.get_ydata().tolist()) == ([40.0, 80.0], [4.5, 3.25])
    (bars,) = axes.containers
    (segments,) = bars.lines[2]
    assert [[y for _, y in part] for part in segments.get_segments()] == [[4.5, 4.5], [3.125, 3.375]]
    assert [text.get_text() for text in axes.texts] == ["3.250"]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title(loc="left")) == ("step", "nats a token", "a run")
    assert legend(axes) == [
        *("unigram entropy of held-out tokens", "training loss of a step", "training loss, smoothed"),
        "held-out bound, averaged weights",
    ]
    low = min(losses)
    high = max(np.percentile(losses, 98), 4.5)
    assert axes.get_ylim() == pytest.approx((low - 0.08 * (high - low) - 0.05, high + 0.05 * (high - low) + 0.05))
    (bits,) = axes.child_axes
    assert bits.get_ylabel() == "bits a character"
    there, back = bits._functions
    assert there(math.log(2)) == pytest.approx(0.5)  # a bit a token of two characters
    assert back(there(3.0)) == pytest.approx(3.0)


def test_a_curve_without_any_steps_has_its_level_alone(drawn, tmp_path):
    plotting.loss_curve(tmp_path / "none", tmp_path / "a.png", title="", unigram_entropy=4.0, characters_per_token=1.0)
    (axes,) = drawn
    assert len(axes.lines) == 1
    assert legend(axes) == ["unigram entropy of held-out tokens"]
    assert axes.get_ylim() == pytest.approx((3.95, 4.05))


def test_levels_are_drawn_at_the_first_the_middle_and_the_last_measurement(drawn, tmp_path):
    log = loggers.Log(tmp_path / "log.jsonl")
    for step in (5, 10, 15, 20):
        log.write("levels", step=step, t=[0.25, 0.75], nats_per_token=[step / 10, 1.0], standard_error=[0.5, None])
    log.write("valid", step=25)
    levels = plotting.levels_of(tmp_path / "log.jsonl")
    assert list(levels) == ["step 5", "step 10", "step 15", "step 20"]
    for count, shown in [(4, [0, 1, 3]), (3, [0, 1, 2]), (2, [0, 1]), (1, [0])]:
        some = dict(list(levels.items())[:count])
        plotting.noise_levels(some, tmp_path / "a.png")
        axes = drawn[-1]
        assert legend(axes) == [list(levels)[index] for index in shown]
        curves = [container.lines[0] for container in axes.containers]
        assert [curve.get_ydata().tolist() for curve in curves] == [[(index + 1) / 2, 1.0] for index in shown]
        assert [curve.get_xdata().tolist() for curve in curves] == [[0.25, 0.75]] * len(shown)
        assert [curve.get_color() for curve in curves] == ["#b9c9dd", "#6d93c1", "#c8501e"][-len(shown) :]
    assert (axes.get_ylabel(), axes.get_xlim(), axes.get_ylim()[0]) == (
        "nats a token in each of 2 intervals",
        (0, 1),
        0,
    )
    plotting.noise_levels(levels, tmp_path / "a.png")
    assert drawn[-1].get_title(loc="left") == "Where the held-out loss comes from: 3.000 nats a token in all"
    (segments,) = drawn[-1].containers[-1].lines[2]
    assert [[y for _, y in part] for part in segments.get_segments()] == [[1.5, 2.5], [1.0, 1.0]]
