"""General text: what a recipe without data is calibrated on, and what comes beside a text."""

from __future__ import annotations

import itertools

import pytest
import torch

from calibration.helpers import pixels, samples, save_tokenizer, text_of
from graphprune.calibration.text.order import alternate, halve
from graphprune.calibration.text.read import load_tokenizer, read_text
from graphprune.errors import RecipeError
from graphprune.pipeline.default_data import with_data
from graphprune.recipe.recipe import Recipe
from streaming.oracle import traced
from zoo import decoders


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAPHPRUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tokenizer(tmp_path):
    save_tokenizer(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def language_model():
    return traced(decoders.llama_gqa_4)[0]


@pytest.mark.parametrize(
    "counts", [[4], [32, 32], [64, 32, 32], [5, 1, 1], [3, 9, 2, 7, 7, 1], [1] * 15, [8, 0]]
)
def test_the_halves_are_as_equal_as_can_be(counts):
    first, second = halve(counts)
    assert sorted([*first, *second]) == list(range(len(counts)))
    assert 0 in first
    sizes = [sum(s) for n in range(len(counts) + 1) for s in itertools.combinations(counts, n)]
    best = min(abs(sum(counts) - 2 * size) for size in sizes)
    assert abs(sum(counts[i] for i in first) - sum(counts[i] for i in second)) == best


def test_the_halves_take_turns():
    """Refits tell by one half of the samples how well the other is fitted."""
    order = alternate([6, 2, 4], seed=3).tolist()
    assert sorted(order) == list(range(12))
    assert all(i < 6 for i in order[::2])
    assert all(i >= 6 for i in order[1::2])
    assert order == alternate([6, 2, 4], seed=3).tolist() != alternate([6, 2, 4], seed=4).tolist()
    uneven = alternate([1, 4], seed=0).tolist()
    assert uneven[0] == 0
    assert sorted(uneven) == [0, 1, 2, 3, 4]


def test_general_text_comes_beside_a_text(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("graphprune.calibration.mixture.check_dense", lambda *rest: None)
    (tmp_path / "own.txt").write_text(text_of(3000)[0])
    wanted = {"data": str(tmp_path / "own.txt"), "windows": 16, "length": 16, "draw": "first",
              "text": "help", "tokenizer": tokenizer}  # fmt: skip
    program = language_model()
    alone = samples(program, **{**wanted, "windows": 8}, general=0)
    both = samples(program, **wanted, general=0.5)
    assert (alone.count, both.count, both.tokens) == (8, 16, 256)
    own = set(map(tuple, alone.data.tolist()))
    assert [tuple(row) in own for row in both.data.tolist()] == [True, False] * 8
    built = load_tokenizer(tmp_path / "tokenizer")(read_text("builtin"))["input_ids"]
    starts = {tuple(built[i : i + 16]) for i in range(0, len(built) - 16, 16)}
    assert sum(tuple(row) in starts for row in both.data.tolist()) == 4
    assert both.source == f"8 of {tmp_path / 'own.txt'} + 4 of builtin + 4 of self"
    few = samples(program, **wanted, general=0.25)
    assert few.source == f"12 of {tmp_path / 'own.txt'} + 2 of builtin + 2 of self"
    none = samples(program, **{**wanted, "windows": 8})
    assert torch.equal(alone.data, none.data)


def test_what_changes_weights_is_fitted_to_general_text(tmp_path, tokenizer):
    program = language_model()
    calibration = {"tokenizer": tokenizer}
    refit = {"remove": {"ffn": 0.5}, "score": "obs", "calibration": calibration}
    found = with_data(Recipe.parse(refit), program).calibration
    assert [(p.source, s) for p, s in found.shares()] == [("builtin", 0.5), ("self", 0.5)]
    assert found.tokenizer == tokenizer
    one = Recipe.parse({**refit, "calibration": {**calibration, "windows": 1}})
    assert with_data(one, program).calibration.sources == ("builtin",)
    own = Recipe.parse({**refit, "calibration": {**calibration, "data": "a.txt"}})
    assert with_data(own, program).calibration.general == 0.55
    for data in ({"general": 0, "data": "a.txt"}, {"data": "self"}, {"data": "builtin"},
                 {"data": {"a.txt": 0.5, "self": 0.5}}):  # fmt: skip
        asked = Recipe.parse({**refit, "calibration": {**calibration, **data}})
        assert with_data(asked, program) == asked
    masked = Recipe.parse({**refit, "sparsify": {"method": "wanda", "sparsity": 0.5}})
    assert with_data(masked, program) == masked  # windows of masks are longer than a model writes
    scored = Recipe.parse({**refit, "score": "taylor"})
    assert with_data(scored, program) == scored
    without = Recipe.parse({"remove": {"ffn": 0.5}, "score": "obs"})
    assert with_data(without, program) == without  # there is no tokenizer
    assert with_data(without, pixels()) == without


def test_a_model_of_another_language_has_no_english_beside_its_text(tmp_path, tokenizer):
    (tmp_path / "own.txt").write_text(text_of(3000)[0])
    wanted = {"data": str(tmp_path / "own.txt"), "windows": 16, "length": 16, "text": "help",
              "tokenizer": tokenizer, "general": 0.5}  # fmt: skip
    found = samples(language_model(), **wanted)
    assert found.source == f"8 of {tmp_path / 'own.txt'} + 8 of self"
    assert any("makes no sense of the built-in text" in note for note in found.notes)
    alone = samples(language_model(), **{**wanted, "windows": 8, "general": 0})
    assert torch.equal(found.given, alone.data)  # the dense model is judged by what was given
    assert torch.equal(found.judging, alone.data)


@pytest.mark.parametrize("data", [{}, {"data": {"a.txt": 0.5, "self": 0.5}}])
def test_general_text_needs_a_text_beside_it(data):
    with pytest.raises(RecipeError, match="'general' comes beside the text that is data"):
        Recipe.parse({"remove": {"ffn": 0.5}, "calibration": {"general": 0.5, **data}})
