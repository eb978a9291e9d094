"""ONNX decoders with a key-value cache, against the masked model and transformers' generation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers as hf
from onnx import numpy_helper
from torch import nn

import graphprune as gp
from graphprune.emit import decoder
from graphprune.errors import EmitError, EvaluationError, LoadError
from graphprune.frontends.hf.load import trace_model
from graphprune.oracle.masked import run_masked
from graphprune.runtime.generation import Decoder, generate
from zoo import decoders
from zoo.case import randomise

onnxruntime = pytest.importorskip("onnxruntime")

PROMPTS = [[5, 17, 33, 2, 61, 8], [40, 9, 77]]
NEW = 7
Kept = Mapping[tuple[str, str], tuple[int, ...]]
"""Role and the beginning of a parameter's name to the units that stay."""


@dataclass
class Written:
    """A pruned model and its decoder."""

    program: gp.Program
    plan: gp.Plan
    slim: gp.Slim
    path: Path

    def masked_logits(self, ids: list[int]) -> Any:
        """For every token, in float64, from the full-size model and without a cache."""
        inputs = ((), {"input_ids": torch.tensor([ids])})
        (logits,) = run_masked(self.program, self.plan.bind(self.program), inputs)
        return logits[0].numpy()

    def masked_tokens(self, prompt: list[int]) -> list[int]:
        """The prompt with the most likely continuation by the masked model."""
        ids = list(prompt)
        for _ in range(NEW):
            ids.append(int(self.masked_logits(ids)[-1].argmax()))
        return ids


def written(model: nn.Module, kept: Kept, folder: Path, *, external: bool = False) -> Written:
    program = trace_model(randomise(model))
    units: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    for (role, start), indices in kept.items():
        (found,) = (s for s in program.structures if s.role == role and s.name.startswith(start))
        units[found.name], sizes[found.name] = indices, found.size
    plan = gp.Plan(program.fingerprint, units, sizes)
    slim = gp.apply(program, plan)
    path = folder / "decoder.onnx"
    slim.save(path, format="onnx-decoder")
    assert path.is_file()
    assert len(list(folder.iterdir())) == 1 + external
    return Written(program, plan, slim, path)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory) -> Written:
    """Rotary positions, grouped queries, the middle layer gone, others of different sizes."""
    sizes = decoders.SMALL | {"num_hidden_layers": 3, "tie_word_embeddings": True}
    config = hf.LlamaConfig(**sizes, num_key_value_heads=2, head_dim=8)
    kept = {
        ("hidden", ""): tuple(range(24)),
        ("layers", ""): (0, 2),
        ("ffn", "model.layers.0."): tuple(range(0, 48, 2)),
        ("kv_heads", "model.layers.2."): (1,),
    }
    return written(hf.LlamaForCausalLM(config), kept, tmp_path_factory.mktemp("grouped"))


@pytest.fixture(scope="module")
def absolute(tmp_path_factory) -> Written:
    """Learned positions, fused projections, the first layer and a head gone."""
    kept = {
        ("hidden", ""): tuple(range(4, 28)),
        ("layers", ""): (1,),
        ("kv_heads", "transformer.h.1."): (0, 2, 3),
    }
    return written(decoders.gpt2(), kept, tmp_path_factory.mktemp("absolute"))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Written:
    """A mixture without one of its experts and one of its key-value heads."""
    sizes = decoders.SMALL | {"num_hidden_layers": 1}
    config = hf.MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4)
    kept = {("experts", ""): (0, 1, 3), ("kv_heads", ""): (1,), ("ffn", ""): tuple(range(40))}
    return written(hf.MixtralForCausalLM(config), kept, tmp_path_factory.mktemp("mixture"))


@pytest.fixture(params=["grouped", "absolute", pytest.param("mixture", marks=pytest.mark.slow)])
def any_kind(request) -> Written:
    found: Written = request.getfixturevalue(request.param)
    return found


def declared(path: Path) -> dict[str, list[int | str]]:
    graph = onnx.load(path).graph
    return {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


def test_names_and_shapes(grouped, absolute):
    batch, new, old = "batch_size", "sequence_length", "past_sequence_length"
    total = f"{old} + {new}"
    shapes = declared(grouped.path)
    assert list(shapes.items()) == [
        ("input_ids", [batch, new]),
        ("attention_mask", [batch, total]),
        ("position_ids", [batch, new]),
        ("past_key_values.0.key", [batch, 2, old, 8]),
        ("past_key_values.0.value", [batch, 2, old, 8]),
        ("past_key_values.1.key", [batch, 1, old, 8]),
        ("past_key_values.1.value", [batch, 1, old, 8]),
        ("logits", [batch, new, 96]),
        ("present.0.key", [batch, 2, total, 8]),
        ("present.0.value", [batch, 2, total, 8]),
        ("present.1.key", [batch, 1, total, 8]),
        ("present.1.value", [batch, 1, total, 8]),
    ]
    shapes = declared(absolute.path)
    assert [name for name in shapes if name.startswith("past")] == [
        "past_key_values.0.key",
        "past_key_values.0.value",
    ]
    assert shapes["past_key_values.0.value"] == [batch, 3, old, 8]


def test_weights_keep_their_names_and_the_plan_is_inside(grouped):
    model = ir.load(grouped.path)
    weight = model.graph.initializers["model.layers.1.input_layernorm.weight"].const_value
    assert weight is not None
    dense = grouped.program.weights["model.layers.2.input_layernorm.weight"]
    assert np.array_equal(weight.numpy(), dense[:24].detach().numpy())
    assert gp.Plan.from_json(model.metadata_props["graphprune.plan"]) == grouped.plan


def test_the_tokens_of_the_masked_model(any_kind):
    """Each prompt on its own through the full-size graph, against a padded batch with a cache."""
    found = generate(any_kind.path, PROMPTS, NEW)
    short = len(PROMPTS[1])
    assert found[0].tolist() == any_kind.masked_tokens(PROMPTS[0])
    assert found[1].tolist() == [0, 0, 0, *any_kind.masked_tokens(PROMPTS[1])]
    alone = generate(any_kind.path, PROMPTS[1:], NEW)
    assert alone.tolist() == [found[1, -short - NEW :].tolist()]


def test_the_tokens_of_transformers(any_kind):
    """With padding and cache of their own."""
    ids = np.zeros((2, 6), np.int64)
    ids[0], ids[1, 3:] = PROMPTS
    mask = np.ones_like(ids)
    mask[1, :3] = 0
    wanted = any_kind.slim.module.generate(
        torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    found = generate(any_kind.path, ids, NEW, attention_mask=mask)
    assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize("parts", [[9], [1] * 9, [4, 5], [3, 1, 2, 3]])
def test_a_text_in_any_parts(grouped, parts):
    """Past of length 0, of 1, several tokens after a past: the same logits for every token."""
    ids = np.random.default_rng(0).integers(96, size=(1, 9))
    wanted = grouped.masked_logits(ids[0].tolist())
    model = Decoder(grouped.path)
    found, start = [], 0
    for part in parts:
        found.append(model.step(ids[:, start : start + part]))
        start += part
    assert model.length == 9
    np.testing.assert_allclose(np.concatenate(found, axis=1)[0], wanted, atol=1e-4)


def test_plain_arrays_through_onnxruntime(grouped):
    """The file as others run it, with the cache in numpy."""
    session = onnxruntime.InferenceSession(str(grouped.path))
    ids = np.array([[7, 3, 50, 21]])
    past = {
        e.name: np.zeros((1, e.shape[1], 0, e.shape[3]), np.float32)
        for e in session.get_inputs()
        if e.name.startswith("past_key_values.")
    }
    names = [e.name for e in session.get_outputs()]
    for start, end in ((0, 3), (3, 4)):
        feeds = {
            "input_ids": ids[:, start:end],
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(start, end)[None],
        }
        outputs = dict(zip(names, session.run(None, feeds | past), strict=True))
        past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
        assert past["past_key_values.1.key"].shape == (1, 1, end, 8)
    wanted = grouped.masked_logits(ids[0].tolist())
    np.testing.assert_allclose(outputs["logits"][0, -1], wanted[-1], atol=1e-4)


def test_an_end_token(grouped):
    model = Decoder(grouped.path)
    free = generate(model, PROMPTS, NEW)
    end = int(free[0, 8])
    wanted = free.copy()
    wanted[wanted == 0] = 1  # the padding; no prompt has a 0
    first = 6 + free[0, 6:].tolist().index(end)
    assert end not in free[1, 6:]
    wanted[0, first + 1 :] = 1
    found = generate(model, PROMPTS, NEW, eos_token_id=end, pad_token_id=1)
    assert found.tolist() == wanted.tolist()
    alone = generate(model, PROMPTS[:1], NEW, eos_token_id=[95, end])
    assert alone.tolist() == [free[0, : first + 1].tolist()]


def test_prompts_that_nothing_can_continue(grouped, absolute):
    model = Decoder(grouped.path)
    ids = np.array([[5, 6, 7]])
    for prompts in ([], [[1], []]):
        with pytest.raises(EvaluationError, match="nothing to continue"):
            generate(model, prompts)
    with pytest.raises(EvaluationError, match="padded on the right"):
        generate(model, ids, attention_mask=np.array([[1, 1, 0]]))
    with pytest.raises(EvaluationError, match="doesn't fit the prompts"):
        generate(model, ids, attention_mask=np.array([[1, 1]]))
    model.reset()
    model.step(ids)
    with pytest.raises(EvaluationError, match="doesn't fit the tokens"):
        model.step(ids, np.ones((1, 3), np.int64))
    with pytest.raises(EvaluationError, match="can't continue"):
        generate(model, [[96]])
    with pytest.raises(EvaluationError, match="tokens 0 to 65"):
        generate(absolute.path, [[3] * 65])


def test_a_file_without_a_cache(tmp_path):
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["input_ids"], ["logits"])],
        "plain",
        [value("input_ids", onnx.TensorProto.FLOAT, [1])],
        [value("logits", onnx.TensorProto.FLOAT, [1])],
    )
    opset = onnx.helper.make_opsetid("", 20)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10), tmp_path / "x")
    with pytest.raises(LoadError, match="no key-value cache"):
        Decoder(tmp_path / "x")


class Tampered:
    """What the exporter returns, with one number of a weight changed."""

    def __init__(self, path: Path, name: str, row: int) -> None:
        self.model, self.path = ir.load(path), path
        self.name, self.row = name, row

    def save(self, path: str, **_: Any) -> None:
        model = onnx.load(self.path)
        (weight,) = (w for w in model.graph.initializer if w.name == self.name)
        values = numpy_helper.to_array(weight).copy()
        values[self.row] += 0.1
        weight.CopyFrom(numpy_helper.from_array(values, self.name))
        onnx.save(model, path)


def test_a_wrong_file_is_not_kept(grouped, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: None)

    def tampered(*_: Any) -> Tampered:
        return Tampered(grouped.path, "model.norm.weight", 3)

    monkeypatch.setattr(decoder, "convert", tampered)
    with pytest.raises(EmitError, match="other logits"):
        grouped.slim.save(tmp_path / "slim.onnx", format="onnx-decoder")
    assert list(tmp_path.iterdir()) == []

    class Invalid(Tampered):
        def save(self, path: str, **_: Any) -> None:
            model = onnx.load(self.path)
            del model.graph.node[0]
            onnx.save(model, path)

    monkeypatch.setattr(decoder, "convert", lambda *_: Invalid(grouped.path, "", 0))
    with pytest.raises(EmitError, match="not valid"):
        grouped.slim.save(tmp_path / "slim.onnx", format="onnx-decoder")
    assert list(tmp_path.iterdir()) == []


def encoder_decoder():
    config = hf.T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=32)
    return hf.T5ForConditionalGeneration(config)


def encoder():
    config = hf.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    return hf.BertModel(config)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (decoders.mamba, "LinearAttentionLayer|cache_params"),
        (encoder_decoder, "encoder-decoder"),
        (encoder, "not a causal language model"),
    ],
)
def test_models_without_a_decoder(build, message, tmp_path):
    program = trace_model(build().eval())
    slim = gp.apply(program, gp.Plan(program.fingerprint, {}))
    with pytest.raises(EmitError, match=message):
        decoder.precheck(program)
    with pytest.raises(EmitError, match=message):
        slim.save(tmp_path / "slim.onnx", format="onnx-decoder")
    assert list(tmp_path.iterdir()) == []


def test_other_modules(tmp_path):
    program = gp.trace(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).eval(), (torch.ones(2, 4),))
    slim = gp.apply(program, gp.Plan(program.fingerprint, {}))
    with pytest.raises(EmitError, match="it is a Sequential"):
        slim.save(tmp_path / "slim.onnx", format="onnx-decoder")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "bloom"])
def test_windows_and_biases(name, tmp_path, monkeypatch):
    """Sliding windows of 4 tokens, which the prompts exceed; ALiBi. Weights in a second file."""
    monkeypatch.setattr(decoder, "EXTERNAL_ABOVE", 0)
    model = getattr(decoders, name)()
    made = written(model, {}, tmp_path, external=True)
    found = generate(made.path, PROMPTS, NEW)
    assert found[0].tolist() == made.masked_tokens(PROMPTS[0])
    assert found[1].tolist() == [0, 0, 0, *made.masked_tokens(PROMPTS[1])]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats(dtype, tmp_path):
    """bfloat16 becomes float32, which ONNX Runtime has kernels for; float16 stays."""
    sizes = decoders.SMALL | {"num_hidden_layers": 1}
    config = hf.LlamaConfig(**sizes, num_key_value_heads=2)
    made = written(hf.LlamaForCausalLM(config).to(dtype), {}, tmp_path)
    session = onnxruntime.InferenceSession(str(made.path))
    kinds = {e.type for e in session.get_inputs() if e.name.startswith("past")}
    assert kinds == {"tensor(float16)" if dtype == torch.float16 else "tensor(float)"}
    wide = made.slim.module.float()
    ids = np.array([PROMPTS[0]])
    with torch.no_grad():
        wanted = wide(torch.from_numpy(ids)).logits.numpy()
    tolerance = 1e-5 if dtype == torch.bfloat16 else 2e-2
    found = Decoder(session).step(ids).astype(np.float32)
    np.testing.assert_allclose(found, wanted, atol=tolerance * np.abs(wanted).max())
