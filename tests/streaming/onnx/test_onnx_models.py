"""Exported models are pruned as the PyTorch models that they come from."""

from __future__ import annotations

import contextlib
import copy
import io

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.frontends.onnx.load import load_onnx
from graphprune.passes.masks.oneshot import sparsify
from graphprune.passes.masks.sparsegpt import SparseGPT
from graphprune.passes.masks.wanda import Wanda
from graphprune.passes.repair import structured
from graphprune.solvers import NM, Unstructured
from graphprune.streaming import find_sites
from onnx_graphs import initialisers
from streaming.oracle import tokens, traced
from zoo import encoders
from zoo.case import randomise

# What the exporter says of its sources is not of interest here.
pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]


class Images(nn.Module):
    """Grouped, strided and dilated convolutions, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(12, 18, 3, groups=3, padding=(1, 0), dilation=(1, 2))
        self.point = nn.Conv2d(18, 12, 1)
        self.hidden = nn.Linear(12, 20)
        self.head = nn.Linear(20, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(self.point(torch.relu(self.grouped(x))))
        return self.head(torch.relu(self.hidden(x.mean((2, 3)))))


class Block(nn.Module):
    """Causal attention with grouped keys and values, and a gated network."""

    def __init__(self, width=32, heads=4, kv=2):
        super().__init__()
        self.heads, self.kv, self.dim = heads, kv, width // heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.o = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, kv * self.dim) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, 48, bias=False) for _ in range(2))
        self.down = nn.Linear(48, width)

    def forward(self, x, mask):
        h = self.first(x)
        batch, length, _ = h.shape
        q = self.q(h).view(batch, length, self.heads, self.dim).transpose(1, 2)
        k, v = (
            part(h).view(batch, length, self.kv, self.dim).transpose(1, 2)
            .repeat_interleave(self.heads // self.kv, dim=1)
            for part in (self.k, self.v)
        )  # fmt: skip
        scores = q @ k.transpose(-1, -2) / self.dim**0.5
        mixed = scores.masked_fill(mask, float("-inf")).softmax(-1) @ v
        x = x + self.o(mixed.transpose(1, 2).reshape(batch, length, -1))
        h = self.second(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    """A small causal language model."""

    def __init__(self, width=32, vocabulary=96):
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids):
        length = input_ids.shape[1]
        mask = torch.ones(length, length).triu(1).bool()
        x = self.table(input_ids)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


class Encoder(nn.Module):
    """The classes of an encoder, by the names of its inputs."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]


def exported(module, args, names, folder):
    file = folder / "model.onnx"
    with quiet():
        torch.onnx.export(
            module, args, str(file), dynamo=False, opset_version=17, input_names=names,
            dynamic_axes={n: {0: "batch", 1: "length"} for n in names if n != "x"},
        )  # fmt: skip
    return load_onnx(file)


def quiet():
    stack = contextlib.ExitStack()
    stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
    stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
    stack.enter_context(torch.no_grad())
    return stack


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    torch.manual_seed(0)
    module = randomise(Decoder()).eval()
    program = gp.trace(module, (tokens()[:1],))
    onnx_program = exported(module, (tokens()[:1],), ["input_ids"], tmp_path_factory.mktemp("lm"))
    return program, onnx_program


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    program, module = traced(encoders.bert)
    args = (tokens(2, 9), torch.ones(2, 9, dtype=torch.int64))
    names = ["input_ids", "attention_mask"]
    wrapped = Encoder(copy.deepcopy(module).float())
    return program, exported(wrapped, args, names, tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    torch.manual_seed(0)
    module = randomise(Images()).eval()
    args = (torch.randn(1, 3, 17, 17),)
    return gp.trace(module, args), exported(module, args, ["x"], tmp_path_factory.mktemp("images"))


def matrices(program, found):
    """All pruned weights in one form, in the order of treatment."""
    sites = find_sites(program)
    for group in sites.groups:
        for name in group.parameters:
            yield group.layout(name).matrices(found.program.weights[name])


def compare(pair, data, solver, pattern):
    """Prune both; masks are equal, and weights as far as float32 goes."""
    found = [sparsify(program, data, solver, pattern) for program in pair]
    assert [e.removed for e in found[0].layers] == [e.removed for e in found[1].layers]
    weights = [list(matrices(p, f)) for p, f in zip(pair, found, strict=True)]
    for a, b in zip(*weights, strict=True):
        assert torch.equal(a == 0, b == 0)
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    for a, b in zip(found[0].layers, found[1].layers, strict=True):
        assert (a.error is None) == (b.error is None)
        assert a.error is None or b.error == pytest.approx(a.error, rel=1e-3, abs=1e-6)
    return found[1]


SOLVERS = [(Wanda(), Unstructured(0.5)), (Wanda(), NM(2, 4)), (SparseGPT(), Unstructured(0.5))]


@pytest.mark.parametrize(("solver", "pattern"), SOLVERS, ids=str)
def test_a_decoder(decoder, solver, pattern):
    found = compare(decoder, tokens(), solver, pattern)
    assert len(found.layers) == 14
    assert found.sparsity == 0.5


@pytest.mark.parametrize(("solver", "pattern"), SOLVERS, ids=str)
def test_an_encoder_with_padding(bert, solver, pattern):
    windows = tokens(4, 9)
    mask = torch.ones_like(windows)
    mask[0, 5:] = mask[2, 3:] = 0
    data = {"input_ids": windows, "attention_mask": mask}
    compare(bert, data, solver, pattern)


@pytest.mark.parametrize(("solver", "pattern"), [SOLVERS[0], SOLVERS[2]], ids=str)
def test_convolutions(images, solver, pattern):
    data = torch.randn(6, 3, 17, 17, generator=torch.Generator().manual_seed(2))
    found = compare(images, data, solver, pattern)
    assert len(found.layers) == 4


def test_a_budget_that_passes_the_samples_twice(decoder):
    torch_found, found = (
        sparsify(program, tokens(), Wanda(), Unstructured(0.6), budget="owl") for program in decoder
    )
    shares = [[e.sparsity for e in f.layers] for f in (torch_found, found)]
    assert shares[0] == pytest.approx(shares[1], abs=2e-3)
    assert len(set(shares[1])) > 1


@pytest.mark.parametrize("reference", [False, True])
def test_the_repair_of_structured_pruning(decoder, reference):
    """With a reference, the model also runs as the plan leaves it, beside the dense one."""
    data = torch.randint(3, 96, (12, 7), generator=torch.Generator().manual_seed(3))
    layers, weights = [], []
    for program in decoder:
        plan = gp.select(program, remove={"ffn": 0.5, "kv_heads": 0.5})
        found = structured.reconstruct(program, data, plan, reference=reference)
        layers.append([(e.removed, e.before, e.error) for e in found.layers])
        names = [e.parameter for e in found.layers]
        weights.append([found.program.weights[n].clone() for n in names])
        slim = gp.apply(found.program, found.plan)
        gp.verify(found.program, found.plan, slim).raise_if_failed()
    assert len(layers[0]) == len(layers[1]) == 4
    for a, b in zip(*layers, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b.T, rtol=1e-3, atol=1e-4)


def test_the_file_has_the_zeros_and_runs(decoder, tmp_path):
    _, program = decoder
    found = sparsify(program, tokens(), SparseGPT(), Unstructured(0.5))
    file = tmp_path / "pruned.onnx"
    gp.apply(found.program, gp.Plan(found.program.fingerprint, {})).save(file)
    stored = initialisers(onnx.load(file))
    for layer in found.layers:
        assert int((stored[layer.parameter] == 0).sum()) == layer.zeros == layer.weights // 2
    before = initialisers(onnx.load(program.path))
    pruned = {e.parameter for e in found.layers}
    assert all(np.array_equal(stored[n], before[n]) for n in before if n not in pruned)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"input_ids": tokens(2).numpy()})
    assert logits.shape == (2, 7, 96)
    assert np.isfinite(logits).all()
