"""REAP, against experts run one by one on the tokens that hooks see."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.errors import PlanError
from graphprune.frontends.hf.load import trace_model
from graphprune.passes.scores import get_score
from graphprune.passes.selection.select import select
from graphprune.passes.shared.score import Inputs
from streaming.oracle import tokens, traced
from zoo import decoders, mixtures
from zoo.case import randomise


def experts_of(program):
    return [s for s in program.structures if s.role == "experts" and s.prunable]


def brute(module, layer, valid=None, **inputs):
    """Mean of g * norm(f) over the tokens of each expert, by loops, and the numbers of tokens."""
    seen = []
    experts = module.model.layers[layer].mlp.experts
    handle = experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.no_grad():
        module(**inputs)
    handle.remove()
    ((states, chosen, gates),) = seen
    total, count = np.zeros(len(experts.down_proj)), np.zeros(len(experts.down_proj))
    for t in range(len(states)):
        if valid is not None and not valid.flatten()[t]:
            continue
        for expert, gate in zip(chosen[t].tolist(), gates[t].tolist(), strict=True):
            first, second = (experts.gate_up_proj[expert] @ states[t]).chunk(2)
            result = experts.down_proj[expert] @ (nn.functional.silu(first) * second)
            total[expert] += gate * result.norm().item()
            count[expert] += 1
    return total / np.maximum(count, 1), count


@pytest.mark.parametrize("build", [mixtures.mixtral, mixtures.qwen3_moe])
def test_scores_are_those_of_experts_run_one_by_one(build):
    program, module = traced(build)
    windows = tokens(5, 9)
    score = get_score({"name": "reap", "batch": 2})
    found = score.score(program, experts_of(program), Inputs(windows))
    assert len(found) == 2
    for layer, scores in enumerate(found.values()):
        expected, count = brute(module, layer, input_ids=windows)
        assert count.all()
        np.testing.assert_allclose(scores, expected[None], rtol=1e-5)


def test_plans_keep_the_experts_with_the_highest_scores():
    program, module = traced(mixtures.mixtral)
    windows = tokens(5, 9)
    plan = select(program, remove={"experts": 0.25}, score="reap", calibration=windows)
    for layer, kept in enumerate(plan.kept_units.values()):
        scores, _ = brute(module, layer, input_ids=windows)
        assert kept == tuple(i for i in range(4) if i != scores.argmin())
    slim = gp.apply(program, plan)
    assert gp.verify(program, plan, slim).passed


def test_an_expert_without_tokens_has_score_zero_and_is_named():
    program, module = traced(mixtures.qwen3_moe)
    window = tokens(1, 2)
    with pytest.warns(UserWarning, match=r"no calibration token chose \d experts of") as caught:
        found = get_score("reap").score(program, experts_of(program), Inputs(window))
    texts = [str(w.message) for w in caught]
    for layer, scores in enumerate(found.values()):
        expected, count = brute(module, layer, input_ids=window)
        np.testing.assert_allclose(scores[0], expected, rtol=1e-5)
        idle = np.flatnonzero(count == 0).tolist()
        assert (scores[0][idle] == 0).all()
        named = [t for t in texts if f"layers.{layer}.mlp.experts.down_proj" in t]
        if idle:
            assert f": {', '.join(map(str, idle))}; their score is 0" in named[0]
        else:
            assert not named


def test_padding_is_routed_and_does_not_count():
    torch.manual_seed(0)
    module = randomise(mixtures.mixtral()).eval()
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[1, 5:] = mask[2, 3:] = 0
    windows = tokens(3, 8)
    program = trace_model(module)
    wide = copy.deepcopy(module).double()
    found = get_score("reap").score(
        program, experts_of(program), Inputs({"input_ids": windows, "attention_mask": mask})
    )
    for layer, scores in enumerate(found.values()):
        expected, _ = brute(wide, layer, mask.bool(), input_ids=windows)
        whole, _ = brute(wide, layer, input_ids=windows)
        np.testing.assert_allclose(scores[0], expected, rtol=1e-5)
        assert np.abs(whole - expected).max() > 1e-4 * expected.max()


def test_groups_of_experts_have_the_sum_of_their_experts():
    program, _ = traced(mixtures.deepseek_v2)
    both = [s for s in program.structures if s.role in ("expert_groups", "experts") and s.prunable]
    groups, experts = sorted(both, key=lambda s: s.role != "expert_groups")
    found = get_score("reap").score(program, [groups, experts], Inputs(tokens(9, 12)))
    assert found[experts.name].shape == (1, groups.size, experts.size)
    np.testing.assert_allclose(found[groups.name][0], found[experts.name][0].sum(-1))


class Mixture(nn.Module):
    """Two of four experts per token, whose results are put together in various ways."""

    def __init__(self, way):
        super().__init__()
        self.router, self.out = nn.Linear(6, 4, bias=False), nn.Linear(6, 3)
        self.bank, self.way = nn.Parameter(torch.randn(4, 6, 6)), way

    def forward(self, x):
        gates, chosen = self.router(x).softmax(-1).topk(2, -1)
        rows = x.repeat_interleave(2, 0).unsqueeze(-1)
        y = torch.bmm(self.bank[chosen.flatten()], rows).squeeze(-1)
        if self.way == "rolled":
            y = y.roll(1, 0)
        if self.way == "own gates":
            return self.out((y * y.mean(-1, keepdim=True)).unflatten(0, (-1, 2)).sum(1))
        if self.way == "no gates":
            return self.out(y.unflatten(0, (-1, 2)).sum(1))
        y = y.unflatten(0, (-1, 2)) * gates.unsqueeze(-1)
        return self.out(y.sum(1))


@pytest.mark.parametrize(
    ("way", "why"),
    [
        ("rolled", "roll reads what the experts compute"),
        ("own gates", "2 operators read what the experts compute"),
        ("no gates", "sum reads what the experts compute"),
        ("gates", None),
    ],
)
def test_gates_that_the_graph_doesn_t_show_are_refused(way, why):
    torch.manual_seed(0)
    module = Mixture(way).eval()
    program = gp.trace(module, (torch.randn(5, 6),))
    chosen = experts_of(program)
    assert len(chosen) == 1
    x = torch.randn(5, 6)
    if why is not None:
        with pytest.raises(PlanError, match="doesn't see what the router gives") as caught:
            get_score("reap").score(program, chosen, Inputs([x]))
        assert why in str(caught.value)
        return
    found = get_score("reap").score(program, chosen, Inputs([x]))[chosen[0].name][0]
    gates, picked = module.router(x).softmax(-1).topk(2, -1)
    for expert in range(4):
        values = [gates[t, k].item() * (module.bank[expert] @ x[t]).norm().item()
                  for t, k in (picked == expert).nonzero().tolist()]  # fmt: skip
        assert found[expert] == pytest.approx(np.mean(values) if values else 0.0, rel=1e-5)


def test_what_it_needs():
    program, _ = traced(mixtures.mixtral)
    with pytest.raises(PlanError, match="needs calibration data"):
        select(program, remove={"experts": 0.25}, score="reap")
    other, _ = traced(decoders.gpt2)
    with pytest.raises(PlanError, match="score reap is for experts"):
        select(other, remove={"ffn": 0.25}, score="reap", calibration=tokens())
