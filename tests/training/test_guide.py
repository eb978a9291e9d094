"""The guides to training do what they say: the code of each is run as one program."""

import importlib.util
import json
import re
from pathlib import Path

import graphprune as gp

DOCS = Path(__file__).parents[2] / "docs"


def blocks(name):
    return re.findall(r"```python\n(.*?)```", (DOCS / name).read_text("utf-8"), re.DOTALL)


def test_the_guide_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = blocks("training.md")
    assert len(code) == 6
    names = {}
    for block in code:
        exec(block, names)
    gp.verify(names["dense"], names["plan"], gp.apply(names["dense"], names["plan"]))
    kept = names["slim"].parameters
    assert kept["up.weight"] == (32, 24)


def test_the_guide_to_loops_of_ones_own_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = blocks("own-loop.md")
    assert ["lightning" in block for block in code] == [False] * 4 + [True]
    if importlib.util.find_spec("lightning") is None:
        del code[-1]
    names = {"__name__": "example"}
    for block in code:
        exec(block, names)
    report = json.loads((tmp_path / "sparse" / "sparsity.json").read_text())
    assert report["options"]["pattern"] == "2:4"
    assert len(report["parameters"]) == 14
