"""Finding the operator that made the first number that is none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from graphprune.errors import PlanError
from graphprune.ir.torch.flow import module_path
from graphprune.streaming.core.cache import tensors_in
from graphprune.streaming.torch.products import operator
from graphprune.streaming.torch.runner import Runner

if TYPE_CHECKING:
    from graphprune.calibration.batches import Batch
    from graphprune.streaming.core.sites import Site


def not_finite(
    runner: Runner, site: Site, batch: Batch, leaves: list[Any], place: int
) -> PlanError:
    """The error for an activation with NaN or infinity.

    Args:
        runner: computes with the weights of the run as they are now.
        site: what reads the activation.
        batch: where it occurs.
        leaves: the inputs of the batch.
        place: the graph is run from the start up to here.
    """
    schedule = runner.schedule
    bad, values = _flags(runner, leaves, place)
    node = schedule.named[site.reads]
    while True:
        worse = [n for n in _operands(runner, node) if bad.get(n) == "NaN"]
        worse += [
            n
            for n in _operands(runner, node)
            if bad.get(n) == "infinity" and n not in schedule.constant
        ]
        if not worse:
            break
        node = worse[0]
    kind = bad.get(node, "NaN or infinity")
    weights = [
        schedule.weights[n]
        for n in node.all_input_nodes
        if n in schedule.weights and not _finite(runner, schedule.weights[n])
    ]
    if node.op == "placeholder":
        where = f"the input {node.name}"
        hint = "leave this sample out, or correct it"
    else:
        where = f"{operator(node) or node.op} ({node.name}) in {module_path(node) or 'the model'}"
        hint = "leave this sample out, or compute in a wider dtype"
    why = f"its operands are finite, the result holds {kind}"
    if weights:
        why, hint = f"the weight {weights[0]} holds NaN or infinity", "repair the checkpoint"
    elif node.op == "placeholder":
        why = f"it holds {kind}"
    return PlanError(
        f"an activation that {site.parameter} reads is not finite",
        where=f"{where}, {_samples(batch, values, schedule.named[site.reads])}",
        why=why,
        hint=hint,
    )


def _flags(
    runner: Runner, leaves: list[Any], place: int
) -> tuple[dict[fx.Node, str], dict[fx.Node, Any]]:
    """Which values of a sample are not finite, and those that live to the end."""
    schedule = runner.schedule
    values = runner.given(leaves)
    bad = {n: kind for n, v in values.items() if (kind := _kind(v))}
    for node in schedule.nodes[:place]:
        if node in schedule.needed and node.op != "placeholder":
            values[node] = runner.execute(node, values)
            kind = _kind(values[node])
            if kind:
                bad[node] = kind
            for dead in schedule.dead_after(schedule.places[node.name]):
                values.pop(dead, None)
    return bad, values


def _operands(runner: Runner, node: fx.Node) -> list[fx.Node]:
    return [] if node.op == "placeholder" else runner.schedule.reads(node)


def _kind(value: Any) -> str:
    kinds = ""
    for x in tensors_in(value):
        if bool(torch.isnan(x).any()):
            return "NaN"
        if bool(torch.isinf(x).any()):
            kinds = "infinity"
    return kinds


def _finite(runner: Runner, name: str) -> bool:
    return bool(torch.isfinite(runner.stored(name)).all())


def _samples(batch: Batch, values: dict[fx.Node, Any], node: fx.Node) -> str:
    """The sample, where the first dimension of the activation counts samples."""
    x = values.get(node)
    if batch.count == 1:
        return f"sample {batch.first}"
    if isinstance(x, torch.Tensor) and x.dim() > 1 and x.shape[0] == batch.count:
        bad = (~torch.isfinite(x).flatten(1).all(1)).nonzero().flatten()
        if len(bad):
            return f"sample {batch.first + int(bad[0])}"
    return f"samples {batch.first} to {batch.first + batch.count - 1}"
