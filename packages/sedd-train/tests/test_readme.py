import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.filterwarnings("default")  # DeepSpeed warns
def test_python_blocks_run(capsys, world, tmp_path, monkeypatch):
    world(monkeypatch, draws=True)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(README), "exec"), {"__name__": "readme"})
    (bits,) = re.findall(r"^([0-9.]+) bits a character$", capsys.readouterr().out, flags=re.MULTILINE)
    assert 1 < float(bits) < 6
    assert (tmp_path / "runs" / "preamble" / "report.html").is_file()
