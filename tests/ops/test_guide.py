"""docs/adding-an-operator.md does what it says: its code is run, its entry points are installed."""

import re
import tomllib
from pathlib import Path

import pytest
import torch

from graphprune import plugins as installed
from graphprune.errors import GraphPruneError, VerifyError
from graphprune.ops import registry
from graphprune.ops.torch import ATEN

GUIDE = Path(__file__).parents[2] / "docs" / "adding-an-operator.md"


def blocks(language):
    text = GUIDE.read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def names():
    """What the guide's code defines, but for its last block, which uses it."""
    namespace = {"__name__": "mylib.pruning"}
    for block in blocks("python")[:-1]:
        exec(block, namespace)
    return namespace


class EntryPoint:
    def __init__(self, name, value, namespace):
        self.name, self.value, self.namespace = name, value, namespace

    def load(self):
        return self.namespace[self.value.rpartition(":")[2]]


@pytest.fixture
def install(names, monkeypatch):
    """Pretends that a package with the guide's entry points is installed."""

    def with_groups(*left_out):
        points = {}
        for block in blocks("toml"):
            for group, entries in tomllib.loads(block)["project"]["entry-points"].items():
                known = points.setdefault(group, [])
                known += [EntryPoint(n, v, names) for n, v in entries.items()]

        def found(group):
            return [] if group in left_out else points.get(group, [])

        monkeypatch.setattr(ATEN, "_rules", dict(ATEN._rules))
        monkeypatch.setattr(ATEN, "_plugins_loaded", False)
        for module in (registry, installed):
            monkeypatch.setattr(module, "entry_points", found)
        installed.plugins.cache_clear()

    yield with_groups
    monkeypatch.undo()
    installed.plugins.cache_clear()


def run_guide(names):
    torch.manual_seed(0)
    namespace = dict(names)
    exec(blocks("python")[-1], namespace)
    return namespace


def test_the_guide_works(names, install):
    install()
    found = run_guide(names)
    program, slim = found["program"], found["slim"]
    assert not program.typing.opaque
    sizes = {s.size for s in program.structures if s.prunable}
    assert sizes == {4, 3}  # heads, and dims within
    assert slim.shapes["out.weight"] == (3, 2)
    x = torch.randn(7, 6)
    with torch.no_grad():
        assert slim.exported.module()(x).shape == (7, 3)


def test_ten_lines():
    rule = blocks("python")[1].split("\n\n\n")[1]
    assert rule.startswith("def scaled_add_rule")
    assert len(rule.strip().splitlines()) <= 10


def test_without_the_masked_formula_the_difference_is_noticed(names, install):
    install("graphprune.masked")
    with pytest.raises(VerifyError):
        run_guide(names)


def test_without_the_size_rule_the_difference_is_noticed(names, install):
    install("graphprune.sizes")
    with pytest.raises(GraphPruneError, match="wrong shape") as caught:
        run_guide(names)
    assert caught.value.where.startswith("head_means mylib::head_means")


@pytest.mark.parametrize("name", ["aten.mean", "mylib.twice"])
def test_names_that_are_taken(monkeypatch, name):
    points = [EntryPoint(name, "mylib:f", {"f": print})] * 2
    monkeypatch.setattr(installed, "entry_points", lambda group: points)
    with pytest.raises(GraphPruneError, match=f"{name} has two"):
        installed.plugins.__wrapped__("graphprune.masked")


def test_what_can_not_be_loaded_is_named(monkeypatch):
    points = [EntryPoint("mylib.f", "mylib:f", {})]
    monkeypatch.setattr(installed, "entry_points", lambda group: points)
    with pytest.raises(GraphPruneError, match=r"mylib\.f can't be loaded"):
        installed.plugins.__wrapped__("graphprune.masked")
