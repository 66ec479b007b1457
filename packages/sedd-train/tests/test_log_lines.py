"""What a run says while it trains: at its start, at steps that are left out, at its measurements, and why it stops."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sedd_graphs import Absorbing, LogLinear
from sedd_train import distributed, evaluation, flops, loggers, nonfinite, progress, randomness, recipes, zero_shards
from sedd_train.engine import Step
from sedd_train.evaluation import Evaluation, Levels
from sedd_train.folders import Part
from sedd_train.loading import Batches
from sedd_train.nonfinite import diagnose, not_finite
from sedd_train.objectives import ScoreEntropy
from sedd_train.text8 import character_tokenizer
from sedd_train.tokens import Tokens
from torch import nn

OBJECTIVE = ScoreEntropy(Absorbing(27), LogLinear())
RECIPE = recipes.override(recipes.Recipe(), {"length": 8, "batch_size": 4, "steps": 11, "seed": 5})


@pytest.fixture
def said(monkeypatch):
    """The lines that were said."""
    lines: list[str] = []
    for module in (progress, distributed):
        monkeypatch.setattr(module, "say", lines.append)
    return lines


class Written:
    """A progress that keeps what is written."""

    def __init__(self, output: Any = None) -> None:
        self.output, self.lines = output, list[Any]()

    def write(self, kind: str, *, copy: bool = True, **values: Any) -> None:
        self.lines.append((kind, copy, values))


def tokens(count: int = 80) -> Tokens:
    return Tokens(np.arange(count, dtype=np.uint16) % 27, np.array([30, count]), 2 * count)


@pytest.mark.parametrize("step", [0, 400])
def test_what_is_trained_on_what(said, step, tmp_path):
    parts = (Part("a.txt", "train", "text"), Part("b.txt", "validation", "text"))
    text: Any = SimpleNamespace(train=tokens(1600), valid=tokens(81), tokenizer=character_tokenizer(), parts=parts)
    batches: Any = SimpleNamespace(world_size=2, available=20)
    shown: Any = Written(tmp_path)
    saved: Any = SimpleNamespace(step=step) if step else None
    progress.introduce(shown, RECIPE, batches, text, 2_345_678, saved, torch.device("cpu"))
    assert said == [
        "text:\n  a.txt: train, text, documents\n  b.txt: validation, text, documents",
        "2.3 M parameters, 0.0 M training tokens in 20 blocks of 8, 81 tokens held out (4.8% of all), vocabulary of "
        "27\n11 steps of 32 tokens (2.2 epochs) on 2 x cpu, ZeRO 1, fp32"
        + (f"; continuing at step {step}" if step else ""),
    ]
    ((kind, copy, values),) = shown.lines
    assert (kind, copy, values.pop("environment")["device"]) == ("start", False, "2 x cpu")
    assert values.pop("unigram_entropy") == pytest.approx(math.log(27))
    assert values == {
        **{"step": step, "steps": 11, "parameters": 2_345_678, "training_tokens": 1600, "characters_per_token": 2.0}
    }


def test_how_ranks_share_is_said(said):
    text: Any = SimpleNamespace(train=tokens(1600), valid=tokens(81), tokenizer=character_tokenizer(), parts=())
    for stage, ranks, words in (
        (0, 1, "on 1 x cpu, ZeRO 0, fp32"),
        (2, 1, "on 1 x cpu, without ZeRO (one rank has nobody to share with), fp32"),
        (2, 2, "on 2 x cpu, ZeRO 2, fp32"),
    ):
        batches: Any = SimpleNamespace(world_size=ranks, available=20)
        recipe = recipes.override(RECIPE, {"zero_stage": stage})
        shown: Any = Written()
        progress.introduce(shown, recipe, batches, text, 1, None, torch.device("cpu"))
        assert said.pop().endswith(words)


def test_what_is_cut_off_to_be_watched_is_said(said):
    batches: Any = SimpleNamespace(world_size=1, available=20)
    for parts, told in (
        ((Part("a.txt", "train", "text"),), ", a part of the files to train on: --valid names others"),
        ((), ""),  # a corpus that has no files
    ):
        text: Any = SimpleNamespace(train=tokens(240), valid=tokens(), tokenizer=character_tokenizer(), parts=parts)
        progress.introduce(Written("run"), RECIPE, batches, text, 1, None, torch.device("cpu"))  # type: ignore[arg-type]
        assert f"blocks of 8, 80 tokens held out (25.0% of all{told}), vocabulary" in said[-1]


@pytest.mark.parametrize("slow", [True, False])
def test_a_cpu_that_emulates_bfloat16_is_told_of(slow, said, monkeypatch):
    monkeypatch.setattr(flops, "emulates_bf16", lambda: slow)
    text: Any = SimpleNamespace(train=tokens(), valid=tokens(), tokenizer=character_tokenizer(), parts=())
    batches: Any = SimpleNamespace(world_size=1, available=20)
    shown: Any = Written()
    for precision in ("fp32", "bf16"):
        recipe = dataclasses.replace(RECIPE, precision=precision)
        progress.introduce(shown, recipe, batches, text, 1, None, torch.device("cpu"))
    assert len(said) == 2 + slow
    assert said[-1].startswith("this CPU has no instructions for bfloat16") is slow


def test_a_scale_that_was_too_large(said):
    shown: Any = Written()
    progress.tell_scale(shown, 6, Step(1.0, math.nan, False, False, torch.zeros(1), scale=64.0, forgiven=True))
    assert said == ["step 7 left out: float16 does not hold its gradient; the loss's scale is 32 now"]
    assert shown.lines == [("scale", False, {"step": 7, "scale": 32.0})]


@pytest.fixture
def one_rank(monkeypatch):
    """A world of one that was never started."""
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(dist, "all_gather_object", lambda into, own: into.__setitem__(0, own))


@pytest.mark.parametrize(
    ("losses", "bad", "counted"),
    [
        ([1.0, math.nan, math.inf, 2.0], [13, 14], 2),
        ([-math.inf, 1.0, 1.0, 2.0], [12], 1),
        ([1.0, 1.0, 1.0, 2.0], [12, 13, 14, 15], 0),  # a gradient was at fault: any of them
    ],
)
def test_a_step_that_was_left_out(losses, bad, counted, said, one_rank):
    batches = Batches(tokens(), RECIPE, OBJECTIVE, 0, 1, None)
    shown: Any = Written()
    progress.tell_skipped(shown, 3, Step(16.0, 2.5, False, False, torch.tensor(losses)), batches, 2)
    assert said == [
        f"step 4 skipped, 2 in a row: loss 2, gradient norm 2.5; {counted} of 4 samples have a loss that is not finite"
    ]  # 16 nats a sequence of 8 tokens
    ((kind, copy, values),) = shown.lines
    assert (kind, copy) == ("skipped", False)
    assert values == {"step": 4, "loss": 2.0, "grad_norm": 2.5, "samples": bad, "starts": batches.where(bad)}


def test_losses_that_are_not_finite_are_those_of_all_ranks_in_order(monkeypatch):
    monkeypatch.setattr(nonfinite, "_from_all", lambda mine: [[9, 5], mine, []])
    losses = torch.tensor([1.0, math.nan, math.inf, -math.inf, 1e38])
    assert not_finite(losses, [4, 7, 6, 3, 2]) == [3, 5, 6, 7, 9]
    with pytest.raises(ValueError, match="zip"):
        not_finite(losses, [1])


# Where numbers stop being finite


class Spoilt(nn.Module):
    """Two layers; what the first gives is spoilt at times beyond a half, and the second's gradient where told."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 1)
        self.backward_too = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(self.first(x))
        if self.backward_too:
            out.register_hook(lambda slope: slope * math.inf)
        return out


def engine_of(net: Spoilt, spoilt: float) -> Any:
    class Engine:
        device = "cpu"
        module = SimpleNamespace(net=net)

        def __call__(self, x, _, t):
            each = net(torch.where(t > spoilt, math.inf, x.float())[:, None].expand(-1, 2)).sum(-1)
            return each.mean(), each.detach()

        def backward(self, loss):
            loss.backward()

    return Engine()


def diagnosis(net: Spoilt, times: list[float], monkeypatch: pytest.MonkeyPatch, spoilt: float = 2.0) -> list[str]:
    monkeypatch.setattr(zero_shards, "gather", lambda engine: {name: p.detach() for name, p in net.named_parameters()})
    t = torch.tensor(times)
    batches = [(torch.ones(1), torch.ones(1), part) for part in t.split(1)]
    return diagnose(engine_of(net, spoilt), batches, [10 + i for i in range(len(times))]).splitlines()


def filled(value: float) -> Spoilt:
    net = Spoilt()
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(value)
    return net


def test_it_begins_in_a_forward_pass(one_rank, monkeypatch):
    lines = diagnosis(filled(0.5), [0.25, 0.75, 0.3], monkeypatch, spoilt=0.5)
    assert lines == [
        "weights: all finite, the largest 0.5 in first.weight",
        "forward pass: rank 0: first is the first that is not finite (100% of its numbers), after second with a root "
        "mean square of 2",
        "samples: 1 of 3 with a loss that is not finite, and their noise levels: 11 (t = 0.7500)",
    ]
    assert diagnosis(filled(0.5), [0.75], monkeypatch, spoilt=0.5)[1].endswith("of its numbers), after the input")


def test_it_begins_in_a_backward_pass(one_rank, monkeypatch):
    net = filled(0.5)
    net.backward_too = True
    lines = diagnosis(net, [k / 20 for k in range(20)], monkeypatch)
    assert lines[1:3] == [
        "forward pass: every module's output is finite",
        "backward pass: rank 0: first is the first that is not finite (100% of its numbers), after second with a root "
        "mean square of 1",
    ]
    assert lines[3].startswith("samples: 20 of 20 in the step, all with a finite loss, and their noise levels: 10 (t =")
    assert lines[3].endswith("25 (t = 0.7500) and 4 more")
    assert not net.first._forward_hooks
    assert diagnosis(filled(0.5), [0.1] * 16, monkeypatch)[-1].endswith("25 (t = 0.1000)")


def test_weights_that_are_not_finite_are_named():
    bad = {f"w{i}": torch.tensor([1.0, math.nan]) for i in range(6)}
    assert nonfinite._weights(bad | {"fine": torch.ones(1)}) == "weights: not finite in w0, w1, w2, w3 and 2 more"
    four = dict(list(bad.items())[:4])
    assert nonfinite._weights(four) == "weights: not finite in w0, w1, w2, w3"


def test_what_passed_through_a_module_is_told_by_its_share_and_size():
    seen = nonfinite._Seen()
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float16, requires_grad=True)
    y = x * 1
    seen.note("a", nn.Identity(), None, y)
    (y * torch.tensor([math.inf, 1.0])).sum().backward()
    for other in ((y,), torch.ones(2, dtype=torch.int64), torch.ones(0)):
        seen.note("b", nn.Identity(), None, other)
    ((name, share, size),) = seen.outputs
    assert (name, share) == ("a", 0.0)
    assert size == pytest.approx(math.sqrt(12.5))
    assert [(name, share) for name, share, _ in seen.gradients] == [("a", 0.5)]
    assert nonfinite._Seen.first(seen.outputs) is None
    assert (
        nonfinite._Seen.first(seen.gradients)
        == "a is the first that is not finite (50% of its numbers), after the input"
    )


# Measuring


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_measurement_is_of_the_recipe_s_numbers_and_told_by_the_first_rank(packing, rank, said, monkeypatch):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    asked: dict[str, Any] = {}

    def measure(net, objective, blocks, **how):
        asked["measure"] = (net, objective, blocks, how)
        return Evaluation(math.log(8), 0.25, 2.0)

    def levels(net, graph, noise, blocks, **how):
        asked["levels"] = (net, graph, noise, blocks, how)
        return Levels(torch.tensor([0.5]), torch.tensor([2.0]), torch.tensor([0.125]))

    def sample(self, net, shape, *, steps, generator, device):
        asked["sample"] = (net, shape, steps, generator.initial_seed(), device)
        assert torch.is_inference_mode_enabled()
        return torch.full(shape, 1)

    monkeypatch.setattr(progress, "measure", measure)
    monkeypatch.setattr(progress, "by_noise_level", levels)
    monkeypatch.setattr(ScoreEntropy, "sample", sample)
    coder: Any = character_tokenizer("abc", end="<end>")
    named = None if packing else np.array([1, -1], np.int32)
    valid = Tokens(np.array([0, 1, 2, 3] * 6), np.array([4, 24]), 48, size=72, labels=named)
    recipe = dataclasses.replace(
        RECIPE, packing=packing, evaluate_blocks=2, evaluate_times=7, sample_steps=9, t_min=0.25
    )
    net, device, shown = nn.Linear(1, 1), torch.device("cpu"), Written()
    text: Any = SimpleNamespace(valid=valid, tokenizer=coder)
    found = progress.measure_and_sample(net, OBJECTIVE, text, recipe, 3, shown, device)  # type: ignore[arg-type]
    assert found == Evaluation(math.log(8), 0.25, 2.0)
    blocks, lengths = valid.first(2, 8, None if packing else 3)
    for name, how in [
        ("measure", {"characters_per_token": 2.0, "num_times": 7, "seed": 5}),
        ("levels", {"t_min": 0.25, "seed": 5}),
    ]:
        *given, told = asked[name]
        assert given[0] is net
        assert torch.equal(given[-1], blocks)
        lengths_told = told.pop("lengths")
        assert (lengths_told is None) is packing
        labels_told = told.pop("labels")
        assert labels_told is None if packing else labels_told.tolist() == [1, -1]
        assert lengths is None or torch.equal(lengths_told, lengths)
        assert told == how
    assert (asked["measure"][1], *asked["levels"][1:3]) == (OBJECTIVE, OBJECTIVE.graph, OBJECTIVE.noise)
    if rank:
        assert (shown.lines, said, "sample" in asked) == ([], [], False)
        return
    length = 8 if packing else [4, 8][3 % 2]
    seed = randomness.derived_seed(5, randomness.SAMPLING, 3)
    assert asked["sample"] == (net, (1, length), 9, seed, device)
    levels_line, valid_line = shown.lines
    assert levels_line == (
        "levels", False, {"step": 3, "t": [0.5], "nats_per_token": [2.0], "standard_error": [0.125]}
    )  # fmt: skip
    values = {"nats_per_token": math.log(8), "standard_error": 0.25, "perplexity": pytest.approx(8.0)}
    values |= {"bits_per_character": pytest.approx(1.5), "bits_per_byte": pytest.approx(1.0), "sample": "b" * length}
    assert valid_line == ("valid", True, {"step": 3} | values)
    assert said == [
        "\nstep 3: held-out bound 2.079 ± 0.250 nats a token, perplexity 8.0, 1.500 bits a character, 1.000 a byte\n"
        f"{'b' * length}\n"
    ]


def test_a_young_network_s_sample_may_fail(said, monkeypatch):
    class Other:
        def sample(self, *given, **how):
            raise ValueError("overflow")

    monkeypatch.setattr(progress, "measure", lambda *given, **how: Evaluation(1.0, 0.1, 1.0))
    monkeypatch.setattr(progress, "by_noise_level", None)  # of another objective there are no levels
    shown: Any = Written()
    text: Any = SimpleNamespace(valid=tokens(), tokenizer=character_tokenizer())
    progress.measure_and_sample(nn.Linear(1, 1), Other(), text, RECIPE, 1, shown, torch.device("cpu"))  # type: ignore[arg-type]
    assert [(kind, values["sample"]) for kind, _, values in shown.lines] == [("valid", "(no sample: overflow)")]


def test_the_bar_tells_the_log_s_loss_and_the_time_left_is_of_steps_to_come(tmp_path, monkeypatch):
    """The seconds move by a twentieth towards each step's; the speed is the median's, the loss the step's own."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])  # type: ignore[attr-defined]
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    recipe = dataclasses.replace(RECIPE, log_every=1)
    shown = progress.Progress(tmp_path, recipe, first=4, flops_a_token=50.0, peak=None, tensorboard=False, wandb="")
    assert (shown.bar.initial, shown.bar.total, shown.steps) == (4, 11, 11)
    postfix: list[str] = []
    monkeypatch.setattr(shown.bar, "set_postfix_str", lambda text, refresh: postfix.append(text))
    done = Step(8.0, 2.5, True, False, torch.zeros(1))
    for step, seconds, loss in ((4, 2.0, 3.0), (5, 4.0, 2.0), (6, 2.0, math.inf)):
        now[0] += seconds
        shown.step_taken(step, done, 1e-3, loss)
        shown.restart_clock()
    lines = loggers.read(tmp_path / "log.jsonl")
    smooth = 0.95 * 2.0 + 0.05 * 4.0
    assert [line["eta_seconds"] for line in lines] == [12, round(5 * smooth), round(4 * (0.95 * smooth + 0.1))]
    assert [line["loss"] for line in lines] == [3.0, 2.0, None]
    assert [line["mfu"] for line in lines] == [None] * 3
    assert postfix[:2] == [
        "loss 3.000 nats a token, 16 tokens/s", "loss 2.000 nats a token, 11 tokens/s"
    ]  # fmt: skip
    assert [line["waited_for_data"] for line in lines] == [0.0] * 3
    shown.close()


def test_one_word_stops_all_ranks(monkeypatch):
    """The first failure is raised on every rank, whichever had it."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)

    def gather(into, own):
        into[:] = ["", "second", own]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    with pytest.raises(ValueError, match=r"^second$"):
        evaluation._raise_together("third")
    monkeypatch.setattr(dist, "all_gather_object", lambda into, own: into.__setitem__(0, own))
    evaluation._raise_together("")
