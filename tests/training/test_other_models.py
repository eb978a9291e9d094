"""Models that are no language models, and sources that can't be trained."""

import dataclasses

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.errors import TrainingError
from graphprune.frontends.hf.load import trace_model
from graphprune.training import Training, recover
from onnx_graphs import graph, weights, written
from zoo import encoders
from zoo.case import randomise

GRAPH = "g (float[N,4] x) => (float[N,3] y) { y = MatMul (x, w) }"


def traced(build):
    torch.manual_seed(0)
    return trace_model(randomise(build()).eval())


def test_an_encoder_learns_the_values_of_its_teacher():
    """Embeddings, with padding that counts nowhere."""
    program = traced(encoders.bert)
    ids = torch.randint(3, 90, (8, 7), generator=torch.Generator().manual_seed(2))
    valid = torch.ones_like(ids)
    valid[::2, 5:] = 0
    data = {"input_ids": ids, "attention_mask": valid}
    masks = {
        n: torch.rand(program.parameters[n], generator=torch.Generator().manual_seed(3)) > 0.3
        for n in sorted(program.trainable)
        if "intermediate.dense.weight" in n
    }
    training = Training(loss="values", steps=12, batch=8, lr=3e-3, precision="float32")
    found = recover(program, data, training, masks=masks, teacher=program)
    assert found.losses[-1] < found.losses[0] / 2
    assert found.tokens == 12 * int(valid.sum())
    other = dict(data, input_ids=ids.masked_fill(valid == 0, 1))
    again = recover(program, other, training, masks=masks, teacher=program)
    assert again.losses == pytest.approx(found.losses, rel=1e-4)


def test_an_encoder_and_decoder_learns_the_logits_of_its_teacher():
    program = traced(encoders.whisper)
    (_, kwargs) = program.example
    generator = torch.Generator().manual_seed(4)
    data = {
        name: torch.randn(4, *x.shape[1:], generator=generator)
        if x.is_floating_point()
        else torch.randint(3, 20, (4, *x.shape[1:]), generator=generator)
        for name, x in kwargs.items()
    }
    masks = {
        n: torch.rand(program.parameters[n], generator=generator) > 0.3
        for n in sorted(program.trainable)
        if "fc1.weight" in n
    }
    for kind in ("full", "lora"):
        training = Training(train=kind, loss="kd", steps=8, batch=4, lr=3e-3, precision="float32")
        found = recover(program, data, training, masks=masks, teacher=program)
        assert found.losses[-1] < found.losses[0]
        assert all(not found.weights[n][~m].any() for n, m in masks.items())


def test_an_onnx_graph_is_refused(tmp_path):
    program = gp.load(written(graph(GRAPH, w=weights(4, 3)), tmp_path))
    with pytest.raises(TrainingError, match="an ONNX graph can't be trained") as error:
        recover(program, torch.randn(8, 4), Training())
    assert "train the PyTorch model" in error.value.hint


def test_packed_weights_are_refused():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("packed", torch.ones(3, 4, dtype=torch.int8))
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return nn.functional.linear(x, self.packed.to(x.dtype)) * self.scale

    program = gp.trace(Packed().eval(), (torch.randn(2, 4),))
    with pytest.raises(TrainingError, match="a quantised model can't be trained"):
        recover(program, torch.randn(8, 4), Training())


def test_a_graph_in_half_precision_is_refused_and_its_module_is_not():
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).bfloat16().eval()
    program = gp.trace(module, (torch.randn(2, 4, dtype=torch.bfloat16),))
    with pytest.raises(TrainingError, match="a graph in half precision"):
        recover(dataclasses.replace(program, module=None), torch.randn(8, 4), Training())
    mask = {"0.weight": torch.rand(6, 4) > 0.5}
    options = Training(steps=2, lr=1e-2)
    data = {"input": torch.randn(8, 4), "labels": torch.randint(0, 3, (8,))}
    found = recover(program, data, options, masks=mask)
    assert found.weights["0.weight"].dtype == torch.bfloat16
    assert not found.weights["0.weight"][~mask["0.weight"]].any()
    assert not torch.equal(found.weights["2.weight"], program.weights["2.weight"])


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        module = nn.Linear(4, 3).eval()
    program = gp.trace(module, (torch.randn(2, 4, device="meta"),))
    with pytest.raises(TrainingError, match="training needs weights"):
        recover(program, torch.randn(8, 4), Training())
