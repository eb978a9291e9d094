"""docs/training.md does what it says: its code is run as one program."""

import re
from pathlib import Path

import graphprune as gp

GUIDE = Path(__file__).parents[2] / "docs" / "training.md"


def test_the_guide_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)
    assert len(code) == 7
    names = {}
    for block in code:
        exec(block, names)
    gp.verify(names["dense"], names["plan"], gp.apply(names["dense"], names["plan"]))
    kept = names["slim"].parameters
    assert kept["up.weight"] == (32, 24)
