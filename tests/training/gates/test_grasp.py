"""Units chosen by gates on frozen weights: budgets at every step, scales, resuming, processes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import graphprune as gp
from graphprune.errors import TrainingError
from graphprune.training import Callback, Saving, Training, recover
from graphprune.training.gates.gates import Gated
from graphprune.training.gates.projected import ProjectedGates
from graphprune.training.grasp import Grasping, grasp
from training import workers
from training.gloo import together
from training.nets import data, program

NET = program()
OPTIONS = Training(steps=8, batch=4, micro_batch=2, precision="float32")


def gated(scores=None, **counts):
    found = [s for s in NET.structures if s.prunable and s.role in counts]
    return [Gated(s, 1, counts[s.role], np.arange(s.size), scores) for s in found]


def run(training=OPTIONS, options=None, chosen=None, **given):
    return grasp(NET, data(), chosen or gated(ffn=20, hidden=11), training, options, **given)


def weights(found):
    return {n: found.program.weights[n].detach() for n in NET.trainable}


def same(a, b):
    assert a.plan == b.plan
    assert a.recovered.losses == b.recovered.losses
    assert all(torch.equal(a.gates[n], b.gates[n]) for n in a.gates)
    assert all(torch.equal(w, weights(b)[n]) for n, w in weights(a).items())


def test_a_gate_is_its_projection_and_has_the_gradient_of_its_score():
    (one, *_) = gated(ffn=2)
    small = replace(one, structure=one.structure)
    gates = ProjectedGates.of([small], torch.device("cpu"))
    name = one.structure.name
    with torch.no_grad():
        gates.scores[name].copy_(torch.linspace(-1, 1, 33))
    gates.project({name: 2})
    z = gates.value(name)
    assert z.tolist() == [0.0] * 31 + [1.0, 1.0]
    slopes = torch.arange(33.0)
    (z * slopes).sum().backward()
    assert torch.equal(gates.scores[name].grad, slopes)  # of closed ones too
    gates.chosen = True
    with torch.no_grad():
        gates.scales[name].fill_(0.5)
    assert gates.value(name).tolist() == [0.0] * 31 + [0.5, 0.5]


def test_counts_are_exact_and_weights_change_by_scales_alone():
    found = run()
    kept = {n: len(units) for n, units in found.plan.kept_units.items()}
    assert sorted(kept.values()) == [11, 20, 20]
    slim = gp.apply(found.program, found.plan)
    assert gp.verify(found.program, found.plan, slim).passed
    (hidden,) = [n for n, count in kept.items() if count == 11]
    scale = {n: torch.where(z > 0, z, 1.0).float() for n, z in found.gates.items()}
    right = {n: NET.weights[n].detach() for n in NET.trainable}
    right["norm.weight"] = right["norm.weight"] * scale[hidden]
    right["norm.bias"] = right["norm.bias"] * scale[hidden]
    for block in range(2):
        (ffn,) = [n for n in kept if n.startswith(f"blocks.{block}") and n != hidden]
        read = right[f"blocks.{block}.0.weight"] * scale[hidden]
        right[f"blocks.{block}.0.weight"] = read
        right[f"blocks.{block}.2.weight"] = right[f"blocks.{block}.2.weight"] * scale[ffn]
    for name, weight in weights(found).items():
        torch.testing.assert_close(weight, right[name], rtol=1e-6, atol=1e-7)
    assert any((z[z > 0] != 1).any() for z in found.gates.values())


def test_the_budget_is_kept_at_every_step():
    class Counting(Callback):
        def attach(self, run):
            self.run, self.seen = run, []

        def after_step(self, step, optimizer):
            own = self.run.callbacks[-1]
            self.seen.append([int(z.sum()) for z in own.gates.open.values()])
            return False

    counting = Counting()
    run(chosen=gated(ffn=9), callbacks=[counting])
    assert counting.seen == [[9, 9]] * 8


def test_a_unit_that_the_loss_misses_takes_the_place_of_one_that_does_nothing():
    """Unit 0 of each layer does nothing, and begins first; the last one does all, and last."""
    with torch.no_grad():
        own = {n: w.detach().clone() for n, w in NET.weights.items() if n in NET.trainable}
        for block in range(2):
            own[f"blocks.{block}.2.weight"][:, :32] *= 1e-3
            own[f"blocks.{block}.2.weight"][:, 32] *= 8
    from graphprune.streaming.torch.weights import apply_weights

    net = apply_weights(NET, own)
    found = [s for s in net.structures if s.role == "ffn"]
    worst_first = -np.arange(33.0)[None]
    chosen = [Gated(s, 1, 4, np.arange(s.size), worst_first) for s in found]
    training = Training(steps=40, batch=8, loss="kd", precision="float32")
    made = grasp(net, data(), chosen, training, Grasping(score_lr=0.1), teacher=net)
    assert made.exchanged >= 2
    assert all(32 in units for units in made.plan.kept_units.values())
    assert made.recovered.losses[-1] < made.recovered.losses[0] / 2


def test_units_begin_in_the_order_of_scores_and_those_that_may_not_go_stay():
    still = Grasping(score_lr=0.0, scale_lr=0.0)
    found = run(options=still, chosen=gated(scores=np.arange(33.0)[None], ffn=20))
    assert set(found.plan.kept_units.values()) == {tuple(range(13, 33))}
    assert found.exchanged == 0
    assert all(torch.equal(w, NET.weights[n].detach()) for n, w in weights(found).items())
    (one, *_) = gated(ffn=20)
    found = run(chosen=[Gated(one.structure, 1, 20, np.arange(3, 33))])
    assert found.plan.kept_units[one.structure.name][:3] == (0, 1, 2)
    assert found.gates[one.structure.name][:3].tolist() == [1, 1, 1]


def test_how_many_units_of_each_stay_may_depend_on_their_scores():
    first, second = (one.structure.name for one in gated(ffn=20))
    seen = []

    def solve(scores):
        seen.append({name: s.shape for name, s in scores.items()})
        return {first: 30 - len(seen), second: 10 + len(seen)}

    found = run(options=Grasping(every=2), chosen=gated(ffn=20), solve=solve)
    # At the start, after steps 2 and 4, and after the last one that trains scores: 6 of 8.
    assert seen == [{first: (1, 33), second: (1, 33)}] * 4
    assert len(found.plan.kept_units[first]) == 26
    assert len(found.plan.kept_units[second]) == 14


@pytest.mark.parametrize("at", [3, 7])  # while units are chosen, and while scales train
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, at):
    class Stopped(Exception):
        pass

    def stop(now):
        if now.step == at:
            raise Stopped

    def solve(scores):
        order = sorted(scores, key=lambda name: scores[name].sum())
        return dict(zip(order, (18, 22), strict=True))

    options, chosen = Grasping(every=4), gated(ffn=20)
    whole = run(options=options, chosen=chosen, solve=solve)
    with pytest.raises(Stopped):
        run(options=options, chosen=chosen, solve=solve, progress=stop,
            state=Saving(tmp_path / "state", every=1))  # fmt: skip
    state = Saving(tmp_path / "state", resume=True)
    same(run(options=options, chosen=chosen, solve=solve, state=state), whole)


def test_two_processes_choose_what_one_does(tmp_path):
    one = workers.grasped()
    together(workers.grasp_together, tmp_path)
    right = {**one.gates, **{n: w.detach() for n, w in one.program.weights.items()}}
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == right.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, right[name], rtol=0, atol=1e-7, msg=name)


def test_frozen_weights_alone_are_nothing_to_train():
    with pytest.raises(TrainingError, match="nothing to train"):
        recover(NET, data(), Training(train="frozen", steps=1, batch=4))
