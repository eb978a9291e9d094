"""The main job on a real language model: prune, verify, write, reload, generate."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import graphprune as gp
from graphprune.calibration.dense import check_dense
from graphprune.calibration.text.read import load_tokenizer, read_text, windows
from graphprune.errors import CalibrationError
from graphprune.frontends import load_traced
from models.cache import model_path

PLANS = {
    "ffn": {"ffn": 0.25},
    "hidden": {"hidden": 0.125},
    "layers": {"layers": 2 / 30},
    "kv_heads": {"kv_heads": 1 / 3},
    "together": {"ffn": 0.25, "hidden": 0.125, "layers": 2 / 30, "kv_heads": 1 / 3},
}
# What the configuration must say, worked out by hand from 576 hidden, 1536 ffn, 30 layers, 3 kv
# heads with 3 query heads each.
FIELDS = {
    "ffn": {"intermediate_size": 1152},
    "hidden": {"hidden_size": 504},
    "layers": {"num_hidden_layers": 28},
    "kv_heads": {"num_key_value_heads": 2, "num_attention_heads": 6},
}
RELOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids = torch.tensor([json.loads(sys.argv[2])])
with torch.no_grad():
    logits = model(ids).logits
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    cached = model.generate(ids, use_cache=True, **options)
    plain = model.generate(ids, use_cache=False, **options)
torch.save(logits, sys.argv[3])
print(json.dumps({"cached": cached.tolist(), "plain": plain.tolist(),
                  "parameters": model.num_parameters()}))
"""


@pytest.fixture(scope="module")
def program() -> gp.Program:
    return load_traced(model_path("smollm2"))


NAMES = [n if n == "together" else pytest.param(n, marks=pytest.mark.slow) for n in PLANS]


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    tokenizer = load_tokenizer(model_path("smollm2"))
    return windows(tokenizer, read_text("help"), length=256, count=16, seed=0)


@pytest.mark.slow  # gradients of a real model; other tests have them of small ones
@pytest.mark.parametrize("name", PLANS)
def test_float32(program: gp.Program, text: torch.Tensor, name: str) -> None:
    plan = gp.select(program, remove=PLANS[name], score="taylor", calibration=text)
    slim = gp.apply(program, plan)
    found = gp.verify(program, plan, slim, dtype=torch.float32)
    assert found.passed
    assert found.max_abs_error < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_float32_by_magnitude(program: gp.Program, name: str) -> None:
    """Slim and masked differ by 1e-4 at most, or by as much as rounding does to both.

    Both round, each in its own order; neither by more than twice what the module does.

    Without what magnitude takes for unimportant the model amplifies rounding errors: logits of
    the slim model, of a size of 40, are 5e-4 from its own in float64.
    """
    plan = gp.select(program, remove=PLANS[name])
    slim = gp.apply(program, plan)
    found = gp.verify(program, plan, slim, dtype=torch.float32)
    assert found.passed
    args, kwargs = program.example
    with torch.no_grad():
        single = slim.module(*args, **kwargs).logits
        double = copy.deepcopy(slim.module).double()(*args, **kwargs).logits
    rounding = float((single - double).abs().max())
    assert found.max_abs_error < max(1e-4, 2 * 2 * rounding)
    assert rounding < 2e-3


@pytest.mark.parametrize("name", NAMES)
def test_prune_verify_write_reload(program: gp.Program, name: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    plan = gp.select(program, remove=PLANS[name])
    slim = gp.apply(program, plan)
    exact = gp.verify(program, plan, slim, dtype=torch.float64)
    assert exact.passed
    assert exact.max_abs_error < 1e-9
    assert exact.dense_difference is not None
    assert exact.dense_difference > 1

    slim.save(tmp_path / "hf", format="hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    parts = FIELDS if name == "together" else {name: FIELDS[name]}
    for fields in parts.values():
        assert fields.items() <= config.items()
    assert config["head_dim"] == 64
    with safe_open(tmp_path / "hf" / "model.safetensors", framework="pt") as file:
        sizes = [file.get_tensor(n).nbytes for n in file.keys()]  # noqa: SIM118
    assert sum(sizes) == slim.cost.bytes
    kept = plan.kept(program)
    counted = sum(int(np.prod([len(i) for i in kept[n]])) for n in program.trainable)
    assert slim.cost.params == counted

    ids = [504, 3575, 282, 4649, 314, 260, 1145, 30]
    logits = tmp_path / "logits.pt"
    command = [sys.executable, "-c", RELOAD, str(tmp_path / "hf"), json.dumps(ids), str(logits)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["cached"] == report["plain"]
    assert report["parameters"] == slim.cost.params
    reloaded = torch.load(logits, weights_only=True)
    with torch.no_grad():
        ours = slim.exported.module()(input_ids=torch.tensor([ids, ids])).logits[:1]
    scale = float(ours.abs().max())
    assert float((reloaded - ours).abs().max()) < 1e-4 * scale

    slim.save(tmp_path / "slim.onnx", format="onnx")
    session = onnxruntime.InferenceSession(
        str(tmp_path / "slim.onnx"), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(["logits"], {"input_ids": np.array([ids, ids])})
    assert float(np.abs(found[:1] - ours.numpy()).max()) < 1e-3


def test_the_text_of_another_tokenizer_makes_no_sense(
    program: gp.Program, text: torch.Tensor
) -> None:
    english = text[:2, :128]
    assert check_dense(program, english).value < 50
    other = torch.randperm(49_152, generator=torch.Generator().manual_seed(0))
    for wrong in (other[english], (english + 3) % 49_152):
        with pytest.raises(CalibrationError, match="makes no sense"):
            check_dense(program, wrong)
