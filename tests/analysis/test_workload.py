"""Multiply-accumulates by hand, of one input wherever they are stated."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import graphprune as gp
from graphprune.ir.torch.workload import example_at
from graphprune.measure.compare import measure_sources
from graphprune.rewrite.slim_onnx import SlimOnnx
from onnx_graphs import graph, weights, written


class Mlp(nn.Module):
    def __init__(self, inner: int = 12) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, inner), nn.Linear(inner, 3)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 8, 3, padding=1)
        self.two = nn.Conv2d(8, 4, 3, stride=2, padding=1)

    def forward(self, x):
        return self.two(torch.relu(self.one(x)))


class Prompted(nn.Module):
    """Five learnt places before the tokens, and a convolution over all places."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.before = nn.Embedding(11, 8), nn.Parameter(torch.randn(5, 8))
        self.up, self.conv, self.down = nn.Linear(8, 12), nn.Conv1d(12, 6, 4), nn.Linear(6, 11)

    def forward(self, input_ids):
        x = self.table(input_ids)
        x = torch.cat([self.before.expand(x.shape[0], 5, 8), x], 1)
        y = torch.relu(self.conv(torch.relu(self.up(x)).transpose(1, 2)))
        return self.down(y.transpose(1, 2))


FUSSY = """
import torch
from torch import nn

class Fussy(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x):
        if not torch.compiler.is_compiling() and len(x) == 1:
            raise ValueError("one sample has no spread")
        return self.down(torch.relu(self.up(x)))

def build():
    return Fussy().eval(), (torch.randn(3, 6),)
"""


def halved(program, role="ffn"):
    return gp.apply(program, gp.select(program, remove={role: 0.5}, score="random"))


def test_an_mlp():
    program = gp.trace(Mlp().eval(), (torch.randn(4, 5),))
    assert str(program.workload) == "1 x 5"
    assert program.costs.total().macs == 5 * 12 + 12 * 3
    assert halved(program).cost.macs == 5 * 6 + 6 * 3
    assert program.structures[0].macs == 5 + 3
    assert [
        tuple(x.shape) for x in example_at(program.exported, program.example, program.workload)[0]
    ] == [(1, 5)]


def test_convolutions():
    program = gp.trace(Convolutions().eval(), (torch.randn(2, 3, 16, 16),))
    assert str(program.workload) == "1 x 3 x 16 x 16"
    assert program.costs.total().macs == 256 * 27 * 8 + 64 * 72 * 4
    assert halved(program, "channels").cost.macs == 256 * 27 * 4 + 64 * 36 * 4


def test_a_batch_that_is_fixed_is_counted_and_said():
    program = gp.trace(Mlp().eval(), (torch.randn(4, 5),), dynamic_shapes={"x": None})
    assert str(program.workload) == "4 x 5"
    assert program.costs.total().macs == 4 * (5 * 12 + 12 * 3)


@pytest.mark.parametrize("length", [None, 40])
def test_sizes_that_follow_from_the_length(length):
    """A sum and a difference of sizes, which don't grow in proportion."""
    program = gp.trace(Prompted().eval(), (), {"input_ids": torch.ones(2, 13, dtype=torch.long)})
    workload = program.workload if length is None else program.workload_of(length)
    tokens = 128 if length is None else length
    assert str(workload) == f"1 x {tokens} tokens"
    places = tokens + 5

    def macs(ffn, latent):
        return places * 8 * ffn + (places - 3) * (ffn * 4 * latent + latent * 11)

    assert program.costs_at(workload).total().macs == macs(12, 6)
    slim = halved(program, "channels")
    kept = {name: shape for name, shape in slim.shapes.items() if name.endswith("weight")}
    assert slim.cost_at(workload).macs == macs(kept["up.weight"][0], kept["conv.weight"][0])
    assert slim.cost_at(workload).macs < macs(12, 6)


def gpt2(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "n_positions": 64, "n_embd": 24, "n_layer": 2, "n_head": 3}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **changes}, bos_token_id=0, eos_token_id=0))


def test_a_language_model_has_no_more_tokens_than_it_can_take(tmp_path):
    gpt2().save_pretrained(tmp_path)
    program = gp.load(tmp_path)
    assert str(program.workload) == "1 x 64 tokens"
    linear = 24 * 72 + 24 * 24 + 2 * 24 * 96
    assert program.costs.total().macs == 2 * (64 * linear + 2 * 24 * 64 * 64) + 64 * 24 * 31
    parameters = sum(p.numel() for p in gpt2().parameters())
    assert (program.costs.total().params, program.costs.total().bytes) == (
        parameters,
        4 * parameters,
    )


def test_masks_are_of_the_same_size(tmp_path):
    config = BertConfig(vocab_size=31, hidden_size=24, num_hidden_layers=1, num_attention_heads=3,
                        intermediate_size=40)  # fmt: skip
    BertModel(config).save_pretrained(tmp_path)
    program = gp.load(tmp_path)
    assert str(program.workload) == "1 x 128 tokens"
    assert program.workload.shapes == {"input_ids": (1, 128), "attention_mask": (1, 128)}
    per_token = 4 * 24 * 24 + 2 * 24 * 40
    assert program.costs.total().macs == 128 * per_token + 2 * 24 * 128 * 128 + 24 * 24


def test_compile_and_eval_state_the_same_numbers(tmp_path):
    source, output = tmp_path / "dense", tmp_path / "slim"
    gpt2(n_positions=256).save_pretrained(source)
    recipe = {"remove": {"ffn": 0.5}, "score": "magnitude"}
    dry = gp.compile(str(source), recipe, dry_run=True)
    report = gp.compile(str(source), recipe, output, formats=["hf", "pt2"])
    shown = json.loads((output / "report.json").read_text())
    files = [str(source), str(output), str(output / "model.pt2")]
    found = measure_sources(files, (), None, None, lambda stage: None)
    dense, slim, graph_file = found.models
    for name in ("parameters", "macs", "bytes", "input", "inputs"):
        assert getattr(dense, name) == getattr(report.before, name) == getattr(dry.before, name)
        assert getattr(slim, name) == getattr(report.after, name) == getattr(dry.after, name)
        assert getattr(graph_file, name) == getattr(slim, name)
    taken = shown["run"]["latency"]["after"]["torch"]
    assert slim.torch.macs == shown["after"]["macs"] == taken["macs"]
    linear = 24 * 72 + 24 * 24 + 2 * 24 * 48
    assert slim.macs == 2 * (128 * linear + 2 * 24 * 128 * 128) + 128 * 24 * 31
    assert slim.files == report.after.files == (output / "model.safetensors").stat().st_size
    assert dense.files == report.before.files == (source / "model.safetensors").stat().st_size
    assert slim.bytes == 4 * sum(p.numel() for p in gpt2(n_positions=256, n_inner=48).parameters())


def test_a_model_that_fails_with_one_sample_is_timed_as_it_was_traced(tmp_path):
    factory = tmp_path / "net.py"
    factory.write_text(FUSSY)
    report = gp.compile(f"{factory}:build", {"remove": {"ffn": 0.5}}, tmp_path / "slim.pt2")
    assert report.before.input == report.after.input == "3 x 6"
    assert report.before.macs == report.before.torch.macs == 3 * (6 * 12 + 12 * 3)
    assert report.after.macs == 3 * (6 * 6 + 6 * 3)
    assert any("the traced input, 3 x 6" in note for note in report.notes)


def test_onnx(tmp_path):
    model = graph(
        """ g (int64[batch, length] ids) => (float[batch, length, 5] y) {
          x = Gather(table, ids)
          h = MatMul(x, w1)
          r = Relu(h)
          o = MatMul(r, w2)
          t = Transpose<perm = [0, 2, 1]>(o)
          a = MatMul(o, t)
          y = MatMul(a, o)
        }""",
        table=weights(11, 8), w1=weights(8, 16), w2=weights(16, 5),
    )  # fmt: skip
    program = gp.load(written(model, tmp_path))
    plan = gp.select(program, remove={"ffn": 0.5}, score="random")

    def macs(length, ffn):
        return length * (8 * ffn + ffn * 5) + 2 * length * length * 5

    assert str(program.workload) == "1 x 128 tokens"
    assert program.costs.total().macs == macs(128, 16)
    assert SlimOnnx(program, plan).cost.macs == macs(128, 8)
    assert program.costs_at(program.workload_of(9)).total().macs == macs(9, 16)
