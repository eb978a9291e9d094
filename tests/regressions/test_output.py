"""Complaints about what comes out (structured.md, section 3 F and G): files that load and run."""

import json

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import graphprune as gp
from graphprune.errors import PlanError
from graphprune.frontends.hf.load import trace_model
from graphprune.pipeline.compiler import compile
from regressions.hand import blocks, kept, plan_of, structure_at, verified
from zoo import convolutional
from zoo.case import randomise

SIZES = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def llama(heads=6, kv_heads=3, **sizes):
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES | sizes, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=8
    )
    return LlamaForCausalLM(config).eval()


def qwen(heads=16, kv_heads=2, **sizes):
    torch.manual_seed(0)
    config = Qwen2Config(
        **SIZES | sizes, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=4
    )
    return Qwen2ForCausalLM(config).eval()


def test_46_54_stock_classes_load_it_and_generate(tmp_path):
    dense, slim = saved(llama(), tmp_path / "dense"), tmp_path / "slim"
    report = compile(
        dense, {"score": "magnitude", "remove": {"ffn": 0.25, "heads": "1/3", "hidden": 0.25}}, slim
    )
    assert report.native
    model = AutoModelForCausalLM.from_pretrained(slim)
    assert type(model) is LlamaForCausalLM
    assert (model.config.hidden_size, model.config.num_attention_heads) == (36, 4)
    ids = torch.randint(0, 64, (2, 5))
    cached = model.generate(ids, max_new_tokens=6, do_sample=False)
    plain = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("fraction", [0.1, 0.3])
def test_47_any_ratio_gives_a_checkpoint_that_loads(tmp_path, fraction):
    """16 heads in 2 groups: query heads go in equal numbers from each group, or not at all."""
    dense, slim = saved(qwen(num_hidden_layers=1), tmp_path / "dense"), tmp_path / "slim"
    compile(dense, {"score": "magnitude", "remove": {"query_heads": fraction}}, slim)
    config = AutoModelForCausalLM.from_pretrained(slim).config
    left = 8 - int(fraction * 8 + 0.5)
    assert (config.num_attention_heads, config.num_key_value_heads) == (2 * left, 2)
    weights = load_file(slim / "model.safetensors")
    name = "model.layers.0.self_attn.{}_proj.weight"
    assert weights[name.format("q")].shape == (2 * left * 4, 48)
    assert weights[name.format("k")].shape == (2 * 4, 48)


def test_48_49_layers_are_uniform_and_the_head_size_is_written_down(tmp_path):
    """What converters and servers read: one number for all layers, and no derived head size."""
    dense, slim = saved(llama(), tmp_path / "dense"), tmp_path / "slim"
    compile(dense, {"score": "magnitude", "remove": {"ffn": 0.3, "heads": "1/3"}}, slim)
    config = json.loads((slim / "config.json").read_text())
    assert config["head_dim"] == 8
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "auto_map" not in config
    for name, tensor in load_file(slim / "model.safetensors").items():
        sizes = {
            "q_proj": (config["num_attention_heads"] * 8, 48),
            "k_proj": (config["num_key_value_heads"] * 8, 48),
            "up_proj": (config["intermediate_size"], 48),
            "down_proj": (48, config["intermediate_size"]),
        }
        wanted = next((shape for part, shape in sizes.items() if part in name), tensor.shape)
        assert tensor.shape == wanted, name


def test_48_layers_that_differ_are_never_written_as_a_plain_checkpoint(tmp_path):
    dense, slim = saved(llama(), tmp_path / "dense"), tmp_path / "slim"
    recipe = {"score": "magnitude", "remove": {"model.layers.1.*/ffn": 0.5}, "native": "require"}
    with pytest.raises(gp.EmitError, match="no native Hugging Face config"):
        compile(dense, recipe, slim)
    assert not slim.exists()


def test_50_tensors_and_a_plan_come_out_and_no_pickle(tmp_path):
    dense, slim = saved(llama(), tmp_path / "dense"), tmp_path / "slim"
    compile(dense, {"score": "magnitude", "remove": {"ffn": 0.5}}, slim)
    assert not [f.name for f in slim.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".pkl")]
    program = gp.load(dense)
    plan = gp.Plan.load(slim / "graphprune_plan.json")
    module = gp.apply(program, plan).module  # the class and a state dict, by the plan alone
    module.load_state_dict(load_file(slim / "model.safetensors"), strict=False)
    assert type(module) is LlamaForCausalLM


def test_51_an_onnx_file_has_the_slim_sizes(tmp_path):
    program = gp.trace(randomise(convolutional.resnet_basic()), (torch.randn(2, 3, 8, 8),))
    slim = verified(program, gp.select(program, remove={"channels": 0.5}, score="random"))
    slim.save(tmp_path / "slim.onnx", "onnx")
    model = onnx.load(tmp_path / "slim.onnx")
    found = sum(torch.Size(t.dims).numel() for t in model.graph.initializer if len(t.dims) > 1)
    assert found == sum(p.numel() for p in slim.module.parameters() if p.dim() > 1)
    assert found < sum(p.numel() for p in program.module.parameters() if p.dim() > 1) / 2
    session = onnxruntime.InferenceSession(tmp_path / "slim.onnx")
    x = torch.randn(3, 3, 8, 8)
    (given,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(given), slim.module(x), atol=1e-4, rtol=1e-3)


def test_52_sizes_are_aligned_and_the_speed_is_measured(tmp_path):
    dense, slim = saved(llama(heads=4, kv_heads=2), tmp_path / "dense"), tmp_path / "slim"
    report = compile(
        dense, {"score": "magnitude", "remove": {"ffn": 0.4, "hidden": 0.2}, "align": 16}, slim
    )
    config = json.loads((slim / "config.json").read_text())
    assert (config["intermediate_size"], config["hidden_size"]) == (32, 32)
    assert report.before.torch.milliseconds > 0
    assert report.after.torch.milliseconds > 0


def test_53_layers_are_counted_anew_for_the_cache(tmp_path):
    dense, slim = saved(llama(num_hidden_layers=4), tmp_path / "dense"), tmp_path / "slim"
    compile(dense, {"score": "magnitude", "shape": {"layers": 2}}, slim)
    model = AutoModelForCausalLM.from_pretrained(slim)
    assert model.config.num_hidden_layers == 2
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    ids = torch.randint(0, 64, (1, 4))
    cached = model.generate(ids, max_new_tokens=5, do_sample=False)
    plain = model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)


def test_57_embeddings_and_heads_follow_hidden():
    program = trace_model(llama())
    hidden = structure_at(program, "model.norm.weight", 0)
    units = [*range(0, 48, 3)]
    plan = plan_of(program, (hidden, units))
    verified(program, plan)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert kept(program, plan, name) == [[*range(64)], units]


class CrossAttention(nn.Module):
    """A diffusion block's: queries of the image, keys and values of the text."""

    def __init__(self, width=20, text=14, heads=4, dim=6):
        super().__init__()
        self.sizes = heads, dim
        self.stem, self.embed = nn.Linear(8, width), nn.Linear(5, text)
        self.to_q = nn.Linear(width, heads * dim, bias=False)
        self.to_k, self.to_v = (nn.Linear(text, heads * dim, bias=False) for _ in range(2))
        self.to_out, self.last = nn.Linear(heads * dim, width), nn.Linear(width, 3)

    def forward(self, x, text):
        heads, dim = self.sizes
        x, text = self.stem(x), self.embed(text)
        b = x.shape[0]
        q = self.to_q(x).view(b, -1, heads, dim).transpose(1, 2)
        k, v = (f(text).view(b, -1, heads, dim).transpose(1, 2) for f in (self.to_k, self.to_v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, -1, heads * dim)
        return self.last(x + self.to_out(y))


def test_61_heads_of_a_cross_attention_are_whole():
    args = (torch.randn(2, 9, 8), torch.randn(2, 4, 5))
    program = gp.trace(randomise(CrossAttention()), args)
    heads = structure_at(program, "to_q.weight", 0, "kv_heads")
    width, text = (structure_at(program, f"{n}.weight", 1) for n in ("to_q", "to_k"))
    assert (heads.size, width.size, text.size) == (4, 20, 14)
    plan = plan_of(program, (heads, [0, 3]), (text, [*range(7)]))
    verified(program, plan)
    for name in ("to_q", "to_k", "to_v"):
        assert kept(program, plan, f"{name}.weight")[0] == blocks([0, 3], 6)
    assert kept(program, plan, "to_out.weight")[1] == blocks([0, 3], 6)
    assert kept(program, plan, "to_v.weight")[1] == [*range(7)]


def test_62_a_plan_is_plain_json(tmp_path):
    program = gp.trace(randomise(CrossAttention()), (torch.randn(2, 9, 8), torch.randn(2, 4, 5)))
    plan = gp.select(program, remove={"*": 0.5}, score="random")
    plan.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data.keys() == {"schema", "fingerprint", "structures"}
    assert "torch" not in json.dumps(data)
    for entry in data["structures"].values():
        assert entry.keys() == {"role", "size", "count", "kept", "parameters", "scores"}


@torch.library.custom_op("regressions::mixed", mutates_args=())
def mixed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight.softmax(0)


@mixed.register_fake
def _(x, weight):
    return x.new_empty(x.shape[0], weight.shape[1])


class Raw(nn.Module):
    """A parameter of its own in an operator that nobody knows, and one in plain arithmetic."""

    def __init__(self):
        super().__init__()
        self.up, self.gain = nn.Linear(6, 12), nn.Parameter(torch.ones(12))
        self.table, self.down = nn.Parameter(torch.ones(12, 5)), nn.Linear(5, 2)

    def forward(self, x):
        x = F.relu(self.up(x)) * self.gain
        return self.down(torch.ops.regressions.mixed(x, self.table))


def test_63_parameters_of_ones_own_are_cut_or_refused_by_name():
    program = gp.trace(randomise(Raw()), (torch.randn(4, 6),))
    with pytest.raises(PlanError) as caught:
        gp.select(program, remove={"ffn": 0.5})
    assert "regressions.mixed" in str(caught.value)
    assert "test_output.py:" in str(caught.value)
    reasons = program.frozen()
    for place in (("table", 0), ("table", 1), ("gain", 0), ("up.weight", 0)):
        assert "no rule for operator regressions.mixed (mixed at test_output.py:" in reasons[place]
