"""The resize patch: what it changes, and that it finds what has to change."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from emit.fakes import blocks, fake_slim, zeroed
from graphprune.checkpoints.patch import (
    Patch,
    apply_patch,
    difference,
    named_tensors,
    skeleton,
    slim_name,
)
from graphprune.errors import EmitError
from graphprune.rewrite.module.attributes import find_patch
from graphprune.rewrite.module.compare import deviation, run
from graphprune.rewrite.module.module import assign, build

IDS = {"input_ids": torch.arange(3, 25).reshape(2, 11)}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Net(nn.Module):
    """A stem, a depthwise separable block with a skip, a grouped convolution and a classifier."""

    def __init__(self, width=8, inner=16, out=12, groups=4):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.expand = nn.Conv2d(width, inner, 1)
        self.depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.project = nn.Conv2d(inner, width, 1)
        self.up = nn.ConvTranspose2d(width, out, 2, stride=2)
        self.grouped = nn.Conv2d(out, out, 1, groups=groups)
        self.group_norm = nn.GroupNorm(groups, out)
        self.head = nn.Linear(out, 5)

    def forward(self, x):
        x = self.norm(self.stem(x))
        x = x + self.project(self.depthwise(self.expand(x)).relu())
        x = self.group_norm(self.grouped(self.up(x)))
        return self.head(x.mean((2, 3)))


def hand_sliced(small, weights):
    """A fresh module of the small sizes with the sliced weights."""
    small.load_state_dict({n: t for n, t in weights.items() if n in small.state_dict()})
    return small.eval()


def net_case(kept_groups):
    """Prune width 8 to 6, inner 16 to 10, and whole groups or one channel of every group."""
    width, inner = [0, 2, 3, 4, 5, 7], [0, 1, 2, 3, 5, 7, 11, 13, 14, 15]
    out = blocks(kept_groups, 3) if kept_groups else [0, 2, 3, 5, 6, 8, 9, 11]
    model = Net().eval()
    with torch.no_grad():
        model.norm.running_mean.normal_()
    within = [None, None] if kept_groups else [None, [0, 2]]
    keep = {
        "stem.weight": (width,),
        "stem.bias": (width,),
        **{f"norm.{n}": (width,) for n in ("weight", "bias", "running_mean", "running_var")},
        "expand.weight": (inner, width),
        "expand.bias": (inner,),
        "depthwise.weight": (inner,),
        "depthwise.bias": (inner,),
        "project.weight": (width, inner),
        "project.bias": (width,),
        "up.weight": (width, out),
        "up.bias": (out,),
        "grouped.weight": (out, within[1]),
        "grouped.bias": (out,),
        "group_norm.weight": (out,),
        "group_norm.bias": (out,),
        "head.weight": (None, out),
    }
    small = Net(6, 10, len(out), len(kept_groups) or 4)
    slim = fake_slim(model, keep, small, (torch.zeros(2, 3, 6, 6),))
    slim.reference = hand_sliced(small, slim.weights)
    return slim


@pytest.mark.parametrize(("kept_groups", "groups"), [([0, 2, 3], 3), ([], 4)])
def test_convolutions(kept_groups, groups):
    slim = net_case(kept_groups)
    module: Any = build(slim)
    sizes = {
        name: (part.in_channels, part.out_channels, part.groups)
        for name, part in module.named_children()
        if isinstance(part, (nn.Conv2d, nn.ConvTranspose2d))
    }
    out = 9 if kept_groups else 8
    assert sizes == {
        "stem": (3, 6, 1),
        "expand": (6, 10, 1),
        "depthwise": (10, 10, 10),
        "project": (10, 6, 1),
        "up": (6, out, 1),
        "grouped": (out, out, groups),
    }
    assert module.norm.num_features == 6
    assert (module.group_norm.num_groups, module.group_norm.num_channels) == (groups, out)
    assert (module.head.in_features, module.head.out_features) == (out, 5)
    inputs = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(module(inputs), slim.reference(inputs))


def llama_config(**changes):
    config = {
        "hidden_size": 60,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "vocab_size": 128,
        "tie_word_embeddings": True,
        "use_cache": False,
    }
    return LlamaConfig(**{**config, **changes})


def llama_slim(**options):
    """Width 60 to 36, ffn 96 to 72, key-value heads 3 to 2, layers 0 and 2 out of four left."""
    model = LlamaForCausalLM(llama_config()).eval()
    width = [i for i in range(60) if i % 5 < 3]
    ffn, queries, keys = list(range(12, 84)), blocks([0, 1, 4, 5], 16), blocks([0, 2], 16)
    keep: dict[str, Any] = {
        "model.embed_tokens.weight": (None, width),
        "lm_head.weight": (None, width),
    }
    keep["model.norm.weight"] = (width,)
    hints: dict[str, Any] = {}
    for i in range(4):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        keep |= {
            f"{attention}.q_proj.weight": (queries, width),
            f"{attention}.k_proj.weight": (keys, width),
            f"{attention}.v_proj.weight": (keys, width),
            f"{attention}.o_proj.weight": (width, queries),
            f"{mlp}.gate_proj.weight": (ffn, width),
            f"{mlp}.up_proj.weight": (ffn, width),
            f"{mlp}.down_proj.weight": (width, ffn),
            f"model.layers.{i}.input_layernorm.weight": (width,),
            f"model.layers.{i}.post_attention_layernorm.weight": (width,),
        }
        hints[attention] = [(6, 4), (3, 2), (96, 64), (48, 32), (60, 36)]
        hints[mlp] = [(96, 72), (60, 36)]
    config = llama_config(
        hidden_size=36,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    reference = LlamaForCausalLM(config)
    dropped = {"model.layers": [1, 3]}
    slim = fake_slim(model, keep, reference, IDS, hints=hints, dropped=dropped, **options)
    hand_sliced(reference, slim.weights)
    return slim


def test_grouped_query_attention_and_layers():
    slim = llama_slim()
    module: Any = build(slim)
    assert isinstance(module, LlamaForCausalLM)
    assert len(module.model.layers) == 2
    for i, layer in enumerate(module.model.layers):
        attention = layer.self_attn
        # Three was the number of key-value heads, which changed, and of queries in a group.
        assert attention.num_key_value_groups == 2
        assert (attention.head_dim, attention.scaling, attention.layer_idx) == (16, 0.25, i)
        assert (attention.q_proj.in_features, attention.q_proj.out_features) == (36, 64)
        assert (layer.mlp.hidden_size, layer.mlp.intermediate_size) == (36, 72)
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert module.config.num_hidden_layers == 2
    assert slim.program.module.config.num_hidden_layers == 4
    assert slim.program.module.config is not module.config
    torch.testing.assert_close(module(**IDS).logits, slim.reference(**IDS).logits)
    # Key-value caches are indexed by the renumbered layers.
    tokens = module.generate(**IDS, max_new_tokens=3, do_sample=False, use_cache=True)
    again = module.generate(**IDS, max_new_tokens=3, do_sample=False, use_cache=False)
    assert torch.equal(tokens, again)


def test_weights_are_not_shared_with_the_original():
    model = LlamaForCausalLM(llama_config(num_hidden_layers=2)).eval()
    slim = fake_slim(model, {}, model, IDS)
    slim.weights = slim.program.weights  # nothing was cut: the very same tensors
    before = model.model.norm.weight.clone()
    module: Any = build(slim)
    with torch.no_grad():
        module.model.norm.weight.zero_()
    assert torch.equal(model.model.norm.weight, before)


def test_dense_weights_may_have_been_let_go_of():
    slim = llama_slim()
    model = slim.program.module
    for owner in model.modules():
        for name, _ in list(owner.named_parameters(recurse=False)):
            setattr(owner, name, None)
    slim.program.aliases["lm_head.weight"] = "model.embed_tokens.weight"
    module: Any = build(slim)
    assert module.lm_head.weight is module.model.embed_tokens.weight
    torch.testing.assert_close(module(**IDS).logits, slim.reference(**IDS).logits)


def test_fused_transposed_projection():
    config = GPT2Config(
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=64,
        vocab_size=128,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = GPT2LMHeadModel(config).eval()
    rows = blocks([0, 1, 3], 16)
    fused = [64 * part + i for part in range(3) for i in rows]
    keep: dict[str, Any] = {}
    zeros: dict[str, Any] = {}
    hints: dict[str, Any] = {}
    for i in range(2):
        attention = f"transformer.h.{i}.attn"
        keep[f"{attention}.c_attn.weight"] = (None, fused)
        keep[f"{attention}.c_attn.bias"] = (fused,)
        keep[f"{attention}.c_proj.weight"] = (rows, None)
        zeros[f"{attention}.c_proj.weight"] = (0, blocks([2], 16))
        hints[attention] = [(4, 3), (64, 48), (192, 144)]
    slim = fake_slim(model, keep, zeroed(model, zeros), IDS, hints=hints)
    module: Any = build(slim)
    for block in module.transformer.h:
        assert (block.attn.num_heads, block.attn.split_size, block.attn.head_dim) == (3, 48, 16)
        assert (block.attn.c_attn.nx, block.attn.c_attn.nf) == (64, 144)
        assert block.attn.c_proj.nf == 64  # also a size that changed, elsewhere
        assert block.mlp.c_fc.nf == 256
    torch.testing.assert_close(module(**IDS).logits, slim.reference(**IDS).logits)


class Heads(nn.Module):
    """An attention-like module with sizes under various names, and two that only look so."""

    def __init__(self, width=32, heads=4, window=32):
        super().__init__()
        self.heads = heads
        self.sizes = [width, width]
        self.window = window
        self.note = width
        self.both = nn.Linear(width, 2 * width)
        self.scale = nn.Parameter(torch.randn(heads, 1))
        self.register_buffer("offset", torch.randn(width), persistent=False)
        self.table = torch.randn(width)  # a plain attribute

    def forward(self, x):
        a, b = self.both(x).split(self.sizes, -1)
        a = a.view(*a.shape[:-1], self.heads, -1) * self.scale
        x = a.flatten(-2) + b * self.offset + self.table
        return x[:, : self.window]


class Stack(nn.Module):
    """Blocks in a sequential, a norm without weights and a flattening classifier."""

    def __init__(self, width=32, heads=4, depth=3):
        super().__init__()
        self.depth = depth
        self.blocks = nn.Sequential(*(Heads(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.recurrent = nn.LSTM(width, width, batch_first=True)
        self.flat = nn.Sequential(nn.Flatten(1), nn.Linear(5 * width, 7))

    def forward(self, x):
        for i in range(self.depth):
            x = self.blocks[i](x)
        return self.flat(self.recurrent(self.norm(x))[0])


def stack_slim():
    """Width 32 to 24 (heads 4 to 3), the middle one of three blocks dropped."""
    model: Any = Stack()
    width = blocks([0, 2, 3], 8)
    gates = [32 * gate + i for gate in range(4) for i in width]
    keep: dict[str, Any] = {}
    hints: dict[str, Any] = {"norm": [(32, 24)], "recurrent": [(32, 24), (128, 96)]}
    for i in range(3):
        prefix = f"blocks.{i}"
        keep |= {
            f"{prefix}.both.weight": ([*width, *(32 + j for j in width)], width),
            f"{prefix}.both.bias": ([*width, *(32 + j for j in width)],),
            f"{prefix}.scale": ([0, 2, 3],),
            f"{prefix}.offset": (width,),
        }
        hints[prefix] = [(64, 48), (32, 24), (4, 3)]
    for name, tensor in model.recurrent.named_parameters():
        keep[f"recurrent.{name}"] = (gates, width)[: tensor.dim()]
    keep["flat.1.weight"] = (None, [32 * i + j for i in range(5) for j in width])
    example = (torch.zeros(2, 5, 24),)
    slim = fake_slim(model, keep, Stack(24, 3, 2), example, hints=hints, dropped={"blocks": [1]})
    reference: Any = slim.reference
    for i, old in enumerate((0, 2)):
        slim.weights[f"blocks.{i}.table"] = model.blocks[old].table[width]
        reference.blocks[i].table = slim.weights[f"blocks.{i}.table"]
        reference.blocks[i].offset = slim.weights[f"blocks.{i}.offset"]
    hand_sliced(reference, slim.weights)
    return slim


def test_sizes_are_told_from_coincidences():
    slim = stack_slim()
    module: Any = build(slim)
    assert module.depth == 2
    assert len(module.blocks) == 2
    for block in module.blocks:
        assert (block.heads, block.sizes, block.note) == (3, [24, 24], 24)
        assert block.window == 32  # read, but without effect: kept
        assert block.table.shape == (24,)
    assert module.norm.normalized_shape == (24,)
    assert (module.recurrent.input_size, module.recurrent.hidden_size) == (24, 24)
    inputs = torch.randn(2, 5, 24)
    torch.testing.assert_close(module(inputs), slim.reference(inputs))


def test_the_failing_module_is_named():
    model = Stack(depth=1)
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model)}
    shapes["blocks.0.scale"] = (3, 1)

    def check(module):
        assign(module, {n: torch.zeros(s) for n, s in shapes.items()}, {})
        module(torch.zeros(2, 5, 32))
        return True

    with pytest.raises(EmitError) as caught:
        find_patch(model, shapes, {}, {"blocks.0": [(4, 3)]}, check)
    assert "blocks.0" in str(caught.value.where)
    assert caught.value.why


def test_a_tensor_cannot_grow():
    model = nn.Linear(4, 4)
    with pytest.raises(EmitError, match="cannot be resized"):
        find_patch(model, {"weight": (5, 4)}, {}, {}, lambda module: True)


def test_falls_back_to_the_graph_with_a_warning():
    slim = net_case([0, 1])
    slim.reference = nn.Sequential(nn.Flatten(), nn.Linear(108, 5)).eval()  # something else
    with pytest.warns(UserWarning, match="exported graph instead"):
        assert build(slim) is slim.reference
    slim.program.module = None  # there is none to resize: nothing to warn of
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build(slim) is slim.reference


def test_skeleton_has_ties_and_no_memory():
    model = LlamaForCausalLM(llama_config())
    copy: Any = skeleton(model)
    assert all(tensor.is_meta for _, tensor in named_tensors(copy))
    assert copy.lm_head.weight is copy.model.embed_tokens.weight
    assert copy.config is not model.config
    assert not model.lm_head.weight.is_meta


def test_apply_patch_keeps_dtype_ties_and_gradients():
    model: Any = LlamaForCausalLM(llama_config())
    model.to(torch.bfloat16)
    model.lm_head.weight.requires_grad_(False)
    old = model.lm_head.weight.detach().clone()
    names = ("lm_head.weight", "model.embed_tokens.weight")
    apply_patch(model, Patch(shapes=dict.fromkeys(names, (128, 48))))
    new = model.lm_head.weight
    assert new is model.model.embed_tokens.weight
    assert (new.dtype, new.requires_grad, tuple(new.shape)) == (torch.bfloat16, False, (128, 48))
    assert torch.equal(new, old[:, :48])


def test_json_round_trip():
    model: Any = nn.ModuleDict(
        {"norm": nn.LayerNorm(8), "blocks": nn.ModuleList([nn.Linear(8, 8)] * 3)}
    )
    patch = Patch(
        dropped={"blocks": [0, 2]},
        shapes={"norm.weight": (6,), "norm.bias": (6,)},
        attributes={"norm": {"normalized_shape": (6,)}},
    )
    read = Patch.from_json(json.loads(json.dumps(patch.to_json())))
    apply_patch(model, read)
    assert model["norm"].normalized_shape == (6,)  # a tuple again
    assert len(model["blocks"]) == 1
    assert model["norm"](torch.ones(6)).shape == (6,)


def test_named_children_keep_their_names():
    inner = nn.Sequential()
    for name in ("first", "second", "third"):
        inner.add_module(name, nn.Linear(2, 2))
    model: Any = nn.Sequential(inner, nn.Sequential(nn.ReLU(), nn.Tanh()))
    apply_patch(model, Patch(dropped={"0": [1], "1": [0]}))
    assert [name for name, _ in model[0].named_children()] == ["first", "third"]
    assert isinstance(model[1][0], nn.Tanh)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layers.0.a.weight", "layers.0.a.weight"),
        ("layers.1.a.weight", None),
        ("layers.4.a.weight", "layers.2.a.weight"),
        ("layers.2.blocks.3.x", "layers.1.blocks.2.x"),
        ("other.1.x", "other.1.x"),
    ],
)
def test_slim_name(name, expected):
    assert slim_name(name, {"layers": [1, 3], "layers.2.blocks": [0]}) == expected


def test_difference_finds_factors_and_buffers():
    base: Any = Heads(16, 2)
    slim: Any = Heads(16, 2)
    slim.offset = base.offset.clone()
    base.factor, slim.factor = 0.25, 0.5
    assert difference(base, slim).to_json() == {"attributes": {"": {"factor": 0.5}}}
    slim.offset = slim.offset + 1
    patch = difference(base, slim)
    assert patch.persistent == ["offset"]
    apply_patch(base, patch)
    assert "offset" in base.state_dict()


def test_deviation_reads_all_outputs():
    model = nn.Linear(3, 3)
    inputs: Any = ((torch.randn(2, 3),), {})
    expected = run(lambda x: {"a": model(x), "b": (x, None)}, inputs)
    assert list(expected) == ["a", "b.0"]
    assert deviation({**expected, "extra": torch.zeros(1)}, expected) is None
    assert "shape None" in str(deviation({"a": expected["a"]}, expected))
    assert "differs by" in str(deviation({**expected, "b.0": expected["b.0"] + 1e-2}, expected))
    nan = expected["a"].clone()
    nan[0, 0] = torch.nan
    assert "NaN" in str(deviation({**expected, "a": nan}, expected))
    assert deviation({**expected, "a": nan}, {**expected, "a": nan}) is None
