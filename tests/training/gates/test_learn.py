"""Gates learned with weights: exact counts, what is folded, resuming, processes, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import graphprune as gp
from graphprune.errors import TrainingError
from graphprune.oracle.masked import run_masked
from graphprune.training import Saving, Training
from graphprune.training.gates.expected import Budget
from graphprune.training.gates.gates import Gated
from graphprune.training.learn import Learning, learn
from training import workers
from training.gates.models import gated_of, structures_of
from training.gloo import together
from training.nets import data, program

NET = program()
OPTIONS = Training(steps=8, batch=4, lr=1e-2, micro_batch=2, precision="float32")


def gated(**counts):
    found = [s for s in NET.structures if s.prunable and s.role in counts]
    return [Gated(s, 1, counts[s.role], np.arange(s.size)) for s in found]


def run(training=OPTIONS, learning=None, chosen=None, **given):
    return learn(NET, data(), chosen or gated(ffn=20, hidden=11), training, learning, **given)


def same(a, b):
    assert a.plan == b.plan
    assert a.recovered.losses == b.recovered.losses
    assert a.expected == b.expected
    assert all(torch.equal(a.gates[n], b.gates[n]) for n in a.gates)
    for name in a.program.weights:
        x, y = (p.weights[name].detach() for p in (a.program, b.program))
        assert torch.equal(x.view(torch.int32), y.view(torch.int32)), name


def test_counts_are_exact_and_the_slim_model_computes_what_the_gates_did():
    found = run()
    kept = {n: len(units) for n, units in found.plan.kept_units.items()}
    assert sorted(kept.values()) == [11, 20, 20]
    assert len(found.recovered.losses) == 8
    slim = gp.apply(found.program, found.plan)
    assert gp.verify(found.program, found.plan, slim).passed
    raw = {n: w for n, w in found.recovered.weights.items()}
    # By hand: what reads a unit is scaled by its gate, behind the final norm for the stream.
    (name,) = [n for n, units in kept.items() if units == 11]
    z = torch.where(found.gates[name] > 0, found.gates[name], 1.0).float()
    torch.testing.assert_close(found.program.weights["norm.weight"], raw["norm.weight"] * z)
    torch.testing.assert_close(found.program.weights["norm.bias"], raw["norm.bias"] * z)
    torch.testing.assert_close(found.program.weights["embed.weight"], raw["embed.weight"])
    assert found.small.keys() <= kept.keys()


def test_any_subset_of_structures_and_snapped_gates():
    found = run(chosen=gated(hidden=9), learning=Learning(snap=True))
    assert [len(u) for u in found.plan.kept_units.values()] == [9]
    for name, weight in found.recovered.weights.items():
        assert torch.equal(found.program.weights[name], weight)


def test_the_penalty_drives_gates_to_the_target():
    options = Training(steps=120, batch=4, lr=0.0, final=1.0, warmup=0.05, precision="float32")
    found = run(options, chosen=gated(ffn=16))
    for name, share in found.expected.items():
        assert share == pytest.approx(1 - 16 / 33, abs=0.08), name


def test_gates_begin_in_the_order_of_scores():
    (one, *others) = gated(ffn=20)
    scored = Gated(one.structure, 1, 20, one.removable, np.arange(33.0)[None])
    still = Learning(gate_lr=0.0, multiplier_lr=0.0, by_score=True)
    found = run(learning=still, chosen=[scored, *others])
    assert found.plan.kept_units[one.structure.name] == tuple(range(13, 33))


def test_units_that_may_not_go_stay_as_they_are():
    (one, *_) = gated(ffn=20)
    fixed = Gated(one.structure, 1, 20, np.arange(3, 33))
    found = run(chosen=[fixed])
    assert found.plan.kept_units[one.structure.name][:3] == (0, 1, 2)
    assert found.gates[one.structure.name][:3].tolist() == [1, 1, 1]


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path):
    class Stopped(Exception):
        pass

    def stop(now):
        if now.step == 5:
            raise Stopped

    with pytest.raises(Stopped):
        run(state=Saving(tmp_path / "state", every=2), progress=stop)
    same(run(state=Saving(tmp_path / "state", resume=True, every=2)), run())


def test_another_target_is_another_run(tmp_path):
    run(state=Saving(tmp_path / "state"))
    with pytest.raises(gp.errors.LoadError, match="another run"):
        run(chosen=gated(ffn=21, hidden=11), state=Saving(tmp_path / "state", resume=True))


def test_two_processes_learn_the_gates_and_weights_that_one_does(tmp_path):
    one = workers.learned()
    together(workers.learn_together, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    right = {**one.gates, **{n: w.detach() for n, w in one.program.weights.items()}}
    assert first.keys() == second.keys() == right.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name])
        torch.testing.assert_close(value, right[name], rtol=0, atol=2e-6, msg=name)


def test_masks_are_held_under_gates():
    mask = torch.rand(33, 16, generator=torch.Generator().manual_seed(4)) > 0.5
    found = run(masks={"blocks.0.0.weight": mask})
    weight = found.program.weights["blocks.0.0.weight"]
    assert not weight[~mask].any()
    assert weight[mask].all()


def test_gates_and_sharded_weights_do_not_go_together():
    with pytest.raises(TrainingError, match="fsdp"):
        run(Training(steps=2, batch=4, fsdp=True))


@pytest.mark.parametrize("train", ["norms", "lora"])
def test_other_weights_may_train(train):
    found = run(Training(train=train, steps=3, batch=4, precision="float32"))
    slim = gp.apply(found.program, found.plan)
    assert gp.verify(found.program, found.plan, slim).passed


@pytest.mark.slow  # traces a model three times
def test_in_half_precision_the_graph_is_traced_again():
    """Gates on the stream need the graph, whose trace names its dtypes."""
    from zoo.decoders import llama_tied

    torch.manual_seed(0)
    model = llama_tied().eval().to(torch.bfloat16)
    model.config.use_cache = False
    small = gp.trace(model, kwargs={"input_ids": torch.randint(0, 96, (2, 7))})
    chosen = gated_of(structures_of(small, "hidden", "layers", "query_heads"))
    ids = torch.randint(0, 96, (4, 8), generator=torch.Generator().manual_seed(1))
    found = learn(small, ids, chosen, Training(steps=2, batch=2, precision="float32"))
    assert found.program.weights["model.norm.weight"].dtype == torch.bfloat16
    args = ((), {"input_ids": ids})
    slim = gp.apply(found.program, found.plan)
    right = run_masked(found.program, found.plan.bind(found.program), args, torch.float32)[0]
    with torch.no_grad():
        logits = slim.module.float()(input_ids=ids).logits
    assert float((logits - right).abs().max()) < 1e-4


def test_a_budget_holds_the_expected_cost_of_the_whole_model():
    """And the cut goes along one order of all units."""
    chosen = gated(ffn=20, hidden=12)
    names = [one.structure.name for one in chosen]
    asked = []

    def solve(where):
        asked.append({name: w.shape for name, w in where.items()})
        return dict(zip(where, (12, 20, 22), strict=True))

    options = Training(steps=100, batch=4, lr=0.0, final=1.0, warmup=0.05, precision="float32")
    found = run(options, chosen=chosen, solve=solve, budget=Budget("params", 0.3))
    # By hand: the embedding is tied, a block has two matrices and their biases, and the norm two.
    left = {name: 1 - share for name, share in found.expected.items()}
    (stream,) = [n for n in names if len(found.gates[n]) == 16]
    d, dense = 16 * left[stream], 40 * 16 + 2 * (2 * 16 * 33 + 33 + 16) + 2 * 16
    f = sum(33 * left[n] for n in names if n != stream)
    assert (40 * d + f * (2 * d + 1) + 4 * d) / dense == pytest.approx(0.7, abs=0.04)
    assert asked == [{n: (1, 16 if n == stream else 33) for n in names}]
    kept = [len(found.plan.kept_units[n]) for n in names]
    assert kept == [12, 20, 22]
