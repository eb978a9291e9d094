"""From a module to a smaller one to train, for a loop that somebody has already."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from graphprune.analysis.program import Source
from graphprune.errors import LoadError
from graphprune.exclusive import alone
from graphprune.frontends.tracing.trace import trace, unwrap
from graphprune.integrations.goal import Choice, carry_out, settle
from graphprune.ir.torch.program import Program
from graphprune.rewrite.slim import Slim


def prune(
    module: nn.Module,
    example: Any = None,
    recipe: Choice | None = None,
    *,
    check: bool = True,
    dynamic_shapes: Any = None,
    **settings: object,
) -> nn.Module:
    """Prune a module, and get a plain one to train.

        slim = gp.prune(module, (x,), remove={"ffn": 0.5})
        optimizer = torch.optim.AdamW(slim.parameters())

    Args:
        module: in either mode; it isn't changed.
        example: inputs: a tuple of positional ones, a mapping of those by keyword, or a tensor. A
            model of transformers may do without.
        recipe: a plan, a recipe, its plain data, or the path of a recipe in YAML.
        check: compare the result with the masked model on random inputs.
        dynamic_shapes: see `graphprune.trace`.
        **settings: keys of a recipe, such as ``remove={"ffn": 0.25}``; they win over `recipe`'s.

    Returns:
        A module of the same class with smaller weights of its own, in the mode of the source, where
        the same parameters require gradients. A model of transformers has the configuration of its
        new sizes too. Where no sizes of the class compute what the slim model computes, it is the
        graph as a module, with a warning: it trains as well, but has no dropout.

    Raises:
        LoadError: there are no example inputs.
        TraceError: torch.export can't capture the module.
        RecipeError: the recipe can't be understood.
        PlanError: it can't be carried out on this model.
        VerifyError: the result doesn't equal the masked model.
    """
    goal = settle(recipe, settings)
    module = unwrap(module)
    experts = _experts(module)
    try:
        with _evaluating(module):
            program = _traced(module, example, dynamic_shapes)
            slim = carry_out(program, goal, check=check)
            with alone(), warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                found = slim.module
    finally:
        _set_experts(module, experts)
    for one in said:  # of the form of the module, to whoever called us
        warnings.warn(str(one.message), one.category, stacklevel=2)
    _set_experts(found, experts)
    if slim.form == "graph":
        _make_trainable(found, slim, module)
    else:
        _set_modes(found, module)
    return found


def _traced(module: nn.Module, example: Any, dynamic_shapes: Any) -> Program:
    own = _is_transformers(module)
    if example is None:
        if not own:
            raise LoadError(
                "a module needs example inputs",
                where=type(module).__name__,
                hint="pass (input, ...) or {name: input}",
            )
        from graphprune.frontends.hf.load import trace_model

        device = next((p.device.type for p in module.parameters()), "cpu")
        return trace_model(module, None, device)
    if isinstance(example, torch.Tensor):
        example = (example,)
    named = isinstance(example, Mapping)
    args, kwargs = ((), example) if named else (tuple(example), {})
    source: Source | None = None
    guard: AbstractContextManager[None] = nullcontext()
    if own:
        from graphprune.frontends.hf.load import plain_experts, traceable

        plain_experts(module)
        source, guard = Source(None, module.config, type(module)), traceable(module)
    with guard:
        return trace(module, args, kwargs, dynamic_shapes, source=source)


def _is_transformers(module: nn.Module) -> bool:
    """Whether a module is a model of transformers, without importing it."""
    known: Any = sys.modules.get("transformers")
    return known is not None and isinstance(module, known.PreTrainedModel)


def _experts(module: nn.Module) -> dict[str, Any]:
    """How models of transformers compute their experts, by path; tracing takes a way of its own."""
    configs = {path: getattr(part, "config", None) for path, part in module.named_modules()}
    key = "_experts_implementation"
    return {path: getattr(c, key) for path, c in configs.items() if getattr(c, key, None)}


def _set_experts(module: nn.Module, experts: Mapping[str, Any]) -> None:
    for path, part in module.named_modules():
        if path in experts:
            config: Any = part.config
            config._experts_implementation = experts[path]


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """In evaluation mode, and afterwards each part in its own again."""
    before = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in before.items():
            part.training = mode


def _set_modes(slim: nn.Module, dense: nn.Module) -> None:
    """The modes of the dense module's parts; those of what has another name are the whole's."""
    known = {path: part.training for path, part in dense.named_modules()}
    for path, part in slim.named_modules():
        part.training = known.get(path, dense.training)


def _make_trainable(graph: nn.Module, slim: Slim, dense: nn.Module) -> None:
    """Have a graph train: its parameters, and calls of `train` and `eval`, which change nothing."""
    graph.__dict__.pop("train", None)  # they refuse
    graph.__dict__.pop("eval", None)
    parameters = dict(dense.named_parameters(remove_duplicate=False))
    trained = {n for n, p in parameters.items() if p.requires_grad}
    trained = {slim.renamed[n] for n in trained & slim.renamed.keys()}
    for name, parameter in graph.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(name in trained)
    graph.train(dense.training)
