"""The end of a page: what was proved, how to repeat it, and what all of it depends on."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from graphprune.report.html.markup import Markup, listed, number, section, table, tag

Data = Mapping[str, Any]


def proof_part(report: Data) -> Iterator[Markup]:
    """The proof, the recipe, and the conditions."""
    run = report.get("run") or {}
    outputs = [str(path) for path in run.get("outputs") or ()]
    if report.get("max_abs_error") is not None:
        told = (
            "Before anything was written, the slim model was compared with the masked dense one, "
            "an independent implementation that never slices a weight. Their outputs differ by at "
            f"most {report['max_abs_error']:.1e}, computed in {report['verified_in']}."
        )
        again = [shlex.join(["graphprune", "verify", path]) for path in outputs]
        yield section("The proof", tag("p", told), tag("p", "To repeat it from the files:"),
                      tag("pre", "\n".join(again) or "graphprune verify OUTPUT"))  # fmt: skip
    if report.get("recipe"):
        yield section(
            "The recipe",
            tag("p", "With nothing left open; the command in its head makes the same files again."),
            tag("pre", report["recipe"]),
        )
    provenance = report.get("provenance") or {}
    rows = [(name, value) for name, value in (provenance.get("versions") or {}).items()]
    if provenance.get("seed") is not None:
        rows.append(("random seed", str(provenance["seed"])))
    rows += [(key, str(run[key])) for key in ("date", "command") if run.get(key)]
    source = provenance.get("source") or {}
    if source:
        rows.append(("SHA-256 of the dense model", source["sha256"]))
    samples = [f"{purpose}: {one['described']}"
               for purpose, one in (provenance.get("samples") or {}).items()]  # fmt: skip
    seconds = [
        (stage, number(float(took), 1)) for stage, took in (run.get("seconds") or {}).items()
    ]
    parts = [table(("", ""), [(name, tag("code", value)) for name, value in rows], words=2)]
    if samples:
        parts += [tag("h3", "Calibrated on"), listed(samples)]
    if seconds:
        parts += [tag("h3", "Seconds"), table(("stage", "seconds"), seconds)]
    yield section("What it depends on", *parts)
