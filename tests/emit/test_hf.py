"""Hugging Face checkpoints: both forms, opened by plain transformers in a process of its own."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from emit.fakes import blocks, fake_slim, zeroed
from fresh import WAITING
from graphprune.checkpoints import self_contained as pruned
from graphprune.checkpoints import writing as checkpoint
from graphprune.checkpoints.patch import named_tensors
from graphprune.checkpoints.writing import write_weights
from graphprune.emit import hf
from graphprune.emit.hf import precheck, save
from graphprune.errors import EmitError, LoadError

IDS = {"input_ids": torch.arange(3, 25).reshape(2, 11)}

OPEN = """
import sys, torch, transformers
trust = sys.argv[2] == "trust"
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=trust)
with torch.no_grad():
    logits = model(torch.arange(3, 25).reshape(2, 11)).logits
torch.save([logits, "graphprune" in sys.modules], sys.argv[3])
"""


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def opened(directory, tmp_path, trust=False):
    """Logits from a fresh process without graphprune, and what it wrote to stderr."""
    target = tmp_path / "logits.pt"
    command = ["-c", OPEN, directory, "trust" if trust else "", target]
    environment = {
        **{k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    done = WAITING.run([str(part) for part in command], environment)
    assert done.returncode == 0, done.stderr
    logits, imported = torch.load(target, weights_only=True)
    assert not imported
    return logits, done.stderr


def random_weights(model):
    """Larger than transformers' initial ones, so that logits depend on everything."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


DECODER: dict[str, Any] = {
    "hidden_size": 60,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "vocab_size": 128,
    "use_cache": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def narrow(model, reference, width, **options):
    """Cut the residual width of a decoder: every dimension of 60 but those of the heads."""
    keep: dict[str, Any] = {
        name: tuple(width if size == 60 else None for size in tensor.shape)
        for name, tensor in named_tensors(model)
    }
    pair = (60, len(width))
    hints = {name: [pair] for name, _ in model.named_modules()}
    slim = fake_slim(model, keep, reference, IDS, hints=hints, **options)
    kept = {n: t for n, t in slim.weights.items() if n in reference.state_dict()}
    reference.load_state_dict(kept)
    return slim


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint with files beside its model."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("hub") / "tiny"
    model = random_weights(LlamaForCausalLM(LlamaConfig(**DECODER, tie_word_embeddings=True)))
    model.save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "LICENSE").write_text("mine")
    (path / "README.md").write_text("about the large model")
    (path / "pytorch_model.bin").write_bytes(b"a pickle")
    return path


def native_slim(source):
    model = LlamaForCausalLM.from_pretrained(source)
    config = LlamaConfig(
        **{**DECODER, "hidden_size": 36, "num_hidden_layers": 2}, tie_word_embeddings=True
    )
    width = [i for i in range(60) if i % 5 < 3]
    reference = LlamaForCausalLM(config)
    return narrow(model, reference, width, dropped={"model.layers": [1]}, path=source)


def test_native(source, tmp_path):
    slim = native_slim(source)
    assert precheck(slim) == []
    out = tmp_path / "out"
    save(slim, out)
    assert sorted(file.name for file in out.iterdir()) == [
        "LICENSE",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "graphprune_plan.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    original = json.loads((source / "config.json").read_text())
    assert json.loads((out / "config.json").read_text()) == {
        **original,
        "hidden_size": 36,
        "num_hidden_layers": 2,
    }
    assert json.loads((out / "graphprune_plan.json").read_text()) == {"schema": 1}
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert "lm_head.weight" not in set(file.keys())
        assert set(file.keys()) == set(slim.reference.state_dict()) - {"lm_head.weight"}
    logits, said = opened(out, tmp_path)
    torch.testing.assert_close(logits, slim.reference(**IDS).logits)
    assert said == ""


def test_a_field_that_no_shape_shows(tmp_path):
    """GPT-2's heads: 64 = 4 * 16 becomes 48 = 3 * 16, and 48 = 4 * 12 would load as well."""
    fields: dict[str, Any] = {
        "n_layer": 2,
        "n_positions": 64,
        "vocab_size": 128,
        "use_cache": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = random_weights(GPT2LMHeadModel(GPT2Config(n_embd=64, n_head=4, **fields)))
    config = GPT2Config(n_embd=48, n_head=3, n_inner=256, **fields)
    reference = GPT2LMHeadModel(config)
    rows = blocks([0, 1, 3], 16)
    fused = [64 * part + i for part in range(3) for i in rows]
    keep: dict[str, Any] = {}
    for name, tensor in named_tensors(model):
        if name != "transformer.wpe.weight" or tensor.shape[0] != 64:
            keep[name] = tuple({64: rows, 192: fused}.get(size) for size in tensor.shape)
    keep["transformer.wpe.weight"] = (None, rows)
    hints = {name: [(4, 3), (64, 48), (192, 144)] for name, _ in model.named_modules()}
    slim = fake_slim(model, keep, reference, IDS, hints=hints)
    reference.load_state_dict({n: t for n, t in slim.weights.items()})
    save(slim, tmp_path / "out")
    written = AutoConfig.from_pretrained(tmp_path / "out")
    assert (written.n_embd, written.n_head, written.n_inner) == (48, 3, 256)
    assert (written.n_positions, written.vocab_size) == (64, 128)
    assert not hasattr(written, "graphprune")
    logits, _ = opened(tmp_path / "out", tmp_path)
    torch.testing.assert_close(logits, reference(**IDS).logits)


def uneven_slim(path=None):
    """Other widths in other layers, fewer heads in the last one, the middle one of three gone."""
    config = LlamaConfig(**DECODER, tie_word_embeddings=True)
    model = random_weights(LlamaForCausalLM(config))
    keep: dict[str, Any] = {}
    zeros: dict[str, Any] = {}
    hints: dict[str, Any] = {}
    for i, width in enumerate((80, 64, 96)):
        mlp = f"model.layers.{i}.mlp"
        kept = list(range(width))
        keep[f"{mlp}.gate_proj.weight"] = keep[f"{mlp}.up_proj.weight"] = (kept, None)
        keep[f"{mlp}.down_proj.weight"] = (None, kept)
        if width < 96:
            zeros[f"{mlp}.down_proj.weight"] = (1, list(range(width, 96)))
            hints[mlp] = [(96, width)]
    attention = "model.layers.2.self_attn"
    queries, keys = blocks([2, 3, 4, 5], 16), blocks([1, 2], 16)
    keep[f"{attention}.q_proj.weight"] = (queries, None)
    keep[f"{attention}.k_proj.weight"] = keep[f"{attention}.v_proj.weight"] = (keys, None)
    keep[f"{attention}.o_proj.weight"] = (None, queries)
    zeros[f"{attention}.o_proj.weight"] = (1, blocks([0, 1], 16))
    hints[attention] = [(6, 4), (3, 2), (96, 64), (48, 32)]
    reference = zeroed(model, zeros)
    del reference.model.layers[1]
    dropped = {"model.layers": [1]}
    return fake_slim(model, keep, reference, IDS, hints=hints, dropped=dropped, path=path)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    torch.manual_seed(2)
    slim = uneven_slim()
    path = tmp_path_factory.mktemp("uneven") / "out"
    save(slim, path)
    return slim, path


def test_self_contained(uneven, tmp_path):
    slim, path = uneven
    assert any("differs over layers" in problem for problem in precheck(slim))
    logits, said = opened(path, tmp_path, trust=True)
    torch.testing.assert_close(logits, slim.reference(**IDS).logits)
    assert said == ""
    shapes = {n: tuple(t.shape) for n, t in load_file(path / "model.safetensors").items()}
    assert shapes == {n: slim.shapes[n] for n in shapes}
    assert shapes["model.layers.0.mlp.up_proj.weight"] == (80, 60)
    assert shapes["model.layers.1.self_attn.q_proj.weight"] == (64, 60)
    config = json.loads((path / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (2, 96)
    assert "import graphprune" not in (path / "modeling_graphprune.py").read_text()


def test_self_contained_is_refused_without_trust(uneven, tmp_path):
    """Without its code the sizes don't fit: an error, no silently random weights."""
    _, path = uneven
    with pytest.raises(AssertionError, match="mismatch"):
        opened(path, tmp_path)


def test_opened_without_running_its_file(uneven):
    slim, path = uneven
    config = AutoConfig.from_pretrained(path)
    model_class: Any = pruned.class_of(config)
    assert issubclass(model_class, LlamaForCausalLM)
    assert pruned.original_class(model_class) is LlamaForCausalLM
    assert pruned.class_of(LlamaConfig()) is None
    model = model_class.from_pretrained(path)
    torch.testing.assert_close(model(**IDS).logits, slim.reference(**IDS).logits)
    tokens = model.generate(**IDS, max_new_tokens=3, do_sample=False, use_cache=True)
    again = model.generate(**IDS, max_new_tokens=3, do_sample=False, use_cache=False)
    assert torch.equal(tokens, again)


def test_self_contained_survives_transformers_own_saving(uneven, tmp_path, monkeypatch):
    slim, path = uneven
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = pruned.class_of(AutoConfig.from_pretrained(path)).from_pretrained(path)
    model.save_pretrained(tmp_path / "again")
    read = pruned.class_of(AutoConfig.from_pretrained(tmp_path / "again"))
    again = read.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again(**IDS).logits, slim.reference(**IDS).logits)


def test_pruning_a_pruned_model(uneven, tmp_path):
    """The second patch is for the original class too: patches don't pile up."""
    _, path = uneven
    model_class: Any = pruned.class_of(AutoConfig.from_pretrained(path))
    model = model_class.from_pretrained(path)
    kept = list(range(0, 80, 2))
    mlp = "model.layers.0.mlp"
    keep = {
        f"{mlp}.gate_proj.weight": (kept,),
        f"{mlp}.up_proj.weight": (kept,),
        f"{mlp}.down_proj.weight": (None, kept),
    }
    gone = list(range(1, 80, 2))
    reference = zeroed(model, {f"{mlp}.down_proj.weight": (1, gone)})
    slim = fake_slim(model, keep, reference, IDS, hints={mlp: [(80, 40)]}, path=path)
    save(slim, tmp_path / "out")
    logits, _ = opened(tmp_path / "out", tmp_path, trust=True)
    torch.testing.assert_close(logits, reference(**IDS).logits)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["graphprune"]["base"] == "LlamaForCausalLM"
    assert config["graphprune"]["patch"]["shapes"][f"{mlp}.up_proj.weight"] == [40, 60]
    assert config["graphprune"]["patch"]["shapes"]["model.layers.1.self_attn.q_proj.weight"]


def test_factors_of_the_original_size(tmp_path):
    """Embeddings are multiplied by the root of the width: that of the config would be wrong."""
    config = Gemma3TextConfig(**DECODER, layer_types=["full_attention"] * 3)
    model = random_weights(Gemma3ForCausalLM(config))
    smaller = Gemma3TextConfig(**{**DECODER, "hidden_size": 48}, layer_types=["full_attention"] * 3)
    reference: Any = Gemma3ForCausalLM(smaller)
    slim = narrow(model, reference, list(range(48)))
    reference.model.embed_tokens.embed_scale.fill_(60**0.5)
    assert precheck(slim) == []  # the shapes would do
    save(slim, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["hidden_size"] == 48
    assert written["graphprune"]["patch"] == {
        "attributes": {"model.embed_tokens": {"scalar_embed_scale": 60**0.5}},
        "persistent": ["model.embed_tokens.embed_scale"],
    }
    logits, _ = opened(tmp_path / "out", tmp_path, trust=True)
    torch.testing.assert_close(logits, reference.eval()(**IDS).logits)
    # A config edit would make the module look loadable; the stale one fails loudly instead.
    assert slim.module.config.hidden_size == 60


def test_sliced_rotary_frequencies(tmp_path):
    """Head sizes 16 to 12: a native model would compute six other frequencies."""
    config = LlamaConfig(**DECODER)
    model = random_weights(LlamaForCausalLM(config))
    kept = [*range(6), *range(8, 14)]
    keep: dict[str, Any] = {"model.rotary_emb.inv_freq": (list(range(6)),)}
    hints: dict[str, Any] = {"model.rotary_emb": [(16, 12), (8, 6)]}
    for i in range(3):
        attention = f"model.layers.{i}.self_attn"
        for name, heads in (("q", 6), ("k", 3), ("v", 3)):
            rows = [16 * head + j for head in range(heads) for j in kept]
            keep[f"{attention}.{name}_proj.weight"] = (rows, None)
        keep[f"{attention}.o_proj.weight"] = (None, [16 * h + j for h in range(6) for j in kept])
        hints[attention] = [(16, 12), (96, 72), (48, 36), (8, 6)]
    reference: Any = LlamaForCausalLM(LlamaConfig(**{**DECODER, "head_dim": 12})).eval()
    slim = fake_slim(model, keep, reference, IDS, hints=hints)
    reference.load_state_dict({n: slim.weights[n] for n in reference.state_dict()})
    reference.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq[:6].clone()
    for layer in reference.model.layers:
        layer.self_attn.scaling = 0.25
    save(slim, tmp_path / "out")
    assert "model.rotary_emb.inv_freq" in load_file(tmp_path / "out" / "model.safetensors")
    logits, _ = opened(tmp_path / "out", tmp_path, trust=True)
    torch.testing.assert_close(logits, reference(**IDS).logits)


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("owner", "name", "effect", "error"),
    [
        (checkpoint.Shard, "add", full_disk, EmitError),
        (checkpoint.Shard, "finish", full_disk, EmitError),
        (subprocess, "run", interrupt, KeyboardInterrupt),
        (hf, "copy_companions", full_disk, EmitError),
    ],
)
@pytest.mark.parametrize("exists", [False, True])
def test_nothing_stays_behind(source, tmp_path, monkeypatch, owner, name, effect, error, exists):
    slim = native_slim(source)
    out = tmp_path / "out"
    if exists:
        out.mkdir()
        (out / "precious").write_text("old")
    if owner is hf:
        monkeypatch.setattr(hf, "reopen", lambda *_, **__: [])
    monkeypatch.setattr(owner, name, effect)
    with pytest.raises(error):
        save(slim, out)
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if exists else [])
    if exists:
        assert (out / "precious").read_text() == "old"


def test_neither_form_is_right(source, tmp_path, monkeypatch):
    """What a fresh process computes decides, and the error says what each form had wrong."""
    slim = native_slim(source)
    monkeypatch.setattr(hf, "reopen", lambda *_, **__: ["something is off"])
    with pytest.raises(EmitError) as caught:
        save(slim, tmp_path / "out")
    assert "native form: something is off" in str(caught.value.why)
    assert "self_contained form: something is off" in str(caught.value.why)
    assert not (tmp_path / "out").exists()


def test_a_wrong_native_checkpoint_is_noticed(source, tmp_path):
    """The fresh process runs the real weights: damage to them cannot pass."""
    slim = native_slim(source)
    assert slim.module is not None
    slim.weights["model.norm.weight"] = slim.weights["model.norm.weight"] + 1
    with pytest.raises(EmitError, match="No Hugging Face checkpoint") as caught:
        save(slim, tmp_path / "out")
    assert "output 'logits' differs by" in str(caught.value.why)


def test_not_a_hugging_face_model():
    model = nn.Linear(3, 3)
    slim = fake_slim(model, {}, model, (torch.randn(1, 3),))
    with pytest.raises(EmitError, match="no Hugging Face form"):
        precheck(slim)


def test_unknown_base_class():
    config = LlamaConfig()
    config.graphprune = {"base": "NoSuchModel", "patch": {}}
    with pytest.raises(LoadError, match="NoSuchModel"):
        pruned.class_of(config)


WEIGHTS = {
    "a.float": torch.randn(3, 4),
    "b.half": torch.randn(5, 2).to(torch.bfloat16),
    "c.scalar": torch.tensor(7),
    "d.mask": torch.tensor([True, False, True]),
    "e.empty": torch.zeros(0, 3),
    "f.view": torch.randn(6, 4).t()[1:, ::2],
    'g."quoted" é': torch.randn(2),
}


@pytest.mark.parametrize("shard", [1 << 30, 60])
def test_streamed_weights(tmp_path, shard):
    asked: list[str] = []

    def tensor(name):
        asked.append(name)
        return WEIGHTS[name]

    write_weights(tmp_path, WEIGHTS, tensor, shard)
    assert asked == list(WEIGHTS)
    files = sorted(path.name for path in tmp_path.iterdir())
    if shard > 60:
        assert files == ["model.safetensors"]
    else:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"] == {"total_size": sum(t.nbytes for t in WEIGHTS.values())}
        assert sorted({*index["weight_map"].values(), "model.safetensors.index.json"}) == files
        assert len(files) > 3
        for name, file in index["weight_map"].items():
            assert name in load_file(tmp_path / file)
    found: dict[str, torch.Tensor] = {}
    for file in tmp_path.glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == WEIGHTS.keys()
    for name, expected in WEIGHTS.items():
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected)


def test_sharded_checkpoint_opens(source, tmp_path, monkeypatch):
    slim = native_slim(source)
    monkeypatch.setattr(write_weights, "__defaults__", (20_000,))
    save(slim, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(model(**IDS).logits, slim.reference(**IDS).logits)
