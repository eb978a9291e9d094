"""Products with initialisers, recognised by their operators."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from graphprune.ir.onnx.shapes.sizes import Known, qualified
from graphprune.ops.onnx.shapes import matrix_order
from graphprune.streaming.core.layout import Bank, Convolution, Layout, Matrix

_DOMAIN = "com.microsoft."
MATMULS = frozenset(("MatMul", f"{_DOMAIN}FusedMatMul", f"{_DOMAIN}TransposeMatMul"))
GEMMS = frozenset(("Gemm", f"{_DOMAIN}FusedGemm"))
CONVOLUTIONS = frozenset(("Conv", f"{_DOMAIN}FusedConv"))
ATTENTION = f"{_DOMAIN}Attention"  # which multiplies by one weight before it attends
PRODUCTS = MATMULS | GEMMS | CONVOLUTIONS | {ATTENTION}

_RESHAPES = frozenset(("Reshape", "Flatten", "Squeeze", "Unsqueeze"))
_TABLES = frozenset(("Gather", "GatherElements", "GatherND", f"{_DOMAIN}EmbedLayerNormalization"))
_QUANTISING = frozenset(("QuantizeLinear", "DynamicQuantizeLinear", f"{_DOMAIN}QuantizeLinear"))


@dataclass(frozen=True, slots=True)
class View:
    """How an operator sees a weight.

    Attributes:
        value: what the operator reads.
        swapped: whether the last two dimensions have changed places.
    """

    value: ir.Value
    swapped: bool = False


def followed(
    graph: ir.Graph, known: Mapping[str, Known], view: View
) -> Iterator[tuple[ir.Node, View | str]]:
    """The operators that use a weight, behind copies and transpositions.

    Yields:
        The operator and how it sees the weight, or why that isn't known.
    """
    for node, _ in view.value.uses():
        name = qualified(node)
        if node.graph is not graph:
            yield node, f"{name} reads it inside of If, Loop or Scan"
            continue
        changed = _viewed(node, name, known, view)
        if changed is not None:
            if changed.value.is_graph_output():
                yield node, "it is an output of the model"
            yield from followed(graph, known, changed)
        elif name in PRODUCTS:
            yield node, view
        else:
            yield node, _why_not(name)


def _why_not(name: str) -> str:
    if name in _TABLES:
        return f"a table that {name} looks up"
    if name in _QUANTISING:
        return "it is quantised before it is used"
    if name == "ConvTranspose":
        return "a transposed convolution"
    return f"{name} reads it too, which is no product with it alone"


def _viewed(node: ir.Node, name: str, known: Mapping[str, Known], view: View) -> View | None:
    """The view behind `node`, if it does nothing but show the weight in another way."""
    result = node.outputs[0]
    before, after = (known.get(v.name or "") for v in (view.value, result))
    if before is None or after is None or node.inputs[0] is not view.value:
        return None
    rank = len(before.shapes[0])
    if name == "Identity" or (name == "Cast" and after.dtype.is_floating_point()):
        return replace(view, value=result)
    if name in _RESHAPES and before.shapes == after.shapes:
        return replace(view, value=result)
    if name == "Transpose":
        order = node.attributes.get("perm")
        perm = list(order.as_ints()) if order is not None else list(reversed(range(rank)))
        if perm == [*range(rank - 2), rank - 1, rank - 2]:
            return View(result, not view.swapped)
        if perm == list(range(rank)):
            return replace(view, value=result)
    return None


def product_site(
    node: ir.Node, view: View, known: Mapping[str, Known]
) -> tuple[Layout, ir.Value] | str:
    """The layout and the other operand of a product, or why it is none that is understood."""
    name = qualified(node)
    places = [i for i, v in enumerate(node.inputs) if v is view.value]
    if len(places) != 1:
        return f"{name} multiplies it with itself"
    (place,) = places
    if place > 1:
        return f"{name} adds it"
    if place == 0 and name not in MATMULS | GEMMS:
        return f"{name} reads it as an activation"
    x = node.inputs[1 - place]
    seen = None if x is None else known.get(x.name or "")
    if x is None or seen is None:
        return f"the shape of what {name} multiplies it with isn't known"
    if x.is_initializer():
        return f"{name} multiplies it with a constant"
    if name in CONVOLUTIONS:
        return _convolution(node, view, known, x)
    weight = known[view.value.name or ""].shapes[0]
    return _matrix(node, name, view, weight, place, x, seen)


def _matrix(
    node: ir.Node,
    name: str,
    view: View,
    weight: tuple[int, ...],
    place: int,
    x: ir.Value,
    seen: Known,
) -> tuple[Layout, ir.Value] | str:
    rank = len(seen.shapes[0])
    attributes = {n: a.value for n, a in node.attributes.items()} if name != "MatMul" else {}
    if name == ATTENTION:
        attributes = {}
    own, other = ("A", "B") if place == 0 else ("B", "A")
    order = matrix_order(rank, other, attributes)
    # A matrix product sums over the last dimension of A and the last but one of B.
    features = order[-2 if other == "B" and rank > 1 else -1] - rank
    swapped = bool(attributes.get(f"trans{own}")) != view.swapped
    transposed = swapped if own == "A" else not swapped
    if features not in (-1, -2):
        return f"{name} sums over another dimension than the last two"
    if len(weight) == 2:
        return Matrix(transposed, features), x
    batched = any(attributes.get(f"transBatch{side}") for side in "AB")
    if len(weight) != 3 or batched or rank != 3 or {s[0] for s in seen.shapes} != {weight[0]}:
        return f"{name} spreads it over a batch"
    return Bank(weight[0], transposed, features), x


def _convolution(
    node: ir.Node, view: View, known: Mapping[str, Known], x: ir.Value
) -> tuple[Layout, ir.Value] | str:
    if view.swapped:
        return "a convolution with a transposed kernel"
    attributes = node.attributes
    kernel = known[view.value.name or ""].shapes[0][2:]
    rank = len(kernel)
    stride = tuple(attributes.get_ints("strides", [1] * rank))
    dilation = tuple(attributes.get_ints("dilations", [1] * rank))
    mode = attributes.get_string("auto_pad", "NOTSET")
    around = list(attributes.get_ints("pads", [0] * (2 * rank)))
    if mode.startswith("SAME"):
        found = _same(known[x.name or ""], kernel, stride, dilation, lower=mode == "SAME_LOWER")
        if found is None:
            return "a convolution whose padding depends on the size of the image"
        pairs = found
    elif mode == "VALID":
        pairs = ((0, 0),) * rank
    else:
        pairs = tuple(zip(around[:rank], around[rank:], strict=True))
    groups = attributes.get_int("group", 1)
    return Convolution(tuple(kernel), stride, pairs, dilation, groups), x


def _same(
    x: Known,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    *,
    lower: bool,
) -> tuple[tuple[int, int], ...] | None:
    """The padding with which there is a result for every stride; None where sizes are open."""
    pairs = []
    for dim, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        sizes = {shape[dim] for shape in x.shapes}
        totals = {max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0) for size in sizes}
        if s > 1 and len(sizes) > 1:
            return None
        (total,) = totals
        less, more = total // 2, total - total // 2
        pairs.append((more, less) if lower else (less, more))
    return tuple(pairs)


def origin(value: ir.Value, layout: Layout, known: Mapping[str, Known]) -> ir.Value:
    """The value behind copies, and for rows of features behind reshapes, that has the same rows."""
    keeps_rows = isinstance(layout, Matrix) and layout.features == -1
    while True:
        node = value.producer()
        source = node.inputs[0] if node is not None and node.inputs else None
        if node is None or source is None or source.is_initializer():
            return value
        own, before = (known.get(v.name or "") for v in (value, source))
        if own is None or before is None or value is not node.outputs[0]:
            return value
        name = qualified(node)
        floats = own.dtype.is_floating_point() and before.dtype.is_floating_point()
        same = (name in ("Identity", "Cast") and floats) or (name == "Dropout" and not trains(node))
        if not (same or (keeps_rows and name in _RESHAPES and _same_rows(own, before))):
            return value
        value = source


def trains(node: ir.Node) -> bool:
    """Whether a Dropout is one of training, or may be."""
    return len(node.inputs) > 2 and node.inputs[2] is not None


def _same_rows(own: Known, before: Known) -> bool:
    """Whether a reshape leaves the last dimension alone, whatever the sizes of the inputs."""
    last = {shape[-1] if shape else 0 for shape in (*own.shapes, *before.shapes)}
    return len(last) == 1 and min(len(s) for s in before.shapes) > 1
