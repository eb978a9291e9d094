"""Quantised numbers in ONNX graphs: which initialisers hold them, and how they are read.

A quantised tensor holds integers that stand for ``(integer - zero point) * scale``. Nothing in the
tensor says so; the operators that read it do, each with its own order of inputs. From those tables
follows how a stored weight is decoded, and what number stands for zero in any quantised value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

AxisOf: TypeAlias = "Callable[[ir.Node], int]"


class Read(NamedTuple):
    """A quantised operand: the inputs with its integers, their scale and their zero point.

    Attributes:
        value: input number.
        scale: input number; None where the scale is applied further on.
        zero: input number; None for a zero point of 0.
        axis: the dimension that several scales are along.
    """

    value: int
    scale: int | None
    zero: int | None
    axis: AxisOf = lambda node: 0


def _last(node: ir.Node) -> int:
    return -1


def _rows(node: ir.Node) -> int:
    return -2


def _attribute(node: ir.Node) -> int:
    return node.attributes.get_int("axis", 1)


def _columns(node: ir.Node) -> int:
    return 0 if node.attributes.get_int("transB", 0) else 1


_BINARY = (Read(0, 1, 2), Read(3, 4, 5))
_UNARY = (Read(0, 1, 2),)

READS: dict[str, tuple[Read, ...]] = {
    "DequantizeLinear": (Read(0, 1, 2, _attribute),),
    "QLinearConv": _BINARY,
    "QLinearMatMul": (Read(0, 1, 2, _rows), Read(3, 4, 5, _last)),
    "ConvInteger": (Read(0, None, 2), Read(1, None, 3)),
    "MatMulInteger": (Read(0, None, 2, _rows), Read(1, None, 3, _last)),
    "QLinearAdd": _BINARY,
    "QLinearMul": _BINARY,
    "QGemm": (Read(0, 1, 2), Read(3, 4, 5, _columns)),
    "DynamicQuantizeMatMul": (Read(1, 2, 3, _last),),
    "MatMulIntegerToFloat": (Read(0, 2, 4, _rows), Read(1, 3, 5, _last)),
    "QLinearSigmoid": _UNARY,
    "QLinearLeakyRelu": _UNARY,
    "QLinearGlobalAveragePool": _UNARY,
    "QLinearSoftmax": _UNARY,
}

# A bias of 32 bits, in steps of the product of the operands' scales: it, and the two scales.
BIASES = {"QLinearConv": (8, 1, 4), "QGemm": (6, 1, 4)}

# The inputs with the scale and the zero point of a quantised result.
WRITES: dict[str, tuple[int, int]] = {
    "QuantizeLinear": (1, 2),
    "QLinearConv": (6, 7),
    "QLinearMatMul": (6, 7),
    "QLinearAdd": (6, 7),
    "QLinearMul": (6, 7),
    "QGemm": (7, 8),
    "QLinearSigmoid": (3, 4),
    "QLinearLeakyRelu": (3, 4),
    "QLinearGlobalAveragePool": (3, 4),
    "QLinearSoftmax": (3, 4),
    "QLinearConcat": (0, 1),
}

# Their results hold integers of their first input, in whatever places.
_CARRIERS = frozenset(
    (
        "Identity Reshape Flatten Squeeze Unsqueeze Transpose Expand Tile Slice Split Gather "
        "GatherElements GatherND MaxPool"
    ).split()
)

_DOMAINS = ("", "ai.onnx", "com.microsoft")


@dataclass(frozen=True, slots=True)
class Encoding:
    """How an initialiser is read: ``(integer - zero point) * scale``.

    Attributes:
        scales: names of the initialisers whose product is the scale; none for a scale of 1.
        zero: name of the initialiser with the zero point; None for 0.
        axis: the dimension that several scales or zero points are along, from the end: -1.
        block: length of the pieces of `axis` that have a scale each; 0 for single places.
        bits: for bytes that several numbers share (MatMulNBits), the bits of one of them; else 0.
    """

    scales: tuple[str, ...]
    zero: str | None
    axis: int = -1
    block: int = 0
    bits: int = 0

    def zero_array(self, graph: ir.Graph, size: int) -> NDArray[np.int64]:
        """What stands for zero, along `axis` of that size; not where numbers share a byte.

        Returns:
            An array that broadcasts to the shape of the initialiser.
        """
        if self.zero is None:
            return np.zeros((), np.int64)
        return self._spread(_array(graph, self.zero).astype(np.int64), size)

    def decode(self, name: str, graph: ir.Graph) -> NDArray[np.float32]:
        """The numbers that an initialiser stands for.

        Returns:
            float32, in the shape of the initialiser; where several numbers share a byte
            (``[out, blocks, bytes]``) ``[out, blocks, numbers of a block]``.
        """
        stored = _array(graph, name)
        if self.bits:
            return self._unpacked(stored, graph)
        values: NDArray[np.float32] = stored.astype(np.float32)
        size = stored.shape[self.axis] if stored.ndim else 1
        if self.zero is not None:
            values -= self.zero_array(graph, size).astype(np.float32)
        for scale in self.scales:
            values *= self._spread(_array(graph, scale).astype(np.float32), size)
        return values

    def _spread(self, given: NDArray[Any], size: int) -> NDArray[Any]:
        if self.block:
            pieces = given.repeat(self.block, axis=self.axis)
            return np.take(pieces, range(size), axis=self.axis)
        if given.size == 1:
            return given.reshape(())
        return given.reshape([-1, *(1 for _ in range(-1 - self.axis))])

    def _unpacked(self, stored: NDArray[Any], graph: ir.Graph) -> NDArray[np.float32]:
        rows, blocks, _ = stored.shape
        values = unpacked(stored, self.bits).astype(np.float32)
        zero = np.full((rows, blocks), 1 << (self.bits - 1))
        if self.zero is not None:
            given = _array(graph, self.zero).reshape(rows, -1)
            packed = given.dtype == np.uint8
            zero = unpacked(given, self.bits)[:, :blocks] if packed else given
        values -= zero[:, :, None].astype(np.float32)
        scale = _array(graph, self.scales[0]).reshape(rows, blocks, 1)
        values *= scale.astype(np.float32)
        return values


def unpacked(stored: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Numbers of 2, 4 or 8 bits that share bytes along the last dimension, the lowest bits first.

    Returns:
        The numbers, ``8 / bits`` for each byte.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    apart = (stored[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return apart.reshape(*stored.shape[:-1], -1)


def encodings(graph: ir.Graph) -> dict[str, Encoding]:
    """The initialisers that hold quantised numbers, by name.

    What computed scales belong to is left out: it can't be decoded without running the graph.
    """
    found: dict[str, Encoding] = {}
    for node in graph:
        for name, encoding in _of_node(node, graph):
            found.setdefault(name, encoding)
    return found


def scale_names(graph: ir.Graph) -> set[str]:
    """The initialisers that are scales or zero points: they describe numbers, and are none."""
    found: set[str] = set()
    for node in _quantised_nodes(graph):
        reads, writes = READS.get(node.op_type, ()), WRITES.get(node.op_type, ())
        places = [*(p for r in reads for p in (r.scale, r.zero)), *writes]
        if node.op_type == "MatMulNBits":
            places += [2, 3, 4]
        values = (_input(node, p) for p in places)
        found.update(v.name or "" for v in values if v is not None and _is_stored(v, graph))
    return found | {name for e in encodings(graph).values() for name in e.scales}


def zero_points(graph: ir.Graph) -> dict[str, ir.Value | None]:
    """The value that stands for zero in each quantised result; None where that is 0.

    Results with several zero points, along an axis, are left out.
    """
    found: dict[str, ir.Value | None] = {}
    stored = encodings(graph)
    for name, encoding in stored.items():
        if not encoding.bits:
            found[name] = None if encoding.zero is None else graph.initializers[encoding.zero]
    for node in graph:
        name = node.outputs[0].name or ""
        if node.op_type == "DynamicQuantizeLinear":
            found[name] = node.outputs[2]
        elif node.op_type in WRITES and node.domain in _DOMAINS:
            found[name] = _input(node, WRITES[node.op_type][1])
        elif node.op_type in _CARRIERS and node.inputs[0] is not None:
            given = node.inputs[0].name or ""
            found |= {v.name or "": found[given] for v in node.outputs if given in found}
    return {n: v for n, v in found.items() if v is None or _count(v) == 1}


def clips(node: ir.Node) -> bool:
    """Whether an operator cuts off what is negative, as a quantised ReLU does.

    That is so where zero is the least of the integers.
    """
    if node.op_type not in WRITES or node.domain not in _DOMAINS:
        return False
    zero = _input(node, WRITES[node.op_type][1])
    if zero is None or zero.const_value is None or not zero.const_value.dtype.is_integer():
        return False
    values = zero.const_value.numpy()
    return bool((values == zero.const_value.dtype.min).all())


def _quantised_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    names = {*READS, *WRITES, "MatMulNBits"}
    return (n for n in graph if n.op_type in names and n.domain in _DOMAINS)


def _of_node(node: ir.Node, graph: ir.Graph) -> Iterator[tuple[str, Encoding]]:
    """The initialisers that an operator reads as quantised numbers."""
    if node.domain not in _DOMAINS:
        return
    if node.op_type == "MatMulNBits":
        yield from _packed(node, graph)
    for read in READS.get(node.op_type, ()):
        value = _source(_input(node, read.value), graph)
        if value is None or value.const_value is None:
            continue
        moved = value is not _input(node, read.value)
        given = [None if p is None else _input(node, p) for p in (read.scale, read.zero)]
        scale, zero = given
        if any(v is not None and not _is_stored(v, graph) for v in given):
            continue
        scales = _scales_after(node, graph) if read.scale is None else [scale]
        rank, shape = len(value.const_value.shape), value.const_value.shape.numpy()
        axis = read.axis(node)
        axis -= rank if axis >= 0 else 0
        block = node.attributes.get_int("block_size", 0)
        parts = [v for v in (*scales, zero) if v is not None]
        several = [v for v in parts if _count(v) != 1]
        if several and (moved or not (block or all(_count(v) == shape[axis] for v in several))):
            continue
        names = tuple(v.name or "" for v in scales if v is not None)
        yield (
            value.name or "",
            Encoding(names, None if zero is None else zero.name, axis, block if several else 0),
        )
    if node.op_type in BIASES:
        place, *factors = BIASES[node.op_type]
        bias, scales = _input(node, place), [_input(node, f) for f in factors]
        if all(v is not None and _is_stored(v, graph) for v in (bias, *scales)):
            names = tuple(v.name or "" for v in scales if v is not None)
            yield (bias.name or "" if bias else "", Encoding(names, None))


def _packed(node: ir.Node, graph: ir.Graph) -> Iterator[tuple[str, Encoding]]:
    weight, scale, zero = (_input(node, i) for i in (1, 2, 3))
    bits = node.attributes.get_int("bits", 4)
    prepacked = node.attributes.get_int("weight_prepacked", 0) != 0
    if weight is None or scale is None or prepacked:
        return
    given = [v for v in (weight, scale, zero) if v is not None]
    if bits in (2, 4, 8) and all(_is_stored(v, graph) for v in given):
        zero_name = None if zero is None else zero.name
        yield weight.name or "", Encoding((scale.name or "",), zero_name, bits=bits)


def _scales_after(node: ir.Node, graph: ir.Graph) -> list[ir.Value]:
    """The stored scales that the integers of a product are multiplied by, behind a cast."""
    users = [u.node for v in node.outputs for u in v.uses()]
    if len(users) == 1 and users[0].op_type == "Cast":
        users = [u.node for v in users[0].outputs for u in v.uses()]
    waiting = [v for n in users if n.op_type == "Mul" for v in n.inputs if v is not None]
    found: list[ir.Value] = []
    while waiting:
        value = waiting.pop()
        producer = value.producer()
        if _is_stored(value, graph):
            found.append(value)
        elif producer is not None and producer.op_type in ("Mul", "Reshape", "Unsqueeze"):
            waiting.extend(v for v in producer.inputs if v is not None)
    return found


def _source(value: ir.Value | None, graph: ir.Graph) -> ir.Value | None:
    """The initialiser whose integers a value holds, or None."""
    while value is not None and not _is_stored(value, graph):
        node = value.producer()
        value = node.inputs[0] if node is not None and node.op_type in _CARRIERS else None
    if value is None or value.const_value is None:
        return None
    wide = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
    return None if value.const_value.dtype in wide else value


def _input(node: ir.Node, place: int | None) -> ir.Value | None:
    return node.inputs[place] if place is not None and place < len(node.inputs) else None


def _is_stored(value: ir.Value, graph: ir.Graph) -> bool:
    return graph.initializers.get(value.name or "") is value and value.const_value is not None


def _count(value: ir.Value) -> int:
    """Elements of an initialiser, or 1 for what is computed: a scale of a whole tensor."""
    return 1 if value.const_value is None else prod(value.const_value.shape.numpy())


def _array(graph: ir.Graph, name: str) -> NDArray[Any]:
    tensor = graph.initializers[name].const_value
    if tensor is None:
        raise KeyError(name)
    return tensor.numpy()
