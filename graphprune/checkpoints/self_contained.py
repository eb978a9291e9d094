"""The self-contained form of a Hugging Face checkpoint: the original class plus a resize patch.

It is for models that no native config can express: other widths in other layers, fewer heads where
the config has no head size, factors that the class would compute from the new size. The patch lies
in the config, under `graphprune`; `modeling_graphprune.py` beside it lets plain transformers open
the checkpoint with ``trust_remote_code=True``, and graphprune opens it without running that file.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig

from graphprune.checkpoints.patch import Patch, apply_patch
from graphprune.errors import LoadError

KEY = "graphprune"
"""The config entry: `{"base": original class, "patch": ...}`."""

FILE = "modeling_graphprune"

SOURCE = '''"""A pruned {name}, written by graphprune: the original class, resized.

The patch is in config.json under "{key}". Everything but the last class is copied from graphprune.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from {module} import {name}


{patch}

{apply}

class Pruned{name}({name}):
    """A {name} whose parameters have the sizes that pruning left."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        apply_patch(self, Patch.from_json(config.{key}["patch"]))
'''


def modelling_source(model_class: type[nn.Module]) -> str:
    """Return the text of the modelling file: needs transformers and torch, not graphprune."""
    return SOURCE.format(
        name=model_class.__name__,
        module=model_class.__module__,
        key=KEY,
        patch=inspect.getsource(Patch),
        apply=inspect.getsource(apply_patch),
    )


def pruned_class(model_class: type[nn.Module]) -> type[nn.Module]:
    """Return the class that the modelling file of a checkpoint defines, without running the file.

    Args:
        model_class: The original class, named by `base` in the config entry.
    """

    def init(self: nn.Module, config: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        apply_patch(self, Patch.from_json(getattr(config, KEY)["patch"]))

    namespace = {
        "__init__": init,
        "__module__": model_class.__module__,
        "__doc__": f"A {model_class.__name__} of the sizes that pruning left.",
        "original_class": model_class,
    }
    return type(f"Pruned{model_class.__name__}", (model_class,), namespace)


def class_of(config: PretrainedConfig) -> type[nn.Module] | None:
    """Return the class to open a self-contained checkpoint with, None for an ordinary config.

    Raises:
        LoadError: The original class isn't one of transformers, or isn't said.
    """
    entry = getattr(config, KEY, None)
    if entry is None:
        return None
    if not isinstance(entry, dict):
        raise LoadError(
            "the configuration can't be used",
            where=f"{KEY} in config.json",
            why="it has to be an object with the class and its patch",
            hint="take the config.json that was saved with the weights",
        )
    base = getattr(transformers, str(entry.get("base")), None)
    if not (isinstance(base, type) and issubclass(base, nn.Module)):
        raise LoadError(
            f"transformers has no class {entry.get('base')}",
            where=f"{KEY}.base in config.json",
            hint="the pruned model needs the transformers version that it was written with",
        )
    return pruned_class(base)


def original_class(model_class: type[nn.Module]) -> type[nn.Module]:
    """Return the class behind one of `pruned_class`, and any other class itself."""
    found: type[nn.Module] = getattr(model_class, "original_class", model_class)
    return found


def annotate(
    config: PretrainedConfig, model_class: type[nn.Module], patch: Patch
) -> PretrainedConfig:
    """Return a copy of a config for the self-contained form.

    Args:
        config: The config that the original class is to be built from.
        model_class: The original class.
        patch: What to do with what it built.
    """
    name = f"Pruned{model_class.__name__}"
    copy = type(config).from_dict(config.to_dict())
    setattr(copy, KEY, {"base": model_class.__name__, "patch": patch.to_json()})
    copy.architectures = [name]
    autos = auto_classes(type(config), model_class) or ["AutoModel"]
    copy.auto_map = {auto: f"{FILE}.{name}" for auto in autos}
    return copy


def plain(config: PretrainedConfig, model_class: type[nn.Module]) -> PretrainedConfig:
    """Return a copy of a config as the original class has it, without our entries."""
    data = config.to_dict()
    if data.pop(KEY, None) is not None:
        data.pop("auto_map", None)
    data["architectures"] = [original_class(model_class).__name__]
    return type(config).from_dict(data)


def auto_classes(config_class: type[PretrainedConfig], model_class: type[nn.Module]) -> list[str]:
    """Return the names of transformers' auto classes that give `model_class` for such a config."""
    from transformers.models.auto import modeling_auto

    names = []
    for name, auto in vars(modeling_auto).items():
        if not (isinstance(auto, type) and name.startswith("AutoModel")):
            continue
        mapping = getattr(auto, "_model_mapping", None)
        if mapping is None or config_class not in list(mapping.keys()):
            continue
        classes = mapping[config_class]
        if model_class in (classes if isinstance(classes, (list, tuple)) else [classes]):
            names.append(name)
    return names


def changed_buffers(slim: Any) -> list[str]:
    """Name the buffers of the slim module that the original class would compute otherwise."""
    stored = slim.module.state_dict().keys()
    dense = {new: old for old, new in slim.renamed.items()}
    changed = []
    for name, buffer in slim.module.named_buffers():
        if name not in stored and name in dense and dense[name] in slim.program.weights:
            before = slim.program.weights[dense[name]]
            if before.shape != buffer.shape or not torch.equal(before, buffer):
                changed.append(name)
    return changed
