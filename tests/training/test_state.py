"""Interrupted training goes on to the same bits, and what goes wrong is told with its step."""

import json
import math
import os
import signal

import pytest
import torch

from graphprune.errors import LoadError, TrainingError
from graphprune.training import Saving, Training, hold, recover, recover_module
from graphprune.training.core.order import Order
from graphprune.training.core.watch import WINDOW, Watch
from training import workers
from training.gloo import alone
from training.nets import data, masks, program
from training.workers import die

NET = program()
OPTIONS = {"loss": "kd+ce", "steps": 6, "batch": 4, "lr": 1e-2, "micro_batch": 2}


def train(options=None, **given):
    return workers.train(options or OPTIONS, **given)


def same(a, b):
    assert a.losses == b.losses
    assert a.tokens == b.tokens
    assert a.weights.keys() == b.weights.keys()
    for name in a.weights:
        x, y = a.weights[name].detach(), b.weights[name].detach()
        assert torch.equal(x.view(torch.int32), y.view(torch.int32))


# Each takes a process of its own: half of them have every kind, step and place with every other.
KILLS = [
    pytest.param(kind, at, where, marks=() if (i + j + k) % 2 else pytest.mark.slow)
    for i, kind in enumerate(("full", "lora"))
    for j, at in enumerate((1, 4))
    for k, where in enumerate(("computing", "stepped", "saving"))
]


@pytest.mark.parametrize(("kind", "at", "where"), KILLS)
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, kind, at, where):
    options = {**OPTIONS, "train": kind}
    folder = tmp_path / "state"
    assert alone(die, folder, options, signal.SIGKILL, at, where) == -signal.SIGKILL
    assert not list(tmp_path.rglob("*.pkl")) + list(tmp_path.rglob("*.bin"))
    found = train(options, state=Saving(folder, resume=True))
    same(found, train(options))
    assert len(list(folder.glob("step-*"))) <= 2
    same(train(options, state=Saving(folder, resume=True)), found)  # and a finished one


def test_a_signal_to_end_waits_for_the_step_and_saves_it(tmp_path):
    folder = tmp_path / "state"
    saving = Saving(folder, every=1000)

    def progress(now):
        if now.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    came = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        with pytest.raises(TrainingError, match="stopped by a signal") as error:
            train(state=saving, progress=progress)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert came == [signal.SIGTERM]
    assert error.value.where == "step 3 of 6"
    assert json.loads((folder / "manifest.json").read_text())["run"]["step"] == 3
    same(train(state=Saving(folder, resume=True)), train())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"options": {**OPTIONS, "lr": 2e-2}}, "the options are others"),
        ({"masks": {}}, "the masks are others"),
        ({"data": data().flip(0)}, "the data are others"),
        ({"teacher": None, "options": {**OPTIONS, "loss": "ce"}}, "the teacher is another"),
        ({"base": "other"}, "the model has other weights"),
    ],
)
def test_the_state_of_another_run_is_refused(tmp_path, change, why):
    train({**OPTIONS, "steps": 1}, state=tmp_path / "state")
    net = NET
    if "base" in change:
        net = program.__wrapped__()
        net.module.norm.weight.data[0] += 1e-3
    options = Training(**{**change.get("options", OPTIONS), "steps": 1})
    given = {"masks": change.get("masks", masks()), "teacher": change.get("teacher", NET)}
    with pytest.raises(LoadError, match="belongs to another run") as error:
        recover(net, change.get("data", data()), options, **given,
                state=Saving(tmp_path / "state", resume=True))  # fmt: skip
    assert error.value.why.startswith(why)


def test_a_directory_in_use_is_refused(tmp_path):
    train({**OPTIONS, "steps": 1}, state=tmp_path / "state")
    with pytest.raises(LoadError, match="holds a run already"):
        train({**OPTIONS, "steps": 1}, state=tmp_path / "state")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").touch()
    with pytest.raises(LoadError, match="holds something else"):
        train(state=tmp_path / "other")


@pytest.mark.parametrize("damage", ["manifest", "tensors", "missing"])
def test_damaged_states_are_told(tmp_path, damage):
    folder = tmp_path / "state"
    train({**OPTIONS, "steps": 2}, state=folder)
    file = next(folder.glob("step-000002/*.safetensors"))
    if damage == "manifest":
        (folder / "manifest.json").write_text("{}")
    elif damage == "tensors":
        file.write_bytes(file.read_bytes()[:100])
    else:
        file.unlink()
    with pytest.raises(LoadError, match="is damaged"):
        train({**OPTIONS, "steps": 2}, state=Saving(folder, resume=True))


def test_a_loss_that_is_no_number_stops_with_its_step(tmp_path):
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    x[Order(40, 72, 8, 0).samples(4)[3]] = math.nan
    module = torch.nn.Linear(3, 1)
    before = module.weight.detach().clone()
    options, saving = Training(batch=8, steps=9), Saving(tmp_path / "state", every=1)
    with pytest.raises(TrainingError, match="the loss is no longer a number") as error:
        recover_module(module, x, options, loss=lambda m, x: m(x).square().mean(), state=saving)
    assert error.value.where == "step 5"
    assert f"the last good state is in {tmp_path}" in error.value.hint
    assert json.loads((tmp_path / "state" / "manifest.json").read_text())["run"]["step"] == 4
    assert torch.equal(module.weight, before)


def test_a_loss_that_grows_stops():
    """The mean of the last twenty passes 3 with the fourteenth of 4: (6 + 14 * 4) / 20 = 3.1."""
    watch = Watch("somewhere")
    for step in range(WINDOW + 13):
        watch.add(step, 1.0 if step < WINDOW else 4.0)
    with pytest.raises(TrainingError, match="training diverges") as error:
        watch.add(WINDOW + 13, 4.0)
    assert error.value.where == f"step {WINDOW + 14}"
    assert "the last good state is in somewhere" in error.value.hint


def test_a_run_that_diverges_stops():
    module = torch.nn.Linear(3, 1)
    options = Training(lr=10.0, steps=60, warmup=0.5, clip=0.0)

    def loss(model, x):
        return -model(x).square().mean() + 500.0  # it falls for ever, and the sign is turned below

    def rising(model, x):
        value = loss(model, x)
        return value + 2 * (500.0 - value).detach()

    with pytest.raises(TrainingError, match="training diverges"):
        recover_module(module, torch.ones(8, 3), options, loss=rising)


def test_a_new_phase_starts_without_gradients():
    """What is left over from a group that was never stepped would change what is pruned since."""
    module = torch.nn.Linear(3, 2)
    module(torch.randn(4, 3)).sum().backward()
    hold(module, {"weight": torch.rand(2, 3) > 0.5})
    left = module.weight.grad.clone()
    before = module.weight.detach().clone()
    recover_module(module, torch.randn(8, 3), Training(steps=1, lr=0.0),
                   loss=lambda model, x: model(x).square().mean())  # fmt: skip
    assert torch.equal(module.weight, before)
    assert torch.equal(module.weight.grad, left)
