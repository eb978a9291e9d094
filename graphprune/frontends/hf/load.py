"""Front end for Hugging Face checkpoints: directories and hub ids."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import torch

from graphprune.analysis.program import Source
from graphprune.checkpoints.given import configuration
from graphprune.checkpoints.own_code import (
    check_local,
    is_own,
    named_code,
    untrusted,
    without_code,
    without_kernels,
)
from graphprune.checkpoints.shards import PACKED, has_weights
from graphprune.checkpoints.weights import map_checkpoint
from graphprune.errors import GraphPruneError, LoadError, TraceError
from graphprune.exclusive import one_at_a_time
from graphprune.frontends.hf.blame import builds, told, wrong_config, wrong_run
from graphprune.frontends.hf.bounded import (
    FEW_PARTS,
    MOST_PARTS,
    PARTS_OF_A_TENSOR,
    TooLargeError,
    outline,
)
from graphprune.frontends.hf.examples import example_inputs
from graphprune.frontends.hf.fit import (
    check_count,
    check_kinds,
    check_missing,
    check_shapes,
    check_ties,
    check_unused,
    is_mixed,
)
from graphprune.frontends.hf.weightless import parameters_on_meta
from graphprune.frontends.tracing.trace import trace
from graphprune.ir.torch.program import Program


@one_at_a_time
def load_checkpoint(
    path: Path, *, trust: bool = False, allow_unused_weights: bool = False
) -> Program:
    """Trace the model of a checkpoint directory.

    The configuration decides the class. Weights stay in their memory-mapped files until they are
    used; a directory without weights can be inspected and planned for, but not applied.

    Args:
        path: the directory.
        trust: whether code in the directory may be run.
        allow_unused_weights: leave out what the files have and the model doesn't.

    Raises:
        LoadError: the directory is no checkpoint that transformers can open, its files have weights
            that the model doesn't use, or it needs code of its own that isn't trusted.
        TraceError: torch.export can't capture the model.
    """
    config, model_class = checkpoint_class(path, trust=trust)
    unused: tuple[str, ...] = ()
    if has_weights(path):
        model, unused = build(path, config, model_class, allow_unused_weights=allow_unused_weights)
        device = "cpu"
    else:
        with torch.device("meta"):
            model = construct(model_class, config, path)
        device = "meta"
    model.eval()
    source = Source(path=path, config=config, model_class=model_class, trust=trust, unused=unused)
    try:
        return trace_model(model, source, device)
    except Exception as error:
        if isinstance(error, GraphPruneError) and not isinstance(error, TraceError):
            raise
        wrong = wrong_run(error, config, model_class, path)
        if wrong is None:
            raise
        raise wrong from error


def checkpoint_class(path: Path, *, trust: bool = False) -> tuple[Any, Any]:
    """The configuration of a checkpoint directory and the class of its model.

    Args:
        path: the directory.
        trust: whether code in the directory may be run.

    Raises:
        LoadError: the directory is no checkpoint that transformers can open, or needs code of its
            own that isn't trusted.
    """
    code = named_code(path / "config.json")
    config = without_kernels(_config(path, code, trust))
    own = _own_class(config, path, code) if trust else None
    if own is not None:
        return config, own
    found = _model_class(config, path, code)
    return config if is_own(type(config)) else without_code(config), found


def _config(path: Path, code: Mapping[str, str], trust: bool) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    data = configuration(path)
    if trust:
        check_local(path, {k: v for k, v in code.items() if k == "AutoConfig"})
    try:
        with redirect_stdout(sys.stderr):  # what the code prints is no result of ours
            return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust)
    except Exception as error:  # classes check their fields, and raise what they like
        if not trust and "AutoConfig" in code and isinstance(error, ValueError):
            raise untrusted(path / "config.json", "the configuration", code) from error
        known = (
            CONFIG_MAPPING[data["model_type"]] if data.get("model_type") in CONFIG_MAPPING else None
        )
        raise wrong_config("transformers can't read the configuration", error, data,
                           known and known.from_dict, path) from error  # fmt: skip


def _own_class(config: Any, path: Path, code: Mapping[str, str]) -> Any | None:
    """The class in a checkpoint's own code; None if it is one of transformers or of ours.

    Raises:
        LoadError: the code isn't in the directory, or can't be imported.
    """
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    from graphprune.checkpoints.self_contained import KEY

    models = {k: v for k, v in code.items() if k.startswith("AutoModel")}
    if not models or getattr(config, KEY, None) is not None:
        return None
    names = list(config.architectures or [])
    named = [v for v in models.values() if v.rpartition(".")[2] in names]
    if not named and any(hasattr(transformers, str(name)) for name in names):
        return None
    check_local(path, models)
    try:
        with redirect_stdout(sys.stderr):
            return get_class_from_dynamic_module(
                named[0] if named else next(iter(models.values())), path, local_files_only=True
            )
    except Exception as error:  # whatever somebody's code raises
        raise LoadError(
            "the checkpoint's own code can't be imported",
            where=str(path),
            why=f"{type(error).__name__}: {told(error)}",
            hint="it may need packages that aren't installed, or another transformers",
        ) from error


def _model_class(config: Any, path: Path, code: Mapping[str, str]) -> Any:
    import transformers

    from graphprune.checkpoints.self_contained import class_of

    pruned = class_of(config)
    if pruned is not None:  # one of our own checkpoints, whose class is in no library
        return pruned
    names = list(config.architectures or [])
    for name in names:
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    if any(kind.startswith("AutoModel") for kind in code):
        raise untrusted(path / "config.json", "the model", code)
    if names:
        raise LoadError(
            f"transformers has no class {names[0]}",
            where=str(path / "config.json"),
            hint="models with their own code can be traced as modules: graphprune.trace",
        )
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    try:
        return MODEL_MAPPING[type(config)]
    except KeyError as error:
        raise LoadError(
            "the configuration names no architecture", where=str(path / "config.json")
        ) from error


@one_at_a_time
def construct(model_class: Any, config: Any, path: Path) -> torch.nn.Module:
    """The model with the weights that its class begins with, under the default device.

    Raises:
        LoadError: the class can't be built from the configuration.
    """
    _outline(model_class, config, path, MOST_PARTS)
    try:
        model = _constructed(model_class, config)
    except Exception as error:  # what a class says to fields that it can't follow
        raise wrong_config(_UNBUILT, error, config, builds(model_class), path) from error
    plain_experts(model)
    return model


_UNBUILT = "the model can't be built from its configuration"


def _outline(model_class: Any, config: Any, path: Path, parts: int) -> torch.nn.Module | None:
    """A model without memory, to look at before it is built."""
    try:
        return outline(lambda: _constructed(model_class, config), parts)
    except TooLargeError as error:
        raise wrong_config(_UNBUILT, error, config, builds(model_class), path) from error


def _constructed(model_class: Any, config: Any) -> torch.nn.Module:
    """The model, with fused attention if its class has it."""
    config = copy.deepcopy(config)
    try:
        model: torch.nn.Module = model_class._from_config(config, attn_implementation="sdpa")
    except (ValueError, ImportError):
        model = model_class._from_config(config, attn_implementation="eager")
    return model


def plain_experts(model: Any) -> None:
    """Experts as batched products: the default is an operator that nothing else understands."""
    if hasattr(model, "set_experts_implementation"):
        # Models without experts raise.
        with suppress(ValueError, AttributeError, TypeError, KeyError):
            model.set_experts_implementation("batched_mm")


@one_at_a_time
def build(
    path: Path, config: Any, model_class: Any, *, allow_unused_weights: bool = False
) -> tuple[torch.nn.Module, tuple[str, ...]]:
    """The model with memory-mapped weights, or read by transformers where names or dtypes differ.

    Returns:
        It, and the names in the files that it has no place for.

    Raises:
        LoadError: the weights are missing, damaged, another model's, or of types that the model
            can't compute with; or some are not used, which isn't allowed.
    """
    state = map_checkpoint(path)
    known = _outline(model_class, config, path, FEW_PARTS + PARTS_OF_A_TENSOR * len(state))
    model = known or _without_memory(model_class, config, path)
    expected = {n: p for n, p in model.state_dict(keep_vars=True).items()}
    tied = tied_names(model)
    missing = {n for n in expected if n not in state and tied.get(n, n) not in state}
    check_kinds(state, expected, config)
    if missing or any(n not in expected for n in state) or is_mixed(state, config):
        if (path / PACKED).is_file():
            raise LoadError(
                "the packed weights don't fit the configuration",
                where=min(missing | (state.keys() - expected.keys())),
                why="only one of them has a weight of this name",
                hint="use the config.json that was packed with these weights",
            )
        check_count(state, expected)
        model, unused = _from_pretrained(path, config, model_class)
        check_unused(unused, path, model_class, allowed=allow_unused_weights)
        return model, unused
    check_shapes(state, expected)
    check_ties(state, tied)
    model = _without_memory(model_class, config, path) if model is known else model
    for name, tensor in state.items():
        for alias in [name, *(a for a, c in tied.items() if c == name or a == name)]:
            _assign(model, alias, tensor)
    for alias, name in tied.items():  # one Parameter object again
        _assign_object(model, alias, model.get_parameter(name))
    return model, ()


def _without_memory(model_class: Any, config: Any, path: Path) -> torch.nn.Module:
    with parameters_on_meta():
        return construct(model_class, config, path)


def tied_names(model: torch.nn.Module) -> dict[str, str]:
    """Further names of parameters to their first ones."""
    first: dict[int, str] = {}
    tied = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(p), name)
        if known != name:
            tied[name] = known
    return tied


def _assign(model: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def _assign_object(model: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path)._parameters[leaf] = parameter


def _from_pretrained(
    path: Path, config: Any, model_class: Any
) -> tuple[torch.nn.Module, tuple[str, ...]]:
    """The model as transformers reads it, and the names that it has left out."""
    try:
        model, info = model_class.from_pretrained(
            path,
            config=copy.deepcopy(config),
            dtype="auto",
            local_files_only=True,
            output_loading_info=True,
            use_safetensors=True,
        )
    except Exception as error:  # of quantisers too, which may not be installed
        raise LoadError(
            "transformers can't load the checkpoint", where=str(path), why=told(error)
        ) from error
    check_missing(info.get("missing_keys", ()))
    plain_experts(model)
    return model, tuple(sorted(info.get("unexpected_keys", ())))


@one_at_a_time
def trace_model(model: Any, source: Source | None = None, device: str = "cpu") -> Program:
    """Trace a transformers model in memory with example inputs of its own kind.

    Args:
        model: in evaluation mode.
        source: where it came from; None for the model itself.
        device: where its weights are.

    Raises:
        LoadError: no example input is known for it.
        TraceError: torch.export can't capture it.
    """
    plain_experts(model)
    source = source or Source(None, model.config, type(model))
    example = example_inputs(model, device)
    with traceable(model):
        return trace(model, (), example.inputs, example.dynamic_shapes, source=source)


@contextmanager
def traceable(model: Any) -> Iterator[None]:
    """While tracing: no key-value cache, whose objects are no tensors, and the main outputs only.

    Hidden states that a model with a head returns beside its logits are no part of what it is for;
    their width would be fixed if they counted.
    """
    found = [model.config.get_text_config()]
    found += [c for m in model.modules() if (c := getattr(m, "config", None)) is not None]
    configs = [c for c in {id(c): c for c in found}.values() if hasattr(c, "use_cache")]
    before = [c.use_cache for c in configs]
    forward = model.forward

    @functools.wraps(forward)
    def main_outputs(*args: Any, **kwargs: Any) -> Any:
        return _main(forward(*args, **kwargs))

    for c in configs:
        c.use_cache = False
    model.forward = main_outputs
    try:
        yield
    finally:
        del model.forward
        for c, value in zip(configs, before, strict=True):
            c.use_cache = value


_RESULTS = ("logits", "embeds", "pred_")
_BESIDE = ("hidden_state", "model_output", "attentions", "past_key_values")


def _main(output: Any) -> Any:
    """`output` without what a model with a head returns beside its result."""
    if not isinstance(output, Mapping) or not _named(output, _RESULTS):
        return output
    beside = _named(output, _BESIDE)
    return type(output)(**{k: v for k, v in output.items() if k not in beside})


def _named(output: Mapping[str, Any], words: tuple[str, ...]) -> set[str]:
    return {k for k in output if any(word in k for word in words)}
