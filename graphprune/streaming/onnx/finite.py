"""Finding the operator of an ONNX graph that made the first number that is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from torch import Tensor

from graphprune.calibration.batches import Batch
from graphprune.errors import PlanError
from graphprune.ir.onnx.scopes import module_path
from graphprune.ir.onnx.shapes.sizes import qualified
from graphprune.streaming.core.schedule import spans
from graphprune.streaming.core.sites import Site
from graphprune.streaming.onnx.pieces import Piece
from graphprune.streaming.onnx.schedule import OnnxSchedule

Weight = Callable[[str], ir.TensorProtocol]


def not_finite(
    model: ir.Model,
    schedule: OnnxSchedule,
    weight: Weight,
    site: Site,
    batch: Batch,
    place: int,
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
    bad, samples = _flags(model, schedule, weight, site, batch, place)
    name = site.reads
    while worse := _worse(schedule, bad, name):
        name = worse
    kind = bad.get(name, "NaN or infinity")
    if name not in schedule.places:
        where, why = f"the input {name}", f"it holds {kind}"
        hint = "leave this sample out, or correct it"
    else:
        node = schedule.nodes[schedule.places[name]]
        own = f" {node.name}" if node.name else ""
        path = module_path(node)
        where = f"{qualified(node)}{own} ({name}){f' in {path}' if path else ''}"
        why = f"its operands are finite, the result holds {kind}"
        hint = "leave this sample out, or compute in a wider dtype"
        broken = [v.name for v in node.inputs if v is not None and not _whole(v, weight)]
        if broken:
            why = f"the weight {broken[0]} holds NaN or infinity"
            hint = "repair the model"
    return PlanError(
        f"an activation that {site.parameter} reads is not finite",
        where=f"{where}, {samples}",
        why=why,
        hint=hint,
    )


def _worse(schedule: OnnxSchedule, bad: Mapping[str, str], name: str) -> str | None:
    """What an operator reads that isn't finite; infinity in a mask is as it should be."""
    reads = schedule.reads(name)
    spoilt = [n for n in reads if bad.get(n) == "NaN"]
    spoilt += [n for n in reads if bad.get(n) == "infinity" and n not in schedule.constant]
    return spoilt[0] if spoilt else None


def _flags(
    model: ir.Model,
    schedule: OnnxSchedule,
    weight: Weight,
    site: Site,
    batch: Batch,
    place: int,
) -> tuple[dict[str, str], str]:
    """Which values of a sample are not finite, and which sample it is."""
    values: dict[str, Any] = dict(batch.kwargs)
    bad = {name: kind for name, x in values.items() if (kind := _kind(x))}
    for start, end in spans([*(b for b in schedule.barriers if b < place), place]):
        segment = schedule.segment(start, end, schedule.computed(start, end))
        # Values are in the types of the graph: none has been held.
        types = {n: from_torch_dtype(values[n].dtype) for n in segment.inputs}
        values |= Piece(model, segment, types, weight)(values)
        for name in segment.outputs:
            kind = _kind(values[name])
            if kind:
                bad[name] = kind
        kept = schedule.held(end) | {site.reads, *batch.kwargs}
        values = {n: v for n, v in values.items() if n in kept}
    return bad, _samples(batch, values.get(site.reads))


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return ""
    if bool(torch.isnan(value).any()):
        return "NaN"
    return "infinity" if bool(torch.isinf(value).any()) else ""


def _whole(value: ir.Value, weight: Weight) -> bool:
    """Whether an initialiser holds nothing but numbers; other values do."""
    if not value.is_initializer() or value.dtype is None or not value.dtype.is_floating_point():
        return True
    elements = torch.from_numpy(weight(value.name or "").numpy().astype("float32"))
    return bool(torch.isfinite(elements).all())


def _samples(batch: Batch, x: Any) -> str:
    """The sample, where the first dimension of the activation counts samples."""
    if batch.count == 1:
        return f"sample {batch.first}"
    if isinstance(x, Tensor) and x.dim() > 1 and x.shape[0] == batch.count:
        bad = (~torch.isfinite(x).flatten(1).all(1)).nonzero().flatten()
        if len(bad):
            return f"sample {batch.first + int(bad[0])}"
    return f"samples {batch.first} to {batch.first + batch.count - 1}"
