"""Interrupted runs go on to the same bits; directories of other runs are told apart."""

from __future__ import annotations

import pytest
import torch

import graphprune as gp
from graphprune.errors import LoadError
from graphprune.passes.match import Match, masks_of, match
from graphprune.streaming import State, apply_weights
from passes.match.models import halves, net, windows


class Interrupted(Exception):
    """What stops a run."""


@pytest.fixture(scope="module")
def dense():
    return gp.trace(net(), (windows(1)[0],))


@pytest.fixture(scope="module")
def student(dense):
    weight = dense.weights["layers.0.up.weight"].detach()
    return apply_weights(dense, {"layers.0.up.weight": weight.where(weight > 0, 0)})


def run(dense, student, **options):
    masks = masks_of(student, ["layers.0.up.weight"])
    chosen = options.pop("options", Match(lr=1e-2, epochs=1))
    return match(dense, student, windows(4), halves(dense), masks=masks, options=chosen, **options)


def stopping(at):
    """Progress that stops the run after a block."""

    def tell(step):
        if step.group.index == at:
            raise Interrupted

    return tell


@pytest.mark.parametrize("held", ["float32", "bfloat16"])
@pytest.mark.parametrize("every", [0, 1, 2])
def test_resuming_after_every_block_gives_the_same_bits(dense, student, tmp_path, every, held):
    options = Match(lr=1e-2, epochs=1, held=held)
    expected = run(dense, student, options=options)
    assert any(b.stays for b in expected.blocks)
    for at in range(3):
        directory = tmp_path / str(at)
        state = State(directory, every=every)
        with pytest.raises(Interrupted):
            run(dense, student, options=options, state=state, progress=stopping(at))
        steps = []
        state = State(directory, every=every, resume=True)
        found = run(dense, student, options=options, state=state, progress=steps.append)
        assert found.blocks == expected.blocks
        for name in dense.trainable:
            assert torch.equal(found.program.weights[name], expected.program.weights[name])
        trained = [s.group.index for s in steps if not s.restored]
        assert trained == list(range(at + 1, 3))
        again = [s.group.index for s in steps if s.restored]
        saved = (at + 1) // every * every if every else 0
        assert again == ([] if at == 2 else list(range(saved, at + 1)))
        assert not list(directory.glob("activations-*"))


def test_directories_of_other_runs(dense, student, tmp_path):
    run(dense, student, state=State(tmp_path))
    with pytest.raises(LoadError, match="holds a run already"):
        run(dense, student, state=State(tmp_path))
    with pytest.raises(LoadError, match="belongs to another run"):
        run(dense, student, state=State(tmp_path, resume=True), options=Match(lr=2e-2, epochs=1))
    weight = student.weights["layers.1.up.weight"].detach()
    other = apply_weights(student, {"layers.1.up.weight": weight + 1})
    with pytest.raises(LoadError, match="belongs to another run"):
        run(dense, other, state=State(tmp_path, resume=True))
    with pytest.raises(LoadError, match="belongs to another run"):
        run(other, student, state=State(tmp_path, resume=True))
