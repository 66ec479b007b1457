"""Every test begins in the same random state, whatever ran before it and on whichever worker."""

from __future__ import annotations

import random

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take another state: what tests assert holds in any."""
    parser.addoption("--seed", type=int, default=0, help="the random state that every test begins in (default: 0)")


@pytest.hookimpl(tryfirst=True)  # before the fixtures, a module's too
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed the generators that tests draw from where they are given none."""
    seed = item.config.getoption("seed")
    random.seed(seed)
    torch.manual_seed(seed)
