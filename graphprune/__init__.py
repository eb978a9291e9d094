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
    from graphprune import runtime, training
    from graphprune.analysis.structure import Structure
    from graphprune.errors import (
        CalibrationError,
        EmitError,
        EvaluationError,
        GraphPruneError,
        LoadError,
        PlanError,
        RecipeError,
        TraceError,
        TrainingError,
        VerifyError,
    )
    from graphprune.frontends import load
    from graphprune.frontends.tracing.trace import trace
    from graphprune.integrations.module import prune
    from graphprune.ir.torch.program import Program
    from graphprune.oracle.verification import Certificate
    from graphprune.oracle.verify import verify
    from graphprune.passes.masks.oneshot import sparsify
    from graphprune.passes.selection.select import select
    from graphprune.pipeline.compiler import compile
    from graphprune.placement import on_device
    from graphprune.plan.plan import Plan
    from graphprune.ranks.launch import together
    from graphprune.recipe.recipe import Recipe
    from graphprune.report.report import Report
    from graphprune.rewrite.apply import apply
    from graphprune.rewrite.slim import Slim

# Loaded on first use: `graphprune --version` must not wait for torch.
_HOMES = {
    "compile": "graphprune.pipeline.compiler",
    "load": "graphprune.frontends",
    "trace": "graphprune.frontends.tracing.trace",
    "select": "graphprune.passes.selection.select",
    "sparsify": "graphprune.passes.masks.oneshot",
    "together": "graphprune.ranks.launch",
    "apply": "graphprune.rewrite.apply",
    "prune": "graphprune.integrations.module",
    "verify": "graphprune.oracle.verify",
    "on_device": "graphprune.placement",
    "Plan": "graphprune.plan.plan",
    "Program": "graphprune.ir.torch.program",
    "Structure": "graphprune.analysis.structure",
    "Slim": "graphprune.rewrite.slim",
    "Certificate": "graphprune.oracle.verification",
    "Recipe": "graphprune.recipe.recipe",
    "Report": "graphprune.report.report",
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
            "TrainingError",
        ),
        "graphprune.errors",
    ),
}


_PACKAGES = ("runtime", "training")


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"graphprune.{name}")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'graphprune' has no attribute {name!r}")
    with alone():  # of two that import at once, one may see half a module
        value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*_HOMES, "__version__", *_PACKAGES])


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
    "TrainingError",
    "VerifyError",
    "__version__",
    "apply",
    "compile",
    "load",
    "on_device",
    "prune",
    "runtime",
    "select",
    "sparsify",
    "together",
    "trace",
    "training",
    "verify",
]
