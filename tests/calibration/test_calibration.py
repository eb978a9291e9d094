"""Text sources and token windows."""

import json
from pathlib import Path

import pytest
import torch

from graphprune.calibration.text.read import read_text, windows
from graphprune.errors import LoadError


def letters(text: str, **_: object) -> dict[str, list[int]]:
    """A tokenizer of one token per character."""
    return {"input_ids": [ord(letter) for letter in text]}


def test_builtin_text_is_long_deterministic_english() -> None:
    text = read_text()
    assert text == read_text("builtin")
    assert len(text) > 250_000
    assert " the " in text


def test_text_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Größe\n", encoding="utf-8")
    assert read_text(tmp_path / "a.txt") == "Größe\n"


def test_jsonl_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "one", "id": 1}) + "\n\n" + json.dumps("two") + "\n")
    assert read_text(str(path)) == "one\n\ntwo"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b" \n", "empty"),
        ("binary.txt", b"ab\xff", "byte 2 is not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "x"}\n', "a.jsonl:2"),
        ("a.jsonl", b'{"text": 3}\n', "a.jsonl:1"),
        ("a.jsonl", b"{oops\n", "a.jsonl:1"),
        ("a.jsonl", b'"x"\n\n"\xff"\n', "byte 1 of line 3 is not UTF-8"),
        ("a.jsonl", b'"x"\n[1, 2]\n', "token ids stand where text is needed"),
        ("a.jsonl", b'"x"\n[1, "2"]\n', "a.jsonl:2"),
        ("a.jsonl", b"[" * 100_000, "nested too deeply"),
        ("empty.jsonl", b"\n", "empty"),
    ],
)
def test_files_without_text(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LoadError, match=message):
        read_text(tmp_path / name)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="does not exist"):
        read_text(tmp_path / "none.txt")
    with pytest.raises(LoadError, match="can't be read"):
        read_text(tmp_path)


def test_a_field_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "one", "body": "two"}))
    assert read_text(path, field="body") == "two"
    with pytest.raises(LoadError, match="its entries are text, body; name one with field"):
        read_text(path, field="title")


def test_a_long_source_counts_up_to_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphprune.calibration.text.read.READ", 10)
    (tmp_path / "a.txt").write_text("abcdefghi\u00e9 and so on", encoding="utf-8")
    assert read_text(tmp_path / "a.txt") == "abcdefghi"  # the next letter has two bytes
    (tmp_path / "a.jsonl").write_text('"abcd"\n"efgh"\n"ijkl"\nwhat is never read')
    assert read_text(tmp_path / "a.jsonl") == "abcd\n\nefgh\n\nij"


def test_lines_end_as_in_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\r\nb\rc\n")
    assert read_text(tmp_path / "a.txt") == "a\nb\nc\n"


def test_windows_are_cut_end_to_end() -> None:
    cut = windows(letters, "abcdefgh", length=3, count=2)
    assert cut.dtype == torch.int64
    assert cut.tolist() == [[97, 98, 99], [100, 101, 102]]
    assert windows(letters, "abcdefgh", length=2).shape == (4, 2)


def test_seeded_windows_are_distinct_and_repeatable() -> None:
    text = "".join(chr(200 + number) for number in range(400))
    first = windows(letters, text, length=4, count=20, seed=0)
    assert torch.equal(first, windows(letters, text, length=4, count=20, seed=0))
    assert not torch.equal(first, windows(letters, text, length=4, count=20, seed=1))
    assert torch.equal(first, windows(letters, text, length=4, count=30, seed=0)[:20])
    starts = first[:, 0].tolist()
    assert len(set(starts)) == 20
    assert all((start - 200) % 4 == 0 for start in starts)
    assert torch.equal(first[:, -1], first[:, 0] + 3)


def test_too_little_text_says_how_much_there_is() -> None:
    with pytest.raises(LoadError, match=r"it has 8 tokens, and 3 x 3 are needed"):
        windows(letters, "abcdefgh", length=3, count=3)
    with pytest.raises(LoadError, match=r"1 x 9 are needed"):
        windows(letters, "abcdefgh", length=9)
