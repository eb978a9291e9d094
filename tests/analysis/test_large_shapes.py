"""A model of seven billion parameters on the meta device: no weight is needed to plan for it."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import graphprune as gp
from graphprune.analysis.structures import find_structures
from graphprune.ir.torch.infer import infer

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


def calls_of_analysis(layers: int) -> int:
    """Function calls that it takes to analyse a model of some layers."""
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=32,
        use_cache=False,
    )
    ids = torch.zeros(2, 13, dtype=torch.int64)
    program = gp.trace(LlamaForCausalLM(config).eval(), (), {"input_ids": ids})
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        infer(program.exported, program.aliases)
        find_structures(program, program.costs)
    finally:
        sys.setprofile(None)
    return calls


def test_analysis_is_linear_in_layers() -> None:
    """Complaint 42 of structured.md, section 3 (TP#527): an endless search for dependencies."""
    two, four, eight = map(calls_of_analysis, (2, 4, 8))
    assert eight - four < 1.05 * 2 * (four - two)


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
