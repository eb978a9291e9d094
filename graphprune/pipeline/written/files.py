"""Seeing that a written file holds the weights that passes have changed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from graphprune.emit.written import Found, check_written
from graphprune.pipeline.steps.numbering import kept_part
from graphprune.report.report import Report
from graphprune.rewrite.slim import Slim
from graphprune.rewrite.slim_onnx import SlimOnnx


def check_weights_written(report: Report, path: Path, form: str, slim: Slim | SlimOnnx) -> Report:
    """Read changed weights back from a file.

    Args:
        report: says which weights were changed.
        path: the directory of a checkpoint, or the file.
        form: what it was written as.
        slim: what was written.

    Returns:
        The report with the zeros that were found, and where the file has the weights.

    Raises:
        VerifyError: it doesn't hold them as they are.
    """
    masks, refits = report.masks, report.refits
    if masks is not None:
        dense = {name: old for old, name in slim.renamed.items()}
        names = [layer.parameter for layer in masks.layers]
        found, weights = _read_back(
            slim, path, form, [dense[n] for n in (*names, *masks.reordered)]
        )
        others = (weights[name] for name in masks.reordered)
        zeros = found.zeros - sum(w.numel() - int(w.count_nonzero()) for w in others)
        checked = {**(masks.checked or {}), form: zeros}
        places = {**masks.places, **({form: found.places} if found.places else {})}
        report = replace(report, masks=replace(masks, checked=checked, places=places))
    if refits is not None:
        found, _ = _read_back(slim, path, form, refits.parameters)
        places = {**refits.places, **({form: found.places} if found.places else {})}
        report = replace(report, refits=replace(refits, places=places))
    trained = []
    for one in report.trained:
        found, _ = _read_back(slim, path, form, one.parameters)
        places = {**one.places, **({form: found.places} if found.places else {})}
        trained.append(replace(one, places=places))
    return replace(report, trained=tuple(trained))


def _read_back(
    slim: Slim | SlimOnnx, path: Path, form: str, parameters: Sequence[str]
) -> tuple[Found, Mapping[str, Tensor]]:
    """What a file has of dense parameters, and what it was given of them."""
    tied: dict[str, list[str]] = defaultdict(list)
    for alias, name in slim.aliases.items():
        tied[name].append(alias)
    weights = kept_part(slim, parameters)
    return check_written(path, form, weights, tied), weights
