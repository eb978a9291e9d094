"""A pass of another package that makes a plan: what is written is checked for that plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar

import pytest
from safetensors.torch import load_file

import graphprune
from cli.helpers import Result
from graphprune import registry
from graphprune.errors import EmitError
from graphprune.passes.protocol import Context, Record, State
from graphprune.plan.plan import Plan


@dataclass(frozen=True)
class FirstOnly:
    """Half of the first feed-forward block goes, which no native configuration can say."""

    needs_data: ClassVar[bool] = False

    def check(self, state: State, context: Context) -> None:
        pass

    def run(self, state: State, context: Context) -> State:
        first = next(s for s in state.program.structures if s.role == "ffn")
        kept = {first.name: tuple(range(first.size // 2))}
        plan = Plan(state.program.fingerprint, kept, {first.name: first.size})
        return replace(state, plan=plan).recorded(Record("first-only"))

    preview = run

    def describe(self, state: State) -> str:
        return "halve the first block"


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry_points(group: str) -> list[EntryPoint]:
        known = [EntryPoint("first-only", f"{__name__}:FirstOnly", group)]
        return known if group == "graphprune.passes" else []

    monkeypatch.setattr(registry, "entry_points", entry_points)


def test_the_form_is_that_of_its_plan(
    run: Callable[..., Result], dense: Path, tmp_path: Path
) -> None:
    report = graphprune.compile(str(dense), {"steps": ["first-only"]}, tmp_path / "slim")
    weights = load_file(tmp_path / "slim" / "model.safetensors")
    widths = [weights[f"model.layers.{i}.mlp.up_proj.weight"].shape[0] for i in range(3)]
    assert widths == [32, 64, 64]
    assert report.native is False
    assert graphprune.compile(str(dense), {"steps": ["first-only"]}, dry_run=True).native is False
    assert run("verify", tmp_path / "slim").code == 0


def test_a_native_form_is_required_of_its_plan(dense: Path, tmp_path: Path) -> None:
    recipe = {"steps": ["first-only"], "native": "require"}
    told: list[str] = []
    with pytest.raises(EmitError, match="native"):
        graphprune.compile(str(dense), recipe, tmp_path / "slim", progress=told.append)
    assert "writing hf" not in told
    assert list(tmp_path.iterdir()) == []
