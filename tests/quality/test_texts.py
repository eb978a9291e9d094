"""Which texts a model is measured on, that none of it is calibrated on, and how windows begin."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import graphprune as gp
from graphprune.calibration.calibrate import calibration_samples
from graphprune.calibration.measured import evaluation_windows, measured_texts
from graphprune.calibration.sources.amounts import SCORES, WEIGHTS
from graphprune.calibration.sources.section import Calibration
from graphprune.calibration.text.read import load_tokenizer, windows
from graphprune.calibration.text.tokenising import begin_token
from graphprune.frontends import load_traced
from graphprune.measure.measuring import measure_quality
from graphprune.streaming import text_windows
from quality.helpers import BEGIN, LETTERS, by_hand, save_model, save_text, save_tokenizer


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "dense")


@pytest.fixture(scope="module")
def program(dense: Path) -> gp.Program:
    return load_traced(str(dense))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    save_text(tmp_path / "text.txt", 4000, 0)
    return tmp_path / "text.txt"


def sources(program: gp.Program, **wanted: Any) -> list[str]:
    return [text.source for text in measured_texts(program, Calibration(**wanted))]


def test_there_are_always_two_kinds(program: gp.Program, text: Path, tmp_path: Path) -> None:
    path, other = str(text), str(tmp_path / "other.txt")
    save_text(Path(other), 500, 1)
    (tmp_path / "ids.json").write_text(json.dumps([[5, 6, 7, 8]]))
    own = ["builtin", "help"]
    assert sources(program) == own
    assert sources(program, data="self") == own
    assert sources(program, data=str(tmp_path / "ids.json")) == own
    assert sources(program, data={"self": 0.5, "builtin": 0.5}) == own
    assert sources(program, text="builtin") == own
    assert sources(program, text="help") == ["help", "builtin"]
    assert sources(program, data=path) == [path, "builtin"]
    assert sources(program, data=path, text=other) == [other, "builtin"]
    assert sources(program, text=[path, other]) == [path, other]
    assert sources(program, text=[path, path]) == [path, "builtin"]
    # Of a mixture, files that can spare windows: here 4000 tokens, and 500, in windows of 31.
    mixture = {"a": path, "b": other, "self": 0.2}
    assert sources(program, data=mixture, length=32) == [path, "builtin"]


def spans(tokens: torch.Tensor) -> set[tuple[int, ...]]:
    """The windows without their first token, piece by piece: no piece of random text recurs."""
    rows = tokens[:, 1:].tolist()
    return {tuple(row[i : i + 6]) for row in rows for i in range(len(row) - 5)}


@pytest.mark.parametrize("draw", ["random", "first"])
@pytest.mark.parametrize("form", ["data", "copy", "jsonl", "several", "mixture"])
def test_nothing_is_calibrated_and_measured_on(
    program: gp.Program, text: Path, tmp_path: Path, draw: str, form: str
) -> None:
    copy, lines, other = tmp_path / "copy.txt", tmp_path / "same.jsonl", tmp_path / "other.txt"
    shutil.copy(text, copy)
    lines.write_text(json.dumps({"body": text.read_text()}))
    save_text(other, 4000, 7)
    forms: dict[str, dict[str, Any]] = {
        "data": {"data": str(text)},
        "copy": {"data": str(text), "text": str(copy)},
        "jsonl": {"data": str(lines), "field": "body", "text": str(copy)},
        "several": {"data": str(text), "text": [str(other), str(copy), "builtin"]},
        "mixture": {"data": {"a": str(text), "b": {"source": str(lines), "field": "body"}, "c":
                             str(other)}, "text": [str(other), str(copy)]},
    }  # fmt: skip
    wanted = Calibration.model_validate({"draw": draw, "length": 32, **forms[form]})
    measured = set[tuple[int, ...]]()
    for one in measured_texts(program, wanted):
        measured |= spans(evaluation_windows(program, wanted, 3, one))
    for amount in (SCORES, WEIGHTS):
        found = calibration_samples(program, wanted, 3, amount)
        assert len(spans(found.data)) > 250
        assert not spans(found.data) & measured
        assert found.in_domain


def test_windows_begin_as_the_tokenizer_begins_a_text(
    program: gp.Program, dense: Path, tmp_path: Path
) -> None:
    """Counted by hand: the token, and one token less of the text."""
    path = tmp_path / "text.txt"
    ids = save_text(path, 700, 4)
    wanted = Calibration(data=str(path), windows=5, length=12, draw="first")
    first = measured_texts(program, wanted)[0]
    measured = evaluation_windows(program, wanted, 0, first).numpy()
    assert np.array_equal(measured, by_hand(ids, 5, 12))
    found = calibration_samples(program, wanted, 0)
    assert np.array_equal(found.data.numpy(), by_hand(ids[5 * 11 :], 5, 12))
    assert found.available == (700 - 5 * 11) // 11
    tokenizer = load_tokenizer(dense)
    cut = windows(tokenizer, path.read_text(), length=12)
    assert np.array_equal(cut.numpy(), by_hand(ids, 700 // 11, 12))
    streamed = text_windows(program, path, count=4, length=9, seed=None)
    assert np.array_equal(streamed.numpy(), by_hand(ids, 4, 9))
    own = calibration_samples(program, Calibration(windows=3, length=16), 0).data
    assert own[:, 0].tolist() == [BEGIN] * 3


def test_windows_of_token_ids_stay_as_they_are(program: gp.Program, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(4, 90, (4, 10))
    np.save(tmp_path / "ids.npy", ids)
    wanted = Calibration(data=str(tmp_path / "ids.npy"), draw="first")
    assert np.array_equal(calibration_samples(program, wanted, 0).data.numpy(), ids)


def test_the_tokenizers_own_encoding_decides(tmp_path: Path) -> None:
    """Both know a begin-of-text token, and one adds it; a token at the end is none."""
    from tokenizers import processors
    from transformers import AutoTokenizer

    for name, begins in (("adds", True), ("knows", False)):
        save_tokenizer(tmp_path / name, begins=begins)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        assert tokenizer.bos_token_id == BEGIN
        assert begin_token(tokenizer) == (BEGIN if begins else None)
    ends = processors.TemplateProcessing("$A </s>", None, [("</s>", 2)])
    tokenizer.backend_tokenizer.post_processor = ends
    assert tokenizer("a b")["input_ids"][-1] == 2
    assert begin_token(tokenizer) is None
    assert windows(tokenizer, LETTERS[:6], length=3).tolist() == [[4, 5, 6], [7, 8, 9]]


def test_defaults_are_thirty_two_windows_of_256_tokens(program: gp.Program, tmp_path: Path) -> None:
    """Or as long as the model takes, and at most half of a text that is short."""
    long, short = tmp_path / "long.txt", tmp_path / "short.txt"
    save_text(long, 40_000, 0)
    save_text(short, 127 * 11, 1)
    wanted = Calibration(text=(str(long), str(short)))
    found = [evaluation_windows(program, wanted, 0, one) for one in measured_texts(program, wanted)]
    assert [tuple(one.shape) for one in found] == [(32, 128), (5, 128)]
    wide = load_traced(str(save_model(tmp_path / "wide", max_position_embeddings=512)))
    assert evaluation_windows(wide, wanted, 0, measured_texts(wide, wanted)[0]).shape == (32, 256)


def test_one_text_that_cannot_be_read_leaves_the_other(
    program: gp.Program, text: Path, tmp_path: Path
) -> None:
    wanted = Calibration(text=(str(tmp_path / "none.txt"), str(text)), windows=3, length=16)
    assert program.module is not None
    models = (program.module, program.module)
    found = measure_quality(program, models, wanted, 0, lambda stage: None)
    assert list(found.pairs) == [str(text)]
    (note,) = found.notes
    assert note.startswith(f"quality on {tmp_path / 'none.txt'} not measured: the data does not")
