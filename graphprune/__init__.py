"""graphprune: a compiler that makes trained networks smaller.

import graphprune as gp

program = gp.load("path/to/checkpoint")
plan = gp.select(program, remove={"ffn": 0.25, "heads": 1 / 3})
slim = gp.apply(program, plan)
gp.verify(program, plan, slim).raise_if_failed()
slim.save("slim", format="hf")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from graphprune._version import __version__
from graphprune.exclusive import alone

if TYPE_CHECKING:
    from graphprune import runtime
    from graphprune.compiler import compile
    from graphprune.errors import (
        CalibrationError,
        EmitError,
        EvaluationError,
        GraphPruneError,
        LoadError,
        PlanError,
        RecipeError,
        TraceError,
        VerifyError,
    )
    from graphprune.frontends import load
    from graphprune.frontends.module import trace
    from graphprune.oneshot import sparsify
    from graphprune.passes.select import select
    from graphprune.plan import Plan
    from graphprune.program import Program, Structure
    from graphprune.pruning import apply, verify
    from graphprune.recipe import Recipe
    from graphprune.report import Report
    from graphprune.rewrite.slim import Slim
    from graphprune.verification import Certificate

# Loaded on first use: `graphprune --version` must not wait for torch.
_HOMES = {
    "compile": "graphprune.compiler",
    "load": "graphprune.frontends",
    "trace": "graphprune.frontends.module",
    "select": "graphprune.passes.select",
    "sparsify": "graphprune.oneshot",
    "apply": "graphprune.pruning",
    "verify": "graphprune.pruning",
    "Plan": "graphprune.plan",
    "Program": "graphprune.program",
    "Structure": "graphprune.program",
    "Slim": "graphprune.rewrite.slim",
    "Certificate": "graphprune.verification",
    "Recipe": "graphprune.recipe",
    "Report": "graphprune.report",
    **dict.fromkeys(
        (
            "GraphPruneError",
            "LoadError",
            "TraceError",
            "PlanError",
            "RecipeError",
            "VerifyError",
            "EmitError",
            "CalibrationError",
            "EvaluationError",
        ),
        "graphprune.errors",
    ),
}


def __getattr__(name: str) -> Any:
    if name == "runtime":
        return importlib.import_module("graphprune.runtime")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'graphprune' has no attribute {name!r}")
    with alone():  # of two that import at once, one may see half a module
        value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*_HOMES, "__version__", "runtime"])


__all__ = [
    "CalibrationError",
    "Certificate",
    "EmitError",
    "EvaluationError",
    "GraphPruneError",
    "LoadError",
    "Plan",
    "PlanError",
    "Program",
    "Recipe",
    "RecipeError",
    "Report",
    "Slim",
    "Structure",
    "TraceError",
    "VerifyError",
    "__version__",
    "apply",
    "compile",
    "load",
    "runtime",
    "select",
    "sparsify",
    "trace",
    "verify",
]
