"""The sizes of LLM-Shearing's models, as the shipped recipes reach them from Llama-2-7B."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import graphprune as gp
from graphprune.analysis.program import BaseProgram
from graphprune.recipe.recipe import Recipe

SIZES = {"370m": 373_867_520, "1.3b": 1_345_423_360, "2.7b": 2_701_560_320}
"""Of which the paper gives 1.3 and 2.7 billion; by hand from its shapes (see `by_hand`)."""


def by_hand(hidden: int, heads: int, layers: int, ffn: int) -> int:
    """Parameters of a llama with heads of 128 and 32,000 tokens, untied."""
    one = 4 * hidden * heads * 128 + 3 * hidden * ffn + 2 * hidden
    return 2 * 32000 * hidden + layers * one + hidden


def llama(layers: int) -> BaseProgram:
    """Llama-2-7B without values, of some layers."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=4096,
        use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
        return gp.trace(model, kwargs={"input_ids": torch.zeros(1, 8, dtype=torch.int64)})


def slim_size(program: BaseProgram, shape: dict[str, int]) -> int:
    """The parameters of a model of a shape."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = gp.select(program, shape=shape, score="random")
    selection = plan.bind(program)
    blocks = [b for own in selection.cuts.values() for b in own]
    return program.costs.of(selection.keep, blocks).params


def shapes() -> dict[str, dict[str, int]]:
    found = {}
    for name in SIZES:
        (shear, recover) = Recipe.load(f"shearing-{name}.yaml").passes
        assert (shear.name, recover.name) == ("shear", "recover")
        assert shear.options["steps"] * shear.options["batch"] * 4096 == 419_430_400
        assert recover.options["steps"] * recover.options["batch"] * 4096 == 50_331_648_000
        found[name] = dict(shear.options["shape"])
    return found


def test_widths_of_each_size_by_two_layers() -> None:
    program = llama(2)
    for name, shape in shapes().items():
        hidden, heads, layers, ffn = (shape[r] for r in ("hidden", "kv_heads", "layers", "ffn"))
        assert by_hand(hidden, heads, layers, ffn) == SIZES[name]
        del shape["layers"]
        assert slim_size(program, shape) == by_hand(hidden, heads, 2, ffn)


@pytest.mark.slow  # traces 32 layers
def test_all_layers() -> None:
    program = llama(32)
    assert program.costs.total().params == 6_738_415_616
    for name, shape in shapes().items():
        assert slim_size(program, shape) == SIZES[name]
