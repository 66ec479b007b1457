"""A training step leaves its numbers on the device, and is read a step late: shown on the CPU, by what is dispatched.

Values that graphs and network check on the CPU are left to an accelerator's own assertions there; here that is
pretended, and the operations whose result depends on values are counted in whole steps, DeepSpeed's own included.
"""

from __future__ import annotations

import importlib
import pkgutil
import shutil
from typing import Any

import pytest
import safetensors.torch
import sedd_graphs
import torch
from sedd_graphs import Absorbing, Geometric, LogLinear, Uniform
from sedd_nets import SEDD
from sedd_train import TrainingError, engine, loggers, zero_shards
from sedd_train.engine import Loss, launch_step, start_engine
from sedd_train.objectives import ScoreEntropy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.filterwarnings("default")  # DeepSpeed warns
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim"}
CASES: dict[str, Any] = {
    "absorbing": (Absorbing(11), LogLinear()),
    "uniform": (Uniform(12), Geometric(0.1, 2.0)),
}


class Lists(TorchFunctionMode):
    """What is no operation on the CPU and one that waits elsewhere: lists of values, and tensors of numbers."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in ("tolist", "numpy", "cpu") or (name in ("tensor", "as_tensor") and "device" in (kwargs or {})):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


class Reads(TorchDispatchMode):
    """The operations for which the host waits."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self.lists = Lists(self.found)

    def __enter__(self):
        self.lists.__enter__()
        return super().__enter__()

    def __exit__(self, *raised):
        super().__exit__(*raised)
        self.lists.__exit__(*raised)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in READS or by_mask:
            self.found.append(name)
        return operation(*args, **(kwargs or {}))


@pytest.fixture
def as_on_an_accelerator(monkeypatch):
    for found in pkgutil.iter_modules(sedd_graphs.__path__, "sedd_graphs."):
        module = importlib.import_module(found.name)
        for name, stand_in in (("check_values", lambda *_, **__: None), ("readable", lambda values: False)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, stand_in)
    for name in ("attention", "checks", "conditioning", "documents", "fast.memory_efficient"):
        monkeypatch.setattr(f"sedd_nets.{name}.on_host", lambda tensor: False)
    monkeypatch.setattr(engine, "reading_waits", lambda tensor: True)
    for name in ("checks", "jumps"):
        monkeypatch.setattr(f"sedd_objectives.{name}.reading_waits", lambda device: True)
    fused = importlib.import_module("sedd_objectives.fast.fused")
    monkeypatch.setattr(fused, "kernel_serves", lambda hidden, dtype, *_: True)
    monkeypatch.setattr(fused, "of_score_entropy", lambda *_: summed_scores)


def summed_scores(part, logits, factor):
    """In the place of the kernel, of which sedd-objectives shows that it reads nothing: the sum of a row's scores."""
    scores = logits.float().exp()
    logits.copy_(scores * factor[:, None])
    return scores.sum(1)


def batches(kind, step):
    graph, noise = CASES[kind]
    generator = torch.Generator().manual_seed(step)
    for _ in range(2):
        x0 = torch.randint(11, (2, 8), generator=generator)
        t = torch.rand(2, generator=generator) * 0.9 + 0.05
        xt = graph.sample(x0, noise(t)[0], generator=generator)
        yield x0, xt, t, torch.arange(2), None, ScoreEntropy(graph, noise).positions(xt)


def engine_of(kind, stage, **how):
    torch.manual_seed(0)
    net = SEDD(12, width=16, depth=1, heads=2, length=8, dropout=0.1, scale_by_sigma=kind == "absorbing")
    with torch.no_grad():
        for parameter in net.parameters():  # none is 0, as some are at first, through which no gradient passes
            parameter.add_(0.1 * torch.randn_like(parameter))
    return start_engine(Loss(net, ScoreEntropy(*CASES[kind])), batch_size=4, micro_batches=2, stage=stage, **how)


@pytest.mark.usefixtures("process", "as_on_an_accelerator")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_reads_nothing(stage):
    """But ZeRO 3 of DeepSpeed hands one number of each group of weights to the device, and waits until it is there."""
    for kind, how in (("absorbing", {"weight_decay": 0.1}), ("uniform", {"precision": "bf16"})):
        ours = engine_of(kind, stage, **how)
        for step in range(3):
            made = list(batches(kind, step))
            with Reads() as reads:
                launched = launch_step(ours, made, 1e-3)
            if step:
                assert reads.found == ["tensor"] * len(reads.found) * (stage == 3), (kind, step)
                assert len(reads.found) <= 2
            with Reads() as reads:
                assert launched.read().applied
            assert reads.found == ["tolist"]


@pytest.mark.usefixtures("process", "as_on_an_accelerator")
def test_float16_adapts_its_scale_without_a_read():
    ours = engine_of("absorbing", 1, precision="fp16")
    ours.loss_scale_of_ours.value.fill_(2.0**40)
    for step in range(3):
        made = list(batches("absorbing", step))
        with Reads() as reads:
            launched = launch_step(ours, made, 1e-3)
        assert step == 0 or reads.found == []
        done = launched.read()
        assert (done.applied, done.forgiven, done.scale) == (False, True, 2.0 ** (40 - step))


def test_reads_are_found(process):
    """At once, as on the CPU, values are looked at where they arise."""
    with Reads() as reads:
        launch_step(engine_of("absorbing", 1), batches("absorbing", 0), 1e-3)
        torch.tensor(1.0, device="cpu")
        torch.ones(2)[torch.ones(2).bool()]
    assert {"_local_scalar_dense", "tensor", "index"} <= set(reads.found)


@pytest.mark.usefixtures("process", "as_on_an_accelerator")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_comes_before_the_update_sees_the_weights_of_the_step_before(stage):
    ours, seen = engine_of("absorbing", stage), []

    def weights():
        return zero_shards.gather(ours)["vocab_embed.embedding"]

    for step in range(2):
        before = weights()
        launch_step(ours, batches("absorbing", step), 1e-2, before_update=lambda: seen.append(weights()))
        assert torch.equal(seen[-1], before)
        assert not torch.equal(weights(), before)
    assert len(seen) == 2


def of_a_run(folder):
    """What it logged, but for times, and all that it left in files of weights."""
    timed = {"tokens_per_second", "mfu", "waited_for_data", "memory_gb", "eta_seconds", "time", "environment"}
    lines = [{k: v for k, v in line.items() if k not in timed} for line in loggers.read(folder / "log.jsonl")]
    lines = [line for line in lines if line["kind"] != "start"]  # a run that is continued has two
    files = sorted(path.relative_to(folder) for path in folder.glob("**/*.safetensors"))
    return lines, {str(name): safetensors.torch.load_file(folder / name) for name in files}


def assert_alike(one, other):
    (lines, files), (others, theirs) = of_a_run(one), of_a_run(other)
    assert lines == others
    assert files.keys() == theirs.keys() != set()
    for name, tensors in files.items():
        assert all(torch.equal(tensors[key], theirs[name][key]) for key in tensors), name


@pytest.mark.usefixtures("zero_on_one_rank")
@pytest.mark.parametrize("stage", [0, 2])
def test_a_run_that_is_read_late_is_the_same_run(here, tmp_path, monkeypatch, stage):
    """To the last digit and in the same order: measured and saved at several steps, left, and continued."""
    values = {"steps": 9, "evaluate_every": 4, "checkpoint_every": 3, "zero_stage": stage}
    here(tmp_path / "at once", **values)
    monkeypatch.setattr(engine, "reading_waits", lambda tensor: True)
    here(tmp_path / "late", **values)
    assert_alike(tmp_path / "at once", tmp_path / "late")
    shutil.copytree(tmp_path / "late", tmp_path / "left")
    shutil.rmtree(tmp_path / "left" / "checkpoints" / "step-00000009")
    shutil.rmtree(tmp_path / "left" / "export")
    here(tmp_path / "left", resume=True)
    assert_alike(tmp_path / "late", tmp_path / "left")


@pytest.mark.usefixtures("zero_on_one_rank")
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_steps_that_are_not_finite_are_told_late_in_the_same_words(here, tmp_path, monkeypatch, stage):
    """Three in a row end the run, with the diagnosis of the last of them, in the weights that it saw."""
    values = {"learning_rate": 1e30, "warmup": 0, "max_skipped": 3, "steps": 9, "zero_stage": stage}
    told = []
    for run in ("at once", "late"):
        with pytest.raises(TrainingError) as caught:
            here(tmp_path / run, **values)
        told.append(str(caught.value))
        monkeypatch.setattr(engine, "reading_waits", lambda tensor: True)
    assert told[0] == told[1]
    lines, others = (of_a_run(tmp_path / run)[0] for run in ("at once", "late"))
    assert lines == others
    assert [line["kind"] for line in lines].count("skipped") == 3
