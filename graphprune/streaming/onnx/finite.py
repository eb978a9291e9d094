"""Finding the operator of an ONNX graph that made the first NaN or infinity."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype

from graphprune.calibration.batches import Batch
from graphprune.errors import PlanError
from graphprune.ir.onnx.scopes import module_path
from graphprune.ir.onnx.shapes.sizes import qualified
from graphprune.streaming.core.finite import find_source, kind_of, not_finite
from graphprune.streaming.core.sites import Site
from graphprune.streaming.onnx.pieces import Piece
from graphprune.streaming.onnx.schedule import OnnxSchedule

Weight = Callable[[str], ir.TensorProtocol]


def explain(
    model: ir.Model, schedule: OnnxSchedule, weight: Weight, site: Site, batch: Batch, place: int
) -> PlanError:
    """The error for an activation with NaN or infinity.

    Args:
        model: dense or masked.
        schedule: of the run.
        weight: an initialiser as it is now.
        site: what reads the activation.
        batch: where it occurs.
        place: the graph is run from the start up to here.
    """
    bad, x = _flags(model, schedule, weight, site, batch, place)
    source = find_source(site.reads, bad, schedule.reads, schedule.constant)
    words, broken = None, None
    if source in schedule.places:
        node = schedule.nodes[schedule.places[source]]
        own = f" {node.name}" if node.name else ""
        path = module_path(node)
        words = f"{qualified(node)}{own} ({source}){f' in {path}' if path else ''}"
        names = (v.name or "" for v in node.inputs if v is not None and not _is_whole(v, weight))
        broken = next(names, None)
    return not_finite(site, batch, x, (source, bad.get(source)), words, broken, "model")


def _flags(
    model: ir.Model, schedule: OnnxSchedule, weight: Weight, site: Site, batch: Batch, place: int
) -> tuple[dict[str, str], Any]:
    """Which values of a batch are not finite, and what a site reads."""
    values: dict[str, Any] = dict(batch.kwargs)
    bad = {name: kind for name, x in values.items() if (kind := kind_of(x))}
    for start, end in pairwise((0, *(b for b in schedule.barriers if b < place), place)):
        segment = schedule.segment(start, end, schedule.computed(start, end))
        # Values are in the types of the graph: none has been held.
        types = {n: from_torch_dtype(values[n].dtype) for n in segment.inputs}
        values |= Piece(model, segment, types, weight)(values)
        bad |= {name: kind for name in segment.outputs if (kind := kind_of(values[name]))}
        kept = schedule.held(end) | {site.reads, *batch.kwargs}
        values = {n: v for n, v in values.items() if n in kept}
    return bad, values.get(site.reads)


def _is_whole(value: ir.Value, weight: Weight) -> bool:
    """Whether an initialiser holds nothing but numbers; other values do."""
    if not value.is_initializer() or value.dtype is None or not value.dtype.is_floating_point():
        return True
    elements = torch.from_numpy(weight(value.name or "").numpy().astype("float32"))
    return bool(torch.isfinite(elements).all())
