"""Which field of a configuration is why a model can't be read, built or run."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from graphprune.checkpoints.config import shown
from graphprune.errors import GraphPruneError, LoadError
from graphprune.frontends.hf.bounded import TooLargeError, at_most
from graphprune.frontends.hf.examples import example_inputs

MOST_TRIALS, FEW_TRIALS = 60, 5
MOST_PARTS = 20_000

Field = tuple[str | int, ...]
Fails = Callable[[Any], object]
"""Raises for a configuration that is wrong."""

_NAMED = re.compile(r"[Ff]ield '(\w+)'")
_FOR_FIELD = re.compile(r"^\w* ?[Vv]alidation error for \w+ '\w+':\s*\w+:\s*")


def wrong_config(
    what: str, error: Exception, config: Any, fails: Fails | None, directory: Path
) -> LoadError:
    """What to say of a configuration that something has failed for.

    Args:
        what: has gone wrong.
        error: of somebody else's code.
        config: the configuration, or its data where there is none yet.
        fails: raises for it, and not for a right one; None to leave the field to the error.
        directory: of the checkpoint.
    """
    named = _NAMED.search(str(error))
    field = named[1] if named else None
    if field is None and fails is not None:
        field = _guilty(config, fails, large=isinstance(error, TooLargeError))
    file = directory / "config.json"
    return LoadError(
        what,
        where=f"{field} in {file}" if field else str(file),
        why=told(error),
        hint="correct the field, or take the config.json that was saved with the weights; a newer "
        "transformers may know what this one doesn't",
    )


def wrong_run(error: Exception, config: Any, model_class: Any, directory: Path) -> LoadError | None:
    """What to say of a model that can't be traced; None where no field is known to be the reason.

    Args:
        error: that has come.
        config: its configuration.
        model_class: its class.
        directory: of the checkpoint.
    """
    what, runs = "the model can't be run as its configuration says", _runs(model_class)
    field = _guilty(config, runs)
    if field is None:
        ours = isinstance(error, GraphPruneError)
        return None if ours else wrong_config(what, error, config, None, directory)
    try:
        runs(config)
    except Exception as own:
        error = own
    found = wrong_config(what, error, config, None, directory)
    found.where = f"{field} in {directory / 'config.json'}"
    return found


def _guilty(config: Any, fails: Fails, *, large: bool = False) -> str | None:
    """The field without which, or at whose default, there is no failure.

    Args:
        config: a configuration, or its data.
        fails: raises for it.
        large: whether it has failed because something is too large.
    """
    most = MOST_PARTS if large else None
    if _passes(fails, config, most):
        return None  # what has failed isn't that
    tried = _dropped(config) if isinstance(config, Mapping) else _defaulted(config, large=large)
    return next((name for name, other in tried if _passes(fails, other, most)), None)


def told(error: BaseException) -> str:
    """An error of somebody else's code, on one line."""
    text = " ".join(_FOR_FIELD.sub("", str(error)).split())
    if isinstance(error, KeyError | AttributeError | IndexError) or not text:
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return text[:300]


def builds(model_class: Any) -> Callable[[Any], torch.nn.Module]:
    """A function that builds a model of a configuration without memory."""

    def build(config: Any) -> torch.nn.Module:
        with torch.device("meta"):
            model: torch.nn.Module = model_class(copy.deepcopy(config))
        return model.eval()

    return build


def _runs(model_class: Any) -> Callable[[Any], None]:
    """A function that runs a model of a configuration on the meta device."""
    build = builds(model_class)

    def run(config: Any) -> None:
        model = build(config)
        with torch.no_grad():
            model(**example_inputs(model, "meta").inputs)

    return run


def _passes(fails: Fails, config: Any, parts: int | None) -> bool:
    try:
        with nullcontext() if parts is None else at_most(parts):
            fails(config)
    except Exception:
        return False
    return True


def _dropped(data: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The data with a count of one instead of none or fewer, or without one field."""
    for name, value in data.items():
        if type(value) is int and value < 1:
            yield name, {**copy.deepcopy(dict(data)), name: 1}
    for name in list(data)[:MOST_TRIALS]:
        yield name, {n: copy.deepcopy(v) for n, v in data.items() if n != name}


def _defaulted(config: Any, *, large: bool) -> Iterator[tuple[str, Any]]:
    """The configuration with one field as its class has it; `large` for the largest numbers."""
    data = config.to_dict()
    found = list(_defaults(config, data))
    if large:
        sizes = [(p, d) for p, d in found if type(_at(data, p)) is int]
        found = sorted(sizes, key=lambda pair: -_at(data, pair[0]))[:FEW_TRIALS]
    for path, default in found[:MOST_TRIALS]:
        changed = copy.deepcopy(data)
        owner = changed
        for key in path[:-1]:
            owner = owner[key]
        owner[path[-1]] = default
        try:
            yield shown(path), type(config).from_dict(changed)
        except Exception:  # this one isn't wrong alone
            continue


def _defaults(config: Any, data: dict[str, Any], prefix: Field = ()) -> Iterator[tuple[Field, Any]]:
    """Fields that aren't as their class has them, with the value there; names first."""
    usual = _usual(type(config))
    found = [(n, v) for n, v in data.items() if n[:1] != "_" and n in usual and v != usual[n]]
    for name, value in sorted(found, key=lambda pair: not isinstance(pair[1], str)):
        if not isinstance(value, dict) or not hasattr(getattr(config, name, None), "to_dict"):
            if type(value) is int and value < 1:
                yield (*prefix, name), 1  # the default may not go with the other sizes
            yield (*prefix, name), usual[name]
    for name, value in data.items():
        part = getattr(config, name, None)
        if isinstance(value, dict) and hasattr(part, "to_dict"):
            yield from _defaults(part, value, (*prefix, name))


def _at(data: Any, path: Field) -> Any:
    for key in path:
        data = data[key]
    return data


def _usual(config_class: Any) -> dict[str, Any]:
    try:
        usual: dict[str, Any] = config_class().to_dict()
    except Exception:  # a class that has no configuration of its own accord
        signature = inspect.signature(config_class.__init__).parameters
        usual = {n: p.default for n, p in signature.items() if p.default is not p.empty}
    return usual
