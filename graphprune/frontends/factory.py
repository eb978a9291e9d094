"""Front end for one's own code: ``package.module:factory`` or ``path/to/file.py:factory``."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils import _pytree as pytree

from graphprune.errors import LoadError
from graphprune.exclusive import one_at_a_time
from graphprune.files.paths import usable
from graphprune.frontends.tracing.trace import trace, unwrap
from graphprune.ir.torch.program import Program

_RESULTS = "a module, (module, args[, kwargs[, dynamic_shapes]]) or a graphprune.Program"


@one_at_a_time
def load_factory(source: str, weights: str | Path | None = None) -> Program:
    """Call a factory of one's own and trace the module that it makes.

    The factory takes no arguments. It returns what `graphprune.trace` takes, in that order::

        def tagger():
            model = Tagger().eval()
            args = (torch.zeros(2, 16, dtype=torch.int64),)
            length = torch.export.Dim("length", min=2, max=512)
            return model, args, {}, {"tokens": {0: torch.export.Dim.AUTO, 1: length}}

    ``(module, args)`` is enough where the inputs are positional and their first dimension is the
    only one that changes; a program that is traced already is taken as it is. A module alone needs
    an attribute `example_inputs`: a tuple of positional or a mapping of keyword inputs, or a method
    that returns one. Transformers models need nothing, their inputs are known. What the factory
    prints goes to stderr.

    Args:
        source: ``module:name`` (also from the working directory) or ``path/to/file.py:name``.
        weights: a safetensors file with the module's state dict, read after the factory has run.

    Raises:
        LoadError: the code can't be imported, has no such factory, the factory raises or returns
            something else, or the weights don't fit.
        TraceError: the module is in training mode, or torch.export can't capture it.
    """
    code, _, name = source.rpartition(":")
    with _importable(code), contextlib.redirect_stdout(sys.stderr):
        factory = _attribute(_import(code, source), name, source)
        made = _call(factory, source)
        if isinstance(made, Program):
            if weights is not None:
                raise LoadError("weights can't be read into a program", where=source,
                                hint="let the factory return the module")  # fmt: skip
            return made
        return _traced(made, source, weights)


@one_at_a_time
def call_own(source: str, what: str) -> Any:
    """Import code of one's own and call it; what is no function is taken as it is.

    Args:
        source: ``module:name`` or ``path/to/file.py:name``.
        what: what to call it in errors.

    Raises:
        LoadError: the code can't be imported, has no such name, or raises.
    """
    code, _, name = source.rpartition(":")
    with _importable(code), contextlib.redirect_stdout(sys.stderr):
        return _call(_attribute(_import(code, source), name, source), source, what)


@contextlib.contextmanager
def _importable(code: str) -> Iterator[None]:
    """Let code import what lies beside it, as Python does for a script."""
    folder = str(Path(code).parent.resolve() if code.endswith(".py") else Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def _import(code: str, source: str) -> ModuleType:
    if code.endswith(".py") and not Path(code).is_file():
        raise LoadError("no such file", where=code, hint="give path/to/file.py:factory")
    try:
        return _run_file(Path(code)) if code.endswith(".py") else importlib.import_module(code)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever running somebody's code raises, SystemExit too
        raise LoadError(
            f"can't import {code}",
            where=_place(error) or source,
            why=_told(error),
            hint="the factory's module is looked for in the working directory and where Python "
            "looks for packages",
        ) from error


def _run_file(path: Path) -> ModuleType:
    """Import a file under a name of its own, so that it can't be taken for an installed module."""
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    stem = re.sub(r"\W", "_", path.stem)
    name = f"_graphprune_{stem}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _attribute(module: ModuleType, name: str, source: str) -> Any:
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            own = [n for n, value in vars(found).items() if callable(value) and n[0] != "_"]
            close = difflib.get_close_matches(part, own, n=1, cutoff=0.4)
            raise LoadError(
                f"there is no '{part}' in {source.rpartition(':')[0]}",
                where=source,
                hint=f"did you mean '{close[0]}'?" if close else "check the name after the colon",
            )
        found = getattr(found, part)
    return found


def _call(factory: Any, source: str, what: str = "factory") -> Any:
    if isinstance(factory, torch.nn.Module | Program) or not callable(factory):
        return factory
    try:
        return factory()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # somebody's code again
        raise LoadError(
            f"the {what} raised an error",
            where=_place(error) or source,
            why=_told(error),
            hint=f"make it run by itself: {source} is called without arguments",
        ) from error


def _traced(made: Any, source: str, weights: str | Path | None) -> Program:
    parts = made if isinstance(made, tuple) else (made,)
    fits = 1 <= len(parts) <= 4 and isinstance(parts[0], torch.nn.Module)
    fits = fits and (len(parts) < 2 or isinstance(parts[1], tuple))
    if not fits or (len(parts) > 2 and not isinstance(parts[2], Mapping | None)):
        kinds = ", ".join(type(p).__name__ for p in parts)
        raise LoadError(
            "the factory didn't return a module with example inputs",
            where=source,
            why=f"it returned {f'({kinds})' if isinstance(made, tuple) else kinds}",
            hint=f"return {_RESULTS}",
        )
    module = unwrap(parts[0])
    if weights is not None:
        from graphprune.checkpoints.weights import fill

        fill(module, usable(weights))
    if len(parts) > 1:
        return trace(module, *(_beside(module, part) for part in parts[1:3]), *parts[3:])
    example = getattr(module, "example_inputs", None)
    if example is None and _is_transformers(module):
        from graphprune.frontends.hf.load import trace_model

        if module.training:
            trace(module)  # raises
        device = next((p.device.type for p in module.parameters()), "cpu")
        return trace_model(module, None, device)
    example = example() if callable(example) else example
    if isinstance(example, Mapping):
        return trace(module, (), _beside(module, example))
    if not isinstance(example, tuple):
        raise LoadError(
            "the factory's module has no example inputs",
            where=source,
            why="a graph is traced by running the module on an example",
            hint="return (module, args) or (module, args, kwargs), or give the module an attribute "
            "example_inputs",
        )
    return trace(module, _beside(module, example))


def _beside(module: torch.nn.Module, example: Any) -> Any:
    """Example inputs where the module is, if one of the two is on the meta device."""
    device = next((p.device for p in module.parameters()), None)

    def moved(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or device is None:
            return value
        if value.is_meta and device.type != "meta":
            return torch.zeros(value.shape, dtype=value.dtype, device=device)
        return value.to(device) if device.type == "meta" else value

    return pytree.tree_map(moved, example)


def _is_transformers(module: torch.nn.Module) -> bool:
    """Without importing transformers, which takes seconds: a model of it has done so."""
    transformers = sys.modules.get("transformers")
    known = transformers is not None and hasattr(module, "config")
    return known and isinstance(module, getattr(transformers, "PreTrainedModel"))  # noqa: B009


def _place(error: BaseException) -> str | None:
    """Where somebody's code went wrong: the innermost line outside of this file."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename != __file__ and "importlib" not in f.filename]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else None


def _told(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
