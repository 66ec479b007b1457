"""What follows from the numbers of a step that was launched, whenever they are read."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sedd_train import nonfinite, recipes, settling
from sedd_train.engine import Launched, Step, on
from sedd_train.settling import Account, Open, TrainingError

RECIPE = recipes.override(recipes.Recipe(), {"batch_size": 4, "length": 8, "max_skipped": 2, "learning_rate": 0.25})


@pytest.fixture
def account(monkeypatch):
    """An account of which everything that it does is noted."""
    done: list[Any] = []
    batches = SimpleNamespace(text_tokens=lambda step: 20 + step, samples=lambda step: [step])
    progress = SimpleNamespace(
        step_taken=lambda step, numbers, lr, loss: done.append(("told", step, lr, loss)),
        write=lambda kind, **values: done.append((kind, values)),
    )
    ema = SimpleNamespace(update=lambda: done.append("average"))
    monkeypatch.setattr(settling, "tell_scale", lambda progress, step, numbers: done.append(("scale", step)))
    monkeypatch.setattr(
        settling, "tell_skipped", lambda progress, step, numbers, batches, row: done.append(("skipped", step, row))
    )
    monkeypatch.setattr(nonfinite, "diagnose", lambda engine, made, samples: f"of {made} and {samples}")
    made: Any = Account("engine", ema, progress, RECIPE, batches)  # type: ignore[arg-type]
    made.done = done
    return made


def settle(account: Any, step: int, **values: Any) -> list[Any]:
    """What is done of a step whose numbers are these."""
    given: dict[str, Any] = {"loss": 10.0, "grad_norm": 1.0, "applied": True, "stop": False, "losses": torch.zeros(1)}
    launched: Any = SimpleNamespace(read=lambda: Step(**given | values))
    account.open, account.done[:] = Open(step, launched, ["batches"], 0.5), []  # type: ignore[list-item]
    account.settle()
    assert account.open is None
    return list(account.done)


def test_a_step_that_was_taken_moves_the_average_and_is_told(account):
    account.settle()  # of none nothing follows
    assert account.done == []
    assert settle(account, 5) == ["average", ("told", 5, 0.5, 10 * 4 / 25)]  # nats a token of text
    assert (account.skipped, account.stop) == (0, False)
    settle(account, 6, stop=True)
    assert account.stop is True
    settle(account, 7)
    assert account.stop is False


def test_steps_that_were_not_taken_are_counted_and_too_many_end_the_run(account):
    told = settle(account, 5, applied=False, loss=math.nan)
    assert [entry[0] for entry in told] == ["told", "skipped"]
    assert told[1] == ("skipped", 5, 1)
    assert account.skipped == 1
    settle(account, 6)
    assert account.skipped == 0  # in a row, that is
    settle(account, 7, applied=False)
    assert settle(account, 8, applied=False, forgiven=True, scale=8.0)[1] == ("scale", 8)
    assert account.skipped == 0  # a scale that was too large is no fault of the weights
    settle(account, 9, applied=False)
    with pytest.raises(TrainingError) as caught:
        settle(account, 10, applied=False)
    assert account.done[-1] == ("diagnosis", {"copy": False, "step": 11, "text": "of ['batches'] and [10]"})
    assert str(caught.value) == (
        "2 steps in a row had a loss or gradient that is not finite: training stops, and the weights are as they were "
        "before them. Try a lower --learning-rate than 0.25, or --precision fp32.\nof ['batches'] and [10]"
    )


def test_a_launched_step_is_read_as_it_came():
    losses = torch.tensor([3.0, 4.0])
    launched = Launched(torch.tensor([1.5, 2.5, 1, 0, 64, 0], dtype=torch.float64), losses)
    assert launched.late is False  # on a CPU it is there at once
    found = launched.read()
    assert (found.loss, found.grad_norm, found.applied, found.stop) == (1.5, 2.5, True, False)
    assert (found.scale, found.forgiven, found.losses is losses) == (64.0, False, True)
    found = Launched(torch.tensor([math.nan, math.inf, 0, 1, 1, 1], dtype=torch.float64), losses).read()
    assert math.isnan(found.loss)
    assert (found.grad_norm, found.applied, found.stop, found.forgiven) == (math.inf, False, True, True)


def test_a_batch_may_lack_a_part():
    given: Any = (torch.zeros(2), None, torch.ones(2))
    moved: Any = on(torch.device("cpu"), given)
    assert all(part is other for part, other in zip(moved, given, strict=True))
