"""Windows that the model writes itself, and mixtures of sources."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import graphprune as gp
from calibration.helpers import pixels, samples, save_tokenizer, text_of
from graphprune.calibration.calibrate import calibration_samples
from graphprune.calibration.measured import evaluation_windows, measured_texts
from graphprune.calibration.mixture import apportion
from graphprune.calibration.sources.section import Calibration
from graphprune.errors import LoadError, RecipeError
from graphprune.recipe.recipe import Recipe
from streaming.oracle import traced
from zoo import decoders


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAPHPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def language_model():
    return traced(decoders.llama_gqa_4)[0]


def drawn_plainly(module, rows, length, first, seed):
    """One token after the other from softmax(logits), without a cache of keys and values."""
    tokens = torch.full((rows, 1), first)
    torch.manual_seed(seed)
    with torch.no_grad():
        while tokens.shape[1] < length:
            logits = module(input_ids=tokens, use_cache=False).logits[:, -1]
            tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1)], dim=1)
    return tokens


def test_windows_are_drawn_from_the_distribution_of_the_model():
    program = language_model()
    state = torch.get_rng_state()
    found = samples(program, seed=7, data="self", windows=5, length=12)
    assert torch.equal(torch.get_rng_state(), state)
    first = program.module.config.bos_token_id
    assert torch.equal(found.data, drawn_plainly(program.module, 5, 12, first, 7))
    assert (found.count, found.length, found.tokens, found.seed) == (5, 12, 60, 7)
    assert (found.source, found.in_domain) == ("self", False)


def test_the_end_of_a_text_is_a_token_like_any_other():
    """Sampling goes on after it: no window ends in padding."""
    program = language_model()
    end = program.module.config.eos_token_id
    found = samples(program, data="self", windows=40, length=24).data
    assert Counter(found[:, 1:].flatten().tolist())[end] > 0
    ended = found[(found[:, 1:-1] == end).any(1)]
    after = [row[row[1:].tolist().index(end) + 2 :] for row in ended]
    assert len(torch.cat(after).unique()) > 10


def test_windows_are_cached_by_weights_length_and_seed(cache, monkeypatch):
    program = language_model()
    wanted = {"data": "self", "windows": 3, "length": 8}
    found = samples(program, **wanted).data
    assert len(list(cache.rglob("*.safetensors"))) == 1

    def refuse(*rest, **named):
        raise AssertionError("sampled again")

    with monkeypatch.context() as patch:
        patch.setattr(program.module, "generate", refuse)
        assert torch.equal(samples(program, **wanted).data, found)
        with pytest.raises(AssertionError, match="sampled again"):
            samples(program, seed=1, **wanted)
    (file,) = cache.rglob("*.safetensors")
    file.write_bytes(b"damaged")
    assert torch.equal(samples(program, **wanted).data, found)


def test_a_model_without_a_tokenizer_is_refitted_on_its_own_text(tmp_path):
    """It can't be judged by what it has written itself: one that guesses is no error here."""
    torch.manual_seed(0)
    module = decoders.llama_gqa_4().eval()
    module.save_pretrained(tmp_path / "dense")
    recipe = {
        "remove": {"ffn": 0.5},
        "score": "obs",
        "repair": "reconstruct",
        "calibration": {"data": "self", "windows": 8, "length": 32},
    }
    told = []
    report = gp.compile(tmp_path / "dense", recipe, tmp_path / "slim", progress=told.append)
    assert "sampling calibration windows 1 to 8 of 8" in told
    assert report.notes == ("no perplexity: the checkpoint has no tokenizer",)
    slim = type(module).from_pretrained(tmp_path / "slim")
    assert slim.config.intermediate_size == module.config.intermediate_size // 2


def test_only_models_that_write_are_asked_to():
    with pytest.raises(LoadError, match="can't write its own calibration data"):
        samples(pixels(), data="self")


def test_a_mixture_has_its_shares(tmp_path):
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text("a" * 400)
    (tmp_path / "b.txt").write_text("b" * 400)
    data = {"a": str(tmp_path / "a.txt"), "b": str(tmp_path / "b.txt"), "self": 0.5}
    wanted = {"data": data, "windows": 20, "length": 10, "tokenizer": tokenizer}
    found = samples(language_model(), **wanted)
    letters = [64, 65]  # of "a" and "b"
    constant = [row[0].item() for row in found.data if len(row.unique()) == 1]
    assert Counter(constant) == dict.fromkeys(letters, 5)
    assert found.data.shape == (20, 10)
    assert constant != sorted(constant)  # mixed, and not one source after the other
    own = samples(language_model(), data="self", windows=10, length=10).data
    rest = [row for row in found.data if len(row.unique()) > 1]
    assert sorted(row.tolist() for row in rest) == sorted(own.tolist())


def test_a_source_that_is_too_short_gives_what_it_has(tmp_path):
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "short.txt").write_text(text_of(35)[0])
    data = {str(tmp_path / "short.txt"): 0.5, "self": 0.5}
    found = samples(language_model(), data=data, windows=20, length=10, tokenizer=tokenizer)
    assert found.count == 13
    assert found.notes == (f"{tmp_path / 'short.txt'} has 3 windows, and its share is 10",)


def test_what_is_measured_on_is_not_calibrated_on(tmp_path, monkeypatch):
    """The built-in text as part of a mixture leaves the windows of the perplexity out."""

    def numbered(text, **_):
        return {"input_ids": list(range(1000, 1000 + len(text)))}

    program = language_model()
    monkeypatch.setattr("graphprune.calibration.tokens.load_tokenizer", lambda path, **_: numbered)
    monkeypatch.setattr("graphprune.calibration.mixture.check_ids", lambda *rest: None)
    wanted = Calibration(data={"builtin": 0.5, "self": 0.5}, tokenizer=str(tmp_path))
    found = calibration_samples(program, wanted, 0)
    assert found.in_domain
    assert int((found.data >= 1000).sum()) == found.data.numel() // 2
    for text in measured_texts(program, wanted):
        measured = evaluation_windows(program, wanted, 0, text)
        assert not set(found.data.flatten().tolist()) & set(measured.flatten().tolist())


def test_a_mixture_needs_tokens():
    with pytest.raises(LoadError, match="only what a model reads as token windows"):
        samples(pixels(), data={"a": "a.png", "b": "b.png"})


def test_every_source_gets_a_window(tmp_path):
    with pytest.raises(RecipeError, match="fewer windows than the mixture needs"):
        samples(language_model(), data={"self": 0.9, "builtin": 0.1}, windows=2)


@pytest.mark.parametrize(
    ("shares", "total", "counts"),
    [
        ([0.5, 0.25, 0.25], 8, [4, 2, 2]),
        ([1 / 3, 1 / 3, 1 / 3], 8, [3, 3, 2]),
        ([0.7, 0.3], 1, [1, 0]),
        ([0.1] * 10, 30, [3] * 10),
    ],
)
def test_largest_remainders(shares, total, counts):
    assert apportion(shares, total) == counts


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"a.txt": 0.5, "self": 0.6}, "add up to 1.1"),
        ({"a.txt": 0.5, "self": 0.4}, "add up to 0.9"),
        ({"a": "a.txt", "self": 1.0}, "leave nothing"),
        ({}, "calibration.data"),
        (
            {"a": {"sorce": "a.txt"}},
            "unknown key 'calibration.data.a.sorce'; did you mean 'source'?",
        ),
        ({"a.txt": 0}, "calibration.data"),
    ],
)
def test_mistakes_of_mixtures(data, message):
    with pytest.raises(RecipeError) as caught:
        Recipe.parse({"remove": {"ffn": 0.5}, "calibration": {"data": data}})
    assert message in str(caught.value)


def test_shares_are_shared():
    section = {"a": "a.txt", "b": {"source": "b.jsonl", "field": "chat"}, "self": "50%"}
    recipe = Recipe.parse({"remove": {"ffn": 0.5}, "calibration": {"data": section}})
    found = [(part.source, share) for part, share in recipe.calibration.shares()]
    assert found == [("a.txt", 0.25), ("b.jsonl", 0.25), ("self", 0.5)]
    assert Recipe.parse(recipe.model_dump(exclude_unset=True)) == recipe
