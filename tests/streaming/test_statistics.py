"""Statistics are those that forward hooks see on a model whose earlier layers are treated."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import graphprune as gp
from graphprune.streaming import batches, find_sites, stream
from streaming.oracle import Halving, Moments, Wide, halved, inputs_of, tokens, traced
from zoo import convolutional, decoders, encoders, mixtures
from zoo.case import randomise


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def treated(program, samples, batch=1):
    treatment = Halving()
    sites = find_sites(program)
    data = batches(program, samples, batch)
    new = stream(program, sites, data, treatment, dtype=torch.float64)
    assert set(new) == set(sites.parameters)
    return treatment, sites, new


def oracle(module, groups, samples):
    """Treat a copy of a module group by group, with hooks; moments and new weights by name."""
    module = copy.deepcopy(module)
    moments, new = {}, {}
    for group in groups:
        owners = [name.removesuffix(".weight") for name in group.parameters]
        for name, seen in inputs_of(module, owners, samples).items():
            layer = module.get_submodule(name)
            parts = [Moments() for _ in range(getattr(layer, "groups", 1))]
            for x in seen:
                for part, rows in enumerate(rows_of(layer, x)):
                    parts[part].add(rows)
            moments[f"{name}.weight"] = parts
        for name in owners:
            layer = module.get_submodule(name)
            weight = layer.weight.data
            stored = weight.T if isinstance(layer, Conv1D) else weight
            matrices = stored.reshape(getattr(layer, "groups", 1), -1, stored[0].numel())
            result = halved(matrices, moments[f"{name}.weight"]).reshape(stored.shape)
            layer.weight.data = result.T.contiguous() if isinstance(layer, Conv1D) else result
            new[f"{name}.weight"] = layer.weight.data
    return moments, new


def rows_of(layer, x):
    """The rows that a layer multiplies, per group."""
    if isinstance(layer, nn.Linear | Conv1D):
        return [x.reshape(-1, x.shape[-1])]
    if isinstance(layer, nn.Conv1d):
        kernel, stride, pad = layer.kernel_size[0], layer.stride[0], layer.padding[0]
        x = F.pad(x, (pad, pad))
        places = range(0, x.shape[-1] - kernel + 1, stride)
        return [torch.cat([x[:, :, p : p + kernel].flatten(1) for p in places])]
    columns = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    rows = columns.transpose(1, 2).reshape(-1, columns.shape[1])
    return rows.chunk(layer.groups, dim=1)  # channels come first, in order


def compare(treatment, new, expected):
    moments, weights = expected
    assert set(weights) == set(new)
    for name in new:
        for own, wanted in zip(treatment.moments[name], moments[name], strict=True):
            assert own.rows == wanted.rows > 0
            close(own.total, wanted.total)
        close(new[name].double(), weights[name])
        assert (new[name] == 0).sum() >= new[name].numel() // 3


@pytest.mark.parametrize("build", [decoders.llama_gqa_4, decoders.gpt2, decoders.gpt_neox])
@pytest.mark.parametrize("batch", [1, 3])
def test_decoders(build, batch):
    program, module = traced(build)
    ids = tokens()
    treatment, _, new = treated(program, ids, batch)
    samples = [((), {"input_ids": part}) for part in ids.split(1)]
    compare(treatment, new, oracle(module, treatment.groups, samples))


def test_queries_keys_and_values_share_one_observer():
    program, _ = traced(decoders.llama_gqa_4)
    treatment, sites, _ = treated(program, tokens(2))
    attention = "model.layers.{}.self_attn.{}_proj.weight"
    feed = "model.layers.{}.mlp.{}_proj.weight"
    expected = [
        tuple(form.format(layer, name) for name in names)
        for layer in range(2)
        for form, names in ((attention, "qkv"), (attention, "o"), (feed, ("gate", "up")),
                            (feed, ("down",)))
    ]  # fmt: skip
    assert [g.parameters for g in sites.groups] == expected
    assert treatment.made == len(expected)
    q, k, v = (treatment.moments[n] for n in expected[0])
    assert q[0] is k[0] is v[0]
    assert "model.embed_tokens.weight" in sites.skipped
    assert sites.skipped["lm_head.weight"] == "its result is an output of the model"


def test_square_matrices_stored_the_other_way_round_are_not_mistaken():
    program, _ = traced(decoders.gpt2)
    sites = find_sites(program)
    name = "transformer.h.0.attn.c_proj.weight"
    assert program.parameters[name] == (32, 32)
    group = next(g for g in sites.groups if name in g.parameters)
    weight = program.weights[name].detach()
    assert torch.equal(group.layout(name).matrices(weight)[0], weight.T)


def test_encoder_with_two_inputs():
    program, module = traced(encoders.bert)
    ids = tokens(4, 9)
    data = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    treatment, _, new = treated(program, data, 2)
    samples = [((), {n: v[i : i + 1] for n, v in data.items()}) for i in range(4)]
    compare(treatment, new, oracle(module, treatment.groups, samples))


@pytest.mark.parametrize("build", [encoders.t5, encoders.whisper])
def test_encoder_decoders(build):
    program, module = traced(build)
    example = program.example[1]
    generator = torch.Generator().manual_seed(3)
    data = {"decoder_input_ids": tokens(3, 6)}
    if "input_ids" in example:
        data["input_ids"] = tokens(3, 9)
        data["attention_mask"] = torch.ones_like(data["input_ids"])
    else:
        shape = (3, *example["input_features"].shape[1:])
        data["input_features"] = torch.randn(shape, generator=generator).double()
    treatment, sites, new = treated(program, data)
    samples = [((), {n: v[i : i + 1] for n, v in data.items()}) for i in range(3)]
    compare(treatment, new, oracle(module, treatment.groups, samples))
    # All keys and values of the cross attention read the encoder's one result.
    assert max(len(g.parameters) for g in sites.groups) == 4


class Grouped(nn.Module):
    """Convolutions with groups, strides, dilation and uneven padding."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.a = nn.Conv2d(8, 12, (3, 2), padding=(1, 1), groups=4)
        self.b = nn.Conv2d(12, 6, 3, dilation=2, groups=2)
        self.side = nn.Conv2d(12, 6, 3, dilation=2, groups=2)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = F.relu(self.a(F.relu(self.stem(x))))
        return self.head((self.b(x) * torch.sigmoid(self.side(x))).mean((2, 3)))


def images(size, count=4):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("build", "size"), [(Grouped, 15), (convolutional.resnext, 16)], ids=["grouped", "resnext"]
)
def test_convolutions(build, size):
    module = randomise(build()).double()
    program = gp.trace(module, (images(size, 2),))
    x = images(size)
    treatment, sites, new = treated(program, x, 2)
    compare(
        treatment, new, oracle(module, treatment.groups, [((part,), {}) for part in x.split(1)])
    )
    if build is Grouped:
        assert [g.parameters for g in sites.groups][-1] == ("b.weight", "side.weight")
        assert sites.groups[-1].parts == 2


def plain_experts(module, names):
    """Per expert: the rows that reach gate_up and down, as the module's own loop computes them."""
    seen = {name: [] for name in names}
    handles = []
    for name in names:
        experts = module.get_submodule(name)

        def hook(_, args, own=seen[name]):
            own.append([a.detach().clone() for a in args])

        handles.append(experts.register_forward_pre_hook(hook))
    return seen, handles


@pytest.mark.parametrize("build", [mixtures.mixtral, mixtures.qwen3_moe])
def test_experts(build):
    program, module = traced(build)
    ids = tokens(2, 5)
    treatment, sites, new = treated(program, ids, 2)
    assert sites.skipped["model.layers.0.mlp.gate.weight"] == "a router"
    reference = copy.deepcopy(module)
    for group in treatment.groups:
        for name in group.parameters:
            path, _, leaf = name.rpartition(".")
            owner = reference.get_submodule(path)
            if leaf == "weight":
                seen = inputs_of(reference, [path], [((), {"input_ids": ids})])[path]
                parts = [Moments()]
                parts[0].add(seen[0].reshape(-1, seen[0].shape[-1]))
            else:
                calls, handles = plain_experts(reference, [path])
                with torch.no_grad(), Wide():
                    reference(input_ids=ids)
                handles[0].remove()
                x, index = calls[path][0][:2]
                parts = [Moments() for _ in range(len(owner.gate_up_proj))]
                for expert, moments in enumerate(parts):
                    rows = x.reshape(-1, x.shape[-1])[(index == expert).any(1)]
                    if leaf == "down_proj":
                        gate, up = (rows @ owner.gate_up_proj[expert].T).chunk(2, dim=-1)
                        rows = F.silu(gate) * up
                    if len(rows):
                        moments.add(rows.detach())
            weight = getattr(owner, leaf).data
            shaped = weight if weight.dim() == 3 else weight[None]
            getattr(owner, leaf).data = halved(shaped, parts).reshape(weight.shape)
            for own, wanted in zip(treatment.moments[name], parts, strict=True):
                assert own.rows == wanted.rows
                if wanted.rows:
                    close(own.total, wanted.total)
            close(new[name].double(), getattr(owner, leaf).data)


def test_an_expert_without_tokens_is_told_of_and_left_to_the_treatment():
    program, _ = traced(mixtures.mixtral)
    steps = []
    treatment = Halving()
    data = batches(program, tokens(1, 2))
    stream(
        program, find_sites(program), data, treatment, dtype=torch.float64, progress=steps.append
    )
    step = next(s for s in steps if "experts" in s.group.name)
    assert len(step.tokens) == 4
    assert sum(step.tokens) == 4  # two tokens, two experts each
    assert 0 in step.tokens
    unused = [m for m in treatment.moments[step.group.name] if not m.rows]
    assert unused
    assert all(m.calls == 0 for m in unused)


def test_a_layer_applied_twice_has_one_statistic_of_both_uses():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body, self.head = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 3)
            self.last = nn.Linear(12, 12)

        def forward(self, x):
            x = F.relu(self.body(F.relu(self.body(F.relu(self.stem(x))))))
            return self.head(F.relu(self.last(x)))

    module = randomise(Twice()).double()
    x = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    program = gp.trace(module, (x[:2],))
    treatment, sites, new = treated(program, x, 2)
    assert sites.parameters == ("stem.weight", "body.weight", "last.weight")
    stem = F.linear(x, new["stem.weight"], module.stem.bias).relu()
    once = F.linear(stem, module.body.weight, module.body.bias).relu()
    seen = treatment.moments["body.weight"][0]
    close(seen.total, (stem.T @ stem + once.T @ once).detach())
    assert seen.rows == 12
    twice = F.linear(once, new["body.weight"], module.body.bias).relu()
    close(treatment.moments["last.weight"][0].total, (twice.T @ twice).detach())
