"""The order of the layers, the sizes of folders and files."""

import ast
import sys
from collections import Counter
from pathlib import Path

import networkx as nx

sys.path.append(str(Path(__file__).parents[1] / "tools"))

from _layers import LAYERS, ROOT, between, imports, layer, modules  # type: ignore[import-not-found]

MODULES = modules()
GRAPH = imports(MODULES)


def test_every_import_was_found():
    # Two that are easily overlooked: inside of a function, and relative.
    assert GRAPH.has_edge("graphprune.frontends", "graphprune.frontends.pt2.read")
    assert GRAPH.has_edge(
        "graphprune.kernels.gpu.bitmap_triton", "graphprune.kernels.formats.bitmap"
    )
    assert len(MODULES) > 400
    assert GRAPH.number_of_edges() > 4 * len(MODULES)


def test_layers_import_only_what_stands_before_them():
    order = {name: place for place, name in enumerate(LAYERS)}
    found = between(GRAPH, MODULES)
    assert {name for pair in found for name in pair} <= order.keys()
    upwards = {pair: used for pair, used in found.items() if order[pair[0]] < order[pair[1]]}
    assert upwards == {}


def test_no_files_import_each_other():
    inner = GRAPH.subgraph(n for n in GRAPH if n != "graphprune")
    assert [c for c in nx.strongly_connected_components(inner) if len(c) > 1] == []


def test_folders_and_files_are_small():
    counts = Counter(layer(name, MODULES) for name in MODULES)
    assert len(list((ROOT / "graphprune").glob("*.py"))) <= 9
    assert {name: n for name, n in counts.items() if n > 14} == {}
    sources = [*MODULES.values(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "tools").glob("*.py")]
    lengths = {str(f.relative_to(ROOT)): len(f.read_text().splitlines()) for f in sources}
    assert {name: n for name, n in lengths.items() if n > 500} == {}


def test_the_oracle_knows_nothing_of_the_rewriter():
    oracle = {n for n in GRAPH if layer(n, MODULES) == "oracle"}
    reached = set().union(*(nx.descendants(GRAPH, n) for n in oracle)) - {"graphprune"}
    assert not {n for n in reached if layer(n, MODULES).startswith("rewrite")}


def test_streamed_runs_and_passes_tell_graph_formats_apart_in_one_place():
    asking = {
        name
        for name, file in MODULES.items()
        if layer(name, MODULES).split(".")[0] in ("streaming", "passes")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance"
        if ast.unparse(node.args[1]).endswith("Program")
    }
    assert asking == {"graphprune.streaming.programs"}
