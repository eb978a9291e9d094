"""The Olive pass in workflows that Olive runs; skipped where Olive isn't installed."""

import json
import logging
import os

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import graphprune as gp
from graphprune.ir.onnx import files as onnx_files

os.environ["OLIVE_DISABLE_TELEMETRY"] = "1"
olive = pytest.importorskip("olive")

from graphprune.frontends.onnx.load import load_onnx  # noqa: E402
from graphprune.integrations.olive import (  # noqa: E402
    GraphPrune,
    package_config,
    slim_attributes,
)
from graphprune.rewrite.slim_onnx import SlimOnnx  # noqa: E402

RECIPE = {"remove": {"ffn": 0.5, "kv_heads": 0.5}}
TOKENS = torch.arange(39).reshape(3, 13)


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids).logits


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model


@pytest.fixture(scope="module")
def sources(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    model.save_pretrained(folder / "dense")
    auto = torch.export.Dim.AUTO
    torch.onnx.export(Logits(model).eval(), (TOKENS,), str(folder / "dense.onnx"), dynamo=True,
                      verbose=False, dynamic_shapes=({0: auto, 1: auto},))  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def wanted(model):
    """Logits with the plan's units silent; the plan itself is made for the module."""
    program = gp.trace(model, kwargs={"input_ids": TOKENS})
    plan = gp.select(program, **RECIPE)
    with torch.no_grad():
        return gp.apply(program, plan).module(input_ids=TOKENS).logits.numpy()


def workflow(folder, source, recipe, *later, **attributes):
    steps = [{"type": "GraphPrune", "recipe": recipe}, *({"type": name} for name in later)]
    config = {
        "input_model": {**source, **attributes},
        "passes": {f"step_{i}": step for i, step in enumerate(steps)},
        "output_dir": str(folder / "out"),
        "cache_dir": str(folder / "cache"),
        "log_severity_level": 3,
    }
    file = folder / "package.json"
    package_config(file)
    return olive.run(config, package_config=str(file)).get_best_candidate()


def run(path):
    path = next(path.glob("*.onnx")) if path.is_dir() else path
    return onnxruntime.InferenceSession(str(path)).run(None, {"input_ids": TOKENS.numpy()})[0]


def test_a_checkpoint(sources, wanted, tmp_path):
    source = {"type": "HfModel", "model_path": str(sources / "dense")}
    best = workflow(tmp_path, source, RECIPE)
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    sizes = [config[k] for k in ("intermediate_size", "num_attention_heads", "head_dim")]
    assert sizes == [24, 2, 8]
    slim = AutoModelForCausalLM.from_pretrained(best.model_path)
    with torch.no_grad():
        np.testing.assert_allclose(slim(TOKENS).logits.numpy(), wanted, rtol=0, atol=1e-5)


def test_a_checkpoint_that_no_config_can_hold(sources, tmp_path):
    """It is self-contained, and later passes are told to trust its code."""
    recipe = {"remove": {"model.layers.0.*/ffn": 0.5}}
    source = {"type": "HfModel", "model_path": str(sources / "dense")}
    best = workflow(tmp_path, source, recipe)
    assert best.model_config["load_kwargs"]["trust_remote_code"] is True
    slim = AutoModelForCausalLM.from_pretrained(best.model_path, trust_remote_code=True)
    shapes = [layer.mlp.up_proj.weight.shape[0] for layer in slim.model.layers]
    assert shapes == [24, 48]


@pytest.mark.parametrize("external", [False, True])
def test_an_onnx_file(sources, model, wanted, tmp_path, monkeypatch, external):
    """The pass behind it gets the slim model, from wherever the workflow is started."""
    if external:
        monkeypatch.setattr(onnx_files, "EXTERNAL_ABOVE", 0)
    monkeypatch.chdir(sources)  # where there is a dense.onnx
    attributes = json.loads(model.config.to_json_string(use_diff=False))
    source = {"type": "ONNXModel", "model_path": "dense.onnx"}
    best = workflow(
        tmp_path, source, RECIPE, "OnnxPeepholeOptimizer", model_attributes=attributes
    )  # fmt: skip
    np.testing.assert_allclose(run(tmp_path / "out"), wanted, rtol=0, atol=1e-5)
    told = best.model_config["model_attributes"]
    names = ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
    assert [told[n] for n in names] == [2, 1, 8, 24]
    saved = onnx.load(next((tmp_path / "out").glob("*.onnx")), load_external_data=False)
    assert "graphprune.plan" in {entry.key for entry in saved.metadata_props}


def test_attributes_of_uneven_layers(sources, caplog):
    program = load_onnx(sources / "dense.onnx")
    heads = [s for s in program.structures if s.role == "kv_heads"]
    plan = gp.Plan(program.fingerprint, {heads[0].name: (1,)}, {heads[0].name: 2})
    given = {"num_attention_heads": 4, "num_hidden_layers": 2, "hidden_size": 32}
    with caplog.at_level(logging.WARNING, "graphprune"):
        told = slim_attributes(given, SlimOnnx(program, plan))
    assert told == {**given, "head_dim": 8}
    assert "num_attention_heads stays 4" in caplog.text


def test_the_source_is_not_overwritten(sources):
    before = (sources / "dense.onnx").read_bytes()
    model = olive.model.ONNXModelHandler(str(sources / "dense.onnx"))
    accelerator = olive.hardware.DEFAULT_CPU_ACCELERATOR
    config = GraphPrune.generate_config(accelerator, {"recipe": RECIPE}, disable_search=True)
    with pytest.raises(gp.EmitError, match="the source itself"):
        GraphPrune(accelerator, config).run(model, str(sources / "dense.onnx"))
    assert (sources / "dense.onnx").read_bytes() == before


def test_the_package_configuration(tmp_path):
    default = json.loads(
        open(olive.package_config.OlivePackageConfig.get_default_config_path()).read()  # noqa: SIM115
    )
    ours = package_config(tmp_path / "package.json")
    assert json.loads((tmp_path / "package.json").read_text()) == ours
    added = ours["passes"].keys() - default["passes"].keys()
    assert added == {"GraphPrune"}
    assert {**ours, "passes": default["passes"]} == default
    parsed = olive.package_config.OlivePackageConfig.parse_file_or_obj(ours)
    assert parsed.import_pass_module("GraphPrune") is GraphPrune
