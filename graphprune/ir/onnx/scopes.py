"""Modules of ONNX operators, as far as torch's exporters wrote them down.

The newer exporter puts the scopes from the model down to the operator into its metadata. The
older one makes names of them, "/encoder/layer.0/output/Add".
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator

import onnx_ir as ir

SCOPES = "pkg.torch.onnx.name_scopes"
# A module's number, behind the name of its list, and what the module's second call adds to it.
_NUMBER = re.compile(r"((?:.*\.)?\d+)(_\d+)")


def module_path(node: ir.Node) -> str | None:
    """The path of the module that an operator belongs to, "encoder.layer.0.output".

    It is "" for the model itself, and None where nothing is written down.
    """
    scopes = _scopes(node)
    if scopes:
        return scopes[-2].partition("@")[0] if len(scopes) > 1 else ""
    name = node.name or ""
    return ".".join(own for _, own, _ in _components(name)) if name.startswith("/") else None


def rename_modules(node: ir.Node, renamed: Callable[[str], str]) -> None:
    """Write down other paths of the modules that an operator belongs to.

    Args:
        node: the operator.
        renamed: path to the new path, of as many parts.
    """
    scopes = _scopes(node)
    if scopes:
        node.metadata_props[SCOPES] = repr([*map(renamed, scopes[:-1]), scopes[-1]])
        return
    parts: list[str] = []
    path = ""
    for repeats, own, call in _components(node.name or ""):
        path = f"{path}.{own}" if path else own
        new = ".".join(renamed(path).split(".")[-len(own.split(".")) :])
        parts.append(f"{parts[-1]}.{new}{call}" if repeats else f"{new}{call}")
    if parts:
        node.name = "/".join(["", *parts, (node.name or "").rpartition("/")[2]])


def _scopes(node: ir.Node) -> list[str]:
    try:
        found = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    except (ValueError, SyntaxError):
        return []
    return [str(s) for s in found] if isinstance(found, list) else []


def _components(name: str) -> Iterator[tuple[bool, str, str]]:
    """The modules in an operator's name, from the outermost in.

    Yields:
        Whether it repeats the name of the module around it, as those in a container that is
        called itself do ("/layers/layers.0"), its own name, and the mark of its second call.
    """
    around: str | None = None
    for part in name.split("/")[1:-1] if name.startswith("/") else ():
        repeats = around is not None and part.startswith(f"{around}.")
        own = part[len(around or "") + 1 :] if repeats else part
        around = part
        again = _NUMBER.fullmatch(own)
        yield repeats, again[1] if again else own, again[2] if again else ""
