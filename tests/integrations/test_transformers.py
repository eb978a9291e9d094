"""Exporters of transformers that prune on the way, against a model with the same units silent."""

import copy
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import graphprune as gp
from graphprune.frontends.pt2.read import from_exported
from graphprune.integrations.transformers import pruning_exporter

exporters = pytest.importorskip("transformers.exporters")

LAYERS, HEADS, GROUPS, DIM, INNER = 2, 4, 2, 8, 48
AUTO = torch.export.Dim.AUTO
SHAPES = {name: {0: AUTO, 1: AUTO} for name in ("input_ids", "attention_mask")}
REMOVE = {"ffn": 0.5, "kv_heads": 0.5}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        max_position_embeddings=64,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model


def inputs(batch=2, length=9):
    generator = torch.Generator().manual_seed(batch)
    tokens = torch.randint(0, 64, (batch, length), generator=generator)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, length - 2 :] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def dynamo(model, **settings):
    exporter = pruning_exporter("dynamo", **settings)
    return exporter.export(model, inputs(), exporters.DynamoConfig(dynamic_shapes=SHAPES))


@pytest.fixture(scope="module")
def plan(model):
    plain = exporters.DynamoExporter()
    whole = plain.export(model, inputs(), exporters.DynamoConfig(dynamic_shapes=SHAPES)).program
    return gp.select(from_exported(whole), remove=REMOVE)


@pytest.fixture(scope="module")
def masked(model, plan):
    """The model at full size, with what the plan removes silent."""
    silent = copy.deepcopy(model)
    for i, layer in enumerate(silent.model.layers):
        inner, heads = torch.ones(INNER, dtype=torch.bool), torch.ones(GROUPS, dtype=torch.bool)
        inner[list(plan.kept_units[f"model.layers.{i}.mlp.gate_proj.weight:0"])] = False
        heads[list(plan.kept_units[f"model.layers.{i}.self_attn.q_proj.weight:0/0"])] = False
        assert (int(inner.sum()), int(heads.sum())) == (24, 1)
        with torch.no_grad():
            layer.mlp.down_proj.weight[:, inner] = 0
            columns = heads.repeat_interleave(HEADS // GROUPS * DIM)
            layer.self_attn.o_proj.weight[:, columns] = 0
    return silent


def judge(exported, masked):
    for sizes in ((2, 9), (3, 13)):
        given = inputs(*sizes)
        with torch.no_grad():
            wanted = masked(**given).logits
        seen = given["attention_mask"].bool()  # what is padding sees nothing, and says anything
        torch.testing.assert_close(exported(**given).logits[seen], wanted[seen], rtol=0, atol=1e-5)


def test_torch_export(model, masked):
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exported = dynamo(model, remove=REMOVE)
    judge(exported, masked)
    shapes = {name: tuple(t.shape) for name, t in exported.program.state_dict.items()}
    assert shapes["model.layers.1.mlp.down_proj.weight"] == (32, 24)
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == (8, 32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("fused", [None, pytest.param("cpu", marks=pytest.mark.slow)])
def test_onnx(model, plan, masked, fused, tmp_path):
    config = exporters.OnnxConfig(dynamic_shapes=SHAPES, ort_fusions=fused)
    exported = pruning_exporter("onnx", plan).export(model, inputs(), config)
    exported.save_pretrained(tmp_path)
    loaded = exporters.ExportedModel.from_pretrained(tmp_path)
    judge(loaded, masked)


def test_the_module_first(model, masked):
    """The simple way: prune the module, then export what is left with any exporter."""
    generic = {"input_ids": inputs()["input_ids"]}
    slim = gp.trace(model, kwargs=generic)
    small = gp.apply(slim, gp.select(slim, remove=REMOVE)).module
    assert isinstance(small, LlamaForCausalLM)
    config = exporters.DynamoConfig(dynamic_shapes=SHAPES)
    judge(exporters.DynamoExporter().export(small, inputs(), config), masked)


@pytest.mark.slow
def test_components_of_generation(model):
    """Prefill and decoding are graphs of their own, and lose the same channels."""
    model = copy.deepcopy(model)
    model.config.use_cache = True
    exporter = pruning_exporter("dynamo", remove={"ffn": 0.5})
    exported = exporter.export_for_generation(
        model, {"input_ids": inputs()["input_ids"]}, exporters.DynamoConfig(dynamic=True)
    )
    states = [component.program.state_dict for component in exported.components.values()]
    assert len(states) == 2
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    assert states[0]["model.layers.0.mlp.up_proj.weight"].shape == (24, 32)


class Quantizer:
    quantizes_fx_graph = True


def test_a_quantised_graph_is_refused(model):
    config = exporters.DynamoConfig(quantizer=Quantizer())
    with pytest.raises(gp.RecipeError, match="once it is quantised"):
        pruning_exporter("dynamo", remove=REMOVE).export(model, inputs(), config)


def test_unknown_formats():
    with pytest.raises(gp.LoadError, match="can't export that"):
        pruning_exporter("coreml", remove=REMOVE)
    with pytest.raises(gp.RecipeError, match="exactly one of"):
        pruning_exporter("onnx")


def test_an_older_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.exporters.exporter_dynamo", None)
    with pytest.raises(gp.LoadError, match="this transformers has no exporters"):
        pruning_exporter("onnx", remove=REMOVE)
