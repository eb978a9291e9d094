"""A model of seven billion parameters on the meta device: no weight is needed to plan for it."""

from __future__ import annotations

import time

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import graphprune as gp
from graphprune.analysis.infer import infer
from graphprune.analysis.structures import find_structures

pytestmark = pytest.mark.filterwarnings("ignore:the weights have no values")


@pytest.fixture(scope="module")
def program() -> gp.Program:
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32000,
        tie_word_embeddings=False,
        use_cache=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
        ids = torch.zeros(2, 13, dtype=torch.int64)
    return gp.trace(model, (), {"input_ids": ids})


def test_analysis_takes_seconds(program: gp.Program) -> None:
    """Complaint 42 of structured.md, section 3 (TP#527): an endless search for dependencies."""
    start = time.process_time()
    infer(program.exported, program.aliases)
    find_structures(program)
    assert time.process_time() - start < 10  # measured: 0.4 s; a hang is what this catches


# LLM-Pruner's published sizes: (fraction, first, end of the pruned layers) to parameters.
@pytest.mark.parametrize(
    ("fraction", "first", "end", "params"),
    [(0.25, 4, 30, 5_422_977_024), (0.60, 3, 31, 3_350_188_032)],
)
def test_published_sizes(
    program: gp.Program, fraction: float, first: int, end: int, params: int
) -> None:
    whole = [f"model.layers.{i}.*" for i in range(32) if not first <= i < end]
    plan = gp.select(program, remove={"heads": fraction, "ffn": fraction}, exclude=whole)
    assert gp.apply(program, plan).cost.params == params


def test_target_shape(program: gp.Program) -> None:
    shape = {"hidden": 2048, "heads": 16, "layers": 24, "ffn": 5504}
    shapes = gp.apply(program, gp.select(program, shape=shape)).shapes
    assert shapes["model.layers.23.mlp.down_proj.weight"] == (2048, 5504)
    assert shapes["model.layers.23.self_attn.o_proj.weight"] == (2048, 16 * 128)
    assert "model.layers.24.mlp.down_proj.weight" not in shapes
    assert shapes["lm_head.weight"] == (32000, 2048)
