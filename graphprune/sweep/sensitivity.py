"""What each structure alone costs: one is cut at a time, and nothing makes up for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

from graphprune.calibration.measured import evaluation_windows, measured_texts
from graphprune.calibration.programs import batches
from graphprune.calibration.sources.amounts import SCORES
from graphprune.exclusive import one_at_a_time
from graphprune.ir.torch.program import Program, is_traced
from graphprune.measure.measuring import unmeasurable
from graphprune.pipeline.run import Run
from graphprune.plan.kept import Units, rows_of
from graphprune.plan.plan import Plan
from graphprune.quality.compare import compare_all
from graphprune.report.names import layer_of
from graphprune.rewrite.apply import apply
from graphprune.sweep.measuring import output_change
from graphprune.sweep.result import Cell

WINDOWS = 4
"""Windows of text, or samples, that each structure is judged by: there are many of them."""


@one_at_a_time
def sensitivity(run: Run, plan: Plan, tell: Callable[[str], None]) -> tuple[Cell, ...]:
    """Cut each structure of a plan alone.

    Args:
        run: whose data and texts it is judged by.
        plan: what goes of each.
        tell: told of each structure.

    Raises:
        GraphPruneError: there is nothing to judge by.
    """
    program = run.dense
    if not is_traced(program):
        return ()
    judge = _judge(run, program)
    alone = list(_alone(program, plan))
    cells = []
    for number, (name, layer, units) in enumerate(alone, 1):
        tell(f"cutting structures one by one: {number} of {len(alone)}")
        structure = program.by_name[name]
        single = Plan(program.fingerprint, {name: units}, {name: structure.size})
        slim = apply(program, single)
        kept = len(rows_of(units)[0])
        change, kl = judge(slim.module)
        cells.append(Cell(name, structure.role or "", layer, 1 - kept / structure.size, change, kl))
    return tuple(cells)


def _alone(program: Program, plan: Plan) -> Iterator[tuple[str, str, Units]]:
    """Structures of a plan with their layers and what stays; of a stack, each layer that goes."""
    for name, units in plan.kept_units.items():
        structure = program.by_name[name]
        if structure.blocks:
            stays = set(cast("tuple[int, ...]", units))
            for gone in (n for n in range(structure.size) if n not in stays):
                yield name, str(gone), tuple(n for n in range(structure.size) if n != gone)
        else:
            yield name, layer_of(name), units


def _judge(
    run: Run, program: Program
) -> Callable[[Callable[..., Any]], tuple[float, float | None]]:
    """What compares a model with the dense one: by text where there is any, else by samples."""
    dense = program.as_module()
    wanted = run.recipe.calibration
    if unmeasurable(program, wanted) is None:
        text = measured_texts(program, wanted)[0]
        windows = evaluation_windows(program, wanted, run.seed, text)[:WINDOWS]

        def by_text(module: Callable[..., Any]) -> tuple[float, float | None]:
            found = compare_all(dense, [module], windows)[0].comparison
            return found.ratio.value - 1, None if found.kl is None else found.kl.value

        return by_text
    samples = batches(program, run.samples(SCORES).data)[:WINDOWS]

    def by_samples(module: Callable[..., Any]) -> tuple[float, float | None]:
        return output_change(dense, module, samples), None

    return by_samples
