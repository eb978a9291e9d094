"""Draws random ONNX graphs: operators that fit the values before them, in random opsets and forms.

Every value is computed by ONNX's reference implementation as soon as it is drawn, for two batches;
that tells its shape, and what doesn't fit.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

Array = NDArray[Any]

LIMIT = 3000  # elements of a value
BATCHES = (2, 3)
OPSETS = (11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23)
IR_VERSIONS = (3, 4, 5, 6, 7, 8, 9, 10, 11)


# ONNX Runtime has them in float32 only.
_SINGLE = frozenset(
    "Asinh Atan AveragePool BatchNormalization Celu Conv ConvTranspose Elu Erf Gelu "
    "GlobalAveragePool GRU HardSigmoid HardSwish InstanceNormalization LRN LeakyRelu LSTM Mish "
    "PRelu RNN Selu Shrink Sinh Cosh Softplus Softsign Swish".split()
)


class Misfit(Exception):
    """An operator doesn't fit its operands; another one is drawn."""


@dataclass(frozen=True)
class Case:
    """A random model.

    Attributes:
        model: the graph; its floating inputs are named x0, x1, ..., tables of places ids.
        feeds: inputs at two batch sizes; the same twice where the batch is fixed.
        plain: nothing in it notices that removed coordinates are zero instead of absent.
    """

    model: onnx.ModelProto
    feeds: tuple[dict[str, Array], dict[str, Array]]
    plain: bool


class Drawing:
    """A graph in the making.

    Attributes:
        rng: where choices come from.
        values: each value at two batch sizes, by name, in order.
        made: names of the values that nodes give, which tell what is read by nothing.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.numbers = np.random.default_rng(rng.randrange(2**32))
        self.opset = rng.choice(OPSETS)
        # Nothing that notices zeros: either biases, which aren't zero at the removed coordinates of
        # another axis, or sums over an axis without a weight that has zeros there.
        self.plain = rng.randrange(3) == 0
        self.biases = not self.plain or rng.randrange(2) == 0
        self.type = np.dtype(rng.choice([np.float32] * 4 + [np.float64]))
        self.inputs: list[str] = []
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.values: dict[str, tuple[Array, Array]] = {}
        self.made: list[str] = []
        self.used: set[str] = set()

    def input(self, name: str, arrays: tuple[Array, Array]) -> str:
        self.inputs.append(name)
        self.values[name] = arrays
        return name

    def constant(self, array: Any, name: str = "") -> str:
        """An initialiser, or now and then the result of a Constant."""
        array = np.asarray(array)
        name = f"{name or 'w'}.{len(self.initializers) + len(self.nodes)}"
        tensor = numpy_helper.from_array(array, name)
        if self.rng.randrange(8) == 0:
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        else:
            self.initializers.append(tensor)
        self.values[name] = (array, array)
        return name

    def weight(self, *shape: int, fan_in: int = 0) -> str:
        """A random initialiser; where it is one of many in a sum, of a smaller scale."""
        array = self.numbers.standard_normal(shape) / np.sqrt(fan_in or 4)
        return self.constant(array.astype(self.type))

    def integers(self, *numbers: int) -> str:
        return self.constant(np.array(numbers, dtype=np.int64), "n")

    def add(
        self,
        kind: str,
        operands: Sequence[str],
        results: int = 1,
        *,
        domain: str = "",
        result: Callable[..., Array] | None = None,
        **attributes: Any,
    ) -> list[str]:
        """Another operator.

        Args:
            kind: its name.
            operands: what it reads.
            results: how many values it gives.
            domain: where it isn't ONNX's own; "ort" for ONNX Runtime's in that of ONNX.
            result: makes something like its result, where the reference hasn't got it.
            attributes: its attributes; those that are None are left out.

        Returns:
            The names of its results.

        Raises:
            Misfit: it is of another opset, fails, or its results are too large, empty or infinite.
        """
        if self.type == np.float64 and kind in _SINGLE:
            raise Misfit(f"ONNX Runtime has no {kind} in float64")
        if result is None:
            if not onnx.defs.has(kind, self.opset):
                raise Misfit(f"{kind} isn't in opset {self.opset}")
            if onnx.defs.get_schema(kind, self.opset, "").deprecated:
                raise Misfit(f"{kind} is deprecated")
        names = [f"{kind}_{len(self.nodes)}_{i}" for i in range(results)]
        node = helper.make_node(
            kind,
            operands,
            names,
            name=f"/{kind}.{len(self.nodes)}",
            domain="" if domain == "ort" else domain,
        )
        for key, value in attributes.items():
            if value is not None:
                node.attribute.append(helper.make_attribute(key, value))
        found = [self._run(node, side, result) for side in (0, 1)]
        for name, pair in zip(names, zip(*found, strict=True), strict=True):
            if any(not 0 < x.size <= LIMIT or x.ndim > 6 for x in pair):
                raise Misfit(f"{kind} gives {[x.shape for x in pair]}")
            if any(x.dtype.kind == "f" and not np.isfinite(x).all() for x in pair):
                raise Misfit(f"{kind} gives values that aren't finite")
            self.values[name] = pair
        self.nodes.append(node)
        self.made.extend(names)
        self.used.update(operands)
        return names

    def _run(
        self, node: onnx.NodeProto, side: int, result: Callable[..., Array] | None
    ) -> list[Array]:
        feeds = {name: self.values[name][side] for name in node.input if name}
        if result is not None:
            return [result(*(self.values[name][side] for name in node.input))]
        given = [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
            for n, x in feeds.items()
        ]
        given_back = [helper.make_empty_tensor_value_info(name) for name in node.output]
        graph = helper.make_graph([node], "one", given, given_back)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)])
        try:
            with np.errstate(all="ignore"):
                found = ReferenceEvaluator(model).run(None, feeds)
        except Exception as error:  # it has no class of its own for what doesn't fit
            raise Misfit(f"{node.op_type}: {error}") from error
        return [np.asarray(x) for x in found]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.values[name][0].shape

    def fixed(self, name: str) -> list[int]:
        """The dimensions of a value that don't vary with the batch."""
        a, b = (v.shape for v in self.values[name])
        return [i for i in range(len(a)) if a[i] == b[i]]

    def floats(self, *ranks: int) -> list[str]:
        """Floating values that nodes give, of these ranks or of any."""
        return [
            n
            for n in self.made
            if self.values[n][0].dtype == self.type
            and (not ranks or self.values[n][0].ndim in ranks)
        ]

    def pick(self, *ranks: int) -> str:
        """One of them, a late one more often than an early one."""
        found = self.floats(*ranks)
        return found[-1 - min(self.number(len(found)), self.number(len(found)))]

    def choice(self, options: Sequence[Any]) -> Any:
        if not options:
            raise Misfit("nothing to choose from")
        return self.rng.choice(options)

    def number(self, *bounds: int) -> int:
        if not range(*bounds):
            raise Misfit("nothing to choose from")
        return self.rng.randrange(*bounds)

    def chance(self, times: int) -> bool:
        """Once in so many times."""
        return self.rng.randrange(times) == 0

    def random(self, *shape: int) -> Array:
        return self.numbers.standard_normal(shape).astype(self.type)


def draw(rng: random.Random, most: int = 24) -> Case:
    """A random model of 3 to about `most` operators."""
    from properties import onnx_moves

    d = Drawing(rng)
    dynamic = not d.chance(3)
    onnx_moves.begin(d, dynamic)
    goal = 3 + min(rng.randrange(most) for _ in range(2))
    for _ in range(3 * goal):
        if len(d.made) >= goal:
            break
        taken = len(d.nodes), len(d.initializers), len(d.made), dict(d.values), set(d.used)
        try:
            onnx_moves.draw(d)
        except Misfit:
            del d.nodes[taken[0] :], d.initializers[taken[1] :], d.made[taken[2] :]
            d.values, d.used = taken[3:]
    return Case(_model(d, dynamic), _feeds(d), d.plain)


def _feeds(d: Drawing) -> tuple[dict[str, Array], dict[str, Array]]:
    first, second = ({n: d.values[n][side] for n in d.inputs} for side in (0, 1))
    return first, second


def _model(d: Drawing, dynamic: bool) -> onnx.ModelProto:
    """The drawn graph as a model of a random version of the format."""
    ir_version = d.choice(IR_VERSIONS)
    ends = [n for n in d.floats() if n not in d.used] or d.floats()[-1:]
    outputs = []
    for name in ends[-4:]:
        outputs.append(_head(d, name))
    infos = [_info(d, n, dynamic) for n in d.inputs]
    if ir_version < 4 or d.chance(6):  # initialisers may be inputs, and once had to be
        infos += [
            helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in d.initializers
        ]
    graph = helper.make_graph(
        d.nodes, "random", infos, [_info(d, n, dynamic) for n in outputs], d.initializers
    )
    if d.chance(2):
        graph.value_info.extend(_info(d, n, dynamic) for n in d.made if n not in outputs)
    domains = {"": d.opset} | {n.domain: 1 for n in d.nodes if n.domain}
    opsets = [helper.make_opsetid(*pair) for pair in domains.items()]
    model = helper.make_model(graph, opset_imports=opsets, producer_name="random graphs")
    model.ir_version = ir_version
    return model


def _head(d: Drawing, name: str) -> str:
    """A linear that frees an output of its last axis, where there is one."""
    shape = d.shape(name)
    if len(shape) < 2 or len(shape) - 1 not in d.fixed(name) or d.chance(4):
        return name
    try:
        return d.add("MatMul", [name, d.weight(shape[-1], 3, fan_in=shape[-1])])[0]
    except Misfit:
        return name


def _info(d: Drawing, name: str, dynamic: bool) -> onnx.ValueInfoProto:
    x, y = d.values[name]
    sizes = [
        a if a == b or not dynamic else ("N" if (a, b) == BATCHES else None)
        for a, b in zip(x.shape, y.shape, strict=True)
    ]
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), sizes)
