"""A solver at every site of a program: the same numbers as by hand, exact counts, files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import graphprune as gp
from graphprune.errors import RecipeError
from graphprune.oneshot import sparsify
from graphprune.solvers import (
    ALPS,
    NM,
    RIA,
    Magnitude,
    SecondMoment,
    SparseGPT,
    Unstructured,
    Wanda,
)
from streaming.oracle import tokens, traced
from zoo import decoders, mixtures
from zoo.case import randomise

HALF = Unstructured(0.5)


def moment(rows):
    found = SecondMoment(rows.shape[1])
    found.add(rows)
    return found


@pytest.mark.parametrize(
    "solver", [SparseGPT(), ALPS(), Wanda(), RIA(), Magnitude()], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("pattern", [HALF, NM(2, 4)], ids=str)
def test_each_layer_is_solved_on_what_the_pruned_ones_before_it_give(solver, pattern):
    module = nn.Sequential(
        nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)
    )
    randomise(module)
    data = torch.randn(6, 40, 12, generator=torch.Generator().manual_seed(1))
    program = gp.trace(module, (data[0],))
    found = sparsify(program, [(x,) for x in data], solver, pattern)
    rows = data.flatten(0, 1)
    for place in (0, 2):
        layer = module[place]
        solved = solver.solve(layer.weight.detach(), moment(rows), pattern)
        new = found.program.weights[f"{place}.weight"]
        torch.testing.assert_close(new, solved.weight, rtol=1e-4, atol=1e-5)
        assert torch.equal(new == 0, ~solved.mask)
        rows = torch.relu(rows @ new.T + layer.bias.detach())
    assert torch.equal(found.program.weights["4.weight"], module[4].weight)  # the model's result
    assert [e.parameter for e in found.layers] == ["0.weight", "2.weight"]
    assert found.sparsity == 0.5
    assert found.sparsity_of_model == (12 * 16 + 16 * 8) / 2 / sum(
        p.numel() for p in module.parameters()
    )
    assert "4.weight" in found.skipped


def test_better_methods_err_less():
    program, _ = traced(decoders.llama_gqa_4)
    errors = [
        [e.error for e in sparsify(program, tokens(), solver, HALF).layers]
        for solver in (ALPS(), SparseGPT())
    ]
    assert sum(errors[0]) < sum(errors[1])


def test_a_pattern_for_every_layer():
    program, _ = traced(decoders.llama_gqa_4)
    names = [e.parameter for e in sparsify(program, tokens(), Magnitude(), HALF).layers]
    patterns = {name: Unstructured(0.25 if "mlp" in name else 0.75) for name in names}
    for layer in sparsify(program, tokens(), Wanda(), patterns).layers:
        assert layer.sparsity == (0.25 if "mlp" in layer.parameter else 0.75)
        assert layer.removed == int((program.weights[layer.parameter].numel()) * layer.sparsity)
    del patterns[names[-1]]
    with pytest.raises(RecipeError, match=names[-1]):
        sparsify(program, tokens(), Wanda(), patterns)


def test_an_expert_without_tokens_is_pruned_by_magnitude_and_reported():
    program, _ = traced(mixtures.mixtral)
    few = tokens()[:1, :1]
    found = sparsify(program, few, SparseGPT(), HALF)
    experts = [e for e in found.layers if "experts" in e.parameter]
    assert experts
    for layer in experts:
        assert layer.sparsity == 0.5
        assert any("magnitude" in note for note in layer.notes)
        assert bool(found.program.weights[layer.parameter].flatten(1).any(1).all())


def test_it_is_saved_with_its_zeros(tmp_path):
    program, _ = traced(decoders.llama_gqa_4)
    found = sparsify(program, tokens(), SparseGPT(), NM(2, 4))
    slim = gp.apply(found.program, gp.Plan(found.program.fingerprint, {}))
    slim.save(tmp_path / "sparse", format="hf")
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").state_dict()
    for layer in found.layers:
        groups = state[layer.parameter].reshape(-1, 4)
        assert bool(((groups != 0).sum(1) <= 2).all())
        assert layer.sparsity == 0.5


def test_the_example_of_the_documentation_runs(capsys):
    text = (Path(__file__).parents[1] / "docs" / "streaming.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    space: dict = {}
    exec(compile(code, "streaming.md", "exec"), space)
    program, _ = traced(decoders.llama_gqa_4)
    weights = space["half"](program, tokens()).weights
    printed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert printed
    for name in printed:
        assert int((weights[name] == 0).sum()) == weights[name].numel() // 2
