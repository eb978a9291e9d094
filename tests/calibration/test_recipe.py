"""The section ``calibration`` of a recipe, and the flags of the command line."""

from __future__ import annotations

import json

import pytest
import torch

from calibration.helpers import save_tokenizer, text_of
from graphprune.errors import RecipeError
from graphprune.frontends import load_traced
from graphprune.pipeline.compiler import compile
from graphprune.quality.perplexity import perplexity
from graphprune.recipe.recipe import Recipe


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"windows": 0}, "calibration.windows"),
        ({"length": 1}, "calibration.length"),
        ({"draw": "any"}, "calibration.draw"),
        ({"std": [0.5, 0]}, "a standard deviation is positive"),
        ({"mean": []}, "calibration.mean"),
        ({"data": ""}, "calibration.data"),
        ({"dat": "a"}, "unknown key 'calibration.dat'; did you mean 'data'?"),
    ],
)
def test_mistakes(section, message):
    with pytest.raises(RecipeError) as caught:
        Recipe.parse({"remove": {"ffn": 0.5}, "calibration": section})
    assert message in str(caught.value)


def test_what_is_written_reads_back(tmp_path):
    section = {"data": "a.npz", "text": "b.txt", "windows": "2K", "mean": 0.5, "draw": "first"}
    recipe = Recipe.parse({"remove": {"ffn": 0.5}, "calibration": section})
    assert (recipe.calibration.windows, recipe.calibration.mean) == (2000, (0.5,))
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "r.yaml") == recipe
    flags = {"data": "c.jsonl", "text": "d.txt"}
    joined = Recipe.from_flags(tmp_path / "r.yaml", flags).calibration
    assert (joined.data, joined.text, joined.windows) == ("c.jsonl", ("d.txt",), 2000)
    flags = {"data": None, "text": ["e.txt", "f.txt"]}
    assert Recipe.from_flags(None, {"remove": ["ffn=0.5"], **flags}).calibration.text == (
        "e.txt",
        "f.txt",
    )
    joined = Recipe.from_flags(tmp_path / "r.yaml", {"data": None, "text": "e.txt"}).calibration
    assert (joined.data, joined.text) == ("a.npz", ("e.txt",))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    save_tokenizer(path)
    return path


def test_a_compilation_calibrates_on_one_and_measures_on_another(model, tmp_path):
    """The plan is that of token ids; the perplexity is of the text, computed here again."""
    said, ids = text_of(600)
    (tmp_path / "text.txt").write_text(said)
    rows = text_of(320, seed=1)[1].view(10, 32)
    (tmp_path / "ids.json").write_text(json.dumps(rows.tolist()))
    recipe = {
        "remove": {"ffn": 0.5}, "score": "taylor",
        "calibration": {"data": str(tmp_path / "ids.json"), "text": str(tmp_path / "text.txt"),
                        "draw": "first", "windows": 8, "length": 32},
    }  # fmt: skip
    report = compile(str(model), recipe, tmp_path / "slim")
    dense = load_traced(str(model))
    expected = perplexity(dense.module, ids[: 8 * 32].view(8, 32))
    assert report.before.perplexity == expected
    recipe["calibration"]["data"] = str(tmp_path / "text.txt")
    again = compile(str(model), recipe, tmp_path / "other")
    assert again.before.perplexity == expected
    plans = [json.loads((tmp_path / n / "graphprune_plan.json").read_text()) for n in
             ("slim", "other")]  # fmt: skip
    assert plans[0] != plans[1]
