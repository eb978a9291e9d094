"""The repair ``match``: for plans, whoever made them, and from recipes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import graphprune as gp
from graphprune.errors import PlanError, RecipeError
from graphprune.passes.repair import REPAIRS
from graphprune.passes.repair.matching import Matching
from graphprune.passes.repair.structured import reconstruct
from graphprune.streaming import State
from passes.match.models import halves, net, relative, windows


@pytest.fixture(scope="module")
def dense():
    return gp.trace(net(), (windows(1)[0],))


@pytest.fixture(scope="module")
def repaired(dense):
    return Matching(lr=1e-2).repair(dense, windows(), halves(dense))


def distance(dense, program, plan) -> float:
    """Of the slim model's stream to the dense one's, on samples that nobody has seen."""
    generator = torch.Generator().manual_seed(8)
    fresh = [torch.randn(1, 30, 6, generator=generator) for _ in range(4)]
    slim = gp.apply(program, plan).module
    found = [slim.stream(x) for x in fresh]
    return relative(found, [dense.module.stream(x) for x in fresh])


def test_it_is_better_than_reconstruction_alone(dense, repaired):
    fitted = reconstruct(dense, windows(), halves(dense))
    alone = distance(dense, fitted.program, fitted.plan)
    assert distance(dense, repaired.program, repaired.plan) < 0.8 * alone
    begun = Matching(lr=1e-2, first="none").repair(dense, windows(), halves(dense))
    assert distance(dense, begun.program, begun.plan) < distance(dense, dense, halves(dense))


def test_the_slim_model_computes_what_the_masked_one_does(dense, repaired):
    found = gp.apply(repaired.program, repaired.plan)
    assert gp.verify(repaired.program, repaired.plan, found).passed
    # Without reconstruct the columns that go are no zeros, and the masked model has to leave them.
    begun = Matching(lr=1e-2, first="none").repair(dense, windows(), halves(dense))
    found = gp.verify(begun.program, begun.plan, gp.apply(begun.program, begun.plan))
    assert found.passed
    assert found.dense_difference > 0


def test_every_changed_weight_has_an_entry(dense, repaired):
    entries = {e.parameter: e for e in repaired.layers}
    assert len(entries) == len(repaired.layers)
    changed = {
        n for n in dense.trainable if not torch.equal(repaired.program.weights[n], dense.weights[n])
    }
    assert changed == {e.parameter for e in repaired.layers}
    assert {n for n in dense.trainable if n.startswith("layers")} == changed
    for name, entry in entries.items():
        assert entry.removed == (5 if name.endswith("down.weight") else 0)
        assert entry.error < entry.before
        assert name.rpartition(".")[0].rpartition(".")[0] in entry.notes[0]


def test_what_goes_is_zero_where_it_is_read(repaired):
    gone = [1, 4, 6, 8, 9]
    for i in range(3):
        assert not repaired.program.weights[f"layers.{i}.down.weight"][:, gone].any()


def test_resuming_either_stage_gives_the_same_bits(dense, repaired, tmp_path):
    class Interrupted(Exception):
        pass

    for at in (1, 4):  # steps: three of reconstruct, then three blocks
        left, directory = [at], tmp_path / str(at) / "repair"

        def tell(step, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise Interrupted

        own = Matching(lr=1e-2)
        plan, data = halves(dense), windows()
        with pytest.raises(Interrupted):
            own.repair(dense, data, plan, progress=tell, state=State(directory))
        found = own.repair(dense, data, plan, state=State(directory, resume=True))
        assert found.layers == repaired.layers
        for name in dense.trainable:
            assert torch.equal(found.program.weights[name], repaired.program.weights[name])


def test_options_come_from_recipes():
    assert "match" in REPAIRS.names()
    assert REPAIRS.build("match", {"epochs": 1, "first": "none"}) == Matching(
        epochs=1, first="none"
    )
    assert Matching(epochs=2).passes == 2 + 3 + 3 * 2
    with pytest.raises(RecipeError, match="reconstruct or none"):
        Matching(first="bias")
    with pytest.raises(ValueError, match="epoch"):
        REPAIRS.build("match", {"epoch": 1})


@pytest.mark.parametrize("score", ["magnitude", "obs"])
def test_a_recipe(tmp_path, score):
    data = torch.cat(windows())
    np.save(tmp_path / "data.npy", data.numpy())
    recipe = {
        "remove": {"ffn": 0.5},
        "score": score,
        "repair": {"name": "match", "lr": 1e-2, "epochs": 1},
        "calibration": {"data": str(tmp_path / "data.npy")},
        "formats": ["pt2"],
    }
    report = gp.compile(net(), recipe, tmp_path / "out", example=(data[:1],))
    assert report.refits is not None
    assert report.refits.method == "match"
    assert {e.parameter for e in report.refits.layers} >= {"layers.2.up.weight"}


def test_refusals():
    flat = gp.trace(
        torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 6)).eval(), (windows(1)[0],)
    )
    plan = gp.select(flat, remove={"*": 0.5}, score="random")
    with pytest.raises(PlanError, match="no residual blocks"):
        Matching().repair(flat, windows(), plan)
    with pytest.raises(PlanError, match="no residual blocks"):
        Matching().check(flat, plan)


def test_onnx_graphs_are_refused(tmp_path):
    torch.onnx.export(net(), (windows(1)[0],), tmp_path / "net.onnx", verbose=False)
    program = gp.load(tmp_path / "net.onnx")
    with pytest.raises(PlanError, match="an ONNX graph doesn't have") as told:
        Matching().check(program, gp.Plan(program.fingerprint, {}))
    assert "repair by reconstruct" in str(told.value)
