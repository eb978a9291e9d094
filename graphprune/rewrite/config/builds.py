"""Models built from configs on the meta device: their shapes and attributes, without weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from logging import ERROR
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.utils import logging

from graphprune.checkpoints.patch import named_tensors, plain_attributes
from graphprune.exclusive import alone
from graphprune.rewrite.config.fields import Data, Path

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Built:
    """What a config builds.

    Attributes:
        shapes: Name to shape of all parameters and buffers, tied names included.
        parameters: The names of the parameters among them.
        attributes: (module path, name) to value of all number-valued attributes.
        children: Module path to its number of children.
    """

    shapes: Mapping[str, Shape]
    parameters: frozenset[str]
    attributes: Mapping[tuple[str, str], Any]
    children: Mapping[str, int]


@dataclass(frozen=True)
class Attempt:
    """A model, or the message of the exception that came instead."""

    model: Built | None
    error: str | None = None

    def built(self) -> Built:
        """Return the model where it is known that there is one."""
        assert self.model is not None, self.error
        return self.model


class Builder:
    """Builds models of one class from config data, each config once."""

    def __init__(self, config_class: type[PretrainedConfig], model_class: type[nn.Module]) -> None:
        self.config_class = config_class
        self.model_class = model_class
        self.count = 0
        self._cache: dict[str, Attempt] = {}

    def build(self, data: Data) -> Attempt:
        """Build a model and keep what is known about it."""
        key = json.dumps(data, sort_keys=True, default=str)
        if key not in self._cache:
            self.count += 1
            try:
                model = build_on_meta(self.model_class, self.config_class.from_dict(dict(data)))
                self._cache[key] = Attempt(_built(model))
            except Exception as error:  # whatever a config or model class says to odd sizes
                self._cache[key] = Attempt(None, " ".join(str(error).split()))
        return self._cache[key]

    def asked(self, data: Data) -> list[Path]:
        """Return the fields that the model's code looks for and that the config doesn't have."""
        config = self.config_class.from_dict(dict(data))
        asked: dict[Path, None] = {}

        def getter(prefix: Path) -> Any:
            def note(_: PretrainedConfig, name: str) -> Any:
                if not name.startswith("_"):
                    asked[(*prefix, name)] = None
                raise AttributeError(name)

            return note

        for prefix, part in _parts(config):
            cls = type(part)
            namespace = {"__getattr__": getter(prefix), "__module__": cls.__module__}
            part.__class__ = type(cls.__name__, (cls,), namespace)
        try:
            build_on_meta(self.model_class, config)
        except Exception:  # the fields asked for until then count
            return list(asked)
        return list(asked)


def build_on_meta(model_class: type[nn.Module], config: PretrainedConfig) -> nn.Module:
    """Build a model without memory for its weights; its non-persistent buffers are empty too."""
    with quiet(), torch.device("meta"):
        return model_class(config)


def _built(model: nn.Module) -> Built:
    modules = dict(model.named_modules())
    return Built(
        {name: tuple(tensor.shape) for name, tensor in named_tensors(model)},
        frozenset(name for name, _ in model.named_parameters(remove_duplicate=False)),
        {
            (path, name): value
            for path, module in modules.items()
            for name, value in plain_attributes(module).items()
        },
        {path: len(module._modules) for path, module in modules.items()},
    )


def _parts(config: PretrainedConfig, prefix: Path = ()) -> Iterator[tuple[Path, PretrainedConfig]]:
    """Yield a config and its sub-configs."""
    yield prefix, config
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield from _parts(value, (*prefix, name))


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what transformers says to configs that are only tried; works as a decorator too."""
    with alone():
        verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity(ERROR)
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()  # type: ignore[no-untyped-call]
