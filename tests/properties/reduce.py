"""Makes a failing recipe small: fewer outputs, fewer instructions, fewer pruned structures."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import graphprune as gp
from properties import check
from properties.recipe import Net, Recipe

Failure = tuple[str, gp.Plan | None]


def failure(recipe: Recipe, seed: int, count: int = 3, *, module: bool = False) -> Failure | None:
    """What goes wrong with a recipe, and with which plan; None where all is well."""
    try:
        program = check.trace(recipe)
    except check.Unsuitable:
        return None
    except Exception as error:
        return _kind(error), None
    for plan in check.plans(program, random.Random(seed), count):
        try:
            check.check(recipe, program, plan, module=module)
        except check.Unsuitable:
            continue
        except Exception as error:
            return _kind(error), plan
    return None


def _kind(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else repr(error)


def reduce(recipe: Recipe, seed: int, trials: int = 60, *, module: bool = False) -> Recipe:
    """A smaller recipe that fails in the same way."""
    wanted = failure(recipe, seed, module=module)
    assert wanted is not None

    def fails(candidate: Recipe) -> bool:
        try:
            candidate.build()
        except Exception:
            return False
        found = failure(candidate, seed, 5, module=module)
        return found is not None and found[0][:40] == wanted[0][:40]  # type: ignore[index]

    smaller = True
    while smaller and trials > 0:
        smaller = False
        for candidate in _candidates(recipe):
            trials -= 1
            if trials < 0:
                break
            if fails(candidate):
                recipe, smaller = candidate, True
                break
    return recipe


def _candidates(recipe: Recipe) -> Iterator[Recipe]:
    if recipe.dynamic:
        yield replace(recipe, dynamic=False)
    if recipe.scale != 1.0:
        yield replace(recipe, scale=1.0)
    first = len(recipe.inputs)
    if len(recipe.outputs) > 1:
        for output in recipe.outputs:
            yield live(replace(recipe, outputs=(output,)))
    for output in sorted(recipe.outputs):
        if output >= first:
            for v in recipe.steps[output - first][1]:
                yield live(replace(recipe, outputs=(v,)))
    shapes = _shapes(recipe)
    for i in reversed(range(len(recipe.steps))):
        value = i + first
        operands = recipe.steps[i][1]
        earlier = [v for v in range(value) if v not in operands]
        for other in (*operands, *reversed(earlier)):
            if shapes[other] is not None and shapes[other] == shapes[value]:
                yield live(_renumbered(recipe, lambda v, a=value, b=other: b if v == a else v))
                break


def _shapes(recipe: Recipe) -> list[Any]:
    net = Net(recipe.steps)
    values: list[Any] = list(recipe.example())
    for i, step in enumerate(recipe.steps):
        values.append(net.compute(i, step, values))
    return [getattr(v, "shape", None) for v in values]


def _renumbered(recipe: Recipe, new: Callable[[int], int]) -> Recipe:
    steps = tuple((name, tuple(map(new, ops)), *rest) for name, ops, *rest in recipe.steps)
    return replace(recipe, steps=steps, outputs=tuple(map(new, recipe.outputs)))


def live(recipe: Recipe) -> Recipe:
    """The recipe without instructions that no output needs."""
    first = len(recipe.inputs)
    needed = set(recipe.outputs)
    for i in reversed(range(len(recipe.steps))):
        if i + first in needed:
            name, operands, *rest = recipe.steps[i]
            needed.update(operands)
            if name in ("reuse", "tied"):
                needed.add(rest[0] + first)
                needed.update(recipe.steps[rest[0]][1])
    kept = [i for i in range(len(recipe.steps)) if i + first in needed]
    number = {v: v for v in range(first)} | {i + first: n + first for n, i in enumerate(kept)}
    steps = []
    for i in kept:
        name, operands, *rest = recipe.steps[i]
        if name in ("reuse", "tied"):
            rest[0] = number[rest[0] + first] - first
        steps.append((name, tuple(number[v] for v in operands), *rest))
    return replace(recipe, steps=tuple(steps), outputs=tuple(number[v] for v in recipe.outputs))


def smallest_plan(recipe: Recipe, seed: int, *, module: bool = False) -> gp.Plan | None:
    """A failing plan that prunes as little as possible."""
    found = failure(recipe, seed, 5, module=module)
    if found is None or found[1] is None:
        return None
    plan = found[1]
    program = check.trace(recipe)
    for name in list(plan.kept_units):
        candidate = check.without(plan, name)
        try:
            check.check(recipe, program, candidate, module=module)
        except check.Unsuitable:
            continue
        except Exception:
            plan = candidate
    return plan
