"""The passes of recipes and the way of a compilation, read off the code."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path
from typing import Any

from _tables import table

ROOT = Path(__file__).resolve().parents[1]
PIPELINE = ROOT / "graphprune" / "pipeline"
BEFORE, AFTER = "compiler.py", "finish.py"
"""The files whose stages come before the passes, and after them."""


def page() -> str:
    """Return the table of passes, and a picture of the stages around them."""
    return f"{table(('pass', 'what it does', 'options'), rows())}\n{picture()}"


def rows() -> list[tuple[str, str, str]]:
    """Return name, first sentence and options of each pass."""
    from graphprune.recipe.steps import PASSES

    found = []
    for name in PASSES.own:
        made: Any = PASSES.find(name)
        words = (inspect.getdoc(made) or "").split("\n\n")[0].replace("\n", " ")
        found.append((f"`{name}`", words, ", ".join(f"`{one}`" for one in _options(name, made))))
    words = "Run several steps several times; a number may be a list with one for each round."
    return [*found, ("`repeat`", words, "`rounds`, `steps`")]


def _options(name: str, made: Any) -> list[str]:
    """The names of a pass's options: those of its section, or the fields of its class."""
    from graphprune.recipe.steps import Step

    if name in Step.model_fields:
        section = next(
            kind for kind in _models(Step.model_fields[name].annotation) if kind is not type(None)
        )
        return list(section.model_fields)
    return [field.name for field in dataclasses.fields(made)]


def _models(annotation: Any) -> list[Any]:
    return [kind for kind in (annotation, *getattr(annotation, "__args__", ()))
            if hasattr(kind, "model_fields")]  # fmt: skip


def picture() -> str:
    """Return a Mermaid graph: the stages before the passes, the passes, and the stages after."""
    from graphprune.recipe.steps import PASSES

    before, after = stages(BEFORE), stages(AFTER)
    lines = [*_chain("before", before), *_chain("after", after)]
    lines += ["  subgraph passes [the passes of the recipe, one after the other]"]
    lines += [f"    pass_{name.replace('-', '_')}[{name}]" for name in PASSES.own]
    lines += ["  end", f"  before_{len(before) - 1} --> passes --> after_0"]
    return "```mermaid\nflowchart TB\n" + "".join(f"{line}\n" for line in lines) + "```\n"


def _chain(prefix: str, names: list[str]) -> list[str]:
    nodes = [f'  {prefix}_{i}["{name}"]' for i, name in enumerate(names)]
    return [*nodes, *(f"  {prefix}_{i} --> {prefix}_{i + 1}" for i in range(len(names) - 1))]


def stages(file: str) -> list[str]:
    """Return the stages that a file of the pipeline announces, in order."""
    tree = ast.parse((PIPELINE / file).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
    found: dict[tuple[int, int], str] = {}
    for call in calls:
        name = ast.unparse(call.func).rpartition(".")[2]
        if name in ("stage", "tell", "progress"):
            text = call.args[0]
            if isinstance(text, ast.Constant):
                found[call.lineno, call.col_offset] = str(text.value)
            elif isinstance(text, ast.JoinedStr):
                found[call.lineno, call.col_offset] = ast.unparse(text)[2:-1].replace(
                    "{name}", "each format"
                )
        elif name == "prove":
            found[call.lineno, call.col_offset] = "verifying"
    return list(dict.fromkeys(found[place] for place in sorted(found)))
