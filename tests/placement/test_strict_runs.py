"""Streamed runs on a device that refuses to meet the processor: what is found, kept and refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import graphprune as gp
from graphprune.checkpoints import memory
from graphprune.errors import CalibrationError
from graphprune.passes.masks import SparseGPT
from graphprune.passes.masks.oneshot import sparsify
from graphprune.passes.selection.select import select
from graphprune.placement import Placement, waiting
from graphprune.solvers import Unstructured
from graphprune.streaming import Held, State, batches, find_sites, stream
from graphprune.streaming.torch.runner import Runner
from placement.strict_device import DEVICE, Elsewhere, MixedDevices, strictly
from streaming.oracle import Halving, tokens, traced
from zoo import convolutional, decoders, encoders
from zoo.case import randomise

HALF = Unstructured(0.5)


@pytest.fixture(scope="module")
def llama():
    return traced(decoders.llama_gqa_4)[0]


def run(program, data, batch=1, **options):
    sites = find_sites(program)
    steps = []
    new = stream(
        program, sites, batches(program, data, batch), Halving(), progress=steps.append, **options
    )
    return new, steps


def assert_equal(wanted, found):
    assert set(found) == set(wanted)
    for name, weight in found.items():
        assert not isinstance(weight, Elsewhere)
        assert torch.equal(weight, wanted[name])


# The test of the tests: what is forgotten is found.


def test_a_weight_that_stays_behind_is_found(llama, monkeypatch):
    monkeypatch.setattr(Placement, "bring", lambda self, value: value)
    with strictly(), pytest.raises(MixedDevices, match="beside strict"):
        sparsify(llama, tokens(), SparseGPT(), HALF)


def test_a_table_that_a_graph_makes_on_the_processor_is_found(llama, monkeypatch):
    retyped = Runner._retyped
    monkeypatch.setattr(
        Runner,
        "_retyped",
        lambda self, x: x if isinstance(x, torch.device) else retyped(self, x),
    )
    with strictly(), pytest.raises(MixedDevices):
        sparsify(llama, tokens(), SparseGPT(), HALF)


class Forgetful(Halving):
    """A treatment that makes a tensor of its own, and doesn't say where."""

    def treat(self, group, observers, weights):
        for name in group.parameters:
            yield name, weights[name] * torch.ones(weights[name].shape)


def test_a_treatment_that_forgets_is_found(llama):
    with strictly(), pytest.raises(MixedDevices, match=r"aten\.mul"):
        stream(llama, find_sites(llama), batches(llama, tokens()), Forgetful())


# Other graphs: tables that depend on sizes, patches of images, tables of positions.


def images():
    """A small network of convolutions, and what it is calibrated on."""
    torch.manual_seed(0)
    data = torch.randn(2, 3, 32, 32)
    return gp.trace(randomise(convolutional.resnet_basic()).eval(), (data,)), data


@pytest.mark.parametrize(
    "build", [lambda: (traced(encoders.bert)[0], tokens()), images], ids=["bert", "cnn"]
)
def test_other_graphs(build):
    program, data = build()
    wanted = sparsify(program, data, SparseGPT(), HALF)
    with strictly():
        found = sparsify(program, data, SparseGPT(), HALF)
    for layer in wanted.layers:
        new, old = (one.program.weights[layer.parameter] for one in (found, wanted))
        torch.testing.assert_close(new, old, rtol=1e-6, atol=1e-6)


# Where activations wait.


def test_activations_wait_on_the_device_while_there_is_room(llama, monkeypatch):
    made = []
    monkeypatch.setattr(waiting, "_in_memory", lambda x: made.append(x.nbytes) or x.cpu())
    wanted, _ = run(llama, tokens())
    with strictly():
        found, steps = run(llama, tokens())
    assert_equal(wanted, found)
    assert not made
    with strictly(memory=1):
        found, less = run(llama, tokens())
    assert_equal(wanted, found)
    assert [one.held_bytes for one in less] == [one.held_bytes for one in steps]
    # The residual stream and one more value of each of three samples, at most seven barriers.
    assert made.count(tokens()[:1].numel() * 32 * 4) >= 3 * 7


def test_and_in_files_where_memory_is_short(llama, monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(waiting, "available_memory", lambda: 0)
    monkeypatch.setattr(memory, "SMALL", 1)
    reserve = memory.reserve
    monkeypatch.setattr(memory, "reserve", lambda f, n: made.append(n) or reserve(f, n))
    wanted, _ = run(llama, tokens())
    assert not made
    with strictly(memory=1):
        assert_equal(wanted, run(llama, tokens(), state=State(tmp_path / "state"))[0])
    assert made


@pytest.mark.parametrize("folder", [False, True])
def test_held_as_asked(llama, tmp_path, folder, monkeypatch):
    monkeypatch.setattr(memory, "SMALL", 1)
    held = Held(torch.bfloat16, tmp_path if folder else None)
    wanted, _ = run(llama, tokens(), held=held)
    with strictly(memory=1):
        assert_equal(wanted, run(llama, tokens(), held=held)[0])


def test_a_run_goes_on_elsewhere(llama, tmp_path):
    class Stopped(Exception):
        pass

    def stop(step):
        if step.group.index == 3:
            raise Stopped

    wanted, _ = run(llama, tokens())
    sites, data = find_sites(llama), batches(llama, tokens())
    state = State(tmp_path / "state", every=1)
    with strictly(), pytest.raises(Stopped):
        stream(llama, sites, data, Halving(), progress=stop, state=state)
    saved = Path(tmp_path / "state")
    assert len(list(saved.glob("activations-*"))) == 1
    for place in ("strict", "cpu"):
        again = State(saved, resume=True, every=0)
        if place == "strict":
            with strictly(), pytest.raises(Stopped):
                stream(llama, sites, data, Halving(), progress=lambda s: stop_at(s, 5, Stopped),
                       state=again)  # fmt: skip
        else:
            assert_equal(wanted, stream(llama, sites, data, Halving(), state=again))


def stop_at(step, index, kind):
    if step.group.index == index:
        raise kind


# Too little memory.

LONG = 64
ROOM = LONG * 64 * 4 * 5
"""Bytes: enough for the widest value of four long windows in float32, and of two in float64."""


def test_smaller_batches_where_there_is_no_room(llama):
    data = tokens(4, LONG)
    wanted, _ = run(llama, data, batch=2)
    with strictly(largest=ROOM):
        found, steps = run(llama, data, batch=4)
    assert_equal(wanted, found)
    done = [one.group.index for one in steps if not one.restored]
    assert done == list(range(steps[0].total))  # each is treated once


def test_smaller_batches_in_the_middle_of_a_run(llama, monkeypatch):
    data = tokens(4, LONG)
    wanted, _ = run(llama, data, batch=2)
    full = []
    execute = Runner.execute

    def once(self, node, values, sizes=None):
        if node is self.schedule.nodes[self.schedule.barriers[3]] and not full:
            full.append(node)
            raise torch.OutOfMemoryError("there is no room")
        return execute(self, node, values, sizes)

    monkeypatch.setattr(Runner, "execute", once)
    with strictly():
        found, steps = run(llama, data, batch=4)
    assert full
    done = [one.group.index for one in steps if not one.restored]
    assert done == list(range(steps[0].total))  # each is treated once
    # Groups that had been treated keep what four samples at a time gave them.
    for name, weight in found.items():
        torch.testing.assert_close(weight, wanted[name], rtol=1e-6, atol=1e-6)


def test_no_room_at_all_is_refused(llama):
    with strictly(memory=20_000, largest=ROOM // 4), pytest.raises(CalibrationError) as refused:
        run(llama, tokens(4, LONG), batch=4)
    text = str(refused.value)
    assert "there isn't enough memory on strict:0" in text
    assert "of 0.0 MB that may be taken, and 2 samples at a time" in text
    assert "calibration.length" in text


def test_scores_are_tried_with_smaller_batches(llama):
    data = tokens(4, LONG)
    wanted = select(llama, remove={"layers": 0.5}, score="block-influence", calibration=data)
    with strictly(largest=ROOM):
        found = select(llama, remove={"layers": 0.5}, score="block-influence", calibration=data)
    assert found.kept_units == wanted.kept_units
    with strictly(largest=ROOM // 4), pytest.raises(CalibrationError, match="for the score"):
        select(llama, remove={"layers": 0.5}, score="block-influence", calibration=data)


def test_the_device_is_that_of_the_run_alone(llama):
    with strictly():
        pass
    assert Placement() == Placement.of("cpu")
    assert DEVICE.type == "strict"
