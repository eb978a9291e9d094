"""Front end for modules in memory: ``torch.export`` and what it leaves out."""

from __future__ import annotations

import inspect
import traceback
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from graphprune.analysis.program import Source
from graphprune.analysis.structures import find_structures
from graphprune.errors import TraceError
from graphprune.exclusive import one_at_a_time
from graphprune.frontends.tracing.decompose import decompose
from graphprune.frontends.tracing.functional import functional
from graphprune.ir.torch.infer import infer
from graphprune.ir.torch.program import Program

# torch's recurrent layers keep a list of their own parameters, and renew it while export has put
# stand-ins in the parameters' place. Export puts the list back, and its graph reads parameters.
_FLAT = r"self\.[\w.]*\b_flat_weights\[\d+\]"
_RECURRENT_WEIGHTS = (
    rf"The tensor attributes? {_FLAT}(, {_FLAT})* (was|were) assigned during export"
)


@one_at_a_time
def trace(
    module: torch.nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    *,
    source: Source | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> Program:
    """Trace a module and find its structures.

    Args:
        module: in evaluation mode; its weights may be on the meta device.
        args: example inputs.
        kwargs: example keyword inputs.
        dynamic_shapes: as for `torch.export.export`. None makes the first dimension of every
            tensor input dynamic, and the second one of integer inputs (token ids), where the
            model allows it.
        source: the checkpoint that the module was loaded from.
        weights: replaces the module's tensors, by name (lazy mappings).

    Returns:
        The program. The module is not changed.

    Raises:
        TraceError: the module is in training mode, or torch.export can't capture it.
    """
    module = unwrap(module)
    kwargs = dict(kwargs or {})
    training = [name for name, m in module.named_modules() if m.training]
    if training:
        raise TraceError(
            "the module is in training mode",
            where=training[0] or type(module).__name__,
            why="dropout and batch statistics would become part of the graph",
            hint="call module.eval() first",
        )
    exported = _export(module, args, kwargs, dynamic_shapes)
    aliases = _tied(module)
    return assemble(exported, module, aliases, (args, kwargs), source=source, weights=weights)


@one_at_a_time
def assemble(
    exported: ExportedProgram,
    module: torch.nn.Module | None,
    aliases: dict[str, str],
    example: tuple[tuple[Any, ...], dict[str, Any]],
    *,
    source: Source | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> Program:
    """Analyse an exported program."""
    exported = decompose(functional(exported))
    specs = exported.graph_signature.input_specs
    names = [s.target for s in specs if s.target is not None]
    if weights is None:
        state = {**exported.constants, **exported.state_dict}
        weights = {n: state[n] for n in names if isinstance(state.get(n), torch.Tensor)}
    trainable = frozenset(
        aliases.get(s.target, s.target)
        for s in specs
        if s.kind == InputKind.PARAMETER and s.target is not None
    )
    program = Program(
        exported=exported,
        module=module,
        weights=weights,
        aliases=aliases,
        typing=infer(exported, aliases),
        structures=(),
        example=example,
        source=source,
        trainable=trainable,
    )
    program.structures = find_structures(program, program.costs)
    return program


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """The module of one's own inside DataParallel and torch.compile wrappers."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and isinstance(
            module, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel
        ):
            inner = module.module
        if inner is None:
            return module
        module = inner


def _export(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
) -> ExportedProgram:
    try:
        if dynamic_shapes is None:
            dynamic_shapes = _default_dynamic_shapes(module, args, kwargs)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_RECURRENT_WEIGHTS)
            return torch.export.export(
                module, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False
            )
    except Exception as error:  # torch.export raises many kinds, some of them private
        raise TraceError(
            f"torch.export can't capture {type(module).__name__}",
            where=_own_line(error),
            why=": ".join(filter(None, (type(error).__name__, _beginning(error)))),
            hint="check the example inputs with module(*args, **kwargs); data-dependent control "
            "flow has to be rewritten or moved out of the module",
        ) from error


def _beginning(error: BaseException) -> str:
    """The first two lines: where ranges are violated, the second one says which."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:400]


def _own_line(error: BaseException) -> str | None:
    """The innermost line of the model's own code that an error went through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename and f.filename != __file__]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else None


def _default_dynamic_shapes(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    def spec(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return None
        numbers = value.is_floating_point() or value.is_complex()
        ranks = min(value.dim(), 1 if numbers else 2)
        return {d: Dim.AUTO for d in range(ranks) if value.shape[d] > 1}

    # By parameter of `forward`, `*args` included, which is how export matches them.
    given = inspect.signature(module.forward).bind(*args, **kwargs)
    if not kwargs.keys() <= given.arguments.keys():
        return None  # export can't match those that `**kwargs` takes
    return torch.utils._pytree.tree_map(spec, dict(given.arguments)) or None


def _tied(module: torch.nn.Module) -> dict[str, str]:
    """Names of shared parameters and buffers to the first name of each."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for named in (
        module.named_parameters(remove_duplicate=False),
        module.named_buffers(remove_duplicate=False),
    ):
        for name, tensor in named:
            known = first.setdefault(id(tensor), name)
            if known != name:
                aliases[name] = known
    return aliases
