"""Models larger than what may be held: new weights in files, the proof in float64, and shards."""

from __future__ import annotations

import copy
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

import graphprune as gp
from graphprune.checkpoints import memory
from graphprune.checkpoints.writing import write_weights
from graphprune.emit import hf

CUT = {"remove": {"ffn": 0.25}, "score": "magnitude", "repair": "none"}
TOKENS = torch.arange(2, 22).view(2, 10)


def write_llama(path, hidden, layers):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    model.save_pretrained(path)
    return model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "model"
    return path, write_llama(path, 32, 2)


@pytest.fixture
def nothing_held(monkeypatch):
    monkeypatch.setattr(memory, "HELD", 0)
    monkeypatch.setattr(memory, "SMALL", 1)


def place_of(tensor):
    """What the kernel has at a tensor's address: the inode of a file, and its name."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        area, _, _, _, inode, *name = line.split(maxsplit=5)
        start, end = (int(part, 16) for part in area.split("-"))
        if start <= tensor.data_ptr() < end:
            return int(inode), "".join(name)
    raise AssertionError


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_weights_that_are_not_held_are_in_files_without_a_name(source, tmp_path, monkeypatch):
    program = gp.load(str(source[0]))
    plan = gp.select(program, remove={"ffn": 0.25}, score="magnitude")
    held = gp.apply(program, plan)
    monkeypatch.setattr(memory, "HELD", 0)
    monkeypatch.setattr(memory, "SMALL", 1)
    slim = gp.apply(program, plan, folder=tmp_path)
    assert slim.weights.keys() == held.weights.keys()
    for name, wanted in held.weights.items():
        assert torch.equal(slim.weights[name], wanted)
        inode, file = place_of(slim.weights[name])
        assert inode, name
        assert file.startswith(str(tmp_path))
        assert file.endswith("(deleted)")
    assert not list(tmp_path.iterdir())
    certificate = gp.verify(program, plan, slim)
    assert (certificate.passed, certificate.dtype) == (True, "float64")


@pytest.mark.slow  # a compilation, and a process that opens what it wrote
def test_a_slim_model_that_is_not_held_is_written_in_shards(
    source, tmp_path, nothing_held, monkeypatch
):
    path, dense = source
    monkeypatch.setattr(hf, "write_weights", partial(write_weights, shard=8000))
    report = gp.compile(str(path), CUT, tmp_path / "slim")
    assert report.verified_in == "float64"
    index = json.loads((tmp_path / "slim/model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "slim").glob("*.safetensors"))
    assert len(files) > 2
    assert [f.name for f in files] == [
        f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)
    ]
    assert sorted(set(index["weight_map"].values())) == [f.name for f in files]
    sizes = 0
    for file in files:
        with safe_open(file, "pt") as opened:
            assert all(index["weight_map"][n] == file.name for n in opened.keys())  # noqa: SIM118
            sizes += sum(opened.get_tensor(n).nbytes for n in opened.keys())  # noqa: SIM118
    assert index["metadata"]["total_size"] == sizes
    slim = LlamaForCausalLM.from_pretrained(tmp_path / "slim")
    masked = copy.deepcopy(dense)
    for number, layer in enumerate(masked.model.layers):
        kept = set(map(tuple, slim.model.layers[number].mlp.up_proj.weight.tolist()))
        gone = [
            i for i, row in enumerate(layer.mlp.up_proj.weight.tolist()) if tuple(row) not in kept
        ]
        assert len(gone) == 16
        layer.mlp.down_proj.weight.data[:, gone] = 0
    with torch.no_grad():
        wanted = masked.double()(TOKENS).logits
        found = slim.double()(TOKENS).logits
        whole = copy.deepcopy(dense).double()(TOKENS).logits
    # Norms compute in float32 whatever the model is in.
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)
    assert (whole - wanted).abs().max() > 1e-3 * whole.abs().max()


@pytest.mark.slow  # two compilations
def test_masks_of_a_cut_model_that_is_not_held(source, tmp_path, nothing_held):
    recipe = {**CUT, "sparsify": {"method": "magnitude", "sparsity": 0.5}}
    gp.compile(str(source[0]), recipe, tmp_path / "files")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "HELD", 1 << 30)
        gp.compile(str(source[0]), recipe, tmp_path / "held")
    found, wanted = (
        LlamaForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("files", "held")
    )
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor)
        if "_proj" in name:
            assert int((tensor == 0).sum()) >= tensor.numel() // 2
