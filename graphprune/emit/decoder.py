"""Writing a slim causal language model as an ONNX decoder with a key-value cache.

One graph reads prompts and continues them. Its inputs and outputs have the names that other tools
for ONNX decoders use::

    input_ids, position_ids           int64 [batch, new]
    attention_mask                    int64 [batch, past + new], 0 for padding
    past_key_values.{i}.key, .value   float [batch, heads, past, dim]   heads, dim: ints per layer
    logits                            float [batch, new, vocabulary]
    present.{i}.key, .value           float [batch, heads, past + new, dim]

``position_ids`` is there where the model takes positions. A prompt is read with a past of length 0.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from graphprune._version import __version__
from graphprune.analysis.program import BaseProgram
from graphprune.emit.decoder_check import check
from graphprune.emit.onnx import convert
from graphprune.errors import EmitError
from graphprune.files import replacing
from graphprune.ir.onnx.external import name_data
from graphprune.ir.onnx.files import EXTERNAL_ABOVE, check_graph
from graphprune.rewrite.config.builds import quiet
from graphprune.rewrite.module.compare import evaluating
from graphprune.runtime.generation import PAST, PRESENT

if TYPE_CHECKING:
    from graphprune.rewrite.slim import Slim

BATCH, NEW, OLD = "batch_size", "sequence_length", "past_sequence_length"
TOTAL = f"{OLD} + {NEW}"

Size = int | str


@dataclass(frozen=True)
class Layer:
    """What a layer keeps of each token.

    Attributes:
        key: heads and dimension of its keys.
        value: the same of its values.
    """

    key: tuple[int, int]
    value: tuple[int, int]


@quiet()
def precheck(program: BaseProgram) -> None:
    """Refuse models that have no decoder with keys and values only; needs no weights.

    Raises:
        EmitError: the model is none of transformers' causal language models, or its layers keep
            something else of the tokens that they have read.
    """
    _check_kind(program.module)


@quiet()
def save(slim: Slim, path: Path) -> None:
    """Write `slim` as an ONNX decoder; large weights go to a second file.

    `graphprune.ir.onnx.external` names that one. bfloat16 weights are written as float32, the same
    values: ONNX Runtime has no kernels for bfloat16 on the CPU.

    Raises:
        EmitError: the model has no such form, the exporter can't convert it, ONNX Runtime doesn't
            generate what the slim module generates, or writing failed. No file is written then.
    """
    _check_kind(slim.program.module)
    if not isinstance(slim.module, PreTrainedModel):
        raise EmitError(
            "the slim model has no module that could be traced with its cache",
            where=type(slim.program.module).__name__,
            why="no sizes of the class compute what the slim graph computes",
            hint="ask for other sizes or layers, or for format onnx: a graph without a cache",
        )
    module = slim.module
    if any(p.dtype == torch.bfloat16 for p in module.parameters()):
        module = nn.Module.float(copy.deepcopy(module))
    with evaluating(module), torch.no_grad():
        layers = _layers(module)
        decoder = _Flat(module)
        exported = _export(decoder, layers)
        names = [f"{i}.{kind}" for i in range(len(layers)) for kind in ("key", "value")]
        inputs = ["input_ids", "attention_mask"]
        inputs += ["position_ids"] if decoder.takes_positions else []
        written = convert(
            exported, ["logits", *(PRESENT + n for n in names)], inputs + [PAST + n for n in names]
        )
        tidy(written.model, layers, _tied(module))
        written.model.metadata_props["graphprune.version"] = __version__
        written.model.metadata_props["graphprune.plan"] = json.dumps(
            json.loads(slim.plan.to_json())
        )
        size = sum(tensor.nbytes for tensor in module.parameters())
        with replacing(path) as file:
            written.save(str(file), external_data=size > EXTERNAL_ABOVE)
            name_data(file)
            check_graph(file)
            check(module, file)


class _Flat(nn.Module):
    """A model whose cache is a list of tensors: key and value of each layer."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.cache = _cache_argument(model)
        self.takes_positions = "position_ids" in _arguments(model)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor | None,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        options: dict[str, Any] = {self.cache: cache}
        if self.takes_positions:
            options["position_ids"] = position_ids
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=True, **options
        )
        layers: Sequence[Any] = cache.layers
        return (output.logits, *(t for layer in layers for t in (layer.keys, layer.values)))


def _check_kind(module: nn.Module | None) -> PreTrainedModel:
    """The module as what it has to be."""
    if not isinstance(module, PreTrainedModel) or not module.can_generate():
        raise EmitError(
            "the model is not a causal language model of transformers",
            why="it can't generate"
            if isinstance(module, PreTrainedModel)
            else f"it is {'a graph' if module is None else f'a {type(module).__name__}'}",
            hint=_HINT,
        )
    name = type(module).__name__
    if module.config.is_encoder_decoder:
        raise EmitError("an encoder-decoder has no form as one decoder", where=name, hint=_HINT)
    if _cache_argument(module) not in _arguments(module):
        raise EmitError(
            "the decoder has no key-value cache",
            where=name,
            why=f"it takes {', '.join(_arguments(module))}",
            hint=_HINT,
        )
    kinds = {type(layer) for layer in DynamicCache(config=module.config).layers}
    other = sorted(kind.__name__ for kind in kinds - {DynamicLayer, DynamicSlidingWindowLayer})
    if other:
        raise EmitError(
            "the decoder keeps more of earlier tokens than keys and values",
            where=name,
            why=f"transformers caches it in {', '.join(other)}",
            hint=_HINT,
        )
    return module


_HINT = 'ask for format "onnx": a graph without a cache'


def _arguments(module: nn.Module) -> Iterable[str]:
    return inspect.signature(module.forward).parameters


def _cache_argument(module: nn.Module) -> str:
    """What the forward pass calls its cache, which depends on transformers' version."""
    return "cache" if "cache" in _arguments(module) else "past_key_values"


def _layers(module: PreTrainedModel) -> list[Layer]:
    """Run a few tokens and see what is kept of them."""
    cache = DynamicCache()
    ids = torch.zeros(_BATCH, _NEW, dtype=torch.long, device=module.device)
    module(input_ids=ids, use_cache=True, **{_cache_argument(module): cache})
    found = []
    layers: Sequence[Any] = cache.layers
    for i, layer in enumerate(layers):
        sizes = []
        for tensor in (layer.keys, layer.values):
            shape = None if tensor is None else tuple(tensor.shape)
            if shape is None or len(shape) != 4 or (shape[0], shape[2]) != (_BATCH, _NEW):
                raise EmitError(
                    "the decoder's cache has an unknown layout",
                    where=f"{type(module).__name__}, layer {i}",
                    why=f"it holds {shape} for {_BATCH} sequences of {_NEW} tokens",
                    hint=_HINT,
                )
            sizes.append((shape[1], shape[3]))
        found.append(Layer(*sizes))
    return found


# Sizes of the example, no two alike: torch takes equal ones for one.
_BATCH, _NEW, _OLD = 2, 3, 5


def _export(decoder: _Flat, layers: Sequence[Layer]) -> ExportedProgram:
    """Trace a step with a past; nothing of it depends on the past having a token."""
    model = decoder.model
    generator = torch.Generator().manual_seed(0)
    past = [
        torch.randn(_BATCH, heads, _OLD, dim, generator=generator).to(model.device, model.dtype)
        for layer in layers
        for heads, dim in (layer.key, layer.value)
    ]
    ids = torch.zeros(_BATCH, _NEW, dtype=torch.long, device=model.device)
    positions = (ids + torch.arange(_OLD, _OLD + _NEW)) if decoder.takes_positions else None
    batch, new, old = Dim(BATCH), Dim(NEW), Dim(OLD)
    tokens = {0: batch, 1: new}
    try:
        return torch.export.export(
            decoder,
            (ids, torch.ones(_BATCH, _OLD + _NEW, dtype=torch.long), positions, past),
            dynamic_shapes=(
                tokens,
                {0: batch, 1: Dim.AUTO},  # the sum of two has no name of its own
                tokens if decoder.takes_positions else None,
                [{0: batch, 2: old}] * len(past),
            ),
        )
    except Exception as error:  # whatever a model's code says to symbolic sizes
        raise EmitError(
            "torch.export can't capture the decoder with its cache",
            where=type(model).__name__,
            why=_first(error),
            hint=_HINT,
        ) from error


def _tied(module: nn.Module) -> dict[str, str]:
    """Name of each parameter to the first name of the same one."""
    first: dict[int, str] = {}
    named = module.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


def tidy(model: ir.Model, layers: Sequence[Layer], tied: Mapping[str, str]) -> None:
    """Give dimensions and weights their names, and drop what nothing reads."""
    graph = model.graph
    ids, mask, past = graph.inputs[0], graph.inputs[1], graph.inputs[-1]
    symbols = {
        str(shape[axis]): name
        for shape, axis, name in (
            (mask.shape, 1, TOTAL),
            (ids.shape, 0, BATCH),
            (ids.shape, 1, NEW),
            (past.shape, 2, OLD),
        )
        if shape is not None
    }
    for value in [*graph.inputs, *(v for node in graph.all_nodes() for v in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(size, symbols) for size in value.shape])
    for value in (*graph.inputs, *graph.outputs):
        shape = _interface(value.name or "", layers)
        if shape is not None:
            value.shape = ir.Shape(shape)
    for name in list(graph.initializers):
        own = name.removeprefix("model.")
        graph.initializers[name].name = tied.get(own, own)
    for value in [v for v in graph.inputs if v.name == "position_ids" and not v.uses()]:
        graph.inputs.remove(value)


def _renamed(size: int | ir.SymbolicDim, symbols: dict[str, str]) -> Size | None:
    if isinstance(size, int) or size.value is None:
        return size if isinstance(size, int) else None
    text = re.sub(r"\w+", lambda found: symbols.get(found[0], found[0]), str(size.value))
    return TOTAL if text == f"{NEW} + {OLD}" else text


def _interface(name: str, layers: Sequence[Layer]) -> list[Size] | None:
    """The shape that an input or output of this name is promised to have."""
    if name in ("input_ids", "position_ids"):
        return [BATCH, NEW]
    if name == "attention_mask":
        return [BATCH, TOTAL]
    for prefix, length in ((PAST, OLD), (PRESENT, TOTAL)):
        if name.startswith(prefix):
            number, kind = name.removeprefix(prefix).split(".")
            heads, dim = getattr(layers[int(number)], kind)
            return [BATCH, heads, length, dim]
    return None


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
