"""Prompts of different lengths through a network of ours: a row's sample is the one that it would have alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sedd_graphs import Absorbing, LogLinear
from sedd_nets import RADD, SEDD, LabelCondition, bind
from sedd_samplers import Euler, Tweedie, infill, pad_prompts

SIZES: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2, "length": 12, "dropout": 0.0}
PROMPTS, LENGTHS = [[5, 7], [5], [], [1, 2, 3]], [12, 5, 9, 7]
SEEDS = [7, 8, 9, 10]
LABELS = torch.tensor([0, 1, -1, 2])


@pytest.mark.parametrize("method", [Tweedie(), Euler()], ids=["tweedie", "euler"])
@pytest.mark.parametrize("family", [SEDD, RADD])
def test_a_row_is_what_it_is_alone(family, method):
    torch.manual_seed(0)
    net = family(10, **SIZES, **({"scale_by_sigma": True} if family is SEDD else {})).eval()
    if family is SEDD:
        net.condition_embed = LabelCondition(3, net.cond_dim)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    graph, noise = Absorbing(9), LogLinear()
    labels = LABELS if family is SEDD else None
    x, given = pad_prompts(PROMPTS, LENGTHS, pad_id=0)
    score = bind(net, lengths=LENGTHS, condition=labels)
    together = infill(score, graph, noise, x=x, given=given, steps=8, method=method, seeds=SEEDS)
    for i, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        own, own_given = pad_prompts([prompt], length)
        score = bind(net, condition=None if labels is None else labels[i : i + 1])
        alone = infill(score, graph, noise, x=own, given=own_given, steps=8, method=method, seeds=SEEDS[i : i + 1])
        assert torch.equal(together[i, :length], alone[0])
