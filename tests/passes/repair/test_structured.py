"""Repair of structured pruning against float64 least squares on hooked activations."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import graphprune as gp
from graphprune.errors import PlanError
from graphprune.passes.repair.structured import compensate, obs, reconstruct
from graphprune.passes.scores.obs import Obs
from graphprune.passes.selection.select import select
from graphprune.passes.shared.score import Inputs
from graphprune.solvers.gap import GapClosing
from graphprune.streaming import State
from residual import Net, reads


@pytest.fixture(scope="module")
def net() -> tuple[Net, Any, list[torch.Tensor]]:
    torch.manual_seed(0)
    module = Net(10).eval()
    samples = [torch.randn(1, 40, 6) for _ in range(3)]
    return module, gp.trace(module, (samples[0],)), samples


def ffn(program: Any) -> list[Any]:
    return [s for s in program.structures if s.prunable and s.size == 10]


def plan_for(program: Any) -> gp.Plan:
    kept = {s.name: (0, 2, 3, 5, 7, 8) for s in ffn(program)}
    return gp.Plan(program.fingerprint, kept, dict.fromkeys(kept, 10))


def ridge(
    x: torch.Tensor,
    gap: torch.Tensor,
    weight: torch.Tensor,
    kept: list[int],
    damping: float = 1e-4,
) -> torch.Tensor:
    """argmin |x_K V - (x_K W_K + gap)|² / n + d |V - W_K|², by stacked least squares."""
    n = len(x)
    damp = damping * float((x**2).mean(0)[kept].mean())
    rows = torch.cat([x[:, kept] / n**0.5, damp**0.5 * torch.eye(len(kept), dtype=x.dtype)])
    wanted = torch.cat([gap / n**0.5, gap.new_zeros(len(kept), gap.shape[1])])
    change = torch.linalg.lstsq(rows, wanted).solution
    return weight[:, kept] + change.T


KEPT, GONE = [0, 2, 3, 5, 7, 8], [1, 4, 6, 9]


def base(x: torch.Tensor, weight: torch.Tensor, damping: float) -> torch.Tensor:
    """[out, kept], the refit for what goes."""
    return ridge(x, x[:, GONE] @ weight[:, GONE].T, weight, KEPT, damping)


def tuned(sides: list[torch.Tensor], weight: torch.Tensor) -> float:
    """The damping that two halves of the samples agree on; the least where they need no other."""

    def misses(x: torch.Tensor, new: torch.Tensor) -> float:
        output = x @ weight.T
        return float((x[:, KEPT] @ new.T - output).square().sum() / output.square().sum())

    elsewhere = {
        d: sum(misses(sides[1 - i], base(sides[i], weight, d)) for i in (0, 1))
        for d in (1e-4, 1e-2, 1e-1, 1.0, 10.0)
    }
    if elsewhere[1e-4] <= 1.5 * sum(misses(x, base(x, weight, 1e-4)) for x in sides):
        return 1e-4
    return min(elsewhere, key=lambda d: elsewhere[d])


def test_reconstruct_without_the_dense_model_fits_the_layer(net: Any) -> None:
    """Each layer sees what those before it have become; few tokens damp."""
    module, program, samples = net
    found = reconstruct(program, samples, plan_for(program), reference=False)
    changed = Net(10)
    changed.load_state_dict(module.state_dict())
    dampings = []
    for layer in range(2):
        name = f"outs.{layer}"
        sides = [reads(changed, name, half) for half in (samples[1::2], samples[0::2])]
        weight = module.outs[layer].weight.detach().double()
        dampings.append(tuned(sides, weight))
        new = found.program.weights[f"{name}.weight"]
        assert not new[:, GONE].any()
        wanted = base(reads(changed, name, samples), weight, dampings[-1])
        torch.testing.assert_close(new[:, KEPT].double(), wanted, rtol=1e-3, atol=1e-4)
        told = () if dampings[-1] == 1e-4 else (f"damped by {dampings[-1]:g}: few tokens",)
        assert found.layers[layer].notes == told
        changed.outs[layer].weight.data = new
    assert max(dampings) > 1e-4


def test_reconstruct_closes_the_gap_of_the_residual_stream(net: Any) -> None:
    """The gap is that of the stream, and every output is damped as the other half likes it.

    Tokens count by one over the size of their dense stream.
    """
    module, program, samples = net
    found = reconstruct(program, samples, plan_for(program))
    halves = (samples[1::2], samples[0::2])
    pruned = Net(10)
    pruned.load_state_dict(module.state_dict())
    chosen: list[float] = []
    for layer in range(2):
        weight = module.outs[layer].weight.detach().double()

        def rows(layer: int, data: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            x = reads(pruned, f"outs.{layer}", data)
            there = reads(module, f"ins.{layer}", data)
            here = reads(pruned, f"ins.{layer}", data)
            w = module.outs[layer].weight.detach().double()
            stream = there + reads(module, f"outs.{layer}", data) @ w.T
            counts = 1 / stream.square().mean(1, keepdim=True).sqrt()
            return x, stream - here - x @ w.T, counts

        base_damping = tuned([rows(layer, half)[0] for half in halves], weight)
        chosen.append(base_damping)

        def slope(
            x: torch.Tensor, gap: torch.Tensor, counts: torch.Tensor, damping: float
        ) -> torch.Tensor:
            heavy = x[:, KEPT] * counts
            hessian = heavy.T @ x[:, KEPT]
            hessian += damping * hessian.diagonal().diag()
            return torch.linalg.solve(hessian, heavy.T @ gap).T

        dampings = (None, *GapClosing().dampings)
        errors = torch.zeros(len(dampings), 6, dtype=torch.float64)
        for seen, unseen in (halves, halves[::-1]):
            x, gap, counts = rows(layer, seen)
            other, wanted, weighing = rows(layer, unseen)
            for i, damping in enumerate(dampings):
                new = base(x, weight, base_damping) + (
                    slope(x, gap, counts, damping) if damping else 0
                )
                output = other @ weight.T + wanted
                wrong = (other[:, KEPT] @ new.T - output).square() * weighing
                errors[i] += wrong.sum(0) / weighing.sum() * len(other)
        best = errors.argmin(0)
        x, gap, counts = rows(layer, samples)
        expected = base(x, weight, base_damping)
        for i, damping in enumerate(dampings):
            if damping:
                closer = base(x, weight, base_damping) + slope(x, gap, counts, damping)
                expected = torch.where((best == i)[:, None], closer, expected)
        new = found.program.weights[f"outs.{layer}.weight"]
        torch.testing.assert_close(new[:, KEPT].double(), expected, rtol=1e-3, atol=1e-4)
        pruned.outs[layer].weight.data = new
        entry = found.layers[layer]
        if layer == 0:  # nothing is lacking before: no gap was looked at
            counts = torch.ones_like(counts)
        energy = ((x @ weight.T + gap).square() * counts).sum()
        lost = ((x @ new.double().T - x @ weight.T - gap).square() * counts).sum()
        assert entry.removed == 4
        assert entry.error == pytest.approx(float(lost / energy), rel=1e-3)
        assert entry.error < entry.before
    assert min(chosen) == 1e-4 < max(chosen)


def test_a_gap_that_few_tokens_show_stays_open(net: Any) -> None:
    """Any four gaps are a combination of six inputs: there is nothing to be learnt."""
    module, _, samples = net
    few = [x[:, :2] for x in samples[:2]]
    program = gp.trace(module, (few[0],))
    found = reconstruct(program, few, plan_for(program))
    assert [e.notes[-1] for e in found.layers] == ["gap not closed: 4 tokens for 6 inputs"] * 2
    alone = reconstruct(program, few, plan_for(program), reference=False)
    for layer in range(2):
        name = f"outs.{layer}.weight"
        assert torch.equal(found.program.weights[name], alone.program.weights[name])


def _distance(one: Any, other: Any, x: torch.Tensor) -> float:
    return float((one(x) - other(x)).square().sum())


def test_later_writers_of_the_stream_make_up_for_an_earlier_layer(net: Any) -> None:
    module, program, samples = net
    first, second = ffn(program)
    far: list[float] = []
    for reference in (True, False):
        plan = gp.Plan(program.fingerprint, {first.name: (0, 2, 3, 5, 7, 8)})
        found = reconstruct(program, samples, plan, reference=reference)
        names = ["outs.0.weight", *(["outs.1.weight"] if reference else [])]
        assert [e.parameter for e in found.layers] == names
        slim = gp.apply(found.program, plan)
        gp.verify(found.program, plan, slim).raise_if_failed()
        with torch.no_grad():
            distances = [_distance(slim.module, module, x) for x in samples]
        far.append(sum(distances))
    assert far[0] < far[1]
    # Nothing is wrong yet where the first layer writes.
    plan = gp.Plan(program.fingerprint, {second.name: (0, 2, 3, 5, 7, 8)})
    found = reconstruct(program, samples, plan)
    assert [e.parameter for e in found.layers] == ["outs.1.weight"]


def test_slim_equals_masked_and_is_nearer_to_the_dense_model(net: Any) -> None:
    module, program, samples = net
    plan = plan_for(program)
    found = reconstruct(program, samples, plan)
    slim = gp.apply(found.program, plan)
    gp.verify(found.program, plan, slim, [((x,), {}) for x in samples]).raise_if_failed()
    plain = gp.apply(program, plan)
    with torch.no_grad():
        far = [
            float(sum((m.module(x) - module(x)).square().sum() for x in samples))
            for m in (slim, plain)
        ]
    assert far[0] < far[1] / 2


def test_obs_chooses_what_enumeration_chooses(net: Any) -> None:
    module, program, samples = net
    (first, second) = ffn(program)
    found = obs(program, samples, {first.name: 8})
    x = reads(module, "outs.0", samples)
    weight = module.outs[0].weight.detach().double()
    wanted = x @ weight.T

    def loss(kept: tuple[int, ...]) -> float:
        fit = torch.linalg.lstsq(x[:, kept], wanted).solution
        return float((x[:, kept] @ fit - wanted).square().sum())

    best = min(itertools.combinations(range(10), 8), key=loss)
    assert found.plan.kept_units == {first.name: best}
    new = found.program.weights["outs.0.weight"]
    assert not new[:, sorted(set(range(10)) - set(best))].any()
    fitted = float((x @ new.double().T - wanted).square().sum())
    assert fitted == pytest.approx(loss(best), rel=1e-2)
    assert torch.equal(found.program.weights["outs.1.weight"], program.weights["outs.1.weight"])
    del second


def test_a_run_that_was_interrupted_goes_on_to_the_same_bits(net: Any, tmp_path: Path) -> None:
    _, program, samples = net
    keep = {s.name: 6 for s in ffn(program)}
    whole = obs(program, samples, keep)

    class Stop(Exception):
        pass

    def stop(step: Any) -> None:
        raise Stop

    with pytest.raises(Stop):
        obs(program, samples, keep, progress=stop, state=State(tmp_path / "s"))
    again = obs(program, samples, keep, state=State(tmp_path / "s", resume=True))
    assert again.plan.kept_units == whole.plan.kept_units
    assert [e.parameter for e in again.layers] == [e.parameter for e in whole.layers]
    assert again.layers == whole.layers
    for name in ("outs.0.weight", "outs.1.weight"):
        assert torch.equal(again.program.weights[name], whole.program.weights[name])


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, head_dim=8, vocab_size=64, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def decoder() -> tuple[Any, Any, torch.Tensor]:
    model = llama()
    tokens = torch.randint(0, 64, (6, 24), generator=torch.Generator().manual_seed(0))
    return model, gp.trace(model, (), {"input_ids": tokens[:1], "use_cache": False}), tokens


def test_whole_heads_go_with_their_group(decoder: Any) -> None:
    model, program, tokens = decoder
    heads = [s for s in program.structures if s.role == "kv_heads"]
    found = obs(program, tokens, {s.name: 3 for s in heads})
    for structure in heads:
        (kept,) = (found.plan.kept_units[structure.name],)
        assert len(kept) == 3
    layer = 0
    x = torch.cat([_context(model, layer, t[None]) for t in tokens])
    weight = model.model.layers[layer].self_attn.o_proj.weight.detach().double()
    wanted = x @ weight.T

    def loss(kept: tuple[int, ...]) -> float:
        columns = [c for k in kept for c in range(16 * k, 16 * k + 16)]
        fit = torch.linalg.lstsq(x[:, columns], wanted).solution
        return float((x[:, columns] @ fit - wanted).square().sum())

    best = min(itertools.combinations(range(4), 3), key=loss)
    assert found.plan.kept_units[heads[layer].name] == best
    slim = gp.apply(found.program, found.plan)
    gp.verify(found.program, found.plan, slim).raise_if_failed()


def _context(model: Any, layer: int, tokens: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    hook = model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach().double().flatten(0, -2))
    )
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    hook.remove()
    return torch.cat(seen)


def test_query_heads_are_chosen_within_each_group(decoder: Any) -> None:
    _, program, tokens = decoder
    queries = [s for s in program.structures if s.role == "query_heads"]
    found = obs(program, tokens, {s.name: 1 for s in queries})
    for structure in queries:
        rows = found.plan.kept_units[structure.name]
        assert np.shape(rows) == (4, 1)
    slim = gp.apply(found.program, found.plan)
    gp.verify(found.program, found.plan, slim).raise_if_failed()


@pytest.mark.parametrize("role", ["hidden", "layers", "both", "ffn"])
def test_reconstruct_helps_whatever_was_cut(decoder: Any, role: str) -> None:
    model, program, tokens = decoder
    goal: dict[str, Any] = (
        {"shape": {"layers": 1}} if role in ("layers", "both") else {"remove": {role: 0.25}}
    )
    plan = select(program, **goal, score="magnitude")
    if role == "layers":  # the first goes: nothing could make up for the last
        plan = gp.Plan(program.fingerprint, dict.fromkeys(plan.kept_units, (1,)))
    if role == "both":
        both = select(program, remove={"ffn": 0.25}, score="magnitude")
        plan = gp.Plan(program.fingerprint, {**plan.kept_units, **both.kept_units})
    found = reconstruct(program, tokens, plan)
    slim, plain = (gp.apply(p, plan) for p in (found.program, program))
    gp.verify(found.program, plan, slim).raise_if_failed()
    with torch.no_grad():
        wanted = model(input_ids=tokens, use_cache=False).logits
        far = [
            float((m.module(input_ids=tokens, use_cache=False).logits - wanted).square().sum())
            for m in (slim, plain)
        ]
    assert far[0] < far[1]


def test_what_meets_no_weight_is_refused(decoder: Any) -> None:
    _, program, tokens = decoder
    (first, *_) = (s for s in program.structures if s.role == "qk_dim" and s.prunable)
    with pytest.raises(PlanError, match="no weight multiplies"):
        obs(program, tokens, {first.name: first.size // 2})


class Biased(torch.nn.Module):
    """A residual block whose second layer has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(6, 10), torch.nn.Linear(10, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


@pytest.fixture(scope="module")
def biased() -> tuple[Biased, Any, torch.Tensor]:
    torch.manual_seed(1)
    module = Biased().eval()
    x = torch.randn(4, 50, 6)
    return module, gp.trace(module, (x[:1],)), x


def test_a_bias_is_fitted_with_the_weight(biased: Any) -> None:
    module, program, x = biased
    found = reconstruct(program, x, plan_for(program), reference=False)
    kept, rows = [0, 2, 3, 5, 7, 8], reads(module, "down", [x])
    wanted = rows @ module.down.weight.detach().double().T + module.down.bias.detach().double()
    ones = torch.cat([rows[:, kept], torch.ones(len(rows), 1, dtype=rows.dtype)], 1)
    best = torch.linalg.lstsq(ones, wanted).solution
    weight, bias = (found.program.weights[f"down.{n}"].double() for n in ("weight", "bias"))
    torch.testing.assert_close(weight[:, kept], best[:-1].T, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(bias, best[-1], rtol=1e-2, atol=1e-3)


def test_compensation_keeps_the_mean_of_the_output(biased: Any) -> None:
    module, program, x = biased
    plan = plan_for(program)
    found = compensate(program, x, plan)
    gone, rows = [1, 4, 6, 9], reads(module, "down", [x])
    weight = module.down.weight.detach().double()
    wanted = module.down.bias.detach().double() + weight[:, gone] @ rows[:, gone].mean(0)
    torch.testing.assert_close(found.program.weights["down.bias"].double(), wanted)
    assert torch.equal(
        found.program.weights["down.weight"][:, [0, 2]], module.down.weight.detach()[:, [0, 2]]
    )
    slim = gp.apply(found.program, plan)
    gp.verify(found.program, plan, slim).raise_if_failed()
    torch.testing.assert_close(slim.module(x).mean((0, 1)), module(x).mean((0, 1)))


def test_compensation_is_that_of_the_dense_model() -> None:
    """What the second layer reads once the first is pruned doesn't matter."""
    torch.manual_seed(5)
    module = torch.nn.Sequential(Biased(), Biased()).eval()
    x = torch.randn(3, 40, 6)
    program = gp.trace(module, (x,))
    found = compensate(program, x, plan_for(program))
    gone = [1, 4, 6, 9]
    for layer in range(2):
        mean = reads(module, f"{layer}.down", [x])[:, gone].mean(0)
        weight = module.get_parameter(f"{layer}.down.weight").detach()
        bias = module.get_parameter(f"{layer}.down.bias").detach()
        wanted = bias.double() + weight.double()[:, gone] @ mean
        torch.testing.assert_close(found.program.weights[f"{layer}.down.bias"].double(), wanted)
        assert torch.equal(found.program.weights[f"{layer}.down.weight"], weight)
    assert [entry.bias for entry in found.layers] == ["0.down.bias", "1.down.bias"]


def test_compensation_is_resumed(tmp_path: Any) -> None:
    torch.manual_seed(6)
    program = gp.trace(torch.nn.Sequential(Biased(), Biased()).eval(), (torch.randn(3, 40, 6),))
    x, plan = torch.randn(3, 40, 6), plan_for(program)
    whole = compensate(program, x, plan)

    def stop(step: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compensate(program, x, plan, progress=stop, state=State(tmp_path, every=1))
    seen: list[Any] = []
    state = State(tmp_path, every=1, resume=True)
    again = compensate(program, x, plan, progress=seen.append, state=state)
    assert len(seen) == 1  # the second layer; of the first there is a record
    for layer in range(2):
        name = f"{layer}.down.bias"
        assert torch.equal(again.program.weights[name], whole.program.weights[name])
    assert again.layers == whole.layers


def test_compensation_needs_biases(net: Any) -> None:
    _, program, samples = net
    with pytest.raises(PlanError, match="no bias"):
        compensate(program, samples, plan_for(program))


def test_the_score_orders_units_as_they_go_one_by_one(net: Any) -> None:
    module, program, samples = net
    x = reads(module, "outs.0", samples)
    weight = module.outs[0].weight.detach().double()
    wanted = x @ weight.T
    energy = float(wanted.square().sum())

    def loss(kept: list[int]) -> float:
        fit = torch.linalg.lstsq(x[:, kept], wanted).solution
        return float((x[:, kept] @ fit - wanted).square().sum()) / energy

    (first, _) = ffn(program)
    inputs = Inputs(calibration=samples)
    (scores,) = Obs(damping=1e-9).score(program, [first], inputs)[first.name]
    left, before, highest = list(range(10)), 0.0, 0.0
    for unit in np.argsort(scores)[:-1].tolist():
        rises = {u: loss([v for v in left if v != u]) - before for u in left}
        assert unit == min(rises, key=lambda u: rises[u])
        highest = max(highest, rises[unit])
        assert scores[unit] == pytest.approx(highest, rel=1e-3)
        before += rises[unit]
        left.remove(unit)
