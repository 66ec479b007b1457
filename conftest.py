"""Every test begins in the same random state, whatever ran before it and on whichever worker."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take another state: what tests assert holds in any."""
    parser.addoption("--seed", type=int, default=0, help="the random state that every test begins in (default: 0)")


@pytest.hookimpl(tryfirst=True)  # before its fixtures
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed torch's generator, from which tests and new networks draw where they are given none."""
    torch.manual_seed(item.config.getoption("seed"))


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Generator[None, Any, Any]:
    """What tests share is made in that state as well, and leaves it as it was to the test that came first."""
    if fixturedef.scope == "function":
        return (yield)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(request.config.getoption("seed"))
        return (yield)
