"""What stands beside a model goes with it, and modules after it follow its width."""

import json
from pathlib import Path

import pytest

from graphprune.emit.companions import copy_companions

POOLING = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}


def checkpoint(folder: Path, modules: list[dict[str, str]]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": 32}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"dense")
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 128}')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps(POOLING))
    return folder


def copied(source: Path, folder: Path, hidden: int) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": hidden}))
    copy_companions(source, folder)
    return folder


MODULES = [
    {"idx": "0", "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": "1", "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": "2", "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.N"},
]


@pytest.mark.parametrize("hidden", [32, 24])
def test_pooling_follows_the_width(tmp_path: Path, hidden: int) -> None:
    source = checkpoint(tmp_path / "dense", MODULES)
    (source / "2_Normalize").mkdir()  # it has no files
    new = copied(source, tmp_path / "new", hidden)
    assert json.loads((new / "1_Pooling/config.json").read_text()) == {
        **POOLING,
        "word_embedding_dimension": hidden,
    }
    names = {str(f.relative_to(new)) for f in new.rglob("*")}
    assert names == {
        "config.json", "tokenizer.json", "modules.json", "sentence_bert_config.json",
        "1_Pooling", "1_Pooling/config.json", "2_Normalize",
    }  # fmt: skip


@pytest.mark.parametrize(("hidden", "there"), [(32, True), (24, False)])
def test_modules_with_weights_only_fit_the_old_width(
    tmp_path: Path, hidden: int, there: bool
) -> None:
    source = checkpoint(tmp_path / "dense", MODULES)
    (source / "2_Normalize").mkdir()
    (source / "2_Normalize/model.safetensors").write_bytes(b"weights of 32 inputs")
    new = copied(source, tmp_path / "new", hidden)
    assert (new / "modules.json").exists() == there
    assert (new / "2_Normalize/model.safetensors").exists() == there
    assert (new / "tokenizer.json").exists()


@pytest.mark.parametrize("path", ["../elsewhere", "absent"])
def test_nothing_from_outside_the_checkpoint_is_copied(tmp_path: Path, path: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/secret.json").write_text("{}")
    source = checkpoint(tmp_path / "dense", [MODULES[0], {**MODULES[1], "path": path}])
    new = copied(source, tmp_path / "new", 32)
    assert not list(new.rglob("secret.json"))


@pytest.mark.parametrize("text", ["", "{", "{}", "[1]", '[{"path": "0_Transformer"}]'])
def test_other_lists_leave_a_plain_checkpoint(tmp_path: Path, text: str) -> None:
    source = checkpoint(tmp_path / "dense", MODULES)
    (source / "modules.json").write_text(text)
    new = copied(source, tmp_path / "new", 32)
    assert {f.name for f in new.iterdir()} == {"config.json", "tokenizer.json"}
