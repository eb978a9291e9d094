"""Front end for exported programs, in memory and in ``.pt2`` files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from graphprune.errors import LoadError
from graphprune.exclusive import one_at_a_time
from graphprune.frontends.pt2.check import check_pt2
from graphprune.frontends.tracing.trace import assemble
from graphprune.ir.torch.program import Program


@one_at_a_time
def load_pt2(path: Path, *, trust: bool = False) -> Program:
    """Open an exported program.

    Args:
        path: the file.
        trust: whether it may run code; see `open_exported`.

    Raises:
        LoadError: the file is missing, damaged, of a version that this torch can't read, or may
            run code.
    """
    return from_exported(open_exported(path, trust=trust))


@one_at_a_time
def open_exported(path: Path, *, trust: bool = False) -> ExportedProgram:
    """Read a ``.pt2`` file, after `graphprune.frontends.pt2.check` has let it pass.

    Args:
        path: the file.
        trust: have PyTorch open it without looking at it first. It may run code then.

    Raises:
        LoadError: see `load_pt2`.
    """
    if not path.is_file():
        raise LoadError("no such file", where=str(path))
    if not trust:
        check_pt2(path)
    try:
        return torch.export.load(path)
    except Exception as error:  # a damaged archive surfaces as many kinds of error
        raise LoadError(
            "torch.export can't open the file",
            where=str(path),
            why=f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}",
            hint="save it again with torch.export.save",
        ) from error


def from_exported(exported: ExportedProgram) -> Program:
    """The program of an exported one, which stays as it is.

    Of checks of its inputs that are written as code, none is taken over.
    """
    example: Any = exported.example_inputs or ((), {})
    return assemble(_copied(exported), None, _tied(exported), (tuple(example[0]), dict(example[1])))


def _copied(exported: ExportedProgram) -> ExportedProgram:
    """A program with a graph of its own; `copy.deepcopy` would rename an input called ``input``."""
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in exported.graph.nodes:
        made[node] = graph.node_copy(node, made.__getitem__)
        made[node].name = node.name  # a graph of its own renames what is called like a builtin
    return ExportedProgram(
        root=exported.graph_module,
        graph=graph,
        graph_signature=exported.graph_signature,
        state_dict=dict(exported.state_dict),
        range_constraints=dict(exported.range_constraints),
        module_call_graph=exported.module_call_graph,
        example_inputs=exported.example_inputs,
        constants=dict(exported.constants),
        verifiers=exported.verifiers,
    )


def _tied(exported: ExportedProgram) -> dict[str, str]:
    """Names that share one tensor to the first of them."""
    first: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in exported.state_dict.items():
        if tensor.is_meta or not tensor.numel():
            continue
        key = (
            tensor.untyped_storage().data_ptr(),
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
        )
        known = first.setdefault(key, name)
        if known != name:
            aliases[name] = known
    return aliases
