"""Windows of text and token ids: to calibrate on, and to measure a perplexity on."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import graphprune as gp
from calibration.helpers import samples, save_tokenizer, tagger, text_of
from graphprune.calibration.calibrate import calibration_samples
from graphprune.calibration.measured import evaluation_windows, measured_texts
from graphprune.calibration.sources.amounts import SCORES
from graphprune.calibration.sources.section import Calibration
from graphprune.errors import LoadError, RecipeError
from graphprune.streaming import batches
from streaming.oracle import tokens, traced
from zoo import decoders, encoders


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text_of(3000)[0])
    return str(path)


def llama():
    return traced(decoders.llama_gqa_4)[0]


def test_the_first_windows_of_two_texts(tmp_path, tokenizer, text):
    """The usual protocol: calibrate on one split, measure on another, from their beginnings."""
    other, ids = text_of(500, seed=1)
    (tmp_path / "other.txt").write_text(other)
    wanted = {"data": text, "text": str(tmp_path / "other.txt"), "windows": 6, "length": 20,
              "draw": "first", "tokenizer": tokenizer}  # fmt: skip
    found = samples(llama(), **wanted)
    assert torch.equal(found.data, text_of(120)[1].view(6, 20))
    assert torch.equal(found.windows, found.data)
    first, second = measured_texts(llama(), Calibration(**wanted))
    assert (first.source, second.source) == (wanted["text"], "builtin")
    measured = evaluation_windows(llama(), Calibration(**wanted), 0, first)
    assert torch.equal(measured, ids[:120].view(6, 20))
    assert (found.count, found.length, found.tokens, found.available) == (6, 20, 120, 150)
    assert (found.kind, found.in_domain, found.notes, found.seed) == ("text", False, (), None)
    assert found.described() == (
        f"6 of 150 windows of 20 tokens (120 tokens) from {text} (text), the first"
    )
    assert found.as_data()["tokens"] == 120
    assert "data" not in found.as_data()


@pytest.mark.parametrize("draw", ["random", "first"])
@pytest.mark.parametrize("length", [16, None])
def test_no_token_is_calibrated_and_measured_on(tmp_path, tokenizer, draw, length):
    """Every place of the text is a token of its own here: nothing may be in both."""
    path = tmp_path / "text.txt"
    path.write_text("x" * 2000)
    program = llama()

    def numbered(text, **_):
        return {"input_ids": list(range(len(text)))}

    wanted = Calibration(data=str(path), length=length, draw=draw, tokenizer=tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graphprune.calibration.tokens.load_tokenizer", lambda path, **_: numbered)
        patch.setattr("graphprune.calibration.mixture.check_ids", lambda *rest: None)
        found = calibration_samples(program, wanted, 3)
        measured = evaluation_windows(program, wanted, 3, measured_texts(program, wanted)[0])
        scored = calibration_samples(program, wanted, 3, SCORES)
    assert found.in_domain
    assert found.data.shape == ((16, 64) if length is None else (93, 16))
    assert not set(found.data.flatten().tolist()) & set(measured.flatten().tolist())
    assert not set(scored.data.flatten().tolist()) & set(measured.flatten().tolist())
    assert len(found.data.unique()) == found.data.numel()
    assert scored.data.shape == (16, found.length)
    if draw == "first":
        assert torch.equal(measured.flatten(), torch.arange(measured.numel()))
        assert found.data[0, 0] == measured.numel()


def test_draws_are_distinct_and_repeatable(tokenizer, text):
    wanted = {"data": text, "length": 10, "windows": 40, "tokenizer": tokenizer}
    first = samples(llama(), seed=1, **wanted)
    assert torch.equal(first.data, samples(llama(), seed=1, **wanted).data)
    assert not torch.equal(first.data, samples(llama(), seed=2, **wanted).data)
    assert first.seed == 1


def test_any_number_of_windows(tokenizer, text):
    """Defect W1 of the reference code: 128 windows were built in."""
    for count in (3, 200):
        wanted = {"data": text, "length": 5, "windows": count, "tokenizer": tokenizer}
        assert samples(llama(), **wanted).data.shape == (count, 5)


def test_documents_shorter_than_a_window_are_joined(tmp_path, tokenizer):
    """Defect W2 of the reference code: it looked for a longer document for ever."""
    path = tmp_path / "short.jsonl"
    path.write_text("\n".join(json.dumps({"text": "abc"}) for _ in range(300)))
    found = samples(llama(), data=str(path), tokenizer=tokenizer)
    assert found.length == llama().default_window() == 64
    assert found.count == found.available == (300 * 5 - 2 - 11 * 64) // 64


def test_too_little_text_says_how_much_there_is(tokenizer, text):
    with pytest.raises(LoadError, match=r"it has 3000 tokens, and 5 x 700 are needed"):
        samples(llama(), data=text, text="builtin", windows=5, length=700, tokenizer=tokenizer)
    beside = r"it has 1200 tokens beside 1800 for the perplexity, and 4 x 450 are needed"
    with pytest.raises(LoadError, match=beside):
        samples(llama(), data=text, windows=4, length=450, tokenizer=tokenizer)


def test_the_same_text_is_noticed_under_another_name(tmp_path, tokenizer, text):
    copy = tmp_path / "copy.txt"
    shutil.copy(text, copy)
    other = tmp_path / "other.txt"
    other.write_text(text_of(3000, seed=4)[0])
    wanted = {"data": text, "windows": 4, "length": 16, "tokenizer": tokenizer}
    same = samples(llama(), text=str(copy), **wanted)
    assert same.in_domain
    assert "same text" in same.notes[0]
    assert not samples(llama(), text=str(other), **wanted).in_domain
    assert samples(llama(), **wanted).in_domain
    # No perplexity is measured of an encoder, and nothing set aside for it.
    encoder = samples(traced(encoders.bert)[0], **wanted | {"windows": 187})
    assert not encoder.in_domain
    assert encoder.count == encoder.available == 187


def test_token_ids_in_every_form(tmp_path):
    ids = tokens(6, 10)
    np.save(tmp_path / "a.npy", ids.numpy().astype("uint16"))
    np.save(tmp_path / "big.npy", ids.numpy().astype(">i4"))
    np.save(tmp_path / "flat.npy", ids.flatten().numpy())
    np.savez(tmp_path / "a.npz", input_ids=ids.numpy())
    save_file({"anything": ids.to(torch.int32)}, tmp_path / "a.safetensors")
    (tmp_path / "a.json").write_text(json.dumps(ids.tolist()))
    (tmp_path / "flat.json").write_text(json.dumps(ids.flatten().tolist()))
    (tmp_path / "named.json").write_text(json.dumps({"input_ids": ids.tolist()}))
    lines = [json.dumps({"input_ids": row}) for row in ids.tolist()]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for name in ("a.npy", "big.npy", "a.npz", "a.safetensors", "a.json", "named.json", "a.jsonl"):
        found = samples(llama(), data=str(tmp_path / name), draw="first")
        assert torch.equal(found.data, ids), name
        assert (found.kind, found.data.dtype) == ("token ids", torch.int64)
        again = samples(llama(), data=str(tmp_path / name), draw="first", length=7, windows=5)
        assert torch.equal(again.data, ids.flatten()[:35].view(5, 7)), name
    for name in ("flat.npy", "flat.json"):
        found = samples(llama(), data=str(tmp_path / name), length=10, draw="first")
        assert torch.equal(found.data, ids), name
        with pytest.raises(LoadError, match="it has 60 tokens, and 1 x 64 are needed"):
            samples(llama(), data=str(tmp_path / name))


def test_token_ids_that_a_model_has_no_row_for(tmp_path, tokenizer):
    np.save(tmp_path / "a.npy", np.array([[3, 96]]))
    with pytest.raises(LoadError, match="token 96 is outside of its vocabulary of 96"):
        samples(llama(), data=str(tmp_path / "a.npy"))
    np.save(tmp_path / "a.npy", np.array([[3, -1]]))
    with pytest.raises(LoadError, match="token -1 is outside"):
        samples(llama(), data=str(tmp_path / "a.npy"))
    (tmp_path / "a.txt").write_text("!!+!!")  # "+" is token 10
    with pytest.raises(LoadError, match="token 10 is outside of its vocabulary of 10"):
        samples(tagger(), data=str(tmp_path / "a.txt"), length=5, tokenizer=tokenizer)


@pytest.mark.parametrize("kind", ["float32", "bool", "complex64", "3d", "empty", "text"])
def test_arrays_that_are_no_token_ids(tmp_path, kind):
    made = {"3d": np.zeros((1, 2, 3), int), "empty": np.zeros((0, 4), int), "text": np.array(["a"])}
    np.save(tmp_path / "a.npy", made[kind] if kind in made else np.zeros((2, 3), kind))
    with pytest.raises(LoadError, match=r"holds no (token ids|numbers)") as caught:
        samples(llama(), data=str(tmp_path / "a.npy"))
    assert "a.npy" in str(caught.value)


def test_windows_follow_what_a_trace_allows(tmp_path):
    assert tagger().default_window() == 40
    fixed = gp.trace(torch.nn.Embedding(7, 3).eval(), (torch.zeros(2, 6, dtype=torch.int64),),
                     None, ({0: torch.export.Dim.AUTO, 1: 6},))  # fmt: skip
    assert fixed.default_window() == 6
    np.save(tmp_path / "a.npy", np.arange(90) % 7)
    assert samples(fixed, data=str(tmp_path / "a.npy")).data.shape == (15, 6)


def test_an_encoder_decoder_reads_each_half(tmp_path):
    program = traced(encoders.t5)[0]
    ids = tokens(3, 11)
    np.save(tmp_path / "a.npy", ids.numpy())
    found = samples(program, data=str(tmp_path / "a.npy"), draw="first")
    start = program.source.config.decoder_start_token_id
    assert torch.equal(found.data["input_ids"], ids[:, :5])
    assert torch.equal(found.data["attention_mask"], torch.ones(3, 5, dtype=torch.int64))
    expected = torch.cat([torch.full((3, 1), start), ids[:, 5:-1]], dim=1)
    assert torch.equal(found.data["decoder_input_ids"], expected)
    assert found.windows is None
    (made,) = batches(program, found.data, 3)
    with torch.no_grad():
        assert program.module(**made.kwargs).logits.shape == (3, 6, 96)


def test_text_without_a_tokenizer_and_for_models_that_do_not_read(tmp_path, text):
    with pytest.raises(LoadError, match="text needs a tokenizer"):
        samples(llama(), data=text)
    with pytest.raises(LoadError, match="the directory has no tokenizer"):
        samples(llama(), data=text, tokenizer=str(tmp_path))
    with pytest.raises(LoadError, match="the model doesn't read token ids"):
        samples(gp.trace(torch.nn.Linear(3, 2).eval(), (torch.zeros(1, 3),)), data=text)


def test_options_that_mean_nothing_are_refused(text):
    for option in ({"mean": 0.5}, {"split": "train"}, {"field": "body"}, {"size": 8}):
        (name,) = option
        with pytest.raises(RecipeError, match=f"'{name}' means nothing for text"):
            samples(llama(), data=text, **option)
