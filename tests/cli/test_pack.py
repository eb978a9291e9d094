"""`graphprune pack`: what it says, and how it fails."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import graphprune as gp
import graphprune.cli.progress
from cli.helpers import check_failure, tree
from graphprune.runtime.generation import generate


@pytest.fixture(scope="module")
def sparse(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with zeros, as a checkpoint and as a decoder for ONNX Runtime."""
    output = tmp_path_factory.mktemp("sparse") / "sparse"
    recipe = {"sparsify": {"method": "magnitude", "sparsity": 0.6},
              "formats": ["hf", "onnx-decoder"]}  # fmt: skip
    gp.compile(dense, recipe, output)
    return output


def test_a_checkpoint_is_packed_and_said_so(run, sparse, tmp_path, monkeypatch):
    monkeypatch.setattr(graphprune.cli.progress, "MINUTE", 0)
    checkpoint = sparse
    result = run("pack", checkpoint, "-o", tmp_path / "packed")
    assert result.code == 0
    assert "bitmap" in result.out
    assert "60%" in result.out
    told = [line for line in result.err.splitlines() if line.startswith("packing: ")]
    assert any("model.layers.0.mlp.down_proj.weight" in line for line in told)
    assert [line.split(",")[0] for line in told] == [
        f"packing: {i + 1} of {len(told)}" for i in range(len(told))
    ]
    twin = AutoModelForCausalLM.from_pretrained(checkpoint)
    model = gp.runtime.model(tmp_path / "packed", format="file")
    prompt = torch.tensor([[5, 17, 3, 11]])
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(prompt, **options), twin.generate(prompt, **options))


def test_a_decoder_is_packed(run, sparse, tmp_path):
    (decoder,) = sparse.rglob("*.onnx")
    result = run("pack", decoder, "-o", tmp_path / "packed.onnx", "--json")
    assert result.code == 0
    facts = json.loads(result.out)
    assert facts["bytes_after"] < facts["bytes_before"]
    assert (tmp_path / "packed.onnx").stat().st_size < decoder.stat().st_size
    prompts = [[5, 17, 3, 11], [60, 2]]
    expected = generate(decoder, prompts, 12)
    assert np.array_equal(generate(tmp_path / "packed.onnx", prompts, 12), expected)


def test_commands_take_packed_checkpoints(run, sparse, tmp_path):
    run("pack", sparse, "-o", tmp_path / "packed")
    assert run("inspect", tmp_path / "packed").code == 0
    slim = run("compile", tmp_path / "packed", "-o", tmp_path / "slim", "--remove", "ffn=0.5",
               "--repair", "none", "--score", "magnitude")  # fmt: skip
    assert slim.code == 0, slim.err


def test_failures_leave_nothing(run, dense, sparse, tmp_path):
    output = tmp_path / "out" / "packed"
    check_failure(run("pack", dense, "-o", output), "no weight becomes smaller", "no zeros")
    check_failure(run("pack", tmp_path / "none", "-o", output), "no such file or directory")
    unknown = run("pack", sparse, "-o", output, "--format", "zip")
    check_failure(unknown, "no format 'zip'", "strip_u8")
    assert not output.parent.exists() or tree(output.parent) == []
    assert run("pack", sparse, "-o", output).code == 0
    check_failure(run("pack", sparse, "-o", output), "there already")
    assert run("pack", sparse, "-o", output, "--overwrite").code == 0
