"""A real language model from which gates take width, heads and layers at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import graphprune as gp
from graphprune.frontends import load_traced
from graphprune.pipeline.gradual.goal import Goal
from graphprune.streaming.torch.weights import apply_weights
from graphprune.training import Training
from graphprune.training.learn import Learning, learn
from models.cache import model_path
from training.gates.models import lay

SHAPE = {"ffn": 1152, "kv_heads": 2, "hidden": 504, "layers": 28}
"""A quarter of all ffn channels, a third of the heads, an eighth of the width, two layers."""


@pytest.mark.slow  # trains 135 million weights, and writes them
def test_smollm2(tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    program = load_traced(model_path("smollm2"))
    noise = np.random.default_rng(0)
    gated = [
        replace(one, scores=noise.random((one.rows, one.structure.size)))
        for one in Goal.of("shear", shape=SHAPE).gated(program, 0)
    ]
    ids = torch.randint(0, 49152, (2, 16), generator=torch.Generator().manual_seed(0))
    options = Training(steps=2, batch=1, lr=1e-4, precision="float32")
    # In two steps gates hardly move: they begin in the order of scores, from 0.77 to 0.996.
    found = learn(program, ids, gated, options, Learning(by_score=True))
    values = torch.cat([z[z > 0] for z in found.gates.values()])
    assert float((values < 0.99).double().mean()) > 0.1

    slim = gp.apply(found.program, found.plan)
    module = slim.module.float().eval()
    raw = apply_weights(program, {n: w.float() for n, w in found.recovered.weights.items()})
    laid = lay(raw, [one.structure for one in gated])
    example = ((), {"input_ids": ids[:1]})
    laid.program = replace(laid.program, example=example)
    (gated_logits,) = laid.outputs({n: z.float() for n, z in found.gates.items()})
    with torch.no_grad():
        logits = module(input_ids=ids[:1]).logits
    scale = float(gated_logits.abs().max())
    assert float((logits - gated_logits).abs().max()) < 1e-5 * scale

    slim.save(tmp_path / "slim")
    config = AutoConfig.from_pretrained(tmp_path / "slim")
    assert (config.hidden_size, config.intermediate_size) == (504, 1152)
    assert (config.num_hidden_layers, config.num_key_value_heads) == (28, 2)
    assert (config.num_attention_heads, config.head_dim) == (6, 64)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "slim", dtype=torch.float32).eval()
    with torch.no_grad():
        again = loaded(input_ids=ids[:1]).logits
    assert float((again - logits).abs().max()) < 1e-5 * scale
    tokens = loaded.generate(ids[:1, :8], max_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 12)

    slim.save(tmp_path / "slim.onnx", format="onnx")
    session = ort.InferenceSession(tmp_path / "slim.onnx", providers=["CPUExecutionProvider"])
    (name,) = [i.name for i in session.get_inputs()]
    (from_onnx, *_) = session.run(None, {name: ids[:1].numpy()})
    assert float(np.abs(from_onnx - logits.numpy()).max()) < 1e-4 * scale
