"""A real language model as an ONNX decoder: the text that transformers generates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoTokenizer

import graphprune as gp
from graphprune.frontends import load_traced
from graphprune.runtime.generation import Decoder, generate
from models.cache import model_path

TEXTS = [
    "The capital of France is",
    "Water boils when it is heated, because the molecules move faster and",
]
REMOVE = {
    "ffn": 0.1,
    "hidden": 1 / 36,
    "model.layers.1[0-9].*/kv_heads": 1 / 3,
    "layers": 1 / 3,
}


@pytest.mark.slow
def test_smollm2(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    source = model_path("smollm2")
    program = load_traced(source)
    plan = gp.select(program, remove=REMOVE)
    slim = gp.apply(program, plan)
    path = tmp_path / "decoder.onnx"
    slim.save(path, format="onnx-decoder")
    assert path.stat().st_size < 1.02 * slim.cost.bytes  # the tied embedding is there once

    gone = set(range(30)) - set(plan.kept_units["model.layers"])
    heads = [2 if 10 <= i < 20 else 3 for i in range(30) if i not in gone]
    assert len(heads) == 20
    assert set(heads) == {2, 3}
    graph = onnx.load(path, load_external_data=False).graph
    past = [
        [d.dim_value for d in v.type.tensor_type.shape.dim][1::2]
        for v in graph.input
        if v.name.startswith("past_key_values.")
    ]
    assert past == [[n, 64] for n in heads for _ in ("key", "value")]

    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    wanted = slim.module.generate(  # type: ignore[operator]
        **batch, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    length = batch["input_ids"].shape[1]
    model = Decoder(path)
    found = generate(model, tokenizer(TEXTS)["input_ids"], 24)
    assert found[:, length:].tolist() == wanted[:, length:].tolist()

    model.reset()
    ids = tokenizer(TEXTS[1:], return_tensors="np")["input_ids"]
    ends = (ids.shape[1] - 3, *range(ids.shape[1] - 2, ids.shape[1] + 1))
    logits = np.concatenate([model.step(ids[:, model.length : end]) for end in ends], axis=1)
    with torch.no_grad():
        graph_logits = slim.exported.module()(input_ids=torch.tensor(ids)).logits.numpy()
    scale = float(np.abs(graph_logits).max())
    assert float(np.abs(logits - graph_logits).max()) < 1e-4 * scale
