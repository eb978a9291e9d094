"""What a module of one's own becomes on disk: dtypes, ranges, forms of outputs, and once more."""

import copy
import json
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.export import Dim
from torch.utils import _pytree as pytree

import graphprune as gp
from graphprune.errors import TraceError
from graphprune.pipeline.compiler import compile
from zoo import vision
from zoo.case import randomise


class Net(nn.Module):
    """A convolution with batch norm, a hidden layer, a classifier."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x))).mean((2, 3))
        return self.down(F.relu(self.up(x)))


def image(batch=2, side=6):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


def slim_of(module, args, kwargs=None, dims=None, **goal):
    program = gp.trace(module, args, kwargs, dims)
    plan = gp.select(program, **(goal or {"remove": {"*": 0.5}}), score="random")
    slim = gp.apply(program, plan)
    gp.verify(program, plan, slim).raise_if_failed()
    return slim


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_in_files(dtype, tmp_path):
    module = randomise(Net()).to(dtype)
    report = compile(
        module, {"remove": {"*": 0.5}}, tmp_path / "slim.pt2", example=(image().to(dtype),)
    )
    assert report.after.bytes < report.before.bytes
    exported = torch.export.load(tmp_path / "slim.pt2")
    floats = [t for t in exported.state_dict.values() if t.is_floating_point()]
    assert {t.dtype for t in floats} == {dtype}
    plan = gp.Plan.load(tmp_path / "slim.pt2.graphprune_plan.json")
    kept = list(plan.kept_units["conv.weight:0"])
    assert torch.equal(exported.state_dict["conv.weight"], module.conv.weight[kept])
    assert exported.module()(image().to(dtype)).dtype == dtype


def test_half_precision_stays_in_an_onnx_file(tmp_path):
    slim = slim_of(randomise(Net()).half(), (image().half(),))
    slim.save(tmp_path / "slim.onnx", "onnx")
    model = onnx.load(tmp_path / "slim.onnx")
    weights = [t for t in model.graph.initializer if len(t.dims) > 1]
    assert {t.data_type for t in weights} == {onnx.TensorProto.FLOAT16}
    assert model.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16


def test_bfloat16_becomes_float32_in_an_onnx_file(tmp_path):
    """ONNX Runtime has no kernels for bfloat16 on the CPU; no value changes."""
    module = randomise(Net()).bfloat16()
    x = image().bfloat16()
    report = compile(
        module, {"remove": {"*": 0.5}}, tmp_path / "slim", ["pt2", "onnx"], example=(x,)
    )
    assert report.after.onnxruntime is not None
    half = torch.export.load(tmp_path / "slim" / "model.pt2")
    (found,) = onnxruntime.InferenceSession(tmp_path / "slim" / "model.onnx").run(
        None, {"x": x.float().numpy()}
    )
    plan = gp.Plan.load(tmp_path / "slim" / "graphprune_plan.json")
    program = gp.trace(copy.deepcopy(module).float(), (x.float(),))
    twin = gp.Plan(program.fingerprint, plan.kept_units, plan.sizes)
    with torch.no_grad():
        wanted = gp.apply(program, twin).module(x.float())
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-5)
    assert {t.dtype for t in half.state_dict.values() if t.is_floating_point()} == {torch.bfloat16}


def test_images_of_a_half_precision_checkpoint(tmp_path):
    """Example inputs have the type of the model's weights."""
    vision.vit().to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    program = gp.load(tmp_path / "dense")
    assert program.example[1]["pixel_values"].dtype == torch.bfloat16


def test_ranges_hold_in_files(tmp_path):
    dims = {"x": {0: Dim("batch", min=1, max=32), 2: Dim("height", min=4, max=64)}}
    slim = slim_of(randomise(Net()), (image(),), dims=dims)
    slim.save(tmp_path / "slim.pt2", "pt2")
    exported = torch.export.load(tmp_path / "slim.pt2")
    found = sorted((r.lower, r.upper) for r in exported.range_constraints.values())
    assert found == [(1, 32), (4, 64)]
    with torch.no_grad():
        x = torch.randn(5, 3, 11, 6)
        wanted = slim.module(x)
        torch.testing.assert_close(exported.module()(x), wanted)
        with pytest.raises((AssertionError, RuntimeError), match="32"):
            exported.module()(torch.randn(33, 3, 8, 6))
    slim.save(tmp_path / "slim.onnx", "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "slim.onnx")
    (entry,) = session.get_inputs()
    assert [isinstance(d, str) for d in entry.shape] == [True, False, True, False]
    (given,) = session.run(None, {entry.name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(given), wanted, atol=1e-5, rtol=1e-4)


def test_statistics_of_batch_norm_are_sliced_in_files(tmp_path):
    module = randomise(Net())
    slim = slim_of(module, (image(),), shape={"channels": 3})
    slim.save(tmp_path / "slim.pt2", "pt2")
    state = torch.export.load(tmp_path / "slim.pt2").state_dict
    kept = list(slim.plan.kept_units["conv.weight:0"])
    for name in ("running_mean", "running_var", "weight", "bias"):
        assert torch.equal(state[f"bn.{name}"], module.state_dict()[f"bn.{name}"][kept])
    assert state["bn.num_batches_tracked"] == module.bn.num_batches_tracked


@dataclass
class Answer:
    scores: torch.Tensor
    extra: dict


class Answering(Net):
    def forward(self, x, *, names):
        y = super().forward(x)
        return Answer(y * names["scale"], {"sum": [y.sum(-1)], "none": None})


def test_dataclasses_are_outputs_once_torch_knows_them(tmp_path):
    module, kwargs = randomise(Answering()), {"names": {"scale": torch.full((1,), 2.0)}}
    if Answer not in pytree.SUPPORTED_NODES:
        with pytest.raises(TraceError, match="Answering") as caught:
            gp.trace(module, (image(),), kwargs)
        assert "Answer" in caught.value.why
        torch.export.register_dataclass(Answer, serialized_type_name="tests.Answer")
    slim = slim_of(module, (image(),), kwargs)
    given, dense = slim.module(image(), **kwargs), module(image(), **kwargs)
    assert isinstance(given, Answer)
    assert given.scores.shape == dense.scores.shape
    assert given.extra["none"] is None
    assert given.extra["sum"][0].shape == (2,)
    slim.save(tmp_path / "slim.pt2", "pt2")
    again = torch.export.load(tmp_path / "slim.pt2").module()(image(), **kwargs)
    torch.testing.assert_close(again.scores, given.scores)


def test_a_written_file_is_pruned_again(tmp_path):
    first, second = tmp_path / "first.pt2", tmp_path / "second.pt2"
    compile(randomise(Net()), {"remove": {"*": 0.5}}, first, example=(image(),))
    report = compile(first, {"remove": {"*": 0.5}}, second)
    assert report.kept == {"channels": (2, 4), "ffn": (3, 6)}
    state = torch.export.load(second).state_dict
    assert state["up.weight"].shape == (3, 2)
    assert state["bn.running_var"].shape == (2,)


def test_hidden_is_not_heads_times_dim_in_a_checkpoint_either(tmp_path):
    """A checkpoint of hidden 40, 3 heads of 8 of a hidden of 48, pruned once more (TP#436)."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "dense")
    once, twice = tmp_path / "once", tmp_path / "twice"
    compile(tmp_path / "dense", {"shape": {"hidden": 40, "heads": 1}, "score": "magnitude"}, once)
    compile(once, {"shape": {"hidden": 36, "ffn": 48}, "score": "magnitude"}, twice)
    weights = load_file(twice / "model.safetensors")
    name = "model.layers.1.self_attn.{}.weight"
    assert weights[name.format("q_proj")].shape == (2 * 8, 36)
    assert weights[name.format("o_proj")].shape == (36, 2 * 8)
    found = json.loads((twice / "config.json").read_text())
    assert (found["hidden_size"], found["intermediate_size"]) == (36, 48)


def test_where_tracing_failed_is_told():
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(TraceError) as caught:
        gp.trace(Branch().eval(), (image(),))
    assert "test_files.py:" in caught.value.where
