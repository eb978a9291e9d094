"""What is known about the values of an ONNX graph without running it.

Shapes and the small integers that shapes are computed from are propagated twice, for inputs of
two different sizes. What differs is dynamic. That folds the arithmetic on shapes inside a graph,
whatever operators it is made of, and needs no symbols.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd, prod

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.shape_inference import InferenceError, infer_node_outputs

from graphprune.errors import LoadError
from graphprune.ir.onnx.shapes.channels import channels_read
from graphprune.ir.onnx.shapes.extent import INPUT, check_shape, may_be_computed
from graphprune.ir.onnx.shapes.quantised import encodings
from graphprune.ops.context import Size, Sizes
from graphprune.ops.onnx import find_op
from graphprune.ops.onnx.shapes import ASIDE, LIKE_FIRST, TYPES

Shape = tuple[int, ...]
# Values up to this many elements are computed where their operands are known.
SMALL = 4096
SMALL_FLOAT = 64
BATCH = ((2, 3),)
SPATIAL = ((64, 96), (224, 256), (32, 64))
OTHER = ((7, 11), (16, 32), (64, 96))
RUNTIME = "com.microsoft"  # the domain of ONNX Runtime's own operators


@dataclass(frozen=True, slots=True)
class Known:
    """One value under two examples.

    Attributes:
        shapes: its shape under each of them.
        dtype: the type of its elements.
        values: its elements under each of them, where they are few and known.
        weighted: whether they are numbers that elements of a weight have a part in, which change
            where the weight is cut. Integers are places and sizes, and never are, but for those
            of quantised weights.
    """

    shapes: tuple[Shape, Shape]
    dtype: ir.DataType
    values: tuple[NDArray[np.generic], NDArray[np.generic]] | None = None
    weighted: bool = False

    @property
    def sizes(self) -> Sizes:
        """Its sizes in the first example, dynamic where the examples differ."""
        return tuple(
            Size(a) if a == b else Size(a, dynamic=True, factor=gcd(a, b))
            for a, b in zip(*self.shapes, strict=True)
        )

    @property
    def constant(self) -> NDArray[np.generic] | None:
        """Its elements, where they are known and the same under both examples."""
        if self.values is None or not np.array_equal(*self.values):
            return None
        return self.values[0]


def known_values(
    model: ir.Model, shapes: Mapping[str, Sequence[int]] | None = None
) -> dict[str, Known]:
    """Propagate shapes and small values through a graph.

    Args:
        model: the model, in topological order, without functions.
        shapes: input name to its shape in the first example; in the second one, dimensions that
            the model leaves open are larger by one.

    Returns:
        What is known, by value name. Values whose shape depends on data are missing.

    Raises:
        LoadError: no example fits the model.
    """
    problem: InferenceError | None = None
    for choice in _choices(model, shapes):
        try:
            return _propagate(model, choice)
        except InferenceError as error:
            problem = problem or error
    raise LoadError(
        "no example input fits the ONNX model",
        why=str(problem).strip()[:500],
        hint="give the shapes of its inputs",
    )


def shapes_at(model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> dict[str, Known]:
    """What is known about a graph's values for one set of input shapes, as both of the examples.

    Args:
        model: see `known_values`.
        shapes: input name to its shape; every input that is a tensor is named.

    Raises:
        LoadError: the model doesn't take them.
    """
    try:
        return _propagate(model, {n: (tuple(s), tuple(s)) for n, s in shapes.items()})
    except InferenceError as error:
        raise LoadError(
            "the ONNX model doesn't take inputs of these sizes",
            why=str(error).strip()[:500],
        ) from None


def _choices(
    model: ir.Model, given: Mapping[str, Sequence[int]] | None
) -> Iterator[dict[str, tuple[Shape, Shape]]]:
    """Pairs of shapes for all inputs, likely ones first."""
    count = 1 if given else max(len(SPATIAL), len(OTHER))
    for attempt in range(count):
        named: dict[str, tuple[int, int]] = {}
        result = {}
        for value in model.graph.inputs:
            rank = 0 if value.shape is None else len(value.shape)
            pairs = []
            for i, dim in enumerate(value.shape or ()):
                if isinstance(dim, int) and dim > 0:
                    pairs.append((dim, dim))
                    continue
                options = BATCH if i == 0 else SPATIAL if rank == 4 and i > 1 else OTHER
                pair = options[min(attempt, len(options) - 1)]
                wanted = (given or {}).get(value.name or "")
                channels = channels_read(value) if i == 1 else None
                if channels is not None:
                    pair = (channels, channels)
                elif wanted is not None:
                    pair = (wanted[i], wanted[i] + 1)
                symbol = dim.value if isinstance(dim, ir.SymbolicDim) else None
                if symbol and symbol.isdigit():  # what an exporter makes of a fixed size
                    pairs.append((int(symbol), int(symbol)))
                    continue
                pairs.append(named.setdefault(symbol, pair) if symbol else pair)
            result[value.name or ""] = (tuple(a for a, _ in pairs), tuple(b for _, b in pairs))
        yield result


def _propagate(model: ir.Model, inputs: Mapping[str, tuple[Shape, Shape]]) -> dict[str, Known]:
    known: dict[str, Known] = {}
    for value in model.graph.inputs:
        if isinstance(value.type, ir.TensorType):
            if value.type.dtype == ir.DataType.UNDEFINED:
                raise LoadError("an input of the ONNX model has no type", where=value.name)
            check_shape(value.name or "", inputs[value.name or ""][1], INPUT)
            known[value.name or ""] = Known(inputs[value.name or ""], value.type.dtype)
    quantised = encodings(model.graph)
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None:
            shape = tuple(tensor.shape.numpy())
            elements = tensor.numpy() if _is_small(tensor.dtype, shape) else None
            both = None if elements is None else (elements, elements)
            numbers = tensor.dtype.is_floating_point() or name in quantised
            weighted = numbers and prod(shape) > 1
            known[name] = Known((shape, shape), tensor.dtype, both, weighted)
    opsets = [onnx.helper.make_opsetid(d, v) for d, v in model.opset_imports.items()]
    for name, one in known.items():
        _check_shapes(name, one)
    for node in model.graph:
        for name, one in _outputs(node, known, opsets).items():
            _check_shapes(name, one)
            known[name] = one
    return known


def _check_shapes(name: str, known: Known) -> None:
    for shape in known.shapes:
        check_shape(name, shape)


def refreshed(
    model: ir.Model, known: Mapping[str, Known], changed: Collection[str]
) -> dict[str, Known]:
    """What is known after some initialisers have got other numbers of the same type and shape.

    Args:
        model: with the new numbers.
        known: what was known before.
        changed: names of the initialisers.
    """
    result = dict(known)
    for name in changed:
        tensor = model.graph.initializers[name].const_value
        if tensor is not None and known[name].values is not None:
            elements = tensor.numpy()
            result[name] = replace(known[name], values=(elements, elements))
    opsets = [onnx.helper.make_opsetid(d, v) for d, v in model.opset_imports.items()]
    stale = {name for name in changed if known[name].values is not None}
    for node in model.graph:
        results = [v.name or "" for v in node.outputs]
        read = {v.name for v in node.inputs if v is not None}
        if not stale.isdisjoint(read) and any(
            n in known and known[n].values is not None for n in results
        ):
            result.update(_outputs(node, result, opsets))
            stale.update(results)
    return result


def is_standard(node: ir.Node) -> bool:
    """Whether an operator is one of ONNX's own."""
    return node.domain in ("", "ai.onnx")


def qualified(node: ir.Node) -> str:
    """The operator's name, with the domain in front where it isn't ONNX's own."""
    return node.op_type if is_standard(node) else f"{node.domain}.{node.op_type}"


def registered_name(node: ir.Node) -> str:
    """The name that the operator's rules are registered by, "onnx.Reshape"."""
    return f"{'onnx' if is_standard(node) else node.domain}.{node.op_type}"


def _is_small(dtype: ir.DataType, shape: Sequence[int]) -> bool:
    if dtype == ir.DataType.STRING:  # nothing is computed from it
        return False
    return prod(shape) <= (SMALL_FLOAT if dtype.is_floating_point() else SMALL)


def _outputs(
    node: ir.Node, known: Mapping[str, Known], opsets: list[onnx.OperatorSetIdProto]
) -> dict[str, Known]:
    """What is known about the results of one operator."""
    operands = [known.get(v.name or "") if v is not None else None for v in node.inputs]
    given = [o for v, o in zip(node.inputs, operands, strict=True) if v is not None]
    shapes: list[list[tuple[Shape, ir.DataType] | None]]
    if is_standard(node):
        proto = ir.to_proto(node)
        shapes = [_standard(node, proto, operands, i, opsets) for i in (0, 1)]
    else:
        proto = None
        shapes = [_registered(node, operands, i) for i in (0, 1)]
    values: Sequence[list[NDArray[np.generic]] | None] | None = None
    measures = node.op_type in ("Shape", "Size")
    if measures and operands[0] is not None:
        values = [[_measured(node, operands[0].shapes[i])] for i in (0, 1)]
    elif (
        proto is not None
        and all(o is not None and o.values is not None for o in given)
        and all(may_be_computed(node.op_type, _shapes_of(s, node), SMALL) for s in shapes)
    ):
        values = [_computed(node, proto, operands, i, opsets) for i in (0, 1)]
    weighted = not measures and any(o is not None and o.weighted for o in given)
    integers = any(o and o.weighted and not o.dtype.is_floating_point() for o in given)
    integers |= node.op_type.endswith("QuantizeLinear")
    result = {}
    for i, output in enumerate(node.outputs):
        pair = [s[i] if i < len(s) else None for s in shapes]
        if not output.name or pair[0] is None or pair[1] is None:
            continue
        both = None
        if values is not None and values[0] and values[1]:
            both = (values[0][i], values[1][i])
        dtype = pair[0][1]
        numbers = weighted and (integers or dtype.is_floating_point())
        result[output.name] = Known((pair[0][0], pair[1][0]), dtype, both, numbers)
    return result


def _shapes_of(found: list[tuple[Shape, ir.DataType] | None], node: ir.Node) -> list[Shape | None]:
    """The shapes of all results of an operator."""
    pairs = [*found, *[None] * len(node.outputs)][: len(node.outputs)]
    return [None if pair is None else pair[0] for pair in pairs]


def _registered(
    node: ir.Node, operands: Sequence[Known | None], example: int
) -> list[tuple[Shape, ir.DataType] | None]:
    """Shapes and types of the results of an operator that isn't ONNX's own."""
    rule = find_op(registered_name(node)).shapes
    own = node.domain == RUNTIME
    aside = ASIDE.get(node.op_type, ()) if own else ()
    unknown = [i for i, v in enumerate(node.inputs) if v is not None and operands[i] is None]
    if rule is None or any(i not in aside for i in unknown):
        return []
    attributes = {n: a.value for n, a in node.attributes.items()}
    try:
        found = rule([o.shapes[example] if o else () for o in operands], attributes)
    except (LookupError, ValueError, TypeError, ZeroDivisionError):  # a use that it doesn't know
        return []
    result: list[tuple[Shape, ir.DataType] | None] = []
    types = TYPES.get(node.op_type) if own else None
    for shape, source in zip(found, types or (0,) * len(found), strict=True):
        typed = operands[source]
        result.append(None if shape is None or typed is None else (shape, typed.dtype))
    return result


def _measured(node: ir.Node, shape: Shape) -> NDArray[np.generic]:
    """The result of Shape or Size."""
    if node.op_type == "Size":
        return np.asarray(prod(shape), dtype=np.int64)
    start = node.attributes.get_int("start", 0)
    end = node.attributes.get_int("end", len(shape))
    return np.asarray(shape[start:end], dtype=np.int64)


def _standard(
    node: ir.Node,
    proto: onnx.NodeProto,
    operands: Sequence[Known | None],
    example: int,
    opsets: list[onnx.OperatorSetIdProto],
) -> list[tuple[Shape, ir.DataType] | None]:
    """Shapes and types of the results, by ONNX's own inference."""
    version = next(o.version for o in opsets if o.domain in ("", "ai.onnx"))
    schema = onnx.defs.get_schema(node.op_type, version, "")
    types: dict[str, onnx.TypeProto] = {}
    data: dict[str, onnx.TensorProto] = {}
    for value, operand in zip(node.inputs, operands, strict=True):
        if value is None or operand is None:
            continue
        name = value.name or ""
        types[name] = onnx.helper.make_tensor_type_proto(
            int(operand.dtype), operand.shapes[example]
        )
        if operand.values is not None:
            data[name] = onnx.numpy_helper.from_array(np.asarray(operand.values[example]), name)
    try:
        found = infer_node_outputs(schema, proto, types, data, opset_imports=opsets)
    except KeyError:  # an operand of unknown type
        return []
    except (onnx.checker.ValidationError, ValueError, RuntimeError, TypeError) as error:
        raise LoadError(
            f"{node.op_type} doesn't take its operands",
            where=f"the operator that makes {node.outputs[0].name}",
            why=str(error).strip()[:300],
        ) from None
    result: list[tuple[Shape, ir.DataType] | None] = []
    for output in node.outputs:
        tensor = found[output.name].tensor_type if output.name in found else None
        if tensor is None or not tensor.HasField("shape") or not tensor.elem_type:
            result.append(None)
        elif all(d.HasField("dim_value") for d in tensor.shape.dim):
            shape = tuple(d.dim_value for d in tensor.shape.dim)
            result.append((shape, ir.DataType(tensor.elem_type)))
        else:
            result.append(None)
    first = operands[0] if operands else None
    _check_fit(node, [None if o is None else o.shapes[example] for o in operands], result[0])
    # Until opset 16 these are functions, of which ONNX infers the type only.
    if node.op_type in ("GreaterOrEqual", "LessOrEqual") and result[0] is None and len(types) == 2:
        both = np.broadcast_shapes(*(o.shapes[example] for o in operands if o is not None))
        result[0] = (both, ir.DataType.BOOL)
    if node.op_type in LIKE_FIRST and first is not None and result[0] is None:
        result[0] = (first.shapes[example], first.dtype)
    return result


def _check_fit(
    node: ir.Node, operands: Sequence[Shape | None], result: tuple[Shape, ir.DataType] | None
) -> None:
    """What ONNX's inference lets pass.

    Other numbers of elements, images that vanish, and kernels that are not as large as they say.
    """
    kernel = operands[1] if node.op_type in ("Conv", "ConvTranspose") else None
    said = node.attributes.get("kernel_shape")
    if kernel is not None and said is not None and tuple(said.as_ints()) != kernel[2:]:
        raise InferenceError(f"{node.op_type} {node.name}: a kernel {kernel} is said to be {said}")
    given = operands[0] if operands else None
    if given is None:
        return
    channels = kernel[1] * node.attributes.get_int("group", 1) if kernel else None
    if node.op_type == "Conv" and channels is not None and given[1:2] != (channels,):
        raise InferenceError(f"Conv {node.name}: {given} has other channels than {kernel}")
    if result is None:
        return
    wrong = node.op_type == "Reshape" and prod(given) != prod(result[0])
    vanished = node.op_type.endswith(("Conv", "Pool")) and min(result[0]) <= 0 < min(given)
    if wrong or vanished:
        raise InferenceError(f"{node.op_type} {node.name}: {given} becomes {result[0]}")


def _computed(
    node: ir.Node,
    proto: onnx.NodeProto,
    operands: Sequence[Known | None],
    example: int,
    opsets: list[onnx.OperatorSetIdProto],
) -> list[NDArray[np.generic]] | None:
    """The results, by ONNX's reference implementation, where they are few."""
    nested = any(a.type == ir.AttributeType.GRAPH for a in node.attributes.values())
    if nested or node.op_type.startswith(("Random", "Multinomial", "Bernoulli", "Dropout")):
        return None
    version = next(o.version for o in opsets if o.domain in ("", "ai.onnx"))
    if version < 13 and node.op_type.endswith(("Softmax", "Hardmax")):
        return None  # the reference only has the newer ones, of another meaning
    feeds = {
        v.name or "": o.values[example]
        for v, o in zip(node.inputs, operands, strict=True)
        if v is not None and o is not None and o.values is not None
    }
    # A node alone would be run by the newest version of its operator.
    values = [onnx.ValueInfoProto(name=n) for n in (*feeds, *(v.name for v in node.outputs))]
    graph = onnx.helper.make_graph([proto], "", values[: len(feeds)], values[len(feeds) :])
    model = onnx.helper.make_model(graph, opset_imports=opsets)
    try:
        results = [np.asarray(r) for r in ReferenceEvaluator(model).run(None, feeds)]
    except Exception:  # whatever an operator raises: not known, then
        return None
    small = all(r.size <= (SMALL if r.dtype.kind in "iub" else SMALL_FLOAT) for r in results)
    return results if small else None
