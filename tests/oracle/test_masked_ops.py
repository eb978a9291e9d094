"""The formulas of the masked model against their operators on cut tensors, and masks of tensors."""

import numpy as np
import pytest
import torch

import graphprune as gp
from graphprune.axes import Atom, Product, Ragged, Reason
from graphprune.oracle.masked_ops import FORMULAS, Call, Masks

# The formulas alone: on a tensor with a mask they equal the operator on the cut tensor.

X = torch.randn(3, 8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
MIDDLE = torch.tensor([0, 2, 3, 6, 7])
aten = torch.ops.aten
WEIGHT, BIAS = torch.rand(8, dtype=torch.float64), torch.rand(8, dtype=torch.float64)

ALONG = [
    (aten.mean.dim, {"dim": [1]}),
    (aten.mean.dim, {"dim": [-2, 2], "keepdim": True}),
    (aten.mean.default, {}),
    (aten.mean.dim, {"dim": [2]}),
    (aten.var.dim, {"dim": [1], "unbiased": False}),
    (aten.var.correction, {"dim": [1, 2], "correction": 2}),
    (aten.var.default, {}),
    (aten.std.correction, {"dim": [1], "keepdim": True}),
    (aten.var_mean.correction, {"dim": [1]}),
    (aten.std_mean.dim, {"dim": [0, 1]}),
    (aten.linalg_vector_norm.default, {"ord": -1, "dim": [1]}),
    (aten.linalg_vector_norm.default, {"ord": 0, "dim": [1]}),
    (aten.linalg_vector_norm.default, {"ord": float("-inf"), "dim": [1]}),
    (aten.norm.ScalarOpt_dim, {"p": -2, "dim": [1]}),
    (aten.norm.ScalarOpt_dim, {"p": None, "dim": [1]}),
    (aten.softmax.int, {"dim": 1}),
    (aten._softmax.default, {"dim": -2, "half_to_float": False}),
    (aten._safe_softmax.default, {"dim": 1}),
    (aten.log_softmax.int, {"dim": 1}),
    (aten._log_softmax.default, {"dim": 1, "half_to_float": False}),
    (aten.logsumexp.default, {"dim": [1]}),
    (aten.amax.default, {"dim": [1]}),
    (aten.amin.default, {"dim": [1, 2]}),
    (aten.max.default, {}),
    (aten.min.default, {}),
    (aten.max.dim, {"dim": 1}),
    (aten.min.dim, {"dim": 1}),
    (aten.argmax.default, {"dim": 1}),
    (aten.argmin.default, {"dim": 1}),
    (aten.topk.default, {"k": 3, "dim": 1}),
    (aten.topk.default, {"k": 2, "dim": 1, "largest": False}),
    (aten.all.dim, {"dim": 1}),
    (aten.prod.dim_int, {"dim": 1}),
]
NORMS = [
    (aten.layer_norm.default, {"normalized_shape": 1, "weight": WEIGHT, "bias": BIAS, "eps": 0.1}),
    (aten.native_layer_norm.default, {"normalized_shape": 1, "weight": None, "bias": None,
                                      "eps": 0.1}),
    (aten.rms_norm.default, {"normalized_shape": 1, "weight": WEIGHT}),
    (aten._fused_rms_norm.default, {"normalized_shape": 1, "weight": WEIGHT, "eps": 0.1}),
]  # fmt: skip


def tensors(result):
    return list(result) if isinstance(result, tuple | list) else [result]


def check_formula(target, arguments, x, kept, dim, cut_arguments):
    """Compare a formula with its operator on the cut tensor; indices of choices are translated."""
    name = target._schema.name.replace("::", ".")
    places = kept.flatten().nonzero().flatten()
    first = target._schema.arguments[0].name
    zeroed = x.masked_fill(~kept, 0)
    given = tensors(FORMULAS[name](Call(target, {first: zeroed, **arguments}, first, kept)))
    expected = tensors(target(**{first: x.index_select(dim, places), **cut_arguments}))
    for g, e in zip(given, expected, strict=True):
        if g.shape != e.shape:
            g = g.index_select(dim, places)
        if e.dtype == torch.int64:
            e = places[e]
        torch.testing.assert_close(g, e, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("target", "arguments"), ALONG, ids=lambda v: str(v)[:40].split("tensor")[0]
)
@pytest.mark.parametrize("shift", [-5.0, 0.0, 5.0])
def test_formula(target, arguments, shift):
    kept = torch.zeros(1, 8, 1, dtype=torch.bool)
    kept[:, MIDDLE] = True
    if "unbiased" not in arguments and target is aten.var.default:
        arguments = {**arguments, "unbiased": True}
    if target is aten.std_mean.dim:
        arguments = {**arguments, "unbiased": True}
    check_formula(target, arguments, X + shift, kept, 1, arguments)


@pytest.mark.parametrize(
    ("target", "arguments"), NORMS, ids=lambda v: str(v)[:40].split("tensor")[0]
)
def test_norm_formula(target, arguments):
    kept = torch.zeros(8, dtype=torch.bool)
    kept[MIDDLE] = True
    x = X.transpose(1, 2)

    def sized(length, index):
        changed = {"normalized_shape": [length]}
        for key in ("weight", "bias"):
            if arguments.get(key) is not None:
                changed[key] = arguments[key][index]
        return {**arguments, **changed}

    check_formula(target, sized(8, slice(None)), x, kept[None, None], 2, sized(5, MIDDLE))


def test_every_formula_is_tested():
    tested = {target._schema.name.replace("::", ".") for target, _ in (*ALONG, *NORMS)}
    assert tested | {"aten.group_norm"} == set(FORMULAS)


def test_elementwise_maximum_is_no_reduction():
    kept = torch.arange(8).reshape(1, 8, 1) > 2
    call = Call(aten.max.other, {"self": X, "other": -X}, "self", kept)
    assert torch.equal(FORMULAS["aten.max"](call), X.abs())


# Masks of whole tensors.


def test_ragged_mask_over_two_dimensions_in_either_order():
    outer, inner = Atom(2), Atom(3)
    rows = np.array([[True, False, True], [False, True, True]])
    masks = Masks({inner: Ragged(outer, rows)})
    assert masks.whole((outer, inner), (2, 3), "x").tolist() == rows.tolist()
    assert masks.whole((inner, outer), (3, 2), "x").tolist() == rows.T.tolist()
    merged = masks.whole((Product((outer, inner)),), (6,), "x")
    assert merged.tolist() == rows.ravel().tolist()


def test_ragged_mask_with_a_pruned_outer_axis():
    outer, inner = Atom(2), Atom(3)
    rows = np.array([[True, False, True], [False, True, True]])
    masks = Masks({inner: Ragged(outer, rows), outer: np.array([False, True])})
    whole = masks.whole((inner, outer), (3, 2), "x")
    assert whole.tolist() == [[False, False], [False, True], [False, True]]


def test_nothing_pruned_is_no_mask():
    assert Masks({}).whole((Atom(3), Atom(4)), (3, 4), "x") is None


def test_unknown_size_inside_a_pruned_axis_is_an_error():
    batch, heads = Atom(2, reason=Reason("a dynamic dimension")), Atom(3)
    masks = Masks({heads: np.array([True, False, True])})
    merged = (Product((batch, heads)),)
    with pytest.raises(gp.VerifyError, match="can't be followed"):
        masks.whole(merged, (15,), "x")
    masks.observe((batch,), (5,))
    assert masks.whole(merged, (15,), "x").tolist() == [True, False, True] * 5
