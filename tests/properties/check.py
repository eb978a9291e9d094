"""What has to hold for every graph and every plan."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

import graphprune as gp
from graphprune.analysis.structure import Structure
from graphprune.axes import atoms
from graphprune.ir.torch.interpreter import GraphRunner, run_graph
from graphprune.ir.torch.liveness import live_nodes
from graphprune.ir.torch.program import Program
from graphprune.oracle.masked import run_masked
from graphprune.plan.kept import Units
from properties.judges import judge_module, judge_zeroed
from properties.recipe import Recipe

OTHER_BATCH = 4
PICKING = frozenset("topk argmax argmin max min argsort sort kthvalue median mode".split())
MISFITS = (RuntimeError, IndexError)  # what torch raises where sizes or places don't fit


class Unsuitable(Exception):
    """The dense model doesn't run, or has no finite values to compare."""


def trace(recipe: Recipe) -> Program:
    """The program of a recipe, its axes checked.

    Raises:
        Unsuitable: the module doesn't run or its outputs aren't finite.
    """
    try:
        module, inputs = recipe.build(), recipe.example()
        with torch.no_grad():
            outputs = module(*inputs)
            if recipe.dynamic:
                module(*recipe.example(batch=OTHER_BATCH))
    except MISFITS as error:  # meta kernels, which drawing goes by, let some misfits pass
        raise Unsuitable from error
    largest = 1e6 * max(1.0, recipe.scale)
    if not all(x.isfinite().all() and x.abs().max() < largest for x in outputs):
        raise Unsuitable
    program = gp.trace(module, inputs, dynamic_shapes=_dynamic(recipe))
    live = {node.name for node in live_nodes(program.exported.graph)}
    for node in live & set(program.typing.opaque):  # what nothing reads freezes nothing
        reason = program.typing.opaque[node]
        assert "no rule" not in reason.why or "matrix_exp" in reason.why, (node, reason)
        assert "failed" not in reason.why, (node, reason)
    frozen = program.frozen()
    for name, dims in program.typing.parameters.items():
        for i, e in enumerate(dims):
            if all(a.frozen for a in atoms(e)):
                assert frozen[name, i], (name, i)
    return program


def _dynamic(recipe: Recipe) -> object:
    """Tracing without dynamic shapes takes a third of the time."""
    if recipe.dynamic:
        return None
    return (tuple({} for _ in recipe.inputs),)


def plans(program: Program, rng: random.Random, count: int) -> Iterator[gp.Plan]:
    """Random plans, in turn such that prune all that there is and such that prune some of it."""
    prunable = [s for s in program.structures if s.prunable and s.size > 1]
    first = rng.randrange(2)
    for number in range(first, first + count if prunable else 0):
        units: dict[str, Units] = {}
        for s in prunable:
            if number % 2 == 0 or rng.random() < 0.5:
                units[s.name] = _units(s, rng)
        plan = gp.Plan(program.fingerprint, units, {n: program.by_name[n].size for n in units})
        yield plan


def _units(s: Structure, rng: random.Random) -> Units:
    if s.blocks:
        gone = {b.index for b in s.blocks if rng.random() < 0.5}
        gone -= {min(gone)} if len(gone) == s.size else set()
        return tuple(i for i in range(s.size) if i not in gone)
    k = rng.randrange(s.minimum, s.size + 1)
    if s.within is not None and rng.random() < 0.6:
        rows = (tuple(sorted(rng.sample(range(s.size), k))) for _ in range(s.within.size))
        return tuple(rows)
    return tuple(sorted(rng.sample(range(s.size), k)))


def check(recipe: Recipe, program: Program, plan: gp.Plan, *, module: bool = False) -> float:
    """Compile with a plan; the slim model has to be right in every respect.

    Args:
        recipe: what was traced.
        program: its program.
        plan: what to keep.
        module: judge `slim.module` too, which takes as long as everything else.

    Returns:
        How far pruning moves the outputs.
    """
    slim = gp.apply(program, plan)
    inputs = [recipe.example(seed=1)]
    if recipe.dynamic and _runs(program, recipe.example(batch=OTHER_BATCH)):
        inputs.append(recipe.example(batch=OTHER_BATCH, seed=2))
    cases = [(args, {}) for args in inputs]
    certificate = gp.verify(program, plan, slim, cases, dtype=torch.float64)
    if certificate.problem and "pruning makes it NaN" in certificate.problem:
        raise Unsuitable
    if "it differs by" in (certificate.problem or ""):
        noise = max(_noise(program, plan, c) for c in cases)
        if certificate.max_rel_error < 100 * noise or any(_tied(program, c) for c in cases):
            raise Unsuitable
    certificate.raise_if_failed()
    judge_zeroed(recipe, program, plan, slim)
    if module:
        judge_module(recipe, slim)
    kept = plan.kept(program)
    for old, new in slim.renamed.items():
        shape = tuple(len(k) for k in kept[old])
        assert shape == tuple(slim.weights[new].shape), (old, shape, slim.weights[new].shape)
    removed = {n for n in kept if n not in slim.renamed}
    assert all(not len(k) for n in removed for k in kept[n])
    trainable = {n for n in slim.renamed if program.aliases.get(n, n) == n} & program.trainable
    count = sum(slim.weights[slim.renamed[n]].numel() for n in trainable)
    assert slim.cost.params == count, (slim.cost.params, count)
    return certificate.dense_difference


def _noise(program: Program, plan: gp.Plan, case: Any) -> float:
    """How far the masked model's outputs move, relatively, when weights change in the last bits.

    What divides by a difference of two equal numbers, or tells on which side of a step a number
    lies, has nothing to compare.
    """
    generator = torch.Generator().manual_seed(0)

    def moved(x: torch.Tensor) -> torch.Tensor:
        if not x.is_floating_point():
            return x
        return x.double() * (1 + 1e-15 * torch.randn(x.shape, generator=generator))

    inputs = (tuple(moved(x) for x in case[0]), {})
    weights = {name: moved(x.detach()) for name, x in program.weights.items()}
    other = replace(program, weights=weights)
    selection = plan.bind(program)
    found = [run_masked(p, selection, i) for p, i in ((program, case), (other, inputs))]
    return max(
        (
            float((a - b).abs().max() / a.abs().max().clamp(min=1.0))
            for a, b in zip(*found, strict=True)
        ),
        default=0.0,
    )


class _Ties(GraphRunner):
    """Notices equal values where an operator tells which one is larger: torch may name either."""

    found = False

    def _compute(self, target: Any, arguments: dict[str, Any], nodes: Any) -> Any:
        x = next(iter(arguments.values()), None)
        if target._schema.name.removeprefix("aten::") in PICKING and x.dim():
            dim = arguments.get("dim")
            x, dim = (x.flatten(), 0) if dim is None else (x, dim)
            self.found |= bool((x.sort(dim).values.diff(dim=dim) == 0).any())
        return super()._compute(target, arguments, nodes)


def _tied(program: Program, case: Any) -> bool:
    runner = _Ties(program.exported, program.weights, torch.float64, program.aliases)
    runner.outputs(case)
    return runner.found


def _runs(program: Program, args: tuple[torch.Tensor, ...]) -> bool:
    """Whether the dense program takes these inputs: export has settled some sizes for good."""
    try:
        run_graph(program.exported, program.weights, (args, {}), aliases=program.aliases)
    except MISFITS:
        return False
    return True


def examine(recipe: Recipe, seed: int = 0, count: int = 2, *, module: bool = False) -> int:
    """Everything, for one recipe and some plans; the number of plans that were checked."""
    try:
        program = trace(recipe)
        rng = random.Random(seed)
        done = 0
        for plan in plans(program, rng, count):
            try:
                check(recipe, program, plan, module=module)
            except Unsuitable:
                continue
            done += 1
    except Unsuitable:
        return 0
    return done


def without(plan: gp.Plan, name: str) -> gp.Plan:
    """A plan that leaves one structure whole."""
    return replace(plan, kept_units={n: u for n, u in plan.kept_units.items() if n != name})
