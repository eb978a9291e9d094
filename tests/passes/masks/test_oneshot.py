"""A solver at every site of a program: the same numbers as by hand, exact counts, files."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import graphprune as gp
from graphprune.errors import LoadError, RecipeError
from graphprune.frontends.hf.load import trace_model
from graphprune.passes.masks.alps import ALPS
from graphprune.passes.masks.dsnot import DSnoT
from graphprune.passes.masks.magnitude import Magnitude
from graphprune.passes.masks.oneshot import OWL, Sensitivity, sparsify
from graphprune.passes.masks.ria import RIA
from graphprune.passes.masks.sparsegpt import SparseGPT
from graphprune.passes.masks.wanda import Wanda
from graphprune.solvers import NM, Given, Moments, Unstructured
from graphprune.solvers.gap import GapClosing
from graphprune.streaming import State, find_sites
from streaming.oracle import tokens, traced
from zoo import decoders, mixtures
from zoo.case import randomise

HALF = Unstructured(0.5)
SOLVERS = [
    Magnitude(), Wanda(), RIA(), SparseGPT(), SparseGPT(bits=4), ALPS(), DSnoT(),
    DSnoT(first=SparseGPT()), DSnoT(first=RIA()),
]  # fmt: skip


def moment(rows):
    found = Moments(rows.shape[1])
    found.add(rows)
    return found


@pytest.mark.parametrize(
    "solver",
    [SparseGPT(), ALPS(), Wanda(), RIA(), Magnitude(), DSnoT(), DSnoT(first=ALPS())],
    ids=lambda s: type(s).__name__,
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


@pytest.mark.parametrize("solver", [Wanda(), RIA(), Magnitude()], ids=lambda s: type(s).__name__)
def test_errors_are_told_on_request_and_change_no_mask(solver):
    module = randomise(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))).eval()
    data = torch.randn(6, 40, 12, generator=torch.Generator().manual_seed(1))
    program = gp.trace(module, (data[0],))
    told, plain = (
        sparsify(program, [(x,) for x in data], solver, HALF, errors=errors)
        for errors in (True, False)
    )
    assert plain.layers[0].error is None
    new = told.program.weights["0.weight"].double()
    assert torch.equal(new, plain.program.weights["0.weight"].double())
    rows, old = data.flatten(0, 1).double(), module[0].weight.detach().double()
    expected = (rows @ (old - new).T).square().sum() / (rows @ old.T).square().sum()
    assert told.layers[0].error == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("solver", [ALPS(), SparseGPT(), Wanda(), Magnitude()],
                         ids=lambda s: type(s).__name__)  # fmt: skip
def test_writers_of_the_stream_make_up_for_what_it_lacks(solver):
    program, model = traced(decoders.llama_gqa_4)
    given = tokens(40)  # of fewer tokens than inputs nothing is learnt
    with torch.no_grad():
        wanted = model(input_ids=given).logits

    def distance(reference):
        found = sparsify(program, given, solver, Unstructured(0.6), reference=reference)
        assert found.sparsity == pytest.approx(0.6, abs=0.01)
        slim = gp.apply(found.program, gp.Plan(found.program.fingerprint, {})).module
        with torch.no_grad():
            return float((slim(input_ids=given).logits - wanted).square().sum())

    assert distance(True) < distance(False)


def test_the_target_with_a_gap_is_a_damped_fit_to_what_the_stream_lacks():
    """Two writers into one stream, of which only the first is pruned."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

        def forward(self, x):
            h = x + self.a(x.tanh())
            return torch.relu(h + self.b(x.sin()))

    net = Net().eval()
    randomise(net)
    data = torch.randn(4, 1, 50, 8, generator=torch.Generator().manual_seed(1))
    program = gp.trace(net, (data[0],))
    patterns = {"a.weight": Unstructured(0.5), "b.weight": Unstructured(0.0)}
    found = sparsify(program, list(data), Magnitude(), patterns, reference=True)
    a, b = (found.program.weights[f"{n}.weight"].double() for n in "ab")
    assert int((a == 0).sum()) == 32
    x = data.double()
    halves = [torch.cat([x[i] for i in which]).flatten(0, -2) for which in ((1, 3), (0, 2))]

    def fit(read, lack, counts, damping):
        heavy = read * counts
        hessian = heavy.T @ read
        hessian += damping * hessian.diagonal().diag()
        return torch.linalg.solve(hessian, heavy.T @ lack).T

    def sides(rows):
        first, second = (m.weight.detach().double() for m in (net.a, net.b))
        stream = rows + rows.tanh() @ first.T + rows.sin() @ second.T
        counts = 1 / stream.square().mean(1, keepdim=True).sqrt()
        return rows.sin(), rows.tanh() @ (first - a).T, counts

    dampings = GapClosing().dampings
    errors = torch.zeros(len(dampings) + 1, 8, dtype=torch.float64)
    for seen, unseen in (halves, halves[::-1]):
        other, wanted, counts = sides(unseen)
        share = counts / counts.sum() * len(other)
        errors[0] += (wanted.square() * share).sum(0)
        for i, damping in enumerate(dampings, start=1):
            wrong = wanted - other @ fit(*sides(seen), damping).T
            errors[i] += (wrong.square() * share).sum(0)
    best = errors.argmin(0)
    expected = net.b.weight.detach().double()
    for i, damping in enumerate(dampings, start=1):
        change = fit(*sides(x.flatten(0, -2)), damping)
        expected = torch.where((best == i)[:, None], expected + change, expected)
    assert bool((best > 0).any())
    torch.testing.assert_close(b, expected, rtol=1e-4, atol=1e-5)


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


def counted(found):
    """Zeros of the treated weights, as they are stored."""
    return {e.parameter: int((found.program.weights[e.parameter] == 0).sum()) for e in found.layers}


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("build", [decoders.llama_gqa_4, decoders.gpt2], ids=lambda f: f.__name__)
def test_what_is_told_is_what_the_weights_hold(solver, build):
    program, module = traced(build)
    found = sparsify(program, tokens(), solver, HALF)
    zeros = counted(found)
    assert {e.parameter: e.zeros for e in found.layers} == zeros
    assert all(e.target == 0.5 for e in found.layers)
    assert all(e.weights == program.weights[e.parameter].numel() for e in found.layers)
    removed = {e.parameter: e.removed for e in found.layers}
    if isinstance(solver, SparseGPT) and solver.bits:  # some weights are rounded to zero
        assert all(removed[n] <= zeros[n] for n in zeros)
        assert sum(removed.values()) < sum(zeros.values())
    else:
        assert removed == zeros
    whole = sum(p.numel() for p in module.parameters())
    assert found.sparsity_of_model == sum(removed.values()) / whole
    assert found.sparsity == 0.5


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_zeros_stay_on_request(solver):
    program, _ = traced(decoders.llama_gqa_4)

    def pruned(start, pattern):
        return sparsify(start, tokens(), solver, pattern, keep_zeros=True)

    def kept(found):
        return {e.parameter: found.program.weights[e.parameter] != 0 for e in found.layers}

    once = pruned(program, HALF)
    twice = pruned(once.program, HALF)
    for name, mask in kept(twice).items():
        before = kept(once)[name]
        if not (isinstance(solver, SparseGPT) and solver.bits):
            assert torch.equal(mask, before)
        assert not bool((mask & ~before).any())
    more = pruned(once.program, Unstructured(0.75))
    groups = pruned(once.program, NM(2, 4))
    fewer = pruned(once.program, Unstructured(0.25))
    by_row = isinstance(solver, Wanda | DSnoT)
    for found in (more, groups, fewer):
        for e in found.layers:
            mask, before = kept(found)[e.parameter], kept(once)[e.parameter]
            assert not bool((mask & ~before).any())
            assert e.zeros == int((~mask).sum())
            if found is groups:
                assert bool((mask.reshape(-1, 4).sum(1) <= 2).all())
            elif found is more and not (isinstance(solver, SparseGPT) and solver.bits):
                over = (~before).sum(1) > 0.75 * mask.shape[1] if by_row else torch.zeros(1)
                assert over.any() or e.removed == 0.75 * e.weights


def test_zeros_stay_where_a_budget_deals():
    program, _ = traced(decoders.llama_gqa_4)
    names = find_sites(program).parameters
    masks = {n: Given(torch.rand(program.weights[n].shape) < 0.5) for n in names}
    once = sparsify(program, tokens(), Magnitude(), masks)
    for budget in (OWL(), Sensitivity(), "global"):
        found = sparsify(once.program, tokens(), SparseGPT(), HALF, budget=budget, keep_zeros=True)
        assert len({e.target for e in found.layers}) > 1
        for e in found.layers:
            before = once.program.weights[e.parameter] == 0
            assert not found.program.weights[e.parameter][before].any()
            assert e.zeros == e.removed == max(round(e.target * e.weights), int(before.sum()))


def test_a_given_mask_keeps_zeros_too():
    program, _ = traced(decoders.llama_gqa_4)
    once = sparsify(program, tokens(), Magnitude(), HALF)
    masks = {
        e.parameter: Given(torch.rand(program.weights[e.parameter].shape) < 0.6)
        for e in once.layers
    }
    found = sparsify(once.program, tokens(), SparseGPT(), masks, keep_zeros=True)
    for e in found.layers:
        kept = masks[e.parameter].kept & (once.program.weights[e.parameter] != 0)
        assert torch.equal(found.program.weights[e.parameter] != 0, kept)
        assert e.target == pytest.approx(1 - float(masks[e.parameter].kept.float().mean()))


def read_by_down(model, x):
    """What each down projection reads."""
    found = []
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda module, args: found.append(args[0].flatten(0, -2))
        )
        for layer in model.model.layers
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return found


def two_of_four(weight):
    groups = (weight != 0).reshape(len(weight), -1, 4).sum(-1)
    return bool((groups <= 2).all())


@pytest.mark.parametrize("again", [False, True], ids=["ria", "dsnot"])
def test_channels_are_reordered_where_they_can_be(again):
    """As if the model had been reordered by hand before."""
    program, model = traced(decoders.llama_gqa_4)
    model = model.float()
    solver = DSnoT(first=RIA(permute=True)) if again else RIA(permute=True)
    found = sparsify(program, tokens(), solver, NM(2, 4))
    seen = read_by_down(model, tokens())
    by_hand = copy.deepcopy(model)
    gained = 0
    for i, layer in enumerate(by_hand.model.layers):
        name = f"model.layers.{i}.mlp.down_proj"
        rows = seen[i]
        order = RIA(permute=True).solve(layer.mlp.down_proj.weight, moment(rows), NM(2, 4))
        (entry,) = [e for e in found.layers if e.parameter == f"{name}.weight"]
        assert any("reordered" in note for note in entry.notes) == (order.permutation is not None)
        if (order := order.permutation) is None:
            continue
        gained += 1
        with torch.no_grad():
            for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
                part.weight.copy_(part.weight[order])
            layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, order])
    assert gained
    torch.testing.assert_close(by_hand(tokens()).logits, model(tokens()).logits)
    plain = DSnoT(first=RIA()) if again else RIA()
    wanted = sparsify(trace_model(by_hand), tokens(), plain, NM(2, 4))
    assert [e.parameter for e in wanted.layers] == [e.parameter for e in found.layers]
    for e in found.layers:
        new = found.program.weights[e.parameter]
        assert torch.equal(new, wanted.program.weights[e.parameter])
        assert two_of_four(new)
    assert found.reordered == ()


class Wide(nn.Module):
    """A block with biases, one tensor for both of its gates, and a scale per channel."""

    def __init__(self):
        super().__init__()
        self.fused = nn.Linear(8, 2 * 16)
        self.scale = nn.Parameter(torch.rand(16) + 0.5)
        self.down = nn.Linear(16, 8)

    def forward(self, x):
        gate, up = self.fused(x).chunk(2, -1)
        return x + self.down(self.scale * torch.relu(gate) * up)


def test_all_that_carries_channels_is_reordered():
    torch.manual_seed(3)
    module, x = Wide().eval(), torch.randn(40, 8)
    found = sparsify(
        gp.trace(module, (x,)), [(x,)], RIA(permute=True), NM(2, 4), exclude=["fused.weight"]
    )
    new = found.program.weights
    gate, up = module.fused(x).chunk(2, -1)
    rows = module.scale * torch.relu(gate) * up
    order = RIA(permute=True).solve(module.down.weight, moment(rows), NM(2, 4)).permutation
    both = torch.cat([order, 16 + order])
    assert set(found.reordered) == {"fused.weight", "fused.bias", "scale"}
    assert torch.equal(new["fused.weight"], module.fused.weight[both])
    assert torch.equal(new["fused.bias"], module.fused.bias[both])
    assert torch.equal(new["scale"], module.scale[order])
    plain = RIA().solve(module.down.weight[:, order], moment(rows[:, order]), NM(2, 4))
    assert torch.equal(new["down.weight"], plain.weight)
    assert two_of_four(new["down.weight"])


def test_other_patterns_reorder_nothing():
    program, _ = traced(decoders.llama_gqa_4)
    found = sparsify(program, tokens(), RIA(permute=True), HALF)
    plain = sparsify(program, tokens(), RIA(), HALF)
    for e in found.layers:
        assert torch.equal(found.program.weights[e.parameter], plain.program.weights[e.parameter])


def test_an_order_that_is_nobodys_business_is_refused():
    """A file with a weight that is n:m in another order of its columns is not n:m."""

    class Permuting:
        def solve(self, weight, statistic, pattern):
            return RIA(permute=True).solve(weight, statistic, pattern)

    program, _ = traced(decoders.llama_gqa_4)
    with pytest.raises(RecipeError, match="would permute the inputs") as caught:
        sparsify(program, tokens(), Permuting(), NM(2, 4))
    assert caught.value.where.startswith("model.layers.0.self_attn")
    rows = torch.randn(50, 8) * torch.arange(1, 9)
    with pytest.raises(RecipeError, match="as they stand"):
        DSnoT(first=RIA(permute=True)).solve(torch.randn(6, 8), moment(rows), NM(2, 4))


def test_few_tokens_are_told_of():
    program, _ = traced(decoders.llama_gqa_4)
    few = tokens()[:2]  # 14 of them
    for solver in (SparseGPT(), ALPS()):
        notes = {e.parameter: e.notes for e in sparsify(program, few, solver, HALF).layers}
        assert notes["model.layers.0.self_attn.q_proj.weight"] == ("14 tokens for 32 inputs",)
        assert notes["model.layers.0.mlp.down_proj.weight"] == ("14 tokens for 48 inputs",)
    assert not any(e.notes for e in sparsify(program, few, Wanda(), HALF).layers)


@pytest.mark.parametrize("budget", ["uniform", "owl"])
def test_an_interrupted_run_ends_as_if_it_had_not_been(tmp_path, budget):
    program, _ = traced(decoders.llama_gqa_4)
    options = {"budget": budget}
    whole = sparsify(program, tokens(), SparseGPT(), HALF, **options)
    steps = []

    class Interrupted(Exception):
        pass

    def stop(step):
        steps.append(step)
        if len(steps) == 5 + (budget == "owl") * step.total:
            raise Interrupted

    with pytest.raises(Interrupted):
        sparsify(
            program, tokens(), SparseGPT(), HALF, state=State(tmp_path), progress=stop, **options
        )
    again = State(tmp_path, resume=True)
    with pytest.raises(LoadError, match="another run"):
        sparsify(program, tokens(), ALPS(), HALF, state=again, **options)
    with pytest.raises(LoadError, match="another run"):
        sparsify(program, tokens(), SparseGPT(), HALF, state=again, keep_zeros=True, **options)
    restored = []
    found = sparsify(
        program, tokens(), SparseGPT(), HALF, state=again, progress=restored.append, **options
    )
    assert len(found.layers) == len(whole.layers)
    assert found.layers == whole.layers
    assert found.sparsity_of_model == whole.sparsity_of_model
    for e in whole.layers:
        assert torch.equal(found.program.weights[e.parameter], whole.program.weights[e.parameter])


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
    text = (Path(__file__).parents[3] / "docs" / "streaming.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    space: dict = {}
    exec(compile(code, "streaming.md", "exec"), space)
    program, _ = traced(decoders.llama_gqa_4)
    weights = space["half"](program, tokens()).weights
    printed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert printed
    for name in printed:
        assert int((weights[name] == 0).sum()) == weights[name].numel() // 2
