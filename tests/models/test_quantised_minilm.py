"""A real encoder, exported, quantised by ONNX Runtime, then pruned."""

from __future__ import annotations

import warnings

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.quantization import QuantFormat, quantize_static
from transformers import AutoModel, AutoTokenizer

import graphprune as gp
from graphprune.frontends.onnx.load import load_onnx
from graphprune.oracle.verification_onnx import verify_onnx
from graphprune.pipeline.compiler import compile
from graphprune.rewrite.slim_onnx import SlimOnnx
from models.cache import model_path
from onnx_graphs import run
from onnx_quantised import Batches, quiet, stored_bytes

SENTENCES = (
    "The cat sat on the mat.",
    "Pruning removes whole units from a trained network.",
    "It rained all day, so we stayed at home and read.",
    "How many parameters does a small model need?",
)


class Encoder(torch.nn.Module):
    def __init__(self, path):
        super().__init__()
        self.model = AutoModel.from_pretrained(path)

    def forward(self, ids, mask):
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """The file, and the tokens of some sentences."""
    path, folder = model_path("minilm"), tmp_path_factory.mktemp("minilm")
    tokens = AutoTokenizer.from_pretrained(path)(
        list(SENTENCES), return_tensors="pt", padding="max_length", max_length=16, truncation=True
    )
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    axes = {0: "batch", 1: "length"}
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Encoder(path).eval(),
            (ids, mask),
            str(folder / "float.onnx"),
            dynamo=False,
            opset_version=17,
            input_names=["ids", "mask"],
            output_names=["y"],
            dynamic_axes={"ids": axes, "mask": axes, "y": axes},
        )
        feeds = [{"ids": row.numpy(), "mask": np.ones_like(row)} for row in ids.split(2)]
        file = folder / "dense.onnx"
        quantize_static(folder / "float.onnx", file, Batches(feeds), quant_format=QuantFormat.QDQ)
    return file, {"ids": ids.numpy(), "mask": np.ones_like(ids)}


def _without_two_layers(program, feeds, file):
    plan = gp.select(program, remove={"layers": 1 / 3}, score="magnitude")
    SlimOnnx(program, plan).save(file)
    certificate = verify_onnx(program, plan, file, feeds)
    return certificate.passed and certificate.dense_difference > 0.1


@pytest.mark.slow
def test_heads_and_ffn(quantised, tmp_path):
    file, feeds = quantised
    slim = tmp_path / "slim.onnx"
    report = compile(file, {"remove": {"heads": 0.25, "ffn": 0.25}}, slim)
    assert report.kept == {"ffn": (6 * 1152, 6 * 1536), "kv_heads": (6 * 9, 6 * 12)}
    program = load_onnx(file, {n: v.shape for n, v in feeds.items()})
    (plan,) = [p.value for p in onnx.load(slim).metadata_props if p.key == "graphprune.plan"]
    plan = gp.Plan.from_json(plan)
    certificate = verify_onnx(program, plan, slim, feeds)
    certificate.raise_if_failed()
    assert certificate.steps > 100
    assert certificate.dense_difference > 0.1
    assert report.after.bytes == stored_bytes(slim, program)
    linear = 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    assert report.before.parameters - report.after.parameters == linear // 4 + 6 * 384 + 6 * 3 * 96
    assert _without_two_layers(program, feeds, tmp_path / "short.onnx")
    (y,) = run(slim, **feeds)
    assert y.shape == (4, 16, 384)
    assert np.isfinite(y).all()
