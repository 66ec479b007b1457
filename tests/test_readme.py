"""The code in the root README runs as printed; the packages' own READMEs are tested in the packages."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_python_blocks_run_and_say_what_they_should(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(README), "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    found = re.match(r"bound (\S+) nats, entropy (\S+)\n(\d+)% of the samples", printed)
    assert found, printed
    bound, entropy, words = map(float, found.groups())
    assert entropy == 1.61
    assert entropy - 0.05 < bound < entropy + 0.15  # the bound lies above the entropy, and the model is nearly exact
    assert words > 90


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
