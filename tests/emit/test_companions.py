"""What stands beside a model goes with it, and so do the modules that read its outputs."""

import json
from pathlib import Path

import pytest

from graphprune.emit.companions import copy_companions

MODULES = [
    {"idx": "0", "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": "1", "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": "2", "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.N"},
    {"idx": "3", "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"},
]
BESIDE = {
    "tokenizer.json": b"{}",
    "modules.json": json.dumps(MODULES).encode(),
    "sentence_bert_config.json": b'{"max_seq_length": 128}',
    "1_Pooling/config.json": b'{"word_embedding_dimension": 32}',
    "3_Dense/config.json": b'{"in_features": 32, "out_features": 8}',
    "3_Dense/nested/model.safetensors": b"weights of 32 inputs",
}


def checkpoint(folder: Path, modules: str = json.dumps(MODULES)) -> Path:
    written = {"config.json": b"{}", "model.safetensors": b"dense", **BESIDE}
    for name, content in {**written, "modules.json": modules.encode()}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "2_Normalize").mkdir()  # it has no files
    return folder


def copied(source: Path, folder: Path) -> dict[str, bytes]:
    folder.mkdir(parents=True)
    copy_companions(source, folder)
    files = [f for f in folder.rglob("*") if f.is_file()]
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in files}


def test_modules_are_copied_as_they_are(tmp_path: Path) -> None:
    source, new = checkpoint(tmp_path / "dense"), tmp_path / "new"
    assert copied(source, new) == BESIDE
    assert (new / "2_Normalize").is_dir()


@pytest.mark.parametrize("path", ["../elsewhere", "absent", "."])
def test_nothing_but_parts_of_the_checkpoint_is_copied(tmp_path: Path, path: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/secret.json").write_text("{}")
    listed = json.dumps([MODULES[0], {**MODULES[1], "path": path}])
    files = copied(checkpoint(tmp_path / "dense", listed), tmp_path / "out/new")
    assert set(files) == {"tokenizer.json", "modules.json", "sentence_bert_config.json"}
    assert list(tmp_path.rglob("secret.json")) == [tmp_path / "elsewhere/secret.json"]


@pytest.mark.parametrize("text", ["", "{", "{}", "[1]", '[{"path": "0_Transformer"}]'])
def test_other_lists_leave_a_plain_checkpoint(tmp_path: Path, text: str) -> None:
    files = copied(checkpoint(tmp_path / "dense", text), tmp_path / "new")
    assert set(files) == {"tokenizer.json"}
