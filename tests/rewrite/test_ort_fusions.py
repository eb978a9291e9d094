"""Optimisers that fuse attention read head counts off the graph: ours are right, layer by layer."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from onnxruntime.transformers import optimizer
from onnxscript.rewriter.ort_fusions import optimize_for_ort
from transformers import BertConfig, BertModel

import graphprune as gp
from graphprune.frontends.onnx.load import load_onnx
from onnx_graphs import graph, weights, written

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
HEADS, WIDTH = 4, 64
PLANS = {"even": ((0, 1), (1, 3)), "uneven": ((0, 1, 3), (2,))}


class Encoder(torch.nn.Module):
    def __init__(self, attention):
        super().__init__()
        config = BertConfig(
            vocab_size=97,
            hidden_size=WIDTH,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            attn_implementation=attention,
        )
        torch.manual_seed(0)
        self.model = BertModel(config, add_pooling_layer=False).eval()
        for parameter in self.model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def feeds(batch=2, length=9):
    mask = np.ones((batch, length), np.int64)
    mask[0, length // 2 :] = 0
    ids = np.random.default_rng(0).integers(0, 97, (batch, length))
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def by_tracing(tmp_path_factory):
    file = tmp_path_factory.mktemp("traced") / "dense.onnx"
    args = tuple(map(torch.from_numpy, feeds().values()))
    names = [*feeds(), "hidden"]
    torch.onnx.export(
        Encoder("eager"), args, str(file), dynamo=False, opset_version=14, input_names=names[:2],
        output_names=names[2:], dynamic_axes={n: {0: "batch", 1: "length"} for n in names},
    )  # fmt: skip
    return file


@pytest.fixture(scope="module")
def by_dynamo(tmp_path_factory):
    file = tmp_path_factory.mktemp("exported") / "dense.onnx"
    args = tuple(map(torch.from_numpy, feeds().values()))
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    torch.onnx.export(
        Encoder("sdpa"), args, str(file), dynamo=True, verbose=False, external_data=False,
        input_names=list(feeds()), output_names=["hidden"], dynamic_shapes=(dims, dims),
    )  # fmt: skip
    return file


def slim(dense, kept):
    """The file without some heads, and what it computes as it is."""
    program = load_onnx(dense)
    heads = [s for s in program.structures if s.role == "kv_heads"]
    assert [s.size for s in heads] == [HEADS, HEADS]
    plan = gp.Plan(
        program.fingerprint,
        {s.name: units for s, units in zip(heads, kept, strict=True)},
        {s.name: HEADS for s in heads},
    )
    file = dense.with_name("slim.onnx")
    gp.apply(program, plan).save(file)
    gp.verify(program, plan, file).raise_if_failed()
    return file


def run(file, **sizes):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, feeds(**sizes))
    return result


def fused(file):
    """Heads of every attention operator that stands for a whole pattern."""
    nodes = onnx.load(file).graph.node
    kinds = [n for n in nodes if n.op_type in ("Attention", "MultiHeadAttention")]
    return [next(a.i for a in n.attribute if a.name == "num_heads") for n in kinds]


@pytest.mark.parametrize("kept", PLANS.values(), ids=PLANS)
def test_head_counts_are_literal(by_tracing, by_dynamo, kept):
    for dense in (by_tracing, by_dynamo):
        found = onnx.load(slim(dense, kept)).graph
        constants = {t.name: numpy_helper.to_array(t) for t in found.initializer}
        shapes = [
            constants[n.input[1]].tolist()
            for n in found.node
            if n.op_type == "Reshape" and n.input[1] in constants
        ]
        for units in kept:  # of query, key and value
            assert shapes.count([0, 0, len(units), WIDTH // HEADS]) >= 3
        assert all(a.i == 0 for n in found.node for a in n.attribute if a.name == "allowzero")


def test_a_size_of_another_place_is_not_copied(tmp_path):
    """Two open sizes that the examples have equal may differ later, and change places here."""
    model = graph(
        """ g (float[a, 4] x, float[b, 4] y) => (float[b, a, 6] z) {
          u = MatMul(x, w)
          v = MatMul(y, w)
          u1 = Unsqueeze(u, one)
          v0 = Unsqueeze(v, zero)
          s = Add(u1, v0)
          i = Shape(x)
          j = Shape(y)
          m = Gather(i, zero)
          n = Gather(j, zero)
          shape = Concat<axis = 0>(n, m, heads, width)
          r = Reshape(s, shape)
          q = Reshape(r, flat)
          z = MatMul(q, last)
        }""",
        w=weights(4, 12),
        last=weights(12, 6),
        zero=np.array([0]),
        one=np.array([1]),
        heads=np.array([3]),
        width=np.array([4]),
        flat=np.array([0, 0, -1]),
    )
    dense = written(model, tmp_path)
    program = load_onnx(dense)
    plan = gp.select(program, remove={"*": 0.3}, minimum=1)
    assert plan.kept_units
    gp.apply(program, plan).save(tmp_path / "slim.onnx")
    for name in ("dense.onnx", "slim.onnx"):
        options = onnxruntime.SessionOptions()
        session = onnxruntime.InferenceSession(
            str(tmp_path / name), options, providers=["CPUExecutionProvider"]
        )
        x, y = np.ones((2, 4), np.float32), np.ones((5, 4), np.float32)
        (result,) = session.run(None, {"x": x, "y": y})
        assert result.shape == (5, 2, 6)


@pytest.mark.parametrize("config", [(HEADS, WIDTH), (0, 0)], ids=["stale", "none"])
@pytest.mark.parametrize("kept", PLANS.values(), ids=PLANS)
def test_the_old_optimizer(by_tracing, kept, config):
    file = slim(by_tracing, kept)
    found = optimizer.optimize_model(
        str(file), model_type="bert", num_heads=config[0], hidden_size=config[1]
    )
    after = file.with_name("fused.onnx")
    found.save_model_to_file(str(after))
    assert fused(after) == [len(units) for units in kept]
    for sizes in ({}, {"batch": 3, "length": 5}):
        np.testing.assert_allclose(run(after, **sizes), run(file, **sizes), atol=2e-5)


@pytest.mark.parametrize("kept", PLANS.values(), ids=PLANS)
def test_fusions_of_onnxscript(by_dynamo, kept):
    file = slim(by_dynamo, kept)
    found, _ = optimize_for_ort(ir.load(file))
    after = file.with_name("fused.onnx")
    ir.save(found, after)
    assert fused(after) == [len(units) for units in kept]
    for sizes in ({}, {"batch": 3, "length": 5}):
        np.testing.assert_allclose(run(after, **sizes), run(file, **sizes), atol=2e-5)
