"""ONNX decoders with a key-value cache, against the masked model and transformers' generation."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers as hf
from onnx import numpy_helper
from torch import nn
from transformers import GenerationConfig

import graphprune as gp
from graphprune.emit import decoder, decoder_check
from graphprune.errors import EmitError, EvaluationError, LoadError
from graphprune.frontends.hf import trace_model
from graphprune.generation import Decoder, generate
from graphprune.masked import run_masked
from zoo import decoders, mixtures
from zoo.case import randomise

pytest.importorskip("onnxruntime")

PROMPTS = [[5, 17, 33, 2, 61, 8], [40, 9, 77]]
NEW = 7


@dataclass
class Written:
    """A pruned model and its decoder."""

    program: gp.Program
    plan: gp.Plan
    slim: gp.Slim
    path: Path

    def masked_logits(self, ids: list[int]) -> Any:
        """Of the token after `ids`, in float64, from the full-size model and without a cache."""
        inputs = ((), {"input_ids": torch.tensor([ids])})
        (logits,) = run_masked(self.program, self.plan.bind(self.program), inputs)
        return logits[0, -1].numpy()

    def masked_tokens(self, prompt: list[int]) -> list[int]:
        """The most likely continuation by the masked model."""
        ids = list(prompt)
        for _ in range(NEW):
            ids.append(int(self.masked_logits(ids).argmax()))
        return ids


def written(model: hf.PreTrainedModel, folder: Path, **goal: Any) -> Written:
    program = trace_model(randomise(model))
    plan = gp.select(program, score="random", **goal)
    slim = gp.apply(program, plan)
    path = folder / "decoder.onnx"
    slim.save(path, format="onnx-decoder")
    assert [file.name for file in folder.iterdir()] == ["decoder.onnx"]
    return Written(program, plan, slim, path)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory) -> Written:
    """Rotary positions, grouped queries; layers of 1 and 2 heads and of other widths are left."""
    sizes = decoders.SMALL | {"num_hidden_layers": 3, "tie_word_embeddings": True}
    config = hf.LlamaConfig(**sizes, num_key_value_heads=2, head_dim=8)
    remove = {
        "hidden": 0.25,
        "layers": 1 / 3,
        "model.layers.[12].*/ffn": 0.5,
        "model.layers.2.*/kv_heads": 0.5,
    }
    folder = tmp_path_factory.mktemp("grouped")
    return written(hf.LlamaForCausalLM(config), folder, remove=remove, exclude=["model.layers.2.*/layers"])


@pytest.fixture(scope="module")
def absolute(tmp_path_factory) -> Written:
    remove = {"hidden": 0.25, "ffn": 0.5, "kv_heads": 0.5}
    return written(decoders.gpt2(), tmp_path_factory.mktemp("absolute"), remove=remove)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Written:
    sizes = decoders.SMALL | {"num_hidden_layers": 1}
    config = hf.MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4)
    remove = {"hidden": 0.25, "ffn": 0.5, "kv_heads": 0.5, "experts": 0.25}
    return written(hf.MixtralForCausalLM(config), tmp_path_factory.mktemp("mixture"), remove=remove)


@pytest.fixture(params=["grouped", "absolute", "mixture"])
def any_kind(request) -> Written:
    return request.getfixturevalue(request.param)
