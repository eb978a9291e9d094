"""Saved data sets, arrays, JSON, images, recordings and functions; and everything broken."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import graphprune as gp
from calibration.helpers import gradient, pixels, samples, save_tokenizer, tagger
from graphprune.calibration.programs import batches as any_batches
from graphprune.errors import LoadError, PlanError, RecipeError
from graphprune.recipe.recipe import Recipe
from graphprune.streaming import batches
from streaming.oracle import tokens, traced
from zoo import decoders, encoders

PAGE = Path(__file__).parents[2] / "docs" / "calibration-data.md"


def llama():
    return traced(decoders.llama_gqa_4)[0]


def save_dataset(folder, columns, shards=1, split=None):
    """What ``Dataset.save_to_disk`` writes: Arrow streams, and JSON that names them."""
    folder.mkdir(parents=True)
    table = pa.table(columns)
    names = []
    size = -(-len(table) // shards)
    for shard in range(shards):
        names.append(f"data-{shard:05}-of-{shards:05}.arrow")
        with pa.OSFile(str(folder / names[-1]), "wb") as sink:
            part = table.slice(shard * size, size)
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(part)
    state = {"_data_files": [{"filename": name} for name in names], "_split": split}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_a_data_set_of_text(tmp_path, tokenizer):
    rows = [f"{i:03}" for i in range(90)]
    save_dataset(tmp_path / "one", {"text": rows, "body": ["+" * 9] * 90}, shards=4)
    wanted = {"data": str(tmp_path / "one"), "text": "builtin", "length": 9, "draw": "first",
              "windows": 3, "tokenizer": tokenizer}  # fmt: skip
    found = samples(llama(), **wanted)
    # Blank lines between rows are no letter of the tokenizer: its unknown token, 93.
    expected = [t for r in rows for t in (*(15 + int(d) for d in r), 93, 93)]
    assert found.data.flatten().tolist() == expected[:27]
    assert samples(llama(), field="body", **wanted).data.unique().tolist() == [10, 93]


def test_splits_and_columns_of_a_data_set(tmp_path, tokenizer):
    for split, letter in (("train", "A"), ("test", "B")):
        save_dataset(tmp_path / "two" / split, {"text": [letter * 64]}, split=split)
    splits = tmp_path / "two" / "dataset_dict.json"
    splits.write_text(json.dumps({"splits": ["train", "test"]}))
    wanted = {"data": str(tmp_path / "two"), "text": "builtin", "length": 8, "windows": 2,
              "tokenizer": tokenizer}  # fmt: skip
    assert samples(llama(), **wanted).data.unique().tolist() == [32]
    found = samples(llama(), split="test", **wanted)
    assert (found.split, found.data.unique().tolist()) == ("test", [33])
    assert "split test" in found.described()
    with pytest.raises(LoadError, match="has no split 'dev'") as caught:
        samples(llama(), split="dev", **wanted)
    assert "train, test" in str(caught.value)
    with pytest.raises(LoadError, match="has no column 'body'") as caught:
        samples(llama(), field="body", **wanted)
    assert "its columns are text" in str(caught.value)
    splits.write_text(json.dumps({"splits": ["../one"]}))
    with pytest.raises(LoadError, match="no split"):
        samples(llama(), split="../one", **wanted)


def test_a_data_set_of_token_ids_without_its_padding(tmp_path):
    columns = {
        "input_ids": [[5, 6, 7, 0], [8, 9, 0, 0]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 0, 0]],
    }
    folder = save_dataset(tmp_path / "ids", columns)
    found = samples(llama(), data=str(folder), length=5)
    assert found.data.tolist() == [[5, 6, 7, 8, 9]]


def test_a_data_set_of_images(tmp_path):
    raw = []
    for value in (40, 200):
        Image.new("RGB", (12, 8), (value,) * 3).save(tmp_path / "a.png")
        raw.append({"bytes": (tmp_path / "a.png").read_bytes(), "path": None})
    folder = save_dataset(tmp_path / "images", {"image": raw})
    found = samples(pixels(), data=str(folder), mean=0, std=1, draw="first")
    assert found.data.shape == (2, 3, 8, 12)
    torch.testing.assert_close(found.data[:, 0, 0, 0], torch.tensor([40 / 255, 200 / 255]))
    outside = save_dataset(tmp_path / "outside", {"image": [{"bytes": None, "path": "/a.png"}]})
    with pytest.raises(LoadError, match="names files that it doesn't hold"):
        samples(pixels(), data=str(outside))


def test_damaged_data_sets(tmp_path, monkeypatch):
    folder = save_dataset(tmp_path / "a", {"text": ["hello " * 500]})
    (file,) = folder.glob("*.arrow")
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(LoadError, match="can't be read") as caught:
        samples(llama(), data=str(folder))
    assert file.name in str(caught.value)
    file.unlink()
    with pytest.raises(LoadError, match="does not exist"):
        samples(llama(), data=str(folder))
    state = folder / "state.json"
    state.write_text(json.dumps({"_data_files": [{"filename": "../b.arrow"}]}))
    with pytest.raises(LoadError, match="lies outside"):
        samples(llama(), data=str(folder))
    state.write_text("{")
    with pytest.raises(LoadError, match="not JSON"):
        samples(llama(), data=str(folder))
    state.write_text("{}")
    with pytest.raises(LoadError, match="names no files"):
        samples(llama(), data=str(folder))
    number = save_dataset(tmp_path / "n", {"label": [1, 2]})
    with pytest.raises(LoadError, match="has no column text"):
        samples(llama(), data=str(number))
    with pytest.raises(LoadError, match="its type is int64"):
        samples(llama(), data=str(number), field="label")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(LoadError, match="pyarrow, which is not installed") as caught:
        samples(llama(), data=str(number))
    assert "graphprune[data]" in str(caught.value)


def test_arrays_by_the_names_of_inputs(tmp_path):
    program = traced(encoders.t5)[0]
    ids = tokens(4, 9)
    arrays = {"input_ids": ids, "attention_mask": torch.ones_like(ids),
              "decoder_input_ids": ids.clone()}  # fmt: skip
    np.savez(tmp_path / "a.npz", **{n: t.numpy().astype("int32") for n, t in arrays.items()})
    save_file(arrays, tmp_path / "a.safetensors")
    for name in ("a.npz", "a.safetensors"):
        found = samples(program, data=str(tmp_path / name), draw="first", windows=3)
        assert found.data.keys() == arrays.keys()
        assert torch.equal(found.data["decoder_input_ids"], ids[:3])
        assert (found.kind, found.count, found.tokens) == ("arrays", 3, 54)
        assert found.data["input_ids"].dtype == torch.int64
        batches(program, found.data)
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    np.savez(tmp_path / "b.npz", input_ids=ids.numpy(), attention_mask=mask.numpy())
    found = samples(llama(), data=str(tmp_path / "b.npz"))
    assert found.tokens == 24  # padding doesn't count
    assert batches(llama(), found.data)[0].valid["input_ids"].sum() == 6
    cases = {
        "it lacks attention_mask": {"input_ids": ids, "decoder_input_ids": ids.clone()},
        "the model doesn't read labels": {**arrays, "labels": ids.clone()},
        "different numbers of samples": {**arrays, "attention_mask": torch.ones(3, 9).long()},
        "dtype of another kind": {**arrays, "input_ids": ids.float()},
        "the sizes that": {**arrays, "input_ids": ids[..., None]},
        "token 96 is outside": {**arrays, "decoder_input_ids": ids * 0 + 96},
        "token -1 is outside": {**arrays, "input_ids": ids * 0 - 1},
    }
    for message, made in cases.items():
        save_file({n: t.contiguous() for n, t in made.items()}, tmp_path / "bad.safetensors")
        with pytest.raises(LoadError, match=message):
            samples(program, data=str(tmp_path / "bad.safetensors"))
    with pytest.raises(LoadError, match=r"4, and calibration\.windows is 5"):
        samples(program, data=str(tmp_path / "a.npz"), windows=5)


def test_an_array_for_the_only_input(tmp_path):
    x = np.random.default_rng(0).standard_normal((5, 3, 8, 12))
    np.save(tmp_path / "x.npy", x)
    found = samples(pixels(), data=str(tmp_path / "x.npy"), draw="first", windows=2)
    torch.testing.assert_close(found.data, torch.from_numpy(x[:2]).float())
    batches(pixels(), found.data)
    np.save(tmp_path / "x.npy", x[..., :11])
    with pytest.raises(LoadError, match=r"the model reads \[samples, 3, 8, 12\]"):
        samples(pixels(), data=str(tmp_path / "x.npy"))
    np.save(tmp_path / "x.npy", (x * 0).astype("uint8"))
    with pytest.raises(LoadError, match="dtype of another kind"):
        samples(pixels(), data=str(tmp_path / "x.npy"))
    x[3, 0, 0, 0] = np.nan
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(LoadError, match="NaN or infinite") as caught:
        samples(pixels(), data=str(tmp_path / "x.npy"))
    assert "sample 3" in str(caught.value)


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_files_that_are_damaged_or_would_be_executed(tmp_path):
    loaded = tmp_path / "loaded"
    pickled = np.array([Evil(str(loaded))], dtype=object)
    np.save(tmp_path / "evil.npy", pickled, allow_pickle=True)
    np.savez(tmp_path / "evil.npz", input_ids=pickled)
    np.save(tmp_path / "cut.npy", np.zeros((50, 50), int))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-9])
    np.savez(tmp_path / "cut.npz", np.zeros((50, 50), int))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:-9])
    save_file({"a": torch.zeros(50)}, tmp_path / "cut.safetensors")
    cut = (tmp_path / "cut.safetensors").read_bytes()[:-9]
    (tmp_path / "cut.safetensors").write_bytes(cut)
    for name in ("text.npy", "text.npz", "text.safetensors"):
        (tmp_path / name).write_text("just text")
    (tmp_path / "a.pt").write_bytes(b"x")
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    (tmp_path / "bad.json").write_text('{"text": [1, 2')
    (tmp_path / "odd.json").write_text('[{"body": "x"}]')
    (tmp_path / "mixed.jsonl").write_text('"a"\n[1, 2]')
    (tmp_path / "huge.json").write_text(f"[{2**70}]")
    (tmp_path / "odd.jsonl").write_text('{"body": "x"}')
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "nothing").mkdir()
    cases = {
        "evil.npy": "Python objects", "evil.npz": "Python objects", "cut.npy": "can't be read",
        "cut.npz": "can't be read", "cut.safetensors": "can't be read", "text.npy": "no .npy file",
        "text.npz": "no .npz file", "text.safetensors": "can't be read",
        "a.pt": "Python objects", "bad.txt": "byte 2 is not UTF-8", "bad.json": "not JSON",
        "odd.json": "its entries are body; name one with field", "mixed.jsonl": "token ids stand",
        "huge.json": "too large", "odd.jsonl": "odd.jsonl:1", "empty.json": "no token ids",
        "nothing": "no calibration data", "absent.txt": "does not exist",
        "absent.npy": "does not exist", "absent.png": "does not exist",
    }  # fmt: skip
    for name, message in cases.items():
        with pytest.raises(LoadError, match=message) as caught:
            samples(llama(), data=str(tmp_path / name))
        assert name in str(caught.value)
    assert not loaded.exists()


CODE = """
import itertools
import numpy as np
import torch
IDS = torch.arange(40).view(8, 5)
def windows(): return IDS
def arrays(): return {"input_ids": IDS.numpy()}
def forever(): return ({"input_ids": IDS[i % 8][None]} for i in itertools.count())
def late():
    yield IDS[:1]
    raise KeyError("gone")
def broken(): return 1 / 0
def number(): return 3
def large(): return IDS + 90
def wrong(): return {"ids": IDS}
"""


def test_a_function(tmp_path):
    (tmp_path / "own.py").write_text(CODE)
    program, ids = llama(), torch.arange(40).view(8, 5)

    def call(name, **wanted):
        return samples(program, data=f"{tmp_path}/own.py:{name}", **wanted)

    found = call("windows", windows=3)
    assert torch.equal(found.windows, ids[:3])
    assert (found.kind, found.count, found.available, found.tokens) == ("function", 3, 8, 15)
    assert torch.equal(call("arrays").data, ids)
    assert torch.equal(call("IDS").data, ids)
    endless = call("forever", windows=11)
    assert endless.count == 11
    made = batches(program, endless.data)
    assert torch.equal(made[9].kwargs["input_ids"], ids[1:2])
    with pytest.raises(LoadError, match="the function raised an error") as caught:
        call("late")
    assert "KeyError" in str(caught.value)
    with pytest.raises(LoadError, match="the function raised an error"):
        call("broken")
    with pytest.raises(LoadError, match="there is no 'window'"):
        call("window")
    with pytest.raises(LoadError, match="token 99 is outside"):
        call("large")
    with pytest.raises(LoadError, match="it lacks input_ids; the model doesn't read ids"):
        call("wrong")
    with pytest.raises(PlanError, match="is no calibration data"):
        call("number")
    with pytest.raises(LoadError, match=r"8, and calibration\.windows is 9"):
        call("windows", windows=9)
    with pytest.raises(RecipeError, match="'mean' means nothing for a function"):
        call("windows", mean=0)


def test_the_function_of_the_documentation(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (code,) = (block for block in blocks if "def samples" in block)
    (tmp_path / "own.py").write_text(code)
    found = samples(llama(), data=f"{tmp_path}/own.py:samples", windows=7)
    lengths = {b.kwargs["input_ids"].shape[1] for b in batches(llama(), found.data)}
    assert found.count == 7
    assert len(lengths) > 1


def test_the_recipes_of_the_documentation():
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    first, shares, names, last = [yaml.safe_load(block) for block in blocks]
    wanted = Recipe.parse(first).calibration
    assert (wanted.data, wanted.text, wanted.draw) == ("valid.txt", ("test.txt",), "first")
    for mixture, sources in (
        (shares, {"self": 0.5, "web.txt": 0.3, "chat.jsonl": 0.2}),
        (names, {"wiki.txt": 0.25, "chat.jsonl": 0.25, "self": 0.5}),
    ):
        wanted = Recipe.parse({"remove": {"ffn": 0.5}, **mixture}).calibration
        assert {part.source: share for part, share in wanted.shares()} == sources
    wanted = Recipe.parse(last).calibration
    assert (wanted.windows, wanted.size, wanted.mean) == (64, 256, (0.485, 0.456, 0.406))
    assert wanted.length is None


class Two(nn.Module):
    def forward(self, x, *, scale):
        return x * scale


def test_inputs_by_place_and_by_name(tmp_path):
    """A model traced on both takes a mapping of all names."""
    program = gp.trace(Two().eval(), (torch.zeros(2, 3),), {"scale": torch.zeros(2, 3)})
    x, scale = np.ones((4, 3), "float32"), np.full((4, 3), 2, "float32")
    np.savez(tmp_path / "a.npz", x=x, scale=scale)
    found = samples(program, data=str(tmp_path / "a.npz"), draw="first")
    made = batches(program, found.data, 4)[0]
    assert torch.equal(made.args[0], torch.ones(4, 3))
    assert torch.equal(made.kwargs["scale"], torch.full((4, 3), 2.0))


def test_onnx_models(tmp_path, tokenizer):
    """Names, sizes and types come from the file; samples are arrays by name."""
    gp.apply(tagger(), gp.Plan(tagger().fingerprint, {})).save(tmp_path / "t.onnx", "onnx")
    program = gp.load(str(tmp_path / "t.onnx"))
    (name,) = [v.name for v in program.model.graph.inputs]
    np.save(tmp_path / "ids.npy", np.arange(60).reshape(6, 10) % 10)
    found = samples(program, data=str(tmp_path / "ids.npy"), draw="first", windows=4)
    assert found.data[name].dtype == np.int64
    assert found.data[name].tolist() == (np.arange(40).reshape(4, 10) % 10).tolist()
    assert (found.count, found.length, found.tokens) == (4, 10, 40)
    np.save(tmp_path / "ids.npy", np.full((2, 3), 10))
    with pytest.raises(LoadError, match="token 10 is outside of its vocabulary of 10"):
        samples(program, data=str(tmp_path / "ids.npy"))
    (tmp_path / "a.txt").write_text('!"#$' * 20)
    wanted = {"data": str(tmp_path / "a.txt"), "length": 8}
    with pytest.raises(LoadError, match="text needs a tokenizer"):
        samples(program, **wanted)
    text = samples(program, tokenizer=tokenizer, **wanted)
    assert text.data[name].shape == (10, 8)
    assert text.data[name][0].tolist() == [0, 1, 2, 3] * 2
    gp.apply(pixels(), gp.Plan(pixels().fingerprint, {})).save(tmp_path / "p.onnx", "onnx")
    images = gp.load(str(tmp_path / "p.onnx"))
    Image.fromarray(gradient(12, 8)).save(tmp_path / "a.png")
    (name,) = [v.name for v in images.model.graph.inputs]
    found = samples(images, data=str(tmp_path / "a.png"), mean=0, std=1 / 255)
    np.testing.assert_allclose(found.data[name][0].transpose(1, 2, 0), gradient(12, 8), atol=1e-4)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.kinds = nn.Embedding(2, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, input_ids, attention_mask, token_type_ids, position_ids):
        x = self.table(input_ids) + self.kinds(token_type_ids) + position_ids[..., None]
        return self.out(x * attention_mask[..., None])


class Beside(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 3)

    def forward(self, input_ids, x):
        return self.table(input_ids) * x


def test_onnx_inputs_that_go_with_tokens(tmp_path):
    names = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
    example = {n: torch.ones(2, 5).long() for n in names}
    example["position_ids"] = torch.arange(5).repeat(2, 1)
    example["token_type_ids"] = torch.zeros(2, 5).long()
    program = gp.trace(Masked().eval(), (), example)
    gp.apply(program, gp.Plan(program.fingerprint, {})).save(tmp_path / "m.onnx", "onnx")
    ids = np.arange(27).reshape(3, 9) % 10
    np.save(tmp_path / "ids.npy", ids)
    onnx = gp.load(str(tmp_path / "m.onnx"))
    found = samples(onnx, data=str(tmp_path / "ids.npy"), draw="first")
    assert {n: v.tolist() for n, v in found.data.items()} == {
        "input_ids": ids.tolist(),
        "attention_mask": [[1] * 9] * 3,
        "token_type_ids": [[0] * 9] * 3,
        "position_ids": [list(range(9))] * 3,
    }
    made = any_batches(onnx, found.data, 2)
    assert [b.count for b in made] == [2, 1]
    again = samples(program, data=str(tmp_path / "ids.npy"), draw="first")
    assert {n: v.tolist() for n, v in again.data.items()} == {
        n: v.tolist() for n, v in found.data.items()
    }


def test_inputs_that_tokens_do_not_determine(tmp_path):
    example = {"input_ids": torch.ones(2, 5).long(), "x": torch.randn(2, 5, 3)}
    program = gp.trace(Beside().eval(), (), example)
    np.save(tmp_path / "ids.npy", np.zeros((3, 5), int))
    with pytest.raises(LoadError, match="token windows don't determine all inputs") as caught:
        samples(program, data=str(tmp_path / "ids.npy"))
    assert "input x" in str(caught.value)
