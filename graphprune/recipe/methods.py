"""Solvers and layer budgets by the names that recipes have for them, with checked options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from graphprune.errors import RecipeError
from graphprune.options import nearest
from graphprune.passes.masks.allocations import BUDGETS, Budget
from graphprune.passes.masks.alps import ALPS
from graphprune.passes.masks.dsnot import DSnoT
from graphprune.passes.masks.magnitude import Magnitude
from graphprune.passes.masks.ria import RIA
from graphprune.passes.masks.sparsegpt import SparseGPT
from graphprune.passes.masks.wanda import Wanda
from graphprune.solvers import Solver

METHODS: Mapping[str, type[Any]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "ria": RIA,
    "sparsegpt": SparseGPT,
    "alps": ALPS,
    "dsnot": DSnoT,
}


def options_of(method: str) -> tuple[str, ...]:
    """Names of the options of a method."""
    return tuple(f.name for f in fields(METHODS[method]))


def solver(method: str, options: Mapping[str, Any]) -> Solver:
    """A solver.

    Args:
        method: its name.
        options: values of its fields.

    Raises:
        ValueError: the method or an option is unknown, or a value is wrong.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method '{method}'; {nearest(method, METHODS)}")
    found: Solver = _built(METHODS[method], f"method '{method}'", options)
    return found


def budget(name: str, options: Mapping[str, Any]) -> str | Budget:
    """A layer budget, as `graphprune.sparsify` takes it.

    Raises:
        ValueError: an option is unknown, or a value is wrong.
    """
    chosen = BUDGETS[name]
    if chosen is not None:
        found: Budget = _built(type(chosen), f"budget '{name}'", options)
        return found
    if options:
        raise ValueError(f"budget '{name}' has no options")
    return name


def _built(kind: type[Any], what: str, options: Mapping[str, Any]) -> Any:
    hints = get_type_hints(kind)
    valid = [f.name for f in fields(kind)]
    values = {}
    for option, value in options.items():
        if option not in valid:
            near = f"; {nearest(option, valid)}" if valid else ""
            raise ValueError(f"{what} has no option '{option}'{near}")
        values[option] = _value(hints[option], f"option '{option}' of {what}", value)
    try:
        return kind(**values)
    except RecipeError as error:
        raise ValueError(f"{what}: {error.what}") from error


def _value(hint: Any, what: str, value: Any) -> Any:
    """An option's value, checked against the type of its field."""
    if hint is Solver:
        return _inner(what, value)
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise ValueError(f"{what}: {message[:1].lower()}{message[1:]}, not {value!r}") from None


def _inner(what: str, value: Any) -> Solver:
    """The solver that another one starts from: a name, or a mapping with its options."""
    if isinstance(value, str):
        return solver(value, {})
    if not isinstance(value, Mapping) or "method" not in value:
        raise ValueError(f"{what} is a method's name, or {{method: name, ...}}")
    options = {key: one for key, one in value.items() if key != "method"}
    if options.get("bits") is not None:
        raise ValueError(f"{what} gives a mask only: 'bits' would have no effect")
    return solver(str(value["method"]), options)
