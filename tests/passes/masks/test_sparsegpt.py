"""SparseGPT against surgery in float64 that inverts the remaining Hessian at every column."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphprune.errors import RecipeError
from graphprune.passes.masks.magnitude import Magnitude
from graphprune.passes.masks.sparsegpt import SparseGPT
from graphprune.passes.masks.wanda import Wanda
from graphprune.solvers import NM, Given, Unstructured
from graphprune.solvers.quantise import grid
from solvers.oracle import (
    damped,
    error_on,
    inputs,
    layer,
    lost,
    moment,
    rows_smallest,
    smallest,
    surgery,
)


def close(found: torch.Tensor, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("features", [1, 5, 8, 29])
@pytest.mark.parametrize("blocks", [(128, 32), (4, 3), (1, 1)])
def test_given_mask(features: int, blocks: tuple[int, int]) -> None:
    weight, statistic, x = layer(6, features)
    kept = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    solver = SparseGPT(mask_block=blocks[0], lazy_block=blocks[1])
    solved = solver.solve(weight, statistic, Given(kept))
    wanted, _ = surgery(weight, damped(x), kept.numpy())
    close(solved.weight, wanted)
    assert torch.equal(solved.mask, kept)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(("block", "lazy"), [(4, 2), (8, 8), (128, 5), (8, 100)])
def test_chosen_masks(sparsity: float, block: int, lazy: int) -> None:
    weight, statistic, x = layer(10, 24, seed=1)
    solver = SparseGPT(mask_block=block, lazy_block=lazy)
    solved = solver.solve(weight, statistic, Unstructured(sparsity))

    def choose(start: int, scores: np.ndarray) -> np.ndarray:
        done, more = round(sparsity * 10 * start), round(sparsity * 10 * (start + scores.shape[1]))
        return ~smallest(scores, more - done)

    wanted, kept = surgery(weight, damped(x), step=block, choose=choose)
    assert (solved.mask.numpy() == kept).all()
    close(solved.weight, wanted)
    assert int((~solved.mask).sum()) == round(sparsity * 240)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (4, 8), (2, 3)])
@pytest.mark.parametrize("features", [24, 26])
def test_chosen_groups(n: int, m: int, features: int) -> None:
    weight, statistic, x = layer(7, features, seed=2)
    solved = SparseGPT(mask_block=6).solve(weight, statistic, NM(n, m))

    def choose(start: int, scores: np.ndarray) -> np.ndarray:
        return ~rows_smallest(scores, m - n if scores.shape[1] == m else 0)

    wanted, kept = surgery(weight, damped(x), step=m, choose=choose)
    assert (solved.mask.numpy() == kept).all()
    close(solved.weight, wanted)


def test_joint_quantisation() -> None:
    weight, statistic, x = layer(6, 20, seed=3)
    weight[2] = weight[2].abs() + 1  # a row that doesn't span zero
    weight[4] = 0
    for bits in (4, 8):
        lattice = grid(weight, bits)
        scale, zero = lattice.scale.numpy(), lattice.zero.numpy()

        def rounded(w: np.ndarray, scale=scale, zero=zero, top=2**bits - 1) -> np.ndarray:
            return (np.clip(np.round(w / scale) + zero, 0, top) - zero) * scale

        solved = SparseGPT(bits=bits, mask_block=8).solve(weight, statistic, Unstructured(0.5))
        counts = iter([24, 24, 12])

        def choose(_: int, scores: np.ndarray, counts=counts) -> np.ndarray:
            return ~smallest(scores, next(counts))

        wanted, kept = surgery(weight, damped(x), step=8, choose=choose, rounding=rounded)
        assert (solved.mask.numpy() == kept).all()
        close(solved.weight, wanted)
        assert (solved.weight[~solved.mask] == 0).all()
        codes = solved.weight / solved.grid.scale[:, None] + solved.grid.zero[:, None]
        assert torch.allclose(codes, codes.round(), atol=1e-9)
        assert codes.min() > -1e-9
        assert codes.max() < 2**bits - 1 + 1e-9
        again = solved.grid.scale[:, None] * (
            solved.grid.codes(solved.weight) - solved.grid.zero[:, None]
        )
        assert torch.equal(again, solved.weight)


def test_quantisation_alone_beats_rounding() -> None:
    weight, statistic, x = layer(16, 40)
    solved = SparseGPT(bits=4).solve(weight, statistic, Unstructured(0))
    assert solved.mask.all()
    nearest = grid(weight, 4).round(weight)
    assert error_on(x, weight, solved.weight) < 0.8 * error_on(x, weight, nearest)


def test_the_lazy_block_changes_nothing_but_rounding() -> None:
    weight, statistic, _ = layer(32, 100, seed=4)
    for pattern in (Given(torch.rand(32, 100) < 0.4), Unstructured(0.6), NM(2, 4)):
        first, *others = (
            SparseGPT(lazy_block=b).solve(weight, statistic, pattern) for b in (1, 7, 128)
        )
        for other in others:
            assert torch.equal(other.mask, first.mask)
            torch.testing.assert_close(other.weight, first.weight, rtol=0, atol=1e-11)


def test_float32_is_close_to_float64() -> None:
    weight, statistic, x = layer(64, 200, 2000, seed=5)
    narrow = moment(x.float())
    kept = SparseGPT().solve(weight, statistic, Unstructured(0.5))
    for double in (True, False):
        solved = SparseGPT(double=double).solve(weight.float(), narrow, Given(kept.mask))
        assert solved.weight.dtype == torch.float32
        torch.testing.assert_close(solved.weight.double(), kept.weight, rtol=0, atol=2e-3)


def test_error_and_order_of_methods() -> None:
    weight, statistic, x = layer(48, 64, seed=6)
    errors = []
    for solver in (SparseGPT(mask_block=16), Wanda(), Magnitude()):
        solved = solver.solve(weight, statistic, Unstructured(0.5))
        errors.append(lost(solved))
        assert solved.error == pytest.approx(error_on(x, weight, solved.weight), rel=1e-9)
    assert errors == sorted(errors)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", [Unstructured(0.6), NM(2, 4), Unstructured(0.02)])
@pytest.mark.parametrize("options", [{}, {"bits": 4}, {"damping": 0.5}, {"mask_block": 8}])
def test_the_error_is_that_of_the_outputs(dtype: torch.dtype, pattern, options: dict) -> None:
    """Without the damping, and with inputs that are always zero."""
    x = inputs(300, 37)
    x[:, [0, 5, 36]] = 0
    x = x.to(torch.promote_types(dtype, torch.float32))
    weight = layer(20, 37)[0].to(dtype)
    solved = SparseGPT(**options).solve(weight, moment(x), pattern)
    wanted = error_on(x, weight, solved.weight)
    rel, of_energy = (1e-9, 1e-15) if dtype == torch.float64 else (1e-4, 1e-8)
    assert lost(solved) == pytest.approx(wanted, rel=rel, abs=of_energy)


def test_bf16_weights_are_solved_in_float32_and_cast_once() -> None:
    weight, statistic, _ = layer(16, 32, dtype=torch.float32)
    narrow = weight.bfloat16()
    solved = SparseGPT().solve(narrow, statistic, Unstructured(0.5))
    wide = SparseGPT().solve(narrow.float(), statistic, Unstructured(0.5))
    assert torch.equal(solved.weight, wide.weight.bfloat16())
    assert torch.equal(solved.mask, wide.mask)


def test_twice_the_same_bits() -> None:
    for pattern in (Unstructured(0.5), NM(2, 4)):
        weight, statistic, _ = layer(48, 96, dtype=torch.float32)
        again, other, _ = layer(48, 96, dtype=torch.float32)
        a, b = (
            SparseGPT().solve(weight, statistic, pattern),
            SparseGPT().solve(again, other, pattern),
        )
        assert torch.equal(a.weight, b.weight)
        assert torch.equal(a.mask, b.mask)
        assert torch.equal(SparseGPT().solve(weight, statistic, pattern).weight, a.weight)


def test_the_dense_weight_is_left_alone() -> None:
    weight, statistic, _ = layer(8, 16)
    before, products = weight.clone(), statistic.products.clone()
    SparseGPT().solve(weight, statistic, Unstructured(0.5))
    SparseGPT(bits=4).solve(weight, statistic, NM(2, 4))
    assert torch.equal(weight, before)
    assert torch.equal(statistic.products, products)


def test_existing_zeros_are_kept_on_request() -> None:
    weight, statistic, _ = layer(16, 32)
    once = SparseGPT(mask_block=8).solve(weight, statistic, Unstructured(0.6))
    same = SparseGPT(mask_block=8).solve(once.weight, statistic, Unstructured(0.6, preserve=True))
    assert torch.equal(same.mask, once.mask)
    more = SparseGPT(mask_block=8).solve(once.weight, statistic, Unstructured(0.8, preserve=True))
    assert not (more.mask & ~once.mask).any()
    assert int((~more.mask).sum()) == round(0.8 * 512)
    grouped = SparseGPT().solve(once.weight, statistic, NM(2, 4, preserve=True))
    assert not (grouped.mask & ~once.mask).any()
    assert int(grouped.mask.reshape(-1, 4).sum(1).max()) == 2


def test_few_tokens_are_told() -> None:
    weight, statistic, _ = layer(8, 16, tokens=9)
    assert "9 tokens for 16 inputs" in SparseGPT().solve(weight, statistic, NM(2, 4)).notes


@pytest.mark.parametrize("options", [{"mask_block": 0}, {"lazy_block": 0}, {"damping": -1.0}])
def test_options_out_of_range(options: dict) -> None:
    with pytest.raises(RecipeError):
        SparseGPT(**options)
