"""Interrupted runs go on to the same bits; directories of other runs are told apart."""

from __future__ import annotations

import gc
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.errors import LoadError
from graphprune.streaming import State, apply_weights, batches, find_sites, stream
from graphprune.streaming.core import checkpoint as states
from streaming.oracle import Halving, tokens, traced
from zoo import decoders, mixtures
from zoo.case import randomise


class Interrupted(Exception):
    """What stops a run."""


class Stopping(Halving):
    """Fails in the middle of one group, after its first weight."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def treat(self, group, observers, weights):
        for item in super().treat(group, observers, weights):
            yield item
            if group.index == self.at:
                raise Interrupted


def run(program, treatment, data, **options):
    return stream(program, find_sites(program), batches(program, data), treatment, **options)


def check_resumed(program, data, folder, every, held=None, replayed=None):
    """Interrupt at every group in turn, resume, and compare with a run that saves nothing.

    `replayed` tells which groups are gone through again with their saved weights.
    """
    whole = Halving()
    expected = run(program, whole, data, held=held)
    total = len(find_sites(program).groups)
    for at in range(total):
        directory = folder / f"{every}-{at}"
        with pytest.raises(Interrupted):
            run(program, Stopping(at), data, state=State(directory, every=every), held=held)
        again, steps = Halving(), []
        state = State(directory, every=every, resume=True)
        new = run(program, again, data, state=state, held=held, progress=steps.append)
        assert set(new) == set(expected)
        assert all(torch.equal(new[n], expected[n]) for n in expected)
        assert [g.index for g in again.groups] == list(range(at, total))
        for name, moments in again.moments.items():
            for a, b in zip(moments, whole.moments[name], strict=True):
                assert a.rows == b.rows
                assert not a.rows or torch.equal(a.total, b.total)
        again_from = replayed(at) if replayed else at - at % every if every else 0
        assert [s.group.index for s in steps if s.restored] == list(range(again_from, at))
        assert not list(directory.glob("activations-*"))
        assert not list(directory.glob(".*"))


@pytest.mark.parametrize("every", [0, 1, 3])
def test_resuming_after_every_group_gives_the_same_bits(tmp_path, every):
    check_resumed(traced(decoders.llama_gqa_4)[0], tokens(), tmp_path, every)


def test_resuming_with_activations_in_half_precision(tmp_path):
    check_resumed(traced(decoders.gpt2)[0], tokens(), tmp_path, 1, torch.bfloat16)


def test_resuming_with_experts(tmp_path):
    check_resumed(traced(mixtures.mixtral)[0], tokens(2), tmp_path, 1)


def test_resuming_a_run_with_a_half_done_statistic(tmp_path):
    """Weights that are used twice: activations can't be gone on from until they are treated."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = self.b(self.a(x).relu()).relu()
            return self.c(self.a(self.b(x).relu()).relu())

    program = gp.trace(randomise(Twice()), (torch.randn(2, 8),))
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    assert find_sites(program).parameters == ("b.weight", "a.weight")
    check_resumed(program, list(x.split(1)), tmp_path, 1, replayed=lambda at: 0)


@pytest.mark.parametrize(
    ("seconds", "saved"), [(0.1, [0]), (30.0, [0, 4]), (200.0, [0, 1, 2, 3, 4])]
)
def test_activations_are_saved_where_it_takes_little_of_the_time(
    tmp_path, monkeypatch, seconds, saved
):
    """Here it takes five seconds each time, and a group takes so many."""
    now, found = [1000.0], []

    def values():
        found.append(len(times))
        now[0] += 5.0
        return []

    monkeypatch.setattr(states, "time", SimpleNamespace(monotonic=lambda: now[0]))
    state, times = State(tmp_path), []
    for index in range(5):
        state.commit(index, values)
        times.append(index)
        now[0] += seconds
    assert found == saved
    assert sorted(p.name for p in tmp_path.glob("activations-*")) == [f"activations-{saved[-1]:05}"]


def test_nothing_keeps_activations_that_were_written_or_read(tmp_path):
    """Only counting references: gigabytes can't wait until Python looks for cycles."""

    def tensors():
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = tensors()
        values = [{"x": torch.ones(3), "pair": (torch.ones(2), [torch.zeros(1)])}]
        state = State(tmp_path, every=1)
        state.commit(0, lambda values=values: values)
        _, again = state.load_values()
        assert torch.equal(again[0]["pair"][0], torch.ones(2))
        assert tensors() >= before + 6
        del values, again
        assert tensors() == before
    finally:
        gc.enable()


def test_a_finished_run_resumes_to_its_weights(tmp_path):
    program = traced(decoders.llama_gqa_4)[0]
    first = run(program, Halving(), tokens(), state=State(tmp_path))
    again = Halving()
    second = run(program, again, tokens(), state=State(tmp_path, resume=True))
    assert not again.groups
    assert all(torch.equal(first[n], second[n]) for n in first)


def begun(program, directory, data=None):
    with pytest.raises(Interrupted):
        run(program, Stopping(2), tokens() if data is None else data,
            state=State(directory, recipe="half", every=1))  # fmt: skip


def test_other_runs_are_refused(tmp_path):
    program, _ = traced(decoders.llama_gqa_4)
    begun(program, tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())

    def resumed(why, program=program, data=None, recipe="half", **options):
        state = State(tmp_path, recipe=recipe, resume=True)
        with pytest.raises(LoadError, match="belongs to another run") as caught:
            run(program, Halving(), tokens() if data is None else data, state=state, **options)
        assert why in str(caught.value)

    resumed("the recipe is another", recipe="third")
    resumed("the samples are others", data=tokens(4))
    resumed("the samples are others", data=tokens(3, seed=6))
    resumed("its dtype is torch.float32, not torch.float64", dtype=torch.float64)
    resumed("other shapes", program=traced(decoders.llama_mha)[0])
    name = "model.layers.1.mlp.up_proj.weight"
    other = apply_weights(program, {name: program.weights[name].detach() * 2})
    resumed("the model has other weights", program=other)
    with pytest.raises(LoadError, match="holds a run already"):
        run(program, Halving(), tokens(), state=State(tmp_path, recipe="half"))
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_foreign_and_damaged_directories(tmp_path):
    program = traced(decoders.llama_gqa_4)[0]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    with pytest.raises(LoadError, match="something else"):
        run(program, Halving(), tokens(), state=State(foreign, resume=True))
    for number, (name, text) in enumerate(
        [
            ("manifest.json", "{"),
            ("manifest.json", json.dumps({"done": "2"})),
            ("group-00001.safetensors", "short"),
            ("activations-00001/values.json", "[{"),
            ("activations-00001/model.safetensors", "short"),
        ]
    ):
        directory = tmp_path / str(number)
        begun(program, directory)
        (directory / name).write_text(text)
        with pytest.raises(LoadError) as caught:
            run(program, Halving(), tokens(),
                state=State(directory, recipe="half", resume=True))  # fmt: skip
        assert name.partition("/")[0] in str(caught.value)
