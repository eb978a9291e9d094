"""Inputs on which the original SparseGPT and Wanda go wrong, with the right values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphprune.errors import CalibrationError, RecipeError
from graphprune.passes.masks.alps import ALPS
from graphprune.passes.masks.dsnot import DSnoT
from graphprune.passes.masks.magnitude import Magnitude
from graphprune.passes.masks.ria import RIA
from graphprune.passes.masks.sparsegpt import SparseGPT
from graphprune.passes.masks.wanda import Wanda
from graphprune.solvers import NM, Given, Moments, Norms, Solver, Unstructured
from solvers.oracle import damped, error_on, inputs, layer, lost, moment, surgery

SOLVERS: list[Solver] = [
    Magnitude(), Magnitude(group="row"), Wanda(), RIA(), SparseGPT(), ALPS(), DSnoT(),
]  # fmt: skip
WITH_DATA = SOLVERS[2:]


def named(solver: object) -> str:
    return type(solver).__name__


def zeros(solver, weight, statistic, pattern) -> int:
    solved = solver.solve(weight, statistic, pattern)
    assert (solved.weight[~solved.mask] == 0).all()
    return int((~solved.mask).sum())


@pytest.mark.parametrize("solver", SOLVERS, ids=named)
def test_half_of_the_weights_is_half(solver) -> None:
    weight, statistic, _ = layer(8, 256, 1000, dtype=torch.float32)
    assert zeros(solver, weight, statistic, Unstructured(0.5)) == 1024  # not 1026


@pytest.mark.parametrize("solver", SOLVERS, ids=named)
def test_no_sparsity_leaves_the_layer_alone(solver) -> None:
    weight, statistic, _ = layer(8, 256, 1000, dtype=torch.float32)
    solved = solver.solve(weight, statistic, Unstructured(0.0))
    assert torch.equal(solved.weight, weight)
    assert solved.mask.all()
    assert solved.error == 0


@pytest.mark.parametrize("sparsity", [1.0, 1.5, -0.1, float("nan")])
def test_sparsity_out_of_range_is_told(sparsity: float) -> None:
    with pytest.raises(RecipeError, match="not at least 0 and below 1"):
        Unstructured(sparsity)


@pytest.mark.parametrize("solver", SOLVERS, ids=named)
def test_ties_go_by_index(solver) -> None:
    weight = torch.ones(8, 64)
    weight[1::2, ::3] = -1
    statistic = moment(10 * torch.eye(64))
    assert zeros(solver, weight, statistic, Unstructured(0.5)) == 256  # not 512
    solved = solver.solve(weight, statistic, Unstructured(0.5))
    again = solver.solve(weight.clone(), moment(10 * torch.eye(64)), Unstructured(0.5))
    assert torch.equal(solved.mask, again.mask)
    first = Magnitude().solve(weight, None, Unstructured(0.5)).mask
    assert not first[:4].any()
    assert first[4:].all()


@pytest.mark.parametrize("solver", SOLVERS, ids=named)
@pytest.mark.parametrize(("n", "m"), [(1, 4), (3, 4), (2, 4), (2, 8), (4, 8), (10, 16)])
def test_n_of_m_are_kept(solver, n: int, m: int) -> None:
    weight, statistic, _ = layer(12, 48, dtype=torch.float32)
    solved = solver.solve(weight, statistic, NM(n, m))
    assert (solved.mask.reshape(-1, m).sum(1) == n).all()  # 1:4 has a density of .25, not .75
    assert ((solved.weight != 0).reshape(-1, m).sum(1) == n).all()


@pytest.mark.parametrize("solver", SOLVERS, ids=named)
@pytest.mark.parametrize(("features", "tail"), [(6, 2), (5, 1), (3, 3), (131, 3)])
def test_a_tail_stays_dense_and_is_told(solver, features: int, tail: int) -> None:
    weight, statistic, _ = layer(8, features, dtype=torch.float32)
    solved = solver.solve(weight, statistic, NM(2, 4))
    assert solved.mask[:, features - tail :].all()
    assert (solved.mask[:, : features - tail].reshape(-1, 4).sum(1) == 2).all()
    assert NM(2, 4).tail(features) == tail
    assert f"the last {tail} of {features} columns stay dense: no whole group" in solved.notes


@pytest.mark.parametrize("block", [1, 6, 7, 130])
def test_groups_do_not_start_anew_at_a_block(block: int) -> None:
    weight, statistic, x = layer(8, 24)
    solved = SparseGPT(mask_block=block, lazy_block=5).solve(weight, statistic, NM(2, 4))
    assert (solved.mask.reshape(-1, 4).sum(1) == 2).all()
    wanted, _ = surgery(weight, damped(x), solved.mask.numpy())
    np.testing.assert_allclose(solved.weight.numpy(), wanted, atol=1e-9)


@pytest.mark.parametrize("solver", WITH_DATA, ids=named)
@pytest.mark.parametrize("came", ["nothing", "zeros"])
def test_a_layer_without_data_is_pruned_by_magnitude(solver, came: str) -> None:
    weight, _, _ = layer(8, 32, dtype=torch.float32)
    statistic = Moments(32)
    assert statistic.silent
    if came == "zeros":
        statistic.add(torch.zeros(5, 32))
    solved = solver.solve(weight, statistic, Unstructured(0.5))
    by_row = isinstance(solver, Wanda | DSnoT)
    wanted = Magnitude("row" if by_row else "layer").solve(weight, None, Unstructured(0.5))
    assert torch.equal(solved.mask, wanted.mask)
    assert torch.equal(solved.weight, wanted.weight)
    assert solved.weight.any()
    assert solved.error is None
    assert solved.notes[0].endswith("pruned by magnitude")
    rounded = SparseGPT(bits=4).solve(weight, statistic, Unstructured(0.5))
    assert torch.equal(rounded.weight, rounded.grid.round(rounded.weight))
    assert (rounded.weight[~rounded.mask] == 0).all()


def test_dead_inputs_do_not_set_the_damping() -> None:
    x = inputs(1000, 256)
    x /= x.std()
    dead = torch.arange(256) % 10 == 5
    x[:, dead] = 0
    assert int(dead.sum()) == 26
    weight = torch.randn(32, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for solver in (SparseGPT(), ALPS()):
        errors = [
            lost(solver.solve(weight, moment(x * scale), Unstructured(0.5)))
            for scale in (1.0, 1e-4)
        ]
        assert errors[1] == pytest.approx(errors[0], rel=1e-6)
        wanda = Wanda().solve(weight, moment(x * 1e-4), Unstructured(0.5))
        assert errors[1] < 0.7 * lost(wanda)
        solved = solver.solve(weight, moment(x * 1e-4), Unstructured(0.5))
        assert not solved.mask[:, dead].any()
        assert int((~solved.mask).sum()) == 4096
        assert "26 of 256 inputs are always zero" in solved.notes
    # The live columns are solved as though the others were not there.
    kept = SparseGPT().solve(weight, moment(x * 1e-4), Unstructured(0.5))
    live = ~dead
    wanted, _ = surgery(weight[:, live], damped(x[:, live]), kept.mask[:, live].numpy())
    np.testing.assert_allclose(kept.weight[:, live].numpy(), wanted, atol=1e-8)


def test_dead_inputs_beyond_the_budget_keep_their_weights() -> None:
    x = inputs(100, 32)
    x[:, 4:] = 0
    weight = torch.randn(8, 32, dtype=torch.float64)
    for solver in (SparseGPT(mask_block=8), ALPS(), Wanda()):
        solved = solver.solve(weight, moment(x), Unstructured(0.5))
        assert int((~solved.mask).sum()) == 128
        assert torch.equal(
            solved.weight[:, 4:][solved.mask[:, 4:]], weight[:, 4:][solved.mask[:, 4:]]
        )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", [Norms, Moments])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bad_activations_are_named(bad: float, kind, dtype: torch.dtype) -> None:
    statistic = kind(8)
    statistic.add(torch.ones(2, 3, 8, dtype=dtype), "layers.3.up, sample 6")
    before = statistic.norms.clone()
    x = torch.ones(2, 3, 8, dtype=dtype)
    x[1, 2, 4] = bad
    with pytest.raises(CalibrationError) as caught:
        statistic.add(x, "layers.3.up, sample 7")
    assert str(caught.value) == (
        "1 of 48 activations are NaN or infinite\n  where: layers.3.up, sample 7\n"
        "  why: the first is feature 4 of token 5\n"
        "  do: leave this sample out, or run the model in a wider type"
    )
    assert statistic.tokens == 6
    assert torch.equal(statistic.norms, before)


def test_damping_grows_where_the_hessian_has_no_factor() -> None:
    x = inputs(5, 16)  # rank 5
    weight = torch.randn(4, 16, dtype=torch.float64)
    kept = torch.rand(4, 16) < 0.5
    solved = SparseGPT(damping=0.0).solve(weight, moment(x), Given(kept))
    assert "damping raised from 0 to 1e-06" in solved.notes
    wanted, _ = surgery(weight, damped(x, 1e-6), kept.numpy())
    np.testing.assert_allclose(solved.weight.numpy(), wanted, rtol=1e-4, atol=1e-4)
    narrow = SparseGPT(damping=0.0, double=False).solve(
        weight.float(), moment(x.float()), Given(kept)
    )
    assert torch.isfinite(narrow.weight).all()
    # Inputs of very unequal size are no reason to damp, in float32 either.
    x = inputs(500, 16)
    x[:, 3] *= 1e3
    for double in (True, False):
        solved = SparseGPT(double=double).solve(weight.float(), moment(x.float()), Given(kept))
        assert solved.notes == ()
    full = SparseGPT(damping=0.0).solve(weight, moment(inputs(100, 16)), Given(kept))
    assert full.notes == ()


@pytest.mark.parametrize("solver", [Wanda(), Magnitude(group="row"), DSnoT()], ids=named)
def test_counts_are_rounded_not_cut(solver) -> None:
    weight, statistic, _ = layer(4, 100, dtype=torch.float32)
    solved = solver.solve(weight, statistic, Unstructured(0.29))
    assert (~solved.mask).sum(1).tolist() == [29] * 4  # int(100 * .29) is 28
    assert Unstructured(0.6).count(11008) == 6605
    assert solved.sparsity == pytest.approx(0.29)


@pytest.mark.parametrize("solver", SOLVERS, ids=named)
def test_a_weight_that_is_nan_is_told(solver) -> None:
    weight, statistic, _ = layer(8, 32, dtype=torch.float32)
    weight[2, 7] = float("nan")
    for pattern in (Unstructured(0.5), NM(2, 4)):
        with pytest.raises(CalibrationError, match="1 of 256 weights are NaN or infinite"):
            solver.solve(weight, statistic, pattern)


@pytest.mark.parametrize("solver", [SparseGPT(), ALPS()], ids=named)
def test_norms_are_not_enough(solver) -> None:
    weight, _, x = layer(4, 8)
    norms = Norms(8)
    norms.add(x)
    with pytest.raises(CalibrationError, match="needs a second moment"):
        solver.solve(weight, norms, NM(2, 4))


def test_a_score_that_overflows_is_told() -> None:
    weight = torch.full((2, 8), 1e30)
    statistic = moment(torch.full((4, 8), 1e15, dtype=torch.float64))
    with pytest.raises(CalibrationError, match="16 of 16 scores are NaN or infinite"):
        Wanda().solve(weight, statistic, Unstructured(0.5))


def test_magnitude_of_tied_weights_is_exact() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = (weight * 4).round() / 4  # some twenty magnitudes
    for sparsity in (0.1, 0.5, 0.9):
        solved = Magnitude().solve(weight, None, Unstructured(sparsity))
        assert int((~solved.mask).sum()) == round(sparsity * 4096)
        assert weight.abs()[~solved.mask].max() <= weight.abs()[solved.mask].min()


def test_the_error_is_that_of_the_outputs() -> None:
    weight, statistic, x = layer(12, 300, 500, dtype=torch.float32)
    for solver in SOLVERS:
        solved = solver.solve(weight, statistic, Unstructured(0.5))
        assert solved.error == pytest.approx(error_on(x, weight, solved.weight), rel=1e-3)
