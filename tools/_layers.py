"""The layers of the package: which folder may import which, read off the sources."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import networkx as nx

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "graphprune": "graphprune",
    "passes": "graphprune.passes",
    "kernels": "graphprune.kernels",
}
"""Folders of the checkout, to the package that each of them is."""

LAYERS = (
    "errors", "_version", "options", "registry", "exclusive", "progress",
    "kernels.formats", "kernels.gpu", "kernels",
    "files", "checkpoints", "ranks", "placement",
    "axes", "ops", "ops.families", "ops.torch", "ops.onnx", "analysis", "plan",
    "ir", "ir.torch", "ir.onnx.shapes", "ir.onnx",
    "frontends.tracing", "frontends.hf", "frontends.pt2", "frontends.onnx", "frontends",
    "oracle", "rewrite.config", "rewrite.module", "rewrite",
    "solvers",
    "calibration.text.builtin", "calibration.text", "calibration.sources", "quality", "calibration",
    "streaming.core", "streaming.torch", "streaming.onnx", "streaming",
    "training.text", "training.core", "training.model", "training.gates", "training.domains",
    "training.schedule", "training",
    "passes.shared", "passes.match", "passes.repair", "passes.scores", "passes.selection",
    "passes.loraprune", "passes.masks", "passes",
    "recipe", "report", "report.html", "runtime", "emit", "packing",
    "preflight", "provenance", "measure", "comparing",
    "pipeline.steps", "pipeline.gradual", "pipeline.written", "pipeline.before", "pipeline",
    "sweep", "integrations", "cli",
    "__main__",
)  # fmt: skip
"""Folders, and files at the root of the package: each imports only what stands before it."""


def modules() -> dict[str, Path]:
    """Every module of the package to its file."""
    found = {}
    for folder, package in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            if folder == "graphprune" and parts[0] in FOLDERS:
                continue  # links
            name = ".".join((package, *parts))
            found[name.removesuffix(".__init__")] = file
    return found


def imports(known: Mapping[str, Path]) -> nx.DiGraph[Any]:
    """Modules, with an edge to each that they import: lazily or for types only as well."""
    graph: nx.DiGraph[Any] = nx.DiGraph()
    graph.add_nodes_from(known)
    for name, file in known.items():
        package = name.split(".") if file.stem == "__init__" else name.split(".")[:-1]
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            for target in _targets(node, package, known):
                while target and target not in known:
                    target = target.rpartition(".")[0]
                if target and target != name:
                    graph.add_edge(name, target)
    return graph


def _targets(node: ast.AST, package: list[str], known: Mapping[str, Path]) -> Iterator[str]:
    """The modules that a statement imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        start = package[: len(package) - node.level + 1] if node.level else []
        home = ".".join((*start, *([node.module] if node.module else [])))
        for alias in node.names:
            whole = f"{home}.{alias.name}"
            yield whole if whole in known else home


def layer(name: str, known: Mapping[str, Path]) -> str:
    """The layer of a module: its folder, or itself at the root of the package."""
    is_package = known[name].stem == "__init__"
    found = name if is_package or name.count(".") == 1 else name.rpartition(".")[0]
    return found.removeprefix("graphprune").removeprefix(".")


def between(
    graph: nx.DiGraph[Any], known: Mapping[str, Path]
) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """Pairs of layers of which one imports the other, to the modules that do.

    The root of the package is left out: it hands everything on, and opens it at first use.
    """
    found = defaultdict(list)
    for a, b in graph.edges:
        pair = layer(a, known), layer(b, known)
        if "graphprune" not in (a, b) and pair[0] != pair[1]:
            found[pair].append((a, b))
    return dict(found)


def page() -> str:
    """Return the layers as a Markdown table, and a picture of them."""
    from _tables import table

    known = modules()
    counts = Counter(layer(name, known) for name in known)
    rows = [
        (f"`{name}`", _words(known[f"graphprune.{name}"]), str(counts[name]))
        for name in LAYERS
        if f"graphprune.{name}" in known and known[f"graphprune.{name}"].stem == "__init__"
    ]
    text = (
        "Each layer imports only what stands above it in this table. The picture leaves out what "
        "follows from its other arrows."
    )
    return f"{text}\n\n{table(('layer', 'what is in it', 'files'), rows)}\n{picture()}"


def picture() -> str:
    """Return a Mermaid graph of the layers and their direct imports."""
    known = modules()
    counts = Counter(layer(name, known) for name in known)
    coarse = list(dict.fromkeys(name.partition(".")[0] for name in LAYERS if counts[name] > 1))
    graph: nx.DiGraph[Any] = nx.DiGraph()
    graph.add_nodes_from(coarse)
    for a, b in between(imports(known), known):
        pair = a.partition(".")[0], b.partition(".")[0]
        if pair[0] != pair[1] and set(pair) <= set(coarse):
            graph.add_edge(*pair)
    direct = nx.transitive_reduction(graph)
    order = {name: i for i, name in enumerate(coarse)}
    drawn = sorted(direct.edges, key=lambda e: (order[e[0]], order[e[1]]))
    lines = "".join(f"  {a} --> {b}\n" for a, b in drawn)
    return f"```mermaid\nflowchart BT\n{lines}```\n"


def _words(file: Path) -> str:
    """The first sentence of a package's docstring."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return text.split("\n\n")[0].replace("\n", " ").replace("``", "`")
