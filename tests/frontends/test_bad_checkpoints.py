"""Checkpoints that contradict themselves: each is refused in a sentence that says where."""

import json
import math
import random
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertModel, LlamaConfig, LlamaForCausalLM

import graphprune as gp
from graphprune.errors import LoadError

TINY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 32,
}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "llama"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(original, tmp_path):
    return shutil.copytree(original, tmp_path / "llama")


def configured(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def stored(folder, **changed):
    """Other tensors beside or instead of those of the file; None takes one away."""
    state = load_file(folder / WEIGHTS) | changed
    save_file({n: t for n, t in state.items() if t is not None}, folder / WEIGHTS, {"format": "pt"})
    return folder


def refused(folder):
    """What is said; in bounded time, whatever the checkpoint asks for."""
    start = time.monotonic()
    with pytest.raises(LoadError) as caught:
        gp.load(folder)
    assert time.monotonic() - start < 30
    assert "\n" not in caught.value.what
    return f"{caught.value.where} {caught.value.why}"


FIELDS = [
    ("architectures", "LlamaForCausalLM", "list of names of classes"),
    ("architectures", [1, 2], "list of names of classes"),
    ("model_type", [], "has to be a name"),
    ("model_type", "no such model", "does not recognize"),
    ("dtype", "foo", "no floating-point type"),
    ("dtype", "int8", "no floating-point type"),
    ("dtype", {}, "name of a type"),
    ("hidden_act", "foo", "foo"),
    ("hidden_act", None, "expected str"),
    ("rope_parameters", {"rope_type": "foo", "rope_theta": 1e4}, "foo"),
    ("rope_parameters", [], ""),
    ("hidden_size", "16", "expected int"),
    ("hidden_size", None, "expected int"),
    ("hidden_size", 0, "asks for shape"),
    ("hidden_size", 10**7, "asks for shape"),
    ("hidden_size", 10**12, "asks for shape"),
    ("vocab_size", 2**40, "asks for shape"),
    ("vocab_size", -1, ""),
    ("vocab_size", [32], "expected int"),
    ("intermediate_size", 2**63, ""),
    ("num_attention_heads", 0, ""),
    ("num_attention_heads", -2, ""),
    ("num_hidden_layers", 10_000_000, "10,000,000 layers"),
    ("num_hidden_layers", 9_999, "more layers"),
    ("num_labels", 10**10, "10,000,000,000 labels"),
    ("rms_norm_eps", math.nan, "not a number"),
    ("rms_norm_eps", "small", "expected float"),
    ("quantization_config", 7, "has to be an object"),
]


@pytest.mark.parametrize(("field", "value", "why"), FIELDS, ids=lambda v: str(v)[:24])
def test_a_field_that_no_model_can_follow(checkpoint, field, value, why):
    said = refused(configured(checkpoint, **{field: value}))
    assert why in said
    named = field in said or (why == "asks for shape" and ".weight" in said)
    assert named or field == "model_type"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'{"hidden_size": "\xff"}', "isn't UTF-8"),
        (b"[1, 2]", "JSON object"),
        (b"null", "JSON object"),
        (b"{", "isn't JSON"),
        (b'{"a": ' * 60 + b"1" + b"}" * 60, "nested"),
        (b'{"a": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", "nested"),
        (b'{"a": "' + b"x" * (17 << 20) + b'"}', "bytes"),
        (b'{"model_type": "llama", "name": "\\ud800"}', "half a character"),
    ],
    ids=["utf-8", "list", "null", "cut", "60 deep", "10,000 deep", "17 MB", "surrogate"],
)
def test_a_file_that_is_no_configuration(checkpoint, content, why):
    (checkpoint / "config.json").write_bytes(content)
    said = refused(checkpoint)
    assert why in said
    assert "config.json" in said


def test_weights_that_the_model_does_not_use(checkpoint, tmp_path):
    configured(checkpoint, num_hidden_layers=1)
    said = refused(checkpoint)
    assert "18 tensors" in said
    assert "model.layers.1." in said
    recipe = {"remove": {"ffn": 0.5}, "score": "magnitude"}
    with pytest.raises(LoadError, match="doesn't use"):
        gp.compile(checkpoint, recipe, tmp_path / "slim.pt2")
    report = gp.compile(checkpoint, recipe, dry_run=True, allow_unused_weights=True)
    assert "18 tensors: model.layers.1.input_layernorm.weight" in report.notes[0]
    module = gp.load(checkpoint, allow_unused_weights=True).module
    weights = load_file(checkpoint / WEIGHTS)
    assert all(torch.equal(weights[n], p) for n, p in module.named_parameters())


def test_one_weight_too_many(checkpoint):
    assert "1 tensor: adapter.weight" in refused(
        stored(checkpoint, **{"adapter.weight": torch.ones(2)})
    )


def test_what_transformers_says_is_not_to_be_used(checkpoint):
    """Frequencies that older versions saved."""
    stored(checkpoint, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert gp.load(checkpoint).source.unused == ()


def test_a_head_that_the_class_does_not_have(tmp_path):
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**TINY)).save_pretrained(tmp_path / "bert")
    assert gp.load(tmp_path / "bert").source.unused == ()
    configured(tmp_path / "bert", architectures=["BertModel"])
    with pytest.raises(LoadError):
        gp.load(tmp_path / "bert")
    BertModel(BertConfig(**TINY)).save_pretrained(tmp_path / "base")
    assert gp.load(tmp_path / "base").source.unused == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("names", ["one", "all"])
def test_other_floats_become_what_transformers_makes_of_them(checkpoint, dtype, names):
    state = load_file(checkpoint / WEIGHTS)
    changed = {UP: state[UP]} if names == "one" else state
    stored(checkpoint, **{n: t.to(dtype) for n, t in changed.items()})
    wanted = LlamaForCausalLM.from_pretrained(checkpoint)
    program = gp.load(checkpoint)
    found = program.module.state_dict()
    for name, tensor in wanted.state_dict().items():
        assert found[name].dtype == tensor.dtype == torch.float32
        assert torch.equal(found[name], tensor)
    ids = torch.arange(8).view(1, 8)
    with torch.no_grad():
        torch.testing.assert_close(program.module(ids).logits, wanted(ids).logits)
    plan = gp.select(program, remove={"ffn": 0.5}, score="magnitude")
    gp.verify(program, plan, gp.apply(program, plan)).raise_if_failed()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool,
                                   torch.float8_e4m3fn, torch.float8_e5m2])  # fmt: skip
def test_numbers_that_are_no_weights(checkpoint, dtype):
    state = load_file(checkpoint / WEIGHTS)
    said = refused(stored(checkpoint, **{UP: state[UP].to(dtype)}))
    assert UP in said
    assert str(dtype).removeprefix("torch.") in said
    assert "quantization_config" in said


def test_two_tensors_for_one_weight(checkpoint):
    said = refused(configured(checkpoint, tie_word_embeddings=True))
    assert "lm_head.weight and model.embed_tokens.weight" in said
    state = load_file(checkpoint / WEIGHTS)
    stored(checkpoint, **{"lm_head.weight": state["model.embed_tokens.weight"].clone()})
    module = gp.load(checkpoint).module
    assert module.lm_head.weight is module.model.embed_tokens.weight


@pytest.fixture
def sharded(checkpoint):
    state = load_file(checkpoint / WEIGHTS)
    (checkpoint / WEIGHTS).unlink()
    names = sorted(state)
    places = {n: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(places.values()):
        part = {n: t for n, t in state.items() if places[n] == file}
        save_file(part, checkpoint / file, {"format": "pt"})
    (checkpoint / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return checkpoint


def indexed(folder, change):
    data = json.loads((folder / INDEX).read_text())
    found = change(data)
    (folder / INDEX).write_text(json.dumps(data if found is None else found))
    return folder


ONE = "model-00001-of-00002.safetensors"
INDICES = [
    (lambda d: d.pop("weight_map"), "weight_map"),
    (lambda d: [1], "weight_map"),
    (lambda d: d.update(weight_map={}), "weight_map"),
    (lambda d: d.update(weight_map=[UP]), "weight_map"),
    (lambda d: d["weight_map"].update({UP: 1}), "not the name of a file"),
    (lambda d: d["weight_map"].update({UP: None}), "not the name of a file"),
    (lambda d: d["weight_map"].update({UP: "../other.safetensors"}), "no file of this directory"),
    (lambda d: d["weight_map"].update({UP: "/etc/passwd"}), "no file of this directory"),
    (lambda d: d["weight_map"].update({UP: ".."}), "no file of this directory"),
    (lambda d: d["weight_map"].update({UP: "gone.safetensors"}), "gone.safetensors"),
    (lambda d: d["weight_map"].update({"more": ONE}), "doesn't have it"),
    (lambda d: d["weight_map"].pop(UP), "names no file for it"),
    (lambda d: d["weight_map"].update({str(i): ONE for i in range(200_001)}), "at most 200,000"),
]


def test_shards_are_read(sharded, original):
    module = gp.load(sharded).module
    wanted = load_file(original / WEIGHTS)
    assert all(torch.equal(wanted[n], t) for n, t in module.state_dict().items())


@pytest.mark.parametrize(("change", "why"), INDICES, ids=range(len(INDICES)))
def test_an_index_that_contradicts_its_files(sharded, change, why):
    def kept(data):
        found = change(data)
        return found if isinstance(found, list) else data

    assert why in refused(indexed(sharded, kept))


def test_two_sets_of_weights(sharded, original):
    shutil.copy(original / WEIGHTS, sharded / WEIGHTS)
    assert "may differ" in refused(sharded)


def header(folder, change):
    """Write the file anew with another header."""
    data = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + size])
    text = change(entries)
    new = (json.dumps(entries) if text is None else text).encode()
    (folder / WEIGHTS).write_bytes(len(new).to_bytes(8, "little") + new + data[8 + size :])
    return folder


HEADERS = [
    lambda e: e[UP].update(dtype="F99"),
    lambda e: e[UP].update(shape=[2**40, 2**40]),
    lambda e: e[UP].update(shape=[-1, 16]),
    lambda e: e[UP].update(shape="24"),
    lambda e: e[UP].update(data_offsets=[0, 2**60]),
    lambda e: e[UP].update(data_offsets=[0, e[UP]["data_offsets"][1]]),
    lambda e: e[UP].update(data_offsets=[8, 4]),
    lambda e: e.pop(UP) and None,
    lambda e: "[]",
    lambda e: "",
    lambda e: "{" * 100,
]


@pytest.mark.parametrize("change", HEADERS, ids=range(len(HEADERS)))
def test_a_header_that_lies(checkpoint, change):
    assert WEIGHTS in refused(header(checkpoint, change))


def test_a_header_longer_than_the_file(checkpoint):
    data = (checkpoint / WEIGHTS).read_bytes()
    (checkpoint / WEIGHTS).write_bytes((2**40).to_bytes(8, "little") + data[8:])
    assert WEIGHTS in refused(checkpoint)


def test_more_tensors_than_any_model(checkpoint):
    many = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(200_001)}
    text = json.dumps(many).encode()
    (checkpoint / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text)
    assert "200,001" in refused(checkpoint)


VALUES = ["abc", None, True, [], [1, 2], {}, {"a": 1}, -1, 0, 10**7, 10**12, 2**63, 1.5, math.nan,
          math.inf, "", "\ud800"]  # fmt: skip


@pytest.mark.parametrize("seed", range(24))
def test_any_value_in_any_field_is_read_or_refused(original, tmp_path, seed, monkeypatch):
    """Whatever transformers raises for it. Tracing, which takes long, is somebody else's test."""

    def untraced(model, *args, **kwargs):
        raise gp.TraceError("not traced here")

    monkeypatch.setattr("graphprune.frontends.hf.load.trace", untraced)
    draw = random.Random(seed)
    data = json.loads((original / "config.json").read_text())
    field = draw.choice([n for n in data if n != "transformers_version"])
    folder = shutil.copytree(original, tmp_path / "llama")
    with pytest.raises(gp.GraphPruneError):
        gp.load(configured(folder, **{field: draw.choice(VALUES)}))
