from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_examples_run(block):
    exec(compile(block, str(README), "exec"), {})


def test_there_are_examples():
    assert BLOCKS
