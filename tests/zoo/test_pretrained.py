"""Models of transformers: every prunable role alone and all together, judged by the oracle."""

from __future__ import annotations

import warnings
from fnmatch import fnmatchcase

import pytest
import torch
from torch.utils import _pytree as pytree

import graphprune as gp
from graphprune.ir.torch.interpreter import run_graph
from graphprune.rewrite.module.compare import run
from zoo.case import (
    ROUNDING,
    SCALES,
    check,
    frozen_reasons,
    in_dtype,
    prunable_fraction,
    prunable_sizes,
    scaled,
)
from zoo.expected_pretrained import MODELS
from zoo.pretrained import Pretrained

VOCABULARY = ("*embed*:0", "*wte.weight:0", "*wpe.weight:0")

LIKE_OTHERS = frozenset({
    "deberta_v2", "deepseek_v2", "deit", "distilbert", "dit", "falcon_new", "falcon_old", "gemma2",
    "llama_gqa_2", "llama_gqa_3", "llama_gqa_8", "llama_mqa", "mistral", "qwen2", "qwen2_moe",
    "roberta", "swin", "t5", "wav2vec2_layer",
})  # fmt: skip
"""Models whose kind another one here has too, as `gemma2` and `gemma3` or `t5` and `t5_gated`."""


def _name(model: Pretrained) -> str:
    return model.build.__name__


def _marks(model: Pretrained) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if _name(model) in LIKE_OTHERS else []


every_model = pytest.mark.parametrize("model", MODELS, ids=_name)
every_kind = pytest.mark.parametrize(
    "model", [pytest.param(model, marks=_marks(model)) for model in MODELS], ids=_name
)


@every_kind
def test_together(model: Pretrained):
    program = model.trace()
    assert prunable_sizes(program) == dict(model.roles)
    assert prunable_fraction(program) == pytest.approx(model.fraction, abs=5e-5)
    _check_frozen(program, model)
    _check_module(check(program, {"*": 0.5}), same_class=model.same_class)


@pytest.mark.slow
@every_model
def test_alone(model: Pretrained):
    program = model.trace()
    for role in model.roles:
        _check_module(check(program, {role: 0.5}), same_class=role not in model.beyond)


def _check_frozen(program: gp.Program, model: Pretrained) -> None:
    """Everything that is frozen is expected to be, and everything expected is there."""
    used = set()
    for place, reason in frozen_reasons(program).items():
        if any(fnmatchcase(place, p) for p in VOCABULARY) and "from outside" in reason:
            continue
        known = [
            g for g, words in model.frozen.items() if fnmatchcase(place, g) and words in reason
        ]
        assert known, f"{place} is frozen: {reason}"
        used.update(known)
    assert used == model.frozen.keys()


def _check_module(slim: gp.Slim, *, same_class: bool) -> None:
    """The slim module computes what the slim program computes, and is of the class expected.

    Floating inputs come at three scales. Models of transformers take some steps in float32
    whatever their weights are, so they run in it, and the graph in float64.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the slim module is the exported graph")
        module = slim.module
    assert (type(module) is type(slim.program.module)) is same_class
    for scale in SCALES if _has_floats(slim.program) else (1.0,):
        inputs = scaled(slim.program.example, scale)
        wanted = run_graph(slim.exported, slim.weights, inputs, aliases=slim.aliases)
        plain = in_dtype(inputs, torch.float32)
        found = run(module, plain)
        for name, b in zip(run(slim.exported.module(), plain), wanted, strict=True):
            error = float((found[name].double() - b).abs().max())
            assert error <= ROUNDING * float(b.abs().max()), (name, scale)


def _has_floats(program: gp.Program) -> bool:
    leaves = pytree.tree_leaves(program.example)
    return any(isinstance(x, torch.Tensor) and x.is_floating_point() for x in leaves)
