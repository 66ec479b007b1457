"""The README's example runs as printed, and says what it should."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_example_runs_and_its_bounds_are_near_the_entropy(capsys):
    (block,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    exec(compile(block, str(README), "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    found = re.match(r"bound (\S+) nats a sequence, entropy (\S+)\nover random orders (\S+) nats a sequence\n", printed)
    assert found, printed
    bound, entropy, orders = map(float, found.groups())
    assert entropy == 7.52
    assert abs(bound - entropy) < 0.6
    assert abs(orders - entropy) < 0.6
