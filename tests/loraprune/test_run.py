"""A model is pruned while it trains: what goes, what is left, and what is refused."""

import functools
import itertools

import numpy as np
import pytest
import torch

import graphprune as gp
from graphprune.errors import LoadError, PlanError, TrainingError
from graphprune.passes.loraprune import Pruning, loraprune
from graphprune.training import Saving, recover
from loraprune.nets import (
    FFN,
    LAYERS,
    OWNERS,
    Watched,
    data,
    halves,
    options,
    program,
    pruner,
    spans,
    structure_of,
)


def gone_units(net, plan, layer, role):
    name = structure_of(net, layer, role)
    size = {"kv_heads": OWNERS, "ffn": FFN}[role]
    return sorted(set(range(size)) - set(plan.kept_units.get(name, range(size))))


def is_zero(weight, dim, units):
    """Whether a weight is zero, to the bit, at the positions of some units; and nowhere else."""
    gone = torch.zeros(weight.shape, dtype=torch.bool)
    for positions in units:
        gone.index_fill_(dim, torch.tensor(list(positions), dtype=torch.int64), True)
    bits = weight.detach().view(torch.int32)
    return not bits[gone].any() and bool((weight[~gone] != 0).all())


def test_units_that_have_gone_are_zeros_from_then_on_and_the_last_counts_are_exact():
    net, training, seen = program(), options(), []

    def changed(trainable, step, changes):
        plan, before = events.plan, seen[-1] if seen else {}
        now = {}
        for layer, role in itertools.product(range(LAYERS), ("kv_heads", "ffn")):
            gone = gone_units(net, plan, layer, role)
            now[layer, role] = gone
            assert set(before.get((layer, role), ())) <= set(gone)
            for name, dim, units in spans(layer)[role]:
                weight = trainable.student.weight(name)
                assert is_zero(weight, dim, [units[unit] for unit in gone])
                bias = name.removesuffix("weight") + "bias"
                if dim == 0:
                    part = trainable.student.module.get_parameter(bias)
                    assert is_zero(part, 0, [units[unit] for unit in gone])
        assert changes == (now != before and any(now.values()))
        seen.append(now)

    events = pruner(net, halves(), training)
    recover(net, data(), training, callbacks=[Watched(events, changed=changed)])
    wanted = {(i, role): n for i in range(LAYERS) for role, n in (("kv_heads", 1), ("ffn", 6))}
    assert {key: len(gone) for key, gone in seen[-1].items()} == wanted
    assert seen[17] == seen[18] == seen[19]
    assert {len(now[0, "ffn"]) for now in seen} == {0, 2, 3, 5, 6}


@pytest.mark.parametrize("gradient", ["adapters", "weight"])
def test_the_model_with_zeros_computes_what_the_slim_one_does(gradient):
    net = program()
    found = loraprune(net, data(), halves(gradient=gradient), options())
    slim = gp.apply(found.program, found.plan)
    ids = data()
    with torch.no_grad():
        whole, cut = found.program.module(ids), slim.module(ids)
    torch.testing.assert_close(whole, cut, rtol=0, atol=1e-5)
    layer = slim.module.lm.model.layers[0]
    assert layer.self_attn.q_proj.weight.shape == (16, 16)
    assert layer.self_attn.k_proj.bias.shape == (4,)
    assert layer.mlp.down_proj.weight.shape == (16, 6)
    assert found.trained.losses[-1] < found.trained.losses[0] + 0.5
    assert gp.verify(found.program, found.plan, slim).passed
    assert {e.step for e in found.events} == {4, 6, 8, 10, 12, 14, 16, 18}


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("align", [1, 4])
def test_budgets_over_all_layers_are_kept_exactly(uniform, align):
    net, seen = program(intermediate_size=24), []
    goal = {"target": {"params": 0.75}}
    events = pruner(net, Pruning(goal, uniform=uniform, align={"ffn": align}), options())
    watched = Watched(
        events, changed=lambda *_: seen.append({n: g.copy() for n, g in events.gone.items()})
    )
    recover(net, data(), options(), callbacks=[watched])
    for before, after in itertools.pairwise(seen):
        assert all((after[name] >= before[name]).all() for name in before)
    slim = gp.apply(net, events.plan)
    size = sum(p.numel() for p in slim.module.parameters())
    dense = sum(p.numel() for p in net.module.parameters())
    assert 0.75 * dense - 4 * 70 <= size <= 0.75 * dense
    for layer in slim.module.lm.model.layers:
        assert layer.mlp.up_proj.out_features % align == 0


def test_layers_that_are_excluded_leave_the_budget_to_the_others():
    """LoRAPrune's code leaves four layers of 32 alone, so that half of the others is 43.75 %."""
    net = program(num_hidden_layers=4)
    pruning = Pruning(
        {"target": {"params": 0.8}}, exclude=["lm.model.layers.0.*", "lm.model.layers.3.*"]
    )
    found = loraprune(net, data(), pruning, options())
    slim = gp.apply(found.program, found.plan)
    dense, size = (sum(p.numel() for p in m.parameters()) for m in (net.module, slim.module))
    assert 0.77 * dense < size <= 0.8 * dense
    for i, layer in enumerate(slim.module.lm.model.layers):
        assert (layer.mlp.up_proj.out_features == FFN) == (i in (0, 3))


class Stopped(Exception):
    pass


@functools.cache
def undisturbed(gradient):
    return loraprune(program(), data(), halves(gradient=gradient, uniform=False), REST)


REST = options(also=("biases", "norms"), steps=12)


@pytest.mark.parametrize(
    ("at", "gradient"), [(1, "adapters"), (5, "weight"), (11, "adapters"), (12, "weight")]
)
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, at, gradient):
    """Before anything has gone, between two events, after the last one, and at the end."""
    net, pruning = program(), halves(gradient=gradient, uniform=False)

    def stop(progress):
        if progress.step == at:
            raise Stopped

    with pytest.raises(Stopped):
        loraprune(net, data(), pruning, REST, state=Saving(tmp_path, every=1), progress=stop)
    found = loraprune(net, data(), pruning, REST, state=Saving(tmp_path, resume=True))
    whole = undisturbed(gradient)
    assert found.plan == whole.plan
    assert found.events == whole.events
    assert found.trained.losses == whole.trained.losses
    for name in net.trainable:
        ours, right = (p.weights[name].detach().view(torch.int32)
                       for p in (found.program, whole.program))  # fmt: skip
        assert torch.equal(ours, right), name


def test_another_base_or_goal_goes_on_from_no_state(tmp_path):
    """LoRAPrune's checkpoints hold adapters and masks, whatever the model they are put on."""
    loraprune(program(), data(), halves(), options(), state=tmp_path)
    again = Saving(tmp_path, resume=True)
    other = program(rms_norm_eps=1e-3)
    with pytest.raises(LoadError, match="another run") as error:
        loraprune(other, data(), halves(), options(), state=again)
    assert error.value.why == "the model has other weights, or computes something else"
    with pytest.raises(LoadError, match="another run") as error:
        loraprune(program(), data(), halves(average=0.5), options(), state=again)
    assert error.value.why == "what is pruned or learned beside the weights, or when, is another"


def test_a_damaged_state_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    loraprune(program(), data(), halves(), options(), state=tmp_path)
    (file,) = (tmp_path / "step-000020").glob("*.safetensors")
    save_file({n: t for n, t in load_file(file).items() if n != "more/0/counts"}, file)
    with pytest.raises(LoadError, match="damaged"):
        loraprune(program(), data(), halves(), options(), state=Saving(tmp_path, resume=True))


def test_single_weights_that_were_pruned_before_stay_zero():
    net = program()
    name = "lm.model.layers.0.mlp.up_proj.weight"
    mask = torch.rand(FFN, 16, generator=torch.Generator().manual_seed(3)) > 0.5
    found = loraprune(net, data(), halves(), options(), masks={name: mask})
    weight = found.program.weights[name]
    kept = list(found.plan.kept_units[structure_of(net, 0, "ffn")])
    assert not weight[~mask].view(torch.int32).any()
    assert (weight[kept][mask[kept]] != 0).all()


def test_roles_that_zeros_do_not_remove_are_refused_before_the_first_step():
    told = []
    with pytest.raises(PlanError, match="can't remove units of role 'hidden'") as error:
        loraprune(program(), data(), Pruning({"remove": {"hidden": 0.25, "ffn": 0.5}}), options(),
                  progress=told.append)  # fmt: skip
    assert "a norm counts them" in error.value.why
    assert told == []
    with pytest.raises(PlanError, match="not layers"):
        loraprune(program(), data(), Pruning({"remove": {"layers": 0.5}}), options())


def test_what_no_adapter_sees_is_refused():
    training = options(include=("*mlp*",))
    with pytest.raises(PlanError, match="judged by the score") as error:
        loraprune(program(), data(), halves(), training)
    assert "no weight of it has one" in error.value.why


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (options(loss="kd"), "tells nothing of which units matter"),
        (options(steps=0), "no step to remove anything at"),
        (options(fsdp=True), "needs whole weights"),
    ],
)
def test_trainings_that_could_not_tell_are_refused(training, message):
    net = program()
    with pytest.raises(TrainingError, match=message):
        loraprune(net, data(), halves(), training, teacher=net)


def test_a_teacher_beside_labels():
    net = program()
    found = loraprune(net, data(), halves(), options(loss="kd+ce", steps=10), teacher=net)
    assert len(found.plan.kept_units) == 2 * LAYERS


def test_vision_models_lose_channels():
    torch.manual_seed(0)
    from torch import nn

    module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    ).eval()  # fmt: skip
    module[1].running_mean.normal_()
    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    net = gp.trace(module, (images[:2],))
    given = {"images": images, "labels": torch.arange(16) % 5}
    (name,) = net.inputs
    given = {name: images, "labels": torch.arange(16) % 5}
    found = loraprune(net, given, Pruning({"remove": {"channels": 0.5}}), options(steps=10))
    slim = gp.apply(found.program, found.plan)
    assert (slim.module[0].out_channels, slim.module[3].out_channels) == (4, 3)
    with torch.no_grad():
        torch.testing.assert_close(
            found.program.module(images), slim.module(images), rtol=0, atol=1e-5
        )
    assert np.isfinite(found.trained.losses).all()
