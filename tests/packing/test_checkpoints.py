"""Packed checkpoints against the dense-with-zeros ones that they were made from."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BertForPreTraining,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

import graphprune as gp
from graphprune.errors import EmitError, LoadError
from graphprune.kernels.formats.files import load, save
from graphprune.kernels.linear import SparseLinear
from graphprune.packing import pack


def sparse_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear)}


@pytest.fixture(scope="module")
def packed(sparse_llama, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("packed") / "packed"
    pack(sparse_llama, output)
    return output


@pytest.fixture(scope="module")
def twin(sparse_llama):
    return AutoModelForCausalLM.from_pretrained(sparse_llama).eval()


def test_a_packed_checkpoint_is_smaller_by_the_formula(sparse_llama, tmp_path):
    found = pack(sparse_llama, tmp_path / "out")
    saved = 0
    with safe_open(sparse_llama / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            weight = file.get_tensor(name)
            if "_proj" in name:
                rows, columns = weight.shape
                zeros = weight.numel() - int(weight.count_nonzero())
                saved += zeros * 4 - rows * -(-columns // 8) - rows * 8
    assert found.bytes_before - found.bytes_after == saved
    assert {e.format for e in found.layers} == {"bitmap"}
    assert len(found.layers) == 14
    before, after = sparse_llama / "model.safetensors", tmp_path / "out" / "packed.safetensors"
    headers = 14 * 500  # three more tensors per layer, and their shapes
    assert abs(before.stat().st_size - after.stat().st_size - saved) < headers
    assert json.loads(found.to_json())["bytes_after"] == found.bytes_after


@pytest.mark.parametrize("format", ["bitmap", "strip_u8", "csr"])
def test_a_checkpoint_computes_what_its_dense_twin_does(sparse_llama, twin, tmp_path, format):
    if format == "strip_u8":  # 256 columns are filled up: nothing is saved in so small a model
        with pytest.raises(EmitError, match="no weight becomes smaller"):
            pack(sparse_llama, tmp_path / "out", format=format)
        model = gp.runtime.model(sparse_llama, format=format)
    else:
        pack(sparse_llama, tmp_path / "out", format="bitmap")
        model = gp.runtime.model(tmp_path / "out", format=format)
    assert {m.format for m in sparse_layers(model).values()} == {format}
    assert len(sparse_layers(model)) == 14
    tokens = torch.arange(30).reshape(2, 15)
    with torch.no_grad():
        expected, found = twin(tokens).logits, model(tokens).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_packed_model_generates_the_same_tokens(packed, twin):
    model = gp.runtime.model(packed, format="file")
    assert len(sparse_layers(model)) == 14
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    options = {"max_new_tokens": 20, "do_sample": False}
    assert torch.equal(model.generate(prompt, **options), twin.generate(prompt, **options))


def test_the_state_dict_is_smaller_by_the_formula(packed, twin):
    model = gp.runtime.model(packed, format="file")
    for name, layer in sparse_layers(model).items():
        weight = twin.get_submodule(name).weight
        rows, columns = weight.shape
        taken = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
        assert taken == int(weight.count_nonzero()) * 4 + rows * -(-columns // 8) + rows * 8


def test_graphprune_loads_a_packed_checkpoint(packed, twin):
    program = gp.load(packed)
    tokens = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        found = program.module(input_ids=tokens).logits
        assert torch.equal(found, twin(tokens).logits)


def test_a_packed_checkpoint_can_be_pruned_on(packed, tmp_path):
    report = gp.compile(packed, {"remove": {"ffn": 0.5}, "score": "magnitude"}, tmp_path / "slim")
    assert report.after.parameters < report.before.parameters
    slim = AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
    assert slim.config.intermediate_size == 45


def test_transformers_refuses_a_packed_checkpoint_instead_of_making_up_weights(packed):
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(packed)


def test_the_fastest_format_is_measured_and_kept(packed, tmp_path, twin):
    model = gp.runtime.model(packed, tokens=(1, 4))
    (table,) = (tmp_path / "cache" / "graphprune").iterdir()
    times = json.loads(table.read_text())
    assert {key.rpartition("/")[2] for key in times} == {"1", "4"}
    assert all({"dense", "csr"} <= t.keys() for t in times.values())
    # A table that says otherwise is believed.
    for known in times.values():
        known.update({"csr": 1e-9})
    table.write_text(json.dumps(times))
    again = gp.runtime.model(packed, tokens=(1, 4))
    assert {m.format for m in sparse_layers(again).values()} == {"csr"}
    tokens = torch.arange(15).reshape(1, 15)
    with torch.no_grad():
        expected = twin(tokens).logits
        for one in (model, again):
            assert (one(tokens).logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_what_is_there_stays(packed, sparse_llama):
    before = (packed / "packed.safetensors").read_bytes()
    with pytest.raises(EmitError, match="there already"):
        pack(sparse_llama, packed)
    assert (packed / "packed.safetensors").read_bytes() == before


def test_a_dense_checkpoint_has_nothing_to_pack(sparse_llama, tmp_path):
    dense = tmp_path / "dense"
    model = AutoModelForCausalLM.from_pretrained(sparse_llama)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data.fill_(1)
    model.save_pretrained(dense)
    with pytest.raises(EmitError, match="no weight becomes smaller") as error:
        pack(dense, tmp_path / "out")
    assert "no zeros" in error.value.why
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["zip", "dense", ""])
def test_unknown_formats_are_refused(sparse_llama, tmp_path, format):
    with pytest.raises(EmitError, match="no format"):
        pack(sparse_llama, tmp_path / "out", format=format)


def test_sources_that_are_none(tmp_path):
    with pytest.raises(LoadError, match="no such file"):
        pack(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "model.pt2").write_bytes(b"")
    with pytest.raises(LoadError, match="only checkpoints and ONNX files"):
        pack(tmp_path / "model.pt2", tmp_path / "out")


@pytest.mark.parametrize("cut", [1, 1000, 30_000])
def test_a_truncated_file_is_named(packed, tmp_path, cut):
    damaged = tmp_path / "damaged"
    shutil.copytree(packed, damaged)
    file = damaged / "packed.safetensors"
    file.write_bytes(file.read_bytes()[:-cut])
    for opened in (gp.load, gp.runtime.model):
        with pytest.raises(LoadError, match="can't read the packed weights") as error:
            opened(damaged)
        assert error.value.where == str(file)


def test_damaged_bits_are_named(packed, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(packed, damaged)
    file = damaged / "packed.safetensors"
    data = bytearray(file.read_bytes())
    with safe_open(file, "pt") as opened:
        bits = opened.get_tensor("model.layers.0.mlp.up_proj.weight.bitmask").numpy().tobytes()
    data[data.index(bits) + 5] ^= 1
    file.write_bytes(data)
    with pytest.raises(LoadError, match="can't read the packed weights") as error:
        gp.load(damaged)
    assert "up_proj.weight.row_offsets[1]" in error.value.why


def test_packed_weights_of_another_model_are_refused(packed, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(packed, other)
    config = json.loads((other / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (other / "config.json").write_text(json.dumps(config))
    for opened in (gp.load, gp.runtime.model):
        with pytest.raises(LoadError, match="don't fit"):
            opened(other)


def test_a_model_generates_as_its_checkpoint_says(packed, sparse_llama, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(sparse_llama, checkpoint)
    told = {"eos_token_id": [7, 8], "max_new_tokens": 5, "do_sample": False}
    (checkpoint / "generation_config.json").write_text(json.dumps(told))
    pack(checkpoint, tmp_path / "out")
    model = gp.runtime.model(tmp_path / "out", format="file")
    assert model.generation_config.eos_token_id == [7, 8]
    twin = AutoModelForCausalLM.from_pretrained(checkpoint)
    prompt = torch.tensor([[3, 1, 4]])
    assert torch.equal(model.generate(prompt), twin.generate(prompt))


def test_a_model_with_sparse_layers_can_t_be_saved_as_nonsense(packed, tmp_path):
    with pytest.raises(EmitError, match="can't be saved"):
        gp.runtime.model(packed, format="file").save_pretrained(tmp_path / "saved")
    gp.runtime.model(packed, format="dense").save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, gp.load(packed).module(input_ids=tokens).logits)


def test_two_sets_of_weights_are_refused(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "both")
    gp.runtime.model(tmp_path / "both", format="dense").save_pretrained(tmp_path / "both")
    for opener in (gp.runtime.model, gp.load):
        with pytest.raises(LoadError, match="two sets of weights"):
            opener(tmp_path / "both")


def test_a_model_can_be_pickled_and_its_parts_not_saved(packed, twin, tmp_path):
    model = pickle.loads(pickle.dumps(gp.runtime.model(packed, format="file")))
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.allclose(model(tokens).logits, twin(tokens).logits, atol=1e-5)
    with pytest.raises(EmitError, match="can't be saved"):
        model.model.save_pretrained(tmp_path / "part")


def test_arguments_that_mean_nothing_are_refused(packed, sparse_llama, tmp_path):
    for tokens in ((), (0,), (-1,), 4, (1.5,), (10**9,)):
        with pytest.raises(EmitError, match="can't be timed"):
            pack(sparse_llama, tmp_path / "out", tokens=tokens)
        with pytest.raises(EmitError, match="can't be timed"):
            gp.runtime.model(packed, tokens=tokens)
    with pytest.raises(LoadError, match="no device gpu"):
        gp.runtime.model(packed, device="gpu")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(EmitError, match="packed as a directory"):
        pack(sparse_llama, tmp_path / "file", overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_link_to_a_directory_is_followed(sparse_llama, tmp_path):
    (tmp_path / "link").symlink_to("place")
    for overwrite in (False, True):
        pack(sparse_llama, tmp_path / "link", overwrite=overwrite)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "place" / "packed.safetensors").is_file()


def test_opening_leaves_random_numbers_alone(packed):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    gp.runtime.model(packed)
    assert torch.equal(torch.rand(3), expected)


def test_others_may_read_it_as_they_may_the_rest(packed):
    modes = {file.stat().st_mode for file in packed.iterdir()}
    assert len(modes) == 1


@pytest.fixture(scope="module")
def sparse_mixtral(tmp_path_factory) -> Path:
    """Experts in one tensor per layer, with zeros in some, and embeddings of one matrix."""
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
            tie_word_embeddings=True,
        )
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if "experts" in name or "embed" in name:
            parameter.data[torch.rand_like(parameter) < 0.7] = 0
    path = tmp_path_factory.mktemp("mixtral") / "sparse"
    model.save_pretrained(path)
    return path


def test_experts_and_tied_weights_take_less_space_and_compute_dense(sparse_mixtral, tmp_path):
    twin = AutoModelForCausalLM.from_pretrained(sparse_mixtral).eval()
    for format in ("bitmap", "auto"):
        found = pack(sparse_mixtral, tmp_path / format, format=format)
        layers = {e.name: e for e in found.layers if e.format != "dense"}
        assert len(layers) == 5
        assert {e.why for e in layers.values()} == {"dense when it computes"}
        state, saved = twin.state_dict(), 0
        for name, layer in layers.items():
            weight = state[name]
            assert layer.shape[0] * layer.shape[1] == weight.numel()
            bits = layer.shape[0] * -(-layer.shape[1] // 8)
            assert layer.bytes == int(weight.count_nonzero()) * 4 + bits + layer.shape[0] * 8
            saved += weight.numel() * 4 - layer.bytes
        assert found.bytes_before - found.bytes_after == saved
        tokens = torch.arange(30).reshape(2, 15)
        model = gp.runtime.model(tmp_path / format)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        program = gp.load(tmp_path / format)
        with torch.no_grad():
            assert torch.equal(model(tokens).logits, twin(tokens).logits)
            for name in layers:
                assert torch.equal(program.weights[name], state[name])


def test_a_shape_that_does_not_fit_is_refused(sparse_mixtral, tmp_path):
    pack(sparse_mixtral, tmp_path / "out")
    file = tmp_path / "out" / "packed.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    shapes = json.loads(metadata["graphprune.flattened"])
    name = next(n for n in shapes if "experts" in n)
    for changed in ({**shapes, name: [3, *shapes[name][1:]]}, {**shapes, name: 7}, [1]):
        save_file(tensors, file, metadata | {"graphprune.flattened": json.dumps(changed)})
        for opener in (gp.runtime.model, gp.load):
            with pytest.raises(LoadError, match="can't read the packed weights"):
                opener(tmp_path / "out")


@pytest.mark.parametrize("kind", ["vit", "bert", "whisper", "gpt2"])
def test_other_models_are_packed_and_opened(kind, tmp_path):
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "intermediate_size": 48}  # fmt: skip
    model, inputs = {
        "vit": lambda: (
            ViTForImageClassification(ViTConfig(**small, image_size=16, patch_size=8)),
            {"pixel_values": torch.randn(2, 3, 16, 16)},
        ),
        "bert": lambda: (
            BertForPreTraining(BertConfig(**small, vocab_size=60)),
            {"input_ids": torch.arange(10)[None]},
        ),
        "whisper": lambda: (
            WhisperForConditionalGeneration(
                WhisperConfig(
                    vocab_size=60, num_mel_bins=8, d_model=32, encoder_layers=1, decoder_layers=1,
                    encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
                    decoder_ffn_dim=48, max_source_positions=10, pad_token_id=0, bos_token_id=1,
                    eos_token_id=2, decoder_start_token_id=1, suppress_tokens=[],
                )
            ),
            {"input_features": torch.randn(1, 8, 20), "decoder_input_ids": torch.arange(5)[None]},
        ),
        "gpt2": lambda: (  # its layers are Conv1D: [inputs, outputs], some of them square
            GPT2LMHeadModel(
                GPT2Config(vocab_size=60, n_embd=32, n_layer=4, n_head=4, n_positions=20)
            ),
            {"input_ids": torch.arange(10)[None]},
        ),
    }[kind]()  # fmt: skip
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear | Conv1D):
            layer.weight.data.masked_fill_(torch.rand(layer.weight.shape) < 0.6, 0)
    model.eval().save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    if kind == "bert":  # a file that has more than its class needs
        config["architectures"] = ["BertForMaskedLM"]
        (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
        model = AutoModelForMaskedLM.from_pretrained(tmp_path / "dense").eval()
    more = {"allow_unused_weights": kind == "bert"}
    found = pack(tmp_path / "dense", tmp_path / "packed", **more)
    assert sum(e.format == "bitmap" for e in found.layers) >= 12
    with torch.no_grad():
        expected = model(**inputs).logits
        for path, format in (("packed", "file"), ("packed", "csr"), ("dense", "bitmap")):
            opened = gp.runtime.model(tmp_path / path, format=format, **more)
            assert len(sparse_layers(opened)) >= 12
            error = (opened(**inputs).logits - expected).abs().max()
            assert error < 1e-5 * expected.abs().max(), (path, format)
        whole = gp.runtime.model(tmp_path / "packed", format="dense")
        assert not sparse_layers(whole)
        for name, weight in model.state_dict().items():
            assert torch.equal(whole.state_dict()[name], weight)
        if kind == "gpt2":
            assert torch.equal(gp.load(tmp_path / "packed").module(**inputs).logits, expected)


def test_a_matrix_the_wrong_way_round_is_refused(tmp_path):
    """A square one would fit."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=4))
    weight = model.transformer.h[0].attn.c_proj.weight.data
    weight.masked_fill_(torch.rand(weight.shape) < 0.6, 0)
    model.save_pretrained(tmp_path / "dense")
    pack(tmp_path / "dense", tmp_path / "packed")
    file = tmp_path / "packed" / "packed.safetensors"
    save(file, dict(load(file)))  # without the metadata that says which are turned
    with pytest.raises(LoadError, match="don't fit") as caught:
        gp.runtime.model(tmp_path / "packed")
    assert caught.value.why == "its rows are the model's columns"


@pytest.mark.parametrize("key", ["intermediate_size", "vocab_size", "hidden_size"])
def test_other_sizes_are_refused(packed, tmp_path, key):
    other = tmp_path / "other"
    shutil.copytree(packed, other)
    config = json.loads((other / "config.json").read_text())
    config[key] += 4
    (other / "config.json").write_text(json.dumps(config))
    for opened in (gp.load, gp.runtime.model):
        with pytest.raises(LoadError, match="don't fit"):
            opened(other)


def test_directories_with_other_things_stay(sparse_llama, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(sparse_llama, home / "source")
    (home / "thesis.txt").write_text("all my work")
    for output in (home, home / "source" / "out"):
        with pytest.raises(EmitError, match="lie in one another"):
            pack(home / "source", output, overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("all my work")
    with pytest.raises(EmitError, match="something else in it"):
        pack(sparse_llama, tmp_path / "other", overwrite=True)
    assert (home / "thesis.txt").exists()


def test_quantised_checkpoints_and_absent_devices_are_refused(sparse_llama, packed, tmp_path):
    quantised = tmp_path / "quantised"
    shutil.copytree(sparse_llama, quantised)
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (quantised / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match="quantised checkpoint"):
        pack(quantised, tmp_path / "out")
    with pytest.raises(LoadError, match="no device"):
        gp.runtime.model(packed, device="cuda:77")
