"""What the report has of masks, before and after they are made."""

from __future__ import annotations

from collections.abc import Mapping

from graphprune.analysis.program import BaseProgram
from graphprune.calibration.result import Samples
from graphprune.passes.masks.oneshot import Sparse
from graphprune.pipeline.steps.numbering import slim_names
from graphprune.recipe.sparsify import Sparsify
from graphprune.report.masks import MaskedLayer, Masks
from graphprune.rewrite.slim import Slim
from graphprune.rewrite.slim_onnx import SlimOnnx
from graphprune.streaming import find_sites


def plan_masks(program: BaseProgram, slim: Slim | SlimOnnx, section: Sparsify) -> Masks:
    """Find what masks would treat and leave alone; no data is read, no weight computed.

    Raises:
        PlanError: there is nothing to treat, or a glob means nothing.
    """
    sites = find_sites(program, section.include, section.exclude)
    renamed = slim_names(slim)
    target = section.sparsity if section.budget.name == "uniform" else None
    if section.pattern is not None:
        kept, of = map(int, section.pattern.split(":"))
        target = 1 - kept / of
    layers = tuple(
        MaskedLayer(renamed[name], tuple(slim.shapes[renamed[name]]), target)
        for name in sites.parameters
        if name in renamed
    )
    skipped = {renamed[n]: why for n, why in sites.skipped.items() if n in renamed}
    return Masks(_method(section), _asked(section), layers, skipped, bits=section.bits)


def report_masks(
    section: Sparsify, found: Sparse, skipped: Mapping[str, str], samples: Samples
) -> Masks:
    """Tell what masks have done.

    Args:
        section: how they were chosen.
        found: what became of the weights.
        skipped: by the names of the slim model, what was left alone and why.
        samples: what they were calibrated on.
    """
    shapes = found.program.parameters
    layers = tuple(
        MaskedLayer(
            e.parameter,
            tuple(shapes[e.parameter]),
            e.target,
            sparsity=e.sparsity,
            zeros=e.zeros,
            error=e.error,
            notes=e.notes,
        )
        for e in found.layers
    )
    return Masks(
        _method(section),
        _asked(section),
        layers,
        dict(skipped),
        sparsity=found.sparsity,
        sparsity_of_model=found.sparsity_of_model,
        bits=section.bits,
        samples=samples.described() if section.needs_data else None,
        reordered=found.reordered,
    )


def _method(section: Sparsify) -> str:
    options = ", ".join(f"{k} {v}" for k, v in (section.model_extra or {}).items())
    return f"{section.method} ({options})" if options else section.method


def _asked(section: Sparsify) -> str:
    if section.pattern is not None:
        kept, of = section.pattern.split(":")
        asked = f"{section.pattern}, {kept} kept of every {of}"
    else:
        assert section.sparsity is not None
        asked = f"{100 * section.sparsity:g} % of the weights"
    if section.budget.name != "uniform":
        options = ", ".join(f"{k} {v}" for k, v in (section.budget.model_extra or {}).items())
        asked += f", dealt by {section.budget.name}" + (f" ({options})" if options else "")
    asked += ", zeros kept" if section.keep_zeros else ""
    return asked + (", the gap to the dense model closed" if section.reference else "")
