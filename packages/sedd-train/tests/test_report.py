"""What a run says of itself."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sedd_graphs import Absorbing, LogLinear
from sedd_nets import SEDD
from sedd_train import flops, loggers, plotting, report
from sedd_train.evaluation import by_noise_level
from sedd_train.loggers import Loggers
from sedd_train.objectives import ScoreEntropy


def steps(path) -> list[int]:
    return [line["step"] for line in loggers.read(path)]


def test_a_resumed_log_has_no_step_twice(tmp_path):
    path = tmp_path / "log.jsonl"
    log = loggers.Log(path)
    for step in range(1, 6):
        log.write("train", step=step, loss=1 / step)
    log = loggers.Log(path, step=3)
    assert steps(path) == [1, 2, 3]
    log.write("train", step=4, loss=0.5)
    assert steps(path) == [1, 2, 3, 4]
    loggers.Log(path)  # a new run
    assert steps(path) == []


def test_a_half_written_line_is_passed_over(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"kind": "train", "step": 1}) + '\n{"kind": "tra')
    assert steps(path) == [1]


def test_a_full_disk_costs_the_log_alone(tmp_path, recwarn):
    log = loggers.Log(tmp_path / "log.jsonl")
    log.path = Path("/dev/full")  # where every write fails as on a full disk
    with pytest.warns(UserWarning, match="/dev/full cannot be written: No space left on device"):
        log.write("train", step=1, loss=1.0)
    log.write("train", step=2, loss=1.0)  # said once
    assert len(recwarn) == 0


def test_the_picture_is_drawn_of_whatever_there_is(tmp_path):
    path = tmp_path / "log.jsonl"
    log = loggers.Log(path)
    how: dict[str, Any] = {"title": "a run", "unigram_entropy": 3.0, "characters_per_token": 1.0}
    plotting.loss_curve(path, tmp_path / "empty.png", **how)
    for step in range(1, 50):
        log.write("train", step=step, loss=math.nan if step == 7 else 3 + 1 / step)
    log.write("valid", step=40, nats_per_token=2.5, standard_error=0.1)
    plotting.loss_curve(path, tmp_path / "full.png", **how)
    plotting.loss_curve(path, tmp_path / "again.png", **how)
    empty, full, again = ((tmp_path / f"{name}.png").read_bytes() for name in ("empty", "full", "again"))
    assert full == again
    assert len(full) > len(empty) > 1000


def test_a_smoothed_curve_has_no_bias_at_its_start():
    """An average over 2 % of the curve, ten points here: a constant stays what it is."""
    assert plotting._smoothed(np.full(500, 3.0)).tolist() == pytest.approx([3.0] * 500)
    found = plotting._smoothed(np.array([0.0, 1.0, *[0.0] * 498]))
    assert found[:2].tolist() == pytest.approx([0.0, 0.1 / 0.19])
    assert plotting._smoothed(np.array([1.0, 5.0])).tolist() == [1.0, 5.0]


# Loss by noise level


def test_levels_of_a_network_that_knows_nothing():
    """Its probabilities are uniform over V tokens, so that an interval of time adds its share of (1 - eps) log V.

    16 intervals at 5 standard errors: a false alarm once in 10^5 seeds, and the seed is fixed.
    """
    torch.manual_seed(0)
    graph, noise, length = Absorbing(20), LogLinear(), 32
    net = SEDD(21, width=16, depth=1, heads=2, cond_dim=8, length=length, scale_by_sigma=True).eval()
    blocks = torch.randint(20, (60, length))
    found = by_noise_level(net, graph, noise, blocks, num_levels=16)
    assert found.t[[0, -1]].tolist() == pytest.approx([1e-3 + 0.999 / 32, 1 - 0.999 / 32])
    each = 0.999 * (1 - 1e-3) * math.log(20) / 16
    assert ((found.nats_per_token - each).abs() < 5 * found.standard_error).all()
    assert (found.standard_error < 0.2 * each).all()
    again = by_noise_level(net, graph, noise, blocks, num_levels=16)
    assert torch.equal(found.nats_per_token, again.nats_per_token)
    with pytest.raises(ValueError, match="NaN"):
        by_noise_level(_Broken(), graph, noise, blocks)


class _Broken(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, sigma):
        return torch.full((*x.shape, 21), math.nan)


# The page


@pytest.fixture
def run(tmp_path):
    """The folder of a run that has measured itself once and skipped a step."""
    (tmp_path / "recipe.toml").write_text('corpus = "<text>"\n')
    log = loggers.Log(tmp_path / "log.jsonl")
    facts = {"steps": 10, "parameters": 1234567, "training_tokens": 10, "unigram_entropy": 3.0}
    log.write("start", step=0, **facts, characters_per_token=1.0, environment=report.environment("2 x abacus"))
    for step in range(1, 5):
        log.write(
            "train", step=step, loss=3 / step, tokens_per_second=5, memory_gb=1.25, mfu=0.5 if step == 4 else None
        )
    log.write("skipped", step=4, loss=math.nan)
    log.write("valid", step=4, nats_per_token=2.5, standard_error=math.nan, perplexity=12.2, bits_per_character=3.6,
              sample="a <b>bold</b> sample")  # fmt: skip
    log.write("levels", step=4, t=[0.25, 0.75], nats_per_token=[1.0, 1.25], standard_error=[0.1, math.nan])
    return tmp_path


def test_the_page_needs_no_other_file_and_shows_all(run):
    page = report.page(run)
    for part in [
        "1,234,567",
        "4 of 10",
        "50.0%",
        "1.25 GB",
        "2.5000",
        "2 x abacus",
        "a &lt;b&gt;bold&lt;/b&gt; sample",
    ]:
        assert part in page, part
    assert "corpus = &quot;&lt;text&gt;&quot;" in page
    assert page.count('src="data:image/png;base64,') == page.count("<img") == 2
    assert "http" not in page
    assert "<b>" not in page
    assert "<meta name=viewport" in page  # else a phone shows it at a desktop's width


def test_a_step_that_was_only_measured_counts(run, monkeypatch):
    """Training lines are not written of every step, and the last of a run may have none."""
    for name in ("loss_curve", "noise_levels"):
        monkeypatch.setattr(plotting, name, lambda _, path, **__: path.touch())
    loggers.Log(run / "log.jsonl", step=4).write("valid", step=9, nats_per_token=2.0, standard_error=0.1, sample="",
                                                 perplexity=7.4, bits_per_character=1.4)  # fmt: skip
    assert "<td>9 of 10" in report.page(run)


def test_the_legend_covers_nothing(run, monkeypatch):
    """Of the curve and the unigram line both: it stands below the axes."""
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    plotting.loss_curve(run / "log.jsonl", run / "a.png", title="", unigram_entropy=3.0, characters_per_token=1.0)
    [figure] = drawn
    figure.canvas.draw()
    [legend], [axes] = figure.legends, figure.axes
    assert axes.get_legend() is None
    assert legend.get_window_extent().y1 <= axes.get_tightbbox().y0
    assert "unigram entropy of held-out tokens" in {text.get_text() for text in legend.get_texts()}


def test_a_summary_is_of_the_last_measurement(run):
    last = {"nats_per_token": 2.0, "perplexity": 7.4, "bits_per_character": 1.44, "bits_per_byte": 1.2}
    loggers.Log(run / "log.jsonl", step=4).write("valid", step=8, standard_error=0.1, sample="", **last)
    text = report.write(run, title="", unigram_entropy=math.log(4), characters_per_token=2.0, steps=8)
    summary = json.loads((run / "summary.json").read_text())
    assert summary == {"steps": 8, **last, "unigram_bits_per_character": 1.0}  # log 4 nats are 2 bits
    assert "<th class=n>bits per byte" in report.page(run)
    assert "1.440 bits a character  (2.000 nats a token, perplexity 7.4)" in text
    assert {"loss.png", "levels.png", "report.html"} <= {path.name for path in run.iterdir()}


def test_a_folder_without_a_run_has_no_page(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        report.page(tmp_path)


# Loggers


def test_tensorboard_holds_the_numbers_of_the_log(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    copies = Loggers(tmp_path, 0, tensorboard=True, wandb="", values={})
    for step in (1, 2):
        copies.write("train", step=step, loss=1 / step, sample="text", mfu=None)
    copies = Loggers(tmp_path, 1, tensorboard=True, wandb="", values={})  # resumed after step 1
    copies.write("train", step=2, loss=7.0)
    found = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert found.Tags()["scalars"] == ["train/loss"]
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [(1, 1.0), (2, 7.0)]


def test_a_copy_of_the_log_that_fails_costs_a_warning(tmp_path, monkeypatch, recwarn):
    shown = []

    class Project:
        def log(self, scalars, step):
            if step > 1:
                raise OSError("the line is cut")
            shown.append((step, scalars))

    class Wandb:
        @staticmethod
        def init(**how):
            shown.append(how["project"])
            return Project()

    monkeypatch.setitem(__import__("sys").modules, "wandb", Wandb)
    copies = Loggers(tmp_path, 0, tensorboard=False, wandb="mine", values={})
    copies.write("train", step=1, loss=2.0)
    with pytest.warns(UserWarning, match="a copy of the log is given up: the line is cut; training goes on"):
        copies.write("train", step=2, loss=1.0)
    copies.write("train", step=3, loss=1.0)  # said once
    assert shown == ["mine", (1, {"train/loss": 2.0})]


def test_a_run_of_weights_and_biases_is_the_folder_s_own_and_goes_on_as_it_was(tmp_path, monkeypatch):
    """Two runs of one name, in two folders, are two; a third that begins again in one of them is a third."""
    known = []

    class Wandb:
        @staticmethod
        def init(**how):
            known.append(how["id"])

    monkeypatch.setitem(__import__("sys").modules, "wandb", Wandb)
    for folder, step in (("a/run", 0), ("b/run", 0), ("a/run", 5), ("a/run", 0)):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        Loggers(tmp_path / folder, step, tensorboard=False, wandb="mine", values={})
    assert known[2] == known[0]
    assert len(set(known)) == 3


# Speed


def test_the_arithmetic_of_training():
    """12 D^2 multiplications a block and token, the head for the half of the tokens that is masked, three passes."""
    net = SEDD(101, width=32, depth=3, heads=2, cond_dim=8, length=64, scale_by_sigma=True)
    modulation = 2 * 8 * (256 + 8 + (6 * 3 + 2) * 32) / 64  # once a sequence
    head, blocks = 2 * 32 * 101, 3 * (2 * 12 * 32**2 + 4 * 64 * 32)
    found = flops.training_flops(net, ScoreEntropy(Absorbing(100), LogLinear()), 64)
    assert found == pytest.approx(3 * (blocks + head / 2 + modulation), rel=1e-9)
    assert flops.peak_flops("bf16", 2.0) == 2e12
    if not torch.cuda.is_available():
        assert flops.peak_flops("bf16") is None
    assert flops.memory() > 1e7


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA A100-SXM4-40GB", 312e12, 19.5e12),
        ("Abacus", None, None),
    ],
)
def test_what_a_gpu_can_do_at_best(name, bf16, fp32, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert (flops.peak_flops("bf16"), flops.peak_flops("fp32")) == (bf16, fp32)


@pytest.mark.skipif(torch.cuda.is_available() or not Path("/proc/cpuinfo").exists(), reason="needs Linux without CUDA")
def test_it_is_known_whether_the_cpu_has_bfloat16():
    instructions = Path("/proc/cpuinfo").read_text()
    if "avx512_bf16" in instructions or "amx_bf16" in instructions:
        assert not flops.emulates_bf16()
    elif "avx2" in instructions and "avx512" not in instructions and "avx_ne_convert" not in instructions:
        assert flops.emulates_bf16()


# Parts of the page


def test_cells_are_written_by_their_kind():
    table = report._table(["a & b", "n"], [["<x>", 3], [None, 0.123456], [True, "y"]])
    rows = "<tr><td>&lt;x&gt;<td class=n>3<tr><td>–<td class=n>0.1235<tr><td class=n>True<td>y"
    assert table == f"<div><table><tr><th>a &amp; b<th>n{rows}</table></div>"
    assert "<th>x<th class=n>y" in report._table(["x", "y"], [["a", 1], ["b", None]])
    assert report._table(["", ""], [["x", 1]]) == "<table><tr><td>x<td class=n>1</table>"


def test_what_a_run_is_and_how_far_it_has_come():
    start = {"parameters": 1234567, "training_tokens": 89000, "steps": 5000}
    line = {"step": 1200, "tokens_per_second": 4567, "memory_gb": 1.239, "mfu": 0.4567}
    facts = report._facts(start, 1200, [{"step": 1}, line], [{}, {}])
    for part in (
        *("<td>parameters<td>1,234,567", "<td>training tokens<td>89,000", "<td>step<td>1,200 of 5,000"),
        *("<td>tokens a second<td>4,567", "<td>memory of a rank<td>1.24 GB at most", "(MFU)<td>45.7%"),
        "<td>steps skipped<td>2",
    ):
        assert part in facts
    assert "MFU" not in report._facts(start, 1200, [line | {"mfu": None}], [])
    assert "tokens a second" not in report._facts(start, 0, [], [])


def test_what_a_run_runs_on_is_told():
    told = report.environment("the device")
    names = ("sedd-train", "torch", "deepspeed", "transformers", "datasets", "numpy")
    assert list(told) == ["began", "command", "machine", "device", "python", *names]
    assert (told["device"], told["python"]) == ("the device", platform.python_version())
    assert told["torch"] == version("torch")
    assert str(os.cpu_count()) in told["machine"]


def test_copies_get_numbers_alone():
    written: list[Any] = []
    copies = Loggers(Path(), 0, tensorboard=False, wandb="", values={})
    copies.copies.append(lambda step, scalars: written.append((step, scalars)))
    copies.write("train", 3, loss=0.5, count=2, stop=True, text="x", mfu=None)
    assert written == [(3, {"train/loss": 0.5, "train/count": 2.0})]


def test_weights_and_biases_is_asked_for_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="--wandb mine needs the package of that name: pip install"):
        Loggers(tmp_path, 0, tensorboard=False, wandb="mine", values={})
    asked: list[Any] = []
    run = SimpleNamespace(log=lambda scalars, *, step: asked.append((scalars, step)))

    def init(**how):
        asked.append(how)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    Loggers(tmp_path / "run", 0, tensorboard=False, wandb="mine", values={"steps": 3}).write("valid", 5, bound=2.0)
    how = {"project": "mine", "name": "run", "dir": str(tmp_path / "run"), "config": {"steps": 3}}
    told = (tmp_path / "run" / "wandb-id").read_text()
    assert asked == [how | {"resume": "allow", "id": told}, ({"valid/bound": 2.0}, 5)]


def test_lines_of_the_log_are_whole(tmp_path):
    log = loggers.Log(tmp_path / "log.jsonl")
    log.write("train", step=1, loss=math.nan, more=[math.inf, {"x": -math.inf}], text="ü")
    log.write("valid", step=2)
    assert loggers.read(tmp_path / "log.jsonl") == [
        {"kind": "train", "step": 1, "loss": None, "more": [None, {"x": None}], "text": "ü"},
        {"kind": "valid", "step": 2},
    ]
    loggers.Log(tmp_path / "log.jsonl", 1)
    assert [line["step"] for line in loggers.read(tmp_path / "log.jsonl")] == [1]
    loggers.Log(tmp_path / "log.jsonl")  # of a new run
    assert loggers.read(tmp_path / "log.jsonl") == loggers.read(tmp_path / "none") == []
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
