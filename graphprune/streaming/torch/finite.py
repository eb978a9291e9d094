"""Finding the node of a traced graph that made the first NaN or infinity."""

from __future__ import annotations

from typing import Any

import torch

from graphprune.calibration.batches import Batch
from graphprune.errors import PlanError
from graphprune.ir.torch.flow import module_path
from graphprune.streaming.core.finite import find_source, kind_of, not_finite
from graphprune.streaming.core.sites import Site
from graphprune.streaming.torch.products import operator
from graphprune.streaming.torch.runner import Runner


def explain(runner: Runner, site: Site, batch: Batch, leaves: list[Any], place: int) -> PlanError:
    """The error for an activation with NaN or infinity.

    Args:
        runner: computes with the weights of the run as they are now.
        site: what reads the activation.
        batch: where it occurs.
        leaves: the inputs of the batch.
        place: the graph is run from the start up to here.
    """
    schedule = runner.schedule
    named = schedule.named
    bad, x = _flags(runner, site, leaves, place)

    def reads(name: str) -> list[str]:
        node = named[name]
        return [] if node.op == "placeholder" else [n.name for n in schedule.reads(node)]

    source = find_source(site.reads, bad, reads, {n.name for n in schedule.constant})
    node = named[source]
    weights = (schedule.weights[n] for n in node.all_input_nodes if n in schedule.weights)
    broken = next((n for n in weights if not torch.isfinite(runner.stored(n)).all()), None)
    words = None
    if node.op != "placeholder":
        words = f"{operator(node) or node.op} ({source}) in {module_path(node) or 'the model'}"
    return not_finite(site, batch, x, (source, bad.get(source)), words, broken, "checkpoint")


def _flags(runner: Runner, site: Site, leaves: list[Any], place: int) -> tuple[dict[str, str], Any]:
    """Which values of a batch are not finite, and what a site reads."""
    schedule = runner.schedule
    values = runner.given(leaves)
    bad = {n.name: kind for n, v in values.items() if (kind := kind_of(v))}
    for node in schedule.nodes[:place]:
        if node in schedule.needed and node.op != "placeholder":
            values[node] = runner.execute(node, values)
            if kind := kind_of(values[node]):
                bad[node.name] = kind
            for dead in schedule.dead_after(schedule.places[node.name]):
                values.pop(dead, None)
    return bad, values.get(schedule.named[site.reads])
