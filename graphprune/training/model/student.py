"""Copies of models whose weights can be trained: of a program's module, or of its graph."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from graphprune.analysis.program import BaseProgram
from graphprune.checkpoints.memory import page_out
from graphprune.errors import TrainingError
from graphprune.exclusive import one_at_a_time
from graphprune.ir.torch.program import Program, is_traced

_PACKED = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Head:
    """The linear layer that makes logits, where the model does nothing with them but return them.

    Attributes:
        weight: canonical name of its weight.
        bias: canonical name of its bias, or None.
        path: of the module that is the layer.
    """

    weight: str
    bias: str | None
    path: str


@dataclass(frozen=True)
class Student:
    """A model to train, with float32 weights of its own.

    Attributes:
        module: what is called; in evaluation mode, so that it computes what the program does.
        names: canonical parameter name to all of its names in the module.
        dtypes: canonical parameter name to the dtype that it is stored in.
        blocks: paths of the layers, in order.
        head: what makes its logits, if that can be told apart.
        graph: whether the module is an exported graph.
        taps: path of each layer of a graph to the module that its value goes through.
    """

    module: nn.Module
    names: Mapping[str, tuple[str, ...]]
    dtypes: Mapping[str, torch.dtype]
    blocks: tuple[str, ...] = ()
    head: Head | None = None
    graph: bool = False
    taps: Mapping[str, str] = field(default_factory=dict)

    def weight(self, name: str) -> Tensor:
        """The effective weight of a canonical parameter."""
        path, _, leaf = self.names[name][0].rpartition(".")
        found: Tensor = getattr(self.module.get_submodule(path), leaf)
        return found


def check_trainable(program: BaseProgram) -> Program:
    """A program whose weights gradients can change.

    Raises:
        TrainingError: it is no PyTorch model, has no weights, or they are packed numbers.
    """
    if not is_traced(program):
        raise TrainingError(
            "an ONNX graph can't be trained",
            why="it has no gradients",
            hint="train the PyTorch model, and export what comes out",
        )
    for name in sorted(program.trainable):
        weight = program.weights.get(name)
        if weight is None or weight.is_meta:
            raise TrainingError(
                "training needs weights",
                where=name,
                why="the program was traced without them",
                hint="load the checkpoint with its weights",
            )
    for name in program.weights:
        weight = program.weights[name]
        if weight.dtype in _PACKED and weight.dim() > 1:
            raise TrainingError(
                "a quantised model can't be trained",
                where=name,
                why=f"its weights are {weight.dtype}",
                hint="train the model before it is quantised",
            )
    return program


@one_at_a_time
def student_of(program: Program, *, shared: bool = False) -> Student:
    """A copy of a program's model to train: of its module, or of the graph where there is none.

    Args:
        program: the program.
        shared: no copy where the module itself will do, as it does for a teacher.

    Raises:
        TrainingError: the graph computes in half precision.
    """
    names: dict[str, tuple[str, ...]] = {}
    for name in sorted(program.trainable):
        names[name] = (name, *(a for a, c in program.aliases.items() if c == name))
    dtypes = {name: program.weights[name].dtype for name in names}
    blocks = tuple(f"{p}.{i}" for p, (n, _) in program.stacks().items() for i in range(n))
    head = _head(program)
    if program.module is not None:
        module = program.module
        if not shared or any(p.is_meta for p in module.parameters()):
            module = _copied(module, program.weights, program.aliases)
        head = head if head is not None and _is_linear(module, head) else None
        return Student(module, names, dtypes, blocks, head)
    halves = [n for n, d in dtypes.items() if d in (torch.float16, torch.bfloat16)]
    if halves:
        raise TrainingError(
            "a graph in half precision can't be trained",
            where=halves[0],
            why="weights train in float32, and the graph names the dtypes of its trace",
            hint="export the model in float32, or load it from its checkpoint",
        )
    graph: Any = program.exported.module()
    module = _copied(graph, program.weights, program.aliases)
    head, taps = _divided(module, program, head)
    return Student(module, names, dtypes, tuple(taps), head, graph=True, taps=taps)


@one_at_a_time
def student_of_module(module: nn.Module) -> Student:
    """A copy of a module to train, in evaluation mode.

    Raises:
        TrainingError: it has no weights.
    """
    first: dict[int, str] = {}
    names: dict[str, tuple[str, ...]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        names[known] = (*names.get(known, ()), name)
    parameters = dict(module.named_parameters())
    if any(p.is_meta for p in parameters.values()) or not parameters:
        raise TrainingError("training needs weights", where=type(module).__name__)
    dtypes = {
        name: parameters[name].dtype for name in names if parameters[name].dtype.is_floating_point
    }
    names = {name: names[name] for name in dtypes}
    return Student(_copied(module, {}, {}), names, dtypes)


def recompute_blocks(student: Student) -> None:
    """Have layers compute their activations again in the backward pass.

    Raises:
        TrainingError: the model has no modules that are layers.
    """
    if student.graph or not student.blocks:
        raise TrainingError(
            "activation checkpointing needs layers that are modules",
            why="the model is a graph" if student.graph else "no stack of layers is known of it",
            hint="leave checkpointing out, and take a smaller micro_batch",
        )
    for path in student.blocks:
        block = student.module.get_submodule(path)
        block.forward = functools.partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )


def _copied(
    module: nn.Module, weights: Mapping[str, Tensor], aliases: Mapping[str, str]
) -> nn.Module:
    """A copy with tensors of its own, floating ones in float32 or wider."""
    memo: dict[int, Any] = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        stored = weights.get(aliases.get(name, name), tensor)
        value = stored.detach().clone(memory_format=torch.contiguous_format)
        page_out(stored)  # what trains is the copy
        if value.dtype in (torch.float16, torch.bfloat16):
            value = value.float()
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(value, requires_grad=False) if is_parameter else value
    if isinstance(module, fx.GraphModule):
        return _with(module, memo)
    copied = copy.deepcopy(module, memo).eval()
    config: Any = getattr(copied, "config", None)
    parts: Any = (config, getattr(config, "get_text_config", lambda: None)())
    for part in parts:
        if getattr(part, "use_cache", False) is True:
            part.use_cache = False  # keys and values of earlier calls, which training has none of
    return copied


def _with(module: fx.GraphModule, memo: Mapping[int, Any]) -> nn.Module:
    """A graph module, made for this, with other tensors."""
    for owner in module.modules():
        for kind in (owner._parameters, owner._buffers):
            for leaf, tensor in kind.items():
                if tensor is not None:
                    kind[leaf] = memo[id(tensor)]
    return module


class _Linear(nn.Module):
    """The last layer of a graph, as a module that can be left out."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.linear(x, weight, bias)


def _divided(
    module: nn.Module, program: Program, head: Head | None
) -> tuple[Head | None, dict[str, str]]:
    """Give a graph modules where training looks into it, and drop its checks of dtypes.

    Products in bfloat16 would fail those.

    Returns:
        The head, and the name of each layer to the path of the module that its value goes through.
    """
    assert isinstance(module, fx.GraphModule)
    graph = module.graph
    check = torch.ops.aten._assert_tensor_metadata.default
    for node in list(graph.nodes):
        if node.target is check:
            graph.erase_node(node)
    known = {node.name: node for node in graph.nodes}
    taps: dict[str, str] = {}
    for path, (_, blocks) in program.stacks().items():
        for block in blocks:
            if block.exit not in known:
                continue
            place = f"_layer_{len(taps)}"
            module.add_submodule(place, nn.Identity())
            with graph.inserting_after(known[block.exit]):
                tap = graph.call_module(place, (known[block.exit],))
            known[block.exit].replace_all_uses_with(tap, lambda user, tap=tap: user is not tap)
            taps[f"{path}.{block.index}"] = place
    outputs = graph.output_node().all_input_nodes
    node = outputs[0] if outputs else None
    if head is not None and node is not None and node.target is torch.ops.aten.linear.default:
        module.add_submodule("_head", _Linear())
        with graph.inserting_after(node):
            last = graph.call_module("_head", node.args)
        node.replace_all_uses_with(last, lambda user: user is not last)
        graph.erase_node(node)
        head = replace(head, path="_head")
    else:
        head = None
    module.recompile()
    return head, taps


def _head(program: Program) -> Head | None:
    """The linear operator that makes the first output, if nothing else reads its value."""
    node = program.exported.graph.output_node().args[0][0]
    if not isinstance(node, fx.Node) or node.target is not torch.ops.aten.linear.default:
        return None
    if len(node.users) != 1:
        return None
    targets = {s.arg.name: s.target for s in program.exported.graph_signature.input_specs}
    found = [targets.get(a.name) if isinstance(a, fx.Node) else None for a in node.args[1:]]
    if found[0] is None or (len(node.args) > 2 and found[1] is None):
        return None
    weight, bias = found[0], (found[1] if len(found) > 1 else None)
    path = str(weight).rpartition(".")[0]
    canonical = [program.aliases.get(n, n) if n else None for n in (weight, bias)]
    assert canonical[0] is not None
    return Head(canonical[0], canonical[1], path)


def _is_linear(module: nn.Module, head: Head) -> bool:
    """Whether a module has the head where the graph says."""
    try:
        found = module.get_submodule(head.path)
    except AttributeError:
        return False
    return type(found) is nn.Linear
