"""Attention and MLP branches alone, against modules whose branches give zeros."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import graphprune as gp
from graphprune.errors import EmitError, PlanError
from graphprune.frontends.hf.load import trace_model
from graphprune.passes.scores import get_score
from graphprune.passes.selection.select import select
from graphprune.passes.shared.score import Inputs
from graphprune.pipeline.steps.rounds import composed
from graphprune.plan.plan import Plan
from graphprune.report.inspection import as_data, as_text
from graphprune.rewrite.retrace import retrace
from onnx_graphs import run
from streaming.oracle import tokens, traced
from zoo import convolutional, decoders, encoders, mixtures
from zoo.case import randomise


def found(program):
    return {s.name: s for s in program.sublayers}


def zeroed(module, paths):
    """A module whose parts at these paths add nothing."""
    slim = copy.deepcopy(module)

    def nothing(part, args, result):
        if isinstance(result, tuple):
            return (torch.zeros_like(result[0]), *result[1:])
        return torch.zeros_like(result)

    for path in paths:
        slim.get_submodule(path).register_forward_hook(nothing)
    return slim


def close(program, plan, module, **inputs):
    """Whether the slim program computes what a module does, and passes the proof."""
    slim = gp.apply(program, plan)
    assert gp.verify(program, plan, slim).passed
    with torch.no_grad():
        expected = module(**inputs)
        given = slim.exported.module()(**inputs)
    expected = getattr(expected, "logits", expected)
    torch.testing.assert_close(
        getattr(given, "logits", given).double(), expected, rtol=1e-4, atol=1e-5
    )
    return slim


FAMILIES = {
    "gqa": (decoders.llama_gqa_2, "model.layers", "self_attn", "mlp"),
    "learnt places": (decoders.gpt2, "transformer.h", "attn", "mlp"),
    "biased scores": (decoders.bloom, "transformer.h", "self_attention.dense", "mlp.dense_4h_to_h"),
    "experts": (mixtures.mixtral, "model.layers", "self_attn", "mlp"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_without_its_attention_or_its_mlp(family):
    build, stack, attention, mlp = FAMILIES[family]
    program, module = traced(build)
    names = [f"{stack}/attention_blocks", f"{stack}/mlp_blocks"]
    assert {n: s.size for n, s in found(program).items()} == dict.fromkeys(names, 2)
    plan = Plan(program.fingerprint, {names[0]: (1,), names[1]: (0,)})
    expected = zeroed(module, [f"{stack}.0.{attention}", f"{stack}.1.{mlp}"])
    slim = close(program, plan, expected, input_ids=tokens())
    gone = set(program.parameters) - set(slim.renamed)
    assert {n.split(".")[len(stack.split("."))] for n in gone} == {"0", "1"}
    blocks = [found(program)[n].blocks[i] for i, n in enumerate(names)]
    left = sum(program.costs.block(b).params for b in blocks)
    assert slim.cost.params == program.costs.total().params - left


def test_norms_behind_the_sum_stay():
    program, module = traced(encoders.bert)
    stack = "bert.encoder.layer"
    plan = Plan(program.fingerprint, {f"{stack}/attention_blocks": (0,),
                                      f"{stack}/mlp_blocks": (1,)})  # fmt: skip
    mask = torch.ones(3, 7, dtype=torch.long)
    slim = close(
        program,
        plan,
        zeroed(module, [f"{stack}.1.attention.output.dense", f"{stack}.0.output.dense"]),
        input_ids=tokens(),
        attention_mask=mask,
    )
    assert f"{stack}.1.attention.output.LayerNorm.weight" in slim.weights
    assert f"{stack}.1.attention.output.dense.weight" not in slim.weights


def test_a_decoder_has_two_attentions_in_each_layer():
    program, module = traced(encoders.bart)
    names = {n: s.size for n, s in found(program).items()}
    assert names == {
        "model.encoder.layers/attention_blocks": 2,
        "model.encoder.layers/mlp_blocks": 2,
        "model.decoder.layers/attention_blocks": 4,
        "model.decoder.layers/mlp_blocks": 2,
    }
    cross = found(program)["model.decoder.layers/attention_blocks"].blocks[1]
    assert all("layers.0.encoder_attn" in p for p in cross.parameters if "norm" not in p)
    plan = Plan(program.fingerprint, {"model.decoder.layers/attention_blocks": (0, 2)})
    inputs = {"input_ids": tokens(2, 9), "decoder_input_ids": tokens(2, 5),
              "attention_mask": torch.ones(2, 9, dtype=torch.long)}  # fmt: skip
    gone = ["model.decoder.layers.0.encoder_attn", "model.decoder.layers.1.encoder_attn"]
    both = Plan(program.fingerprint, {"model.decoder.layers/attention_blocks": (0, 2, 3)})
    close(program, both, zeroed(module, gone[:1]), **inputs)
    close(program, plan, zeroed(module, gone), **inputs)


def test_layers_and_their_branches_at_once():
    """What lies in a layer that goes, goes with it; the rest keeps its numbers."""
    program, module = traced(decoders.gemma3)
    stack = "model.layers"
    gone = {f"{stack}/attention_blocks": (0, 2), f"{stack}/mlp_blocks": (1, 2)}
    plan = Plan(program.fingerprint, {**gone, stack: (0, 2)})
    slim = zeroed(module, [f"{stack}.0.post_feedforward_layernorm"])
    # Without the layer the next one would get its kind of attention.
    slim.model.layers[1].register_forward_hook(lambda _, args, result: args[0])
    result = close(program, plan, slim, input_ids=tokens())
    assert "model.layers.1.self_attn.q_proj.weight" in result.weights
    alone = Plan(program.fingerprint, {f"{stack}/attention_blocks": (2,)})
    parts = [f"{stack}.{i}.post_attention_layernorm" for i in (0, 1)]
    close(program, alone, zeroed(module, parts), input_ids=tokens())


def test_nothing_takes_branches_unless_it_names_them():
    program, _ = traced(decoders.llama_gqa_2)
    assert not {"attention_blocks", "mlp_blocks"} & {s.role for s in program.structures}
    everything = select(program, remove={"*": 0.5}).kept_units
    budget = select(program, target={"params": 0.8}).kept_units
    assert not any("/" in n and ":" not in n for n in (*everything, *budget))
    assert "attention_blocks" not in str(as_data(program))
    table = as_text(program).renderables[1]
    assert sum("_blocks" in str(cell) for cell in table.columns[0].cells) == 2
    named = select(program, remove={"attention_blocks": 0.5}).kept_units
    assert [*named] == ["model.layers/attention_blocks"]
    both = select(program, remove={"mlp_blocks": 0.5, "*": 0.25}).kept_units
    assert "model.layers/mlp_blocks" in both


def test_selectors_mean_branches_by_their_role():
    program, _ = traced(decoders.gemma3)
    name = "model.layers/mlp_blocks"
    plan = select(program, remove={"model.layers.[12].*/mlp_blocks": 0.5})
    assert plan.kept_units in ({name: (0, 1)}, {name: (0, 2)})
    plan = select(program, shape={"mlp_blocks": 2}, exclude=["model.layers.[02].*"])
    assert plan.kept_units == {name: (0, 2)}
    plan = select(program, shape={"mlp_blocks": 2}, exclude=["model.layers.[02].*/mlp_blocks"])
    assert plan.kept_units == {name: (0, 2)}
    kept = select(
        program, shape={"mlp_blocks": 2}, exclude=["model.layers.[02].*/attention_blocks"]
    )
    assert len(kept.kept_units[name]) == 2
    with pytest.raises(PlanError, match="exclude and include leave no structure"):
        select(program, remove={"mlp_blocks": 0.5}, exclude=["model.layers.*"])


def test_a_budget_may_name_branches():
    program, _ = traced(decoders.gemma3)
    total, (attention, mlp) = program.costs.total().params, program.sublayers
    units = (
        program.costs.block(attention.blocks[0]).params,
        program.costs.block(mlp.blocks[0]).params,
    )
    plan = select(program, target={"params": total - units[1]}, roles=["mlp_blocks"])
    assert [len(u) for u in plan.kept_units.values()] == [2]
    assert gp.apply(program, plan).cost.params == total - units[1]


def test_scores_of_branches():
    program, module = traced(decoders.gemma3)
    windows = tokens(4, 8)
    attention, mlp = program.sublayers
    scores = get_score("block-influence").score(program, [attention, mlp], Inputs(windows))
    entries, exits, hooks = [], [], []
    for layer in module.model.layers:
        for norm, seen in (
            (layer.input_layernorm, entries),
            (layer.pre_feedforward_layernorm, exits),
        ):
            hooks.append(norm.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0])))
    with torch.no_grad():
        module(windows)
    for hook in hooks:
        hook.remove()
    expected = [1 - torch.cosine_similarity(x, y, -1).mean().item()
                for x, y in zip(entries, exits, strict=True)]  # fmt: skip
    np.testing.assert_allclose(scores[attention.name][0], expected, atol=2e-6)

    order = get_score("loss-greedy").choose(program, mlp, np.arange(3), Inputs(windows))
    order.order(1)
    for i in range(3):
        slim = zeroed(module, [f"model.layers.{i}.post_feedforward_layernorm"])
        with torch.no_grad():
            logits = slim(windows).logits[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, windows[:, 1:].flatten()).item()
        assert order.losses[i] == pytest.approx(loss, rel=1e-5)
    magnitude = get_score("magnitude").score(program, [mlp], Inputs())[mlp.name]
    assert magnitude.shape == (1, 3)
    assert (magnitude > 0).all()


@pytest.mark.parametrize("build", [convolutional.resnet_basic, decoders.gpt_neox])
def test_layers_of_one_branch_have_none_of_their_own(build):
    if build is decoders.gpt_neox:  # its attention and MLP read the same and are added at once
        program, _ = traced(build)
    else:
        program = gp.trace(randomise(build()).eval(), (torch.randn(2, 3, 32, 32),))
    assert not program.sublayers
    with pytest.raises(PlanError, match="no layers that are chains of several residual branches"):
        select(program, remove={"attention_blocks": 0.5})


def test_files_that_hold_them_and_files_that_can_t(tmp_path):
    program, module = traced(decoders.llama_gqa_2)
    name = "model.layers/attention_blocks"
    plan = Plan(program.fingerprint, {name: (0,)}, {name: 2})
    windows = tokens(2, 13)
    with torch.no_grad():
        expected = zeroed(module, ["model.layers.1.self_attn"])(windows).logits
    slim = gp.apply(program, plan)
    with pytest.raises(EmitError, match="no Hugging Face form of a layer without"):
        slim.save(tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    slim.save(tmp_path / "slim.pt2", "pt2")
    again = torch.export.load(tmp_path / "slim.pt2").module()(input_ids=windows)
    torch.testing.assert_close(again.logits.double(), expected, rtol=1e-4, atol=1e-5)
    slim.save(tmp_path / "slim.onnx", "onnx")
    (logits,) = run(tmp_path / "slim.onnx", input_ids=windows.numpy())
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert len(found(gp.load(tmp_path / "slim.pt2"))["model.layers/mlp_blocks"].blocks) == 2


def test_branches_of_an_onnx_file(tmp_path):
    """Each begins where another one that goes has ended, whatever order a plan lists them in."""
    torch.manual_seed(0)
    module = randomise(GPT2LMHeadModel(GPT2Config(**decoders.OLD | {"n_layer": 3}))).eval()
    source = trace_model(module)
    gp.apply(source, Plan(source.fingerprint, {})).save(tmp_path / "dense.onnx", "onnx")
    program = gp.load(tmp_path / "dense.onnx")
    stack = "transformer.h"
    names = [f"{stack}/attention_blocks", f"{stack}/mlp_blocks"]
    assert {n: s.size for n, s in found(program).items()} == dict.fromkeys(names, 3)
    for order in (names, names[::-1]):
        kept = dict(zip(names, [(0,), (2,)], strict=True))
        plan = Plan(program.fingerprint, {name: kept[name] for name in order})
        slim = gp.apply(program, plan)
        assert gp.verify(program, plan, slim).passed
        slim.save(tmp_path / "slim.onnx")
        windows = tokens(2, 13)
        (logits,) = run(tmp_path / "slim.onnx", input_ids=windows.numpy())
        parts = [f"{stack}.1.attn", f"{stack}.2.attn", f"{stack}.0.mlp", f"{stack}.1.mlp"]
        with torch.no_grad():
            expected = zeroed(module, parts)(windows).logits
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_plans_of_two_rounds_make_one():
    program, module = traced(decoders.gemma3)
    stack = "model.layers"
    name = f"{stack}/attention_blocks"
    first = Plan(program.fingerprint, {name: (0, 2), stack: (0, 1)}, {name: 3, stack: 3})
    slim = gp.apply(program, first)
    current = retrace(slim)
    left = found(current)
    assert [left[name].size, left[f"{stack}/mlp_blocks"].size] == [1, 2]
    later = Plan(current.fingerprint, {f"{stack}/mlp_blocks": (1,)}, {f"{stack}/mlp_blocks": 2})
    plan = composed(slim, current, later)
    assert plan.kept_units[name] == (0,)  # the second goes, and the third with its layer
    assert plan.kept_units[f"{stack}/mlp_blocks"] == (1,)
    expected = zeroed(
        module, [f"{stack}.1.post_attention_layernorm", f"{stack}.0.post_feedforward_layernorm"]
    )
    del expected.model.layers[2]
    close(program, plan, expected, input_ids=tokens())


def test_sums_that_scale_are_none():
    """``x.add(f(x), alpha)`` is x without f, and ``f(x).add(x, alpha)`` isn't."""

    class Layer(nn.Module):
        def __init__(self, swapped):
            super().__init__()
            self.a, self.b, self.swapped = nn.Linear(4, 4), nn.Linear(4, 4), swapped

        def forward(self, x):
            a = torch.relu(self.a(x))
            x = a.add(x, alpha=0.5) if self.swapped else x.add(a)
            return x + torch.relu(self.b(x))

    for swapped, units in ((False, 4), (True, 0)):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Layer(swapped), Layer(swapped)))
        program = gp.trace(module.eval(), (torch.randn(2, 4),))
        assert sum(s.size for s in program.sublayers) == units
        assert any(s.blocks for s in program.structures) == bool(units)
