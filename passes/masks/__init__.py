"""Methods that make single weights zero, and how a sparsity is dealt to layers; one a file.

Both are found by name. Other packages add methods with an entry point of the group
``graphprune.masks``, and sparsity allocations with one of ``graphprune.allocations``, whose name is
that of the pass and whose value is its class. Nothing here imports torch before a class is asked
for.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from graphprune.registry import Registry

if TYPE_CHECKING:
    from graphprune.passes.masks.allocations import Budget
    from graphprune.passes.masks.alps import ALPS
    from graphprune.passes.masks.dsnot import DSnoT
    from graphprune.passes.masks.magnitude import Magnitude
    from graphprune.passes.masks.ria import RIA
    from graphprune.passes.masks.sparsegpt import SparseGPT
    from graphprune.passes.masks.wanda import Wanda
    from graphprune.solvers import Solver

__all__ = [
    "ALLOCATIONS",
    "ALPS",
    "METHODS",
    "RIA",
    "DSnoT",
    "Magnitude",
    "SparseGPT",
    "Wanda",
    "allocation",
    "method",
]

_HERE = "graphprune.passes.masks"

METHODS: Registry[Solver] = Registry(
    "method",
    "graphprune.masks",
    {
        "alps": f"{_HERE}.alps:ALPS",
        "dsnot": f"{_HERE}.dsnot:DSnoT",
        "magnitude": f"{_HERE}.magnitude:Magnitude",
        "ria": f"{_HERE}.ria:RIA",
        "sparsegpt": f"{_HERE}.sparsegpt:SparseGPT",
        "wanda": f"{_HERE}.wanda:Wanda",
    },
    blind=frozenset({"magnitude"}),
)
ALLOCATIONS: Registry[Budget] = Registry(
    "layer budget",
    "graphprune.allocations",
    {
        "global": f"{_HERE}.allocations:Global",
        "owl": f"{_HERE}.allocations:OWL",
        "sensitivity": f"{_HERE}.allocations:Sensitivity",
        "uniform": f"{_HERE}.allocations:Uniform",
    },
    blind=frozenset({"global", "uniform"}),
)


def method(name: str, options: Mapping[str, Any]) -> Solver:
    """A method with options; one that it starts from is a name, or a mapping with its options.

    Raises:
        ValueError: see `Registry.build`; or the method that it starts from would quantise.
        PlanError: see `Registry.find`.
    """
    return METHODS.build(name, *_nested(METHODS.find(name), f"method '{name}'", options))


def allocation(name: str, options: Mapping[str, Any]) -> Budget:
    """A sparsity allocation with options; see `method`.

    Raises:
        ValueError, PlanError: see `method`.
    """
    found = ALLOCATIONS.find(name)
    return ALLOCATIONS.build(name, *_nested(found, f"layer budget '{name}'", options))


def _nested(
    made: type[Any], what: str, options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The plain options, and those that are methods themselves."""
    from graphprune.solvers import Solver

    hints = get_type_hints(made) if is_dataclass(made) else {}
    plain = {option: v for option, v in options.items() if hints.get(option) is not Solver}
    inner = {
        option: _inner(f"option '{option}' of {what}", v)
        for option, v in options.items()
        if option not in plain
    }
    return plain, inner


def _inner(what: str, value: Any) -> Solver:
    """The method that another one starts from."""
    if isinstance(value, str):
        return method(value, {})
    if not isinstance(value, Mapping) or "method" not in value:
        raise ValueError(f"{what} is a method's name, or {{method: name, ...}}")
    options = {key: one for key, one in value.items() if key != "method"}
    if options.get("bits") is not None:
        raise ValueError(f"{what} gives a mask only: 'bits' would have no effect")
    return method(str(value["method"]), options)


def __getattr__(word: str) -> Any:
    for path in METHODS.own.values():
        module, _, name = path.partition(":")
        if name == word:
            return getattr(importlib.import_module(module), word)
    raise AttributeError(f"module {__name__!r} has no attribute {word!r}")
