"""Files of the optimisers that fuse operators for ONNX Runtime prune as plain files do."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from onnxruntime.transformers.optimizer import optimize_model
from onnxscript.rewriter.ort_fusions import optimize_for_ort
from torch import nn
from transformers import AutoModel, BertConfig, BertModel

import graphprune as gp
from graphprune.cli import app as cli
from graphprune.frontends.onnx.load import load_onnx
from models.cache import model_path
from onnx_graphs import attribute, operators, run

LENGTH = 7


@contextlib.contextmanager
def quiet():
    """What exporters and optimisers say of the sources is not of interest here."""
    logging.disable(logging.WARNING)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


# A decoder in the form that onnxscript's fusions recognise.


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(1 + 0.2 * torch.randn(width))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Block(nn.Module):
    """Attention of 6 queries for 2 keys and values, with heads of 16, and a gated ffn."""

    def __init__(self):
        super().__init__()
        sizes = {"q": (32, 96), "k": (32, 32), "v": (32, 32), "o": (96, 32)}
        sizes |= {"gate": (32, 48), "up": (32, 48), "down": (48, 32)}
        self.layers = nn.ModuleDict({n: nn.Linear(*s, bias=False) for n, s in sizes.items()})
        self.norms = nn.ModuleList([Norm(32), Norm(32)])

    def forward(self, x, cos, sin, mask):
        batch, length, _ = x.shape
        y = self.norms[0](x)
        q, k, v = (
            self.layers[n](y).view(batch, length, heads, 16).transpose(1, 2)
            for n, heads in (("q", 6), ("k", 2), ("v", 2))
        )
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        q, k = (t * cos + torch.cat((-t[..., 8:], t[..., :8]), -1) * sin for t in (q, k))
        k, v = (
            t[:, :, None].expand(batch, 2, 3, length, 16).reshape(batch, 6, length, 16)
            for t in (k, v)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, :, :, :length])
        x = x + self.layers["o"](out.transpose(1, 2).reshape(batch, length, -1))
        y = self.norms[1](x)
        return x + self.layers["down"](F.silu(self.layers["gate"](y)) * self.layers["up"](y))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 32), nn.Linear(32, 40, bias=False)
        self.blocks, self.norm = nn.ModuleList([Block(), Block()]), Norm(32)
        self.register_buffer("frequencies", 10000 ** (-torch.arange(0, 16, 2) / 16))

    def forward(self, input_ids, attention_mask, position_ids):
        x, (batch, length) = self.embed(input_ids), input_ids.shape
        angles = self.frequencies[None, :, None] @ position_ids[:, None, :].float()
        angles = torch.cat((angles.transpose(1, 2),) * 2, -1)
        least, places = torch.finfo(torch.float32).min, torch.arange(length)
        mask = torch.triu(torch.full((length, length), least), diagonal=1)
        mask = (mask * (places > places[:, None]))[None, None].expand(batch, 1, -1, -1)
        mask = mask.masked_fill(mask + attention_mask[:, None, None, :] == 0, least)
        for block in self.blocks:
            x = block(x, angles.cos(), angles.sin(), mask)
        return self.head(self.norm(x))


def tokens(batch=2, length=LENGTH):
    ids = np.random.default_rng(0).integers(0, 40, (batch, length))
    places = np.tile(np.arange(length), (batch, 1))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": places}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """The file as torch exports it, and optimised."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("decoder") / "plain.onnx"
    module, feeds = Decoder().eval(), tokens()
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    with quiet():
        torch.onnx.export(
            module, tuple(map(torch.from_numpy, feeds.values())), str(file), dynamo=True,
            verbose=False, external_data=False, opset_version=18, input_names=list(feeds),
            output_names=["logits"], dynamic_shapes=(dims,) * 3,
        )  # fmt: skip
    return file, fused(file)


def fused(file):
    """The file as onnxscript's fusions leave it."""
    with quiet():
        model, _ = optimize_for_ort(ir.load(file))
    after = file.with_name(f"{file.stem}_fused.onnx")
    ir.save(model, after)
    return after


# Units that stay, by role and in the order of the layers: other numbers of them in each.
KEPT = {
    "kv_heads": [(0, 1), (1,)],
    "query_heads": [(0, 2), (0, 1, 2)],
    "ffn": [tuple(range(0, 48, 2)), tuple(range(5, 40))],
    "hidden": [tuple(range(1, 32, 3)) + tuple(range(0, 32, 3))],
}


def slim(file, name, kept=KEPT):
    """A pruned file that the oracle has judged."""
    program = load_onnx(file)
    units, sizes = {}, {}
    for role, chosen in kept.items():
        found = [s for s in program.structures if s.role == role]
        assert len(found) == len(chosen), (role, [str(s) for s in program.structures])
        for structure, rows in zip(found, chosen, strict=True):
            units[structure.name] = tuple(sorted(rows))
            sizes[structure.name] = structure.size
    plan = gp.Plan(program.fingerprint, units, sizes)
    after = file.with_name(name)
    gp.apply(program, plan).save(after)
    certificate = gp.verify(program, plan, after)
    certificate.raise_if_failed()
    assert certificate.dense_difference > 0.01
    return after


def kinds(file):
    return Counter(node.op_type for node in onnx.load(file).graph.node)


def heads(file):
    """Of every attention: heads of queries and of keys."""
    nodes = operators(onnx.load(file), "GroupQueryAttention")
    return [(attribute(n, "num_heads"), attribute(n, "kv_num_heads")) for n in nodes]


def test_a_decoder_prunes_before_and_after_fusion(decoder):
    """Both ways give the same model, with other heads in each layer."""
    plain, optimised = decoder
    assert heads(optimised) == [(6, 2), (6, 2)]
    assert kinds(optimised)["SkipSimplifiedLayerNormalization"] == 4
    assert kinds(optimised)["SimplifiedLayerNormalization"] == 1
    late = slim(optimised, "late.onnx")
    first = slim(plain, "first.onnx")
    early = fused(first)
    assert heads(late) == heads(early) == [(4, 2), (3, 1)]
    for sizes in ({}, {"batch": 3, "length": 4}):
        feeds = tokens(**sizes)
        (wanted,) = run(first, **feeds)
        for file in (late, early):
            inputs = [v.name for v in onnx.load(file).graph.input]
            (found,) = run(file, **{n: feeds[n] for n in inputs})
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-5)
    assert late.stat().st_size < 0.7 * optimised.stat().st_size


# An encoder, fused by ONNX Runtime's own optimiser.


class Encoder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, token_type_ids):
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state


def sentences(vocabulary, batch=2, length=LENGTH):
    ids = np.random.default_rng(0).integers(0, vocabulary, (batch, length))
    mask, kind = np.ones_like(ids), np.zeros_like(ids)
    mask[0, length // 2 :] = 0
    kind[:, length // 2 :] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": kind}


def traced(model, folder):
    """The files of an encoder as ``torch.onnx.export(dynamo=False)`` writes them, and fused."""
    config = model.config
    feeds = sentences(config.vocab_size)
    plain, after = folder / "plain.onnx", folder / "fused.onnx"
    with quiet():
        torch.onnx.export(
            Encoder(model).eval(), tuple(map(torch.from_numpy, feeds.values())), str(plain),
            dynamo=False, opset_version=17, input_names=list(feeds), output_names=["hidden"],
            dynamic_axes={n: {0: "batch", 1: "length"} for n in (*feeds, "hidden")},
        )  # fmt: skip
        optimize_model(
            str(plain), model_type="bert", num_heads=config.num_attention_heads,
            hidden_size=config.hidden_size,
        ).save_model_to_file(str(after))  # fmt: skip
    found, layers = kinds(after), config.num_hidden_layers
    assert found["Attention"] == found["BiasGelu"] == layers
    assert found["SkipLayerNormalization"] == 2 * layers
    assert found["EmbedLayerNormalization"] == 1
    return plain, after


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=16, attn_implementation="eager",
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return traced(model, tmp_path_factory.mktemp("encoder"))


def test_an_encoder_prunes_before_and_after_fusion(encoder):
    kept = {
        "kv_heads": [(0, 2, 3), (1,)],
        "qk_dim": [(0, 1, 2, 5), (3, 4, 5, 6, 7)],
        "v_dim": [(1, 2), (0, 1, 2, 3, 6, 7)],
        "ffn": [tuple(range(30)), tuple(range(10, 48))],
    }
    plain, optimised = encoder
    first, late = slim(plain, "first.onnx", kept), slim(optimised, "late.onnx", kept)
    nodes = operators(onnx.load(late), "Attention")
    assert [attribute(n, "num_heads") for n in nodes] == [3, 1]
    assert [attribute(n, "qkv_hidden_sizes") for n in nodes] == [[12, 12, 6], [5, 5, 6]]
    for sizes in ({}, {"batch": 3, "length": 10}):
        feeds = sentences(40, **sizes)
        wanted, found = run(first, **feeds)[0], run(late, **feeds)[0]
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-5)


def test_pruned_fused_and_pruned_again(encoder):
    """What comes out of one tool goes into the next."""
    once = slim(encoder[0], "once.onnx", {"kv_heads": [(0, 2, 3), (0, 1)]})
    with quiet():  # the numbers of the dense model, as pipelines take them from its configuration
        found = optimize_model(str(once), model_type="bert", num_heads=4, hidden_size=32)
        found.save_model_to_file(str(once.with_name("between.onnx")))
    between = once.with_name("between.onnx")
    counts = [attribute(n, "num_heads") for n in operators(onnx.load(between), "Attention")]
    assert counts == [3, 2]
    twice = slim(between, "twice.onnx", {"kv_heads": [(0, 2), (1,)]})
    at_once = slim(encoder[0], "at_once.onnx", {"kv_heads": [(0, 3), (1,)]})
    wanted, found = (run(file, **sentences(40))[0] for file in (at_once, twice))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-5)


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    model = AutoModel.from_pretrained(
        model_path("minilm"), attn_implementation="eager", add_pooling_layer=False
    )
    return traced(model, tmp_path_factory.mktemp("minilm"))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["plain", "fused"])
def test_a_real_encoder(minilm, tmp_path, form, capsys):
    """Half of the heads and half of the ffn: a quarter of all parameters, half of the layers'."""
    file = minilm[form == "fused"]
    output = tmp_path / "slim.onnx"
    with pytest.raises(SystemExit) as caught:
        cli.main(
            [
                "compile",
                str(file),
                "-o",
                str(output),
                "--remove",
                "heads=0.5",
                "--remove",
                "ffn=0.5",
            ]
        )
    assert not caught.value.code, capsys.readouterr().err
    assert os.path.getsize(output) < 0.78 * os.path.getsize(file)
    feeds = sentences(30522, batch=3, length=12)
    dense, found = run(file, **feeds)[0], run(output, **feeds)[0]
    assert found.shape == dense.shape
    assert np.isfinite(found).all()
    program = load_onnx(file)
    roles = Counter(s.role for s in program.structures if s.prunable)
    assert roles["kv_heads"] == roles["ffn"] == 6
    if form == "fused":
        nodes = operators(onnx.load(output, load_external_data=False), "Attention")
        assert [attribute(n, "num_heads") for n in nodes] == [6] * 6
