"""The help of commands names what recipes take.

It is written by hand: options that were made from a recipe's fields would have every command import
pydantic and the recipe, and those of `recover` torch, before it prints a word.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any, get_args, get_type_hints

import pytest
import typer

from graphprune.cli.app import app
from graphprune.cli.console import use_threads
from graphprune.passes.masks import ALLOCATIONS, METHODS
from graphprune.passes.repair import REPAIRS
from graphprune.passes.scores import SCORES
from graphprune.passes.selection.alignment import ALIGNMENTS
from graphprune.pipeline.steps.recover import Recover
from graphprune.quality.conditions import METRICS
from graphprune.recipe.named import UNREPAIRED
from graphprune.recipe.recipe import FORMATS, Recipe
from graphprune.recipe.selection import BUDGETS
from graphprune.recipe.sparsify import Sparsify
from graphprune.training import Training


def names(model: Any, field: str) -> set[str]:
    """The words that a field may be."""
    found: list[Any] = [get_type_hints(model)[field]]
    for one in found:
        found += get_args(one)
    return {one for one in found if isinstance(one, str)}


def words(command: str, option: str) -> set[str]:
    """The words of an option's help."""
    parameters = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    (text,) = (p.help for p in parameters if p.name == option)
    return set(re.findall(r"\w+(?:[+-]\w+)*", text))


@pytest.mark.parametrize(
    ("command", "option", "wanted"),
    [
        ("compile", "sparsify", METHODS.own),
        ("compile", "budget", ALLOCATIONS.own),
        ("compile", "target", BUDGETS),
        ("compile", "balance", names(Sparsify, "balance")),
        ("compile", "effort", names(Recipe, "effort")),
        ("compile", "align", ALIGNMENTS),
        ("compile", "formats", FORMATS),
        ("compile", "fail_if", METRICS),
        ("recover", "train", names(Recover, "train")),
        ("recover", "loss", names(Training, "loss")),
    ],
)
def test_every_name_is_in_the_help(command: str, option: str, wanted: Iterable[str]) -> None:
    assert set(wanted)
    assert set(wanted) <= words(command, option)


@pytest.mark.parametrize(
    ("option", "valid"),
    [("score", {"auto", *SCORES.own}), ("repair", {*UNREPAIRED, *REPAIRS.own})],
)
def test_what_the_help_names_there_is(option: str, valid: set[str]) -> None:
    assert words("compile", option) - {"the", "default"} <= valid


def test_the_first_page_has_three_examples_and_completion(run):
    shown = run("--help").out
    for example in ("inspect MODEL", "compile MODEL -o SLIM --remove ffn=0.25", "eval SLIM"):
        assert f"graphprune {example}" in shown
    assert "--install-completion" in shown
    assert len(shown.splitlines()) < 50


def test_threads_are_those_that_are_asked_for(monkeypatch):
    found = []
    monkeypatch.setattr("torch.set_num_threads", found.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    use_threads(None)
    assert (found, os.environ["OMP_NUM_THREADS"]) == ([], "7")
    use_threads(2)
    assert (found, os.environ["OMP_NUM_THREADS"]) == ([2], "2")


@pytest.mark.parametrize("command", ["compile", "recover", "sweep"])
def test_what_computes_says_where(command):
    parameters = typer.main.get_command(app).commands[command].params
    assert {"device", "memory", "threads"} <= {one.name for one in parameters}


def test_a_device_that_is_not_there(run, tmp_path, compiled):
    wanted = ("--device", "cuda:99", "--threads", 1)
    done = run("recover", compiled, "-o", tmp_path / "out", *wanted)
    assert done.code == 1
    assert "there is no device cuda" in done.err
