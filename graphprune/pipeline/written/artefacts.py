"""Checking what was written: the masked oracle again, from the files alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from graphprune.analysis.program import BaseProgram
from graphprune.emit.onnx import SMALL
from graphprune.emit.target import FILES
from graphprune.emit.written import read_places, read_weights
from graphprune.errors import LoadError, VerifyError
from graphprune.files import recover
from graphprune.files.paths import is_factory, usable
from graphprune.frontends import load, load_traced
from graphprune.ir.onnx.ort import onnx_session
from graphprune.ir.torch.interpreter import output_names
from graphprune.ir.torch.program import Program, is_traced
from graphprune.ir.torch.random_inputs import random_inputs
from graphprune.oracle.masked import run_masked
from graphprune.oracle.verification import compare
from graphprune.oracle.verify import verify
from graphprune.passes.repair.bias import biased_for
from graphprune.pipeline.steps.numbering import slim_names, written_back
from graphprune.plan.plan import Plan
from graphprune.provenance.source import source_change
from graphprune.report.names import beside
from graphprune.rewrite.apply import uncut
from graphprune.runtime.generation import Decoder, has_cache

ONNX_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Verified:
    """What was found out of an output that is as it should be.

    Attributes:
        errors: file name to the largest absolute difference.
        notes: what there is to say besides.
    """

    errors: Mapping[str, float]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Written:
    """A model that was read back, as `graphprune.oracle.verification` wants it."""

    exported: ExportedProgram
    weights: Mapping[str, torch.Tensor]


def verify_output(
    output: Path,
    source: str | None = None,
    weights: Path | None = None,
    *,
    progress: Callable[[str], None],
    trust: bool = False,
    allow_unused_weights: bool = False,
) -> Verified:
    """Compare every model that `graphprune.compile` wrote with the masked dense one.

    Of weights that were refitted or had single elements made zero, the dense model takes the
    written values; the zeros of masks have to be as many as the report says. Where the dense model
    has another content than the report says, a note, also of an error, tells it.

    Args:
        output: the directory, or the ``.pt2`` or ``.onnx`` file.
        source: the dense model; None takes the one that the report names, with its weights. A
            factory runs code, so that one that only the report names needs trust.
        weights: the file with the weights of a factory's module.
        progress: told of each stage.
        trust: whether checkpoints and ``.pt2`` files may run code of their own.
        allow_unused_weights: see `graphprune.load`.

    Raises:
        LoadError: there is no plan, no model, or no dense model.
        PlanError: the plan doesn't belong to the dense model.
        VerifyError: a written model computes something else.
    """
    output = usable(output)
    recover(output)  # a plan or report may wait beside the place of what was written
    models = _models(output)
    plan = Plan.load(beside(output, "plan"))
    progress("loading the dense model")
    if source is None:
        source, recorded = _source(output, trust)
        weights = weights or recorded
    program = load(source, weights, trust=trust, allow_unused_weights=allow_unused_weights)
    plan.bind(program)
    report = _report(output)
    changed = source_change(report, program, source, weights, progress)
    if (report.get("refits") or {}).get("method") == "bias":
        program, plan = biased_for(program, plan)
    try:
        errors = _errors(models, program, plan, report, progress, trust)
    except VerifyError as error:
        if changed is not None:
            error.add_note(changed)
        raise
    return Verified(errors, () if changed is None else (changed,))


def _errors(
    models: Sequence[Path],
    dense: BaseProgram,
    plan: Plan,
    report: Mapping[str, Any],
    progress: Callable[[str], None],
    trust: bool,
) -> dict[str, float]:
    """The largest difference of each model."""
    errors = {}
    refits, masks = report.get("refits") or {}, report.get("masks") or {}
    trained = report.get("trained") or []
    for path in models:
        progress(f"checking {path.name}")
        program = _with_written(dense, plan, path, refits, masks, trained, trust)
        if not is_traced(program):
            certificate = verify(program, plan, path)
            certificate.raise_if_failed()
            errors[path.name] = certificate.max_abs_error
            continue
        if path.suffix == ".onnx":
            errors[path.name] = _verify_onnx(program, plan, path)
            continue
        written = load_traced(path, trust=trust)
        certificate = verify(program, plan, _Written(written.exported, _weights(written)))
        certificate.raise_if_failed()
        errors[path.name] = certificate.max_abs_error
    return errors


def _models(output: Path) -> list[Path]:
    if output.is_file() and output.suffix in (".pt2", ".onnx"):
        return [output]
    if not output.is_dir():
        raise LoadError("there is no such output", where=str(output))
    files = [output / name for name in FILES.values()]
    found = [output] if (output / "config.json").is_file() else []
    found += [file for file in files if file.is_file()]
    if not found:
        raise LoadError(
            "the output holds no model",
            where=str(output),
            why=f"it has no config.json, {' or '.join(FILES.values())}",
        )
    return found


def _source(output: Path, trust: bool) -> tuple[str, Path | None]:
    path = beside(output, "report")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        source, weights = str(data["source"]), data.get("weights")
        found = None if weights is None else Path(weights)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(
            "the report doesn't say what the dense model was",
            where=str(path),
            why=str(error),
            hint="give it with --source",
        ) from None
    if is_factory(source) and not trust:
        raise LoadError(
            "the report names code that makes the dense model, and it wasn't run",
            where=f"{path}: {source}",
            why="a report is data, and may come from elsewhere",
            hint="if that code is yours, give it with --source, or say --trust",
        )
    return source, found


def _report(output: Path) -> Mapping[str, Any]:
    """The report; nothing if there is none."""
    try:
        data = json.loads(beside(output, "report").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _with_written(
    dense: BaseProgram,
    plan: Plan,
    path: Path,
    refits: Mapping[str, Any],
    masks: Mapping[str, Any],
    trained: Sequence[Mapping[str, Any]],
    trust: bool,
) -> BaseProgram:
    """The dense model with those weights of a written one that were given new values.

    Args:
        dense: the dense program.
        plan: what stays.
        path: of the written model.
        refits: of the report; empty where nothing was refitted.
        masks: of the report; empty where no weight was masked.
        trained: of the report; empty where none was trained.
        trust: whether the written model may run code of its own.

    Raises:
        LoadError: they can't be found.
        VerifyError: masked ones have other zeros than the report says.
    """
    slim = uncut(dense, plan)
    try:
        zeros = {str(e["parameter"]): int(e["zeros"]) for e in masks.get("layers", ())}
        moved = [str(name) for name in masks.get("reordered", ())]
        refitted = [(e["parameter"], e["bias"]) for e in refits.get("layers", ())]
        tables = [dict(part["places"]) for part in (refits, masks, *trained) if part]
        learnt = [str(name) for part in trained for name in part["parameters"]]
    except (KeyError, TypeError, ValueError) as error:
        raise LoadError(
            "the report doesn't say which weights were changed", where=path.name, why=str(error)
        ) from None
    names = slim_names(slim)
    changed = [name for pair in (*refitted, learnt) for name in pair if name in names]
    wanted = dict.fromkeys([*(names[name] for name in changed), *zeros, *moved])
    if not wanted:
        return dense
    if path.suffix == ".onnx":
        form = "onnx-decoder" if path.name == FILES["onnx-decoder"] else "onnx"
        places: dict[str, str] = {}
        for table in tables:
            places |= table.get(form) or next(iter(table.values()), {})
        found = read_places(path, places)
    else:
        tied: dict[str, list[str]] = {name: [name] for name in wanted}
        for alias, name in slim.aliases.items():
            tied.get(name, []).append(alias)
        found = read_weights(path, tied, trust=trust)
    for name in wanted:
        if name not in found:
            raise LoadError(
                "the values of a changed weight can't be told from the file",
                where=f"{path.name}: {name}",
                why="the exporter has put it together with something else",
                hint="compile to hf or pt2 to have them verified",
            )
        count = int((found[name] == 0).sum())
        if count != zeros.get(name, count):
            raise VerifyError(
                "a masked weight has other zeros than the report says",
                where=f"{path.name}: {name}",
                why=f"{count:,} instead of {zeros[name]:,}",
            )
    return written_back(slim, {name: found[name] for name in wanted})


def _weights(program: Program) -> dict[str, torch.Tensor]:
    """All tensors by name, tied ones under each of theirs."""
    tied = {a: program.weights[c] for a, c in program.aliases.items() if c in program.weights}
    return {**tied, **program.weights}


def _verify_onnx(program: Program, plan: Plan, path: Path) -> float:
    """Compare an ONNX file, run by ONNX Runtime, with the masked model in float32."""
    session = onnx_session(path)
    inputs = random_inputs(program)
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    names = [entry.name for entry in session.get_inputs()]
    names = names[:1] if has_cache(session) else names
    if len(names) != len(leaves):
        raise VerifyError("the ONNX file has other inputs than the dense model", where=str(path))
    if has_cache(session):
        found: Sequence[Any] = [_logits_by_steps(Decoder(session), leaves[0].numpy())]
    else:
        found = session.run(None, {n: x.numpy() for n, x in zip(names, leaves, strict=True)})
    expected = run_masked(program, plan.bind(program), inputs, torch.float32)
    differences = compare(
        output_names(program.exported),
        expected,
        [torch.from_numpy(value) for value in found],
        ONNX_TOLERANCE,
        SMALL,
    )
    for one in differences:
        if one.problem is not None:
            raise VerifyError(
                "the ONNX file does not compute what the masked model computes",
                where=f"{path}, output {one.output}",
                why=one.problem,
            )
    return max((one.error for one in differences), default=0.0)


def _logits_by_steps(decoder: Decoder, ids: Any) -> Any:
    """A decoder's logits for every token: the first half at once, the others one after another."""
    half = -(-ids.shape[1] // 2)
    ends = range(half, ids.shape[1] + 1)
    return np.concatenate([decoder.step(ids[:, decoder.length : end]) for end in ends], axis=1)
