"""Real encoders, decoders and CNNs through the same code: prune, verify, write, reload."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import graphprune as gp
from fresh import WAITING
from graphprune.frontends import load_traced
from models.cache import model_path
from models.efficientnet_lite import EfficientNetLite0

RELOAD = """
import sys, torch, transformers
options = dict(trust_remote_code=True)
config = transformers.AutoConfig.from_pretrained(sys.argv[1], **options)
auto = transformers.AutoModelForCausalLM if sys.argv[2] == "causal" else transformers.AutoModel
model = auto.from_pretrained(sys.argv[1], **options).eval()
with torch.no_grad():
    output = model(torch.arange(5, 14)[None].repeat(2, 1))
torch.save(output[0], sys.argv[3])
"""


def compiled(name: str, remove: dict[str, float], score: str = "random") -> gp.Slim:
    program = load_traced(model_path(name))
    plan = gp.select(program, remove=remove, score=score)
    slim = gp.apply(program, plan)
    certificate = gp.verify(program, plan, slim, dtype=torch.float64)
    assert certificate.passed
    assert certificate.max_rel_error < 1e-9
    return slim


def reload(directory: Path, kind: str) -> torch.Tensor:
    """What plain transformers computes from a written checkpoint, in a fresh process."""
    target = directory.parent / "output.pt"
    environment = {**os.environ, "HF_MODULES_CACHE": str(directory.parent / "modules")}
    done = WAITING.run(["-c", RELOAD, str(directory), kind, str(target)], environment)
    assert done.returncode == 0, done.stderr
    output: torch.Tensor = torch.load(target, weights_only=True)
    return output


@pytest.mark.parametrize(
    ("name", "kind", "remove"),
    [
        ("minilm", "base", {"ffn": 0.25, "layers": 1 / 6}),
        ("minilm", "base", {"ffn": 0.25, "heads": 0.25}),  # no configuration: self-contained
        ("mgm", "causal", {"ffn": 0.25, "heads": 0.25, "hidden": 0.25}),
    ],
    ids=["encoder", "encoder-heads", "fused-projections"],
)
def test_checkpoint(name: str, kind: str, remove: dict[str, float], tmp_path: Path) -> None:
    slim = compiled(name, remove)
    slim.save(tmp_path / "out", format="hf")
    found = reload(tmp_path / "out", kind)
    ids = torch.arange(5, 14)[None].repeat(2, 1)
    inputs = {"input_ids": ids}
    if name == "minilm":
        inputs["attention_mask"] = torch.ones_like(ids)
    with torch.no_grad():
        wanted = slim.exported.module()(**inputs)[0]
        ours = slim.module(**inputs)[0]
    scale = float(wanted.abs().max())
    assert float((found - wanted).abs().max()) < 1e-4 * scale
    assert float((ours - wanted).abs().max()) < 1e-4 * scale
    assert sum(p.numel() for p in slim.module.parameters()) == slim.cost.params


def test_depthwise_convolutions_and_batch_norm(tmp_path: Path) -> None:
    model = EfficientNetLite0()
    model.load_state_dict(load_file(model_path("efflite0") / "model.safetensors"))
    image = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    program = gp.trace(model.eval(), (image,))
    plan = gp.select(program, remove={"channels": 0.25})
    slim = gp.apply(program, plan)
    assert gp.verify(program, plan, slim, inputs=((image,), {})).passed
    with torch.no_grad():
        wanted = slim.exported.module()(image)
        assert torch.allclose(slim.module(image), wanted, atol=1e-4)
    slim.save(tmp_path / "slim.pt2", format="pt2")
    again = gp.load(tmp_path / "slim.pt2")
    assert again.costs.total().params == slim.cost.params < 0.7 * program.costs.total().params
