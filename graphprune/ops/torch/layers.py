"""The ATen table, continued: operators that are whole layers with several parameters."""

from __future__ import annotations

from collections.abc import Collection
from string import ascii_lowercase

from graphprune.axes import Dims
from graphprune.ops.context import Context, Operand, Operator, RuleError, Size
from graphprune.ops.families import contraction, recurrent
from graphprune.ops.families.pointwise import RANDOM, broadcast, drawn, wrap
from graphprune.ops.registry import ATEN

rule = ATEN.rule

for _name in recurrent.GATES:
    ATEN.add(f"aten.{_name}", recurrent.layers)
    ATEN.add(f"aten.{_name}_cell", recurrent.cell)


@rule(
    "dropout",
    "feature_dropout",
    "alpha_dropout",
    "feature_alpha_dropout",
    "native_dropout",
    "rrelu",
)
def _dropout(ctx: Context, op: Operator) -> list[Dims]:
    """Its input, unless it is told to be random in evaluation mode too."""
    x = op.operands[0].dims
    if op.get("train", op.get("training")):
        for e in x:
            ctx.freeze(e, RANDOM)
    return [x for _ in op.results]


@rule("prelu")
def _prelu(ctx: Context, op: Operator) -> Dims:
    x, weight = (o.dims for o in op.operands)
    if weight and weight[0].size > 1:
        ctx.unify(x[1], weight[0])
    return x


@rule("_weight_norm", "_weight_norm_interface")
def _weight_norm(ctx: Context, op: Operator) -> list[Dims]:
    """``v * g / norm(v)``, the norm over all dimensions but `dim`, or over all for -1."""
    v, g, dim = op["v"].dims, op["g"].dims, op.get("dim", 0)
    if g and dim != -1:
        at = wrap(dim, len(v))
        ctx.unify(v[at], g[at])
    return [v, g] if len(op.results) > 1 else [v]


@rule("bilinear")
def _bilinear(ctx: Context, op: Operator) -> Dims:
    """``x1 @ weight[o] @ x2`` for every output o."""
    a, b, weight, bias = (op.get(n) for n in ("input1", "input2", "weight", "bias"))
    for x, side in zip(a.dims[:-1], b.dims[:-1], strict=True):
        ctx.unify(x, side)
    ctx.unify(a.dims[-1], weight.dims[1])
    ctx.unify(b.dims[-1], weight.dims[2])
    if isinstance(bias, Operand):
        ctx.unify(bias.dims[0], weight.dims[0])
    ctx.macs((*a.dims[:-1], *weight.dims))
    return (*a.dims[:-1], weight.dims[0])


@rule("_trilinear")
def _trilinear(ctx: Context, op: Operator) -> Dims:
    """The product of three tensors with dimensions put in where told, summed over some."""
    given = [(op[f"i{n}"].dims, set(op[f"expand{n}"])) for n in (1, 2, 3)]
    letters = ascii_lowercase[: len(given[0][0]) + len(given[0][1])]

    def without(places: Collection[int]) -> str:
        return "".join(x for i, x in enumerate(letters) if i not in places)

    terms = ",".join(without(put_in) for _, put_in in given)
    equation = f"{terms}->{without(op['sumdim'])}"
    return contraction.einsum(ctx, equation, [dims for dims, _ in given])


@rule("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")
def _embedding_bag(ctx: Context, op: Operator) -> list[Dims]:
    """Rows of a table, reduced by bag; the other results are bookkeeping."""
    table = op["weight"].dims
    ctx.freeze(table[0], "indexed by values from outside")
    ctx.hint(table[1], "embedding")
    for operand in op.operands[1:]:
        for e in operand.dims:
            ctx.freeze(e, "summed by bag")
    found: list[Dims] = [(*(ctx.fresh(s, "bags") for s in op.out[:-1]), table[1])]
    for sizes in op.results[1:]:
        found.append(tuple(ctx.fresh(s, "bookkeeping of bags") for s in sizes or ()))
    return found


@rule(
    "randn_like",
    "rand_like",
    "randint_like",
    "bernoulli",
    "normal",
    "normal_functional",
    "poisson",
    "uniform",
    "exponential",
    "cauchy",
    "log_normal",
    "geometric",
    "random",
    "multinomial",
    "binomial",
    "_standard_gamma",
    "_sample_dirichlet",
)
def _random(ctx: Context, op: Operator) -> Dims:
    """Random numbers for every element: a slim model would draw others."""
    for operand in op.operands:
        for e in operand.dims:
            ctx.freeze(e, RANDOM)
    first = op.operands[0].dims if op.operands else ()
    same = [e.size for e in first] == [size.size for size in op.out]
    return first if same else drawn(ctx, op)


@rule("cosine_similarity")
def _cosine_similarity(ctx: Context, op: Operator) -> Dims:
    a, b = (o.dims for o in op.operands)
    sizes = tuple(
        Size(max(d[-i].size for d in (a, b) if len(d) >= i))
        for i in range(max(len(a), len(b)), 0, -1)
    )
    both = broadcast(ctx, [a, b], sizes)
    dim = wrap(op.get("dim", 1), len(both))
    back = len(both) - dim
    if len({d[-back].size if len(d) >= back else 1 for d in (a, b)}) > 1:
        ctx.freeze(both[dim], "one value is compared with all of its places")
    return (*both[:dim], *both[dim + 1 :])


@rule("cdist", "_cdist_forward")
def _distances(ctx: Context, op: Operator) -> Dims:
    """Norms of the differences of all rows of two tensors."""
    a, b = (o.dims for o in op.operands)
    ctx.unify(a[-1], b[-1])
    batch = broadcast(ctx, [a[:-2], b[:-2]], op.out[:-2])
    ctx.macs((*batch, a[-2], b[-2], a[-1]))
    return (*batch, a[-2], b[-2])


@rule("tensordot")
def _tensordot(ctx: Context, op: Operator) -> Dims:
    """Sum of products over given pairs of dimensions."""
    a, b = (o.dims for o in op.operands)
    first = [wrap(d, len(a)) for d in op["dims_self"]]
    second = [wrap(d, len(b)) for d in op["dims_other"]]
    for i, j in zip(first, second, strict=True):
        ctx.unify(a[i], b[j])
    rest = tuple(e for j, e in enumerate(b) if j not in second)
    ctx.macs((*a, *rest))
    return (*(e for i, e in enumerate(a) if i not in first), *rest)


@rule("vdot")
def _vdot(ctx: Context, op: Operator) -> Dims:
    a, b = op.operands
    ctx.unify(a.dims[0], b.dims[0])
    ctx.macs(a.dims)
    return ()


@rule("diag_embed", "diag", "diagonal")
def _diagonal(ctx: Context, op: Operator) -> Dims:
    """A matrix with the diagonal of given values, or the diagonal of a matrix."""
    x = op.operands[0].dims
    if op.get("offset", op.get("diagonal", 0)):
        raise RuleError("another diagonal than the main one")
    rank = len(op.out) if len(op.out) > len(x) else len(x)
    a, b = (wrap(op.get(n, d), rank) for n, d in (("dim1", rank - 2), ("dim2", rank - 1)))
    if len(op.out) > len(x):
        rest = iter(x[:-1])
        return tuple(x[-1] if i in (a, b) else next(rest) for i in range(rank))
    if x[a].size != x[b].size:
        raise RuleError("the diagonal of a matrix that isn't square")
    ctx.unify(x[a], x[b])
    return (*(d for i, d in enumerate(x) if i not in (a, b)), x[a])
