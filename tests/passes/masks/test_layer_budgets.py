"""Layer budgets of a whole program, against hooks on the dense module in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.errors import GraphPruneError, RecipeError
from graphprune.passes.masks.allocations import layers_of
from graphprune.passes.masks.magnitude import Magnitude
from graphprune.passes.masks.oneshot import OWL, Global, Sensitivity, sparsify
from graphprune.passes.masks.ria import RIA
from graphprune.passes.masks.sparsegpt import SparseGPT
from graphprune.passes.masks.wanda import Wanda
from graphprune.solvers import NM, Unstructured, outlier_ratio, owl
from graphprune.solvers.budget import least_error
from graphprune.streaming import find_sites
from streaming.oracle import inputs_of, tokens, traced
from zoo import decoders, encoders, mixtures
from zoo.case import randomise

SEVENTY = Unstructured(0.7)


def dense_rows(module, names):
    """What the dense linear layers read, in float64, all samples together."""
    paths = [n.removesuffix(".weight") for n in names]
    seen = inputs_of(module, paths, [((), {"input_ids": ids[None]}) for ids in tokens()])
    return {
        n: torch.cat([x.flatten(0, -2) for x in seen[p]]) for n, p in zip(names, paths, strict=True)
    }


def wanda(module, name, rows):
    weight = module.get_parameter(name).detach()
    return weight.abs() * rows.square().mean(0).sqrt()


def zeros(found):
    return {e.parameter: int((found.program.weights[e.parameter] == 0).sum()) for e in found.layers}


def check_total(found, sparsity, slack=1):
    """The weights as they are stored have the sparsity that is told, and the one asked for."""
    counted = zeros(found)
    assert {e.parameter: e.removed for e in found.layers} == counted
    assert {e.parameter: e.zeros for e in found.layers} == counted
    total = sum(e.weights for e in found.layers)
    assert abs(sum(counted.values()) - sparsity * total) <= slack
    assert found.sparsity == sum(counted.values()) / total
    for e in found.layers:
        assert abs(counted[e.parameter] - e.target * e.weights) < 1e-6 * e.weights


def test_owl_gives_the_layers_of_the_model_what_their_outliers_ask_for():
    program, module = traced(decoders.llama_gqa_4)
    found = sparsify(program, tokens(), SparseGPT(), SEVENTY, budget=OWL(threshold=3.0))
    names = [e.parameter for e in found.layers]
    rows = dense_rows(module, names)
    blocks = [[n for n in names if n.startswith(f"model.layers.{i}.")] for i in range(2)]
    ratios, sizes = [], []
    for block in blocks:
        scores = torch.cat([wanda(module, n, rows[n]).flatten() for n in block])
        ratios.append(float((scores > 3 * scores.mean()).double().mean()))
        sizes.append(len(scores))
    assert ratios[0] != ratios[1]
    wanted = owl(ratios, sizes, 0.7)
    for block, sparsity in zip(blocks, wanted, strict=True):
        for e in (e for e in found.layers if e.parameter in block):
            assert e.target == pytest.approx(sparsity, abs=1 / e.weights)
    check_total(found, 0.7)
    assert find_sites(program).parameters == tuple(names)  # the order of the dense pass is ours


def test_owl_per_weight():
    program, module = traced(decoders.llama_gqa_4)
    found = sparsify(program, tokens(), Magnitude(), SEVENTY, budget=OWL(0.2, 4.0, per="weight"))
    rows = dense_rows(module, [e.parameter for e in found.layers])
    ratios = [outlier_ratio([wanda(module, n, x)], 4.0) for n, x in rows.items()]
    wanted = owl(ratios, [e.weights for e in found.layers], 0.7, 0.2)
    assert len(set(wanted)) > 3
    for e, sparsity in zip(found.layers, wanted, strict=True):
        assert e.target == pytest.approx(sparsity, abs=1 / e.weights)
    check_total(found, 0.7)


class Uneven(nn.Module):
    """Blocks of very different sizes."""

    def __init__(self, *, same: bool):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8 if same else w) for w in (8, 64, 8))
        self.back = nn.ModuleList(nn.Linear(8 if same else w, 8) for w in (8, 64, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for up, down in zip(self.blocks, self.back, strict=True):
            x = x + down(torch.relu(up(x)))
        return self.head(x)


def test_sizes_count_and_densities_stay_in_range():
    module = randomise(Uneven(same=False))
    with torch.no_grad():  # many outliers in the large layer, as at high sparsity and spread
        module.blocks[1].weight.view(-1)[::9] *= 40
    data = [torch.randn(20, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    program = gp.trace(module, (data[0],))
    found = sparsify(program, data, Magnitude(), Unstructured(0.9), budget=OWL(0.4, 4.0))
    check_total(found, 0.9)
    targets = {e.parameter: e.target for e in found.layers}
    assert 0 <= min(targets.values()) < 0.9 < max(targets.values()) < 1
    assert targets["back.1.weight"] == pytest.approx(0.99, abs=1 / 512)
    assert targets["blocks.1.weight"] == min(targets.values())


def test_equal_ratios_are_uniform():
    module = randomise(Uneven(same=True))
    data = [torch.randn(20, 8)]
    program = gp.trace(module, (data[0],))
    found = sparsify(program, data, Magnitude(), SEVENTY, budget=OWL(threshold=1e6))  # no outlier
    assert [e.target for e in found.layers] == pytest.approx([0.7] * 6, abs=1 / 64)
    check_total(found, 0.7)


def test_layers_of_models_with_two_stacks_and_of_none():
    program, _ = traced(encoders.whisper)
    layers = layers_of(program, find_sites(program))
    stacks = [n.rpartition(".layers.")[0] for names in layers for n in names[:1]]
    assert stacks == ["", "", *["model.encoder"] * 2, *["model.decoder"] * 2]
    for names in layers[2:]:
        assert len({n.split(".")[3] for n in names}) == 1
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    plain = gp.trace(randomise(module), (torch.zeros(2, 4),))
    assert layers_of(plain, find_sites(plain)) == [["0.weight"], ["2.weight"]]


@pytest.mark.parametrize("error", ["relative", "absolute"])
def test_sensitivity_has_the_least_error_in_the_dense_model(error):
    program, module = traced(decoders.llama_gqa_4)
    budget = Sensitivity(bound=0.2, levels=5, error=error)
    found = sparsify(program, tokens(), SparseGPT(), Unstructured(0.5), budget=budget)
    names = [e.parameter for e in found.layers]
    rows = dense_rows(module, names)
    levels = [0.3, 0.4, 0.5, 0.6, 0.7]
    curves = []
    for name in names:
        weight, x = module.get_parameter(name).detach(), rows[name]
        if error == "relative":
            x = x / x.square().mean(1, keepdim=True).sqrt()
        scores = wanda(module, name, x)
        whole = float((x @ weight.T).square().sum()) if error == "relative" else len(x)
        curve = []
        for level in levels:
            gone = scores.argsort(dim=1, stable=True)[:, : round(level * weight.shape[1])]
            curve.append(
                float((x @ (weight - weight.scatter(1, gone, 0)).T).square().sum()) / whole
            )
        curves.append(curve)
    sizes = [e.weights for e in found.layers]
    wanted = least_error(levels, curves, sizes, 0.5)
    assert [e.target for e in found.layers] == pytest.approx(wanted, abs=1 / min(sizes))
    check_total(found, 0.5)
    assert sum(np.interp(s, levels, c) for s, c in zip(wanted, curves, strict=True)) < sum(
        c[2] for c in curves
    )


def test_budgets_near_the_ends_of_the_range():
    program, _ = traced(decoders.llama_gqa_4)
    for sparsity in (0.0, 0.05, 0.97):
        for budget in ("owl", "sensitivity", "global"):
            found = sparsify(program, tokens(), Magnitude(), Unstructured(sparsity), budget=budget)
            check_total(found, sparsity)


def test_experts_without_tokens_get_the_mean():
    program, _ = traced(mixtures.mixtral)
    few = tokens()[:1, :1]  # two of four experts see it
    found = sparsify(program, few, SparseGPT(), Unstructured(0.5), budget="sensitivity")
    check_total(found, 0.5)
    assert any("magnitude" in note for e in found.layers for note in e.notes)
    check_total(sparsify(program, few, SparseGPT(), Unstructured(0.5), budget="owl"), 0.5)


@pytest.mark.parametrize("solver", [Wanda(), RIA(group="row"), Magnitude("row")], ids=str)
def test_rows_lose_whole_columns_and_the_total_is_right(solver):
    program, _ = traced(decoders.llama_gqa_4)
    for budget in ("owl", "sensitivity", "global"):
        found = sparsify(program, tokens(), solver, Unstructured(0.6), budget=budget)
        check_total(found, 0.6, slack=48 / 2)  # half a column of the widest
        for e in found.layers:
            kept = (found.program.weights[e.parameter] != 0).sum(1)
            assert len(set(kept.tolist())) == 1


def test_one_threshold_for_the_magnitudes_of_all_layers():
    program, _ = traced(decoders.llama_gqa_4)
    found = sparsify(program, tokens(), Magnitude(), Unstructured(0.55), budget="global")
    names = [e.parameter for e in found.layers]
    everything = torch.cat([program.weights[n].detach().flatten() for n in names])
    gone = everything.abs().argsort(stable=True)[: round(0.55 * len(everything))]
    wanted = everything.clone()
    wanted[gone] = 0
    given = torch.cat([found.program.weights[n].flatten() for n in names])
    assert torch.equal(given, wanted)
    check_total(found, 0.55)
    assert len({e.removed / e.weights for e in found.layers}) == len(names)


def test_a_threshold_among_equals_goes_by_order_and_may_empty_a_layer():
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    program = gp.trace(randomise(module), (torch.zeros(3, 6),))
    with torch.no_grad():
        module[0].weight.copy_(torch.where(module[0].weight > 0, 0.25, -0.25))
        module[2].weight.copy_(torch.where(module[2].weight > 0, 0.5, -0.5))
    data = [torch.randn(9, 6)]
    found = sparsify(program, data, Magnitude(), Unstructured(0.25), budget=Global())
    assert zeros(found) == {"0.weight": 28, "2.weight": 0}
    assert not found.program.weights["0.weight"].flatten()[:28].any()
    found = sparsify(program, data, Magnitude(), Unstructured(0.75), budget="global")
    assert zeros(found) == {"0.weight": 48, "2.weight": 36}
    assert found.layers[0].target == 1


def test_what_a_budget_cannot_deal_is_refused():
    program, _ = traced(decoders.llama_gqa_4)
    names = find_sites(program).parameters
    for pattern in (NM(2, 4), dict.fromkeys(names, Unstructured(0.5))):
        for budget in ("owl", OWL(), "sensitivity", "global"):
            with pytest.raises(RecipeError, match="a layer budget can't deal") as caught:
                sparsify(program, tokens(), Wanda(), pattern, budget=budget)
            assert "uniform" in str(caught.value)
    with pytest.raises(RecipeError, match="unknown layer budget 'olw'; did you mean 'owl'"):
        sparsify(program, tokens(), Wanda(), SEVENTY, budget="olw")
    for options in ({"spread": 1.0}, {"threshold": 0.0}, {"per": "row"}):
        with pytest.raises(RecipeError):
            OWL(**options)
    for options in ({"bound": 0.0}, {"levels": 1}, {"error": "mean"}):
        with pytest.raises(RecipeError):
            Sensitivity(**options)


@pytest.mark.parametrize("budget", ["owl", "sensitivity", "global"])
def test_a_weight_that_is_nan_is_named(budget):
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    program = gp.trace(randomise(module), (torch.zeros(3, 6),))
    with torch.no_grad():
        module[0].weight[2, 3] = float("nan")
    with pytest.raises(GraphPruneError, match="NaN") as caught:
        sparsify(program, [torch.randn(4, 6)], Magnitude(), SEVENTY, budget=budget)
    assert "0.weight" in str(caught.value)
