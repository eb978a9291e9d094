"""`PruneOnnx` as a pass of onnx-ir: in memory, in place, all or nothing."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

import graphprune as gp
from graphprune.frontends.onnx.load import adopt
from graphprune.integrations.onnx_ir import PruneOnnx
from integrations.nets import exported, inputs, switched_off, tagger
from onnx_graphs import graph

REMOVE = {"ffn": 0.5, "heads": 0.25}


@pytest.fixture(scope="module")
def dense():
    return torch.onnx.export(exported(), dynamo=True, verbose=False).model


@pytest.fixture(scope="module")
def plan(dense):
    return gp.select(adopt(dense), remove=REMOVE)


@pytest.fixture(scope="module")
def masked(plan):
    """Its units are those that the pass keeps, told by their number alone."""
    heads, inner = sorted(plan.kept_units.values(), key=len)
    assert (len(inner), len(heads)) == (24, 3)
    return switched_off(tagger(), inner, heads)


def run(model, *args):
    model = model.clone()
    ir.external_data.load_to_model(model)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    names = [i.name for i in session.get_inputs()]
    return session.run(None, dict(zip(names, (np.asarray(a) for a in args), strict=True)))[0]


def bytes_of(model):
    return ir.to_proto(model).SerializeToString(deterministic=True)


def parameters(model):
    return sum(np.prod(v.shape.numpy()) for v in model.graph.initializers.values() if v.dtype == 1)


@pytest.mark.parametrize("settings", [{}, {"remove": REMOVE}], ids=["plan", "recipe"])
def test_it_prunes_in_place(dense, plan, masked, settings):
    model = dense.clone()
    result = PruneOnnx(None if settings else plan, **settings)(model)
    assert result.model is model
    assert result.modified
    assert [v.name for v in model.graph.inputs] == ["input", "scale"]
    assert [v.name for v in model.graph.outputs] == [v.name for v in dense.graph.outputs]
    assert gp.Plan.from_json(model.metadata_props["graphprune.plan"]) == plan
    gone = 24 * (32 + 1 + 32) + 8 * (3 * (32 + 1) + 32)
    assert parameters(dense) - parameters(model) == gone
    for sizes in ((2, 7), (3, 11)):
        args = inputs(*sizes, seed=4)
        wanted = masked(*args).detach().numpy()
        np.testing.assert_allclose(run(model, *args), wanted, rtol=0, atol=1e-5)


def test_among_other_passes(dense, masked):
    """A manager that repeats its passes doesn't prune what it has pruned."""
    model = dense.clone()
    manager = ir.passes.PassManager(
        [PruneOnnx(remove=REMOVE), ClearMetadataAndDocStringPass()], steps=3, early_stop=False
    )
    assert manager(model).modified
    args = inputs(3, 9)
    wanted = masked(*args).detach().numpy()
    np.testing.assert_allclose(run(model, *args), wanted, rtol=0, atol=1e-5)
    again = PruneOnnx(remove={"ffn": 0.5})
    before = parameters(model)
    assert again(model).modified  # another pass does
    assert before - parameters(model) == 12 * (32 + 1 + 32)


def test_functionalized(dense):
    before = bytes_of(dense)
    result = ir.passes.functionalize(PruneOnnx(remove=REMOVE))(dense)
    assert bytes_of(dense) == before
    assert parameters(result.model) < parameters(dense)
    args = inputs()
    wanted = tagger()(*args).detach().numpy()
    np.testing.assert_allclose(run(dense, *args), wanted, rtol=0, atol=1e-5)


def test_weights_in_another_file(dense, masked, tmp_path):
    ir.save(dense.clone(), tmp_path / "dense.onnx", external_data="dense.onnx.data")
    before = (tmp_path / "dense.onnx.data").read_bytes()
    model = ir.load(tmp_path / "dense.onnx")
    PruneOnnx(remove=REMOVE)(model)
    ir.save(model, tmp_path / "slim.onnx", external_data="slim.onnx.data")
    assert (tmp_path / "dense.onnx.data").read_bytes() == before
    args = inputs(3, 9)
    found = run(ir.load(tmp_path / "slim.onnx"), *args)
    np.testing.assert_allclose(found, masked(*args).detach().numpy(), rtol=0, atol=1e-5)


def test_nothing_to_remove(dense):
    model = dense.clone()
    before = bytes_of(model)
    assert not PruneOnnx(remove={"ffn": 0.0})(model).modified
    assert bytes_of(model) == before


def test_a_failure_leaves_the_model_as_it_was(dense):
    model = dense.clone()
    before = bytes_of(model)
    for failing in (
        PruneOnnx(gp.Plan("of another model", {"up:0": (0,)}, {"up:0": 4})),
        PruneOnnx(remove={"channels": 0.5}),
    ):
        with pytest.raises(gp.PlanError):
            failing(model)
    assert bytes_of(model) == before


def test_a_wrong_rewrite_is_refused(dense, monkeypatch):
    from graphprune.rewrite import slim_onnx

    rewrite = slim_onnx.rewrite_onnx

    def wrong(model, known, typing, keep):
        rewrite(model, known, typing, keep)
        name = next(n for n, v in model.graph.initializers.items() if v.shape == (24, 32))
        values = model.graph.initializers[name].const_value.numpy()
        model.graph.initializers[name].const_value = ir.tensor(values[::-1].copy(), name=name)

    monkeypatch.setattr(slim_onnx, "rewrite_onnx", wrong)
    model = dense.clone()
    before = bytes_of(model)
    with pytest.raises(gp.VerifyError):
        PruneOnnx(remove=REMOVE)(model)
    assert bytes_of(model) == before
    assert PruneOnnx(remove=REMOVE, check=False)(model).modified


WITH_FUNCTION = """
<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
g (float[batch, 8] x) => (float[batch, 8] y)
{
  h = own.layer (x, up)
  z = own.layer (h, down)
  y = Add (x, z)
}
<domain: "own", opset_import: ["" : 17]>
layer (a, w) => (r)
{
  p = MatMul (a, w)
  r = Relu (p)
}
"""


def test_functions_are_inlined():
    rng = np.random.default_rng(0)
    up, down = (rng.standard_normal(s).astype(np.float32) for s in ((8, 16), (16, 8)))
    proto = onnx.parser.parse_model(WITH_FUNCTION)
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(array, name) for name, array in (("up", up), ("down", down))
    )
    model = ir.from_proto(proto)
    plan = gp.select(adopt(model), remove={"*": 0.5})
    assert PruneOnnx(plan)(model).modified
    assert not model.functions
    (kept,) = plan.kept_units.values()
    x = rng.standard_normal((3, 8)).astype(np.float32)
    hidden = np.maximum(x @ up[:, list(kept)], 0)
    wanted = x + np.maximum(hidden @ down[list(kept)], 0)
    np.testing.assert_allclose(run(model, x), wanted, rtol=0, atol=1e-5)


SMALL = "m (float[2, 4] x) => (float[2, 4] y) { y = Relu (x) }"


def test_requires():
    nothing = PruneOnnx(remove={"*": 0.5})
    with pytest.raises(ir.passes.PreconditionError, match="opset 9 is not supported"):
        nothing(ir.from_proto(graph(SMALL, opset=9)))
    broken = ir.from_proto(graph(SMALL))
    broken.graph[0].op_type = "Rectify"
    with pytest.raises(ir.passes.PreconditionError, match="not valid"):
        nothing(broken)
    empty = ir.from_proto(graph(SMALL))
    value = ir.Value(name="w", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    empty.graph.initializers.add(value)
    with pytest.raises(ir.passes.PreconditionError, match="has no data"):
        nothing(empty)


def test_ensures():
    broken = ir.from_proto(graph(SMALL))
    broken.graph[0].outputs[0].shape = ir.Shape([3, 4])
    with pytest.raises(ir.passes.PostconditionError, match="not valid"):
        PruneOnnx(remove={"*": 0.5}).ensures(broken)


def test_a_wrong_recipe_is_an_error_at_once():
    with pytest.raises(gp.RecipeError, match="exactly one of"):
        PruneOnnx()


def test_a_model_in_memory_as_a_program(dense, masked, tmp_path):
    """It goes through `compile` as a file does."""
    gp.compile(adopt(dense), {"remove": REMOVE}, tmp_path / "slim.onnx")
    args = inputs(3, 11)
    found = run(ir.load(tmp_path / "slim.onnx"), *args)
    np.testing.assert_allclose(found, masked(*args).detach().numpy(), rtol=0, atol=1e-5)
