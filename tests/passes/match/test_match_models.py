"""Language models, encoders and pairs of both, judged by hooks on their modules."""

from __future__ import annotations

import copy

import pytest
import torch

import graphprune as gp
from graphprune.errors import PlanError
from graphprune.passes.match import Match, masks_of, match
from graphprune.passes.repair.matching import Matching
from graphprune.streaming import apply_weights
from passes.match.models import relative
from streaming.oracle import tokens, traced
from zoo import decoders, encoders, mixtures


def without(program, glob, fraction=0.5):
    """The program with the smallest weights of some matrices gone, and the masks."""
    new = {}
    for name in program.trainable:
        weight = program.weights[name].detach()
        if glob in name and weight.dim() == 2:
            new[name] = weight.masked_fill(weight.abs() <= weight.abs().quantile(fraction), 0)
    student = apply_weights(program, new)
    return student, masks_of(student, new)


def module_of(program):
    """A module with the weights of a program."""
    module = copy.deepcopy(program.module)
    own = {n: program.weights[n] for n, _ in module.named_parameters(remove_duplicate=False)}
    module.load_state_dict(own, strict=False)
    return module


def results(module, path, calls):
    """What a layer returns in each call, as one tensor."""
    found = []
    layer = module.get_submodule(path)
    hook = layer.register_forward_hook(
        lambda _, given, out: found.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        for call in calls:
            module(**call)
    hook.remove()
    return found


def test_a_language_model_with_units_and_a_layer_gone():
    program, _ = traced(decoders.gpt2)
    data = tokens(8)
    plan = gp.select(program, remove={"ffn": 0.5}, score="magnitude")
    kept = {**plan.kept_units, "transformer.h": (0,)}
    plan = gp.Plan(program.fingerprint, kept, {**plan.sizes, "transformer.h": 2})
    found = Matching(lr=3e-3, epochs=2).repair(program, data, plan)
    slim = gp.apply(found.program, plan)
    assert gp.verify(found.program, plan, slim).passed
    calls = [{"input_ids": data[4:5]}]
    ends = results(program.module, "transformer.h.1", calls)
    own = relative(results(slim.module, "transformer.h.0", calls), ends)
    entry = next(e for e in found.layers if e.parameter.endswith("h.0.mlp.c_fc.weight"))
    assert entry.error == pytest.approx(own, rel=1e-4)
    assert entry.error < 0.9 * entry.before


def test_an_encoder_whose_samples_have_padding():
    """What stands in padded places counts nothing, and reaches no other token."""
    program, _ = traced(encoders.bert)
    data = []
    for i, (ids, length) in enumerate(zip(tokens(8), [7, 5, 6, 4, 3, 7, 5, 6], strict=True)):
        mask = (torch.arange(7) < length).long()[None]
        data.append(
            {"input_ids": (ids[None] * mask) + (1 - mask) * (3 + i), "attention_mask": mask}
        )
    student, masks = without(program, "output.dense.weight")
    found = match(program, student, data, masks=masks, options=Match(lr=3e-3, epochs=2))
    assert [b.stays for b in found.blocks] == [True, True]
    judge = data[4]
    valid = judge["attention_mask"][0].bool()
    path = found.blocks[-1].path
    wanted, own = (
        [x[:, valid] for x in results(one, path, [judge])]
        for one in (program.module, module_of(found.program))
    )
    assert found.blocks[-1].error == pytest.approx(relative(own, wanted), rel=1e-4)


def test_encoder_and_decoder():
    program, _ = traced(encoders.whisper)
    generator = torch.Generator().manual_seed(2)
    (args, example) = program.example
    assert not args
    data = [
        {
            **example,
            "input_features": torch.randn(example["input_features"].shape, generator=generator),
        }
        for _ in range(4)
    ]
    student, masks = without(program, "fc")
    found = match(program, student, data, masks=masks, options=Match(lr=3e-3, epochs=1))
    sides = ("encoder", "decoder")
    assert [b.path for b in found.blocks] == [
        f"model.{s}.layers.{i}" for s in sides for i in (0, 1)
    ]
    assert all(b.stays for b in found.blocks)
    for block in found.blocks[1::2]:
        calls = [data[2]]
        wanted = results(program.module, block.path, calls)
        own = relative(results(module_of(found.program), block.path, calls), wanted)
        assert block.error == pytest.approx(own, rel=1e-4)


@pytest.mark.slow  # traces two models of experts
@pytest.mark.parametrize(
    "build", [mixtures.mixtral, mixtures.deepseek_v2], ids=lambda b: b.__name__
)
def test_experts(build):
    """The second computes with a copy that PyTorch has no derivative of."""
    program, _ = traced(build)
    student, masks = without(program, "o_proj")
    found = match(program, student, tokens(24), masks=masks, options=Match(lr=1e-3, epochs=2))
    assert found.blocks
    assert all(b.after < b.before for b in found.blocks)


def test_a_model_whose_layers_share_their_weights_is_refused():
    program, _ = traced(encoders.albert)
    with pytest.raises(PlanError, match="no residual blocks"):
        match(program, program, tokens(4))
