"""Models of transformers as checkpoints: written, opened again, run and generated with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, GenerationMixin, PreTrainedModel

import graphprune as gp
from graphprune.checkpoints import self_contained as pruned
from graphprune.emit import hf
from graphprune.frontends.hf.load import traceable
from graphprune.rewrite.module.compare import TOLERANCE, probe, run
from zoo.case import check
from zoo.expected_pretrained import MODELS
from zoo.pretrained import Pretrained

QUICK = {"llama_gqa_4", "gemma3", "gpt2", "mixtral", "bart", "bert", "vit"}
NEW_TOKENS = 6

models = [
    pytest.param(
        m, id=m.build.__name__, marks=[] if m.build.__name__ in QUICK else pytest.mark.slow
    )
    for m in MODELS
    if m.inputs is None
]
"""All models of transformers; those by hand have no checkpoint."""


def opened(directory: Path) -> PreTrainedModel:
    """The model of a checkpoint, in this process, without running the file beside it."""
    config: Any = AutoConfig.from_pretrained(directory)
    found: Any = pruned.class_of(config)
    if found is None:
        found = gp.load(directory).source.model_class
    model, info = found.from_pretrained(directory, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.fixture(autouse=True)
def _same_process(monkeypatch):
    """Saving opens the checkpoint in a process of its own; `emit` tests that, it takes seconds."""

    def reopen(job: Any, module: str, name: str, *, trust: bool) -> list[str]:
        wrong = job.expected.deviation_of(opened(job.directory))
        return [wrong] if wrong else []

    monkeypatch.setattr(hf, "reopen", reopen)


@pytest.mark.parametrize("model", models)
def test_checkpoint(model: Pretrained, tmp_path: Path):
    slim = check(model.trace(), {role: 0.5 for role in model.roles if role not in model.beyond})
    slim.save(tmp_path / "slim", format="hf")
    module = opened(tmp_path / "slim")
    inputs = probe(slim.program.example)
    with torch.no_grad():
        wanted = run(slim.exported.module(), inputs)
    with traceable(module):
        _same(run(module, inputs), wanted)
    program = gp.load(tmp_path / "slim")
    with torch.no_grad():
        _same(run(program.exported.module(), inputs), wanted)
    if isinstance(module, GenerationMixin):
        _check_generation(module, inputs[1])


def _same(found: Any, wanted: Any) -> None:
    for name, expected in wanted.items():
        error = float((found[name] - expected).abs().max())
        assert error <= 0.1 * TOLERANCE * float(expected.abs().max()), name


def _check_generation(module: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Cached keys and values have the new heads and the new numbers of layers."""
    if module.config.is_encoder_decoder:
        inputs = {k: v for k, v in inputs.items() if k != "decoder_input_ids"}
    options: dict[str, Any] = {
        "max_new_tokens": NEW_TOKENS,
        "min_new_tokens": NEW_TOKENS,
        "do_sample": False,
    }
    cached = GenerationMixin.generate(module, **inputs, **options, use_cache=True)
    again = GenerationMixin.generate(module, **inputs, **options, use_cache=False)
    assert torch.equal(cached, again)
